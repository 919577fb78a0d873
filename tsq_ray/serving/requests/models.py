"""The endpoint's requests and answers, as pydantic models.

The answer's fields are the prediction columns of schema.py, so that Parquet, the answer and the
OpenAPI document agree.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, cast

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, Json, create_model

from tsq_ray.errors import ErrorType
from tsq_ray.schema import PREDICTIONS, SERVER, TOP_LABELS, Column

OMITTED = frozenset({"labels", "split", "label_names", "error_type", "error_message"})
"""Prediction columns that answers leave out."""


class Options(BaseModel):
    """What a request may ask for."""

    model_config = ConfigDict(extra="forbid")

    k: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="most frames to choose; default: the endpoint's budget"
    )
    top: Annotated[int, Field(ge=1)] = Field(
        default=TOP_LABELS, description="number of best classes"
    )
    scores: bool = Field(default=True, description="whether to return the score of every class")
    frames: bool = Field(default=False, description="whether to return the chosen frames as JPEG")


class UriRequest(Options):
    """A video that the endpoint reads itself."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"uri": "s3://BUCKET/videos/clip.mp4", "k": 4, "scores": False}]
        },
    )

    uri: str = Field(min_length=1, max_length=4096, description="below an allowed prefix")


class Frame(BaseModel):
    """A chosen frame."""

    index: int = Field(description="index in the source, in frames")
    seconds: float = Field(description="presentation time, in seconds")
    jpeg: str = Field(description="the picture that the recogniser saw, as base64 JPEG")


_PLAIN: dict[pa.DataType, Any] = {
    pa.string(): str,
    pa.int16(): int,
    pa.int32(): int,
    pa.int64(): int,
    pa.float16(): float,
    pa.float32(): float,
    pa.float64(): float,
}


def _python_type(column: Column) -> Any:
    kind = column.type
    inner = kind.value_type if pa.types.is_list(kind) else kind
    found = datetime if pa.types.is_timestamp(inner) else _PLAIN[inner]
    # a tensor column may be absent: saliency without that module, scores that were not requested
    whole = list[found] if pa.types.is_list(kind) or column.dims else found  # type: ignore[valid-type]
    return whole | None if column.nullable or column.dims else whole


def _field(column: Column) -> Any:
    described = column.doc + (f", in {column.unit}" if column.unit else "")
    if column.name == "status":
        return Literal["ok"], Field(description="always ok; a failed video is a Problem")
    optional = column.nullable or column.dims
    default: Any = None if optional else ...
    return _python_type(column), Field(default, description=described)


_FIELDS: dict[str, Any] = {
    column.name: _field(column) for column in (*PREDICTIONS, *SERVER) if column.name not in OMITTED
}
_EXAMPLE: dict[str, Any] = {
    "model": "3b1f" * 16,
    "video_id": "9f2c4a1b7d3e5f60",
    "uri": "s3://BUCKET/videos/clip.mp4",
    "size_bytes": 482113,
    "status": "ok",
    "warnings": [],
    "duration_s": 20.0,
    "fps": 25.0,
    "width": 320,
    "height": 240,
    "codec": "h264",
    "source_num_frames": 500,
    "frame_pts_s": [2.5, 7.5, 12.5, 17.5],
    "top_labels": ["surfing", "sailing"],
    "top_scores": [0.91, 0.06],
    "selected_slot": [1, 3],
    "selected_index": [187, 437],
    "selected_pts_s": [7.5, 17.5],
    "selected_by": ["visual", "textual"],
    "saliency_visual": [0.1, 0.6, 0.2, 0.1],
    "saliency_textual": [0.1, 0.2, 0.2, 0.5],
    "decode_ms": 310.0,
    "sample_ms": 120.0,
    "recognize_ms": 95.0,
}
Prediction = cast(
    type[BaseModel],
    create_model(
        "Prediction",
        __doc__="The prediction of one video: its row, the model, and the frames if requested.",
        __config__=ConfigDict(json_schema_extra={"examples": [_EXAMPLE]}),
        model=(str, Field(description="SHA-256 of the bundle that made the prediction")),
        frames=(
            list[Frame] | None,
            Field(default=None, description="the chosen frames, in time order"),
        ),
        **_FIELDS,
    ),
)


