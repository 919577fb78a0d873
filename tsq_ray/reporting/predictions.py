"""Read a predictions folder: its parts one at a time, and `_run.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from tsq_ray import storage
from tsq_ray.config import DecodeConfig, validate_config
from tsq_ray.decode import VideoSource
from tsq_ray.errors import RunError
from tsq_ray.quality import ReadColumns
from tsq_ray.rows import Row
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.folder import RUN_FILE, read_run
from tsq_ray.schema import PREDICTIONS, SERVER

_ROW = [column.name for column in PREDICTIONS if column.name != "scores"]
"""All columns except `scores`, the score of every class, which no page or export shows."""

Place = tuple[int, int]
"""Where a row lies: the number of its part, and of the row in that part."""


@dataclass(frozen=True)
class Predictions:
    """A finished predictions folder; at most one part is in memory at a time.

    `run` is `_run.json`; only its `format` and `kind` are required.
    """

    uri: str
    run: dict[str, Any]
    parts: list[str]
    schema: pa.Schema
    """Schema of the first part; the others must agree in the columns that are read."""
    bundle_classes: list[str]
    """The classes in the order of `scores`; empty if missing from `_run.json`."""

    @property
    def num_frames(self) -> int:
        """T, the number of frames (slots) per video."""
        return int(self.schema.field("frame_pts_s").type.shape[0])

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings, nested by section; empty if unknown."""
        config = self.run.get("config") or self.run.get("identity")
        return config if isinstance(config, dict) else {}

    @property
    def has_scores(self) -> bool:
        """Whether rows hold the probability of every class (not with `--scores top`)."""
        return "scores" in self.schema.names

    @property
    def server_columns(self) -> list[str]:
        """Columns of these predictions that only a recogniser behind a server fills in."""
        return [column.name for column in SERVER if column.name in self.schema.names]

    @property
    def readers(self) -> list[ReadColumns]:
        """For each part, a function that reads some of its columns."""
        return [partial(self.read, number) for number in range(len(self.parts))]

    def read(self, part: int, columns: list[str]) -> pa.Table:
        """Read some columns of one part. Raises RunError if it does not match the first part."""
        uri = self.parts[part]
        table = read_part(uri, columns)
        _check_columns(uri, table.column_names, columns)
        for field in table.schema:
            if field.type != self.schema.field(field.name).type:
                raise RunError(
                    f"{storage.redact(uri)}: {field.name} is {field.type}, but "
                    f"{self.schema.field(field.name).type} in the first part; were two runs mixed?"
                )
        return table

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """Yield some columns, part by part."""
        return (self.read(number, columns) for number in range(len(self.parts)))

    def rows(self, places: Sequence[Place]) -> list[Row]:
        """Return these rows without `scores`: plain values, and tensors as flat arrays or None."""
        by_place: dict[Place, Row] = {}
        for part in sorted({part for part, _ in places}):
            numbers = [number for its_part, number in places if its_part == part]
            rows = self.part_rows(part, np.array(numbers))
            by_place |= {(part, number): row for number, row in zip(numbers, rows, strict=True)}
        return [by_place[place] for place in places]

    def part_rows(self, part: int, numbers: np.ndarray) -> Iterator[Row]:
        """Yield these rows of one part, one at a time, as `rows` returns them."""
        columns = [*_ROW, *self.server_columns]
        table = self.read(part, columns).take(pa.array(numbers))
        return ({name: _cell(table[name], row) for name in columns} for row in range(len(table)))

    def decode_settings(self) -> DecodeConfig:
        """Return the run's decode settings, which put frames decoded again into the same slots.

        Raises ConfigError if a recorded value is not allowed.
        """
        recorded = self.config.get("decode")
        known = {
            key: value
            for key, value in (recorded if isinstance(recorded, dict) else {}).items()
            if key in DecodeConfig.model_fields
        }
        return validate_config({"decode": known | {"num_frames": self.num_frames}}).decode


def read_predictions(uri: str) -> Predictions:
    """Open a finished run in a local folder or below an s3:// prefix.

    Reads `_run.json` and the first part's schema. Raises RunError if the run is not finished, holds
    no predictions or is inconsistent; StorageError if storage fails.
    """
    uri = storage.normalize(uri)
    run = read_run(uri, "predictions")
    parts = [part.uri for part in list_parts(uri)]
    if not parts:
        raise RunError(
            f"{storage.redact(uri)}: no part-*.parquet here, so the run has no videos; "
            "name a folder with the predictions of `tsq score`"
        )
    schema = read_part(parts[0]).schema
    _check_columns(parts[0], schema.names, _ROW)
    names = run.get("bundle_classes")
    bundle_classes = [str(name) for name in names] if isinstance(names, list) else []
    if "scores" in schema.names and bundle_classes:
        width = int(schema.field("scores").type.shape[0])
        if width != len(bundle_classes):
            raise RunError(
                f"{storage.redact(uri)}: has scores of {width} classes, but {RUN_FILE} names "
                f"{len(bundle_classes)}; score again"
            )
    return Predictions(uri, run, parts, schema, bundle_classes)


def _check_columns(uri: str, names: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in names]
    if missing:
        raise RunError(
            f"{storage.redact(uri)}: these are not predictions, {missing[0]} is missing; "
            "name a folder that `tsq score` wrote"
        )


def video_source(row: Row) -> VideoSource:
    """Return a row's video as recorded in the manifest, so that a changed file is detected."""
    return VideoSource(
        uri=row["uri"], size_bytes=row["size_bytes"], etag=row["etag"], modified=row["modified"]
    )


def _cell(column: pa.ChunkedArray, index: int) -> Any:
    scalar = column[index]
    if isinstance(column.type, pa.FixedShapeTensorType):
        return (
            None
            if scalar.value is None or not scalar.is_valid
            else np.asarray(scalar.value.as_py(), np.float32)
        )
    return scalar.as_py()
