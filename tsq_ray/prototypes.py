"""Class prototypes: where the visual TSQ embeddings start (paper, section 3.2 and appendix A).

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
"""m, the share of the frames that make up a video's representation (appendix A)."""


def prototypes(
    features: Iterable[np.ndarray],
    frame_logits: Iterable[np.ndarray],
    labels: Iterable[Sequence[int]],
    num_classes: int,
    seed: int,
    task: Task,
) -> Tensor:
    """Mean over a class's videos of the mean over each video's best frames (appendix A).

    For each label of a video: of its correctly classified frames the max(1, ceil(0.3 n)) with the highest probability of that label. A
    video without a correct frame is left out, unless its class has no other: then its top 30 % of frames by that probability. A
    frame is correct for a label when no class outside the video's labels scores as high; with one label that is the
    best class being the right one. A class without videos starts at random, as large as the others' root mean square.

    Args:
        features: [N, T, D], or one [T, D] at a time; read once, so an archive need not be in memory.
        frame_logits: [N, T, C] of the frame classifier, likewise.
        labels: class ids of each of the N videos.
        num_classes: C.
        seed: of the random starts; class c gets the same one whichever others are missing.
        task: how logits become probabilities: "single" softmax, "multi" sigmoid.

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
    found = {}
    for label in range(num_classes):
        for key in ((label, True), (label, False)):
            if key in sums and label not in found:
                found[label] = sums[key] / counts[key]
    scale = math.sqrt(np.mean(np.square(list(found.values())))) if found else 1.0
    result = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed)) * scale
    for label, prototype in found.items():
        result[label] = torch.from_numpy(prototype)
    return result


def _correct_frames(logits: np.ndarray, label: int, video_labels: Sequence[int]) -> np.ndarray:
    others = np.delete(logits, list(set(video_labels)), axis=1)
    return logits[:, label] > others.max(axis=1, initial=-np.inf)


def _mean_of_best(frames: np.ndarray, probability: np.ndarray, among: np.ndarray) -> np.ndarray:
    candidates = np.flatnonzero(among)
    count = max(1, math.ceil(round(TOP_SHARE * len(candidates), 9)))  # 0.3 * 10 is not to become 4
    best = candidates[np.argsort(-probability[candidates], kind="stable")[:count]]
    return frames[best].mean(axis=0)
