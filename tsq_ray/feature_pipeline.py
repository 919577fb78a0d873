"""Decoding and networks as Ray Data stages: manifest rows -> feature rows.

Shared by extraction and by fine-tuning on a frozen backbone. On CPUs each worker decodes, in a
killable child process, and encodes; with GPUs decoding is a separate stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import torch

from tsq_ray import schema
from tsq_ray.asking.questions import Asking, ServerModel
from tsq_ray.bundle.settings import read_server
from tsq_ray.bundle.weights import load_network
from tsq_ray.config import SERVER_USE, Config, ModelConfig, RecognizerConfig
from tsq_ray.decode import (
    DecodedVideo,
    DecodePool,
    FrameSpec,
    Outcome,
    VideoSource,
    with_whole_frames,
)
from tsq_ray.errors import ModelError
from tsq_ray.manifest import VideoRef
from tsq_ray.networks.encoder import NUM_OBJECTS, FrameEncoder
from tsq_ray.rows import (
    OBJECTS,
    RECOGNIZER,
    VISUAL,
    Row,
    failed_row,
    frame_spec,
    identity_row,
    source_columns,
)
from tsq_ray.runs.bulk import BulkRun, Selection
from tsq_ray.runs.identity import Identity
from tsq_ray.runtime import blocks, cluster, parts, progress
from tsq_ray.runtime.bulk import BulkObserver, Work, run_bulk
from tsq_ray.runtime.nodes import Layout, Pool
from tsq_ray.runtime.packing import pack_video, packed_fields, unpack_video
from tsq_ray.runtime.session import Session
from tsq_ray.stages import Encode, FrameFeatures


@dataclass(frozen=True)
class Networks:
    """Settings of the networks that see each frame."""

    visual: ModelConfig
    objects: ModelConfig | None = None
    recognizer: RecognizerConfig | None = None
    """Its `weights` name the classifier."""

    def specs(self, native_size: bool) -> dict[str, FrameSpec]:
        """Return the specs of the pictures that one decode makes of each frame.

        `native_size` as in `rows.picture_specs`.
        """
        models = {VISUAL: self.visual, OBJECTS: self.objects, RECOGNIZER: self.recognizer}
        specs = {name: frame_spec(model) for name, model in models.items() if model is not None}
        return with_whole_frames(specs) if native_size else specs

    def load(self) -> LoadedNetworks:
        """Load the networks. Raises ModelError if weights are missing or do not fit their use."""
        visual = load_network(self.visual, with_head=False)
        visual.head = None
        objects = load_network(self.objects, with_head=True) if self.objects is not None else None
        if objects is not None and getattr(objects.head, "out_features", 0) != NUM_OBJECTS:
            raise ModelError(
                f"encoders.objects {objects.config.model!r}: "
                f"needs a head with the {NUM_OBJECTS} classes of ImageNet-1K"
            )
        recognizer: FrameEncoder | ServerModel | None = None
        if self.recognizer is not None and self.recognizer.kind == "openai":
            recognizer = read_server(self.recognizer.weights, self.recognizer)
        elif self.recognizer is not None:
            recognizer = load_network(self.recognizer, with_head=True)
        return LoadedNetworks(visual, objects, recognizer)


@dataclass
class LoadedNetworks:
    visual: FrameEncoder
    objects: FrameEncoder | None
    recognizer: FrameEncoder | ServerModel | None

    def features_schema(self, config: Config, classes: Sequence[str]) -> pa.Schema:
        """Return the schema of the features that the networks produce with these settings."""
        recognizer, logits = self.recognizer, None
        if isinstance(recognizer, ServerModel):
            logits = len(recognizer.classes)
        elif recognizer is not None:
            head: Any = recognizer.head
            logits = head.out_features
        return schema.features_schema(
            config.decode.num_frames,
            self.visual.dim,
            classes,
            logits,
            config.encoders.num_objects,
            from_server=isinstance(recognizer, ServerModel),
        )

    def encode(self, config: Config, device: str, workers: int = 1) -> Encode:
        """Return the encoding step that applies the networks with these settings.

        `workers`: how many workers share the requests that a server may have in flight. Raises
        ModelError if the server refuses the key.
        """
        own = self.recognizer
        recognizer = (
            Asking(own, own.config.requests_per_worker(workers))
            if isinstance(own, ServerModel)
            else own
        )
        num_objects, where = config.encoders.num_objects, torch.device(device)
        return Encode(self.visual, self.objects, recognizer, where, num_objects, config.resources)

    def hashes(self) -> dict[str, str]:
        """Return a hash of each network's weights.

        The visual encoder's hash leaves out its head, which is not used.
        """
        hashes = {VISUAL: self.visual.backbone_hash()}
        if self.objects is not None:
            hashes[OBJECTS] = self.objects.state_hash()
        if self.recognizer is not None:
            hashes[RECOGNIZER] = self.recognizer.state_hash()
        return hashes


@dataclass(frozen=True)
class FeaturePlan:
    """Everything a worker needs; serialised and sent to it."""

    config: Config
    networks: Networks
    schema: pa.Schema
    counts: Any
    layout: Layout

    def specs(self) -> dict[str, FrameSpec]:
        """Return the specs of the pictures that one decode makes of each frame."""
        return self.networks.specs(self.config.resources.resizes_on_device(self.layout.on_gpu))

    def start_encode(self) -> Encode:
        """Load the networks on the layout's device and set its number of threads."""
        torch.set_num_threads(self.layout.threads)
        workers = self.layout["worker" if "worker" in self.layout.pools else "encoder"].now
        return self.networks.load().encode(self.config, self.layout.device, workers)

    @property
    def first_pool(self) -> Pool:
        """The pool that the videos are sent to."""
        return self.layout["worker"] if "worker" in self.layout.pools else self.layout["decoder"]


