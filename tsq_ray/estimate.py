"""`--dry-run`: estimate a run from a probe of a few videos. No output.

The probe processes PROBES videos, an equal share of each class of file size, on one node: this
machine, or a worker of the cluster. Its figures are scaled to the nodes that the run would use by
the run's layout on them. The start-up of Ray and its workers is added.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from tsq_ray import log, storage
from tsq_ray.config import Config, LabelsConfig
from tsq_ray.cost import Price, Used, tokens_cost
from tsq_ray.errors import RunError
from tsq_ray.extraction import choose_networks
from tsq_ray.manifest import Manifest, VideoRows, read_manifest
from tsq_ray.probe import Probe, ProbeRequest, load_extract, load_score, probe_videos
from tsq_ray.results import Estimate
from tsq_ray.runs.bulk import Selection, todo_without_entering
from tsq_ray.runs.folder import Kind
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.nodes import Cluster, Layout, Node
from tsq_ray.runtime.placement import layout, usable_nodes
from tsq_ray.runtime.session import DEFAULT_SESSION, Session

PROBES = 16
"""Videos that are processed."""
STARTUP_S = 15.0
"""Start-up of Ray and its workers, which the probe cannot measure, unlike loading the networks."""

_UNTOLD = ("videos", "tokens_cost")
"""Of `Used`: what an Estimate says by itself, or only as money."""


@dataclass(frozen=True)
class Target:
    """The nodes that an estimate is for."""

    session: Session = DEFAULT_SESSION
    """Its cluster, on a node of which the probe runs; without an address, this machine."""
    nodes: int | None = None
    """That many nodes like the one of the probe; by default, those that the run could use."""
    price: Price | None = None


def estimate_extract(
    manifest_uri: str,
    config: Config,
    encoder: str | None = None,
    recognizer: str | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    out: str | None = None,
    retry_failed: str | None = None,
    target: Target | None = None,
) -> Estimate:
    """Estimate the time, cost and output size of the rest of an extraction into `out`.

    Extrapolates from PROBES videos. Raises as `extract` does.
    """
    manifest, todo = _to_do("features", manifest_uri, split, limit, out, retry_failed)
    config, networks = choose_networks(config, encoder, recognizer)
    load = partial(load_extract, config, networks, manifest.classes)
    asked = ProbeRequest("extract", config, load, _choose(todo), max(1, len(todo)))
    return _estimate(asked, todo, len(manifest.rows), target or Target())


def estimate_score(
    manifest_uri: str,
    model: str,
    config: Config,
    *,
    split: str | None = None,
    limit: int | None = None,
    out: str | None = None,
    retry_failed: str | None = None,
    target: Target | None = None,
) -> Estimate:
    """Estimate the time, cost and output size of the rest of a scoring run into `out`.

    Extrapolates from PROBES videos. Raises as `score` does.
    """
    manifest, todo = _to_do("predictions", manifest_uri, split, limit, out, retry_failed)
    load = partial(load_score, config, storage.normalize(model), manifest.classes)
    asked = ProbeRequest("score", config, load, _choose(todo), max(1, len(todo)))
    return _estimate(asked, todo, len(manifest.rows), target or Target())


def _to_do(
    kind: Kind,
    manifest_uri: str,
    split: str | None,
    limit: int | None,
    out: str | None,
    retry_failed: str | None,
) -> tuple[Manifest, VideoRows]:
    manifest = read_manifest(manifest_uri)
    selection = Selection.of(manifest, split, limit, retry_failed)
    if out is None:
        return manifest, selection.wanted
    return manifest, todo_without_entering(storage.normalize(out), kind, selection)


def _choose(todo: VideoRows) -> tuple[Any, ...]:
    """Return PROBES videos, the medians of equal shares by file size, the largest first.

    File size is a proxy for processing time. The largest come first, so that no worker finishes
    much later than the others.
    """
    order = pc.sort_indices(todo.table["size_bytes"]).to_numpy()[::-1]
    count = min(PROBES, len(order))
    places = ((np.arange(count) + 0.5) * len(order) / max(1, count)).astype(np.int64)
    return tuple(todo[int(place)] for place in order[places])


def this_machine() -> Node:
    """Return this machine as a node."""
    return Node(float(os.cpu_count() or 1), float(torch.cuda.device_count()))


def _estimate(asked: ProbeRequest, todo: VideoRows, inputs: int, target: Target) -> Estimate:
    facts: dict[str, Any] = {
        "videos": len(todo),
        "inputs": inputs,
        "bytes_in": pc.sum(todo.table["size_bytes"]).as_py() or 0,
    }
    if not asked.chosen:
        return Estimate(**facts)
    # the probe is one node, which cannot have the labels of all parts
    resources = asked.config.resources.model_copy(update={"labels": LabelsConfig()})
    asked = replace(asked, config=asked.config.model_copy(update={"resources": resources}))
    probe, nodes = _measured(asked, target)
    return Estimate(**facts, **predict(probe, asked, nodes, target.price))


def _measured(asked: ProbeRequest, target: Target) -> tuple[Probe, list[Node]]:
    """Return the probe and the nodes that the run would use."""
    session, here = target.session, this_machine()
    if not session.address and not os.environ.get("RAY_ADDRESS"):
        return probe_videos(asked, here), [here] * (target.nodes or 1)
    with cluster.connect(session) as ray:
        found = cluster.read_cluster(ray, asked.config)
        check_known(found)
        placed = layout(asked.stage, asked.config, found, asked.videos)
        node = max(found.every_node(), key=lambda node: (node.gpus * placed.on_gpu, node.cpus))
        node = replace(node, cpus=node.cpus or found.largest_cpus)
        gpus = 1 if placed.on_gpu else 0
        prober = ray.remote(num_cpus=node.cpus, num_gpus=gpus, max_restarts=0)(_Prober).remote()
        log.say(f"dry run: probing {len(asked.chosen)} videos on a node with {node.cpus:g} CPUs")
        try:
            probe = progress.run_watched(
                lambda: ray.get(prober.measure.remote(asked, node)), "dry run", session
            )
        except ray.exceptions.RayError as error:
            raise cluster.run_failed(error, "dry run") from error
        finally:
            ray.kill(prober)
    if target.nodes:
        return probe, [node] * target.nodes
    return probe, usable_nodes(placed, found)


def check_known(found: Cluster) -> None:
    """Raise RunError if neither a live node nor `resources.node_types` says what nodes are like."""
    if not any(node.cpus for node in found.every_node()):
        raise RunError(
            "--dry-run: no worker node of the cluster is up, and resources.node_types names none; "
            "set it to the nodes that the autoscaler can start, for example "
            "--set 'resources.node_types=[{cpus = 8, count = 16}]'"
        )


class _Prober:
    """Measures on the node of the cluster that Ray gives it."""

    def measure(self, asked: ProbeRequest, node: Node) -> Probe:
        """Measure there."""
        return probe_videos(asked, node)


def predict(
    probe: Probe, asked: ProbeRequest, nodes: Sequence[Node], price: Price | None = None
) -> dict[str, Any]:
    """Return what an Estimate says of a run on these nodes."""
    videos, found = asked.videos, Cluster(tuple(nodes))
    placed = layout(asked.stage, asked.config, found, videos)
    seconds = max(
        probe.seconds / _speed(asked, probe, found, placed),
        probe.requests_s / asked.config.recognizer.max_concurrent,
    )
    hours = (seconds * videos + STARTUP_S + probe.load_s) / 3600
    used = _used(probe, asked, found.cpus * hours, found.gpus * hours if placed.on_gpu else 0.0)
    return {
        "probed": probe.uris,
        "probed_failed": probe.failed,
        "workers": _networks(placed),
        "seconds_a_video": round(seconds, 4),
        "wall_seconds": round(hours * 3600, 1),
        "bytes_out": int(probe.row_bytes * videos),
        "nodes": len(nodes),
        "cpus": found.cpus,
        "gpus": found.gpus if placed.on_gpu else 0,
        "probed_tokens_in": round(probe.spent[0]),
        "probed_tokens_out": round(probe.spent[1]),
        "cost": used.cost(price),
        **{name: value for name, value in asdict(used).items() if name not in _UNTOLD},
    }


def _used(probe: Probe, asked: ProbeRequest, cpu_hours: float, gpu_hours: float) -> Used:
    """Return what a run of as many videos as asked for would take."""
    sent, received = (each * asked.videos for each in probe.tokens)
    return Used(
        cpu_hours=round(cpu_hours, 4),
        gpu_hours=round(gpu_hours, 4),
        videos=asked.videos,
        video_hours=round(probe.video_s * asked.videos / 3600, 4),
        dense=probe.dense,
        tokens_in=round(sent),
        tokens_out=round(received),
        tokens_cost=tokens_cost(asked.config.recognizer.model_dump(), sent, received),
    )


def _networks(placed: Layout) -> int:
    return next(
        placed[name].now for name in ("worker", "encoder", "sampler") if name in placed.pools
    )


def _speed(asked: ProbeRequest, probe: Probe, found: Cluster, placed: Layout) -> float:
    """Return how many times as fast as the probe a run is on these nodes with this layout."""
    own = probe.layout
    if placed.on_gpu:
        alone = _slowest(own, probe)
        return alone / _slowest(placed, probe) if alone else float(found.gpus)
    # decoding and networks share the cores, and a video needs one at a time
    cores = min(found.cpus, asked.videos) / min(probe.cpus, asked.videos)
    return min(cores, _networks(placed) / _networks(own)) if "worker" in own.pools else cores


def _slowest(placed: Layout, probe: Probe) -> float:
    """Return the seconds per video of the slower of two pools: decoders, and networks on GPUs."""
    decoding = probe.decode_s / (placed["decoder"].now * placed.decoder_processes)
    return max(decoding, probe.network_s / _networks(placed))
