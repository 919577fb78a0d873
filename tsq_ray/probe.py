"""The probe of `--dry-run`: time a few videos on one node with all of its workers busy.

It runs as many decoding child processes and networks in parallel as the run has workers on that
node, each with the run's threads, so that contention is part of the measurement. Writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tsq_ray import cost, schema, storage
from tsq_ray.asking.questions import ServerModel
from tsq_ray.bundle.weights import load_bundle
from tsq_ray.config import Config
from tsq_ray.decode import DecodedVideo, FrameSpec, VideoSource
from tsq_ray.feature_pipeline import Networks, feature_row
from tsq_ray.manifest import VideoRef
from tsq_ray.rows import Row, num_recognized, prediction_row
from tsq_ray.runtime.nodes import Cluster, Layout, Node, Stage
from tsq_ray.runtime.placement import layout
from tsq_ray.stages import Decode, Sample, bundle_specs, recognizer_for

_REQUESTS_S, _WAITED_S = "_requests_s", "_waited_s"
"""Columns for what an extraction's server took, which are not written."""
Finish = Callable[[VideoRef, Any], Row]
"""Maps a decoded video, or its failure, to its row."""


@dataclass(frozen=True)
class Loaded:
    """A stage with its networks loaded: what it does with a video."""

    finish: Finish
    schema: pa.Schema
    specs: Mapping[str, FrameSpec]


@dataclass(frozen=True)
class ProbeRequest:
    """What a probe measures; serialised to the node that measures it."""

    stage: Stage
    config: Config
    load: Callable[[Layout], Loaded]
    chosen: tuple[VideoRef, ...]
    videos: int
    """Number of videos in the run."""


@dataclass(frozen=True)
class Probe:
    """Measurements of the chosen videos. Seconds and bytes are means per video."""

    layout: Layout
    """The run's, on this node alone."""
    cpus: float
    """The node's."""
    uris: tuple[str, ...]
    failed: int
    seconds: float
    """Of the whole node."""
    decode_s: float
    """Of one decoding process."""
    network_s: float
    """Of one worker's networks."""
    load_s: float
    """Total time to load the networks, not per video."""
    row_bytes: float
    """Compressed."""
    video_s: float
    """Footage."""
    dense: float | None
    """As in `cost.Used`."""
    tokens: tuple[float, float] = (0.0, 0.0)
    """Sent to the recogniser's server, and received from it."""
    spent: tuple[float, float] = (0.0, 0.0)
    """The same, as sums over the whole probe, warm-up included."""
    requests_s: float = 0.0
    """For which requests to the server were in flight. `seconds` and `network_s` leave the waiting
    for them out."""


def load_extract(
    config: Config, networks: Networks, classes: Sequence[str], placed: Layout
) -> Loaded:
    """Load the networks of an extraction."""
    loaded = networks.load()
    encode = loaded.encode(config, placed.device)

    def finish(ref: VideoRef, video: Any) -> Row:
        features = encode([video])[0] if isinstance(video, DecodedVideo) else None
        row = feature_row(ref, video, features)
        if features is not None:
            row |= {_REQUESTS_S: features.requests_s, _WAITED_S: features.waited_s}
        return row

    specs = networks.specs(config.resources.resizes_on_device(placed.on_gpu))
    return Loaded(finish, loaded.features_schema(config, classes), specs)


def load_score(config: Config, model: str, classes: Sequence[str], placed: Layout) -> Loaded:
    """Load the networks of a bundle."""
    device, bundle = torch.device(placed.device), load_bundle(model)
    sample = Sample(bundle, config.sampler, device, config.resources)
    recognize = recognizer_for(bundle, config, device)

    def finish(ref: VideoRef, video: Any) -> Row:
        return prediction_row(ref, recognize(sample([(ref.video_id, video)]))[0])

    native_size = config.resources.resizes_on_device(placed.on_gpu)
    return Loaded(
        finish,
        schema.predictions_schema(
            config.decode.num_frames,
            len(bundle.classes),
            classes,
            from_server=isinstance(bundle.recognizer, ServerModel),
        ),
        bundle_specs(bundle, config.sampler.mode, native_size),
    )


