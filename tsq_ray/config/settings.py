"""All settings of a run, and checks across sections."""

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
from tsq_ray.config.recognizer import RecognizerConfig
from tsq_ray.config.resources import OutputConfig, ResourcesConfig, ServeConfig
from tsq_ray.errors import ConfigError


class Config(Section):
    """All settings of a run."""

    decode: DecodeConfig = DecodeConfig()
    encoders: EncodersConfig = EncodersConfig()
    recognizer: RecognizerConfig = RecognizerConfig(model="resnet50", resize="crop")
    sampler: SamplerConfig = SamplerConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    output: OutputConfig = OutputConfig()
    resources: ResourcesConfig = ResourcesConfig()
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def with_visual_encoder(self, model: ModelConfig) -> Config:
        """Return these settings with another `encoders.visual`."""
        plain = ModelConfig(**model.model_dump(include=set(ModelConfig.model_fields)))
        encoders = self.encoders.model_copy(update={"visual": plain})
        return self.model_copy(update={"encoders": encoders})


def check_budget(
    sampler: SamplerConfig,
    num_frames: int,
    task: str = "single",
    recognizer: ModelConfig | None = None,
) -> None:
    """Check the budget K, for this recogniser if it is known.

    Raises ConfigError if K > T, if K is adaptive but the mode does not rank frames or a video may
    have several labels, or if the recogniser gives no answers that the mode or K can use.
    """
    if sampler.most_frames > num_frames:
        name = "sampler.max_budget" if sampler.budget == "adaptive" else "sampler.budget (K)"
        raise ConfigError(
            f"{name} is {sampler.most_frames}, above decode.num_frames (T) = {num_frames}: "
            "K frames are chosen from T; lower K or raise T"
        )
    if sampler.budget == "adaptive":
        if sampler.mode not in TSQ_MODES:
            raise ConfigError(
                "sampler.budget 'adaptive' needs frames ranked by saliency, which sampler.mode "
                f"{sampler.mode!r} does not give; use one of {', '.join(TSQ_MODES)}, or a number"
            )
        if task != "single":
            raise ConfigError(
                "sampler.budget 'adaptive' waits for one class to lead, "
                "but with train.task 'multi' several may be true; use a number"
            )
    if recognizer is not None:
        _check_answers(sampler, recognizer)


def _check_answers(sampler: SamplerConfig, recognizer: ModelConfig) -> None:
    """Raise ConfigError if K is not whole clips, or if a mode asks for answers on single frames."""
    clip_frames = recognizer.clip_frames
    if recognizer.kind == "openai" and sampler.mode == "maxconf":
        raise ConfigError(
            "sampler.mode 'maxconf': the recogniser is a server that is asked once about all "
            "chosen frames, which says nothing about one frame; use another mode"
        )
    if clip_frames == 1:
        return
    what = f"the recogniser takes clips of {clip_frames} frames"
    if sampler.mode == "maxconf":
        raise ConfigError(f"sampler.mode 'maxconf': {what}, which says nothing about one frame")
    if sampler.budget == "adaptive" or sampler.budget % clip_frames:
        raise ConfigError(
            f"sampler.budget (K) is {sampler.budget}: {what}; use a multiple of {clip_frames}"
        )


def check_top_objects(top_objects: int, num_objects: int) -> None:
    """Raise ConfigError if training asks for more objects per frame than the features hold."""
    if top_objects > num_objects:
        raise ConfigError(
            f"train.top_objects is {top_objects}, above encoders.num_objects = {num_objects}, "
            "the number per frame that the features hold; lower it or extract again with more"
        )
