"""Quality measures: mAP, top-1 accuracy and the share of chosen frames that are salient.

Shapes: N videos, C classes, P labels (pairs of a video and one of its classes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray.schema import tensor_to_numpy

ReadColumns = Callable[[list[str]], pa.Table]
"""Reads the named columns of one part of the predictions, omitting those that the part lacks."""

FAILED, UNLABELLED, WRONG, RIGHT = range(4)
"""The verdict on a row; see `verdicts`."""


class PrecisionCurves:
    """Precision and recall per class at the scores of its positives, accumulated block by block.

    Let R_i and P_i be the recall and precision over the videos down to the i-th distinct score,
    best first (equal scores enter together, so the order of the videos does not matter). Then
    AP = sum_i (R_i - R_{i-1}) P_i. Recall rises only at the positives, so no other point is needed
    and memory is 24 bytes for each of the P positives, whatever the number of videos.

    Args:
        num_classes: C.
        classes: int [P], the class of each positive.
        scores: float [P], the score of that class for its video.
    """

    def __init__(self, num_classes: int, classes: np.ndarray, scores: np.ndarray) -> None:
        order = np.argsort(classes, kind="stable")
        ends = np.cumsum(np.bincount(classes, minlength=num_classes))[:-1]
        by_class = np.split(scores[order], ends)
        distinct = [np.unique(values, return_counts=True) for values in by_class]
        self._thresholds = [values for values, _ in distinct]
        self._positives = [counts[::-1] for _, counts in distinct]
        self._entered = [np.zeros(len(values), np.int64) for values in self._thresholds]

    def add(self, scores: np.ndarray) -> None:
        """Add the scores [N, C] of a block of videos, positive or not."""
        for c, thresholds in enumerate(self._thresholds):
            if len(thresholds):
                place = np.searchsorted(thresholds, scores[:, c], side="right")
                self._entered[c] += np.bincount(place, minlength=len(thresholds) + 1)[1:]

    def average_precisions(self, interpolated: bool = False) -> np.ndarray:
        """Return the AP of each class, float64 [C]; nan for a class without a positive.

        `interpolated`, as in ActivityNet's official evaluation, replaces P_i with the best
        precision at that recall or a higher one, max_{j >= i} P_j, and so never lowers the AP.
        """
        result = np.full(len(self._thresholds), np.nan)
        for c, (positives, entered) in enumerate(zip(self._positives, self._entered, strict=True)):
            if len(positives):
                precision = np.cumsum(positives) / np.cumsum(entered[::-1])
                if interpolated:
                    precision = np.maximum.accumulate(precision[::-1])[::-1]
                result[c] = np.sum(positives * precision) / np.sum(positives)
        return result


def average_precisions(
    scores: np.ndarray, targets: np.ndarray, interpolated: bool = False
) -> np.ndarray:
    """Return the AP of each class (see `PrecisionCurves`), float64 [C]; nan without a positive.

    Args:
        scores: [N, C], higher is more confident.
        targets: bool [N, C].
        interpolated: use ActivityNet's formula.
    """
    assert scores.shape == targets.shape, (
        f"scores {scores.shape} and targets {targets.shape} differ in shape"
    )
    rows, classes = np.nonzero(targets)
    curves = PrecisionCurves(scores.shape[1], classes, scores[rows, classes])
    curves.add(scores)
    return curves.average_precisions(interpolated)


def mean_average_precision(
    scores: np.ndarray, targets: np.ndarray, interpolated: bool = False
) -> float:
    """Return `mean_over_classes` of `average_precisions`."""
    return mean_over_classes(average_precisions(scores, targets, interpolated))


def mean_over_classes(precisions: np.ndarray) -> float:
    """Unweighted mean over the classes with a positive, 0..1; nan if no class has one."""
    known = precisions[~np.isnan(precisions)]
    return float(known.mean()) if len(known) else float("nan")


def top1_accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of the videos whose best class is one of their labels, 0..1.

    Ties go to the first class. Videos without a label are ignored; nan if no video has one.

    Args:
        scores: [N, C].
        targets: bool [N, C].
    """
    labelled = np.asarray(targets, bool).any(axis=1)
    if not labelled.any():
        return float("nan")
    best = scores[labelled].argmax(axis=1)
    return float(np.asarray(targets, bool)[labelled][np.arange(len(best)), best].mean())


def salient_recall(
    selected_pts_s: Sequence[float], segments: Sequence[tuple[float, float]]
) -> float:
    """Share of the chosen frames that lie in one of the salient segments, 0..1.

    The denominator is the number of chosen frames (at most K), not of salient ones: the result is
    1.0 if the whole budget went to salient frames.

    Args:
        selected_pts_s: presentation times of the chosen frames, in seconds.
        segments: [start, end] in seconds, both ends included; they may overlap.

    Returns:
        The share; nan without a chosen frame or without a salient segment.
    """
    if not len(selected_pts_s) or not len(segments):
        return float("nan")
    inside = [any(start <= pts_s <= end for start, end in segments) for pts_s in selected_pts_s]
    return float(np.mean(inside))


# ---------------------------------------------------------------------- predictions, part by part