def extract_features(
    out: str,
    selection: Selection,
    config: Config,
    networks: Networks,
    loaded: LoadedNetworks,
    session: Session,
    *,
    stage: Literal["extract", "finetune"] = "extract",
    started: float | None = None,
    take_over: bool = False,
    ticks: Sequence[Callable[[], None]] = (),
) -> dict[str, Any]:
    """Extract features of the selected videos into the run folder `out`, or resume an earlier run.

    `loaded` holds the networks loaded from `networks`; `take_over` as in `extract`. `stage` names
    the run in its layout and its progress; `ticks` are called twice a second. Returns the content
    of `_run.json`.
    """
    identity = _identity(config, networks, loaded)
    options: dict[str, Any] = {"started": started, "take_over": take_over}
    with BulkRun(out, "features", identity, selection, config, **options) as run:
        seconds: dict[str, float] = {}
        if run.todo:
            arrow = loaded.features_schema(config, selection.manifest.classes)
            with (
                cluster.connect(session, out=out) as ray,
                BulkObserver(
                    ray, run, stage, progress.start_counts(progress.RowCounts)
                ) as observer,
            ):
                placed = cluster.lay_out(ray, stage, config, len(run.todo))
                plan = FeaturePlan(config, networks, arrow, observer.counts, placed)
                stages, batch = partial(feature_stage, plan=plan), config.resources.batch_size
                work = Work(plan.first_pool, placed["writer"], stages, arrow, batch)
                seconds = run_bulk(observer, work, session, ticks=ticks)
        return run.close(seconds, lambda: {"weights": loaded.hashes()})


def _identity(config: Config, networks: Networks, loaded: LoadedNetworks) -> Identity:
    models = {
        "visual": networks.visual,
        "objects": networks.objects,
        "recognizer": networks.recognizer,
    }
    # weights are compared by hash, not by location
    excluded = {"weights", *SERVER_USE}
    recorded = {
        name: model.record(exclude=excluded) if model is not None else None
        for name, model in models.items()
    }
    decode = {"strategy", "backend", "num_frames", "max_pixels", "max_duration_s", "max_bytes"}
    return Identity.of(
        decode=config.decode.record(include=decode),
        encoders={
            "visual": recorded["visual"],
            "objects": recorded["objects"],
            "num_objects": config.encoders.num_objects,
        },
        recognizer=recorded["recognizer"],
        weights=loaded.hashes(),
    )


