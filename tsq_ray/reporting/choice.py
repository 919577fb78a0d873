"""Choose the videos that get a card, from rows that arrive in blocks.

A candidate has `part` and `row` (its location), `video_id`, `verdict` (quality.py), `key` (its best
class or, if it failed, the reason) and `top_score`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray.quality import FAILED, RIGHT, UNLABELLED, WRONG


def choose_shown(candidates: pa.Table, max_videos: int) -> pa.Table:
    """Return the candidates that get a card, in page order, whatever the order of the rows.

    If not all fit, the wrong ones (most confident first) take up to half of the places and the
    failed ones up to a sixth, cycling through the reasons. The others take the rest, cycling
    through the predicted classes. Places that remain free go to others, wrong and failed, in that
    order.
    """
    candidates, wrong, others, failed = _groups(candidates, max_videos)
    num_wrong, num_failed = min(len(wrong), max_videos // 2), min(len(failed), max_videos // 6)
    num_others = min(len(others), max_videos - num_wrong - num_failed)
    num_wrong = min(len(wrong), max_videos - num_failed - num_others)
    num_failed = min(len(failed), max_videos - num_wrong - num_others)
    return _take(candidates, wrong[:num_wrong], others[:num_others], failed[:num_failed])


def best_candidates(candidates: pa.Table, max_videos: int) -> pa.Table:
    """Return the up to 3 x `max_videos` candidates that `choose_shown` may still take.

    More rows can only move a candidate back in its group, so one dropped here would never be taken.
    """
    return _take(*_groups(candidates, max_videos))


def _take(candidates: pa.Table, *groups: np.ndarray) -> pa.Table:
    return candidates.take(pa.array(np.concatenate(groups)))


def _groups(
    candidates: pa.Table, limit: int
) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray]:
    """Return the candidates by video_id, and the first `limit` wrong, other and failed rows."""
    candidates = candidates.sort_by("video_id").combine_chunks()
    verdict, score = candidates["verdict"].to_numpy(), candidates["top_score"].to_numpy()
    wrong = np.flatnonzero(verdict == WRONG)
    wrong = wrong[np.argsort(-score[wrong], kind="stable")]
    others = _round_robin(
        candidates["key"], np.flatnonzero((verdict == RIGHT) | (verdict == UNLABELLED))
    )
    failed = _round_robin(candidates["key"], np.flatnonzero(verdict == FAILED))
    return candidates, wrong[:limit], others[:limit], failed[:limit]


def _round_robin(keys: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """Order rows round-robin over their keys.

    Within a key they are ordered by video_id, a hash, so that no folder or date is preferred.
    """
    encoded = pc.rank(keys.take(pa.array(rows)), tiebreaker="dense").to_numpy().astype(np.int64)
    by_key = np.argsort(encoded, kind="stable")
    start_of_key = np.searchsorted(encoded[by_key], encoded[by_key])
    turn = np.empty(len(rows), np.int64)
    turn[by_key] = np.arange(len(rows)) - start_of_key
    return rows[np.lexsort((encoded, turn))]
