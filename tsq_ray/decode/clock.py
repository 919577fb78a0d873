"""Which timestamps can be believed, and the times rebuilt from those that cannot. Pure: integers of one time base in and out.

FFmpeg's decoders give pictures in presentation order. Where the times that come with them do not ascend, repeat, or jump,
the times are wrong and the order is right.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_JUMP = 100
"""A step is a jump only where it is this many times the usual one, whatever its length."""
_MAX_GAP_S, _MAX_STILL_S = 120, 600
"""Longest step in seconds, in a stream whose clock may start again and in any other one: up to there a picture stands still,
as a screen recording's may for minutes."""
_MAX_GROUP = 64
"""Most frames between two anchors: codecs reorder 16 to 32."""
_NEAR = 16
"""Usual steps that a time runs back where frames were only swapped; further back the clock began again."""
_FINER = 1000
"""Rebuilt times are in a time base at least this many times finer: frames with one time share the step to the next."""


def max_step(time_base: Fraction, discontinuous: bool) -> int:
    """The longest step between two frames that is believed. `discontinuous`: the container's clock may start again."""
    return int((_MAX_GAP_S if discontinuous else _MAX_STILL_S) / time_base)


def jumps(pts: Sequence[int] | np.ndarray, limit: int) -> bool:
    """Whether any step between ascending times is longer than `limit` and many times the usual one."""
    steps = np.diff(np.asarray(pts, np.int64))
    return bool(len(steps)) and bool(steps.max() > max(limit, _JUMP * np.median(steps)))


