"""Probabilities and loss of logits, by task: one label per video or several.

Shapes: B videos, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tsq_ray.config import Task


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """Turn logits [..., C] into probabilities: softmax for "single", sigmoid for "multi"."""
    return logits.softmax(-1) if task == "single" else logits.sigmoid()


def classification_loss(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Return the classification loss, a scalar mean over the videos.

    Args:
        logits: [B, C].
        targets: [B, C], multi-hot or smoothed, each row with a positive sum.
        task: "single": cross entropy, where several labels share the weight 1; "multi": binary
            cross entropy, summed over the classes. (A mean over the classes would divide the
            gradient of a video's few labels by C, and SGD would learn nothing.)
    """
    targets = targets.to(logits.dtype)
    if task == "multi":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)
    return F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True).clamp(min=1))
