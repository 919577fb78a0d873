"""Metrics against examples worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import average_precision_score

from tsq_ray import schema
from tsq_ray.quality import (
    FAILED,
    RIGHT,
    UNLABELLED,
    WRONG,
    average_precisions,
    class_figures,
    mean_average_precision,
    measure_parts,
    salient_recall,
    top1_accuracy,
    verdicts,
)


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


@pytest.mark.parametrize(
    ("scores", "positives", "plain", "interpolated"),
    [
        ((0.9, 0.8, 0.7), (1, 1, 0), 1.0, 1.0),
        ((0.9, 0.8, 0.7), (0, 0, 1), 1 / 3, 1 / 3),
        # positives at ranks 1, 3: precision 1, 2/3
        ((0.9, 0.8, 0.7, 0.6), (1, 0, 1, 0), (1 + 2 / 3) / 2, (1 + 2 / 3) / 2),
        # positives at ranks 2, 3: precision 1/2, 2/3; interpolated, the first rises to 2/3
        ((0.9, 0.8, 0.7, 0.6), (0, 1, 1, 0), (1 / 2 + 2 / 3) / 2, 2 / 3),
        # positives at ranks 1, 4, 5 of 5: precision 1, 2/4, 3/5; interpolated 1, 3/5, 3/5
        (
            (0.9, 0.8, 0.7, 0.6, 0.5),
            (1, 0, 0, 1, 1),
            (1 + 1 / 2 + 3 / 5) / 3,
            (1 + 3 / 5 + 3 / 5) / 3,
        ),
        # equal scores enter together, whichever comes first
        ((0.5, 0.5), (1, 0), 0.5, 0.5),
        ((0.5, 0.5), (0, 1), 0.5, 0.5),
    ],
)
def test_average_precision(
    scores: tuple[float, ...], positives: tuple[int, ...], plain: float, interpolated: float
) -> None:
    targets = column(*positives).astype(bool)
    assert average_precisions(column(*scores), targets) == pytest.approx([plain])
    assert average_precisions(column(*scores), targets, interpolated=True) == pytest.approx(
        [interpolated]
    )


def test_mean_is_over_the_classes_with_a_positive() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.7, 0.3, 0.5]])
    targets = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]], bool)
    assert average_precisions(scores, targets) == pytest.approx([1.0, 1 / 3, math.nan], nan_ok=True)
    assert mean_average_precision(scores, targets) == pytest.approx(2 / 3)
    assert math.isnan(mean_average_precision(scores, np.zeros_like(targets)))


@pytest.mark.parametrize("seed", range(5))
def test_interpolation_never_lowers(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, targets = generator.random((40, 6)).round(1), generator.random((40, 6)) < 0.3
    assert (
        average_precisions(scores, targets, interpolated=True)
        >= average_precisions(scores, targets) - 1e-12
    ).all()


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="differ in shape"):
        average_precisions(np.zeros((2, 3)), np.zeros((2, 2), bool))


def test_top1() -> None:
    scores = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    targets = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], bool)
    assert top1_accuracy(scores, targets) == pytest.approx(3 / 4)
    targets[1] = False  # left out, not wrong
    assert top1_accuracy(scores, targets) == 1.0
    assert math.isnan(top1_accuracy(scores, np.zeros_like(targets)))


@pytest.mark.parametrize(
    ("pts_s", "segments", "expected"),
    [
        ([1.0, 5.0, 9.0, 20.0], [(4.0, 6.0), (8.0, 9.0)], 0.5),
        ([1.0, 2.0], [(0.0, 10.0), (1.0, 3.0)], 1.0),
        ([1.0], [(2.0, 3.0)], 0.0),
        ([], [(2.0, 3.0)], math.nan),
        ([1.0], [], math.nan),
    ],
)
def test_salient_recall(
    pts_s: list[float], segments: list[tuple[float, float]], expected: float
) -> None:
    assert salient_recall(pts_s, segments) == pytest.approx(expected, nan_ok=True)


CLASSES = ["a", "b", "c", "d"]


def part_of(rows: list[dict[str, object]], with_scores: bool = True) -> pa.Table:
    wanted = schema.predictions_schema(2, len(CLASSES), CLASSES, with_scores)
    return schema.table_from_rows(({"status": "ok", **row} for row in rows), wanted)


def judged_parts(seed: int, num_parts: int, with_scores: bool = True) -> list[pa.Table]:
    """Parts of 30 rows with many tied scores.

    No label, one, two, one that the bundle lacks, failed.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(num_parts):
        rows = []
        for scores in generator.random((30, len(CLASSES)), np.float32).round(1):
            names = (
                generator.permutation([*CLASSES, "other"])[: generator.integers(0, 3)].tolist()
                or None
            )
            if generator.random() < 0.2:
                rows.append({"status": "failed", "label_names": names})
            else:
                rows.append(
                    {
                        "label_names": names,
                        "scores": scores,
                        "top_labels": [CLASSES[scores.argmax()]],
                    }
                )
        parts.append(part_of(rows, with_scores))
    return parts