class Problem(BaseModel):
    """Why no prediction was made (RFC 9457)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:tsq-ray:truncated",
                    "title": "Unprocessable Content",
                    "status": 422,
                    "detail": "s3://BUCKET/videos/cut.mp4: the file is cut off",
                    "request_id": "7c2f1c1e-8a55-4f0e-9d0c-0a7b2f1f6d31",
                    "error_type": "truncated",
                    "video": {"video_id": "9f2c4a1b7d3e5f60", "uri": "s3://BUCKET/videos/cut.mp4"},
                }
            ]
        }
    )

    type: str = Field(description="about:blank, or urn:tsq-ray:ERROR_TYPE for a video that failed")
    title: str
    status: int = Field(description="the HTTP status")
    detail: str
    request_id: str = Field(description="the id in the endpoint's log and in x-request-id")
    error_type: ErrorType | None = Field(default=None, description="why the video cannot be used")
    video: dict[str, Any] | None = Field(default=None, description="the video that failed")


class ModelCard(BaseModel):
    """A served model."""

    id: str = Field(description="SHA-256 of the bundle")
    task: Literal["single", "multi"]
    classes: list[str]
    num_frames: int = Field(description="T, the frames that the sampler looks at")
    budget: int | Literal["adaptive"] = Field(description="K, the frames chosen by default")
    mode: str = Field(description="how frames are chosen")
    clip_frames: int = Field(
        description="frames that the recogniser takes at once; K is a multiple of it"
    )


class ModelList(BaseModel):
    """The served models."""

    models: list[ModelCard]


class Health(BaseModel):
    """Health of the endpoint: alive, or ready."""

    status: Literal["ok"]


class BatchOptions(BaseModel):
    """Options of a batch."""

    model_config = ConfigDict(extra="forbid")

    metadata: dict[str, str] = Field(
        default={}, max_length=16, description="returned with the batch"
    )
    webhook: str | None = Field(default=None, description="a URL to call when the batch has ended")


class LinesOptions(BatchOptions):
    """Options in the query, for a batch of JSON lines."""

    metadata: Json[Annotated[dict[str, str], Field(max_length=16)]] = Field(
        default={}, description="a JSON object, returned with the batch"
    )


class BatchRequest(BatchOptions):
    """A batch over a manifest."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"manifest": "s3://BUCKET/manifest.parquet"}]},
    )

    manifest: str = Field(min_length=1, max_length=4096, description="below an allowed prefix")


class BatchLine(BaseModel):
    """One line of a batch that is sent as JSON lines."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"custom_id": "clip-1", "uri": "s3://BUCKET/videos/clip.mp4"}]
        },
    )

    custom_id: str = Field(min_length=1, max_length=512, description="returned with the answer")
    uri: str = Field(min_length=1, max_length=4096, description="below an allowed prefix")


class RequestCounts(BaseModel):
    """The number of videos of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


BatchStatus = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "cancelling",
    "cancelled",
]


class Batch(BaseModel):
    """A batch, in the shape of OpenAI's; times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    status: BatchStatus = "validating"
    model: str = Field(description="SHA-256 of the bundle")
    input_uri: str = Field(description="the manifest: the client's, or made from the lines")
    predictions_uri: str = Field(description="the run folder, as `tsq score` writes it")
    output_uri: str | None = Field(
        default=None, description="JSON lines of the answers, once completed"
    )
    error_uri: str | None = Field(default=None, description="JSON lines of the failed videos")
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] = {}
    errors: list[str] = Field(default=[], description="why the batch failed")
    problems: list[str] | None = Field(
        default=None, description="what `tsq verify` finds, if requested; empty if the rows add up"
    )
    created_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")


class BatchList(BaseModel):
    """Batches, newest first."""

    object: Literal["list"] = "list"
    data: list[Batch]
    has_more: bool
