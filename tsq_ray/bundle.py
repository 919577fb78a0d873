"""The trained artifacts: `finetune`'s classifier and `train`'s bundle; safetensors + JSON in one folder, one URI.

Nothing is unpickled. Both files of settings are written last, and name the sha256 of every other file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from tsq_ray import storage
from tsq_ray.config import DecodeConfig, EncodersConfig, ModelConfig, SamplerConfig
from tsq_ray.encoders import NUM_OBJECTS, FrameEncoder, create_network, load_weights, split_network
from tsq_ray.errors import ModelError, StorageError
from tsq_ray.model import TSQNet, TSQShape

BUNDLE_FILE = "bundle.json"
CLASSIFIER_FILE = "finetune.json"
CURVES_FILE = "curves.csv"
"""Losses of each epoch of the training, beside the bundle."""
FORMAT = 1
Task = Literal["single", "multi"]


@dataclass(frozen=True)
class Classifier:
    """`finetune`'s output: a backbone with a head over `classes`, its preprocessing and where it came from."""

    encoder: FrameEncoder
    classes: list[str]
    task: Task
    role: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """All that scoring needs: `encoder` has the frame head, `objects` and `vocabulary` [1000, Dt] are None for a VQM-only bundle."""

    classes: list[str]
    task: Task
    decode: DecodeConfig
    encoders: EncodersConfig
    sampler_defaults: SamplerConfig
    sampler: TSQNet
    encoder: FrameEncoder
    objects: FrameEncoder | None
    vocabulary: Tensor | None
    recognizer: FrameEncoder | None
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


def save_classifier(classifier: Classifier, uri: str) -> None:
    """Write a classifier folder: model.safetensors (backbone.*, head.*), then finetune.json."""
    content = {
        "format": FORMAT,
        "role": classifier.role,
        "classes": classifier.classes,
        "task": classifier.task,
        "model": classifier.encoder.config.model_dump(mode="json"),
        "backbone_sha256": classifier.encoder.backbone_hash(),
        "provenance": classifier.provenance,
    }
    _write_folder(uri, CLASSIFIER_FILE, content, {"model": _encoder_state(classifier.encoder)})


def load_classifier(uri: str) -> Classifier:
    """Read a classifier folder. ModelError where it is missing, damaged or of an unknown format."""
    uri = storage.normalize(uri)
    content, _ = read_classifier_settings(uri)
    classes = list(content["classes"])
    encoder = _restore_encoder(uri, content, "model", ModelConfig.model_validate(content["model"]), len(classes))
    return Classifier(encoder, classes, content["task"], content["role"], content["provenance"])


def save_bundle(bundle: Bundle, uri: str) -> None:
    """Write a bundle folder, bundle.json last."""
    states: dict[str, Mapping[str, Tensor]] = {"sampler": bundle.sampler.state_dict(), "encoder": _encoder_state(bundle.encoder)}
    if bundle.objects is not None:
        states["objects"] = _encoder_state(bundle.objects)
    if bundle.vocabulary is not None:
        states["text"] = {"vocabulary": bundle.vocabulary}
    if bundle.recognizer is not None:
        states["recognizer"] = _encoder_state(bundle.recognizer)
    content = {
        "format": FORMAT,
        "classes": bundle.classes,
        "task": bundle.task,
        "config": {
            "decode": bundle.decode.model_dump(mode="json"),
            "encoders": bundle.encoders.model_dump(mode="json"),
            "recognizer": bundle.recognizer.config.model_dump(mode="json") if bundle.recognizer else None,
            "sampler": bundle.sampler_defaults.model_dump(mode="json"),
        },
        "sampler_shape": asdict(bundle.sampler.shape),
        "provenance": bundle.provenance,
    }
    _write_folder(uri, BUNDLE_FILE, content, states)


def load_bundle(uri: str) -> Bundle:
    """Read a bundle folder, networks in eval mode on the CPU. ModelError where it is missing, damaged or of an unknown format."""
    uri = storage.normalize(uri)
    content, digest = read_bundle_settings(uri)
    config = content["config"]
    encoders = EncodersConfig.model_validate(config["encoders"])
    sampler = TSQNet(TSQShape(**content["sampler_shape"]))
    _load_into(sampler, uri, content, "sampler")
    classes = list(content["classes"])
    with_text = "objects" in content["files"]
    recognizer = None
    if config["recognizer"] is not None:
        recognizer = _restore_encoder(uri, content, "recognizer", ModelConfig.model_validate(config["recognizer"]), len(classes))
    return Bundle(
        classes=classes,
        task=content["task"],
        decode=DecodeConfig.model_validate(config["decode"]),
        encoders=encoders,
        sampler_defaults=SamplerConfig.model_validate(config["sampler"]),
        sampler=sampler.eval().requires_grad_(False),
        encoder=_restore_encoder(uri, content, "encoder", encoders.visual, len(classes)),
        objects=_restore_encoder(uri, content, "objects", encoders.objects, NUM_OBJECTS) if with_text else None,
        vocabulary=_read_file(uri, content, "text")["vocabulary"] if with_text else None,
        recognizer=recognizer,
        provenance=content["provenance"],
        sha256=digest,
    )


def read_bundle_settings(uri: str) -> tuple[dict[str, Any], str]:
    """bundle.json and its sha256, which is the identity of the whole bundle since it names the hash of each file."""
    return _read_settings(storage.normalize(uri), BUNDLE_FILE, "what tsq train wrote with --out")


