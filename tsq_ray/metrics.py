"""Mean average precision, top-1 accuracy, share of salient frames. Shapes: N videos, C classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def average_precisions(scores: np.ndarray, targets: np.ndarray, interpolated: bool = False) -> np.ndarray:
    """Average precision of each class; nan where a class has no positive.

    With R_i and P_i the recall and precision of the videos down to the i-th distinct score, best first (equal scores enter together, so
    the order of the videos does not matter): AP = sum_i (R_i - R_{i-1}) P_i. Interpolated, as in ActivityNet's official evaluation,
    P_i gives way to the best precision at that recall or a higher one, max_{j >= i} P_j; so it is never the lower of the two.

    Args:
        scores: [N, C], higher is surer.
        targets: bool [N, C].
        interpolated: the second formula.

    Returns:
        float64 [C].
    """
    from sklearn.metrics import average_precision_score

    assert scores.shape == targets.shape, f"scores {scores.shape} and targets {targets.shape} differ in shape"
    result = np.full(scores.shape[1], np.nan)
    for c in np.flatnonzero(targets.any(axis=0)):
        result[c] = _interpolated(scores[:, c], targets[:, c]) if interpolated else average_precision_score(targets[:, c], scores[:, c])
    return result


def mean_average_precision(scores: np.ndarray, targets: np.ndarray, interpolated: bool = False) -> float:
    """Unweighted mean of `average_precisions` over the classes with a positive, 0..1; nan if there is none."""
    precisions = average_precisions(scores, targets, interpolated)
    precisions = precisions[~np.isnan(precisions)]
    return float(precisions.mean()) if len(precisions) else float("nan")


def top1_accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of the videos whose best class is one of their labels, 0..1.

    Of equal scores the first class counts. Videos without a label are left out; nan if none is left. scores [N, C], targets bool [N, C].
    """
    labelled = np.asarray(targets, bool).any(axis=1)
    if not labelled.any():
        return float("nan")
    best = scores[labelled].argmax(axis=1)
    return float(np.asarray(targets, bool)[labelled][np.arange(len(best)), best].mean())


def salient_recall(selected_pts_s: Sequence[float], segments: Sequence[tuple[float, float]]) -> float:
    """Share of the chosen frames that lie in one of the salient segments, 0..1.

    The denominator is the chosen frames (at most K), not the salient ones: 1.0 when the whole budget went to salient frames.

    Args:
        selected_pts_s: presentation times of the chosen frames, in seconds.
        segments: [start, end] in seconds, both ends included; they may overlap.

    Returns:
        nan for no chosen frame, or for a video without a salient segment.
    """
    if not len(selected_pts_s) or not len(segments):
        return float("nan")
    inside = [any(start <= pts_s <= end for start, end in segments) for pts_s in selected_pts_s]
    return float(np.mean(inside))


def _interpolated(scores: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(targets, scores)  # recall falling, from 1 to the added point (1, 0)
    precision, recall = precision[:-1][::-1], recall[:-1][::-1]
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * best_from_here))
