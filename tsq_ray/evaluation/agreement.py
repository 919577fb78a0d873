"""How often a choice of frames gives the dense recogniser's answer, and at what cost; no labels.

The dense recogniser sees all T frames and answers by the surest of them. Shapes: V videos, T
frames, C classes, K budget.
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
"""Of the normal distribution, for a 95 % interval."""


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
    """mAP with the classes that the dense recogniser finds as the truth."""
    cost: float
    """GFLOPs relative to those of the dense recogniser, counted as they run; frames, if it is
    behind a server."""


def interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share of `count` videos.

    Unlike share ± error, it has a width at 0 and 1 (Wilson 1927).
    """
    square = _QUANTILE**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return min(share, middle - half), max(share, middle + half)


def measure_agreement(
    bundle: Bundle, videos: VideoSet, config: SamplerConfig, surest: int = SUREST
) -> list[Agreement]:
    """Measure the bundle's sampler and uniform frames at every K up to T, then the dense
    recogniser.

    With one label per video, also the adaptive budget. A server is not measured adaptively, nor
    densely. `config`: the other settings of the sampler; `surest`: number of frames that the dense
    recogniser's answer rests on.
    """
    task, dense = bundle.task, dense_answers(videos, bundle.task, surest)
    arrays = {name: getattr(videos, name) for name in ("visual", "object_ids", "object_probs")}
    visual, textual = saliencies(
        bundle.sampler, arrays, bundle.vocabulary, task, config.top_classes
    )
    mode: SamplerMode = "both" if bundle.sampler.shape.modules == "both" else "visual"

    def measured(mode: SamplerMode, budget: int | Literal["adaptive"]) -> Agreement:
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
    found = [measured(mode, budget) for budget in budgets[:-1]]
    if task == "single" and config.max_budget <= videos.num_frames and not _is_server(bundle):
        found.append(measured(mode, "adaptive"))
    found += [measured("uniform", budget) for budget in budgets]
    if not _is_server(bundle):
        found.append(measured("maxconf", min(surest, videos.num_frames)))
    return found


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
    own = gflops(bundle, config.mode, num_frames, budget, shape, "true")
    return own / gflops(bundle, "uniform", num_frames, num_frames, shape, "true")


def cheapest(found: Sequence[Agreement], wanted: float) -> Agreement:
    """Return the cheapest choice whose agreement reaches `wanted`; if none does, the best."""
    best = max(one.top1 for one in found)
    enough = (one for one in found if one.top1 >= min(wanted, best))
    return min(enough, key=lambda one: one.cost)