def feature_stage(data: Any, plan: FeaturePlan) -> Any:
    """Map a dataset of manifest rows to a dataset of transport tables of feature rows."""
    common: dict[str, Any] = {"fn_constructor_args": (plan,)}
    if "worker" in plan.layout.pools:
        return data.map_batches(
            ExtractWorker, batch_size=None, **common, **parts.pool_options(plan.layout["worker"])
        )
    # large enough to keep the frames of a batch in one block
    batch = plan.config.resources.batch_size
    frames = sum(spec.size**2 * 3 for spec in plan.specs().values()) * plan.config.decode.num_frames
    data.context.target_max_block_size = max(data.context.target_max_block_size, batch * frames)
    data = data.map_batches(
        DecodeWorker, batch_size=None, **common, **parts.pool_options(plan.layout["decoder"])
    )
    return data.map_batches(
        EncodeWorker, batch_size=batch, **common, **parts.pool_options(plan.layout["encoder"])
    )


def feature_row(ref: VideoRef, video: Outcome, features: FrameFeatures | None) -> Row:
    """Return the row of a video; `features` is None if it could not be decoded."""
    if not isinstance(video, DecodedVideo) or features is None:
        assert not isinstance(video, DecodedVideo)
        return failed_row(ref, video)
    if features.error is not None:
        return failed_row(ref, features.error) | features.tokens
    names = ("visual", "object_ids", "object_probs", "recognizer_logits")
    outputs = {name: getattr(features, name) for name in names}
    row = (
        identity_row(ref)
        | source_columns(video)
        | {"frame_index": video.frame_index, parts.DECODE_S: video.decode_ms / 1000}
        | {parts.FETCHED: video.fetched_bytes}
    )
    return row | features.tokens | {k: value for k, value in outputs.items() if value is not None}


class ExtractWorker:
    """Decode and encode in one worker: its child decodes while the previous video is encoded."""

    def __init__(self, plan: FeaturePlan) -> None:
        self.plan = plan
        self.encode = plan.start_encode()
        self.pool = DecodePool(plan.config.decode, plan.specs(), 1)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Map manifest rows to transport tables of feature rows."""
        refs, size = blocks.refs_of(block), self.plan.config.resources.batch_size
        videos = self.pool.outcomes([VideoSource.of(ref) for ref in refs], size)
        for batch in blocks.batches(refs, size):
            rows = [self._row(ref, next(videos)) for ref in batch]
            yield parts.transport_table(rows, self.plan.schema, self.plan.counts)

    def _row(self, ref: VideoRef, video: Outcome) -> Row:
        started = time.perf_counter()
        features = self.encode([video])[0] if isinstance(video, DecodedVideo) else None
        seconds = {parts.ENCODE_S: time.perf_counter() - started} if features is not None else {}
        return feature_row(ref, video, features) | seconds


class DecodeWorker:
    """Decode for GPU encoders: frames travel as bytes through the object store."""

    def __init__(self, plan: FeaturePlan) -> None:
        self.names, self.batch_size = list(plan.specs()), plan.config.resources.batch_size
        self.pool = DecodePool(plan.config.decode, plan.specs(), 1)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Append the decoded frames or the failure to manifest rows."""
        videos = self.pool.outcomes(
            [VideoSource.of(ref) for ref in blocks.refs_of(block)], self.batch_size
        )
        for start in range(0, len(block), self.batch_size):
            batch = block.slice(start, self.batch_size)
            packed = [pack_video(next(videos), self.names) for _ in range(len(batch))]
            for name, column_type in packed_fields(self.names).items():
                batch = batch.append_column(
                    name, pa.array([row.get(name) for row in packed], column_type)
                )
            yield batch


class EncodeWorker:
    """Encode the frames that DecodeWorker decoded."""

    def __init__(self, plan: FeaturePlan) -> None:
        self.plan, self.specs = plan, plan.specs()
        self.encode = plan.start_encode()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Map rows with frames to a transport table of feature rows."""
        refs = blocks.refs_of(batch)
        records = batch.select(list(packed_fields(list(self.specs)))).to_pylist()
        videos = [unpack_video(record, self.specs) for record in records]
        started = time.perf_counter()
        features = iter(self.encode([video for video in videos if isinstance(video, DecodedVideo)]))
        rows = [
            feature_row(ref, video, next(features) if isinstance(video, DecodedVideo) else None)
            for ref, video in zip(refs, videos, strict=True)
        ]
        live = [row for row in rows if "visual" in row]
        for row in live:
            row[parts.ENCODE_S] = (time.perf_counter() - started) / len(live)
        return parts.transport_table(rows, self.plan.schema, self.plan.counts)
