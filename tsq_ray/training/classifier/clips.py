"""Decoded and augmented clips from Ray Data, in the order in which the training needs them.

One dataset serves all epochs of a training worker, so that decoders start once and work ahead, even
from one epoch into the next. The order depends only on (seed, epoch).

Shapes: S segments (frames of a clip), V videos.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tsq_ray.config import DecodeConfig, FinetuneConfig, ModelConfig
from tsq_ray.decode import DecodedVideo, DecodePool, VideoSource
from tsq_ray.rows import frame_spec
from tsq_ray.runtime import blocks, cluster, parts
from tsq_ray.runtime.nodes import Pool
from tsq_ray.training.classifier.augment import Augment, random_choices, training_spec

_BATCH = 4
"""Clips per call of a decoder."""
_MAX_BLOCKS = 20_000
_PLAIN = -1
"""Replaces the epoch for clips of the middle frames of the segments, without augmentation."""


@dataclass(frozen=True)
class ClipPlan:
    """The settings and references that every decoder receives."""

    config: FinetuneConfig
    model: ModelConfig
    decode: DecodeConfig
    videos: Any
    """Ray reference to the manifest table of all videos, training videos first."""
    counts: Any
    """The actor that counts progress."""
    decoders: Pool
    """The decoders of one training worker."""
    memory: int
    """Object store memory for the clips of one training worker, in bytes."""


@dataclass(frozen=True)
class Clip:
    """The S frames of a video, or the reason why they are missing."""

    row: int
    """Row in the table of videos."""
    pictures: np.ndarray | None
    """uint8 [S, size, size, 3]."""
    video_id: str
    error_type: str | None


@dataclass(frozen=True)
class ClipBatch:
    """Rows of the videos to decode, augmented for `epoch` or not at all (`_PLAIN`)."""

    rows: np.ndarray
    epoch: int = _PLAIN


def epoch_batches(seed: int, epoch: int, num_videos: int, batch_size: int) -> list[np.ndarray]:
    """Return the rows of each global batch of an epoch (from 0).

    Batches differ by at most one row, so that the last one is not a small remainder.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_videos)
    return np.array_split(order, -(-num_videos // batch_size))


class ClipStream:
    """The clips of all `work`, in order; decoding starts with the first `take`."""

    def __init__(self, plan: ClipPlan, work: Iterable[ClipBatch]) -> None:
        rows, epochs = [], []
        for item in work:
            rows.append(item.rows)
            epochs.append(np.full(len(item.rows), item.epoch))
        self._clips = _clips(plan, np.concatenate(rows), np.concatenate(epochs))

    def take(self, rows: Sequence[int] | np.ndarray) -> list[Clip]:
        """Return the next clips, which must be those of `rows`."""
        clips = [next(self._clips) for _ in range(len(rows))]
        assert [clip.row for clip in clips] == list(rows), (
            "clips did not arrive in the planned order"
        )
        return clips


def _clips(plan: ClipPlan, rows: np.ndarray, epochs: np.ndarray) -> Iterator[Clip]:
    import ray
    from ray.data import ExecutionResources

    context = cluster.quiet_data()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=plan.memory
    )
    size = max(_BATCH, -(-len(rows) // _MAX_BLOCKS))
    todo = pa.table({"row": pa.array(rows, pa.int64()), "epoch": pa.array(epochs, pa.int64())})
    blocks = [todo.slice(start, size) for start in range(0, len(todo), size)]
    data = ray.data.from_blocks(blocks).map_batches(
        ClipWorker,
        batch_size=_BATCH,
        fn_constructor_args=(plan,),
        **parts.pool_options(plan.decoders),
    )
    shape = (-1, plan.model.size, plan.model.size, 3)
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        columns = (table[name].to_pylist() for name in ("row", "video_id", "error_type"))
        for number, (row, video_id, error) in enumerate(zip(*columns, strict=True)):
            pictures = None
            if error is None:
                pictures = np.frombuffer(table["pictures"][number].as_buffer(), np.uint8).reshape(
                    shape
                )
            yield Clip(row, pictures, video_id, error)


class ClipWorker:
    """Decodes in a child process while it augments in its own."""

    def __init__(self, plan: ClipPlan) -> None:
        import ray

        torch.set_num_threads(1)
        self.plan = plan
        self.videos: pa.Table = ray.get(plan.videos)
        self.augment = Augment(plan.config, plan.model)
        self.pools = {
            True: DecodePool(plan.decode, {"clip": training_spec(plan.model)}, 1),
            False: DecodePool(plan.decode, {"clip": frame_spec(plan.model)}, 1),
        }

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Turn (row, epoch) into (row, video_id, pictures, error_type)."""
        rows = batch["row"].to_pylist()
        views = []
        futures: list[Future[Any]] = []
        refs = blocks.refs_of(self.videos.take(rows))
        for ref, epoch in zip(refs, batch["epoch"].to_pylist(), strict=True):
            view = (
                random_choices(
                    self.plan.config.seed, epoch, ref.video_id, self.plan.config.segments
                )
                if epoch != _PLAIN
                else None
            )
            source = VideoSource.of(ref)
            futures.append(
                self.pools[view is not None].submit(
                    replace(source, places=view.places) if view else source
                )
            )
            views.append(view)
        pictures: list[bytes | None] = []
        errors: list[str | None] = []
        for view, future in zip(views, futures, strict=True):
            video = future.result()
            if isinstance(video, DecodedVideo):
                frames = video.slots("clip")
                pictures.append((self.augment(frames, view.seed) if view else frames).tobytes())
                errors.append(None)
            else:
                pictures.append(None)
                errors.append(video.error_type)
        self.plan.counts.add.remote(errors)
        return pa.table(
            {
                "row": rows,
                "video_id": [ref.video_id for ref in refs],
                "pictures": pa.array(pictures, pa.large_binary()),
                "error_type": pa.array(errors, pa.string()),
            }
        )
