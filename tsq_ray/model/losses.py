"""TSQNet's loss, a sum of four parts (paper, equation 4). Shapes: B videos, C classes."""

from __future__ import annotations

from torch import Tensor

from tsq_ray.config import Task
from tsq_ray.model.task import classification_loss
from tsq_ray.model.tsq import TSQOutput


def tsq_loss(
    output: TSQOutput, targets: Tensor, task: Task, alpha: float, beta: float
) -> dict[str, Tensor]:
    """Return L = L_v + L_t + alpha L_t->v + beta L_v->t, a mean over the videos (equation 4).

    Args:
        output: output of TSQNet. Only training mode with a TQM gives all four parts; missing parts
            are left out.
        targets: multi-hot [B, C], each row with at least one 1.
        task: see `classification_loss`.
        alpha: weight of L_t->v.
        beta: weight of L_v->t.

    Returns:
        Scalars: "loss", and those of "visual", "textual", "t2v", "v2t" that exist, unweighted.
    """
    weighted = (
        ("visual", output.logits_visual, 1.0),
        ("textual", output.logits_textual, 1.0),
        ("t2v", output.logits_t2v, alpha),
        ("v2t", output.logits_v2t, beta),
    )
    total, parts = targets.new_zeros(()), {}
    for name, logits, weight in weighted:
        if logits is not None:
            parts[name] = classification_loss(logits, targets, task)
            total = total + weight * parts[name]
    return {"loss": total, **parts}