def first_of(lists: pa.Array) -> pa.Array:
    """Return the first item of each list; null for a null or empty list."""
    filled = pc.greater(pc.fill_null(pc.list_value_length(lists), 0), 0)
    places = np.cumsum(filled.to_numpy(zero_copy_only=False)) - 1
    return pc.list_element(lists.filter(filled), 0).take(
        pc.if_else(filled, pa.array(places), pa.scalar(None, pa.int64()))
    )


def label_pairs(table: pa.Table, classes: Sequence[str]) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """Return each label's row [P], name [P] and index in `classes` [P], -1 for an unknown name."""
    lists = table["label_names"].combine_chunks()
    names = pc.list_flatten(lists)
    numbers = pc.fill_null(pc.index_in(names, value_set=pa.array(classes, pa.string())), -1)
    return pc.list_parent_indices(lists).to_numpy(), names, numbers.to_numpy()


def verdicts(table: pa.Table, classes: Sequence[str]) -> np.ndarray:
    """Return for each row FAILED, UNLABELLED, WRONG or RIGHT (best class among labels), int8 [N].

    A video whose labels are all unknown to the bundle counts as unlabelled, because no prediction
    could be right. If `classes` is empty, all labels count. Reads `status`, `label_names` and
    `top_labels`.
    """
    rows, names, numbers = label_pairs(table, classes)
    known = numbers >= 0 if len(classes) else np.ones(len(rows), bool)
    best = first_of(table["top_labels"].combine_chunks()).take(pa.array(rows))
    hit = pc.fill_null(pc.equal(names, best), False).to_numpy(zero_copy_only=False)
    result = np.full(len(table), UNLABELLED, np.int8)
    result[rows[known]] = WRONG
    result[np.intersect1d(rows[known], rows[hit])] = RIGHT
    result[~pc.equal(table["status"], "ok").to_numpy()] = FAILED
    return result


@dataclass(frozen=True)
class ClassFigures:
    """Figures of each class, [C], over the ok videos that have scores and a known label."""

    videos: np.ndarray
    """Number of videos with this label."""
    predicted: np.ndarray
    """Number of videos whose best class it is."""
    ap: np.ndarray
    """Average precision; nan without a positive."""
    ap_interpolated: np.ndarray


def class_figures(parts: Sequence[ReadColumns], classes: Sequence[str]) -> ClassFigures | None:
    """Return the figures of each class; None if no row has both scores and a known label.

    Reads the labelled parts twice. Holds one part at a time, plus 24 bytes for each known label.
    """
    numbers, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for block, rows, known in _labelled_scores(parts, classes):
        numbers.append(known)
        scores.append(block[rows, known])
    positive = np.concatenate(numbers)
    if not len(positive):
        return None
    curves = PrecisionCurves(len(classes), positive, np.concatenate(scores))
    predicted = np.zeros(len(classes), np.int64)
    for block, _, _ in _labelled_scores(parts, classes):
        curves.add(block)
        predicted += np.bincount(block.argmax(axis=1), minlength=len(classes))
    videos = np.bincount(positive, minlength=len(classes))
    return ClassFigures(
        videos, predicted, curves.average_precisions(), curves.average_precisions(interpolated=True)
    )


def _labelled_scores(
    parts: Sequence[ReadColumns], classes: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield per part the scores [N, C] of the ok rows with a known label, and the row [P] and the
    class [P] of each of these labels.
    """
    for read in parts:
        table = read(["status", "label_names"])
        rows, _, numbers = label_pairs(table, classes)
        ok = pc.equal(table["status"], "ok").to_numpy()
        rows, numbers = rows[(numbers >= 0) & ok[rows]], numbers[(numbers >= 0) & ok[rows]]
        scored = read(["scores"]) if len(rows) else None
        if scored is None or "scores" not in scored.column_names:
            continue
        column = scored["scores"].combine_chunks()
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        pairs = np.unique((rows * len(classes) + numbers)[valid[rows]])
        kept, place = np.unique(pairs // len(classes), return_inverse=True)
        if len(kept):
            yield tensor_to_numpy(column.take(pa.array(kept))), place, pairs % len(classes)


def measure_parts(parts: Sequence[ReadColumns], classes: Sequence[str]) -> dict[str, Any]:
    """Return mAP (both conventions) and top-1 over the labelled videos that are ok.

    Label names missing from `classes` are listed in "unknown_labels" and otherwise ignored. Without
    scores, the result has no mAP.
    """
    unknown: set[str] = set()
    counts = np.zeros(RIGHT + 1, np.int64)
    for read in parts:
        table = read(["status", "label_names", "top_labels"])
        counts += np.bincount(verdicts(table, classes), minlength=len(counts))
        _, names, numbers = label_pairs(table.filter(pc.equal(table["status"], "ok")), classes)
        unknown.update(pc.unique(names.filter(pa.array(numbers < 0))).to_pylist())
    judged = int(counts[RIGHT] + counts[WRONG])
    metrics: dict[str, Any] = {"labelled": judged, "unknown_labels": sorted(unknown)}
    if not judged:
        return metrics
    metrics["top1"] = round(float(counts[RIGHT] / judged), 4)
    if figures := class_figures(parts, classes):
        metrics["mAP"] = round(mean_over_classes(figures.ap), 4)
        metrics["mAP_interpolated"] = round(mean_over_classes(figures.ap_interpolated), 4)
    return metrics
