"""The sampling plan: lists of timestamps in, indices out."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tsq_ray.decode.plan import (
    distinct,
    end_of,
    frame_at,
    interval_of,
    keyframe_choice,
    uniform_indices,
)


def test_uniform_positions_are_the_middles_of_equal_intervals() -> None:
    assert uniform_indices(range(0, 96), 96, 16) == [
        3,
        9,
        15,
        21,
        27,
        33,
        39,
        45,
        51,
        57,
        63,
        69,
        75,
        81,
        87,
        93,
    ]


@pytest.mark.parametrize(
    ("count", "num_frames", "expected"),
    [(1, 4, [0, 0, 0, 0]), (3, 8, [0, 1, 2, 0, 1, 2, 0, 1]), (4, 4, [0, 1, 2, 3])],
)
def test_few_frames_are_used_cyclically(count: int, num_frames: int, expected: list[int]) -> None:
    assert uniform_indices(range(count), count, num_frames) == expected


def test_variable_frame_rate_goes_by_time_not_by_count() -> None:
    # one frame stays on show for nine tenths of the video
    assert uniform_indices([0, 90, 92, 94, 96, 98], 100, 5) == [0, 0, 0, 0, 1]


def test_a_start_other_than_zero_changes_nothing() -> None:
    pts = [0, 3, 7, 8, 15, 21]
    moved = [time + 48750 for time in pts]
    assert uniform_indices(moved, 48750 + 24, 4) == uniform_indices(pts, 24, 4)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 16, 50])
def test_uniform_is_the_last_frame_not_after_the_exact_position(num_frames: int) -> None:
    pts = sorted({(i * i * 7919) % 100003 for i in range(200)})
    end = pts[-1] + 37
    for i, index in enumerate(uniform_indices(pts, end, num_frames)):
        exact = pts[0] + Fraction(2 * i + 1, 2 * num_frames) * (end - pts[0])
        assert index == max(k for k, time in enumerate(pts) if time <= exact)


def test_frame_at_before_the_first_frame_is_the_first() -> None:
    assert frame_at([10, 20], 5) == 0
    assert frame_at([10, 20], 20) == 1


@pytest.mark.parametrize(
    ("time", "expected"), [(9, -1), (10, 0), (34, 0), (35, 1), (109, 3), (110, 4), (500, 4)]
)
def test_interval_of(time: int, expected: int) -> None:
    assert interval_of(time, 10, 110, 4) == expected


def test_keyframe_nearest_the_centre_of_each_interval() -> None:
    # intervals of 25: centres 12.5, 37.5, 62.5, 87.5; the third has no keyframe
    assert keyframe_choice([0, 10, 20, 26, 40, 49, 75, 99], 0, 100, 4) == [1, 4, None, 7]


def test_a_keyframe_on_a_boundary_belongs_to_the_later_interval() -> None:
    assert keyframe_choice([50], 0, 100, 2) == [None, 0]


def test_keyframes_outside_the_duration_are_left_out() -> None:
    assert keyframe_choice([-5, 100, 130], 0, 100, 2) == [None, None]


def test_places_say_where_in_each_interval() -> None:
    # intervals of 25 frames
    assert uniform_indices(range(100), 100, 4, (0.0, 0.5, 0.999, 0.04)) == [0, 37, 74, 76]
    assert uniform_indices(range(1000, 1100), 1100, 4, (0.5,) * 4) == uniform_indices(
        range(100), 100, 4
    )
    assert uniform_indices(range(3), 3, 4, (0.9,) * 4) == [0, 1, 2, 0]


def test_keyframe_nearest_the_place() -> None:
    keys = [0, 10, 20, 26, 40, 49, 75, 99]
    assert keyframe_choice(keys, 0, 100, 4, (0.0, 0.99, 0.5, 0.9)) == [0, 5, None, 7]


def test_distinct_maps_slots_to_frames() -> None:
    values, slot_frame = distinct([4, 4, 9, 2, 9])
    assert values == [2, 4, 9]
    assert slot_frame.tolist() == [1, 1, 2, 0, 2]
    assert slot_frame.dtype.name == "int32"


@pytest.mark.parametrize(
    ("pts", "last", "track", "expected"),
    [
        ([0, 10, 20], 10, None, 30),
        ([0, 10, 20], None, None, 30),
        ([0, 10, 40], 0, None, 60),
        ([5], 8, None, 13),
        ([5], None, None, 5),
        ([0, 10, 40], 3, 65, 65),
        ([0, 10, 40], 3, 143165, 43),
        ([0, 10, 40], 3, 20, 43),
    ],
)
def test_end_of_the_last_frame(
    pts: list[int], last: int | None, track: int | None, expected: int
) -> None:
    assert end_of(pts, last, track) == expected
