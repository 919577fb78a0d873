"""Frozen, typed, validated settings: defaults, then a TOML file, then `--set section.key=value`.

Imports neither torch nor ray, so that a wrong setting is told before anything slow starts. The field docstrings are the
source of docs/configuration.md.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tsq_ray.errors import ConfigError

SamplerMode = Literal["both", "visual", "textual", "uniform", "random", "maxconf-l", "maxconf"]
TSQ_MODES: tuple[str, ...] = ("both", "visual", "textual")
"""Modes that run the sampler network; the others are baselines."""


class Section(BaseModel):
    """A frozen settings section; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class DecodeConfig(Section):
    """How frames are taken from a video."""

    strategy: Literal["uniform", "keyframe"] = "uniform"
    """`uniform`: the exact T frames; `keyframe`: a keyframe of each of the T intervals where there is one, else the exact frame."""
    backend: Literal["pyav", "decord"] = "pyav"
    """What decodes the exact frames; `decord` is used where it can be exact, PyAV for the other files (docs/architecture.md)."""
    num_frames: int = Field(default=16, ge=1, le=1024)
    """T, the number of frames the sampler looks at."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Wall-clock limit of one video's fetch and decode, in seconds; past it the decoder is killed."""
    max_pixels: int = Field(default=8192 * 4320, ge=1)
    """Width x height above which a video is refused (too_large)."""
    max_duration_s: float = Field(default=6 * 3600.0, gt=0)
    """Duration above which a video is refused (too_large), in seconds."""
    max_bytes: int = Field(default=16 * 1024**3, ge=1)
    """Size of the file above which a video is refused (too_large), in bytes."""
    max_memory_mb: int = Field(default=4096, ge=256)
    """Memory that one decoder process may take, in MiB; past it the video is out_of_memory."""


class ModelConfig(Section):
    """A pretrained network and the preprocessing its weights expect."""

    model: str
    """Name in timm (image models) or a Hugging Face id (text model)."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the model's constructor, for example {pad_type = "same"}."""
    weights: str = "hub"
    """`hub`, a path or URI of a .safetensors file or folder, `package:NAME` of an installed Python package, or `random:SEED`."""
    size: int = Field(default=224, ge=16, le=1024)
    """Height and width of the network's input, in pixels."""
    resize: Literal["squash", "crop"] = "squash"
    """`squash`: the whole frame to size x size; `crop`: shorter side to size x 8/7, then the centre (256 -> 224)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of the resize, with antialiasing."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the input channels, RGB in 0..1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the input channels, RGB in 0..1."""


class TextConfig(Section):
    """The language model that embeds class and object names."""

    model: str = "bert-base-uncased"
    """Hugging Face id of a BERT-family encoder."""
    weights: str = "hub"
    """`hub`, a folder's path or URI, or `package:NAME` of an installed Python package."""


class EncodersConfig(Section):
    """The sampler's three pretrained encoders (paper, section 3.2)."""

    visual: ModelConfig = ModelConfig(model="mobilenetv2_100", size=188)
    """Frame encoder of the visual query module."""
    objects: ModelConfig = ModelConfig(model="tf_efficientnet_b0", size=112)
    """ImageNet-1K object recogniser of the textual query module."""
    text: TextConfig = TextConfig()
    """Embeds the object names and the class names."""


class SamplerConfig(Section):
    """How K of the T frames are chosen (paper, section 3.3)."""

    budget: int = Field(default=5, ge=1)
    """K, the number of frames the recogniser sees."""
    lambda_visual: float = Field(default=0.6, ge=0, le=1)
    """Share of the K frames that the visual module chooses (paper: 0.6)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the `random` baseline; a video's frames hang on (seed, video_id) alone."""
    mode: SamplerMode = "both"
    """`both`, `visual` or `textual` module, or a baseline: `uniform`, `random`, `maxconf-l`, `maxconf`."""
    top_classes: int = Field(default=5, ge=1)
    """Number of most probable classes whose saliencies are aggregated (paper: 5)."""


class TrainConfig(Section):
    """Training of TSQNet (paper, appendix A)."""

    task: Literal["single", "multi"] = "single"
    """`single`: one label a video, softmax; `multi`: several, sigmoid and binary cross entropy."""
    modules: Literal["both", "visual"] = "both"
    """`both`: VQM and TQM with swap attention; `visual`: the paper's VQM-only."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the training videos; the learning rate falls by 10 at 1/4, 1/2 and 3/4 of them (paper: 25, 50, 75 of 100)."""
    lr: float = Field(default=1e-2, gt=0)
    """Initial learning rate of SGD with momentum 0.9."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of SGD."""
    batch_size: int = Field(default=64, ge=1)
    """Videos a step, over all workers."""
    alpha: float = Field(default=0.6, ge=0)
    """Weight of the loss L_t->v (equation 4)."""
    beta: float = Field(default=0.6, ge=0)
    """Weight of the loss L_v->t (equation 4)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout in the TSQ layers."""
    swap_values: Literal["input", "projected"] = "input"
    """What swap attention gathers: X after the conv as printed in equation 3 (`input`), or X W_v (`projected`)."""
    dim_visual: int = Field(default=512, ge=8)
    """d' of the visual query module."""
    dim_textual: int = Field(default=256, ge=8)
    """d' of the textual query module."""
    init_visual: Literal["prototype", "random"] = "prototype"
    """Start of the visual TSQ embeddings."""
    init_textual: Literal["text", "random"] = "text"
    """Start of the textual TSQ embeddings."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order of samples and dropout."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers; the batch is shared out among them."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Epochs between two checkpoints."""


