"""Check which timestamps can be trusted, and rebuild the others.

Pure: integers of one time base in and out. FFmpeg's decoders output pictures in presentation order.
If their timestamps run backwards, repeat or jump, the timestamps are wrong and the order is right.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_JUMP = 100
"""A step is a jump only if it is this many times the usual step, whatever its length."""
_DOUBTFUL_S = 3
"""A step of this many seconds, and `_JUMP` times the usual one, is worth a warning."""
_MAX_GAP_S, _MAX_STILL_S = 120, 600
"""Longest step in seconds, for streams whose clock may restart and for all others.

Shorter steps are trusted: in a screen recording the picture may stand still for minutes.
"""
_MAX_GROUP = 64
"""Maximum number of frames between two anchors; codecs reorder 16 to 32."""
_EVEN_TOLERANCE, _EVEN_SHARE, _SHORT_SHARE = 0.1, 0.9, 0.6
"""A step is even if it differs from the usual one by at most this share of it; a stream is even if
this share of its steps are; a step is short if it is at most this share of the usual one, as when a
time that lies between two others splits their step."""
_MAX_BACKSTEP = 16
"""Swapped frames may run back by this many usual steps; beyond that, the clock restarted."""
_RISING_SHARE = 0.05
"""With fewer rising steps, the clock stands still: its few steps are not the usual one."""
_MIN_REFINEMENT = 1000
"""Rebuilt times use a time base at least this many times finer.

Frames with equal times are spread over the step to the next one.
"""


def max_step(time_base: Fraction, discontinuous: bool) -> int:
    """The longest step between two frames that is trusted.

    `discontinuous`: the container's clock may restart.
    """
    return int((_MAX_GAP_S if discontinuous else _MAX_STILL_S) / time_base)


def jumps(pts: Sequence[int] | np.ndarray, limit: int) -> bool:
    """Whether any step between ascending times exceeds `limit` and is many times the usual one."""
    steps = np.diff(np.asarray(pts, np.int64))
    return bool(len(steps)) and bool(steps.max() > max(limit, _JUMP * np.median(steps)))


@dataclass(frozen=True)
class LongStep:
    """The longest time that one frame is shown, according to the timestamps."""

    frame: int
    start_s: float
    """When it is first shown, relative to the first frame."""
    length_s: float
    ratio: float
    """Its length as a multiple of the usual step."""

    @property
    def doubtful(self) -> bool:
        """Whether a jump of the clock is as likely as a still picture."""
        return self.ratio >= _JUMP and self.length_s >= _DOUBTFUL_S

    def __str__(self) -> str:
        return (
            f"frame {self.frame}, at {self.start_s:.1f} s, is shown for {self.length_s:.1f} s, "
            f"{self.ratio:.0f} times the usual step: a still picture, lost frames or a clock that "
            "jumped"
        )


def longest_step(pts: Sequence[int], end: int, time_base: Fraction) -> LongStep:
    """The longest step between ascending times, the last of which lasts until `end`."""
    steps = np.diff(np.append(np.asarray(pts, np.int64), end))
    frame = int(steps.argmax())
    return LongStep(
        frame,
        float((pts[frame] - pts[0]) * time_base),
        float(int(steps[frame]) * time_base),
        float(steps[frame] / max(np.median(steps), 1)),
    )


def doubtful(pts: Sequence[int]) -> list[int]:
    """Indices of times that may be out of place among ascending, otherwise evenly spaced ones.

    Both ends of each short step: one of the two frames may be displayed elsewhere. If the stream
    reorders frames, its packets can look healthy all the same, so only decoding in order tells. A
    step whose neighbour is too long by the same amount belongs to a frame that is early or late but
    in its place.
    """
    steps = np.diff(np.asarray(pts, np.int64))
    if not len(steps):
        return []
    shares = steps / np.median(steps)
    if (np.abs(shares - 1) <= _EVEN_TOLERANCE).mean() < _EVEN_SHARE:
        return []
    around = np.pad(shares, 1)
    off = np.minimum(np.abs(shares + around[:-2] - 2), np.abs(shares + around[2:] - 2))
    # next to the gap that a displaced frame left, the sum is off by the whole short step
    short = np.flatnonzero((shares <= _SHORT_SHARE) & (off >= shares / 2))
    return sorted({*short.tolist(), *(short + 1).tolist()})


def anchor_groups(pts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For times in decoding order, return bool [n], the anchors, and int [n], the group of each.

    An anchor is later than all times before it. A group is an anchor and the frames that are
    decoded after it and displayed before it.
    """
    times = np.asarray(pts, np.int64)
    anchors = np.empty(len(times), bool)
    anchors[:1] = True
    anchors[1:] = times[1:] > np.maximum.accumulate(times)[:-1]
    return anchors, np.cumsum(anchors) - 1


