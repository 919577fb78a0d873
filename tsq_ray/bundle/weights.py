"""Trained artifacts: `finetune`'s classifier and `train`'s bundle.

Each is one folder of safetensors and JSON with one URI; nothing is unpickled. `settings` has the
parts that need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from tsq_ray import storage
from tsq_ray.asking.questions import ServerModel
from tsq_ray.bundle.settings import (
    BUNDLE_FILE,
    CLASSIFIER_FILE,
    FEWER_CLASSES_FORMAT,
    FORMAT,
    NO_RECOGNIZER,
    SERVER_FORMAT,
    read_bundle_settings,
    read_checked,
    read_classifier_settings,
    recognizer_of,
    server_of,
    write_settings,
)
from tsq_ray.config import (
    DecodeConfig,
    EncodersConfig,
    ModelConfig,
    RecognizerConfig,
    SamplerConfig,
    Task,
)
from tsq_ray.errors import ModelError
from tsq_ray.model import TSQNet, TSQShape
from tsq_ray.networks.encoder import (
    NUM_OBJECTS,
    FrameEncoder,
    create_network,
    load_encoder,
    split_network,
)
from tsq_ray.networks.weights import load_weights


@dataclass(frozen=True)
class Classifier:
    """`finetune`'s output: a backbone with a head over `classes`, preprocessing and provenance."""

    encoder: FrameEncoder
    classes: list[str]
    task: Task
    role: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """Everything that scoring needs.

    `encoder` has the frame head; `objects` and `vocabulary` [1000, Dt] are None for a VQM-only
    bundle.
    """

    classes: list[str]
    task: Task
    decode: DecodeConfig
    encoders: EncodersConfig
    sampler_defaults: SamplerConfig
    sampler: TSQNet
    encoder: FrameEncoder
    objects: FrameEncoder | None
    vocabulary: Tensor | None
    recognizer: FrameEncoder | ServerModel | None
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    sampler_classes: list[str] | None = None
    """The classes with a query and an output of the frame head; None: all of `classes`. Empty: the
    sampler was not taught."""

    @property
    def is_taught(self) -> bool:
        """Whether the sampler was trained; if not, only baselines can choose frames."""
        return self.sampler_classes != []


def save_classifier(classifier: Classifier, uri: str) -> None:
    """Write a classifier folder: model.safetensors (backbone.*, head.*), then finetune.json."""
    content = {
        "format": FORMAT,
        "role": classifier.role,
        "classes": classifier.classes,
        "task": classifier.task,
        "model": classifier.encoder.config.record(),
        "backbone_sha256": classifier.encoder.backbone_hash(),
        "provenance": classifier.provenance,
    }
    _write_folder(uri, CLASSIFIER_FILE, content, {"model": _encoder_state(classifier.encoder)})


def save_server(model: ServerModel, uri: str, provenance: dict[str, Any]) -> None:
    """Write the classifier folder of a recogniser behind a server: finetune.json alone."""
    content = {
        "format": SERVER_FORMAT,
        "role": "recognizer",
        "classes": list(model.classes),
        "task": model.task,
        "model": model.config.record(),
        "backbone_sha256": model.state_hash(),
        "provenance": provenance,
    }
    _write_folder(uri, CLASSIFIER_FILE, content, {})


def load_classifier(uri: str) -> Classifier:
    """Read a classifier folder.

    Raises ModelError if it is missing, damaged, of another format, or a model behind a server.
    """
    uri = storage.normalize(uri)
    content, _ = read_classifier_settings(uri)
    classes = list(content["classes"])
    encoder = _restore_encoder(
        uri, content, "model", RecognizerConfig.model_validate(content["model"]), len(classes)
    )
    return Classifier(encoder, classes, content["task"], content["role"], content["provenance"])


def load_network(config: ModelConfig, with_head: bool) -> FrameEncoder:
    """Load the network of these settings; `weights` may also name an output of `tsq finetune`."""
    if (
        config.weights != "hub"
        and not config.weights.startswith(("package:", "random:"))
        and storage.is_folder(storage.normalize(config.weights))
    ):
        return load_classifier(config.weights).encoder
    return load_encoder(config, with_head)


def classifier_settings(uri: str) -> RecognizerConfig:
    """Return settings that load the classifier at `uri`, with its own model and preprocessing."""
    place = storage.normalize(uri)
    config = RecognizerConfig.model_validate(read_classifier_settings(place)[0]["model"])
    return config.model_copy(update={"weights": place})


def save_bundle(bundle: Bundle, uri: str) -> None:
    """Write a bundle folder, bundle.json last."""
    states: dict[str, Mapping[str, Tensor]] = {
        "sampler": bundle.sampler.state_dict(),
        "encoder": _encoder_state(bundle.encoder),
    }
    if bundle.objects is not None:
        states["objects"] = _encoder_state(bundle.objects)
    if bundle.vocabulary is not None:
        states["text"] = {"vocabulary": bundle.vocabulary}
    if isinstance(bundle.recognizer, FrameEncoder):
        states["recognizer"] = _encoder_state(bundle.recognizer)
    fewer = {} if bundle.sampler_classes is None else {"sampler_classes": bundle.sampler_classes}
    content = {
        "format": _format(bundle),
        "classes": bundle.classes,
        **fewer,
        "task": bundle.task,
        "config": {
            "decode": bundle.decode.record(),
            "encoders": bundle.encoders.record(),
            "recognizer": bundle.recognizer.config.record() if bundle.recognizer else None,
            "sampler": bundle.sampler_defaults.record(),
        },
        "sampler_shape": asdict(bundle.sampler.shape),
        "provenance": bundle.provenance,
    }
    _write_folder(uri, BUNDLE_FILE, content, states)


