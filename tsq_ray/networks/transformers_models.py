"""Networks of the transformers library: image and video classifiers, towers of dual encoders.

A dual encoder (CLIP, SigLIP) embeds pictures and texts. The embedded names of the classes become
its head, so that scoring needs only its image tower.

Shapes: N pictures, D dims, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsq_ray.config import VIDEO_CLASSIFIER, ModelConfig
from tsq_ray.errors import ModelError

ARCHITECTURE = "architecture"
"""Key of `model_args` with the class of the network; the others are its config."""
_TOWERS = {
    "CLIPVisionModelWithProjection": "image_embeds",
    "SiglipVisionModel": "pooler_output",
}
"""Image towers, and the output that their texts are compared with."""
_TOWER_OF = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
_CLASSIFIERS = ("ForImageClassification", VIDEO_CLASSIFIER)
_NAFLEX = "siglip2"
"""Type of a SigLIP 2 of variable size; those of fixed size are of type siglip."""
_LEFT_OUT = (
    *("id2label", "label2id", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("_name_or_path", "problem_type", "num_labels", "return_dict", "output_hidden_states"),
)
"""Parts of a config that do not shape the network."""


class TransformersNetwork(nn.Module):
    """A network with timm's interface: pixel values [N, 3, H, W] to features [N, D].

    The features of a tower have length 1. A classifier that is more than one linear layer stays
    inside the network, whose features are then the logits. A video network takes whole clips of n
    frames, one after the other, and returns features [N / n, D].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._output = _TOWERS.get(type(network).__name__, "logits")
        self._head = _head_name(network)
        config: Any = network.config
        is_video = VIDEO_CLASSIFIER in type(network).__name__
        self._clip_frames = int(config.num_frames) if is_video else 1
        if self._head is not None:
            linear = network.get_submodule(self._head)
            assert isinstance(linear, nn.Linear)
            self.num_features = linear.in_features
        elif self.is_tower:
            projected = self._output == "image_embeds"
            self.num_features = int(config.projection_dim if projected else config.hidden_size)
        else:
            self.num_features = int(config.num_labels)

    @property
    def is_tower(self) -> bool:
        """Whether the network is a dual encoder's image tower, which has no classifier."""
        return self._output != "logits"

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features [N, D], or the logits while the network still has its classifier."""
        if self._clip_frames > 1:
            pixels = pixels.unflatten(0, (-1, self._clip_frames))
        output: Tensor = getattr(self.network(pixel_values=pixels), self._output)
        return F.normalize(output, dim=-1) if self.is_tower else output

    def get_classifier(self) -> nn.Linear:
        """Return the classifier; an identity if the features already are the logits."""
        if self._head is not None:
            linear = self.network.get_submodule(self._head)
            assert isinstance(linear, nn.Linear)
            return linear
        return linear_of(torch.eye(self.num_features))

    def reset_classifier(self, num_classes: int) -> None:
        """Remove the classifier."""
        assert num_classes == 0
        if self._head is not None:
            parent, _, name = self._head.rpartition(".")
            setattr(self.network.get_submodule(parent), name, nn.Identity())


def linear_of(weight: Tensor, bias: Tensor | float = 0.0) -> nn.Linear:
    """Return the layer x -> weight x + bias, for a weight [C, D]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.as_tensor(bias).expand(weight.shape[0]))
    return layer


def _head_name(network: nn.Module) -> str | None:
    """Return the name of the linear layer that ends the network, or None."""
    classifier = getattr(network, "classifier", None)
    if isinstance(classifier, nn.Linear):
        return "classifier"
    if isinstance(classifier, nn.Sequential) and isinstance(classifier[-1], nn.Linear):
        return f"classifier.{len(classifier) - 1}"
    return None


def create_transformers(config: ModelConfig, num_classes: int) -> TransformersNetwork:
    """Create the network that `model_args` describes, with random weights.

    Raises ModelError for a class or an argument that transformers does not know.
    """
    arguments = dict(config.model_args)
    name = str(arguments.pop(ARCHITECTURE, ""))
    kind = _network_class(name, config.model)
    try:
        own = kind.config_class(**arguments)
        if name not in _TOWERS:
            own.num_labels = max(1, num_classes)
        return TransformersNetwork(kind(own))
    except Exception as error:
        raise ModelError(
            f"model {config.model!r}: transformers cannot build a {name} from its model_args "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        ) from error