def in_order(pts: Sequence[int], key_pts: Sequence[int]) -> bool:
    """Whether distinct times in decoding order can be the result of a codec's reordering.

    The frames of a group are displayed after the previous anchor, groups are short, and keyframes
    (at `key_pts`) are anchors.
    """
    if not pts:
        return False
    times = np.asarray(pts, np.int64)
    anchors, group = anchor_groups(pts)
    if np.bincount(group).max() > _MAX_GROUP or not np.isin(key_pts, times[anchors]).all():
        return False
    late = group > 0
    return bool((times[late] > times[anchors][group[late] - 1]).all())


def skippable(
    pts: Sequence[int],
    wanted: Collection[int],
    reordered: bool,
    suspects: Collection[int] = (),
) -> frozenset[int]:
    """Times of the frames that can be skipped while proving that the `wanted` ones are in place.

    `pts` are in decoding order. Without reordering, all frames but the wanted ones can be skipped.
    With reordering, only the decoder can tell which frame of a group is displayed first: among the
    groups with a wanted frame, the cheapest group of each pattern is decoded completely. The other
    groups of that pattern are then right too, because an encoder orders them the same way and a
    wrong time produces a different pattern. The `suspects` among the wanted frames may still have a
    wrong time, so their groups are decoded completely too. In a stream that reorders although its
    times ascend in decoding order, nothing is proven and no frame can be skipped.
    """
    if not reordered:
        return frozenset(pts).difference(wanted)
    times = np.asarray(pts, np.int64)
    anchors, group = anchor_groups(pts)
    needed = np.isin(times, np.fromiter(wanted, np.int64))
    extra = ~anchors & ~needed
    whole: dict[tuple[int, ...], tuple[int, int]] = {}
    bounds = np.append(np.flatnonzero(anchors), len(times))
    for number in np.unique(group[needed]).tolist():
        members = slice(bounds[number], bounds[number + 1])
        pattern = tuple(np.argsort(times[members]).tolist())
        candidate = (int(extra[members].sum()), number)
        whole[pattern] = min(candidate, whole.get(pattern, candidate))
    complete = {number for _, number in whole.values()}
    complete.update(group[np.isin(times, np.fromiter(suspects, np.int64))].tolist())
    return frozenset(times[extra & ~np.isin(group, list(complete))].tolist())


def unproven_keys(pts: Sequence[int], key_pts: Sequence[int]) -> frozenset[int]:
    """Times of the keyframes, in a stream that reorders, whose own place the packets do not prove.

    Either frames decoded after the keyframe are displayed before it, or no frame after it is
    reordered: then its time may be a decoding time, and frames displayed before it may be decoded
    later.
    """
    times = np.asarray(pts, np.int64)
    _, group = anchor_groups(pts)
    sizes = np.append(np.bincount(group), 1)
    keys = np.flatnonzero(np.isin(times, key_pts))
    own = group[keys]
    return frozenset(times[keys[(sizes[own] > 1) | (sizes[own + 1] == 1)]].tolist())


@dataclass(frozen=True)
class Rebuilt:
    """Strictly ascending times, one per frame in decoder order, and the fault in the originals."""

    pts: list[int]
    time_base: Fraction
    step: int
    """The usual step between two frames."""
    only_swapped: bool
    """The times are only swapped between neighbours, as happens with damaged frames."""
    fault: str