class FinetuneConfig(Section):
    """Fitting a linear head on a frozen backbone, with TSN's segment consensus."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the training videos."""
    lr: float = Field(default=1e-3, gt=0)
    """Initial learning rate of AdamW, cosine to zero."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Weight decay of AdamW."""
    batch_size: int = Field(default=64, ge=1)
    """Videos a step."""
    segments: int = Field(default=5, ge=1)
    """Frames a video and step: one from each of so many equal segments, their logits averaged (TSN)."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order and the choice of frames."""


class OutputConfig(Section):
    """What a run writes."""

    rows_per_file: int = Field(default=128, ge=1)
    """Rows of a Parquet part; also how many videos' work a killed worker can lose."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    """Compression of the Parquet parts."""


class ResourcesConfig(Section):
    """What the stages ask of the cluster; 0 means: choose from what the cluster has."""

    workers: int = Field(default=0, ge=0)
    """Parallel workers of a CPU-only extraction (0: one a CPU)."""
    decoders: int = Field(default=0, ge=0)
    """Decoding workers beside GPU encoders (0: as many as there are CPUs left)."""
    gpus: int = Field(default=-1, ge=-1)
    """GPU workers (-1: one a GPU of the cluster; 0: CPU only)."""
    batch_size: int = Field(default=8, ge=1)
    """Videos a worker takes at a time."""
    threads: int = Field(default=0, ge=0)
    """Threads of each worker's network (0: CPUs / workers)."""


class ScaleConfig(Section):
    """How far a deployment scales."""

    min_replicas: int = Field(default=1, ge=0)
    """Fewest replicas."""
    max_replicas: int = Field(default=1, ge=1)
    """Most replicas."""
    num_cpus: float = Field(default=0.25, ge=0)
    """Logical CPUs of a replica; may be fractional."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a replica; may be fractional."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ReplicaConfig(ScaleConfig):
    """How far one deployment of the Serve graph scales."""

    max_ongoing_requests: int = Field(default=32, ge=1)
    """Requests a replica takes at a time; above its batch size. A replica is added where more than half of them are taken."""


class ServeConfig(Section):
    """The endpoint and its deployments."""

    ingress: ScaleConfig = ScaleConfig(num_cpus=0.1)
    """Takes the requests and checks them."""
    decoder: ReplicaConfig = ReplicaConfig(max_replicas=2)
    """Fetches and decodes."""
    decoder_processes: int = Field(default=2, ge=1)
    """Decoding child processes of each decoder replica."""
    sampler: ReplicaConfig = ReplicaConfig()
    """Encodes the T frames and chooses K."""
    recognizer: ReplicaConfig = ReplicaConfig()
    """Recognises the K frames."""
    batch_size: int = Field(default=8, ge=1)
    """Most videos in one batch of the sampler or the recogniser."""
    batch_wait_s: float = Field(default=0.01, ge=0)
    """Longest wait for a batch to fill, in seconds."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that an ingress replica has in hand, waiting ones too; one more is answered 429."""
    request_timeout_s: float = Field(default=120.0, gt=0)
    """Longest time of one request, its upload too, in seconds; past it the answer is 504."""
    max_upload_mb: float = Field(default=256, gt=0)
    """Largest upload, in MiB; a larger one gets 413."""
    allowed_uri_prefixes: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Folders, as paths or URIs, below which a request's `uri` may lie; none by default, so that nobody reads files through the endpoint."""


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


def check_budget(budget: int, num_frames: int) -> None:
    """Refuse K > T (ConfigError)."""
    if budget > num_frames:
        raise ConfigError(
            f"sampler.budget (K) is {budget}, above decode.num_frames (T) = {num_frames}: K frames are chosen of T; lower K or raise T"
        )


def load_config(path: str | Path | None = None, sets: Iterable[str] = (), base: Mapping[str, Any] | None = None) -> Config:
    """Resolve the settings: the defaults, then `base`, the TOML file at `path`, and `sets` ("section.key=value").

    A value of `sets` is read as TOML (`5`, `0.6`, `true`, `[1, 2]`, `{a = 1}`), and as a plain string where it is not TOML.
    Raises ConfigError with one line for a missing file, bad TOML, an unknown key or a value that is not allowed.
    """
    tree: dict[str, Any] = Config().model_dump(mode="json")
    _merge(tree, base or {})
    if path is not None:
        _merge(tree, _read_toml(Path(path)))
    for item in sets:
        _apply_set(tree, item)
    return validate_config(tree)


def validate_config(tree: Mapping[str, Any]) -> Config:
    """A Config from plain nested dictionaries (ConfigError names the first wrong key, the value got and what is allowed)."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"section.key": value}; `model_args` stays whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "model_args":
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"--config: no file {path}; name an existing TOML file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: not readable as TOML: {error}") from None


def _merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and key != "model_args":
            _merge(tree[key], value)
        else:
            tree[key] = value


def _apply_set(tree: dict[str, Any], item: str) -> None:
    name, equals, text = item.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {item!r}: expected section.key=value, for example --set decode.num_frames=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item!r}: {key} is a value, not a section")
        node = child
    node[keys[-1]] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: Any = Config
        for part in first["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"unknown setting {where}; there is: {', '.join(section.model_fields)}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"setting {where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"
