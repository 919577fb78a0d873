"""Ray Data beside the training: decoded and augmented clips in the order that the training wants them.

One dataset serves all epochs of a training worker, so that decoders start once and work ahead, over the border of an epoch too. The order
hangs on (seed, epoch) alone. Legend: S segments (frames of a clip), V videos.
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
from tsq_ray.decode import DecodedVideo, DecodePool
from tsq_ray.rows import frame_spec, source_of
from tsq_ray.runtime import cluster, parts
from tsq_ray.runtime.nodes import Pool
from tsq_ray.training.classifier.augment import Augment, training_spec, view_of

_BATCH = 4
"""Clips a decoder takes at a time."""
_MOST_BLOCKS = 20_000
_PLAIN = -1
"""In place of an epoch: the middles of the segments, not augmented."""


@dataclass(frozen=True)
class ClipPlan:
    """What decoders need to know; travels to them whole."""

    config: FinetuneConfig
    model: ModelConfig
    decode: DecodeConfig
    videos: Any
    """Reference of the manifest table of all videos, training ones first."""
    counts: Any
    decoders: Pool
    """Of each training worker."""
    memory: int
    """Bytes of the object store that the clips of one training worker may take."""


@dataclass(frozen=True)
class Clip:
    """S frames of a video, or why there are none."""

    row: int
    """In the table of videos."""
    pictures: np.ndarray | None
    """uint8 [S, size, size, 3]."""
    video_id: str
    error_type: str | None


@dataclass(frozen=True)
class Work:
    """Videos to decode, by their rows, for training in an epoch or plain."""

    rows: np.ndarray
    epoch: int = _PLAIN


def epoch_batches(seed: int, epoch: int, num_videos: int, batch_size: int) -> list[np.ndarray]:
    """The global batches of an epoch (from 0): rows, in batches as equal as can be, so that the last is no leftover."""
    order = np.random.default_rng([seed, epoch]).permutation(num_videos)
    return np.array_split(order, -(-num_videos // batch_size))


class ClipStream:
    """Clips of all `work`, in that order; decoding starts with the first `take`."""

    def __init__(self, plan: ClipPlan, work: Iterable[Work]) -> None:
        rows, epochs = [], []
        for item in work:
            rows.append(item.rows)
            epochs.append(np.full(len(item.rows), item.epoch))
        self._clips = _clips(plan, np.concatenate(rows), np.concatenate(epochs))

    def take(self, rows: Sequence[int] | np.ndarray) -> list[Clip]:
        """The next clips, which have to be those of `rows`."""
        clips = [next(self._clips) for _ in range(len(rows))]
        assert [clip.row for clip in clips] == list(rows), (
            "clips came in another order than planned"
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
    size = max(_BATCH, -(-len(rows) // _MOST_BLOCKS))
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
    """Decode in a child, augment here meanwhile."""

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
        """(row, epoch) -> (row, video_id, pictures, error_type)."""
        rows = batch["row"].to_pylist()
        views = []
        futures: list[Future[Any]] = []
        refs = parts.refs_of(self.videos.take(rows))
        for ref, epoch in zip(refs, batch["epoch"].to_pylist(), strict=True):
            view = (
                view_of(self.plan.config.seed, epoch, ref.video_id, self.plan.config.segments)
                if epoch != _PLAIN
                else None
            )
            source = source_of(ref)
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
