"""Class prototypes, the initial visual TSQ embeddings (paper, section 3.2 and appendix A).

Shapes: N videos, T frames, C classes, D dims of a frame's feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tsq_ray.config import Task
from tsq_ray.model.task import probabilities

TOP_SHARE = 0.3
"""m, the share of a video's frames that form its representation (appendix A)."""


def prototypes(
    features: Iterable[np.ndarray],
    frame_logits: Iterable[np.ndarray],
    labels: Iterable[Sequence[int]],
    num_classes: int,
    seed: int,
    task: Task,
) -> Tensor:
    """Average each video's best frames, then these means over the videos of a class (appendix A).

    The best frames of a video for one of its labels are the max(1, ceil(0.3 n)) of its n correctly
    classified frames with the highest probability of that label. A video without a correct frame
    is left out; if no video of a class has one, the top 30 % of all frames by that probability
    are used instead. A frame is correct for a label if no class outside the video's labels scores
    as high; with a single label, if the best class is the right one. A class without videos gets
    a random prototype, scaled to the root mean square of the others.

    Args:
        features: [N, T, D], or one [T, D] at a time; read once, so that an archive need not fit in
            memory.
        frame_logits: [N, T, C] from the frame classifier, or one [T, C] at a time.
        labels: class ids of each of the N videos.
        num_classes: C.
        seed: seed of the random prototypes; that of a class does not depend on which others have
            no videos.
        task: turns logits into probabilities: "single" softmax, "multi" sigmoid.

    Returns:
        float32 [C, D].
    """
    sums: dict[tuple[int, bool], np.ndarray] = {}
    counts: dict[tuple[int, bool], int] = {}
    dim = 0
    for video, logits, video_labels in zip(features, frame_logits, labels, strict=True):
        frames, logits = np.asarray(video, np.float64), np.asarray(logits, np.float64)
        assert logits.shape == (len(frames), num_classes), (
            f"frame logits of shape {logits.shape}, expected {(len(frames), num_classes)}"
        )
        dim = frames.shape[1]
        scores = probabilities(torch.from_numpy(logits), task).numpy()
        for label in set(video_labels):
            correct = _correct_frames(logits, label, video_labels)
            key = label, bool(correct.any())
            mean = _mean_of_best(
                frames, scores[:, label], correct if correct.any() else np.ones_like(correct)
            )
            sums[key] = sums.get(key, 0.0) + mean
            counts[key] = counts.get(key, 0) + 1
    assert dim, "prototypes need at least one video"
    return _assemble(sums, counts, num_classes, dim, seed)


def _assemble(
    sums: dict[tuple[int, bool], np.ndarray],
    counts: dict[tuple[int, bool], int],
    num_classes: int,
    dim: int,
    seed: int,
) -> Tensor:
    means = {}
    for label in range(num_classes):
        for key in ((label, True), (label, False)):
            if key in sums and label not in means:
                means[label] = sums[key] / counts[key]
    scale = math.sqrt(np.mean(np.square(list(means.values())))) if means else 1.0
    result = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed)) * scale
    for label, prototype in means.items():
        result[label] = torch.from_numpy(prototype)
    return result


def _correct_frames(logits: np.ndarray, label: int, video_labels: Sequence[int]) -> np.ndarray:
    others = np.delete(logits, list(set(video_labels)), axis=1)
    return logits[:, label] > others.max(axis=1, initial=-np.inf)


def _mean_of_best(frames: np.ndarray, probability: np.ndarray, among: np.ndarray) -> np.ndarray:
    candidates = np.flatnonzero(among)
    # rounded first, so that a float just above a whole number does not add a frame
    count = max(1, math.ceil(round(TOP_SHARE * len(candidates), 9)))
    best = candidates[np.argsort(-probability[candidates], kind="stable")[:count]]
    return frames[best].mean(axis=0)
