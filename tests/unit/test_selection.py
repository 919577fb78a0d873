"""Aggregation (equation 5) and fusion (appendix A) against cases worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tsq_ray.errors import ModelError
from tsq_ray.model import by_importance, frames_until_sure, saliency, select_frames


def scores(order: list[int], num_slots: int) -> np.ndarray:
    """Scores that rank the slots as in `order`, the rest after them by slot."""
    rest = [slot for slot in range(num_slots) if slot not in order]
    result = np.zeros(num_slots, np.float32)
    result[order + rest] = np.arange(num_slots, 0, -1)
    return result


ALL = np.arange(16)


def test_saliency_single_uses_softmax_of_the_top_classes() -> None:
    attention = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    logits = torch.tensor([[math.log(2), math.log(5), math.log(3)]])  # softmax 0.2, 0.5, 0.3
    torch.testing.assert_close(
        saliency(attention, logits, "single", top_classes=2), torch.tensor([[0.15, 0.65]])
    )
    torch.testing.assert_close(
        saliency(attention, logits, "single", top_classes=5), torch.tensor([[0.35, 0.65]])
    )


def test_saliency_multi_uses_sigmoid() -> None:
    attention = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    logits = torch.tensor([[math.log(3), 0.0]])  # sigmoid 0.75, 0.5
    torch.testing.assert_close(saliency(attention, logits, "multi"), torch.tensor([[0.875, 0.375]]))


def test_saliency_of_equal_probabilities_takes_the_first_classes() -> None:
    attention = torch.eye(8)[None]
    assert saliency(attention, torch.zeros(1, 8), "single").gt(0).tolist() == [
        [True] * 5 + [False] * 3
    ]


@pytest.mark.parametrize(
    ("visual", "textual", "budget", "share", "expected"),
    [
        # the paper's example: 3 of the VQM, 2 of the TQM
        (
            [9, 3, 7],
            [1, 12],
            5,
            0.6,
            {1: "textual", 3: "visual", 7: "visual", 9: "visual", 12: "textual"},
        ),
        # two duplicates are made up in the VQM's order
        (
            [9, 3, 7, 5, 2],
            [3, 9],
            5,
            0.6,
            {2: "visual", 3: "visual", 5: "visual", 7: "visual", 9: "visual"},
        ),
        # the make-up skips a frame that the TQM has chosen: 5 is the TQM's, so 2 makes up for 9
        (
            [9, 3, 7, 5, 2],
            [9, 5],
            5,
            0.6,
            {2: "visual", 3: "visual", 5: "textual", 7: "visual", 9: "visual"},
        ),
        # lambda K = 2.4 -> 2, and 2.5 -> 3 (half up, not to even)
        ([9, 3, 7], [1, 12, 14], 4, 0.6, {1: "textual", 3: "visual", 9: "visual", 12: "textual"}),
        (
            [9, 3, 7],
            [1, 12, 14],
            5,
            0.5,
            {1: "textual", 3: "visual", 7: "visual", 9: "visual", 12: "textual"},
        ),
        ([9, 3], [1, 12], 1, 0.5, {9: "visual"}),
        ([9, 3], [1, 12], 1, 0.4, {1: "textual"}),
        ([9, 3], [1, 12], 2, 0.0, {1: "textual", 12: "textual"}),
        ([9, 3], [1, 12], 2, 1.0, {3: "visual", 9: "visual"}),
    ],
)
def test_fusion(
    visual: list[int], textual: list[int], budget: int, share: float, expected: dict[int, str]
) -> None:
    chosen = select_frames(scores(visual, 16), scores(textual, 16), ALL, budget, share)
    assert dict(zip(chosen.slots.tolist(), chosen.selected_by, strict=True)) == expected
    assert chosen.slots.dtype == np.int32
    assert chosen.slots.tolist() == sorted(expected)


def test_a_share_just_below_a_half_in_floating_point_rounds_up() -> None:
    assert 0.58 * 25 < 14.5
    frames = np.arange(60)
    visual, textual = scores(list(range(30)), 60), scores(list(range(30, 60)), 60)
    chosen = select_frames(visual, textual, frames, 25, 0.58)
    assert chosen.selected_by.count("visual") == 15


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("visual", [3, 7, 9]), ("textual", [1, 12, 14])],
)
def test_one_module_alone(mode: str, expected: list[int]) -> None:
    chosen = select_frames(scores([9, 3, 7], 16), scores([14, 1, 12], 16), ALL, 3, 0.6, mode=mode)
    assert chosen.slots.tolist() == expected
    assert chosen.selected_by == [mode] * 3


def test_a_network_without_a_textual_module() -> None:
    chosen = select_frames(scores([9, 3, 7], 16), None, ALL, 3, 0.6)
    assert chosen.slots.tolist() == [3, 7, 9]
    with pytest.raises(ModelError, match="has only the visual one: use 'visual'"):
        select_frames(scores([9], 16), None, ALL, 3, 0.6, mode="textual")


def test_ties_go_to_the_earlier_slot() -> None:
    assert select_frames(np.zeros(16), np.zeros(16), ALL, 3, 1.0).slots.tolist() == [0, 1, 2]
    assert select_frames(
        np.array([0, 1, 0, 1, 1.0]), None, np.arange(5), 2, 1.0
    ).slots.tolist() == [1, 3]


def test_repeated_source_frames_are_candidates_once() -> None:
    frames = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    visual = np.array(
        [1, 5, 2, 3, 9, 8, 7, 6.0]
    )  # the repeats score best, yet only slots 0..3 count
    assert select_frames(visual, None, frames, 2, 1.0).slots.tolist() == [1, 3]


@pytest.mark.parametrize("budget", [4, 5, 8])
def test_a_short_video_gives_all_its_frames(budget: int) -> None:
    frames = np.arange(8) % 4
    chosen = select_frames(scores([3, 2], 8), scores([0], 8), frames, budget, 0.6)
    assert chosen.slots.tolist() == [0, 1, 2, 3]


def test_a_video_of_one_frame() -> None:
    chosen = select_frames(np.ones(16), np.ones(16), np.zeros(16, int), 5, 0.6)
    assert chosen.slots.tolist() == [0]
    assert chosen.selected_by == ["visual"]


@pytest.mark.parametrize("seed", range(20))
def test_always_k_distinct_source_frames(seed: int) -> None:
    generator = np.random.default_rng(seed)
    frames = np.sort(generator.integers(0, 12, 16))
    budget, share = int(generator.integers(1, 16)), float(generator.random())
    chosen = select_frames(generator.random(16), generator.random(16), frames, budget, share)
    assert len(set(frames[chosen.slots])) == len(chosen.slots) == min(budget, len(set(frames)))


def test_by_importance_is_the_choice_for_k_with_the_first_choices_first() -> None:
    visual, textual = scores([9, 3, 7, 5, 2], 16), scores([3, 12, 9, 1], 16)
    order = by_importance(lambda k: select_frames(visual, textual, ALL, k, 0.6).slots, 5)
    # K = 1: 9 (a share of 0.6 is one frame); K = 2: 9 and 3;
    # K = 3: 9, 3 and, for the 3 that both want, the VQM's next, 7; K = 4: 12
    assert order.tolist() == [9, 3, 7, 12, 5]
    assert sorted(order) == select_frames(visual, textual, ALL, 5, 0.6).slots.tolist()
    for mode in ("both", "visual", "textual"):

        def choose(budget: int, mode: Any = mode) -> np.ndarray:
            return select_frames(visual, textual, ALL // 2, budget, 0.6, mode).slots

        for budget in range(1, 17):
            assert sorted(by_importance(choose, budget)) == choose(budget).tolist()


@pytest.mark.parametrize(
    ("rows", "margin", "expected"),
    [
        ([[0.9, 0.1, 0.0]] * 4, 2.2, 3),  # 0.8 a frame
        ([[0.9, 0.1, 0.0]] * 4, 0.8, 1),
        ([[0.9, 0.1, 0.0]] * 2, 2.2, None),
        # a frame of something else sets it back, however sure it looks
        (
            [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
            2.2,
            5,
        ),
        ([[0.5, 0.5]] * 9, 0.1, None),
    ],
)
def test_frames_until_sure(rows: list[list[float]], margin: float, expected: int | None) -> None:
    assert frames_until_sure(np.array(rows), margin) == expected
