"""Settings of the method: decoding, networks, sampler, training and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tsq_ray.config.base import Precision, Section

SamplerMode = Literal["both", "visual", "textual", "uniform", "random", "maxconf-l", "maxconf"]
TSQMode = Literal["both", "visual", "textual"]
Task = Literal["single", "multi"]
"""One label per video, or several."""
VIDEO_CLASSIFIER = "ForVideoClassification"
"""Part of the class names of transformers' video classifiers."""
TSQ_MODES: tuple[str, ...] = ("both", "visual", "textual")
"""Modes that run the sampler network; the others are baselines."""
LEARNED_MODES = (*TSQ_MODES, "maxconf-l")
"""Modes that run something trained on the features: the sampler network or the frame head."""


def _check_weights(weights: str) -> str:
    if not weights.startswith(("http://", "https://")):
        return weights
    parts = urlsplit(weights)
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "weights from a URL with a user or a query, which every output would record; "
            "download the file, or put it into object storage"
        )
    return weights


Weights = Annotated[str, AfterValidator(_check_weights)]


class DecodeConfig(Section):
    """How frames are decoded from a video."""

    strategy: Literal["uniform", "keyframe"] = "uniform"
    """`uniform`: the exact T frames; `keyframe`: a keyframe from each of the T intervals, or the
    exact frame if an interval has none."""
    backend: Literal["pyav", "decord", "nvdec"] = "pyav"
    """Decoder of the exact frames. `decord` is used if it can be exact, `nvdec` (an NVIDIA GPU's
    decoder) for the codecs it supports, PyAV on the CPU for all other files
    (docs/architecture.md)."""
    num_frames: int = Field(default=16, ge=1, le=1024)
    """T, the number of frames the sampler sees."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit for fetching and decoding one video, in seconds; then the decoder is killed."""
    max_pixels: int = Field(default=8192 * 4320, ge=1)
    """Largest width x height, in pixels; a larger video is refused (too_large)."""
    max_duration_s: float = Field(default=6 * 3600.0, gt=0)
    """Longest duration, in seconds; a longer video is refused (too_large)."""
    max_bytes: int = Field(default=16 * 1024**3, ge=1)
    """Largest file size, in bytes; a larger video is refused (too_large)."""
    max_memory_mb: int = Field(default=4096, ge=256)
    """Memory limit of one decoder process, in MiB; beyond it the video is out_of_memory."""


class ModelConfig(Section):
    """A pretrained network and the preprocessing that its weights expect."""

    NEWER: ClassVar[frozenset[str]] = frozenset({"kind", "resize_to"})
    kind: Literal["timm", "transformers", "openai"] = "timm"
    """Library of the network; `openai` (only the recogniser): a model behind a server."""
    model: str
    """timm name, Hugging Face id of a transformers network, or the name of a model on a server."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments for the model's constructor, for example {pad_type = "same"}. For
    a transformers network, its class and config, which `tsq import` sets."""
    weights: Weights = "hub"
    """`hub`, the path or URI of a .safetensors file or folder, `package:NAME` of an installed
    Python package, or `random:SEED`."""
    size: int = Field(default=224, ge=16, le=1024)
    """Height and width of the network's input, in pixels."""
    resize: Literal["squash", "crop"] = "squash"
    """`squash`: the whole frame to a square; `crop`: the shorter side to `resize_to`; then the
    centre of size x size."""
    resize_to: int = Field(default=0, ge=0, le=2048)
    """Side before the centre crop, in pixels, for example 256 for a size of 224; 0: size x 8/7 with
    `crop`, and size with `squash`."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of the resize, with antialiasing."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the input channels (RGB, values in 0..1)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the input channels (RGB, values in 0..1)."""

    @property
    def clip_frames(self) -> int:
        """Number of frames of one input, above 1 for a video network."""
        is_video = VIDEO_CLASSIFIER in str(self.model_args.get("architecture"))
        return int(self.model_args["num_frames"]) if is_video else 1

    @model_validator(mode="after")
    def _check_resize_to(self) -> Self:
        if 0 < self.resize_to < self.size:
            raise ValueError(
                f"resize_to is {self.resize_to}, below size = {self.size}: the crop of size x size "
                "is cut from a picture whose shorter side is resize_to"
            )
        return self


