"""The files of a trained artifact, `finetune`'s classifier or `train`'s bundle: settings, hashes, curves. No network, and no torch.

Both files of settings are written last, and name the sha256 of every other file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tsq_ray import storage
from tsq_ray.errors import ModelError, StorageError

BUNDLE_FILE = "bundle.json"
CLASSIFIER_FILE = "finetune.json"
CURVES_FILE = "curves.csv"
"""Losses of each epoch of the training, beside the bundle."""
FORMAT = 1
NO_RECOGNIZER = "the bundle has no recogniser; train it again with --recognizer URI (from tsq finetune --role recognizer)"


def read_bundle_settings(uri: str) -> tuple[dict[str, Any], str]:
    """bundle.json and its sha256, which is the identity of the whole bundle since it names the hash of each file."""
    return _read_settings(storage.normalize(uri), BUNDLE_FILE, "what tsq train wrote with --out")


def read_classifier_settings(uri: str) -> tuple[dict[str, Any], str]:
    """finetune.json and its sha256, which names the hash of the weights too."""
    return _read_settings(
        storage.normalize(uri), CLASSIFIER_FILE, "what tsq finetune wrote with --out"
    )


def is_bundle(uri: str) -> bool:
    """Whether `uri` is a bundle folder."""
    return storage.exists(storage.join(storage.normalize(uri), BUNDLE_FILE))


def write_curves(uri: str, curve: Sequence[Mapping[str, float]]) -> None:
    """Put the losses of each epoch beside a bundle or a classifier; what an epoch lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(name for row in curve for name in row))
    )
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
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(io.StringIO(text))
    ]


def class_order(have: Sequence[str], want: Sequence[str], what: str) -> None:
    """ModelError unless two class lists are equal, order included."""
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
        f"{what}: its class list differs from the features' ({detail}); make both from manifests with the same --classes FILE"
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
    if content.get("format") != FORMAT:
        raise ModelError(
            f"{storage.redact(uri)}: {name} has format {content.get('format')!r}; this version reads {FORMAT}"
        )
    return content, storage.sha256_of(data)


def read_checked(uri: str, content: Mapping[str, Any], name: str) -> bytes:
    """A file of weights, as it was written. ModelError where it is missing or damaged."""
    place = storage.join(uri, f"{name}.safetensors")
    try:
        data = storage.read_bytes(place)
    except StorageError as error:
        if error.error_type == "not_found":
            raise ModelError(
                f"{storage.redact(place)}: missing; the folder is not whole, copy or train it again"
            ) from None
        raise
    if storage.sha256_of(data) != content["files"][name]:
        raise ModelError(
            f"{storage.redact(place)}: its content is not what was written (sha256 differs); copy or train it again"
        )
    return data
