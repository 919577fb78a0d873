"""Frozen, typed, validated settings.

Imports neither torch nor ray, so that a wrong setting is reported before anything slow starts.
docs/configuration.md is generated from the field docstrings.
"""

from tsq_ray.config.base import Precision, Section
from tsq_ray.config.load import differing, flatten, load_config, validate_config
from tsq_ray.config.method import (
    LEARNED_MODES,
    TSQ_MODES,
    VIDEO_CLASSIFIER,
    DecodeConfig,
    EncodersConfig,
    EvaluateConfig,
    FinetuneConfig,
    HeadConfig,
    ModelConfig,
    SamplerConfig,
    SamplerMode,
    Task,
    TextConfig,
    TrainConfig,
    TSQMode,
)
from tsq_ray.config.recognizer import SERVER_USE, RecognizerConfig
from tsq_ray.config.resources import (
    LabelsConfig,
    NodeType,
    OutputConfig,
    ReplicaConfig,
    ResourcesConfig,
    ScaleConfig,
    ServeConfig,
    label_map,
)
from tsq_ray.config.settings import Config, check_budget, check_top_objects

__all__ = [
    "LEARNED_MODES",
    "SERVER_USE",
    "TSQ_MODES",
    "VIDEO_CLASSIFIER",
    "Config",
    "DecodeConfig",
    "EncodersConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "HeadConfig",
    "LabelsConfig",
    "ModelConfig",
    "NodeType",
    "OutputConfig",
    "Precision",
    "RecognizerConfig",
    "ReplicaConfig",
    "ResourcesConfig",
    "SamplerConfig",
    "SamplerMode",
    "ScaleConfig",
    "Section",
    "ServeConfig",
    "TSQMode",
    "Task",
    "TextConfig",
    "TrainConfig",
    "check_budget",
    "check_top_objects",
    "differing",
    "flatten",
    "label_map",
    "load_config",
    "validate_config",
]
