"""What the task, one label a video or several, makes of logits: probabilities and the loss.

Shapes: B videos, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tsq_ray.config import Task


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """Logits [..., C] -> probabilities [..., C]: softmax, or sigmoid for several labels a video."""
    return logits.softmax(-1) if task == "single" else logits.sigmoid()


def classification_loss(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """A mean over the videos; scalar.

    Args:
        logits: [B, C].
        targets: [B, C], multi-hot or smoothed, each row with a positive sum.
        task: "single": cross entropy, several labels sharing the weight 1; "multi": binary cross entropy, summed over the
            classes. (A mean over them divides the gradient of a video's few labels by C: with SGD nothing is learnt.)
    """
    targets = targets.to(logits.dtype)
    if task == "multi":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)
    return F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True).clamp(min=1))
