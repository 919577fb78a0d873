"""The frame selectors of 2024 to 2026, on stored features and scores: `tsq evaluate`'s `selectors`.

Written from the papers, which choose frames for video language models by a query; here a score
takes the place of the similarity to the query. Each docstring separates what the paper says from
our reading of it. Every selector takes n distinct source frames in time order and returns the
places of K of them. Shapes: T slots, n frames, D dims, K budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tsq_ray.model.choosers import Candidates, View
from tsq_ray.model.diversity import dpp, greedy_volume, normalized
from tsq_ray.model.selection import distinct_slots, in_time_order

Selector = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(features [n, D], scores [n], K <= n) -> the places of K frames, int [K], in any order."""

_MAXVOL_TOLERANCE = 1.05
_AKS_THRESHOLD, _AKS_DEPTH = 0.8, 5
_CLIPS_PER_FRAME, _FIRST_LOOK, _EXPLORED = 2, 2, 0.25


@dataclass(frozen=True)
class Selected:
    """The chooser of a selector: K distinct source frames, or all if a video has fewer."""

    budget: int
    name: str
    """A key of `SELECTORS`."""

    def candidates(self, view: View) -> Candidates:
        """Return the frames that the selector takes; `view` holds the features and scores."""
        slots = distinct_slots(view.frame_index)
        assert view.features is not None
        features = np.asarray(view.features, np.float64)[slots]
        scores = view.scores if view.scores is not None else np.ones(len(view.frame_index))
        count = min(self.budget, len(slots))
        places = SELECTORS[self.name](features, np.asarray(scores, np.float64)[slots], count)
        chosen = in_time_order({int(slot): self.name for slot in slots[places]})
        return Candidates.all_at_once(chosen)

    def enough(self, candidates: Candidates, probabilities: np.ndarray) -> np.ndarray | None:
        """Return all candidates; the recogniser's answers are ignored."""
        return np.arange(len(candidates.slots))


