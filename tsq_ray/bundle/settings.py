"""Files of a trained artifact (`finetune`'s classifier or `train`'s bundle), without torch.

Settings, hashes and loss curves. The settings file is written last and holds the sha256 of every
weights file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tsq_ray import storage
from tsq_ray.asking.questions import ServerModel
from tsq_ray.config import LEARNED_MODES, Config, RecognizerConfig
from tsq_ray.errors import ModelError, StorageError
from tsq_ray.provenance import check_format
from tsq_ray.runs.folder import read_json, write_json

BUNDLE_FILE = "bundle.json"
CLASSIFIER_FILE = "finetune.json"
CURVES_FILE = "curves.csv"
"""Losses of each training epoch, stored in the artifact's folder."""
AGREEMENT_FILE = "agreement.json"
"""Agreement with the dense recogniser on held-out videos, stored in a bundle's folder."""
FORMAT, FEWER_CLASSES_FORMAT, SERVER_FORMAT = 1, 2, 3
"""FEWER_CLASSES_FORMAT: a bundle whose sampler has queries for only some of the classes, or none.
SERVER_FORMAT: an artifact whose recogniser is behind a server."""
NO_RECOGNIZER = (
    "the bundle has no recogniser; train it again with --recognizer URI "
    "(from tsq finetune --role recognizer)"
)

NO_TEXTUAL_MODULE = (
    "sampler.mode 'textual': the bundle was trained with train.modules = 'visual'; "
    "use 'visual' or a baseline"
)

NOT_TAUGHT = (
    "the bundle's sampler was not taught, because the sample of tsq label had too few videos or "
    "classes; use sampler.mode = 'uniform', 'random' or 'maxconf'"
)


def read_bundle_settings(uri: str) -> tuple[dict[str, Any], str]:
    """Read bundle.json; return its content and its sha256.

    The sha256 identifies the whole bundle, because bundle.json holds the hash of every weights
    file. Raises ModelError.
    """
    return _read_settings(storage.normalize(uri), BUNDLE_FILE, "what tsq train wrote with --out")


def read_classifier_settings(uri: str) -> tuple[dict[str, Any], str]:
    """Read finetune.json; return its content and its sha256, which covers the weights' hash too.

    Raises ModelError.
    """
    return _read_settings(
        storage.normalize(uri), CLASSIFIER_FILE, "what tsq finetune or import wrote with --out"
    )


def check_bundle(uri: str, mode: str) -> None:
    """Check, without torch, that a bundle can score with sampler `mode`; reads all its files.

    Raises ModelError if one is damaged or missing, or if the bundle cannot score.
    """
    content, _ = read_bundle_settings(uri)
    if recognizer_of(content) is None:
        raise ModelError(NO_RECOGNIZER)
    check_mode(content, mode)
    for name in content["files"]:
        read_checked(storage.normalize(uri), content, name)


def check_mode(content: Mapping[str, Any], mode: str) -> None:
    """Raise ModelError if a bundle lacks what sampler `mode` needs."""
    if mode == "textual" and "objects" not in content["files"]:
        raise ModelError(NO_TEXTUAL_MODULE)
    if content.get("sampler_classes") == [] and mode in LEARNED_MODES:
        raise ModelError(NOT_TAUGHT)


def recognizer_of(content: Mapping[str, Any]) -> RecognizerConfig | None:
    """Return the settings of a bundle's recogniser; None if it has none."""
    settings = content["config"]["recognizer"]
    return RecognizerConfig.model_validate(settings) if settings is not None else None


def server_of(content: Mapping[str, Any], config: Config | None = None) -> ServerModel | None:
    """Return the recogniser of a bundle if it is behind a server.

    `config`: settings of a scoring run, which may use the server differently.
    """
    own = recognizer_of(content)
    if own is None or own.kind != "openai":
        return None
    return ServerModel(
        config.recognizer if config is not None else own, tuple(content["classes"]), content["task"]
    )


