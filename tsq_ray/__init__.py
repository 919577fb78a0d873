"""Label very large video archives cheaply (TSQNet on Ray): the public API.

Importing the package sets OMP_WAIT_POLICY and loads neither torch nor ray; each name is loaded on
first use. docs/api.md describes them.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from tsq_ray import errors as errors

if TYPE_CHECKING:
    from tsq_ray.bundle.overrides import scoring_config
    from tsq_ray.config import Config, load_config
    from tsq_ray.evaluation.custom import measure_samplers
    from tsq_ray.evaluation.measures import Measures
    from tsq_ray.evaluation.run import evaluate, evaluation_config
    from tsq_ray.extraction import extract
    from tsq_ray.importing import import_config, import_network
    from tsq_ray.labelling import label
    from tsq_ray.manifest.build import build_manifest
    from tsq_ray.model.choosers import Candidates, Chooser, View
    from tsq_ray.prediction import predict
    from tsq_ray.reporting.export import export_predictions
    from tsq_ray.reporting.html import build_report
    from tsq_ray.results import (
        Counts,
        EvaluatedTable,
        EvaluationSummary,
        ExportSummary,
        FinetuneSummary,
        ImportSummary,
        IndexSummary,
        LabelSummary,
        Prediction,
        ReportSummary,
        RunSummary,
        TrainingSummary,
        Verification,
    )
    from tsq_ray.runs.tables import read_features, read_predictions
    from tsq_ray.runs.verify import verify
    from tsq_ray.runtime.session import Session
    from tsq_ray.scoring import score
    from tsq_ray.training.classifier.finetune import finetune
    from tsq_ray.training.sampler.tsqnet import train, training_config

# Threads of a network that wait for each other would otherwise spin for some milliseconds in each
# layer, on cores that other processes want (jobs/benchmarks/busy.py has figures). The
# OpenMP library reads this once, when torch is loaded, so it is set here, in the module that
# commands, Ray's workers and replicas all import first. A value set by the user is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

__all__ = [
    "Candidates",
    "Chooser",
    "Config",
    "Counts",
    "EvaluatedTable",
    "EvaluationSummary",
    "ExportSummary",
    "FinetuneSummary",
    "ImportSummary",
    "IndexSummary",
    "LabelSummary",
    "Measures",
    "Prediction",
    "ReportSummary",
    "RunSummary",
    "Session",
    "TrainingSummary",
    "Verification",
    "View",
    "build_manifest",
    "build_report",
    "evaluate",
    "evaluation_config",
    "export_predictions",
    "extract",
    "finetune",
    "import_config",
    "import_network",
    "label",
    "load_config",
    "measure_samplers",
    "predict",
    "read_features",
    "read_predictions",
    "score",
    "scoring_config",
    "train",
    "training_config",
    "verify",
]

_HOMES = {
    "Candidates": "model.choosers",
    "Chooser": "model.choosers",
    "Config": "config",
    "Measures": "evaluation.measures",
    "Session": "runtime.session",
    "View": "model.choosers",
    "build_manifest": "manifest.build",
    "build_report": "reporting.html",
    "evaluate": "evaluation.run",
    "evaluation_config": "evaluation.run",
    "export_predictions": "reporting.export",
    "extract": "extraction",
    "finetune": "training.classifier.finetune",
    "import_config": "importing",
    "import_network": "importing",
    "label": "labelling",
    "load_config": "config",
    "measure_samplers": "evaluation.custom",
    "predict": "prediction",
    "read_features": "runs.tables",
    "read_predictions": "runs.tables",
    "score": "scoring",
    "scoring_config": "bundle.overrides",
    "train": "training.sampler.tsqnet",
    "training_config": "training.sampler.tsqnet",
    "verify": "runs.verify",
}
"""The module of each public name; the others are in `results`."""


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'results')}")
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
