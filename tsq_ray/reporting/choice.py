"""Choose the videos that get a card, from rows that arrive in blocks.

A candidate has `part` and `row` (its place), `video_id`, `verdict` (quality.py), `key` (its best
class or, if it failed, the reason) and `top_score`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray.quality import FAILED, RIGHT, UNLABELLED, WRONG


def choose_shown(found: pa.Table, max_videos: int) -> pa.Table:
    """Return the candidates that get a card, in page order; independent of the order of the rows.

    If not all fit, the wrong ones (most confident first) take up to half of the places and the
    failed ones up to a sixth, cycling through the reasons. The others take the rest, cycling
    through the predicted classes. Places that remain free go to others, wrong and failed, in that
    order.
    """
    found, wrong, others, failed = _groups(found, max_videos)
    num_wrong, num_failed = min(len(wrong), max_videos // 2), min(len(failed), max_videos // 6)
    num_others = min(len(others), max_videos - num_wrong - num_failed)
    num_wrong = min(len(wrong), max_videos - num_failed - num_others)
    num_failed = min(len(failed), max_videos - num_wrong - num_others)
    return _take(found, wrong[:num_wrong], others[:num_others], failed[:num_failed])


def best_candidates(found: pa.Table, max_videos: int) -> pa.Table:
    """Return up to 3 x `max_videos` candidates that `choose_shown` may take, whatever rows follow.

    More rows can only move a candidate back in its group, so one dropped here would never be taken.
    """
    return _take(*_groups(found, max_videos))


def _take(found: pa.Table, *groups: np.ndarray) -> pa.Table:
    return found.take(pa.array(np.concatenate(groups)))


def _groups(found: pa.Table, limit: int) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray]:
    """Return the candidates by video_id, and the first `limit` wrong, other and failed rows."""
    found = found.sort_by("video_id").combine_chunks()
    verdict, score = found["verdict"].to_numpy(), found["top_score"].to_numpy()
    wrong = np.flatnonzero(verdict == WRONG)
    wrong = wrong[np.argsort(-score[wrong], kind="stable")]
    others = _by_turns(found["key"], np.flatnonzero((verdict == RIGHT) | (verdict == UNLABELLED)))
    failed = _by_turns(found["key"], np.flatnonzero(verdict == FAILED))
    return found, wrong[:limit], others[:limit], failed[:limit]


def _by_turns(keys: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """Order rows round-robin over their keys.

    Within a key they go by video_id, a hash, so that no folder or date is preferred.
    """
    encoded = pc.rank(keys.take(pa.array(rows)), tiebreaker="dense").to_numpy().astype(np.int64)
    by_key = np.argsort(encoded, kind="stable")
    start_of_key = np.searchsorted(encoded[by_key], encoded[by_key])
    turn = np.empty(len(rows), np.int64)
    turn[by_key] = np.arange(len(rows)) - start_of_key
    return rows[np.lexsort((encoded, turn))]
