"""Rows on their way: what a manifest row asks of the decoder, and what becomes of it. No network, and no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tsq_ray import storage
from tsq_ray.config import TSQ_MODES, EncodersConfig, ModelConfig
from tsq_ray.decode import DecodedVideo, FrameSpec, VideoSource, with_whole_frames
from tsq_ray.errors import StorageError, VideoError
from tsq_ray.manifest import VideoRef

VISUAL, OBJECTS, RECOGNIZER = "visual", "objects", "recognizer"
"""The three pictures that one decode makes of each frame."""


def frame_spec(config: ModelConfig) -> FrameSpec:
    """The picture a network wants."""
    return FrameSpec(config.size, config.resize, config.interpolation)


def picture_specs(
    encoders: EncodersConfig,
    with_objects: bool,
    recognizer: ModelConfig | None,
    mode: str,
    native_size: bool = False,
) -> dict[str, FrameSpec]:
    """The pictures that scoring with `mode` needs, and no others: baselines leave the sampler's encoders out.

    `native_size`: where frames are small, these as they are instead, since the networks' device resizes (`ResourcesConfig.resizes_on_device`).
    """
    specs = {}
    if mode in (*TSQ_MODES, "maxconf-l"):
        specs[VISUAL] = frame_spec(encoders.visual)
    if mode in TSQ_MODES and with_objects and mode != "visual":
        specs[OBJECTS] = frame_spec(encoders.objects)
    if recognizer is not None:
        specs[RECOGNIZER] = frame_spec(recognizer)
    return with_whole_frames(specs) if native_size else specs


def identity_row(ref: VideoRef) -> dict[str, Any]:
    """The manifest's columns of a row."""
    return {**asdict(ref), "labels": list(ref.labels) if ref.labels is not None else None}


def failed_row(ref: VideoRef, error: VideoError | StorageError) -> dict[str, Any]:
    """The row of a video that cannot be used."""
    return {**identity_row(ref), **failure_columns(error)}


def failure_columns(error: VideoError | StorageError) -> dict[str, Any]:
    """What a row says of a video that cannot be used."""
    message = storage.redact(" ".join(str(error).split()))[:500]
    return {
        "status": "failed",
        "error_type": error.error_type,
        "error_message": message,
        "warnings": [],
    }


def source_columns(video: DecodedVideo) -> dict[str, Any]:
    """The columns that features and predictions share for a video that is ok, without the manifest's."""
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
    """What scoring says of one video: the prediction's columns without the manifest's, or why there are none."""

    columns: dict[str, Any] = field(default_factory=dict)
    error: VideoError | StorageError | None = None
    version: str = ""
    """Of the stages that made it: bundle and settings, as in `serve.graph`."""


def prediction_row(ref: VideoRef, answer: Answer) -> dict[str, Any]:
    """The prediction row of a manifest's video."""
    return (
        failed_row(ref, answer.error)
        if answer.error is not None
        else {**identity_row(ref), **answer.columns}
    )


def source_of(ref: VideoRef) -> VideoSource:
    """What decode needs of a manifest row."""
    return VideoSource(ref.uri, ref.size_bytes, ref.etag, ref.modified)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction row as JSON values; the manifest's labels and the queries of presigned URLs are left out."""
    plain: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("labels", "label_names", "split"):
            continue
        if isinstance(value, (np.ndarray, np.generic)):
            value = value.tolist()
        plain[name] = storage.redact(value) if isinstance(value, str) else value
    return json.loads(json.dumps(plain, default=str))
