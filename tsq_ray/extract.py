"""Ray Data: manifest -> feature Parquet, one row a video.

On a CPU-only cluster each worker decodes (in a killable child) and encodes; on GPUs decoding is a stage of its own. Workers hand
rows on as plain Arrow lists, and a last stage publishes them as parts of the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tsq_ray import runs, runtime, schema, storage
from tsq_ray.config import Config, ModelConfig
from tsq_ray.decode import WHOLE, DecodedVideo, DecodePool, FrameSpec
from tsq_ray.encoders import NUM_OBJECTS, FrameEncoder
from tsq_ray.errors import ModelError, StorageError, VideoError
from tsq_ray.manifest import VideoRef, read_manifest
from tsq_ray.rows import OBJECTS, RECOGNIZER, VISUAL, failed_row, picture_specs, source_of, source_row
from tsq_ray.stages import Encode, FrameFeatures, classifier_settings, load_network


@dataclass(frozen=True)
class ExtractPlan:
    """What a worker needs to know; travels to it whole."""

    config: Config
    recognizer: ModelConfig | None
    schema: pa.Schema
    counts: Any
    threads: int
    out: str = ""
    on_gpu: bool = False

    def specs(self) -> dict[str, FrameSpec]:
        """What one decode makes of each frame."""
        return picture_specs(self.config.encoders, True, self.recognizer, "both", self.config.resources.resizes_on_device(self.on_gpu))


def extract(
    manifest_uri: str,
    out: str,
    config: Config,
    *,
    encoder: str | None = None,
    recognizer: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    retry_failed: str | None = None,
    take_over: bool = False,
    address: str | None = None,
    show_progress: bool = True,
    debug: bool = False,
) -> dict[str, Any]:
    """Extract features of every video of a manifest into the run folder `out`; resumes an earlier run.

    `encoder` and `recognizer` are outputs of `finetune`. `take_over` takes the folder from another
    run that writes to it. Returns the content of `_run.json`. Raises UserError for wrong input,
    RunFailed if the run failed or does not add up.
    """
    started = time.time()
    out = storage.normalize(out)
    manifest = read_manifest(manifest_uri)
    selection = runs.Selection.of(manifest, split, limit, retry_failed)
    if encoder is not None:
        config = config.model_copy(update={"encoders": config.encoders.model_copy(update={"visual": classifier_settings(encoder)})})
    recognizer_settings = classifier_settings(recognizer) if recognizer is not None else None
    networks = load_networks(config, recognizer_settings)
    features = networks.features_schema(config, manifest.classes)
    identity = _identity(config, recognizer_settings, networks)
    options: dict[str, Any] = {"started": started, "take_over": take_over}
    with runs.BulkRun(out, "features", identity, selection, config, **options) as run:
        todo, seconds = run.todo, {}
        if todo:
            with runtime.cluster(address, debug) as ray:
                plan = ExtractPlan(
                    config,
                    recognizer_settings,
                    features,
                    runtime.start_counts(),
                    _threads(config, ray),
                    out,
                    runtime.num_gpus(ray, config) > 0,
                )
                try:
                    seconds = runtime.run_with_progress(
                        lambda: _run_pipeline(ray, todo, plan, debug), plan.counts, len(todo), "extract", show_progress
                    )
                except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
                    raise runtime.run_failed(error, "extract") from error
        return run.close(seconds, lambda: {"weights": networks.hashes()})


@dataclass
class Networks:
    """The encoders of an extraction."""

    visual: FrameEncoder
    objects: FrameEncoder
    recognizer: FrameEncoder | None

    def num_logits(self) -> int | None:
        """C of the recogniser."""
        return self.recognizer.head.out_features if self.recognizer is not None else None  # type: ignore[union-attr,return-value]

    def features_schema(self, config: Config, classes: Sequence[str]) -> pa.Schema:
        """Of the features that they make with these settings."""
        return schema.features_schema(config.decode.num_frames, self.visual.dim, classes, self.num_logits(), config.encoders.num_objects)

    def encode(self, config: Config) -> Encode:
        """The networks at work with these settings."""
        return Encode(self.visual, self.objects, self.recognizer, num_objects=config.encoders.num_objects, how=config.resources)

    def hashes(self) -> dict[str, str]:
        """Identity of each network's weights; the object recogniser's with its head, which makes the objects."""
        found = {VISUAL: self.visual.backbone_hash(), OBJECTS: self.objects.state_hash()}
        if self.recognizer is not None:
            found[RECOGNIZER] = self.recognizer.state_hash()
        return found


def load_networks(config: Config, recognizer: ModelConfig | None) -> Networks:
    """Load the encoders. ModelError where weights are missing or are not what they are used for."""
    visual = load_network(config.encoders.visual, with_head=False)
    visual.head = None
    objects = load_network(config.encoders.objects, with_head=True)
    if getattr(objects.head, "out_features", 0) != NUM_OBJECTS:
        raise ModelError(f"encoders.objects {config.encoders.objects.model!r}: needs a head over ImageNet-1K's 1000 objects")
    return Networks(visual, objects, load_network(recognizer, with_head=True) if recognizer is not None else None)


def _identity(config: Config, recognizer: ModelConfig | None, networks: Networks) -> runs.Identity:
    decode = {"strategy", "backend", "num_frames", "max_pixels", "max_duration_s", "max_bytes"}
    # where weights lie does not matter, what they are does
    encoders: dict[str, Any] = {
        "visual": config.encoders.visual.model_dump(mode="json", exclude={"weights"}),
        "objects": config.encoders.objects.model_dump(mode="json", exclude={"weights"}),
        "num_objects": config.encoders.num_objects,
    }
    return runs.Identity.of(
        decode=config.decode.model_dump(mode="json", include=decode),
        encoders=encoders,
        recognizer=recognizer.model_dump(mode="json", exclude={"weights"}) if recognizer else None,
        weights=networks.hashes(),
    )


def _threads(config: Config, ray: Any) -> int:
    if config.resources.threads:
        return config.resources.threads
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // _num_workers(config, ray))


def _num_workers(config: Config, ray: Any) -> int:
    return config.resources.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))


def _run_pipeline(ray: Any, todo: Sequence[VideoRef], plan: ExtractPlan, debug: bool) -> dict[str, float]:
    runtime.quiet_data(debug)
    config, cpus, gpus = plan.config, float(ray.cluster_resources().get("CPU", 1)), runtime.num_gpus(ray, plan.config)
    batch = config.resources.batch_size
    pool = ray.data.ActorPoolStrategy
    common: dict[str, Any] = {"batch_size": batch, "batch_format": "pyarrow", "fn_constructor_args": (plan,), **runtime.RETRIES}
    if gpus or config.resources.decoders:
        decoders = min(config.resources.decoders or max(1, int(cpus) - 1), len(todo))
        encoders = min(max(1, gpus), len(todo))
        each = runtime.share_cpus(cpus, decoders, reserve=0.5 + 0.2 * encoders)
        block = runtime.block_rows(len(todo), decoders, batch, config.output.rows_per_file)
        data = runtime.todo_dataset(ray, todo, block).map_batches(DecodeWorker, compute=pool(size=decoders), num_cpus=each, **common)
        gpu = {"num_gpus": 1} if gpus else {}
        data = data.map_batches(EncodeWorker, compute=pool(size=encoders), num_cpus=0.2, **gpu, **common)
    else:
        workers = min(_num_workers(config, ray), len(todo))
        block = runtime.block_rows(len(todo), workers, batch, config.output.rows_per_file)
        data = runtime.todo_dataset(ray, todo, block).map_batches(
            ExtractWorker, compute=pool(size=workers), num_cpus=runtime.share_cpus(cpus, workers), **common
        )
    return runtime.write_parts(data, plan.out, plan.schema, config.output, block)


def _feature_row(ref: VideoRef, video: DecodedVideo, features: FrameFeatures) -> dict[str, Any]:
    row = source_row(ref, video) | {"frame_index": video.frame_index, "visual": features.visual}
    row |= {"object_ids": features.object_ids, "object_probs": features.object_probs}
    return row | ({"recognizer_logits": features.recognizer_logits} if features.recognizer_logits is not None else {})


def _make_encode(plan: ExtractPlan) -> Encode:
    import torch

    torch.set_num_threads(plan.threads)
    return load_networks(plan.config, plan.recognizer).encode(plan.config)


class ExtractWorker:
    """Decode and encode in one worker: while the network runs on one video, the child decodes the next."""

    def __init__(self, plan: ExtractPlan) -> None:
        self.plan = plan
        self.encode = _make_encode(plan)
        self.pool = DecodePool(plan.config.decode, plan.specs(), 1)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Manifest rows -> transport table of feature rows."""
        refs = runtime.refs_of(batch)
        futures: list[Future[Any]] = [self.pool.submit(source_of(ref)) for ref in refs]
        rows = []
        for ref, future in zip(refs, futures, strict=True):
            video = future.result()
            started = time.perf_counter()
            if isinstance(video, DecodedVideo):
                row = _feature_row(ref, video, self.encode([video])[0])
                row |= {runtime.DECODE_S: video.decode_ms / 1000, runtime.ENCODE_S: time.perf_counter() - started}
            else:
                row = failed_row(ref, video)
            rows.append(row)
            self.plan.counts.add.remote([row.get("error_type")])
        return runtime.transport_table(rows, self.plan.schema)


