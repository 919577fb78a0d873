"""All settings of a run, and what holds between its sections."""

from __future__ import annotations

from tsq_ray.config.base import Section
from tsq_ray.config.method import (
    TSQ_MODES,
    DecodeConfig,
    EncodersConfig,
    EvaluateConfig,
    FinetuneConfig,
    ModelConfig,
    SamplerConfig,
    TrainConfig,
)
from tsq_ray.config.resources import OutputConfig, ResourcesConfig, ServeConfig
from tsq_ray.errors import ConfigError


class Config(Section):
    """All settings of a run."""

    decode: DecodeConfig = DecodeConfig()
    encoders: EncodersConfig = EncodersConfig()
    recognizer: ModelConfig = ModelConfig(model="resnet50", resize="crop")
    sampler: SamplerConfig = SamplerConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    output: OutputConfig = OutputConfig()
    resources: ResourcesConfig = ResourcesConfig()
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def check_budget(sampler: SamplerConfig, num_frames: int, task: str = "single") -> None:
    """Refuse K > T, and an adaptive K where nothing ranks the frames or several labels may be true (ConfigError)."""
    if sampler.most_frames > num_frames:
        name = "sampler.max_budget" if sampler.budget == "adaptive" else "sampler.budget (K)"
        raise ConfigError(
            f"{name} is {sampler.most_frames}, above decode.num_frames (T) = {num_frames}: K frames are chosen of T; lower K or raise T"
        )
    if sampler.budget == "adaptive":
        if sampler.mode not in TSQ_MODES:
            raise ConfigError(
                f"sampler.budget 'adaptive' needs frames in the order of their saliency, which sampler.mode {sampler.mode!r} does not give; "
                f"take one of {', '.join(TSQ_MODES)}, or a number"
            )
        if task != "single":
            raise ConfigError(
                "sampler.budget 'adaptive' waits for one class to lead, and with train.task 'multi' several may be true; give a number"
            )


def check_top_objects(top_objects: int, num_objects: int) -> None:
    """Refuse to train on more objects a frame than the features hold (ConfigError)."""
    if top_objects > num_objects:
        raise ConfigError(
            f"train.top_objects is {top_objects}, above encoders.num_objects = {num_objects}, what the features hold of a frame; "
            "lower it or extract again with more"
        )
