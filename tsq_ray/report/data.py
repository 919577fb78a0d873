"""Reads a predictions folder: the Parquet parts as one Arrow table, and what `_run.json` says about the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from tsq_ray import runs, storage
from tsq_ray.config import DecodeConfig, validate_config
from tsq_ray.decode import VideoSource
from tsq_ray.errors import RunError
from tsq_ray.schema import PREDICTIONS

Verdict = Literal["right", "wrong", "unlabelled", "failed"]


@dataclass(frozen=True)
class Predictions:
    """A predictions folder in memory. `run` is `_run.json`, of which only `format` and `kind` are relied on."""

    uri: str
    run: dict[str, Any]
    table: pa.Table
    num_frames: int
    """T"""
    bundle_classes: list[str]
    """The order of `scores`; empty where `_run.json` does not say."""

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings, nested by section; empty where unknown."""
        config = self.run.get("config") or self.run.get("identity")
        return config if isinstance(config, dict) else {}

    @property
    def has_scores(self) -> bool:
        """Whether the rows carry the probability of every class (not with `--scores top`)."""
        return "scores" in self.table.column_names

    def row(self, index: int) -> dict[str, Any]:
        """One row as plain values, tensors as flat numpy arrays or None."""
        return {name: _cell(self.table.column(name), index) for name in self.table.column_names}

    def decode_settings(self) -> DecodeConfig:
        """The run's decode settings, so that frames taken anew fall on the same slots. ConfigError for a value that is not allowed."""
        recorded = self.config.get("decode")
        known = {key: value for key, value in (recorded if isinstance(recorded, dict) else {}).items() if key in DecodeConfig.model_fields}
        return validate_config({"decode": known | {"num_frames": self.num_frames}}).decode


@dataclass(frozen=True)
class Outcome:
    """What the report needs of every video; `index` is its row in the table."""

    index: int
    video_id: str
    uri: str
    verdict: Verdict
    labels: tuple[str, ...] = ()
    top_label: str | None = None
    top_score: float = 0.0
    error_type: str | None = None
    error_message: str = ""
    warnings: tuple[str, ...] = field(default=())


def read_predictions(uri: str) -> Predictions:
    """Read the parts and `_run.json` of a finished run, in a local folder or below an s3:// prefix.

    Raises RunError where it is not finished, holds no predictions or does not fit together; StorageError where storage fails.
    """
    uri = storage.normalize(uri)
    run = runs.read_run(uri, "predictions")
    parts = runs.list_parts(uri)
    if not parts:
        raise RunError(f"{storage.redact(uri)}: no part-*.parquet here, the run has no videos; name a folder that `tsq score` filled")
    try:
        table = pa.concat_tables([_read_part(part.uri) for part in parts])
    except pa.ArrowInvalid as error:
        detail = " ".join(str(error).split())[:200]
        raise RunError(f"{storage.redact(uri)}: its parts do not have the same columns ({detail}); were two runs mixed?") from None
    names = run.get("bundle_classes")
    bundle_classes = [str(name) for name in names] if isinstance(names, list) else []
    if "scores" in table.column_names and bundle_classes:
        width = int(table.schema.field("scores").type.shape[0])
        if width != len(bundle_classes):
            raise RunError(
                f"{storage.redact(uri)}: scores of {width} classes, but {runs.RUN_FILE} names {len(bundle_classes)}; score again"
            )
    return Predictions(uri, run, table, int(table.schema.field("frame_pts_s").type.shape[0]), bundle_classes)


def outcomes(predictions: Predictions) -> list[Outcome]:
    """One Outcome a row, in the order of the table.

    `right`: the best class is one of the labels. A video whose labels are all unknown to the bundle could not be right:
    it counts as unlabelled.
    """
    known = set(predictions.bundle_classes)
    columns = ("video_id", "uri", "status", "error_type", "error_message", "warnings", "label_names", "top_labels", "top_scores")
    found: list[Outcome] = []
    for batch in predictions.table.select(columns).to_batches():
        for row in batch.to_pylist():
            labels = tuple(row["label_names"] or ())
            top = (row["top_labels"] or [None])[0]
            found.append(
                Outcome(
                    index=len(found),
                    video_id=row["video_id"],
                    uri=row["uri"],
                    verdict=_verdict(row["status"], labels, top, known),
                    labels=labels,
                    top_label=top,
                    top_score=float((row["top_scores"] or [0.0])[0]),
                    error_type=row["error_type"] or ("internal" if row["status"] != "ok" else None),
                    error_message=storage.redact(row["error_message"] or ""),
                    warnings=tuple(row["warnings"] or ()),
                )
            )
    return found


def source_of(row: dict[str, Any]) -> VideoSource:
    """The video of a row, as the manifest saw it: a file that changed since is not taken for the one that was scored."""
    return VideoSource(uri=row["uri"], size_bytes=row["size_bytes"], etag=row["etag"], modified=row["modified"])


def batches(indices: list[int], size: int) -> Iterator[list[int]]:
    """`indices` in groups of at most `size`, so that the frames of few videos are in memory at a time."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _verdict(status: str, labels: tuple[str, ...], top: str | None, known: set[str]) -> Verdict:
    if status != "ok":
        return "failed"
    if not labels or (known and not known.intersection(labels)):
        return "unlabelled"
    return "right" if top in labels else "wrong"


def _read_part(uri: str) -> pa.Table:
    table = runs.read_part(uri)
    missing = [column.name for column in PREDICTIONS if column.name not in table.column_names and column.name != "scores"]
    if missing:
        raise RunError(f"{storage.redact(uri)}: these are not predictions, {missing[0]} is missing; name a folder that `tsq score` wrote")
    return table


def _cell(column: pa.ChunkedArray, index: int) -> Any:
    scalar = column[index]
    if isinstance(column.type, pa.FixedShapeTensorType):
        return None if scalar.value is None or not scalar.is_valid else np.asarray(scalar.value.as_py(), np.float32)
    return scalar.as_py()
