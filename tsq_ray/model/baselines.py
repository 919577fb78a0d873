"""The simple samplers that TSQNet is compared with (paper, section 4.2).

Shapes: T frames (slots), C classes, K budget.
"""

from __future__ import annotations

import hashlib

import numpy as np

from tsq_ray.model.selection import Selection, distinct_slots, in_time_order, ranked


def uniform(frame_index: np.ndarray, budget: int) -> Selection:
    """Choose the slots floor((i + 0.5) T / K), i = 0..K-1.

    If a video repeats its n < T frames cyclically, n replaces T. If two slots show the same source
    frame, the second is replaced by the next slot, wrapping around at the end, that shows an
    unused frame. If a video has fewer than K source frames, all are chosen. `frame_index`: int [T].
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
    """Choose K source frames at random, depending only on (seed, video_id).

    The choice for K is part of the choice for K + 1.
    """

    def key(slot: int) -> bytes:
        # a hash, because the stream of a random generator may change with the library's version
        return hashlib.sha256(f"{seed}:{video_id}:{slot}".encode()).digest()

    order = sorted((int(slot) for slot in distinct_slots(frame_index)), key=key)
    return in_time_order({slot: "random" for slot in order[:budget]})


def highest(scores: np.ndarray, frame_index: np.ndarray, budget: int, name: str) -> Selection:
    """Choose the K source frames with the highest scores; ties go to the earlier slot.

    MaxConf and MaxConf-L score each frame by the probability of its best class, according to the
    recogniser or the light encoder's frame head.

    Args:
        scores: [T].
        frame_index: int [T].
        budget: K.
        name: stored in `selected_by`.
    """
    order = ranked(scores, distinct_slots(frame_index))
    return in_time_order({slot: name for slot in order[:budget]})


def _period(frame_index: np.ndarray) -> int:
    """Return n if the n distinct frames repeat cyclically over the T slots, else T."""
    num_slots = len(frame_index)
    distinct = len(np.unique(frame_index))
    repeats = bool(np.array_equal(frame_index, np.resize(frame_index[:distinct], num_slots)))
    return distinct if repeats else num_slots
