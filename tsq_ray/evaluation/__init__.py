"""The paper's tables on our data: samplers x budgets, ablations, cost."""

from __future__ import annotations

from tsq_ray.evaluation.annotations import Annotations, on_evidence, read_annotations
from tsq_ray.evaluation.run import evaluate, settings_for

__all__ = ["Annotations", "evaluate", "on_evidence", "read_annotations", "settings_for"]
