"""The samplers of the catalogue on a bench: their trainings, choices and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tsq_ray.config import TSQMode
from tsq_ray.evaluation.bench import Bench
from tsq_ray.evaluation.catalogue import METHODS, Method
from tsq_ray.evaluation.measures import Cost, MeanOverSeeds, Measures, gflops, measure_sampler
from tsq_ray.evaluation.samplers import (
    Sampler,
    change_scores,
    confidence,
    frame_head_logits,
    oracle_scores,
)
from tsq_ray.evaluation.selectors import BY_FEATURES, Selected, focus_looks
from tsq_ray.evaluation.trainings import TrainingSpec, saliencies
from tsq_ray.model import TSQShape
from tsq_ray.model.choosers import (
    Chooser,
    Dense,
    MostConfident,
    Random,
    Ranked,
    Uniform,
    salient_for,
)
from tsq_ray.model.flops import Counting
from tsq_ray.model.selection import fused


@dataclass(frozen=True)
class Measured:
    """One sampler at one budget, over its seeds."""

    method: Method
    budget: int
    map: MeanOverSeeds
    map_interpolated: MeanOverSeeds
    top1: MeanOverSeeds
    recall: MeanOverSeeds
    frames: MeanOverSeeds
    agreement: MeanOverSeeds
    agreement_map: MeanOverSeeds
    diverged: int = 0
    """Number of seeds whose training diverged; they are excluded from the other fields."""

    @classmethod
    def of(
        cls, method: Method, budget: int, by_seed: list[Measures], diverged: int = 0
    ) -> Measured:
        """Combine the measures of each seed."""

        def figure(name: str) -> MeanOverSeeds:
            return MeanOverSeeds(tuple(getattr(measures, name) for measures in by_seed))

        return cls(
            method,
            budget,
            figure("map"),
            figure("map_interpolated"),
            figure("top1"),
            figure("recall"),
            figure("frames"),
            figure("agreement"),
            figure("agreement_map"),
            diverged,
        )


def measurable(
    bench: Bench, catalogue: Sequence[Method] = METHODS
) -> tuple[list[Method], list[str]]:
    """Return the samplers that can be measured, and a note on each group that cannot."""
    methods, notes = list(catalogue), []
    if bench.features.training is None:
        trained = [method.name for method in methods if method.trained]
        methods = [method for method in methods if not method.trained]
        notes.append(
            f"not measured, because the features have no split 'train': {', '.join(trained)}"
        )
    if bench.task == "multi" and any(method.adaptive for method in methods):
        methods = [method for method in methods if not method.adaptive]
        notes.append("not measured for several labels per video: adaptive")
    return methods, notes


def specs_of(bench: Bench, method: Method) -> list[TrainingSpec]:
    """Return the trainings that a sampler needs, one per seed."""
    if method.name == "scsampler":
        return [bench.scsampler(seed) for seed in bench.seeds]
    if method.train is not None:
        return [bench.spec(method.train, {}, seed) for seed in bench.seeds]
    return []


def samplers_of(bench: Bench, method: Method) -> tuple[list[Sampler], int]:
    """Return one sampler per seed, and the number of seeds whose training diverged."""
    videos, task = bench.videos, bench.task
    if method.trained:
        trainings = [bench.learned[spec] for spec in specs_of(bench, method)]
        samplers = [
            selecting_sampler(bench, method, fused_saliency(bench, learned.arrays))
            if method.selector
            else learned_sampler(bench, learned.arrays, method.mode, adaptive=method.adaptive)
            for learned in trainings
            if not learned.diverged
        ]
        return samplers, sum(bool(learned.diverged) for learned in trainings)
    if method.selector:
        scores = _scores(bench, method.score) if method.score else None
        return [selecting_sampler(bench, method, scores)], 0
    if method.name == "random":
        return [Sampler(videos, task, partial(Random, seed=seed)) for seed in bench.seeds], 0
    if method.name == "uniform":
        return [Sampler(videos, task, Uniform)], 0
    if method.name == "dense":
        return [Sampler(videos, task, lambda _: Dense())], 0
    if method.name == "bundle":
        visual, textual = saliencies(
            bench.bundle.sampler,
            bundle_arrays(bench),
            bench.bundle.vocabulary,
            task,
            bench.config.sampler.top_classes,
        )
        chooser, features = salient_chooser(bench, "both"), videos.visual
        return [Sampler(videos, task, chooser, visual, textual, features=features)], 0
    if method.name == "maxconf":
        return [Sampler(videos, task, MostConfident)], 0
    return [ranked_sampler(bench, _scores(bench, method.name), method.name)], 0


def ranked_sampler(bench: Bench, scores: np.ndarray, name: str) -> Sampler:
    """Return a sampler that takes the frames with the highest scores, [V, T]."""
    return Sampler(bench.videos, bench.task, partial(Ranked, name=name), scores=scores)


def selecting_sampler(bench: Bench, method: Method, scores: np.ndarray | None) -> Sampler:
    """Return a sampler that takes the frames of the method's selector; scores are [V, T]."""
    videos, chooser = bench.videos, partial(Selected, name=method.selector)
    return Sampler(videos, bench.task, chooser, scores=scores, features=videos.visual)


