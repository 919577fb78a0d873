"""Column names and Arrow schemas: the contract between the stages.

docs/data-format.md is generated from this module. Dimensions: T frames per video, K chosen frames,
C classes, d components of a frame's visual feature, n objects per frame.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

TOP_OBJECTS = 10
"""Objects stored per frame; default of encoders.num_objects (paper, table 9: top 10)."""
TOP_LABELS = 5
"""Maximum number of labels in `top_labels`."""
CLASSES_KEY = b"tsq.classes"
"""File metadata: the class names as a JSON list, in label order."""
SHAPES_KEY = b"tsq.shapes"
"""File metadata: the shapes of the tensor columns as JSON, {column: shape}."""
MANIFEST_KEY = b"tsq.manifest"
"""File metadata of a manifest: its sources as JSON, {"id": str, "sources": [str]}."""


@dataclass(frozen=True)
class Column:
    """One column; `dims` names a tensor's dimensions ("T", "d", "n", "C"), else it is empty."""

    name: str
    type: pa.DataType
    doc: str
    unit: str = ""
    nullable: bool = False
    dims: tuple[str, ...] = ()

    def field(self, sizes: Mapping[str, int]) -> pa.Field:
        """The Arrow field, with each dimension replaced by its size."""
        if not self.dims:
            return pa.field(self.name, self.type, nullable=self.nullable)
        shape = tuple(sizes[dim] for dim in self.dims)
        return pa.field(self.name, pa.fixed_shape_tensor(self.type, shape), nullable=True)


_LABELS = pa.list_(pa.int32())
_STRINGS = pa.list_(pa.string())
_TIMESTAMP = pa.timestamp("us", tz="UTC")

IDENTITY = (
    Column("video_id", pa.string(), "first 16 hex digits of the SHA-256 of the normalised URI"),
    Column("uri", pa.string(), "absolute path or s3:// URI"),
    Column("size_bytes", pa.int64(), "file size", "bytes"),
    Column("etag", pa.string(), "entity tag from the object store", nullable=True),
    Column("modified", _TIMESTAMP, "time of last modification", "UTC", nullable=True),
    Column("labels", _LABELS, "indices into tsq.classes; null if unlabelled", nullable=True),
    Column("split", pa.string(), "dataset split, for example train or val", nullable=True),
)
MANIFEST = IDENTITY

STATUS = (
    Column("status", pa.string(), '"ok" or "failed"'),
    Column(
        "error_type",
        pa.string(),
        "reason for the failure, one of the closed list in errors.py",
        nullable=True,
    ),
    Column("error_message", pa.string(), "details of the failure, one line", nullable=True),
    Column("warnings", _STRINGS, "anything missing or odd in a video whose status is ok"),
)
SOURCE = (
    Column(
        "duration_s",
        pa.float64(),
        "duration of the frames that exist, from first start to last end",
        "seconds",
        nullable=True,
    ),
    Column("fps", pa.float64(), "average frame rate", "frames/second", nullable=True),
    Column("width", pa.int32(), "displayed width, after rotation", "pixels", nullable=True),
    Column("height", pa.int32(), "displayed height, after rotation", "pixels", nullable=True),
    Column("codec", pa.string(), "FFmpeg's codec name", nullable=True),
    Column(
        "source_num_frames",
        pa.int64(),
        "number of frames that exist in the file",
        "frames",
        nullable=True,
    ),
)
FRAME_INDEX = Column(
    "frame_index", pa.int32(), "index of each of the T frames in the source", "frames", dims=("T",)
)
FRAME_PTS = Column(
    "frame_pts_s", pa.float32(), "presentation time of each of the T frames", "seconds", dims=("T",)
)

