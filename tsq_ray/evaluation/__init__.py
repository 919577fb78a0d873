"""The paper's tables on your own data: samplers x budgets, ablations, cost."""

from __future__ import annotations

from tsq_ray.evaluation.annotations import Annotations, on_evidence, read_annotations
from tsq_ray.evaluation.run import evaluate, evaluation_config

__all__ = ["Annotations", "evaluate", "evaluation_config", "on_evidence", "read_annotations"]