class DecodeWorker:
    """Decode alone, beside GPU encoders: frames travel as bytes through the object store."""

    def __init__(self, plan: ExtractPlan) -> None:
        self.names = list(plan.specs())
        self.pool = DecodePool(plan.config.decode, plan.specs(), 1)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Manifest rows -> the same rows with the decoded frames or the failure."""
        refs = runtime.refs_of(batch)
        packed = [pack_video(video, self.names) for video in self.pool.decode([source_of(ref) for ref in refs])]
        for name, column_type in packed_fields(self.names).items():
            batch = batch.append_column(name, pa.array([row.get(name) for row in packed], column_type))
        return batch


class EncodeWorker:
    """Encode alone, on a GPU."""

    def __init__(self, plan: ExtractPlan) -> None:
        self.plan, self.specs = plan, plan.specs()
        self.encode = _make_encode(plan)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows with frames -> transport table of feature rows."""
        refs = runtime.refs_of(batch)
        videos = [
            unpack_video(record, self.specs) for record in batch.drop_columns(list(batch.column_names[: len(schema.MANIFEST)])).to_pylist()
        ]
        started = time.perf_counter()
        live = [video for video in videos if isinstance(video, DecodedVideo)]
        features = iter(self.encode(live))
        share = (time.perf_counter() - started) / max(1, len(live))
        rows = []
        for ref, video in zip(refs, videos, strict=True):
            if isinstance(video, DecodedVideo):
                rows.append(_feature_row(ref, video, next(features)) | {runtime.DECODE_S: video.decode_ms / 1000, runtime.ENCODE_S: share})
            else:
                rows.append(failed_row(ref, video))
        self.plan.counts.add.remote([row.get("error_type") for row in rows])
        return runtime.transport_table(rows, self.plan.schema)


