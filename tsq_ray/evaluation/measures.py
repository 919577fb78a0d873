"""Quality and cost of a choice of frames.

Shapes: V videos, T frames, C classes, K budget.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tsq_ray import quality
from tsq_ray.bundle.weights import Bundle
from tsq_ray.config import SamplerMode, Task, TrainConfig
from tsq_ray.evaluation.annotations import Annotations, on_evidence
from tsq_ray.evaluation.samplers import Sampler, frame_probabilities
from tsq_ray.evaluation.trainings import SCSAMPLER_HIDDEN
from tsq_ray.evaluation.videos import VideoSet
from tsq_ray.model import TSQShape
from tsq_ray.model.choosers import MostConfident
from tsq_ray.model.flops import Counting, cost_table, network_multiply_adds
from tsq_ray.training.teacher import shown_classes

SUREST = TrainConfig().teacher_frames
"""Default number of frames that the dense recogniser's answer is based on."""
Cost = Literal["uniform", "maxconf", "maxconf-l", "visual", "textual", "both", "scsampler"]
"""As `sampler.mode`, plus "scsampler": light encoder on T frames, ranker, recogniser on K."""


@dataclass(frozen=True)
class MeanOverSeeds:
    """One quantity, measured once or once per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def half(self) -> float | None:
        """Half the 95 % interval of the mean (Student's t); None for a single value."""
        count = len(self.values)
        if count < 2:
            return None
        from scipy.stats import t as student_t

        return float(
            student_t.ppf(0.975, count - 1) * np.std(self.values, ddof=1) / math.sqrt(count)
        )

    def minus(self, other: MeanOverSeeds) -> MeanOverSeeds:
        """Return the difference `self - other`.

        It is taken seed by seed if both have the same number of values, with each value if one side
        has a single one, else between the means.
        """
        if len(self.values) == len(other.values):
            return MeanOverSeeds(
                tuple(a - b for a, b in zip(self.values, other.values, strict=True))
            )
        if len(other.values) == 1:
            return MeanOverSeeds(tuple(value - other.values[0] for value in self.values))
        if len(self.values) == 1:
            return MeanOverSeeds(tuple(self.values[0] - value for value in other.values))
        return MeanOverSeeds((self.mean - other.mean,))


@dataclass(frozen=True)
class Measures:
    """Results of one sampler, budget and seed; fractions 0..1, nan if unknown."""

    map: float
    """Mean average precision over the classes."""
    map_interpolated: float
    """The same with interpolated precision, as in ActivityNet's evaluation."""
    top1: float
    """Share of the videos whose best class is one of their labels."""
    recall: float
    """Mean share of the chosen frames that lie in a known salient segment."""
    frames: float
    """Mean number of frames that the recogniser sees."""
    agreement: float
    """Share of the videos whose best class is that of the dense recogniser (`dense_answers`)."""
    agreement_map: float
    """mAP with the dense recogniser's classes as ground truth."""


def answers(videos: VideoSet, chosen: Sequence[np.ndarray], task: Task) -> np.ndarray:
    """Return scores as `tsq score` does, float32 [V, C]: softmax or sigmoid of mean slot logits."""
    means = [
        logits[slots].astype(np.float32).mean(axis=0)
        for logits, slots in zip(videos.logits, chosen, strict=True)
    ]
    return frame_probabilities(np.stack(means), task)


@functools.lru_cache(maxsize=4)
def dense_answers(videos: VideoSet, task: Task, surest: int = SUREST) -> np.ndarray:
    """Return the recogniser's answers after seeing every frame, float32 [V, C].

    Only the `surest` most confident frames count, as for a teacher (`sampler.mode = "maxconf"`):
    where few frames show the class, the mean over all of them says little.
    """
    sampler = Sampler(videos, task, MostConfident)
    chosen = [sampler.choose(video, surest) for video in range(len(videos))]
    return answers(videos, chosen, task)


def agreement(scores: np.ndarray, dense: np.ndarray, task: Task) -> tuple[float, float]:
    """Return `Measures.agreement` and `agreement_map` of scores [V, C] with those in `dense`."""
    targets = np.zeros(dense.shape, bool)
    for video, classes in enumerate(shown_classes(dense, task)):
        targets[video, classes] = True
    return (
        float((scores.argmax(1) == dense.argmax(1)).mean()),
        quality.mean_average_precision(scores, targets),
    )


def measure_sampler(
    videos: VideoSet,
    sampler: Sampler,
    budget: int,
    task: Task,
    annotations: Annotations | None,
    surest: int = SUREST,
) -> Measures:
    """Choose at most `budget` frames of each video and measure the recogniser's answers.

    `surest`: number of frames that the dense recogniser's answer is based on.
    """
    chosen = [sampler.choose(video, budget) for video in range(len(videos))]
    scores = answers(videos, chosen, task)
    recall = math.nan
    if annotations is not None:
        pts = [
            times[slots].tolist() for times, slots in zip(videos.frame_pts_s, chosen, strict=True)
        ]
        recall = on_evidence(zip(videos.uris, pts, strict=True), annotations)
    return Measures(
        quality.mean_average_precision(scores, videos.targets),
        quality.mean_average_precision(scores, videos.targets, interpolated=True),
        quality.top1_accuracy(scores, videos.targets),
        recall,
        float(np.mean([len(slots) for slots in chosen])),
        *agreement(scores, dense_answers(videos, task, surest), task),
    )


def gflops(
    bundle: Bundle, cost: Cost, num_frames: int, budget: float, shape: TSQShape, counting: Counting
) -> float:
    """Return GFLOPs (1e9 multiply-adds) per video.

    Uses the bundle's networks and a sampler network of `shape`; `budget` may be a mean.
    """
    assert bundle.recognizer is not None
    mode: SamplerMode = "maxconf-l" if cost == "scsampler" else cost
    table = cost_table(
        mode,
        num_frames=num_frames,
        budget=budget,
        recognizer=bundle.recognizer.config,
        visual=bundle.encoders.visual,
        objects=bundle.encoders.objects,
        shape=shape,
        counting=counting,
    )
    ranker = (
        num_frames * SCSAMPLER_HIDDEN * (bundle.encoder.dim + 1) / 1e9
        if cost == "scsampler"
        else 0.0
    )
    return table.gflops + ranker


class Clock:
    """Estimated seconds of work per video, from the extraction's timings on its machine.

    The decoding time of T frames is used as measured. The encoding time, during which every frame
    passed through the light encoder, the object recogniser and the recogniser, is apportioned by
    true multiply-adds.
    """

    def __init__(self, run: Mapping[str, Any], bundle: Bundle, num_frames: int) -> None:
        seconds, videos = run.get("stage_seconds") or {}, run.get("videos_done_now") or 0
        self.known = bool(videos and "decode" in seconds and "encode" in seconds)
        assert bundle.recognizer is not None
        # the time that a server takes is unrelated to the multiply-adds here
        self.known = self.known and bundle.recognizer.config.kind != "openai"
        if not self.known:
            return
        networks = (bundle.encoders.visual, bundle.encoders.objects, bundle.recognizer.config)
        gflops_per_frame = sum(network_multiply_adds(net, "true") for net in networks) / 1e9
        self.decode_s = seconds["decode"] / videos
        self.s_per_gflop = seconds["encode"] / videos / (gflops_per_frame * num_frames)

    def seconds(self, true_gflops: float) -> float | None:
        """Return the seconds for a video of this cost; None if the extraction has no timings."""
        return self.decode_s + true_gflops * self.s_per_gflop if self.known else None
