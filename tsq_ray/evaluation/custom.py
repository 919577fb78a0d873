"""Measure a user's own samplers next to the bundle's, on stored features."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tsq_ray.bundle.settings import NOT_TAUGHT
from tsq_ray.bundle.weights import load_bundle
from tsq_ray.errors import ModelError
from tsq_ray.evaluation.measures import Measures, measure_sampler
from tsq_ray.evaluation.samplers import Sampler
from tsq_ray.evaluation.trainings import saliencies
from tsq_ray.evaluation.videos import load_features
from tsq_ray.model.choosers import Chooser, Salient, Uniform


def measure_samplers(
    features_uri: str,
    model: str,
    choosers: Mapping[str, Callable[[int], Chooser]],
    budget: int,
    *,
    split: str | None = None,
) -> dict[str, Measures]:
    """Measure your own samplers next to "uniform" and the bundle's sampler, "tsqnet".

    The recogniser's answers come from the features, so nothing is decoded. Each video's `View`
    holds the bundle's saliencies and the light encoder's features. Raises RunError if the features
    lack labels, the split or the recogniser's answers, ModelError if they were made with weights
    other than the bundle's.

    Args:
        features_uri: folder of `extract` with a recogniser.
        model: the bundle.
        choosers: name of a sampler -> K -> its chooser.
        budget: K, the maximum number of frames that each may choose.
        split: the videos to measure on; by default `val`, or all if no video has a split.
    """
    bundle = load_bundle(model)
    if not bundle.is_taught:
        raise ModelError(NOT_TAUGHT)
    videos, task = load_features(features_uri, bundle, split).measured, bundle.task
    arrays = {name: getattr(videos, name) for name in ("visual", "object_ids", "object_probs")}
    settings = bundle.sampler_defaults
    visual, textual = saliencies(
        bundle.sampler, arrays, bundle.vocabulary, task, settings.top_classes
    )
    known: dict[str, Callable[[int], Chooser]] = {
        "uniform": Uniform,
        "tsqnet": lambda budget: Salient(budget, settings.lambda_visual),
    }
    return {
        name: measure_sampler(
            videos,
            Sampler(videos, task, chooser, visual, textual, features=videos.visual),
            budget,
            task,
            None,
        )
        for name, chooser in {**known, **choosers}.items()
    }