FEATURES = (
    *IDENTITY,
    *STATUS,
    *SOURCE,
    FRAME_INDEX,
    FRAME_PTS,
    Column(
        "visual",
        pa.float16(),
        "pooled feature of each frame, before the classifier",
        dims=("T", "d"),
    ),
    Column(
        "object_ids",
        pa.int16(),
        "ImageNet-1K classes of the n most probable objects, best first",
        dims=("T", "n"),
    ),
    Column(
        "object_probs",
        pa.float16(),
        "softmax probabilities of `object_ids`, not renormalised",
        dims=("T", "n"),
    ),
)
RECOGNIZER_LOGITS = Column(
    "recognizer_logits",
    pa.float16(),
    "the recogniser's logits for each frame (extract --recognizer)",
    dims=("T", "C"),
)

PREDICTIONS = (
    *IDENTITY,
    *STATUS,
    *SOURCE,
    FRAME_PTS,
    Column("label_names", _STRINGS, "names of the labels", nullable=True),
    Column(
        "top_labels",
        _STRINGS,
        "names of the min(5, C) highest-scoring classes, best first",
        nullable=True,
    ),
    Column(
        "top_scores", pa.list_(pa.float32()), "scores of `top_labels`", "probability", nullable=True
    ),
    Column(
        "scores",
        pa.float32(),
        "probability of each class, in the bundle's order (absent with --scores top)",
        "probability",
        dims=("C",),
    ),
    Column(
        "selected_slot",
        pa.list_(pa.int32()),
        "slots (0..T-1) of the chosen frames, at most K, ascending",
        nullable=True,
    ),
    Column(
        "selected_index",
        pa.list_(pa.int32()),
        "indices of the chosen frames in the source",
        "frames",
        nullable=True,
    ),
    Column(
        "selected_pts_s",
        pa.list_(pa.float32()),
        "presentation times of the chosen frames",
        "seconds",
        nullable=True,
    ),
    Column(
        "selected_by",
        _STRINGS,
        'what chose each frame: "visual", "textual", "dpp" or the name of a baseline',
        nullable=True,
    ),
    Column(
        "saliency_visual",
        pa.float32(),
        "saliency of each frame from the visual module; null for baselines",
        dims=("T",),
    ),
    Column(
        "saliency_textual",
        pa.float32(),
        "saliency of each frame from the textual module; null for baselines",
        dims=("T",),
    ),
    Column("decode_ms", pa.float32(), "time to fetch and decode", "milliseconds", nullable=True),
    Column(
        "sample_ms",
        pa.float32(),
        "time to encode and choose frames, this video's share of its batch",
        "milliseconds",
        nullable=True,
    ),
    Column(
        "recognize_ms",
        pa.float32(),
        "time to recognise, this video's share of its batch",
        "milliseconds",
        nullable=True,
    ),
)

TOKENS = (
    Column("tokens_in", pa.int64(), "tokens sent to the recogniser's server", nullable=True),
    Column("tokens_out", pa.int64(), "tokens received from the recogniser's server", nullable=True),
)
"""Columns of features and predictions from a server's recogniser; sums over a video's attempts."""
CAPTION = Column(
    "caption",
    pa.string(),
    "the server's description of the video (recognizer.caption)",
    nullable=True,
)
SERVER = (*TOKENS, CAPTION)
"""Columns of predictions whose recogniser is behind a server."""


def arrow_schema(
    columns: Sequence[Column], sizes: Mapping[str, int], classes: Sequence[str] | None
) -> pa.Schema:
    """The Arrow schema of `columns`; its metadata holds the tensor shapes and the class names."""
    fields = [column.field(sizes) for column in columns]
    shapes = {
        field.name: list(field.type.shape)
        for field in fields
        if isinstance(field.type, pa.FixedShapeTensorType)
    }
    metadata = {
        SHAPES_KEY: json.dumps(shapes).encode(),
        CLASSES_KEY: json.dumps(list(classes or ())).encode(),
    }
    return pa.schema(fields, metadata=metadata)


def manifest_schema(classes: Sequence[str] | None) -> pa.Schema:
    return arrow_schema(MANIFEST, {}, classes)


