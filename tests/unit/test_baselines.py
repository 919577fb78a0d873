"""The simple samplers."""

from __future__ import annotations

import numpy as np
import pytest

from tsq_ray.model import baselines

SIXTEEN = np.arange(16) * 30 + 7


@pytest.mark.parametrize(
    ("frame_index", "budget", "expected"),
    [
        (SIXTEEN, 5, [1, 4, 8, 11, 14]),  # floor of 1.6, 4.8, 8, 11.2, 14.4
        (SIXTEEN, 4, [2, 6, 10, 14]),
        (SIXTEEN, 1, [8]),
        (SIXTEEN, 16, list(range(16))),
        (np.arange(16) % 10, 5, [1, 3, 5, 7, 9]),  # ten frames repeated: over the first ten slots
        (np.arange(16) % 4, 5, [0, 1, 2, 3]),
        (np.zeros(16, int), 5, [0]),
        # not cyclic (a keyframe fills two slots): slots 1, 4, 7, 10 overall; 4 and 7 are both frame
        # 2, so the next slot, 8, is taken
        (np.array([0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6]), 4, [1, 4, 8, 10]),
        # after the last slot, the search continues from the first
        (np.array([0, 1, 2, 3, 4, 5, 5, 5]), 4, [1, 3, 5, 0]),
    ],
)
def test_uniform(frame_index: np.ndarray, budget: int, expected: list[int]) -> None:
    chosen = baselines.uniform(frame_index, budget)
    assert chosen.slots.tolist() == sorted(expected)
    assert chosen.selected_by == ["uniform"] * len(expected)


def test_random_never_changes() -> None:
    # a fixed answer: it must not change with the platform or a library's version
    assert baselines.random(SIXTEEN, 5, 0, "0123456789abcdef").slots.tolist() == [0, 5, 10, 13, 15]


def test_random_depends_on_seed_and_video() -> None:
    choices = {
        tuple(baselines.random(SIXTEEN, 5, seed, video).slots)
        for seed in range(4)
        for video in ("a", "b")
    }
    assert len(choices) > 4


def test_random_is_even() -> None:
    counts = np.zeros(16)
    for video in range(2000):
        counts[baselines.random(SIXTEEN, 4, 1, f"video{video}").slots] += 1
    assert counts.min() > 420  # 500 expected, standard deviation 19
    assert counts.max() < 580


def test_random_takes_distinct_source_frames() -> None:
    frames = np.arange(16) % 6
    chosen = baselines.random(frames, 5, 0, "v")
    assert len(set(frames[chosen.slots])) == 5
    assert chosen.selected_by == ["random"] * 5
    assert baselines.random(frames, 9, 0, "v").slots.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_highest_scores_are_taken() -> None:
    scores = np.array([0.2, 0.3, 0.8, 0.2, 0.9, 0.2])
    chosen = baselines.highest(scores, np.arange(6), 2, "maxconf-l")
    assert chosen.slots.tolist() == [2, 4]
    assert chosen.selected_by == ["maxconf-l"] * 2
    assert baselines.highest(scores, np.arange(6), 4, "x").slots.tolist() == [0, 1, 2, 4]
    assert baselines.highest(scores, np.arange(6) % 3, 2, "x").slots.tolist() == [1, 2]
