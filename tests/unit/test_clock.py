"""Which times are trusted, and how the others are rebuilt."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tsq_ray.decode.clock import (
    anchor_groups,
    doubtful,
    in_order,
    jumps,
    longest_step,
    max_step,
    rebuild,
    skippable,
    unproven_keys,
)

TICK = Fraction(1, 1000)
LIMIT = max_step(TICK, discontinuous=True)
HOUR = 3_600_000


def seconds(times: list[int | None]) -> list[float]:
    fixed = rebuild(times, TICK, LIMIT, 40)
    assert fixed is not None
    assert (np.diff(fixed.pts) > 0).all()
    assert len(fixed.pts) == len(times)
    return [float((time - fixed.pts[0]) * fixed.time_base) for time in fixed.pts]


@pytest.mark.parametrize(
    "times",
    [
        [0, 40, 80, 120],
        [HOUR, HOUR + 40, HOUR + 80],
        [7],
        [0, 40, 80, 120_080, 120_120],  # two minutes: a picture that stands still
        [0, 200_000, 400_000, 600_000],  # one frame every 200 s: no step is unusual
    ],
)
def test_times_that_can_be_true_are_left_alone(times: list[int | None]) -> None:
    assert rebuild(times, TICK, LIMIT, 40) is None


EVEN = [0.0, 0.04, 0.08, 0.12, 0.16, 0.2]


@pytest.mark.parametrize(
    ("times", "fault"),
    [
        ([0, 40, 80, 0, 40, 80], "1 run backwards"),
        ([0, 40, 80, HOUR, HOUR + 40, HOUR + 80], "1 jump by up to 3599.9 s"),
        ([0, 40, HOUR, 120, 160, 200], "1 run backwards, 1 jump by up to 3600.0 s"),
        (
            [HOUR, HOUR + 40, 0, HOUR + 120, HOUR + 160, HOUR + 200],
            "1 run backwards, 1 jump by up to 3600.1 s",
        ),
        ([0, 80, 40, 120, 200, 160], "2 run backwards"),
        ([0, 0, 80, 80, 160, 160], "3 repeat"),
        ([0, None, 80, None, 160, None], "3 are missing"),
        ([None, None, 80, 120, 160, 200], "2 are missing"),
    ],
)
def test_times_are_rebuilt_in_the_decoders_order(times: list[int | None], fault: str) -> None:
    fixed = rebuild(times, TICK, LIMIT, 40)
    assert fixed is not None
    assert fault in fixed.fault
    if "repeat" not in fault:
        assert seconds(times) == pytest.approx(EVEN)


def test_a_frame_two_seconds_off_moves_no_other() -> None:
    times: list[int | None] = [40 * i for i in range(100)]
    for off in (2000, -1500):
        assert seconds([*times[:50], 40 * 50 + off, *times[51:]]) == pytest.approx(
            [0.04 * i for i in range(100)]
        )  # type: ignore[list-item]


def test_frames_that_share_a_time_share_the_step_to_the_next() -> None:
    assert seconds([0, 0, 0, 0, 100, 140]) == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.14])


def test_a_good_stretch_keeps_its_own_steps() -> None:
    assert seconds([0, 40, 5000, 5040, 0, 40, 80]) == pytest.approx(
        [0, 0.04, 5.0, 5.04, 5.08, 5.12, 5.16]
    )


def test_all_frames_at_one_time() -> None:
    assert len(set(seconds([5] * 5000))) == 5000


def test_a_jump_is_long_and_unusual() -> None:
    assert jumps([0, 40, 80, 80 + LIMIT + 1], LIMIT)
    assert not jumps([0, 40, 80, 80 + LIMIT], LIMIT)
    assert not jumps([0, LIMIT + 1, 2 * LIMIT + 2], LIMIT)
    assert not jumps([5], LIMIT)
    assert max_step(TICK, discontinuous=False) == 600_000


@pytest.mark.parametrize(
    ("times", "end", "text", "doubtful"),
    [
        ([0, 40, 80, 8080, 8120], 8160, "frame 2, at 0.1 s, is shown for 8.0 s, 200 times", True),
        ([0, 40, 80, 3079, 3119], 3159, "frame 2, at 0.1 s, is shown for 3.0 s, 75 times", False),
        ([0, 10, 20, 2000, 2010], 2020, "frame 2, at 0.0 s, is shown for 2.0 s, 198 times", False),
        ([0, 40, 80, 120, 160], 8160, "frame 4, at 0.2 s, is shown for 8.0 s, 200 times", True),
        ([7], 7, "frame 0, at 0.0 s, is shown for 0.0 s, 0 times", False),
    ],
    ids=["long", "not a hundred times", "not three seconds", "the last frame", "one frame"],
)
def test_the_longest_step(times: list[int], end: int, text: str, doubtful: bool) -> None:
    step = longest_step(times, end, TICK)
    assert str(step).startswith(text)
    assert step.doubtful is doubtful


@pytest.mark.parametrize(
    ("order", "keys", "believed"),
    [
        ([0, 1, 2, 3], [0, 2], True),
        ([0, 4, 2, 1, 3, 8, 6, 5, 7], [0], True),
        ([2, 0, 1, 5, 3, 4], [2], True),  # an open group at the start
        ([0, 4, 2, 1, 3, 8, 0, 5, 7], [0], False),  # behind the anchor before
        (
            [0, 1, 30, 2, 3, 4, 5],
            [0, 4],
            False,
        ),  # a keyframe is never shown before a frame decoded earlier
        ([100, *range(99)], [100], False),  # no codec reorders a hundred frames
        ([], [], False),
    ],
)
def test_what_a_codec_may_have_reordered(order: list[int], keys: list[int], believed: bool) -> None:
    assert in_order(order, keys) is believed


def test_groups_are_an_anchor_and_what_is_shown_before_it() -> None:
    anchors, group = anchor_groups([0, 4, 2, 1, 3, 8, 6])
    assert anchors.tolist() == [True, True, False, False, False, True, False]
    assert group.tolist() == [0, 1, 1, 1, 1, 2, 2]


def test_frames_are_skipped_but_for_one_whole_group_of_each_pattern() -> None:
    order = [0, 4, 2, 1, 3, 8, 6, 5, 7]
    assert skippable(order, [6], reordered=True) == {1, 2, 3}
    assert skippable(order, [8], reordered=True) == {1, 2, 3}
    assert skippable(order, [1, 6], reordered=True) == {5, 7}, (
        "the second group is ordered as the first"
    )
    assert skippable([*order[:-2], 7, 5], [1, 6], reordered=True) == set(), "this one is not"
    assert skippable(order, [0], reordered=True) == {1, 2, 3, 5, 6, 7}
    assert skippable([0, 1, 2, 3], [2], reordered=True) == set()
    assert skippable([0, 1, 2, 3], [2], reordered=False) == {0, 1, 3}
    assert skippable(order, [1, 6], reordered=True, suspects=[6]) == set()


@pytest.mark.parametrize(
    "times", [[2**62, 40, 80, 120], [0, -(2**63) + 1, 2, 3], [0, 40, 2**63 - 1, 120]]
)
def test_times_that_no_clock_gives_are_wrong_too(times: list[int | None]) -> None:
    fixed = rebuild(times, TICK, LIMIT, 40)
    assert fixed is not None
    assert (np.diff(fixed.pts) > 0).all()


def test_keyframes_that_only_the_next_frame_proves() -> None:
    assert unproven_keys([0, 4, 2, 1, 3, 8, 6], [0]) == set(), (
        "what follows is reordered, so its times are not those of decoding"
    )
    assert unproven_keys([0, 1, 2, 3], [0, 2]) == {0, 2}
    assert unproven_keys([0, 4, 2, 8, 5, 6, 12, 10], [0, 8]) == {8}, "5 and 6 are shown before it"
    assert unproven_keys([0, 1, 2], [2]) == {2}, "nothing follows"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (list(range(0, 600, 10)), []),
        ([*range(0, 300, 10), 294, *range(300, 600, 10)], [29, 30, 31]),
        ([*range(0, 300, 10), 296, *range(306, 606, 10)], [29, 30]),
        ([*range(0, 300, 10), 306, *range(310, 600, 10)], []),
        ([*range(0, 200, 10), *range(210, 220, 10), 211, *range(220, 600, 10)], [20, 21]),
        ([*range(0, 600, 10), 1000], []),
        ([number * number for number in range(60)], []),
        ([5], []),
    ],
    ids=[
        "even",
        "one between two others",
        "one short step",
        "one frame late, in its place",
        "one frame behind the next, next to the gap it left",
        "one gap",
        "uneven",
        "one frame",
    ],
)
def test_which_frames_may_be_displayed_elsewhere(times: list[int], expected: list[int]) -> None:
    assert doubtful(times) == expected