def read_server(uri: str, config: RecognizerConfig | None = None) -> ServerModel | None:
    """Return the classifier at `uri` if it is behind a server. Raises ModelError.

    `config`: its settings in a run, which may use the server differently.
    """
    content, _ = read_classifier_settings(uri)
    if content["model"].get("kind") != "openai":  # older classifiers have no kind
        return None
    config = config or RecognizerConfig.model_validate(content["model"])
    return ServerModel(config, tuple(content["classes"]), content["task"])


def is_bundle(uri: str) -> bool:
    """Return whether `uri` is a bundle folder."""
    return storage.exists(storage.join(storage.normalize(uri), BUNDLE_FILE))


def write_curves(uri: str, curve: Sequence[Mapping[str, float]]) -> None:
    """Write the losses of each epoch into the folder of a bundle or a classifier.

    Values that an epoch lacks stay empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(name for row in curve for name in row))
    )
    writer.writeheader()
    writer.writerows(curve)
    storage.write_bytes(storage.join(storage.normalize(uri), CURVES_FILE), text.getvalue().encode())


def read_curves(uri: str) -> list[dict[str, float]]:
    """Read the losses of each epoch from an artifact's folder; empty if it has none."""
    try:
        text = storage.read_text(storage.join(storage.normalize(uri), CURVES_FILE))
    except StorageError as error:
        if error.error_type == "not_found":
            return []
        raise
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(io.StringIO(text))
    ]


def write_agreement(uri: str, agreement: Mapping[str, Any]) -> None:
    """Write what `tsq label` measured on held-out videos into the folder of a bundle."""
    write_json(storage.join(storage.normalize(uri), AGREEMENT_FILE), agreement)


def read_agreement(uri: str) -> dict[str, Any] | None:
    """Read what `write_agreement` wrote; None if the bundle has none."""
    return read_json(storage.join(storage.normalize(uri), AGREEMENT_FILE))


def with_choice(
    content: Mapping[str, Any], chosen: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Return the content of bundle.json with `chosen` as its sampler's mode and budget, and its
    sha256."""
    sampler = content["config"]["sampler"] | {name: chosen[name] for name in ("mode", "budget")}
    changed = {**content, "config": content["config"] | {"sampler": sampler}}
    return changed, storage.sha256_of(_settings_bytes(changed))


def write_settings(uri: str, name: str, content: Mapping[str, Any]) -> None:
    """Write the settings file `name` of an artifact's folder."""
    storage.write_bytes(storage.join(storage.normalize(uri), name), _settings_bytes(content))


def _settings_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, default=str) + "\n").encode()


def check_class_order(have: Sequence[str], want: Sequence[str], what: str) -> None:
    """Raise ModelError unless two class lists are equal, order included."""
    if list(have) == list(want):
        return
    extra, missing = sorted(set(have) - set(want)), sorted(set(want) - set(have))
    if not extra and not missing:
        detail = "the same names in another order"
    else:
        detail = f"{len(have)} classes against {len(want)}" + "".join(
            f"; {word} {names[0]!r}"
            for word, names in (("unknown", extra), ("missing", missing))
            if names
        )
    raise ModelError(
        f"{what}: its class list differs from the features' ({detail}); "
        "make both from manifests with the same --classes FILE"
    )


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
    check_format(content, SERVER_FORMAT, f"{storage.redact(uri)}: {name}", ModelError)
    return content, storage.sha256_of(data)


def read_checked(uri: str, content: Mapping[str, Any], name: str) -> bytes:
    """Read a weights file. Raises ModelError if it is missing or its sha256 differs."""
    place = storage.join(uri, f"{name}.safetensors")
    try:
        data = storage.read_bytes(place)
    except StorageError as error:
        if error.error_type == "not_found":
            raise ModelError(
                f"{storage.redact(place)}: missing; the folder is incomplete, "
                "copy or train it again"
            ) from None
        raise
    if storage.sha256_of(data) != content["files"][name]:
        raise ModelError(
            f"{storage.redact(place)}: its content is not what was written (sha256 differs); "
            "copy or train it again"
        )
    return data