def read_classifier_settings(uri: str) -> tuple[dict[str, Any], str]:
    """finetune.json and its sha256, which names the hash of the weights too."""
    return _read_settings(storage.normalize(uri), CLASSIFIER_FILE, "what tsq finetune wrote with --out")


def is_bundle(uri: str) -> bool:
    """Whether `uri` is a bundle folder."""
    return storage.exists(storage.join(storage.normalize(uri), BUNDLE_FILE))


def write_curves(uri: str, curve: Sequence[Mapping[str, float]]) -> None:
    """Put the losses of each epoch beside a bundle or a classifier; what an epoch lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in curve for name in row)))
    writer.writeheader()
    writer.writerows(curve)
    storage.write_bytes(storage.join(storage.normalize(uri), CURVES_FILE), text.getvalue().encode())


def read_curves(uri: str) -> list[dict[str, float]]:
    """The losses of each epoch, from beside the bundle; no rows where they are not there."""
    try:
        text = storage.read_text(storage.join(storage.normalize(uri), CURVES_FILE))
    except StorageError as error:
        if error.error_type == "not_found":
            return []
        raise
    return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


def class_order(have: Sequence[str], want: Sequence[str], what: str) -> None:
    """ModelError unless two class lists are equal, order included."""
    if list(have) == list(want):
        return
    extra, missing = sorted(set(have) - set(want)), sorted(set(want) - set(have))
    if not extra and not missing:
        detail = "the same names in another order"
    else:
        detail = f"{len(have)} classes against {len(want)}" + "".join(
            f"; {word} {names[0]!r}" for word, names in (("unknown", extra), ("missing", missing)) if names
        )
    raise ModelError(f"{what}: its class list differs from the features' ({detail}); make both from manifests with the same --classes FILE")


def _encoder_state(encoder: FrameEncoder) -> dict[str, Tensor]:
    state = {f"backbone.{key}": value for key, value in encoder.backbone.state_dict().items()}
    if encoder.head is not None:
        state |= {f"head.{key}": value for key, value in encoder.head.state_dict().items()}
    return state


def _write_folder(uri: str, settings_name: str, content: dict[str, Any], states: Mapping[str, Mapping[str, Tensor]]) -> None:
    uri = storage.normalize(uri)
    content["files"] = {}
    # without its settings file a folder is no bundle: nobody loads a mixture of old and new files
    storage.remove(storage.join(uri, settings_name))
    for name, state in states.items():
        data = save_safetensors({key: value.detach().cpu().contiguous() for key, value in state.items()})
        storage.write_bytes(storage.join(uri, f"{name}.safetensors"), data)
        content["files"][name] = storage.sha256_of(data)
    storage.write_bytes(storage.join(uri, settings_name), (json.dumps(content, indent=1, default=str) + "\n").encode())


def _read_settings(uri: str, name: str, what: str) -> tuple[dict[str, Any], str]:
    try:
        data = storage.read_bytes(storage.join(uri, name))
    except StorageError as error:
        if error.error_type == "not_found":
            raise ModelError(f"{storage.redact(uri)}: has no {name}; name {what}") from None
        raise
    try:
        content = json.loads(data)
    except ValueError:
        raise ModelError(f"{storage.redact(uri)}/{name}: not JSON; the file is damaged") from None
    if content.get("format") != FORMAT:
        raise ModelError(f"{storage.redact(uri)}: {name} has format {content.get('format')!r}; this version reads {FORMAT}")
    return content, storage.sha256_of(data)


def _read_file(uri: str, content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    place = storage.join(uri, f"{name}.safetensors")
    try:
        data = storage.read_bytes(place)
    except StorageError as error:
        if error.error_type == "not_found":
            raise ModelError(f"{storage.redact(place)}: missing; the folder is not whole, copy or train it again") from None
        raise
    if storage.sha256_of(data) != content["files"][name]:
        raise ModelError(f"{storage.redact(place)}: its content is not what was written (sha256 differs); copy or train it again")
    try:
        return load_safetensors(data)
    except SafetensorError as error:
        raise ModelError(f"{storage.redact(place)}: not readable as safetensors ({error})") from None


def _load_into(network: nn.Module, uri: str, content: Mapping[str, Any], name: str) -> None:
    load_weights(network, _read_file(uri, content, name), f"{storage.redact(uri)}/{name}.safetensors")


def _restore_encoder(uri: str, content: Mapping[str, Any], name: str, config: ModelConfig, num_classes: int) -> FrameEncoder:
    encoder = split_network(config, create_network(config, num_classes), with_head=False)
    state = _read_file(uri, content, name)
    what = f"{storage.redact(uri)}/{name}.safetensors"
    load_weights(encoder.backbone, _below(state, "backbone."), what)
    head_state = _below(state, "head.")
    if head_state:
        encoder.head = linear_head(encoder.dim, num_classes, head_state, what)
    return encoder.eval().requires_grad_(False)


def linear_head(dim: int, num_classes: int, state: Mapping[str, Tensor] | None = None, what: str = "head") -> nn.Linear:
    """A classifier over pooled features [N, dim] -> [N, num_classes], from a state dict where one is given."""
    head = nn.Linear(dim, num_classes)
    if state is not None:
        load_weights(head, state, what)
    return head


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