def features_schema(
    num_frames: int,
    dim: int,
    classes: Sequence[str] | None,
    num_logits: int | None = None,
    num_objects: int = TOP_OBJECTS,
    from_server: bool = False,
) -> pa.Schema:
    """Schema of a features part; `num_logits` (the recogniser's C) adds `recognizer_logits`.

    `from_server`: the recogniser is behind a server.
    """
    columns = FEATURES if num_logits is None else (*FEATURES, RECOGNIZER_LOGITS)
    columns = (*columns, *TOKENS) if from_server else columns
    return arrow_schema(
        columns, {"T": num_frames, "d": dim, "n": num_objects, "C": num_logits or 0}, classes
    )


def predictions_schema(
    num_frames: int,
    num_classes: int,
    classes: Sequence[str] | None,
    with_scores: bool = True,
    from_server: bool = False,
) -> pa.Schema:
    """Schema of a predictions part; `classes` are the manifest's, which `labels` index.

    `from_server`: the recogniser is behind a server.
    """
    columns = tuple(column for column in PREDICTIONS if with_scores or column.name != "scores")
    columns = (*columns, *SERVER) if from_server else columns
    return arrow_schema(columns, {"T": num_frames, "C": num_classes}, classes)


def classes_of(schema: pa.Schema) -> list[str]:
    """The class names in a schema's metadata; empty if it has none."""
    return json.loads((schema.metadata or {}).get(CLASSES_KEY, b"[]"))


def table_from_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Build a table of exactly `schema` from rows.

    A row holds plain values, and numpy arrays for tensors; a missing key or None is null.
    """
    rows = list(rows)
    columns = [_column_array([row.get(field.name) for row in rows], field) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column_array(values: list[Any], field: pa.Field) -> pa.Array:
    if not isinstance(field.type, pa.FixedShapeTensorType):
        return pa.array([_plain(value) for value in values], type=field.type)
    shape, dtype = tuple(field.type.shape), field.type.value_type.to_pandas_dtype()
    size = int(np.prod(shape))
    flat = np.zeros((len(values), size), dtype)
    null = np.array([value is None for value in values], dtype=bool)
    for row, value in enumerate(values):
        if value is not None:
            array = np.asarray(value, dtype)
            assert array.shape == shape, (
                f"{field.name}: shape {array.shape}, the schema says {shape}"
            )
            flat[row] = array.reshape(-1)
    storage = pa.FixedSizeListArray.from_arrays(
        pa.array(flat.reshape(-1)), size, mask=pa.array(null)
    )
    return pa.ExtensionArray.from_storage(field.type, storage)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def tensor_to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Convert a tensor column without nulls to one array [N, *shape]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    # combine_chunks may keep the chunks of an extension type
    if isinstance(array, pa.ChunkedArray):
        array = (
            pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
        )
    assert array.null_count == 0, "tensor_to_numpy: drop the failed rows first"
    return (
        array.storage.flatten()
        .to_numpy(zero_copy_only=False)
        .reshape(len(array), *array.type.shape)
    )


def storage_schema(schema: pa.Schema) -> pa.Schema:
    """`schema` with each tensor column replaced by the plain fixed-size list that stores it.

    Tables have this form between Ray tasks: Ray Data turns a tensor column with a null row into a
    pickled blob, but leaves plain lists alone.
    """
    fields = []
    for field in schema:
        tensor = isinstance(field.type, pa.FixedShapeTensorType)
        fields.append(
            pa.field(field.name, field.type.storage_type, field.nullable) if tensor else field
        )
    return pa.schema(fields)


def to_storage(table: pa.Table) -> pa.Table:
    """Replace the tensor columns of a table by the plain lists that store them."""
    columns = []
    for column in table.columns:
        tensor = isinstance(column.type, pa.FixedShapeTensorType)
        columns.append(
            pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
            if tensor
            else column
        )
    return pa.Table.from_arrays(columns, schema=storage_schema(table.schema))


def from_storage(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Invert `to_storage`, to exactly `schema`; columns that `schema` lacks are dropped."""
    columns = []
    for field in schema:
        column = table[field.name].combine_chunks()
        if isinstance(field.type, pa.FixedShapeTensorType):
            column = pa.ExtensionArray.from_storage(
                field.type, column.cast(field.type.storage_type)
            )
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)