def _network_class(name: str, model: str) -> Any:
    import transformers

    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if kind is None or not (name in _TOWERS or _is_classifier(name)):
        raise ModelError(
            f"model {model!r}: model_args.{ARCHITECTURE} {name!r} is not a supported network; "
            f"allowed: {', '.join(_TOWERS)}, and classes of transformers named "
            f"...{', ...'.join(_CLASSIFIERS)}; tsq import sets it"
        )
    return kind


def model_args_of(config: Any, name: str) -> dict[str, Any]:
    """Return the `model_args` that create a network of class `name` for a checkpoint's config."""
    config = config.vision_config if name in _TOWERS else config
    kept = {key: value for key, value in config.to_diff_dict().items() if key not in _LEFT_OUT}
    clip = {"num_frames": config.num_frames} if VIDEO_CLASSIFIER in name else {}
    return {ARCHITECTURE: name, **_plain(kept), **clip}


def _is_classifier(name: str) -> bool:
    return any(kind in name for kind in _CLASSIFIERS)


def _plain(value: Any) -> Any:
    """Convert to values that JSON and TOML can both hold, without nulls."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def architecture_of(config: Any, what: str) -> str:
    """Return the class of network to use for a checkpoint with this config.

    Raises ModelError if it is neither an image classifier nor a dual encoder.
    """
    if config.model_type == _NAFLEX:
        raise ModelError(
            f"{what}: is a SigLIP 2 of variable size (NaFlex), which takes patches, not pictures; "
            "use one of fixed size, such as google/siglip2-base-patch16-224"
        )
    # a classifier trained from a dual encoder keeps its model_type
    if names := [name for name in config.architectures or () if _is_classifier(name)]:
        if VIDEO_CLASSIFIER in names[0] and not hasattr(config, "num_frames"):
            raise ModelError(
                f"{what}: a {config.model_type} checkpoint does not say the num_frames of its "
                "clips; use a VideoMAE, TimeSformer or ViViT"
            )
        return str(names[0])
    if config.model_type in _TOWER_OF:
        return _TOWER_OF[config.model_type]
    raise ModelError(
        f"{what}: a {config.model_type} checkpoint of {config.architectures} is neither an "
        f"image or video classifier nor a dual encoder ({', '.join(_TOWER_OF)})"
    )


def load_transformers(config: ModelConfig, place: str, what: str) -> TransformersNetwork:
    """Load the pretrained network at a folder or hub id.

    Raises ModelError if it cannot be loaded, or if the checkpoint lacks some of its weights.
    """
    kind = _network_class(str(config.model_args.get(ARCHITECTURE, "")), config.model)
    return TransformersNetwork(_pretrained(kind, place, what))


def _pretrained(kind: Any, place: str, what: str) -> Any:
    try:
        network, report = kind.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise cannot_load(what, error) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{what}: the checkpoint lacks {len(missing)} weights of a {type(network).__name__} "
            f"(first: {missing[0]}), which would stay random; choose a complete checkpoint"
        )
    return network.eval()


@torch.inference_mode()
def text_head(place: str, classes: Sequence[str], templates: Sequence[str], what: str) -> nn.Linear:
    """Return the head of a dual encoder: x of length 1 to the logits [C] of the classes.

    A class is the mean of its embedded texts, one per template, scaled to length 1 again (CLIP,
    section 3.1.4 of its paper). Raises ModelError as `load_transformers` does.
    """
    import transformers

    model = _pretrained(transformers.AutoModel, place, what)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:
        raise cannot_load(what, error) from error
    # SigLIP was trained on lower-case texts of full length; not all of its tokenizers do the former
    whole = model.config.model_type == "siglip"
    options: dict[str, Any] = {"padding": "max_length" if whole else True, "truncation": True}
    options["max_length"] = model.config.text_config.max_position_embeddings
    rows = []
    for name in classes:
        texts = [template.replace("{}", name.replace("_", " ")) for template in templates]
        texts = [text.lower() for text in texts] if whole else texts
        tokens = tokenizer(texts, return_tensors="pt", **options)
        output = model.get_text_features(**tokens)
        embedded = output if isinstance(output, Tensor) else output.pooler_output
        rows.append(F.normalize(F.normalize(embedded, dim=-1).mean(0), dim=-1))
    bias = getattr(model, "logit_bias", None)
    return linear_of(torch.stack(rows) * model.logit_scale.exp(), 0.0 if bias is None else bias)


def cannot_load(what: str, error: Exception) -> ModelError:
    """Return the error for a model that transformers cannot load."""
    return ModelError(
        f"{what}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}); "
        "check the name and the network connection, or name a folder"
    )
