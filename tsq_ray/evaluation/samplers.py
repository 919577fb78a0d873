"""Samplers behind one interface, on arrays instead of videos: which slots does each take for a budget?

Legend: V videos, T frames (slots), D dims, C classes, K budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from tsq_ray.config import Task, TSQMode
from tsq_ray.evaluation.annotations import Segment
from tsq_ray.evaluation.videos import VideoSet
from tsq_ray.model import baselines, by_importance, frames_until_sure, select_frames
from tsq_ray.model.selection import distinct_slots, in_time_order, ranked
from tsq_ray.model.task import probabilities


class Sampler(Protocol):
    """Bound to the videos of one VideoSet."""

    def choose(self, video: int, budget: int) -> np.ndarray:
        """Slots of at most `budget` distinct source frames of the video of that number: int [<= K], ascending."""
        ...


class Uniform:
    """The uniform baseline (`model.baselines.uniform`)."""

    def __init__(self, videos: VideoSet) -> None:
        self.videos = videos

    def choose(self, video: int, budget: int) -> np.ndarray:
        """As Sampler."""
        return baselines.uniform(self.videos.frame_index[video], budget).slots


class Random:
    """The random baseline; a video's frames hang on (seed, video_id) alone."""

    def __init__(self, videos: VideoSet, seed: int) -> None:
        self.videos, self.seed = videos, seed

    def choose(self, video: int, budget: int) -> np.ndarray:
        """As Sampler."""
        return baselines.random(
            self.videos.frame_index[video], budget, self.seed, self.videos.video_ids[video]
        ).slots


class Dense:
    """Every source frame among the T, whatever the budget."""

    def __init__(self, videos: VideoSet) -> None:
        self.videos = videos

    def choose(self, video: int, budget: int) -> np.ndarray:
        """As Sampler, but for the budget."""
        return distinct_slots(self.videos.frame_index[video])


class Ranked:
    """The K source frames with the highest score; ties by slot. What samplers without classes come to."""

    def __init__(self, videos: VideoSet, scores: np.ndarray) -> None:
        assert scores.shape == videos.frame_index.shape, (
            f"scores {scores.shape}, slots {videos.frame_index.shape}"
        )
        self.orders = [
            ranked(row, distinct_slots(index))
            for row, index in zip(scores, videos.frame_index, strict=True)
        ]

    def choose(self, video: int, budget: int) -> np.ndarray:
        """As Sampler."""
        return in_time_order(dict.fromkeys(self.orders[video][:budget], "")).slots


class Query:
    """TSQNet's saliencies [V, T] of both modules, fused (`model.select_frames`)."""

    def __init__(
        self,
        videos: VideoSet,
        visual: np.ndarray,
        textual: np.ndarray | None,
        lambda_visual: float,
        mode: TSQMode = "both",
    ) -> None:
        self.videos, self.visual, self.textual = videos, visual, textual
        self.lambda_visual, self.mode = lambda_visual, mode

    def choose(self, video: int, budget: int) -> np.ndarray:
        """As Sampler."""
        textual = self.textual[video] if self.textual is not None else None
        index = self.videos.frame_index[video]
        return select_frames(
            self.visual[video], textual, index, budget, self.lambda_visual, self.mode
        ).slots


class UntilSure:
    """TSQNet's frames in the order of their saliency until the recogniser is sure (`sampler.budget = "adaptive"`)."""

    def __init__(self, query: Query, margin: float, task: Task) -> None:
        self.query, self.margin, self.task = query, margin, task

    def choose(self, video: int, budget: int) -> np.ndarray:
        """As Sampler; `budget` is the most."""
        order = by_importance(lambda smaller: self.query.choose(video, smaller), budget)
        return np.sort(
            order[
                : frames_until_sure(
                    frame_probabilities(self.query.videos.logits[video][order], self.task),
                    self.margin,
                )
            ]
        )


def frame_probabilities(logits: np.ndarray, task: Task) -> np.ndarray:
    """float [..., C] logits -> float32 probabilities, softmax or (multi-label) sigmoid."""
    return probabilities(torch.from_numpy(np.asarray(logits, np.float32)), task).numpy()


def confidence(logits: np.ndarray, task: Task) -> np.ndarray:
    """Probability of the best class of each frame: [V, T, C] -> [V, T]. MaxConf with the recogniser's logits."""
    return frame_probabilities(logits, task).max(axis=-1)


@torch.inference_mode()
def frame_head_logits(head: nn.Module, videos: VideoSet) -> np.ndarray:
    """Logits of the light encoder's frame head, float32 [V, T, C]: `confidence` of them is MaxConf-L."""
    return np.stack(
        [head(torch.from_numpy(video.astype(np.float32))).numpy() for video in videos.visual]
    )


def true_class_probability(videos: VideoSet, task: Task) -> np.ndarray:
    """The recogniser's probability of the video's labels (their mean where there are several) on each frame: [V, T]."""
    found = frame_probabilities(videos.logits, task)
    weights = videos.targets / videos.targets.sum(axis=1, keepdims=True)
    return np.einsum("vtc,vc->vt", found, weights.astype(np.float32))


def oracle_scores(
    videos: VideoSet, task: Task, segments: Sequence[Sequence[Segment]] | None
) -> np.ndarray:
    """What an oracle restricted to the T candidates ranks by, [V, T].

    Frames in a known salient segment come before all others; among them, and where no segments are given, the recogniser's probability of
    the true class decides.
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
    return scores + inside  # a probability is at most 1


def change_scores(videos: VideoSet) -> np.ndarray:
    """How much the picture moves at each frame, [V, T]: the mean over its neighbours of 1 - cosine of the visual features.

    The frames that change least rank first by its negative ("stillness"), those that change most by itself ("motion").
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
