"""`--dry-run`: estimate a run from a probe of a few videos. Writes nothing.

The probe processes PROBES videos, an equal share of each size class, on one node: this machine, or
a worker of the cluster. Its figures are scaled to the nodes that the run would use, by the run's
layout on them. The start-up of Ray and its workers is added.
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
"""Start-up of Ray and its workers; the probe measures only the loading of the networks."""

_SET_SEPARATELY = ("videos", "tokens_cost")
"""Fields of `Used` that an Estimate sets itself or shows only as part of the cost."""


@dataclass(frozen=True)
class Target:
    """The nodes that an estimate is for."""

    session: Session = DEFAULT_SESSION
    """The probe runs on a node of its cluster or, without an address, on this machine."""
    nodes: int | None = None
    """This many nodes like the probed one; by default, those that the run could use."""
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
    manifest, todo = _find_todo("features", manifest_uri, split, limit, out, retry_failed)
    config, networks = choose_networks(config, encoder, recognizer)
    load = partial(load_extract, config, networks, manifest.classes)
    request = ProbeRequest("extract", config, load, _choose_probes(todo), max(1, len(todo)))
    return _estimate(request, todo, len(manifest.rows), target or Target())


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
    manifest, todo = _find_todo("predictions", manifest_uri, split, limit, out, retry_failed)
    load = partial(load_score, config, storage.normalize(model), manifest.classes)
    request = ProbeRequest("score", config, load, _choose_probes(todo), max(1, len(todo)))
    return _estimate(request, todo, len(manifest.rows), target or Target())


def _find_todo(
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


def _choose_probes(todo: VideoRows) -> tuple[Any, ...]:
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


def _estimate(request: ProbeRequest, todo: VideoRows, inputs: int, target: Target) -> Estimate:
    facts: dict[str, Any] = {
        "videos": len(todo),
        "inputs": inputs,
        "bytes_in": pc.sum(todo.table["size_bytes"]).as_py() or 0,
    }
    if not request.chosen:
        return Estimate(**facts)
    # the probe runs on one node, which cannot have the labels of all parts
    resources = request.config.resources.model_copy(update={"labels": LabelsConfig()})
    request = replace(request, config=request.config.model_copy(update={"resources": resources}))
    probe, nodes = _measure(request, target)
    return Estimate(**facts, **predict(probe, request, nodes, target.price))


def _measure(request: ProbeRequest, target: Target) -> tuple[Probe, list[Node]]:
    """Return the probe and the nodes that the run would use."""
    session, here = target.session, this_machine()
    if not session.joins_cluster:
        return probe_videos(request, here), [here] * (target.nodes or 1)
    with cluster.connect(session) as ray:
        connected = cluster.read_cluster(ray, request.config)
        check_known(connected)
        placed = layout(request.stage, request.config, connected, request.videos)
        node = max(connected.every_node(), key=lambda node: (node.gpus * placed.on_gpu, node.cpus))
        node = replace(node, cpus=node.cpus or connected.largest_cpus)
        gpus = 1 if placed.on_gpu else 0
        memory = max(pool.memory for pool in placed.pools.values())
        options = {"num_cpus": node.cpus, "num_gpus": gpus, "memory": memory, "max_restarts": 0}
        prober = ray.remote(**options)(_Prober).remote()
        log.say(f"dry run: probing {len(request.chosen)} videos on a node with {node.cpus:g} CPUs")
        try:
            probe = progress.run_watched(
                lambda: ray.get(prober.measure.remote(request, node)), "dry run", session
            )
        except ray.exceptions.RayError as error:
            raise cluster.run_failed(error, "dry run") from error
        finally:
            ray.kill(prober)
    if target.nodes:
        return probe, [node] * target.nodes
    return probe, usable_nodes(placed, connected)


def check_known(connected: Cluster) -> None:
    """Raise RunError if neither a live node nor `resources.node_types` shows the size of a node."""
    if not any(node.cpus for node in connected.every_node()):
        raise RunError(
            "--dry-run: no worker node of the cluster is up, and resources.node_types names none; "
            "set it to the nodes that the autoscaler can start, for example "
            "--set 'resources.node_types=[{cpus = 8, count = 16}]'"
        )


class _Prober:
    """Actor that probes the node on which Ray places it."""

    def measure(self, request: ProbeRequest, node: Node) -> Probe:
        """Process the chosen videos there."""
        return probe_videos(request, node)


def predict(
    probe: Probe, request: ProbeRequest, nodes: Sequence[Node], price: Price | None = None
) -> dict[str, Any]:
    """Return the fields of an Estimate for a run on these nodes."""
    videos, planned = request.videos, Cluster(tuple(nodes))
    placed = layout(request.stage, request.config, planned, videos)
    seconds = _seconds(request, probe, planned, placed)
    hours = (seconds * videos + STARTUP_S + probe.load_s) / 3600
    gpus = planned.gpus if placed.on_gpu else 0
    used = _used(probe, request, planned.cpus * hours, gpus * hours)
    return {
        "probed": probe.uris,
        "probed_failed": probe.failed,
        "workers": _networks(placed),
        "seconds_a_video": round(seconds, 4),
        "wall_seconds": round(hours * 3600, 1),
        "bytes_out": int(probe.row_bytes * videos),
        "nodes": len(nodes),
        "cpus": planned.cpus,
        "gpus": gpus,
        "probed_tokens_in": round(probe.spent[0]),
        "probed_tokens_out": round(probe.spent[1]),
        "cost": used.cost(price),
        **{name: value for name, value in asdict(used).items() if name not in _SET_SEPARATELY},
    }


def _seconds(request: ProbeRequest, probe: Probe, planned: Cluster, placed: Layout) -> float:
    """Return the seconds per video of a run with this layout on these nodes."""
    own = probe.seconds / _speed(request, probe, planned, placed)
    server = request.config.recognizer
    if request.stage != "extract":
        return max(own, probe.requests_s / server.max_concurrent)
    # each worker has its share of the requests, all about one video, and waits for the answers
    workers, num_frames = _networks(placed), request.config.decode.num_frames
    in_flight = workers * min(server.requests_per_worker(workers), num_frames)
    return own + probe.requests_s / in_flight


def _used(probe: Probe, request: ProbeRequest, cpu_hours: float, gpu_hours: float) -> Used:
    """Return what the whole run would take."""
    sent, received = (each * request.videos for each in probe.tokens)
    return Used(
        cpu_hours=round(cpu_hours, 4),
        gpu_hours=round(gpu_hours, 4),
        videos=request.videos,
        video_hours=round(probe.video_s * request.videos / 3600, 4),
        dense=probe.dense,
        tokens_in=round(sent),
        tokens_out=round(received),
        tokens_cost=tokens_cost(request.config.recognizer.model_dump(), sent, received),
    )


def _networks(placed: Layout) -> int:
    return next(
        placed[name].now for name in ("worker", "encoder", "sampler") if name in placed.pools
    )


def _speed(request: ProbeRequest, probe: Probe, planned: Cluster, placed: Layout) -> float:
    """Return how many times as fast as the probe a run with this layout on these nodes is."""
    own = probe.layout
    if placed.on_gpu:
        alone = _slowest(own, probe)
        return alone / _slowest(placed, probe) if alone else float(planned.gpus)
    # decoding and networks share the cores, and a video uses one core at a time
    cores = min(planned.cpus, request.videos) / min(probe.cpus, request.videos)
    return min(cores, _networks(placed) / _networks(own)) if "worker" in own.pools else cores


def _slowest(placed: Layout, probe: Probe) -> float:
    """Return the seconds per video of the slower of two pools: decoders, and networks on GPUs."""
    decoding = probe.decode_s / (placed["decoder"].now * placed.decoder_processes)
    return max(decoding, probe.network_s / _networks(placed))
