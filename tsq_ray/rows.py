"""The pictures that a run needs from the decoder, and its results as output rows; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from tsq_ray import storage
from tsq_ray.config import LEARNED_MODES, TSQ_MODES, EncodersConfig, ModelConfig
from tsq_ray.decode import Centre, DecodedVideo, FrameSpec, with_whole_frames
from tsq_ray.errors import Failure
from tsq_ray.manifest import VideoRef
from tsq_ray.schema import TOKENS, TOP_LABELS
from tsq_ray.storage import StoredFile

Row = dict[str, Any]
"""Values of one row of features or predictions, by column."""

VISUAL, OBJECTS, RECOGNIZER = "visual", "objects", "recognizer"
"""The pictures that a single decode can make of each frame, one per network."""


def frame_spec(config: ModelConfig) -> FrameSpec:
    """Return the spec of the pictures that a network takes or a server receives."""
    if config.kind == "openai":
        return FrameSpec(config.size, "keep")
    centre = centre_of(config.kind) if config.resize_to else "down"
    return FrameSpec(config.size, config.resize, config.interpolation, config.resize_to, centre)


def centre_of(kind: str) -> Centre:
    """Return how a network's library rounds the centre of a crop."""
    return "nearest" if kind == "timm" else "down"


def picture_specs(
    encoders: EncodersConfig,
    with_objects: bool,
    recognizer: ModelConfig | None,
    mode: str,
    native_size: bool = False,
) -> dict[str, FrameSpec]:
    """Return the specs of exactly the pictures that scoring with `mode` needs.

    Baselines that do not use the sampler's encoders skip their pictures. `native_size`: request
    small frames at their own size, because the networks' device resizes them
    (`ResourcesConfig.resizes_on_device`).
    """
    specs = {}
    if mode in LEARNED_MODES:
        specs[VISUAL] = frame_spec(encoders.visual)
    if mode in TSQ_MODES and with_objects and mode != "visual":
        specs[OBJECTS] = frame_spec(encoders.objects)
    if recognizer is not None:
        specs[RECOGNIZER] = frame_spec(recognizer)
    return with_whole_frames(specs) if native_size else specs


def identity_row(ref: VideoRef) -> Row:
    """Return a row's manifest columns."""
    return {**asdict(ref), "labels": list(ref.labels) if ref.labels is not None else None}


def failed_row(ref: VideoRef, error: Failure) -> Row:
    """Return the output row of a video that cannot be used."""
    return {**identity_row(ref), **failure_columns(error)}


def failure_columns(error: Failure) -> Row:
    """Return the status and error columns of a video that cannot be used."""
    message = storage.redact(" ".join(str(error).split()))[:500]
    return {
        "status": "failed",
        "error_type": error.error_type,
        "error_message": message,
        "warnings": [],
    }


def source_columns(video: DecodedVideo) -> Row:
    """Return the columns that features and predictions share for a video whose status is ok.

    The manifest's columns are not included.
    """
    names = (
        "duration_s",
        "fps",
        "width",
        "height",
        "codec",
        "source_num_frames",
        "frame_pts_s",
        "warnings",
    )
    return {"status": "ok", **{name: getattr(video, name) for name in names}}


@dataclass(frozen=True)
class Answer:
    """The result of scoring one video: prediction columns without the manifest's, or an error."""

    columns: Row = field(default_factory=dict)
    error: Failure | None = None
    version: str = ""
    """Version of the stages that made it: bundle and settings, as in `serving.graph`."""
    file: StoredFile | None = None
    """What storage said about a video that the endpoint fetched."""
    fetched_bytes: int = 0
    """As in DecodedVideo; 0 if the endpoint fetched it."""


def prediction_row(ref: VideoRef, answer: Answer) -> Row:
    """Return the prediction row of a manifest's video; a failed one keeps its token counts."""
    if answer.error is None:
        return {**identity_row(ref), **answer.columns}
    names = [column.name for column in TOKENS if column.name in answer.columns]
    tokens = {name: answer.columns[name] for name in names}
    return failed_row(ref, answer.error) | tokens


def best_labels(scores: np.ndarray, classes: Sequence[str], count: int = TOP_LABELS) -> Row:
    """Return the prediction columns of the `count` best classes; `scores` is [C]."""
    best = np.argsort(-scores, kind="stable")[:count]
    return {"top_labels": [classes[number] for number in best], "top_scores": scores[best]}


def selection_columns(
    slots: np.ndarray, selected_by: Sequence[str], frame_index: np.ndarray, frame_pts_s: np.ndarray
) -> Row:
    """Return the prediction columns that describe the chosen slots, which ascend."""
    return {
        "selected_slot": slots,
        "selected_index": frame_index[slots],
        "selected_pts_s": frame_pts_s[slots],
        "selected_by": list(selected_by),
    }


def num_recognized(num_frames: int, selected_by: Sequence[str]) -> int:
    """Return how many of a video's frames the recogniser saw: in mode `maxconf` all of them."""
    return num_frames if "maxconf" in selected_by else len(selected_by)


def plain_row(row: Mapping[str, Any]) -> Row:
    """Return a prediction row as JSON values.

    The manifest's labels and split and the queries of presigned URLs are left out.
    """
    plain: Row = {}
    for name, value in row.items():
        if name in ("labels", "label_names", "split"):
            continue
        if isinstance(value, (np.ndarray, np.generic)):
            value = value.tolist()
        plain[name] = storage.redact(value) if isinstance(value, str) else value
    return json.loads(json.dumps(plain, default=_json_value))


def _json_value(value: Any) -> str:
    """Return a value that JSON lacks as text: a time in ISO 8601."""
    return value.isoformat() if isinstance(value, datetime) else str(value)