def _format(bundle: Bundle) -> int:
    if isinstance(bundle.recognizer, ServerModel):
        return SERVER_FORMAT
    return FORMAT if bundle.sampler_classes is None else FEWER_CLASSES_FORMAT


def load_bundle(uri: str) -> Bundle:
    """Read a bundle folder, with networks in eval mode on the CPU.

    Raises ModelError if it is missing, damaged or of another format.
    """
    uri = storage.normalize(uri)
    content, digest = read_bundle_settings(uri)
    config = content["config"]
    encoders = EncodersConfig.model_validate(config["encoders"])
    sampler = TSQNet(TSQShape(**content["sampler_shape"]))
    _load_into(sampler, uri, content, "sampler")
    classes, sampler_classes = list(content["classes"]), content.get("sampler_classes")
    with_text = "objects" in content["files"]
    recognizer: FrameEncoder | ServerModel | None = server_of(content)
    if recognizer is None and (own := recognizer_of(content)) is not None:
        recognizer = _restore_encoder(uri, content, "recognizer", own, len(classes))
    return Bundle(
        classes=classes,
        task=content["task"],
        decode=DecodeConfig.model_validate(config["decode"]),
        encoders=encoders,
        sampler_defaults=SamplerConfig.model_validate(config["sampler"]),
        sampler=sampler.eval().requires_grad_(False),
        encoder=_restore_encoder(
            uri,
            content,
            "encoder",
            encoders.visual,
            len(classes if sampler_classes is None else sampler_classes),
        ),
        objects=_restore_encoder(uri, content, "objects", encoders.objects, NUM_OBJECTS)
        if with_text
        else None,
        vocabulary=_read_file(uri, content, "text")["vocabulary"] if with_text else None,
        recognizer=recognizer,
        provenance=content["provenance"],
        sha256=digest,
        sampler_classes=sampler_classes,
    )


def load_recognizer(uri: str) -> Classifier:
    """Read only the recogniser of a bundle. Raises ModelError if it has no network for it."""
    uri = storage.normalize(uri)
    content, _ = read_bundle_settings(uri)
    if (own := recognizer_of(content)) is None:
        raise ModelError(NO_RECOGNIZER)
    classes = list(content["classes"])
    encoder = _restore_encoder(uri, content, "recognizer", own, len(classes))
    return Classifier(encoder, classes, content["task"], "recognizer", content["provenance"])


def _encoder_state(encoder: FrameEncoder) -> dict[str, Tensor]:
    state = {f"backbone.{key}": value for key, value in encoder.backbone.state_dict().items()}
    if encoder.head is not None:
        state |= {f"head.{key}": value for key, value in encoder.head.state_dict().items()}
    return state


def _write_folder(
    uri: str,
    settings_name: str,
    content: dict[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
) -> None:
    uri = storage.normalize(uri)
    content["files"] = {}
    # a folder without its settings file cannot be loaded, so old and new files never mix
    storage.remove(storage.join(uri, settings_name))
    for name, state in states.items():
        data = save_safetensors(
            {key: value.detach().cpu().contiguous() for key, value in state.items()}
        )
        storage.write_bytes(storage.join(uri, f"{name}.safetensors"), data)
        content["files"][name] = storage.sha256_of(data)
    write_settings(uri, settings_name, content)


def _read_file(uri: str, content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    try:
        return load_safetensors(read_checked(uri, content, name))
    except SafetensorError as error:
        raise ModelError(
            f"{storage.redact(uri)}/{name}.safetensors: not readable as safetensors ({error})"
        ) from None


def _load_into(network: nn.Module, uri: str, content: Mapping[str, Any], name: str) -> None:
    load_weights(
        network, _read_file(uri, content, name), f"{storage.redact(uri)}/{name}.safetensors"
    )


def _restore_encoder(
    uri: str, content: Mapping[str, Any], name: str, config: ModelConfig, num_classes: int
) -> FrameEncoder:
    encoder = split_network(config, create_network(config, num_classes), with_head=False)
    state = _read_file(uri, content, name)
    what = f"{storage.redact(uri)}/{name}.safetensors"
    load_weights(encoder.backbone, _without_prefix(state, "backbone."), what)
    head_state = _without_prefix(state, "head.")
    if head_state:
        encoder.head = linear_head(encoder.dim, num_classes, head_state, what)
    return encoder.eval().requires_grad_(False)


def linear_head(
    dim: int, num_classes: int, state: Mapping[str, Tensor] | None = None, what: str = "head"
) -> nn.Linear:
    """Build a classifier over pooled features, [N, dim] -> [N, num_classes].

    Loads `state` if given.
    """
    head = nn.Linear(dim, num_classes)
    if state is not None:
        load_weights(head, state, what)
    return head


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
