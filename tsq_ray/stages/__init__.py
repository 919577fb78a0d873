"""Decode, encode, sample and recognise as plain callables on batches, without Ray.

Ray Data and Ray Serve wrap them.
"""

from __future__ import annotations

from tsq_ray.stages.encode import Decode, Encode, FrameFeatures, bundle_specs, pictures_of
from tsq_ray.stages.recognize import Recognize, question_of, recognizer_for
from tsq_ray.stages.sample import Sample, Sampled, check_sampler

__all__ = [
    "Decode",
    "Encode",
    "FrameFeatures",
    "Recognize",
    "Sample",
    "Sampled",
    "bundle_specs",
    "check_sampler",
    "pictures_of",
    "question_of",
    "recognizer_for",
]
