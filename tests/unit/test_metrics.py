"""Metrics against examples worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tsq_ray.metrics import average_precisions, mean_average_precision, salient_recall, top1_accuracy


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
        ((0.9, 0.8, 0.7, 0.6, 0.5), (1, 0, 0, 1, 1), (1 + 1 / 2 + 3 / 5) / 3, (1 + 3 / 5 + 3 / 5) / 3),
        # equal scores enter together, whichever comes first
        ((0.5, 0.5), (1, 0), 0.5, 0.5),
        ((0.5, 0.5), (0, 1), 0.5, 0.5),
    ],
)
def test_average_precision(scores: tuple[float, ...], positives: tuple[int, ...], plain: float, interpolated: float) -> None:
    targets = column(*positives).astype(bool)
    assert average_precisions(column(*scores), targets) == pytest.approx([plain])
    assert average_precisions(column(*scores), targets, interpolated=True) == pytest.approx([interpolated])


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
    assert (average_precisions(scores, targets, interpolated=True) >= average_precisions(scores, targets) - 1e-12).all()


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
def test_salient_recall(pts_s: list[float], segments: list[tuple[float, float]], expected: float) -> None:
    assert salient_recall(pts_s, segments) == pytest.approx(expected, nan_ok=True)
