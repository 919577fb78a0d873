"""The simple samplers that TSQNet is compared with (paper, section 4.2). Shapes: T frames (slots), C classes, K budget."""

from __future__ import annotations

import hashlib

import numpy as np

from tsq_ray.model.selection import Selection, distinct_slots, in_time_order, ranked


def uniform(frame_index: np.ndarray, budget: int) -> Selection:
    """Slots floor((i + 0.5) T / K), i = 0..K-1; of a video that repeats its n < T frames cyclically, over its first n slots.

    Where two of them show the same source frame, the second gives way to the next slot (from the start again after the last) with a
    frame not yet used. `frame_index` is int [T]; a video with fewer than K source frames gives all of them.
    """
    candidates = distinct_slots(frame_index)
    count = min(budget, len(candidates))
    length = _period(frame_index)
    chosen: dict[int, str] = {}
    used: set[int] = set()
    for i in range(count):
        start = (2 * i + 1) * length // (2 * count)
        slot = next(
            s % length
            for s in range(start, start + length)
            if int(frame_index[s % length]) not in used
        )
        used.add(int(frame_index[slot]))
        chosen[slot] = "uniform"
    return in_time_order(chosen)


def random(frame_index: np.ndarray, budget: int, seed: int, video_id: str) -> Selection:
    """K source frames at random, for ever the same for (seed, video_id); the choice for K is part of that for K + 1."""

    def key(slot: int) -> bytes:
        # a hash, not a random generator: the streams of those may change with the library's version
        return hashlib.sha256(f"{seed}:{video_id}:{slot}".encode()).digest()

    order = sorted((int(slot) for slot in distinct_slots(frame_index)), key=key)
    return in_time_order({slot: "random" for slot in order[:budget]})


def highest(scores: np.ndarray, frame_index: np.ndarray, budget: int, name: str) -> Selection:
    """The K source frames with the highest scores; ties by slot.

    MaxConf and MaxConf-L are this with the probability of each frame's best class, by the recogniser
    or by the light encoder's frame head.

    Args:
        scores: [T].
        frame_index: int [T].
        budget: K.
        name: stored in `selected_by`.
    """
    order = ranked(scores, distinct_slots(frame_index))
    return in_time_order({slot: name for slot in order[:budget]})


def _period(frame_index: np.ndarray) -> int:
    """n of a video whose n distinct frames repeat cyclically over the T slots, else T."""
    num_slots = len(frame_index)
    distinct = len(np.unique(frame_index))
    repeats = bool(np.array_equal(frame_index, np.resize(frame_index[:distinct], num_slots)))
    return distinct if repeats else num_slots