def rebuild(
    times: Sequence[int | None], time_base: Fraction, limit: int, default_step: int
) -> Rebuilt | None:
    """Rebuild times in decoder order so that they ascend; return None if they already do.

    At least one time must be known. Stretches between two breaks of the clock keep their own steps
    and follow one another at the usual step, which is `default_step` if fewer than one in twenty
    times rises: those may be wrong stamps in a clock that stands still.
    Within a stretch, times that run slightly backwards belong to swapped frames, and frames with
    equal times are spread over the step to the next one. Missing times are placed evenly between
    their neighbours.
    """
    finer = max(_MIN_REFINEMENT, 2 * len(times))
    bound = 2**61 // finer  # keeps differences from overflowing
    times = [time if time is None else min(max(time, -bound), bound) for time in times]
    known, missing = _filled(times, finer, default_step)
    limit *= finer
    if not missing and (np.diff(known) > 0).all() and not jumps(known, limit):
        return None
    pieces = [
        piece for stretch in _split(known, _breaks(known, limit)) for piece in _unswapped(stretch)
    ]
    rising = np.concatenate([np.diff(piece) for piece in pieces])
    defined = (rising > 0).sum() > len(rising) * _RISING_SHARE
    usual = int(np.median(rising[rising > 0])) if defined else default_step * finer
    chained: list[np.ndarray] = []
    start = int(known[0])
    for piece in pieces:
        spread = _spread(piece, usual)
        chained.append(spread - spread[0] + start)
        start = int(chained[-1][-1]) + usual
    fault = _fault(known, missing, limit, usual, time_base / finer)
    only_swapped = not missing and len(pieces) == 1 and bool((rising > 0).all())
    return Rebuilt(np.concatenate(chained).tolist(), time_base / finer, usual, only_swapped, fault)


def _filled(times: Sequence[int | None], finer: int, default_step: int) -> tuple[np.ndarray, int]:
    """Times in the finer time base, missing ones filled in evenly; and the number missing."""
    places = np.flatnonzero([time is not None for time in times])
    known = np.array([time for time in times if time is not None], np.int64) * finer
    steps = np.diff(known) / np.diff(places)
    usual = np.median(steps[steps > 0]) if (steps > 0).any() else default_step * finer
    filled = np.interp(np.arange(len(times)), places, known).astype(np.int64)
    filled[places] = known  # exact even if large
    outside = np.arange(len(times)) - np.clip(np.arange(len(times)), places[0], places[-1])
    return filled + (outside * usual).astype(np.int64), len(times) - len(places)


def _breaks(times: np.ndarray, limit: int) -> np.ndarray:
    """bool [n - 1]: whether the clock breaks between two frames.

    A single frame far from its neighbours breaks on both sides.
    """
    steps = np.diff(times)
    moving = np.abs(steps[steps != 0])
    usual = np.median(moving) if len(moving) else 1
    back = steps < -_MAX_BACKSTEP * usual
    breaks = back | (steps > max(limit, _JUMP * usual))
    for i in np.flatnonzero(back):
        if i and times[i + 1] > times[i - 1]:
            breaks[i - 1] = True  # the frame before the break ran ahead
        elif i + 2 < len(times) and times[i + 2] > times[i]:
            breaks[i + 1] = True  # the frame after it lagged behind
    return breaks


def _split(times: np.ndarray, breaks: np.ndarray) -> list[np.ndarray]:
    return np.split(times, np.flatnonzero(breaks) + 1)


def _unswapped(stretch: np.ndarray) -> list[np.ndarray]:
    """Sort the times of swapped frames into ascending order.

    If sorting would make two times equal, return one unsorted piece per clock restart instead.
    """
    ordered = np.sort(stretch)
    if (np.diff(ordered) == 0).sum() <= (np.diff(stretch) == 0).sum():
        return [ordered]
    return _split(stretch, np.diff(stretch) < 0)


def _spread(piece: np.ndarray, usual: int) -> np.ndarray:
    """Turn non-decreasing times into increasing ones, spreading equal times over the next step."""
    values, first, count = np.unique(piece, return_index=True, return_counts=True)
    room = np.diff(np.append(values, values[-1] + usual * count[-1]))
    place = np.arange(len(piece)) - np.repeat(first, count)
    return piece + place * np.repeat(room, count) // np.repeat(count, count)


def _fault(times: np.ndarray, missing: int, limit: int, usual: int, time_base: Fraction) -> str:
    steps = np.diff(times)
    jump = steps[steps > max(limit, _JUMP * usual)]
    numbers = {
        "are missing": missing,
        "run backwards": int((steps < 0).sum()),
        "repeat": int((steps == 0).sum()),
        f"jump by up to {float(int(jump.max(initial=0)) * time_base):.1f} s": len(jump),
    }
    faults = ", ".join(f"{number} {what}" for what, number in numbers.items() if number)
    return (
        f"the timestamps of {len(times)} frames are wrong ({faults}): "
        f"times rebuilt in the decoder's order, usual step {float(usual * time_base):.4g} s"
    )