def readers(parts: list[pa.Table]) -> list:
    """As `runs.read_part` reads: columns that a part lacks are left out."""
    return [
        lambda names, part=part: part.select([name for name in names if name in part.column_names])
        for part in parts
    ]


@pytest.mark.parametrize("seed", range(5))
def test_figures_part_by_part_are_those_of_all_rows_at_once(seed: int) -> None:
    parts = judged_parts(seed, 4)
    rows = [
        row
        for part in parts
        for row in part.to_pylist()
        if row["status"] == "ok" and {*(row["label_names"] or ())} & {*CLASSES}
    ]
    scores = np.array([row["scores"] for row in rows], np.float32)
    targets = np.array([[name in row["label_names"] for name in CLASSES] for row in rows])
    figures = class_figures(readers(parts), CLASSES)
    assert figures is not None
    expected = [average_precision_score(targets[:, c], scores[:, c]) for c in range(len(CLASSES))]
    assert figures.ap == pytest.approx(expected)
    assert figures.ap_interpolated == pytest.approx(
        average_precisions(scores, targets, interpolated=True)
    )
    assert figures.videos.tolist() == targets.sum(axis=0).tolist()
    assert (
        figures.predicted.tolist()
        == np.bincount(scores.argmax(axis=1), minlength=len(CLASSES)).tolist()
    )
    assert measure_parts(readers(parts), CLASSES) == {
        "labelled": len(rows),
        "unknown_labels": ["other"],
        "top1": round(top1_accuracy(scores, targets), 4),
        "mAP": round(float(np.mean(expected)), 4),
        "mAP_interpolated": round(mean_average_precision(scores, targets, interpolated=True), 4),
    }


def test_without_scores_there_is_top1_alone_and_without_labels_nothing() -> None:
    assert measure_parts(readers(judged_parts(0, 2, with_scores=False)), CLASSES).keys() == {
        "labelled",
        "top1",
        "unknown_labels",
    }
    assert measure_parts(readers([part_of([{"top_labels": ["a"]}])]), CLASSES) == {
        "labelled": 0,
        "unknown_labels": [],
    }
    assert measure_parts([], CLASSES) == {"labelled": 0, "unknown_labels": []}


@pytest.mark.parametrize(
    ("row", "verdict", "without_classes"),
    [
        ({"label_names": ["a", "b"], "top_labels": ["b", "a"]}, RIGHT, RIGHT),
        ({"label_names": ["a"], "top_labels": ["b", "a"]}, WRONG, WRONG),
        ({"label_names": ["a"], "top_labels": None}, WRONG, WRONG),
        ({"label_names": ["a"], "top_labels": []}, WRONG, WRONG),
        ({"label_names": ["other"], "top_labels": ["b"]}, UNLABELLED, WRONG),
        ({"label_names": [], "top_labels": ["b"]}, UNLABELLED, UNLABELLED),
        ({"label_names": None, "top_labels": ["b"]}, UNLABELLED, UNLABELLED),
        ({"label_names": ["a"], "status": "failed"}, FAILED, FAILED),
    ],
)
def test_verdict(row: dict[str, object], verdict: int, without_classes: int) -> None:
    first = {"label_names": ["d"], "top_labels": ["d"]}
    assert verdicts(part_of([first, row]), CLASSES).tolist() == [RIGHT, verdict]
    assert verdicts(part_of([row]), []).tolist() == [without_classes]