def anchor_groups(pts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of times in decoding order: bool, which are later than all before (anchors), and int, each one's group.

    A group is an anchor and what is decoded after it and shown before it.
    """
    times = np.asarray(pts, np.int64)
    anchors = np.empty(len(times), bool)
    anchors[:1] = True
    anchors[1:] = times[1:] > np.maximum.accumulate(times)[:-1]
    return anchors, np.cumsum(anchors) - 1


def in_order(pts: Sequence[int], key_pts: Sequence[int]) -> bool:
    """Whether distinct times in decoding order are such that a codec may have reordered the frames so.

    Frames of a group are shown after the anchor before theirs, groups are short, and keyframes (at `key_pts`) are anchors.
    """
    if not pts:
        return False
    times = np.asarray(pts, np.int64)
    anchors, group = anchor_groups(pts)
    if np.bincount(group).max() > _MAX_GROUP or not np.isin(key_pts, times[anchors]).all():
        return False
    late = group > 0
    return bool((times[late] > times[anchors][group[late] - 1]).all())


def skippable(pts: Sequence[int], wanted: Collection[int], reordered: bool) -> frozenset[int]:
    """Times, of those in decoding order, of frames that need not be decoded to prove that `wanted` are in their places.

    Without reordering all others. Else which frame of a group is shown first only the decoder can tell: of the groups with
    a wanted frame, one of each pattern is decoded whole, where it costs least. The others of that pattern are then right
    too, since an encoder orders groups alike, and a time that is wrong makes another pattern. A stream that reorders and
    whose times ascend in decoding order proves nothing: every frame.
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
        found = (int(extra[members].sum()), number)
        whole[pattern] = min(found, whole.get(pattern, found))
    return frozenset(
        times[extra & ~np.isin(group, [number for _, number in whole.values()])].tolist()
    )


def unproven_keys(pts: Sequence[int], key_pts: Sequence[int]) -> frozenset[int]:
    """Times of the keyframes, of a stream that reorders, whose own place the packets do not prove.

    Frames decoded after such a keyframe are shown before it, or no frame behind it is reordered: then its time may be that of
    decoding, and frames shown before it may have come later.
    """
    times = np.asarray(pts, np.int64)
    _, group = anchor_groups(pts)
    sizes = np.append(np.bincount(group), 1)
    keys = np.flatnonzero(np.isin(times, key_pts))
    own = group[keys]
    return frozenset(times[keys[(sizes[own] > 1) | (sizes[own + 1] == 1)]].tolist())


@dataclass(frozen=True)
class Rebuilt:
    """Strictly ascending times, one a frame in the decoder's order, and what was wrong with those that came."""

    pts: list[int]
    time_base: Fraction
    step: int
    """The usual step."""
    only_swapped: bool
    """The same times, exchanged between neighbours, as those of damaged frames are."""
    fault: str


def rebuilt(
    times: Sequence[int | None], time_base: Fraction, limit: int, default_step: int
) -> Rebuilt | None:
    """Times in the decoder's order that ascend; None where those that came do. At least one must be known.

    Stretches between two breaks of the clock keep their own steps and follow one another at the usual step, which is
    `default_step` where no two times tell one. Within a stretch times that run a little backwards are those of swapped
    frames, and frames that share a time share the step to the next. Missing times lie evenly between their neighbours.
    """
    finer = max(_FINER, 2 * len(times))
    bound = 2**61 // finer  # so that no difference overflows
    times = [time if time is None else min(max(time, -bound), bound) for time in times]
    known, missing = _filled(times, finer, default_step)
    limit *= finer
    if not missing and (np.diff(known) > 0).all() and not jumps(known, limit):
        return None
    pieces = [
        piece for stretch in _split(known, _breaks(known, limit)) for piece in _unswapped(stretch)
    ]
    rising = np.concatenate([np.diff(piece) for piece in pieces])
    usual = int(np.median(rising[rising > 0])) if (rising > 0).any() else default_step * finer
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
    """Times in the finer time base, those that are missing put in at even steps, and the number of these."""
    places = np.flatnonzero([time is not None for time in times])
    known = np.array([time for time in times if time is not None], np.int64) * finer
    steps = np.diff(known) / np.diff(places)
    usual = np.median(steps[steps > 0]) if (steps > 0).any() else default_step * finer
    filled = np.interp(np.arange(len(times)), places, known).astype(np.int64)
    filled[places] = known  # exact where they are large
    outside = np.arange(len(times)) - np.clip(np.arange(len(times)), places[0], places[-1])
    return filled + (outside * usual).astype(np.int64), len(times) - len(places)


def _breaks(times: np.ndarray, limit: int) -> np.ndarray:
    """bool [n - 1]: where the clock breaks between two frames. A single frame far from its neighbours breaks on both sides."""
    steps = np.diff(times)
    moving = np.abs(steps[steps != 0])
    usual = np.median(moving) if len(moving) else 1
    back = steps < -_NEAR * usual
    breaks = back | (steps > max(limit, _JUMP * usual))
    for i in np.flatnonzero(back):
        if i and times[i + 1] > times[i - 1]:
            breaks[i - 1] = True  # the frame before the break ran ahead
        elif i + 2 < len(times) and times[i + 2] > times[i]:
            breaks[i + 1] = True  # the one after it stayed behind
    return breaks


def _split(times: np.ndarray, breaks: np.ndarray) -> list[np.ndarray]:
    return np.split(times, np.flatnonzero(breaks) + 1)


def _unswapped(stretch: np.ndarray) -> list[np.ndarray]:
    """Times in ascending order, those of swapped frames exchanged.

    In pieces, one for each start of the clock, where the exchange would make two times equal.
    """
    ordered = np.sort(stretch)
    if (np.diff(ordered) == 0).sum() <= (np.diff(stretch) == 0).sum():
        return [ordered]
    return _split(stretch, np.diff(stretch) < 0)


def _spread(piece: np.ndarray, usual: int) -> np.ndarray:
    """Times that do not fall -> times that rise: those that are equal share the step to the next."""
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
    found = ", ".join(f"{number} {what}" for what, number in numbers.items() if number)
    return (
        f"the timestamps of {len(times)} frames are wrong ({found}): "
        f"times rebuilt in the decoder's order, usual step {float(usual * time_base):.4g} s"
    )
