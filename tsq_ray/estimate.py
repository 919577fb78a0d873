"""`--dry-run`: what a run would do, from a probe of a few videos on this machine. No Ray, no output."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsq_ray import schema, storage
from tsq_ray.bundle import load_bundle
from tsq_ray.config import Config
from tsq_ray.decode import DecodedVideo
from tsq_ray.extract import load_networks
from tsq_ray.manifest import VideoRef, VideoRows, choose_split, read_manifest
from tsq_ray.rows import OBJECTS, RECOGNIZER, VISUAL, failed_row, frame_spec, source_row
from tsq_ray.stages import Decode, Encode, Recognize, Sample, bundle_specs, classifier_settings

PROBES = 4
"""Videos that are really done, spread over the manifest."""
STARTUP_S = 20.0
"""Starting Ray and the workers, which no probe shows."""


def estimate_extract(
    manifest_uri: str, config: Config, encoder: str | None, recognizer: str | None, split: str | None, limit: int | None
) -> dict[str, Any]:
    """Time, GPU hours and output size of an extraction, extrapolated from PROBES videos."""
    wanted = choose_split(manifest := read_manifest(manifest_uri), split)[:limit]
    if encoder is not None:
        config = config.model_copy(update={"encoders": config.encoders.model_copy(update={"visual": classifier_settings(encoder)})})
    answerer = classifier_settings(recognizer) if recognizer is not None else None
    networks = load_networks(config, answerer)
    encode = Encode(networks.visual, networks.objects, networks.recognizer, num_objects=config.encoders.num_objects)
    specs = {VISUAL: frame_spec(config.encoders.visual), OBJECTS: frame_spec(config.encoders.objects)}
    if answerer is not None:
        specs[RECOGNIZER] = frame_spec(answerer)
    decode = Decode(config.decode, specs)
    arrow = networks.features_schema(config, manifest.classes)

    def run(ref: VideoRef) -> dict[str, Any]:
        video = decode([ref])[0]
        if not isinstance(video, DecodedVideo):
            return failed_row(ref, video)
        names = ("visual", "object_ids", "object_probs", "recognizer_logits")
        features = encode([video])[0]
        return source_row(ref, video) | {"frame_index": video.frame_index} | {name: getattr(features, name) for name in names}

    try:
        return _probe(wanted, len(manifest.rows), run, arrow)
    finally:
        decode.close()


def estimate_score(manifest_uri: str, model: str, config: Config, split: str | None, limit: int | None) -> dict[str, Any]:
    """Time, GPU hours and output size of a scoring, extrapolated from PROBES videos."""
    wanted = choose_split(manifest := read_manifest(manifest_uri), split)[:limit]
    bundle = load_bundle(model)
    sample, recognize = Sample(bundle, config.sampler), Recognize(bundle, config.sampler)
    decode = Decode(config.decode, bundle_specs(bundle, config.sampler.mode))
    arrow = schema.predictions_schema(config.decode.num_frames, len(bundle.classes), manifest.classes)

    def run(ref: VideoRef) -> dict[str, Any]:
        return recognize(sample([(ref, decode([ref])[0])]))[0]

    try:
        return _probe(wanted, len(manifest.rows), run, arrow)
    finally:
        decode.close()


def _probe(wanted: VideoRows, inputs: int, run: Callable[[VideoRef], dict[str, Any]], arrow: pa.Schema) -> dict[str, Any]:
    import torch

    chosen = [wanted[number * len(wanted) // min(PROBES, len(wanted))] for number in range(min(PROBES, len(wanted)))]
    run(chosen[0])  # the first one pays for warming up
    started = time.perf_counter()
    rows = [run(ref) for ref in chosen]
    seconds = (time.perf_counter() - started) / len(chosen)
    gpus = torch.cuda.device_count()
    # on the CPU the probe already keeps all cores busy while it encodes
    workers = max(1, gpus)
    wall = seconds * len(wanted) / workers + STARTUP_S
    return {
        "videos": len(wanted),
        "inputs": inputs,
        "bytes_in": pc.sum(wanted.table["size_bytes"]).as_py(),
        "probed": [storage.redact(ref.uri) for ref in chosen],
        "probed_failed": sum(row["status"] == "failed" for row in rows),
        "seconds_a_video": round(seconds, 3),
        "wall_seconds": round(wall, 1),
        "gpu_hours": round(seconds * len(wanted) / 3600, 3) if gpus else 0.0,
        "cpu_hours": round(seconds * len(wanted) * (os.cpu_count() or 1) / 3600, 3),
        "bytes_out": int(_encoded_size(rows, arrow) / len(rows) * len(wanted)),
    }


def _encoded_size(rows: Sequence[dict[str, Any]], arrow: pa.Schema) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.table_from_rows(rows, arrow), sink, compression="zstd")
    return sink.getvalue().size
