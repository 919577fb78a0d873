"""`--dry-run`: estimate a run from a probe of a few videos on this machine. No Ray, no output.

The probe processes PROBES videos, an equal share of each class of file size. It runs as many
decoding child processes and networks in parallel as the run has workers, each with the run's
threads, so that contention is part of the measurement. The start-up of Ray and its workers is
added.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from tsq_ray import schema, storage
from tsq_ray.bundle.weights import load_bundle
from tsq_ray.config import Config
from tsq_ray.decode import DecodedVideo, FrameSpec
from tsq_ray.extraction import choose_networks
from tsq_ray.feature_pipeline import feature_row
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, read_manifest
from tsq_ray.results import Estimate
from tsq_ray.rows import prediction_row, source_of
from tsq_ray.runs.bulk import Selection, todo_without_entering
from tsq_ray.runs.folder import Kind
from tsq_ray.runtime.nodes import Cluster, Layout, Node
from tsq_ray.runtime.placement import layout
from tsq_ray.stages import Decode, Recognize, Sample, bundle_specs

PROBES = 16
"""Videos that are processed."""
STARTUP_S = 15.0
"""Start-up of Ray and its workers, which the probe cannot measure, unlike loading the networks."""

Finish = Callable[[VideoRef, Any], dict[str, Any]]
"""Maps a decoded video, or its failure, to its row."""


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
) -> Estimate:
    """Estimate the time, GPU hours and output size of the rest of an extraction into `out`.

    Extrapolates from PROBES videos.
    """
    manifest, todo = _to_do("features", manifest_uri, split, limit, out, retry_failed)
    config, networks = choose_networks(config, encoder, recognizer)
    placed = layout("extract", config, this_machine(), max(1, len(todo)))
    started = time.perf_counter()
    loaded = networks.load()
    encode = loaded.encode(config, placed.device)
    loading = time.perf_counter() - started
    arrow = loaded.features_schema(config, manifest.classes)
    specs = networks.specs(config.resources.resizes_on_device(placed.on_gpu))

    def finish(ref: VideoRef, video: Any) -> dict[str, Any]:
        features = encode([video])[0] if isinstance(video, DecodedVideo) else None
        return feature_row(ref, video, features)

    return _estimate(todo, len(manifest.rows), config, placed, specs, finish, arrow, loading)


def estimate_score(
    manifest_uri: str,
    model: str,
    config: Config,
    *,
    split: str | None = None,
    limit: int | None = None,
    out: str | None = None,
    retry_failed: str | None = None,
) -> Estimate:
    """Estimate the time, GPU hours and output size of the rest of a scoring run into `out`.

    Extrapolates from PROBES videos.
    """
    manifest, todo = _to_do("predictions", manifest_uri, split, limit, out, retry_failed)
    placed = layout("score", config, this_machine(), max(1, len(todo)))
    device = torch.device(placed.device)
    started = time.perf_counter()
    bundle = load_bundle(model)
    sample = Sample(bundle, config.sampler, device, config.resources)
    recognize = Recognize(bundle, device, config.resources)
    loading = time.perf_counter() - started
    arrow = schema.predictions_schema(
        config.decode.num_frames, len(bundle.classes), manifest.classes
    )
    specs = bundle_specs(
        bundle, config.sampler.mode, config.resources.resizes_on_device(placed.on_gpu)
    )

    def finish(ref: VideoRef, video: Any) -> dict[str, Any]:
        return prediction_row(ref, recognize(sample([(ref.video_id, video)]))[0])

    return _estimate(todo, len(manifest.rows), config, placed, specs, finish, arrow, loading)


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


def this_machine() -> Cluster:
    """Return this machine as a cluster of one node."""
    return Cluster((Node(float(os.cpu_count() or 1), float(torch.cuda.device_count())),))


def _estimate(
    wanted: VideoRows,
    inputs: int,
    config: Config,
    placed: Layout,
    specs: Mapping[str, FrameSpec],
    finish: Finish,
    arrow: pa.Schema,
    loading: float,
) -> Estimate:
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count() if placed.on_gpu else 0
    networks = next(
        placed[name] for name in ("worker", "encoder", "sampler") if name in placed.pools
    )
    # a replica of the sampler processes one video per thread, in parallel
    workers = 1 if gpus else networks.now if "worker" in placed.pools else placed.threads
    threads = placed.threads if "sampler" not in placed.pools else 1
    children = (
        placed["decoder"].now * placed.decoder_processes if "decoder" in placed.pools else workers
    )
    chosen = [wanted[int(place)] for place in _of_every_size(wanted)] if wanted else []
    rows: list[dict[str, Any]] = []
    seconds = wall = 0.0
    if chosen:
        with Decode(config.decode, specs, children) as decode:
            rows, seconds = _probe(chosen, decode, finish, workers, threads)
        seconds /= max(1, gpus)  # the probe ran on one GPU
        wall = seconds * len(wanted) + STARTUP_S + loading * max(1.0, workers / cpus)
    return Estimate(
        videos=len(wanted),
        inputs=inputs,
        bytes_in=pc.sum(wanted.table["size_bytes"]).as_py() or 0,
        probed=tuple(storage.redact(ref.uri) for ref in chosen),
        probed_failed=sum(row["status"] == "failed" for row in rows),
        workers=networks.now,
        seconds_a_video=round(seconds, 3),
        wall_seconds=round(wall, 1),
        gpu_hours=round(seconds * len(wanted) * gpus / 3600, 3),
        cpu_hours=round(seconds * len(wanted) * cpus / 3600, 3),
        bytes_out=int(_encoded_size(rows, arrow) / len(rows) * len(wanted)) if rows else 0,
    )


def _of_every_size(wanted: VideoRows) -> np.ndarray:
    """Return the positions of PROBES videos, the medians of equal shares by file size.

    File size is a proxy for processing time. The largest come first, so that no worker finishes
    much later than the others.
    """
    order = pc.sort_indices(wanted.table["size_bytes"]).to_numpy()[::-1]
    count = min(PROBES, len(order))
    return order[((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)]


def _probe(
    chosen: Sequence[VideoRef], decode: Decode, finish: Finish, workers: int, threads: int
) -> tuple[list[dict[str, Any]], float]:
    """Return the rows of the chosen videos, and the seconds per video with all workers busy."""

    def work(ref: VideoRef, decoded: Future[Any]) -> dict[str, Any]:
        return finish(ref, decoded.result())

    # set_num_threads applies to the calling thread only
    with ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:

        def run(refs: Sequence[VideoRef]) -> list[dict[str, Any]]:
            return list(pool.map(work, refs, [decode.pool.submit(source_of(ref)) for ref in refs]))

        # warm up every worker before measuring
        run([chosen[number % len(chosen)] for number in range(workers)])
        started = time.perf_counter()
        rows = run(chosen)
        return rows, (time.perf_counter() - started) / len(chosen)


def _encoded_size(rows: Sequence[dict[str, Any]], arrow: pa.Schema) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.table_from_rows(rows, arrow), sink, compression="zstd")
    return sink.getvalue().size
