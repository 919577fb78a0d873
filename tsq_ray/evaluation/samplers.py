"""Samplers that choose slots from stored arrays instead of videos.

Shapes: V videos, T frames (slots), D dims, C classes, K budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tsq_ray.config import Task
from tsq_ray.evaluation.annotations import Segment
from tsq_ray.evaluation.videos import VideoSet
from tsq_ray.model.choosers import Chooser, View, choose
from tsq_ray.model.task import probabilities


@dataclass(frozen=True)
class Sampler:
    """A chooser for each budget, with the videos on which it is measured."""

    videos: VideoSet
    task: Task
    chooser: Callable[[int], Chooser]
    visual: np.ndarray | None = None
    """Saliency of the visual query module, float [V, T]."""
    textual: np.ndarray | None = None
    """Saliency of the textual query module, float [V, T]."""
    scores: np.ndarray | None = None
    """Scores that `model.choosers.Ranked` ranks by, float [V, T]."""
    features: np.ndarray | None = None
    """Features of the light encoder, float [V, T, D]."""

    def choose(self, video: int, budget: int) -> np.ndarray:
        """Return the slots chosen from a video, ascending, int [<= K].

        They hold at most `budget` distinct source frames.
        """

        def of_video(values: np.ndarray | None) -> np.ndarray | None:
            return values[video] if values is not None else None

        videos = self.videos
        view = View(
            videos.frame_index[video],
            videos.video_ids[video],
            of_video(self.visual),
            of_video(self.textual),
            of_video(self.scores),
            of_video(self.features),
        )
        return choose(
            self.chooser(budget), view, frame_probabilities(videos.logits[video], self.task)
        )


def frame_probabilities(logits: np.ndarray, task: Task) -> np.ndarray:
    """Return the float32 softmax (sigmoid for multi-label) of logits, float [..., C]."""
    return probabilities(torch.from_numpy(np.asarray(logits, np.float32)), task).numpy()


def confidence(logits: np.ndarray, task: Task) -> np.ndarray:
    """Return the probability of each frame's best class: [V, T, C] -> [V, T].

    With the recogniser's logits, this is the score of MaxConf.
    """
    return frame_probabilities(logits, task).max(axis=-1)


@torch.inference_mode()
def frame_head_logits(head: nn.Module, videos: VideoSet) -> np.ndarray:
    """Return the logits of the light encoder's frame head, float32 [V, T, C].

    Their `confidence` is the score of MaxConf-L.
    """
    return np.stack(
        [head(torch.from_numpy(video.astype(np.float32))).numpy() for video in videos.visual]
    )


def true_class_probability(videos: VideoSet, task: Task) -> np.ndarray:
    """Return the recogniser's probability of the video's label on each frame: [V, T].

    If a video has several labels, it is the mean over them.
    """
    probs = frame_probabilities(videos.logits, task)
    weights = videos.targets / videos.targets.sum(axis=1, keepdims=True)
    return np.einsum("vtc,vc->vt", probs, weights.astype(np.float32))


def oracle_scores(
    videos: VideoSet, task: Task, segments: Sequence[Sequence[Segment]] | None
) -> np.ndarray:
    """Return the scores of an oracle restricted to the T candidates, [V, T].

    Frames in an annotated salient segment rank before all others. Within both groups, or if no
    segments are given, frames rank by the recogniser's probability of the true class.
    """
    scores = true_class_probability(videos, task)
    if segments is None:
        return scores
    inside = np.stack(
        [
            np.any([(start <= pts) & (pts <= end) for start, end in known], axis=0)
            if known
            else np.zeros(len(pts), bool)
            for pts, known in zip(videos.frame_pts_s, segments, strict=True)
        ]
    )
    return scores + inside  # scores are at most 1, so frames inside rank first


def change_scores(videos: VideoSet) -> np.ndarray:
    """Return how much each frame differs from its neighbours, [V, T].

    It is 1 - cosine of the visual features, averaged over the neighbours. "motion" ranks by this
    score, "stillness" by its negative.
    """
    changes = np.zeros(videos.frame_index.shape, np.float32)
    for row, video in enumerate(videos.visual):
        if len(video) == 1:
            continue
        features = video.astype(np.float32)
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        steps = 1 - (features[1:] * features[:-1]).sum(axis=1)
        before, after = np.r_[steps[:1], steps], np.r_[steps, steps[-1:]]
        changes[row] = (before + after) / 2
    return changes
