"""Appendix A's prototypes on cases small enough to follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tsq_ray.prototypes import prototypes


def video(logits_of_frames: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """A video whose t-th frame has the one-hot feature t.

    A prototype then shows which frames it is the mean of.
    """
    logits = np.array(logits_of_frames, np.float16)
    return np.eye(len(logits), 20, dtype=np.float16), logits


def build(
    videos: list[tuple[np.ndarray, np.ndarray]],
    labels: list[list[int]],
    num_classes: int = 2,
    **changes: object,
) -> torch.Tensor:
    options = {"seed": 0, "task": "single", **changes}
    return prototypes(
        (v[0] for v in videos), (v[1] for v in videos), labels, num_classes, **options
    )


def mean_of(*frames: int) -> torch.Tensor:
    result = torch.zeros(20)
    result[list(frames)] = 1 / len(frames)
    return result


TEN = video([[5 + t / 10, 0] for t in range(10)])


@pytest.mark.parametrize(
    ("num_correct", "expected"), [(10, (9, 8, 7)), (4, (3, 2)), (3, (2,)), (1, (0,))]
)
def test_the_best_thirty_percent_of_the_correct_frames(
    num_correct: int, expected: tuple[int, ...]
) -> None:
    frames = [[5 + t / 10, 0] if t < num_correct else [0, 5] for t in range(10)]
    torch.testing.assert_close(
        build([video(frames), video([[0, 1]])], [[0], [1]])[0], mean_of(*expected)
    )


def test_mean_over_the_videos_not_over_the_frames() -> None:
    # ten frames give three, one frame gives one: each video has half the weight
    one = np.full((1, 20), 2.0), np.array([[1.0, 0.0]])
    result = build([TEN, one, video([[0, 1]])], [[0], [0], [1]])
    torch.testing.assert_close(result[0], (mean_of(7, 8, 9) + 2) / 2)


def test_a_video_without_a_correct_frame_is_left_out() -> None:
    wrong = np.full((4, 20), 100.0), np.tile([0.0, 1.0], (4, 1))
    torch.testing.assert_close(build([wrong, TEN], [[0], [0]])[0], mean_of(7, 8, 9))


def test_unless_its_class_has_no_other() -> None:
    wrong = video([[t / 10, 5] for t in range(10)])
    torch.testing.assert_close(build([wrong], [[0]])[0], mean_of(7, 8, 9))


def test_a_class_without_videos_starts_at_random() -> None:
    result = build([TEN], [[0]], num_classes=2)
    assert torch.equal(result[1], build([TEN], [[0]], num_classes=2)[1])
    assert not torch.equal(result[1], build([TEN], [[0]], num_classes=2, seed=1)[1])
    rms = mean_of(7, 8, 9).square().mean().sqrt()
    assert 0.4 * rms < result[1].square().mean().sqrt() < 2 * rms


@pytest.mark.parametrize("task", ["single", "multi"])
def test_a_video_with_two_labels_counts_for_both(task: str) -> None:
    # frame 0 shows class 0, frame 1 class 1 (above the wrong class 2, though below class 0), frame
    # 2 the wrong class
    frames = video([[5, 0, 1], [3, 2, 1], [0, 0, 5]])
    result = build([frames], [[0, 1]], num_classes=3, task=task)
    torch.testing.assert_close(result[0], mean_of(0))
    torch.testing.assert_close(result[1], mean_of(1))


def test_arrays_and_iterators_are_alike() -> None:
    generator = np.random.default_rng(0)
    features, logits = generator.random((6, 4, 8)), generator.random((6, 4, 3))
    labels = [[i % 3] for i in range(6)]
    from_arrays = prototypes(features, logits, labels, 3, 0, "single")
    assert from_arrays.shape == (3, 8)
    assert from_arrays.dtype == torch.float32
    assert torch.equal(
        from_arrays, prototypes(iter(features), iter(logits), iter(labels), 3, 0, "single")
    )


def test_misuse() -> None:
    with pytest.raises(AssertionError, match=r"shape \(10, 2\), expected \(10, 3\)"):
        build([TEN], [[0]], num_classes=3)
    with pytest.raises(AssertionError, match="at least one video"):
        build([], [])
