"""Choose the frames that fill the T slots. Pure: lists of timestamps in, indices out.

Position i of T is at (i + 0.5) / T of the duration, or at (i + place) / T if places are given
(training). Its frame is the one displayed then: the last whose timestamp is not later. Timestamps
are ascending integers in one time base; `end` is the time at which the last frame ends.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

Places = Sequence[float] | None


def uniform_indices(
    pts: Sequence[int], end: int, num_frames: int, places: Places = None
) -> list[int]:
    """T frame indices, ascending; a video of n < T frames repeats 0..n-1 cyclically."""
    count = len(pts)
    assert count > 0
    if count < num_frames:
        return [i % count for i in range(num_frames)]
    return [frame_at(pts, position(pts[0], end, num_frames, i, places)) for i in range(num_frames)]


def position(start: int, end: int, num_frames: int, i: int, places: Places = None) -> int:
    """The time of position i, rounded down.

    Integer timestamps compare (<=) with the rounded time as they do with the exact one.
    """
    if places is not None:
        return start + int((i + places[i]) * (end - start) / num_frames)
    return start + (2 * i + 1) * (end - start) // (2 * num_frames)


def frame_at(pts: Sequence[int], time: int) -> int:
    """Index of the frame displayed at `time`: the last with pts <= time, else the first."""
    return max(bisect_right(pts, time) - 1, 0)


def interval_of(time: int, start: int, end: int, num_frames: int) -> int:
    """Index of the one of T equal intervals of [start, end) that holds `time`; -1 or T outside."""
    if time < start:
        return -1
    if end <= start:
        return 0
    return min((time - start) * num_frames // (end - start), num_frames)


def keyframe_choice(
    key_pts: Sequence[int], start: int, end: int, num_frames: int, places: Places = None
) -> list[int | None]:
    """For each of the T intervals, the keyframe in it nearest its position, or None.

    Keyframes are indices into `key_pts`; the position is the interval's centre or `places` entry.
    """
    best: list[int | None] = [None] * num_frames
    for k, time in enumerate(key_pts):
        i = interval_of(time, start, end, num_frames)
        if not 0 <= i < num_frames:
            continue
        chosen = best[i]
        if chosen is None or _off(time, start, end, num_frames, i, places) < _off(
            key_pts[chosen], start, end, num_frames, i, places
        ):
            best[i] = k
    return best


def _off(time: int, start: int, end: int, num_frames: int, i: int, places: Places) -> int:
    if places is not None:
        return abs(time - position(start, end, num_frames, i, places))
    return abs(2 * num_frames * (time - start) - (2 * i + 1) * (end - start))


def distinct(indices: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """The N distinct frames, ascending, and int32 [T], which of them fills each slot."""
    values, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    return [int(value) for value in values], inverse.astype(np.int32)


def end_of(pts: Sequence[int], last_duration: int | None, track_duration: int | None = None) -> int:
    """The time at which the last frame ends.

    Taken from the header's track duration if the track ends within one frame interval after the
    last frame starts (a packet's own duration is the time to the next one *decoded*); else from the
    last frame's duration; else from the median time between frames. A single frame without a
    duration ends at its start.
    """
    steps = np.diff(np.asarray(pts, np.int64))
    if (
        track_duration is not None
        and len(pts) > 1
        and 0 < pts[0] + track_duration - pts[-1] <= int(steps.max())
    ):
        return pts[0] + track_duration
    if last_duration is not None and last_duration > 0:
        return pts[-1] + last_duration
    return pts[-1] + max(int(np.median(steps)), 1) if len(pts) > 1 else pts[-1]