_FRAMES = "frames_"
_PACKED = {
    "error_type": pa.string(),
    "error_message": pa.string(),
    "warnings": pa.list_(pa.string()),
    "slot_frame": pa.list_(pa.int32()),
    "frame_index": pa.list_(pa.int32()),
    "frame_pts_s": pa.list_(pa.float32()),
    "duration_s": pa.float64(),
    "fps": pa.float64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "codec": pa.string(),
    "source_num_frames": pa.int64(),
    "decode_ms": pa.float64(),
}


def packed_fields(names: Sequence[str]) -> dict[str, pa.DataType]:
    """Column types of `pack_video`."""
    return _PACKED | {f"{_FRAMES}{name}": pa.large_binary() for name in names}


def pack_video(video: DecodedVideo | VideoError | StorageError, names: Sequence[str]) -> dict[str, Any]:
    """A decoded video, or its failure, as Arrow values; of `names` those pictures that it has."""
    if not isinstance(video, DecodedVideo):
        return {"error_type": video.error_type, "error_message": str(video)}
    lists = {name: getattr(video, name).tolist() for name in ("slot_frame", "frame_index", "frame_pts_s")}
    plain = {name: getattr(video, name) for name in _PACKED if name not in lists and not name.startswith("error_")}
    return lists | plain | {f"{_FRAMES}{name}": video.frames[name].tobytes() for name in names if name in video.frames}


def unpack_video(record: Mapping[str, Any], specs: Mapping[str, FrameSpec]) -> DecodedVideo | VideoError:
    """The inverse of `pack_video`."""
    if record["error_type"] is not None:
        return VideoError(record["error_type"], record["error_message"])
    values = {name: record[name] for name in _PACKED if not name.startswith("error_")}
    for name, dtype in (("slot_frame", np.int32), ("frame_index", np.int32), ("frame_pts_s", np.float32)):
        values[name] = np.array(values[name], dtype)
    frames = {}
    for name, spec in specs.items():
        if (data := record[f"{_FRAMES}{name}"]) is not None:
            height, width = (record["height"], record["width"]) if name == WHOLE else (spec.size, spec.size)
            frames[name] = np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)
    return DecodedVideo(frames=frames, **values)
