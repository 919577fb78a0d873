"""The sampler: TSQNet, its loss, the choice of frames, the baselines. `flops` counts what they cost."""

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