class TextConfig(Section):
    """The language model that embeds class and object names."""

    model: str = "bert-base-uncased"
    """Hugging Face id of a BERT-family encoder; ignored if `weights` is a file of word vectors."""
    weights: Weights = "hub"
    """`hub`, the path or URI of a folder, `package:NAME` of an installed Python package, or the
    path or URI of a file of static word vectors in GloVe's or word2vec's text format."""


class EncodersConfig(Section):
    """The sampler's three pretrained encoders (paper, section 3.2)."""

    visual: ModelConfig = ModelConfig(model="mobilenetv2_100", size=188)
    """Frame encoder of the visual query module."""
    objects: ModelConfig = ModelConfig(model="tf_efficientnet_b0", size=112)
    """ImageNet-1K object recogniser of the textual query module."""
    text: TextConfig = TextConfig()
    """Language model that embeds the object names and the class names."""
    num_objects: int = Field(default=10, ge=1, le=1000)
    """Most probable objects that `extract` stores per frame; `train.top_objects` may use fewer
    (paper, table 9: 10, all 1000)."""

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        for name, model in (("visual", self.visual), ("objects", self.objects)):
            if model.kind == "openai":
                raise ValueError(
                    f"{name}.kind is 'openai': only the recogniser may be a model behind a server; "
                    "use 'timm' or 'transformers'"
                )
        return self


class SamplerConfig(Section):
    """How K of the T frames are chosen (paper, section 3.3)."""

    NEWER: ClassVar[frozenset[str]] = frozenset({"selection"})
    budget: Annotated[int, Field(ge=1)] | Literal["adaptive"] = 5
    """K, the number of frames the recogniser sees; `adaptive`: up to `max_budget` frames, until the
    recogniser is confident (`margin`)."""
    max_budget: int = Field(default=5, ge=1)
    """Maximum number of frames the recogniser sees with `budget = "adaptive"`."""
    margin: float = Field(default=2.2, gt=0)
    """With `budget = "adaptive"`: the recogniser is confident once one class leads the next by this
    margin in the probabilities summed over the frames so far (one frame adds at most 1)."""
    lambda_visual: float = Field(default=0.6, ge=0, le=1)
    """Fraction of the K frames that the visual module chooses (paper: 0.6)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the `random` baseline; a video's frames depend only on (seed, video_id)."""
    mode: SamplerMode = "both"
    """Modules that choose (`both`, `visual`, `textual`), or a baseline (`uniform`, `random`,
    `maxconf-l`, `maxconf`)."""
    selection: Literal["top", "dpp"] = "top"
    """How TSQNet's modules choose: `top`, their most salient frames (paper); `dpp`, salient frames
    that differ from each other (docs/evaluation.md). A baseline ignores it."""
    top_classes: int = Field(default=5, ge=1)
    """Number of most probable classes whose saliencies are aggregated (paper: 5)."""

    @property
    def most_frames(self) -> int:
        """K, or the maximum of an adaptive budget."""
        return self.max_budget if self.budget == "adaptive" else self.budget

    def with_budget(self, budget: int | None) -> Self:
        """Return these settings with another K, or another maximum of an adaptive budget."""
        if budget is None:
            return self
        return self.model_copy(
            update={"max_budget" if self.budget == "adaptive" else "budget": budget}
        )


def _worker_count(value: Any) -> int | tuple[int, int]:
    ends = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(ends) != 2 or any(type(end) is not int for end in ends) or not 1 <= ends[0] <= ends[1]:
        raise ValueError(
            f"got {value!r}; expected a number from 1, or [fewest, most] with 1 <= fewest <= most"
        )
    return value if isinstance(value, int) else (ends[0], ends[1])


WorkerCount = Annotated[int | tuple[int, int], BeforeValidator(_worker_count)]
"""A fixed number, or [fewest, most]."""


