"""Frames that are relevant and differ from each other: a determinantal point process, greedily.

Shapes: n frames, D dims, K budget.
"""

from __future__ import annotations

import math

import numpy as np


def dpp(features: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Choose relevant frames that differ: the greedy mode of a determinantal point process.

    H. Sun et al., MDP3: A Training-free Approach for List-wise Frame Selection in Video-LLMs, ICCV
    2025, arXiv 2501.02885. From the paper: a kernel r_i k(x_i, x_j) r_j of relevance and Gaussian
    similarity, and the greedy maximum of the determinant (L. Chen et al., Fast Greedy MAP Inference
    for Determinantal Point Process, NeurIPS 2018). Our reading: one Gaussian, as wide as the mean
    squared distance of normalised features; r is the score divided by the highest. Left out: the
    dynamic programming over segments, which T frames do not need.

    Args:
        features: [n, D].
        scores: relevance, [n], at least 0.
        count: K, at most n.

    Returns:
        The places of the frames, int [K], each the best given those before it.
    """
    unit = normalized(np.asarray(features, np.float64))
    squared = np.maximum(2 - 2 * unit @ unit.T, 0)
    similarity = np.exp(-squared / (2 * max(squared.mean(), 1e-12)))
    highest = float(scores.max())
    relevance = np.asarray(scores, np.float64) / highest if highest > 0 else np.ones(len(scores))
    return greedy_volume(relevance[:, None] * similarity * relevance, count)


def greedy_volume(kernel: np.ndarray, count: int) -> np.ndarray:
    """Return the K rows that greedily maximise the determinant of a kernel, [n, n]: int [K].

    The pivots of its Cholesky factorisation: each has the largest variance given those before it.
    """
    variance, rows = np.diag(kernel).astype(np.float64), np.zeros((count, len(kernel)))
    taken = np.zeros(count, np.int64)
    free = np.ones(len(kernel), bool)
    for step in range(count):
        pivot = int(np.where(free, variance, -np.inf).argmax())
        taken[step], free[pivot] = pivot, False
        if variance[pivot] > 1e-12:
            scale = math.sqrt(variance[pivot])
            rows[step] = (kernel[pivot] - rows[:step, pivot] @ rows[:step]) / scale
            variance = variance - rows[step] ** 2
    return taken


def normalized(features: np.ndarray) -> np.ndarray:
    """Scale each row of [n, D] to length 1; a row of zeros stays zero."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