def top(features: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Take the K highest scores; ties go to the earlier frame."""
    return np.argsort(-scores, kind="stable")[:count]


def stratified(features: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Take the highest score of each of K equal parts of the video: PEEK's stratified argmax.

    K. Steunou et al., PEEK: Picking Essential frames via Efficient Knowledge distillation, 2026,
    arXiv 2605.31029. The paper's: the rule. Its score is a small network distilled from
    caption-frame similarities; any score serves here.
    """
    edges = np.arange(count + 1) * len(scores) // count
    return np.array([a + scores[a:b].argmax() for a, b in itertools.pairwise(edges)])


def aks(
    features: np.ndarray,
    scores: np.ndarray,
    count: int,
    threshold: float = _AKS_THRESHOLD,
    depth: int = _AKS_DEPTH,
) -> np.ndarray:
    """Split the video into halves until the best frames of a part stand out, then take those.

    X. Tang et al., Adaptive Keyframe Sampling for Long Video Understanding, CVPR 2025, arXiv
    2502.21271. The paper's: the recursion; a part takes its top m frames if their mean score
    exceeds the part's mean by `threshold`, or after `depth` splits. `threshold` 0.8 and `depth` 5
    are the values published with the paper's code. Our reading: scores are scaled to 0..1 over the
    video; a part with m = 1 is not split; an odd place goes to the half with the higher mean.
    """
    scaled = _unit_range(scores)

    def split(start: int, stop: int, m: int, level: int) -> list[int]:
        part = scaled[start:stop]
        best = np.argsort(-part, kind="stable")[:m]
        stands_out = m > 0 and part[best].mean() - part.mean() >= threshold
        if m < 2 or level == depth or stands_out:
            return [start + int(place) for place in best]
        middle = (start + stop) // 2
        left_is_higher = scaled[start:middle].mean() >= scaled[middle:stop].mean()
        left = (m + 1) // 2 if left_is_higher else m // 2
        left = min(max(left, m - (stop - middle)), middle - start)
        return [
            *split(start, middle, left, level + 1),
            *split(middle, stop, m - left, level + 1),
        ]

    return np.array(split(0, len(scores), count, 0))


def bolt(features: np.ndarray, scores: np.ndarray, count: int, power: float = 1.0) -> np.ndarray:
    """Take the K quantiles of the scores as a distribution over time: inverse transform sampling.

    S. Liu et al., BOLT: Boost Large Vision-Language Model Without Training for Long-form Video
    Understanding, CVPR 2025, arXiv 2503.21483. The paper's: scores scaled to 0..1, raised to a
    power, summed to a distribution whose inverse is read at K even steps. Our reading: the steps
    are (i + 0.5) / K, so that equal scores give the uniform baseline; the power is 1; a frame that
    several steps hit counts once, and the highest remaining scores fill the free places.
    """
    weights = _unit_range(scores) ** power
    mass = np.cumsum(weights if weights.any() else np.ones(len(scores)))
    steps = (2 * np.arange(count) + 1) * mass[-1] / (2 * count)
    hit = np.minimum(np.searchsorted(mass, steps, side="right"), len(scores) - 1)
    return np.array(list(dict.fromkeys([*hit.tolist(), *top(features, scores, len(scores))])))[
        :count
    ]


def focus(features: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Look at a few frames of each clip, then only at the most promising clips: a bandit.

    Z. Zhu et al., FOCUS: Efficient Keyframe Selection for Long Video Understanding, ICLR 2026,
    arXiv 2510.27280. The paper's: clips are arms and frame scores their rewards; a first round
    looks at every clip, a second at the quarter with the highest optimistic mean (empirical mean
    plus Bernstein's confidence radius), where the best frames are taken. Our reading, for T frames
    instead of a stream: 2 K equal clips, 2 evenly spaced frames each in the first round, all frames
    of the explored clips in the second. At most `focus_looks` of the n scores are ever read, which
    is the saving.
    """
    return focus_by(scores.__getitem__, len(scores), count)


def focus_by(look: Callable[[np.ndarray], np.ndarray], num_frames: int, count: int) -> np.ndarray:
    """Return `focus`'s choice of frames; `look` maps places to their scores."""
    clips = _clips(num_frames, count)
    rewards = [look(clip[_first_look(len(clip))]) for clip in clips]
    total = sum(len(part) for part in rewards)
    spread = max(part.max() for part in rewards) - min(part.min() for part in rewards)
    optimistic = [
        part.mean()
        + math.sqrt(2 * part.var() * math.log(total) / len(part))
        + 3 * spread * math.log(total) / len(part)
        for part in rewards
    ]
    explored = np.argsort(-np.array(optimistic), kind="stable")[: _num_explored(clips, count)]
    places = np.sort(np.concatenate([clips[number] for number in explored]))
    return places[top(places, look(places), count)]


def focus_looks(num_frames: int, count: int) -> int:
    """Return the maximum number of scores that `focus` reads to choose K of `num_frames`."""
    clips = _clips(num_frames, count)
    first_round = [len(_first_look(len(clip))) for clip in clips]
    rest = sorted(
        (len(clip) - looks for clip, looks in zip(clips, first_round, strict=True)), reverse=True
    )
    return sum(first_round) + sum(rest[: _num_explored(clips, count)])


def _clips(num_frames: int, count: int) -> list[np.ndarray]:
    return np.array_split(np.arange(num_frames), min(num_frames, _CLIPS_PER_FRAME * count))


def _first_look(length: int) -> np.ndarray:
    """Return the evenly spaced places of a clip that the first round looks at."""
    looks = min(_FIRST_LOOK, length)
    return (2 * np.arange(looks) + 1) * length // (2 * looks)


def _num_explored(clips: list[np.ndarray], count: int) -> int:
    """Return the number of clips in the second round: a quarter, but enough for K frames."""
    return max(math.ceil(_EXPLORED * len(clips)), math.ceil(count / len(clips[-1])))


def k_center(features: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Take the frame farthest from those taken so far, K times: greedy k-center.

    T. Gonzalez, Clustering to minimize the maximum intercluster distance, 1985: the farthest frame
    is then at most twice as far from a taken one as in the best choice. For video: VKF, Beyond
    Pixels: Embedding-Guided Keyframe Selection for VidLLMs, 2026. The papers': the greedy rule. Our
    reading: Euclidean distance of normalised features, starting with the frame nearest their mean.
    """
    unit = normalized(features)
    taken = [int(np.linalg.norm(unit - unit.mean(axis=0), axis=1).argmin())]
    nearest = np.linalg.norm(unit - unit[taken[0]], axis=1)
    while len(taken) < count:
        nearest[taken] = -1  # below the 0 of a duplicate, so that no frame is taken twice
        taken.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(unit - unit[taken[-1]], axis=1))
    return np.array(taken)


def max_volume(features: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Take the K frames whose features span the largest volume: MaxVol on the feature matrix.

    P. Li et al., MaxInfo: A Training-Free Key-Frame Selection Method Using Maximum Volume for
    Enhanced Video Understanding, 2025, arXiv 2502.03183. The paper's: the left singular vectors of
    the features, truncated, and MaxVol on their rows (S. Goreinov et al., How to find a good
    submatrix, 2010): frames are swapped while a swap raises the volume. Our reading: K singular
    vectors, so that the number of frames is the budget; it starts from the greedy maximum and stops
    when no swap raises the volume by 5 %. If the features have a lower rank, the remaining places
    are filled in time order.
    """
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    rank = min(count, int((values > values[0] * 1e-6).sum()) if values[0] > 0 else 0)
    rows = left[:, :rank]
    taken = greedy_volume(rows @ rows.T, rank)
    while rank:
        shares = np.linalg.solve(rows[taken].T, rows.T).T
        frame, place = np.unravel_index(np.abs(shares).argmax(), shares.shape)
        if abs(shares[frame, place]) <= _MAXVOL_TOLERANCE:
            break
        taken[place] = frame
    rest = np.setdiff1d(np.arange(len(features)), taken)
    return np.concatenate([taken, rest[: count - rank]])


def _unit_range(scores: np.ndarray) -> np.ndarray:
    """Scale scores to 0..1; equal scores become 0."""
    spread = scores.max() - scores.min()
    return (scores - scores.min()) / spread if spread > 0 else np.zeros(len(scores))


SELECTORS: dict[str, Selector] = {
    "top-k": top,
    "stratified": stratified,
    "aks": aks,
    "bolt": bolt,
    "focus": focus,
    "dpp": dpp,
    "k-center": k_center,
    "maxinfo": max_volume,
}
BY_FEATURES = ("dpp", "k-center", "maxinfo")
"""Selectors that use the light encoder's features."""
BY_SCORE = ("stratified", "aks", "bolt", "focus", "dpp")
"""Selectors that use a score."""
