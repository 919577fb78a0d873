"""Which videos get a card, chosen from rows that come in blocks.

A candidate has `part` and `row` (its place), `video_id`, `verdict` (quality.py), `key` (its best class
or, of a failed one, the reason) and `top_score`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray.quality import FAILED, RIGHT, UNLABELLED, WRONG


def choose_shown(found: pa.Table, max_videos: int) -> pa.Table:
    """The candidates with a card, in the page's order; the same whatever order the rows come in.

    All where they fit. Else the wrong ones (the most confident first) take up to half of the room
    and the failed ones up to a sixth (one of each reason, then another of each); the others take
    the rest, one of each predicted class, then another of each, and so on. Room that a group leaves
    goes to the next of them in the order others, wrong, failed.
    """
    found, wrong, others, failed = _groups(found, max_videos)
    num_wrong, num_failed = min(len(wrong), max_videos // 2), min(len(failed), max_videos // 6)
    num_others = min(len(others), max_videos - num_wrong - num_failed)
    num_wrong = min(len(wrong), max_videos - num_failed - num_others)
    num_failed = min(len(failed), max_videos - num_wrong - num_others)
    return _take(found, wrong[:num_wrong], others[:num_others], failed[:num_failed])


def best_candidates(found: pa.Table, max_videos: int) -> pa.Table:
    """At most 3 x `max_videos` candidates, those that `choose_shown` may take, whatever rows follow.

    A row's turn only moves back as rows are added, so one that is left out now never comes in again.
    """
    return _take(*_groups(found, max_videos))


def _take(found: pa.Table, *groups: np.ndarray) -> pa.Table:
    return found.take(pa.array(np.concatenate(groups)))


def _groups(found: pa.Table, limit: int) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray]:
    """The candidates by video_id; the first of those that are wrong, of the others and of the failed."""
    found = found.sort_by("video_id").combine_chunks()
    verdict, score = found["verdict"].to_numpy(), found["top_score"].to_numpy()
    wrong = np.flatnonzero(verdict == WRONG)
    wrong = wrong[np.argsort(-score[wrong], kind="stable")]
    others = _by_turns(found["key"], np.flatnonzero((verdict == RIGHT) | (verdict == UNLABELLED)))
    failed = _by_turns(found["key"], np.flatnonzero(verdict == FAILED))
    return found, wrong[:limit], others[:limit], failed[:limit]


def _by_turns(keys: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """By turns one of each key; within a key by video_id, which is a hash and so prefers no folder and no date."""
    encoded = pc.rank(keys.take(pa.array(rows)), tiebreaker="dense").to_numpy().astype(np.int64)
    by_key = np.argsort(encoded, kind="stable")
    start_of_key = np.searchsorted(encoded[by_key], encoded[by_key])
    turn = np.empty(len(rows), np.int64)
    turn[by_key] = np.arange(len(rows)) - start_of_key
    return rows[np.lexsort((encoded, turn))]
