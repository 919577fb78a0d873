"""Scores and names -> mAP, top-1, share of salient frames.

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
"""Reads these columns of one part of the predictions; a column that the part lacks is left out."""

FAILED, UNLABELLED, WRONG, RIGHT = range(4)
"""What `verdicts` says of a row."""


class PrecisionCurves:
    """Precision and recall of each class at the scores of its positives; all scores come in blocks.

    With R_i and P_i the recall and precision of the videos down to the i-th distinct score, best
    first (equal scores enter together, so the order of the videos does not matter):
    AP = sum_i (R_i - R_{i-1}) P_i. Recall rises at the positives only, so no other point is needed
    and memory is 24 bytes for each of the P positives, however many videos there are.

    Args:
        num_classes: C.
        classes: int [P], the class of each positive.
        scores: float [P], its video's score of that class.
    """

    def __init__(self, num_classes: int, classes: np.ndarray, scores: np.ndarray) -> None:
        order = np.argsort(classes, kind="stable")
        ends = np.cumsum(np.bincount(classes, minlength=num_classes))[:-1]
        by_class = np.split(scores[order], ends)
        found = [np.unique(values, return_counts=True) for values in by_class]
        self._thresholds = [values for values, _ in found]
        self._positives = [counts[::-1] for _, counts in found]
        self._entered = [np.zeros(len(values), np.int64) for values in self._thresholds]

    def add(self, scores: np.ndarray) -> None:
        """Count a block of videos, positive or not: scores [N, C]."""
        for c, thresholds in enumerate(self._thresholds):
            if len(thresholds):
                place = np.searchsorted(thresholds, scores[:, c], side="right")
                self._entered[c] += np.bincount(place, minlength=len(thresholds) + 1)[1:]

    def average_precisions(self, interpolated: bool = False) -> np.ndarray:
        """float64 [C]; nan where a class has no positive.

        Interpolated, as in ActivityNet's official evaluation, P_i gives way to the best precision
        at that recall or a higher one, max_{j >= i} P_j; so it is never the lower of the two.
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
    """Average precision of each class (see `PrecisionCurves`), float64 [C]; nan without a positive.

    Args:
        scores: [N, C], higher is surer.
        targets: bool [N, C].
        interpolated: ActivityNet's formula.
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
    """`mean_over_classes` of `average_precisions`."""
    return mean_over_classes(average_precisions(scores, targets, interpolated))


def mean_over_classes(precisions: np.ndarray) -> float:
    """Unweighted mean over the classes with a positive, 0..1; nan if there is none."""
    known = precisions[~np.isnan(precisions)]
    return float(known.mean()) if len(known) else float("nan")


def top1_accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of the videos whose best class is one of their labels, 0..1.

    Of equal scores the first class counts. Videos without a label are left out; nan if none is
    left. scores [N, C], targets bool [N, C].
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

    The denominator is the chosen frames (at most K), not the salient ones: 1.0 when the whole
    budget went to salient frames.

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


# ------------------------------------------------------------------------------ predictions, part by part


def first_of(lists: pa.Array) -> pa.Array:
    """The first item of each list; null where it is null or empty."""
    filled = pc.greater(pc.fill_null(pc.list_value_length(lists), 0), 0)
    places = np.cumsum(filled.to_numpy(zero_copy_only=False)) - 1
    return pc.list_element(lists.filter(filled), 0).take(
        pc.if_else(filled, pa.array(places), pa.scalar(None, pa.int64()))
    )


def label_pairs(table: pa.Table, classes: Sequence[str]) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """Every label of every row: its row [P], its name [P], its number in `classes` [P] or -1."""
    lists = table["label_names"].combine_chunks()
    names = pc.list_flatten(lists)
    numbers = pc.fill_null(pc.index_in(names, value_set=pa.array(classes, pa.string())), -1)
    return pc.list_parent_indices(lists).to_numpy(), names, numbers.to_numpy()


def verdicts(table: pa.Table, classes: Sequence[str]) -> np.ndarray:
    """int8 [N]: FAILED, UNLABELLED, WRONG or RIGHT (the best class is one of the labels).

    A video whose labels are all unknown to the bundle could not be right: it counts as unlabelled.
    Without `classes` all labels count. Reads `status`, `label_names` and `top_labels`.
    """
    rows, names, numbers = label_pairs(table, classes)
    known = numbers >= 0 if len(classes) else np.ones(len(rows), bool)
    best = first_of(table["top_labels"].combine_chunks()).take(pa.array(rows))
    hit = pc.fill_null(pc.equal(names, best), False).to_numpy(zero_copy_only=False)
    found = np.full(len(table), UNLABELLED, np.int8)
    found[rows[known]] = WRONG
    found[np.intersect1d(rows[known], rows[hit])] = RIGHT
    found[~pc.equal(table["status"], "ok").to_numpy()] = FAILED
    return found


@dataclass(frozen=True)
class ClassFigures:
    """Of each class, [C], over the judged videos with scores."""

    videos: np.ndarray
    """How many have this label."""
    predicted: np.ndarray
    """Of how many it is the best class."""
    ap: np.ndarray
    """Average precision; nan without a positive."""
    ap_interpolated: np.ndarray


def class_figures(parts: Sequence[ReadColumns], classes: Sequence[str]) -> ClassFigures | None:
    """The figures of each class; None where no row has a known label and scores.

    Reads the labelled parts twice and holds one part, and 24 bytes for each known label.
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
    """Part by part, of the ok rows with a known label: scores [N, C]; row and class of each label."""
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
    """mAP (both conventions) and top-1 over the labelled videos that are ok.

    Names that `classes` lacks are listed in "unknown_labels" and left out; no mAP without scores.
    """
    unknown: set[str] = set()
    counts = np.zeros(RIGHT + 1, np.int64)
    for read in parts:
        table = read(["status", "label_names", "top_labels"])
        counts += np.bincount(verdicts(table, classes), minlength=len(counts))
        _, names, numbers = label_pairs(table.filter(pc.equal(table["status"], "ok")), classes)
        unknown.update(pc.unique(names.filter(pa.array(numbers < 0))).to_pylist())
    judged = int(counts[RIGHT] + counts[WRONG])
    found: dict[str, Any] = {"labelled": judged, "unknown_labels": sorted(unknown)}
    if not judged:
        return found
    found["top1"] = round(float(counts[RIGHT] / judged), 4)
    if figures := class_figures(parts, classes):
        found["mAP"] = round(mean_over_classes(figures.ap), 4)
        found["mAP_interpolated"] = round(mean_over_classes(figures.ap_interpolated), 4)
    return found
