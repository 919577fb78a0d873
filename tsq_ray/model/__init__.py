"""The sampler: TSQNet, its loss, frame selection, the baselines and their cost (`flops`)."""

from __future__ import annotations

from tsq_ray.model import baselines
from tsq_ray.model.losses import tsq_loss
from tsq_ray.model.selection import (
    Selection,
    by_importance,
    frames_until_sure,
    saliency,
    select_frames,
)
from tsq_ray.model.tsq import TSQNet, TSQOutput, TSQShape, object_embeddings

__all__ = [
    "Selection",
    "TSQNet",
    "TSQOutput",
    "TSQShape",
    "baselines",
    "by_importance",
    "frames_until_sure",
    "object_embeddings",
    "saliency",
    "select_frames",
    "tsq_loss",
]