def fused_saliency(bench: Bench, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return one saliency per frame, [V, T]: lambda_v visual + (1 - lambda_v) textual."""
    visual, textual = arrays["saliency_visual"], arrays.get("saliency_textual")
    return fused(visual, textual, bench.config.sampler.lambda_visual)


def salient_chooser(
    bench: Bench, mode: TSQMode, *, adaptive: bool = False
) -> Callable[[int], Chooser]:
    """Return a function from budget to TSQNet's chooser, with the evaluation's settings."""
    return partial(salient_for, bench.config.sampler, mode, adaptive=adaptive)


def learned_sampler(
    bench: Bench, arrays: Mapping[str, np.ndarray], mode: TSQMode, *, adaptive: bool = False
) -> Sampler:
    """Return a sampler that uses the saliencies of a training."""
    visual, textual = arrays["saliency_visual"], arrays.get("saliency_textual")
    chooser = salient_chooser(bench, mode, adaptive=adaptive)
    return Sampler(bench.videos, bench.task, chooser, visual, textual, features=bench.videos.visual)


def bundle_arrays(bench: Bench) -> dict[str, np.ndarray]:
    """Return the inputs of the bundle's own network."""
    videos = bench.videos
    return {
        "visual": videos.visual,
        "object_ids": videos.object_ids,
        "object_probs": videos.object_probs,
    }


def _scores(bench: Bench, name: str) -> np.ndarray:
    videos = bench.videos
    if name == "maxconf-l":
        assert bench.bundle.encoder.head is not None
        return confidence(frame_head_logits(bench.bundle.encoder.head, videos), bench.task)
    if name == "maxconf":
        return confidence(videos.logits, bench.task)
    if name in ("stillness", "motion"):
        return change_scores(videos) * (1 if name == "motion" else -1)
    assert name == "oracle", name
    known = bench.annotations
    return oracle_scores(
        videos, bench.task, [known.of(uri) for uri in videos.uris] if known is not None else None
    )


def measure_at_budgets(bench: Bench, method: Method, budgets: tuple[int, ...]) -> list[Measured]:
    """Measure a sampler at each budget; `dense` once, at T. Empty if every seed diverged."""
    samplers, diverged = samplers_of(bench, method)
    if not samplers:
        return []
    if method.name == "dense":
        budgets = (bench.videos.num_frames,)
    return [
        Measured.of(
            method,
            budget,
            [
                measure_sampler(
                    *(bench.videos, sampler, budget, bench.task, bench.annotations),
                    bench.config.train.teacher_frames,
                )
                for sampler in samplers
            ],
            diverged,
        )
        for budget in budgets
    ]


def cost_of(bench: Bench, method: Method, budget: float, counting: Counting) -> float | None:
    """Return GFLOPs per video with `budget` frames recognised on average; None for the oracle."""
    if method.cost is None:
        return None
    cost: Cost = method.cost
    if method.name == "bundle" and bench.bundle.sampler.shape.modules == "visual":
        cost = "visual"

    def gflops_of(cost: Cost, num_frames: int) -> float:
        return gflops(bench.bundle, cost, num_frames, budget, shape_of(bench, method), counting)

    num_frames = bench.videos.num_frames
    if method.selector == "focus" and method.score != "tsqnet":  # TSQNet's score needs all frames
        return gflops_of(cost, focus_looks(num_frames, math.ceil(budget)))
    encoding = 0.0
    if method.selector in BY_FEATURES and cost == "maxconf":
        encoding = gflops_of("maxconf-l", num_frames) - gflops_of("uniform", num_frames)
    return gflops_of(cost, num_frames) + encoding


def shape_of(bench: Bench, method: Method) -> TSQShape:
    """Return the shape of the sampler network; the bundle's own if nothing is trained."""
    own = bench.bundle.sampler.shape
    if method.train is None:
        return own
    return bench.shape(bench.spec(method.train, {}, bench.seeds[0]).config, text_dim_of(bench))


def text_dim_of(bench: Bench) -> int:
    """Return Dt; for a VQM-only bundle, which has no text, the Dt of the evaluation's trainings."""
    own = bench.bundle.sampler.shape
    if own.modules == "both":
        return own.text_dim
    dims = (
        learned.arrays["textual_after"].shape[1]
        for learned in bench.learned.values()
        if "textual_after" in learned.arrays
    )
    return next(dims, own.text_dim)
