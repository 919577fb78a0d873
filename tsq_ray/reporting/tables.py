"""The labels of predictions as CSV and JSON Lines, one row per video."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from tsq_ray import storage
from tsq_ray.reporting.predictions import Predictions
from tsq_ray.schema import TOP_LABELS

CSV_FIELDS = (
    *("video_id", "uri", "status", "error_type", "error_message", "label_names"),
    *(f"{kind}_{i}" for i in range(1, TOP_LABELS + 1) for kind in ("label", "score")),
    *("selected_pts_s", "selected_by", "warnings"),
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
COLUMNS = (
    *("video_id", "uri", "status", "error_type", "error_message", "warnings", "label_names"),
    *("top_labels", "top_scores", "selected_slot", "selected_pts_s", "selected_by"),
)
_ROWS = 1000
"""Rows converted to Python objects at a time."""


def csv_writer(file: BinaryIO, fields: Sequence[str]) -> Callable[[Mapping[str, Any]], None]:
    """Write the header of a UTF-8 CSV and return a function that writes a row.

    Text that a spreadsheet would run as a formula gets a leading apostrophe.
    """
    # DictWriter ends lines with CRLF (RFC 4180), so a lone CR in a cell is quoted
    writer = csv.DictWriter(codecs.getwriter("utf-8")(file), fields)
    writer.writeheader()
    return lambda row: writer.writerow(
        {name: _escape_formula(value) for name, value in row.items()}
    )


def _escape_formula(value: Any) -> Any:
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value


def write_labels(predictions: Predictions, out: str) -> None:
    """Write `labels.csv` and `labels.jsonl` below `out`."""
    with (
        storage.open_write(storage.join(out, "labels.csv")) as table,
        storage.open_write(storage.join(out, "labels.jsonl")) as lines,
    ):
        extra = predictions.server_columns
        add = csv_writer(table, (*CSV_FIELDS, *extra))
        for row in label_rows(predictions, (*COLUMNS, *extra)):
            add(_csv_row(row) | {name: row[name] for name in extra})
            lines.write(_json_line(row))


def label_rows(
    predictions: Predictions, columns: Sequence[str] = COLUMNS
) -> Iterator[dict[str, Any]]:
    """Yield these columns of all rows; secrets are removed from URIs and messages."""
    for table in predictions.tables(list(columns)):
        for batch in table.to_batches(max_chunksize=_ROWS):
            for row in batch.to_pylist():
                yield row | {
                    "uri": storage.redact(row["uri"]),
                    "error_message": None
                    if row["error_message"] is None
                    else storage.redact(row["error_message"]),
                    "warnings": [storage.redact(warning) for warning in row["warnings"] or ()],
                }


def _csv_row(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {
        name: row[name] for name in ("video_id", "uri", "status", "error_type", "error_message")
    }
    for i, (label, score) in enumerate(
        zip(row["top_labels"] or (), row["top_scores"] or (), strict=True), start=1
    ):
        cells |= {f"label_{i}": label, f"score_{i}": round(score, 6)}
    cells["label_names"] = "|".join(row["label_names"] or ())
    cells["selected_pts_s"] = "|".join(f"{time:.3f}" for time in row["selected_pts_s"] or ())
    cells["selected_by"] = "|".join(row["selected_by"] or ())
    cells["warnings"] = "|".join(row["warnings"])
    return cells


def _json_line(row: Mapping[str, Any]) -> bytes:
    """Return a JSON line; floats are rounded to float32 precision: 0.9, not 0.8999999761581421."""
    rounded = {
        name: [round(value, 6) for value in row[name]] if row[name] is not None else None
        for name in ("top_scores", "selected_pts_s")
    }
    return (json.dumps({**row, **rounded}, ensure_ascii=False) + "\n").encode("utf-8")