def probe_videos(request: ProbeRequest, node: Node) -> Probe:
    """Process the chosen videos here, on `node`, with one of its GPUs if the run uses GPUs."""
    node = replace(node, gpus=min(1.0, node.gpus))
    placed = layout(request.stage, request.config, Cluster((node,)), request.videos)
    started = time.perf_counter()
    loaded = request.load(placed)
    load_s = time.perf_counter() - started
    workers, threads = _parallel(placed)
    decoders = placed.pools.get("decoder")
    children = workers if decoders is None else decoders.now * placed.decoder_processes
    with Decode(request.config.decode, loaded.specs, children) as decode:
        warm, rows, network_s, seconds = _probe(
            request.chosen, decode, loaded.finish, workers, threads
        )
    asks = request.config.recognizer.kind == "openai"
    requests_s, waited_s = _server_seconds(rows) if asks else (0.0, 0.0)
    ok = [row for row in rows if row["status"] == "ok"]
    return Probe(
        layout=placed,
        cpus=node.cpus,
        uris=tuple(storage.redact(ref.uri) for ref in request.chosen),
        failed=len(rows) - len(ok),
        seconds=max(0.0, seconds - waited_s / workers),
        decode_s=_mean([row.get("_decode_s") or row.get("decode_ms", 0) / 1000 for row in ok]),
        network_s=max(0.0, network_s - waited_s),
        load_s=load_s,
        row_bytes=_encoded_size(rows, loaded.schema) / len(rows),
        video_s=_mean([row["duration_s"] or 0.0 for row in ok]),
        dense=_dense([row for row in ok if "selected_slot" in row]),
        tokens=_tokens(rows, 1 / len(rows)),
        spent=_tokens([*warm, *rows]),
        requests_s=requests_s,
    )


def _parallel(placed: Layout) -> tuple[int, int]:
    """Return how many networks run in parallel on the node, and the threads of each."""
    if "worker" in placed.pools:
        return placed["worker"].now, placed.threads
    if "sampler" in placed.pools and not placed.on_gpu:
        return placed.threads, 1  # a replica processes one video per thread, in parallel
    return 1, placed.threads


def _probe(
    chosen: Sequence[VideoRef], decode: Decode, finish: Finish, workers: int, threads: int
) -> tuple[list[Row], list[Row], float, float]:
    """Return the rows of the warm-up, the rows of the chosen videos, and seconds per video.

    The seconds are those of the networks, then those of everything.
    """
    spent: list[float] = []

    def work(ref: VideoRef, decoded: Future[Any]) -> Row:
        video = decoded.result()
        started = time.perf_counter()
        row = finish(ref, video)
        spent.append(time.perf_counter() - started)
        return row

    # set_num_threads applies to the calling thread only
    with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, threads)) as pool:

        def run(refs: Sequence[VideoRef]) -> list[Row]:
            return list(
                pool.map(work, refs, [decode.pool.submit(VideoSource.of(ref)) for ref in refs])
            )

        # warm up every worker before measuring
        warm = run([chosen[number % len(chosen)] for number in range(workers)])
        spent.clear()
        started = time.perf_counter()
        rows = run(chosen)
        return warm, rows, _mean(spent), (time.perf_counter() - started) / len(chosen)


def _dense(rows: Sequence[Mapping[str, Any]]) -> float | None:
    sums = {name: sum(row[f"{name}_ms"] or 0.0 for row in rows) for name in cost.STAGES}
    frames = [len(row["frame_pts_s"]) for row in rows]
    recognized = sum(map(num_recognized, frames, [row["selected_by"] for row in rows]))
    if recognized and any("tokens_in" in row for row in rows):
        return round(sum(frames) / recognized, 2)
    return cost.dense(sums, sum(frames) / recognized) if recognized else None


def _server_seconds(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return means per video: for how long requests were in flight, and until all were answered.

    In scoring both are the same, because a video's requests follow each other.
    """
    answers = [(row.get("recognize_ms") or 0.0) / 1000 for row in rows]
    in_flight, waited = (
        [row.get(name, answer) for row, answer in zip(rows, answers, strict=True)]
        for name in (_REQUESTS_S, _WAITED_S)
    )
    return _mean(in_flight), _mean(waited)


def _tokens(rows: Sequence[Mapping[str, Any]], weight: float = 1.0) -> tuple[float, float]:
    sent, received = (
        weight * sum(row.get(column.name) or 0 for row in rows) for column in schema.TOKENS
    )
    return sent, received


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _encoded_size(rows: Sequence[Row], arrow: pa.Schema) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.table_from_rows(rows, arrow), sink, compression="zstd")
    return sink.getvalue().size