class TrainConfig(Section):
    """Training of TSQNet (paper, appendix A)."""

    NEWER: ClassVar[frozenset[str]] = frozenset(
        {"max_videos", "target", "teacher_frames", "teacher_min_videos"}
    )
    task: Task = "single"
    """`single`: one label per video, softmax; `multi`: several labels, sigmoid and binary cross
    entropy."""
    target: Literal["labels", "teacher"] = "labels"
    """Target of a video: its `labels`, or what the recogniser saw in its frames when the features
    were extracted with it (`teacher`, which reads no label)."""
    teacher_frames: int = Field(default=5, ge=1)
    """Frames in the target `teacher`: the mean of the recogniser's probabilities on this number of
    frames, those about which it is most confident."""
    teacher_min_videos: int = Field(default=3, ge=1)
    """With the target `teacher`: classes that the recogniser finds in fewer videos get no query."""
    modules: Literal["both", "visual"] = "both"
    """`both`: VQM and TQM with swap attention; `visual`: the paper's VQM-only."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the training videos; the learning rate is divided by 10 after 1/4, 1/2 and 3/4 of
    them (paper: 25, 50, 75 of 100)."""
    lr: float = Field(default=1e-2, gt=0)
    """Initial learning rate of SGD with momentum 0.9."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of SGD."""
    batch_size: int = Field(default=64, ge=1)
    """Videos per step, over all workers."""
    max_videos: int = Field(default=200_000, ge=0)
    """Maximum number of videos to train on, a random sample if there are more (0: all). Each node
    with a worker keeps the features of these videos on its disk, at 16 frames about 40 kB per
    video."""
    alpha: float = Field(default=0.6, ge=0)
    """Weight of the loss L_t->v (equation 4)."""
    beta: float = Field(default=0.6, ge=0)
    """Weight of the loss L_v->t (equation 4)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout in the TSQ layers."""
    swap_values: Literal["input", "projected"] = "input"
    """Values that swap attention gathers: X after the conv, as printed in equation 3 (`input`), or
    X W_v (`projected`)."""
    dim_visual: int = Field(default=512, ge=8)
    """d' of the visual query module."""
    dim_textual: int = Field(default=256, ge=8)
    """d' of the textual query module."""
    attention: Literal["class-specific", "class-agnostic"] = "class-specific"
    """`class-specific`: one query per category; `class-agnostic`: a single query, whose attention
    is the saliency (paper, table 7)."""
    classifier: Literal["class-specific", "shared"] = "class-specific"
    """`class-specific`: one row of weights per category; `shared`: one row for the responses of all
    categories (paper, table 7: CS attention, CA classifier)."""
    num_layers: int = Field(default=1, ge=1, le=16)
    """Stacked decoder blocks; the last one's attention is the saliency (paper, table A.5)."""
    num_heads: int = Field(default=1, ge=1, le=64)
    """Attention heads, averaged for the saliency; must divide `dim_visual` and `dim_textual`
    (paper, table A.5)."""
    self_attention: bool = False
    """Self-attention among the queries before they attend to the frames (paper, table A.4)."""
    top_objects: int = Field(default=10, ge=1, le=1000)
    """Most probable objects per frame that the textual module sees; at most `encoders.num_objects`,
    the number that the features hold."""
    init_visual: Literal["prototype", "random"] = "prototype"
    """Initial values of the visual TSQ embeddings."""
    init_textual: Literal["text", "random"] = "text"
    """Initial values of the textual TSQ embeddings."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initialisation, the order of samples and dropout."""
    num_workers: WorkerCount = 1
    """Ray Train workers, which split each batch: a number, or `[fewest, most]` to use as many as
    fit on the cluster and to continue with fewer if nodes are lost."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Epochs between checkpoints."""
    precision: Precision = "auto"
    """`bf16`: autocast; `auto`: bf16 on a GPU that supports it, otherwise fp32."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.attention == "class-agnostic" and self.classifier == "shared":
            raise ValueError(
                "attention 'class-agnostic' gives one response, from which a 'shared' row makes "
                "the same score for every category; leave classifier at 'class-specific' "
                "(one layer d' -> C: the paper's CA + CA)"
            )
        if self.attention == "class-agnostic" and self.self_attention:
            raise ValueError(
                "self_attention needs several queries, but attention 'class-agnostic' has one; "
                "set only one of the two"
            )
        dims = {"dim_visual": self.dim_visual} | (
            {"dim_textual": self.dim_textual} if self.modules == "both" else {}
        )
        for name, dim in dims.items():
            if dim % self.num_heads:
                raise ValueError(
                    f"num_heads {self.num_heads} does not divide {name} {dim}; use a divisor of it"
                )
        return self


class HeadConfig(Section):
    """A linear head on features of a frozen backbone, with TSN's segment consensus.

    Trained with AdamW and a cosine schedule to zero.
    """

    epochs: int = Field(default=100, ge=1)
    """Passes over the training videos."""
    lr: float = Field(default=1e-3, gt=0)
    """Initial learning rate."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Weight decay."""
    batch_size: int = Field(default=64, ge=1)
    """Videos per step."""
    segments: int = Field(default=5, ge=1)
    """Frames per video and step, one from each of this many equal segments; logits are averaged."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initialisation, the order of samples and the choice of frames."""


