"""How often the chosen frames give the dense recogniser's answer, and at what cost; no labels.

The dense recogniser sees all T frames; its answer comes from those on which it is most confident.
Shapes: V videos, T frames, C classes, K budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tsq_ray.bundle.weights import Bundle
from tsq_ray.config import SamplerConfig, SamplerMode
from tsq_ray.evaluation.measures import SUREST, agreement, answers, dense_answers, gflops
from tsq_ray.evaluation.samplers import Sampler
from tsq_ray.evaluation.trainings import saliencies
from tsq_ray.evaluation.videos import VideoSet
from tsq_ray.model.choosers import chooser_for

_QUANTILE = 1.959964
"""97.5 % quantile of the normal distribution, for a 95 % interval."""


@dataclass(frozen=True)
class Agreement:
    """One sampler at one budget, against the dense recogniser on the same videos."""

    mode: SamplerMode
    """`sampler.mode`."""
    budget: int | Literal["adaptive"]
    """`sampler.budget`."""
    frames: float
    """Mean number of frames recognised."""
    top1: float
    """Share of the videos whose best class is the dense recogniser's."""
    low: float
    """Lower end of the 95 % interval of `top1` (Wilson's score interval)."""
    high: float
    """Its upper end."""
    map: float
    """mAP with the dense recogniser's classes as ground truth."""
    cost: float
    """GFLOPs as they run, relative to the dense recogniser's; behind a server, frames instead."""


def interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share of `count` videos (Wilson 1927).

    Unlike share ± error, it keeps a width at 0 and 1.
    """
    square = _QUANTILE**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return min(share, middle - half), max(share, middle + half)


def measure_agreement(
    bundle: Bundle, videos: VideoSet, config: SamplerConfig, surest: int = SUREST
) -> list[Agreement]:
    """Measure the bundle's sampler at every K < T, uniform frames, and the dense recogniser.

    With one label per video, also the adaptive budget. For a recogniser behind a server, adaptive
    and dense are left out; for a bundle whose sampler was not taught, the sampler. `config`: the
    other settings of the sampler; `surest`: number of frames that the dense recogniser's answer is
    based on.
    """
    task, dense = bundle.task, dense_answers(videos, bundle.task, surest)
    visual, textual = _saliencies(bundle, videos, config)
    mode: SamplerMode = "both" if bundle.sampler.shape.modules == "both" else "visual"

    def measure(mode: SamplerMode, budget: int | Literal["adaptive"]) -> Agreement:
        settings = config.model_copy(update={"mode": mode, "budget": budget})
        sampler = Sampler(
            videos,
            task,
            lambda _: chooser_for(settings),
            visual,
            textual,
            features=videos.visual,
        )
        chosen = [sampler.choose(video, settings.most_frames) for video in range(len(videos))]
        frames = float(np.mean([len(slots) for slots in chosen]))
        return _compare(answers(videos, chosen, task), dense, bundle, settings, frames)

    budgets: Sequence[int] = range(1, videos.num_frames + 1)
    curve = [measure(mode, budget) for budget in budgets[:-1] if bundle.is_taught]
    fits = config.max_budget <= videos.num_frames and bundle.is_taught
    if task == "single" and fits and not _is_server(bundle):
        curve.append(measure(mode, "adaptive"))
    curve += [measure("uniform", budget) for budget in budgets]
    if not _is_server(bundle):
        curve.append(measure("maxconf", min(surest, videos.num_frames)))
    return curve


def _saliencies(
    bundle: Bundle, videos: VideoSet, config: SamplerConfig
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if not bundle.is_taught:
        return None, None
    arrays = {name: getattr(videos, name) for name in ("visual", "object_ids", "object_probs")}
    return saliencies(bundle.sampler, arrays, bundle.vocabulary, bundle.task, config.top_classes)


def _compare(
    scores: np.ndarray, dense: np.ndarray, bundle: Bundle, config: SamplerConfig, frames: float
) -> Agreement:
    share, mean_ap = agreement(scores, dense, bundle.task)
    low, high = interval(share, len(dense))
    budget = frames if config.budget == "adaptive" else config.budget
    return Agreement(
        config.mode,
        config.budget,
        frames,
        share,
        low,
        high,
        mean_ap,
        _relative_cost(bundle, config, budget),
    )


def _is_server(bundle: Bundle) -> bool:
    assert bundle.recognizer is not None
    return bundle.recognizer.config.kind == "openai"


def _relative_cost(bundle: Bundle, config: SamplerConfig, budget: float) -> float:
    shape, num_frames = bundle.sampler.shape, bundle.decode.num_frames
    if _is_server(bundle):
        return budget / num_frames
    assert config.mode != "random"
    cost = gflops(bundle, config.mode, num_frames, budget, shape, "true")
    return cost / gflops(bundle, "uniform", num_frames, num_frames, shape, "true")


def cheapest(curve: Sequence[Agreement], target: float) -> Agreement:
    """Return the cheapest choice whose agreement reaches `target`; if none does, the best."""
    best = max(choice.top1 for choice in curve)
    sufficient = (choice for choice in curve if choice.top1 >= min(target, best))
    return min(sufficient, key=lambda choice: choice.cost)
