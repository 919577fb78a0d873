"""A recogniser as the sampler's teacher: soft targets and classes from its logits.

No labels are read. Shapes: V videos, T frames, C classes of the recogniser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch

from tsq_ray import schema, storage
from tsq_ray.config import Task
from tsq_ray.errors import RunError
from tsq_ray.model.selection import distinct_slots
from tsq_ray.model.task import probabilities

LOGITS, FRAME_INDEX = schema.RECOGNIZER_LOGITS.name, schema.FRAME_INDEX.name
_MIN_PROBABILITY = 0.5
"""With several classes per video, a video shows the classes that are at least this probable."""


@dataclass(frozen=True)
class Teacher:
    """The recogniser of the features, which the sampler learns from."""

    classes: tuple[str, ...]
    num_frames: int
    """Number of a video's most confident frames that its target is averaged over."""


def soft_targets(
    logits: np.ndarray, frame_index: np.ndarray, num_frames: int, task: Task
) -> np.ndarray:
    """Return the mean probabilities over each video's most confident frames, float16 [V, C].

    Args:
        logits: float [V, T, C], the recogniser's.
        frame_index: int [V, T], each slot's frame in the source. A frame counts once, as in
            `sampler.mode = "maxconf"`, however many slots of a short video show it.
        num_frames: the number of frames to average, those with the most probable best class.
        task: "single" softmax, "multi" sigmoid.
    """
    probs = probabilities(torch.from_numpy(logits.astype(np.float32)), task)
    repeated = torch.ones(probs.shape[:2], dtype=torch.bool)
    for video, index in enumerate(frame_index):
        repeated[video, distinct_slots(index)] = False
    confidence = probs.amax(-1).masked_fill(repeated, -1)
    highest, slots = confidence.topk(min(num_frames, probs.shape[1]), dim=1)
    chosen = probs.gather(1, slots[..., None].expand(-1, -1, probs.shape[2]))
    counts = (highest >= 0)[..., None]
    return ((chosen * counts).sum(1) / counts.sum(1)).numpy().astype(np.float16)


def shown_classes(targets: np.ndarray, task: Task) -> list[list[int]]:
    """Return the classes that each video shows: the most probable one, or all of at least 0.5.

    `targets`: soft, [V, C].
    """
    best = targets.argmax(1)
    if task == "single":
        return [[int(label)] for label in best]
    return [
        np.flatnonzero(row >= _MIN_PROBABILITY).tolist() or [int(label)]
        for row, label in zip(targets, best, strict=True)
    ]


def often_shown(targets: np.ndarray, min_videos: int, task: Task) -> list[int]:
    """Return the classes that at least `min_videos` videos show, ascending.

    `targets`: soft, [V, C].
    """
    counts = np.bincount(
        [label for labels in shown_classes(targets, task) for label in labels],
        minlength=targets.shape[1],
    )
    return np.flatnonzero(counts >= min_videos).tolist()


def too_few(targets: np.ndarray, min_videos: int, task: Task) -> str | None:
    """Say that fewer than two classes are shown often enough; None if they suffice."""
    found = len(often_shown(targets, min_videos, task))
    if found > 1:
        return None
    return (
        f"in {len(targets)} videos, the recogniser finds {found} classes at least "
        f"train.teacher_min_videos = {min_videos} times, and training needs two"
    )


def taught_classes(targets: np.ndarray, min_videos: int, task: Task) -> list[int]:
    """Return the classes that are shown often enough; RunError if there are fewer than two."""
    if (why := too_few(targets, min_videos, task)) is not None:
        lower = "lower that setting, or " if min_videos > 1 else ""
        raise RunError(f"train.target 'teacher': {why}: {lower}extract more videos")
    return often_shown(targets, min_videos, task)


def check_logits(parts: list[str], count: int, num_classes: int, what: str) -> None:
    """Raise RunError if the features lack usable videos or this recogniser's logits."""
    if not count:
        raise RunError(f"{what}: no video is ok, so nothing can be learned from them")
    with storage.open_read(parts[0]) as file:
        arrow = pq.read_schema(file)
    if LOGITS not in arrow.names:
        raise RunError(
            f"{what}: lack {LOGITS}, which train.target = 'teacher' learns from; extract them into "
            "another folder with tsq extract --recognizer URI"
        )
    width = arrow.field(LOGITS).type.shape[-1]
    if width != num_classes:
        raise RunError(
            f"{what}: their recogniser has {width} classes, that of --recognizer {num_classes}"
        )