class FinetuneConfig(Section):
    """A frame classifier trained with TSN's segment consensus.

    Backbone and head are trained together, or the head alone.
    """

    backbone: Literal["trained", "frozen"] = "trained"
    """`trained`: train the whole network with the settings of this section; `frozen`: train only a
    linear head, with those of `finetune.head`."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the training videos (paper: 10)."""
    segments: int = Field(default=3, ge=1)
    """Frames per video and step: a random one from each of this many equal parts of the video;
    their logits are averaged (TSN)."""
    batch_size: int = Field(default=16, ge=1)
    """Videos per step, over all workers; each worker needs memory for batch_size x segments /
    num_workers frames."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` (momentum 0.9), or `adamw`, which works better with a `finetune.lr` up to 1e-4."""
    lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate of the backbone, reached after the warm-up; then a cosine to zero."""
    head_lr_factor: float = Field(default=5.0, gt=0)
    """Learning rate of the new head relative to the backbone's."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Epochs over which the learning rate rises from zero."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Weight decay; not applied to biases and norms."""
    clip_grad_norm: float = Field(default=20.0, ge=0)
    """Gradients with a larger norm are scaled down to it; 0 disables clipping."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the target that is spread over all classes."""
    crop_scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest fraction of the picture that a random crop covers (TSN's multi-scale
    crop: 0.44 to 1); [1, 1]: no crop."""
    flip: bool = True
    """Flip half of the videos left to right; disable it if left and right differ in meaning."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Largest relative change of brightness, contrast and saturation; the hue changes by up to a
    tenth of it."""
    precision: Precision = "auto"
    """`bf16`: autocast; `auto`: bf16 if the GPU or CPU has instructions for it."""
    val_split: str = "val"
    """Split to measure after every `checkpoint_every` epochs, if the manifest has it; empty:
    never."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initialisation, the order of samples, the choice of frames and augmentation."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers, which split each batch."""
    checkpoint_every: int = Field(default=1, ge=1)
    """Epochs between checkpoints."""
    head: HeadConfig = HeadConfig()
    """Settings for `backbone = "frozen"`, and for the frame head that `tsq train` fits without
    --encoder."""

    @model_validator(mode="after")
    def _check_crop_scale(self) -> Self:
        smallest, largest = self.crop_scale
        if not 0 < smallest <= largest <= 1:
            raise ValueError(
                f"crop_scale {list(self.crop_scale)}: expected 0 < smallest <= largest <= 1"
            )
        return self


class EvaluateConfig(Section):
    """What `tsq evaluate` measures."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds of the trainings and the random baseline; results are means over them with a 95 %
    confidence interval."""
    budgets: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=tuple(range(1, 11)), min_length=1
    )
    """Budgets K of the accuracy-cost plot; tables with one budget use `sampler.budget`."""
    max_videos: int = Field(default=20_000, ge=0)
    """Maximum number of videos to measure, and also to train on; a random sample if there are more
    (0: all). Their features are kept in memory, at 16 frames about 50 kB per video."""
    word_vectors: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Files of static word vectors (GloVe, word2vec; see `encoders.text.weights`) for table 9."""

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        for name, values in (("seeds", self.seeds), ("budgets", self.budgets)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {list(values)} has a duplicate; give each value once")
        return self
