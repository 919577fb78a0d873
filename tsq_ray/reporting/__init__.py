"""Predictions as an HTML page (`build_report`), or for other programs (`export_predictions`)."""

from __future__ import annotations

from tsq_ray.reporting.export import export_predictions
from tsq_ray.reporting.html import build_report

__all__ = ["build_report", "export_predictions"]
