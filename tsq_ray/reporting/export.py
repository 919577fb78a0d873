"""Export predictions for other tools: labels as CSV and JSON Lines, chosen frames as JPEG."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import storage
from tsq_ray.errors import RunError, UserError
from tsq_ray.reporting.pictures import Progress, Taken, jpeg, take_pictures
from tsq_ray.reporting.predictions import Predictions, read_predictions
from tsq_ray.results import ExportSummary
from tsq_ray.schema import TOP_LABELS

WHAT = ("labels", "frames")
JPEG_QUALITY = 90
MISSING_FILE = "frames_missing.csv"
MISSING_FIELDS = ("video_id", "uri", "error_type", "error_message")
CSV_FIELDS = (
    *("video_id", "uri", "status", "error_type", "error_message", "label_names"),
    *(f"{kind}_{i}" for i in range(1, TOP_LABELS + 1) for kind in ("label", "score")),
    *("selected_pts_s", "selected_by", "warnings"),
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_VIDEO_ID = "^[0-9a-f]{16}$"
_READ = (
    *("video_id", "uri", "status", "error_type", "error_message", "warnings", "label_names"),
    *("top_labels", "top_scores", "selected_slot", "selected_pts_s", "selected_by"),
)
_ROWS = 1000
"""Rows converted to Python objects at a time."""


def export_predictions(
    predictions_uri: str,
    out: str,
    what: Sequence[str] = WHAT,
    size: int = 480,
    num_processes: int = 2,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write a predictions folder's labels and chosen frames below `out` (a folder or prefix).

    - `labels.csv` and `labels.jsonl`: one row per video, failed ones with their reason. UTF-8. In
      the CSV several values of a cell are joined by `|`, and a cell that a spreadsheet would take
      for a formula (starting with = + - @ or white space that hides one) gets a leading apostrophe.
    - `frames/<video_id>/<slot>_<seconds>.jpg`: the chosen frames in the video's aspect ratio,
      shorter side `size` pixels, or the video's own if smaller. A video that is missing or fails to
      decode is listed in `frames_missing.csv` with its reason.

    Raises UserError for an unknown `what`, RunError or StorageError
    if the predictions cannot be read or `out` cannot be written.
    """
    unknown = [item for item in what if item not in WHAT]
    if unknown or not what:
        raise UserError(
            f"export: {', '.join(unknown) or 'nothing'} cannot be exported; "
            f"allowed: {', '.join(WHAT)}"
        )
    if size < 16:
        raise UserError(
            f"export: size {size} is too small; the shorter side must have at least 16 pixels"
        )
    predictions = read_predictions(predictions_uri)
    out = storage.normalize(out)
    sides = [
        _sides(predictions, table, size)
        for table in predictions.tables(["video_id", "status", "width", "height"])
    ]
    frames, missing = 0, Counter[str]()
    if "labels" in what:
        _export_labels(predictions, out)
    if "frames" in what:
        frames, missing = _export_frames(_take(predictions, sides, num_processes, progress), out)
    return ExportSummary(
        out=storage.redact(out),
        videos=sum(map(len, sides)),
        failed=sum(int((of_part == 0).sum()) for of_part in sides),
        frames=frames,
        frames_missing=dict(missing.most_common()),
        files=2 * ("labels" in what) + frames + bool(missing),
    )


def csv_writer(file: BinaryIO, fields: Sequence[str]) -> Callable[[Mapping[str, Any]], None]:
    """Write the header of a UTF-8 CSV and return a function that writes a row.

    Text that a spreadsheet would run as a formula gets a leading apostrophe.
    """
    # CRLF line ends (RFC 4180), so that a lone CR in a cell is quoted
    writer = csv.DictWriter(codecs.getwriter("utf-8")(file), fields)
    writer.writeheader()
    return lambda row: writer.writerow({name: _harmless(value) for name, value in row.items()})


def _harmless(value: Any) -> Any:
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value


def _sides(predictions: Predictions, table: pa.Table, size: int) -> np.ndarray:
    """Return int32 [N], the shorter side of each video's frames: at most `size`; 0 if it failed."""
    for strange in table["video_id"].filter(
        pc.invert(pc.match_substring_regex(table["video_id"], _VIDEO_ID))
    ):
        # the id becomes a folder name
        raise RunError(
            f"{storage.redact(predictions.uri)}: video_id {strange.as_py()!r}; "
            "allowed: 16 hex digits; score again"
        )
    found = np.full(len(table), size, np.int32)
    for name in ("width", "height"):
        side = pc.fill_null(table[name], 0).to_numpy()
        found = np.where(side > 0, np.minimum(found, side), found)
    return np.where(pc.equal(table["status"], "ok").to_numpy(), found, 0)


def _export_labels(predictions: Predictions, out: str) -> None:
    with (
        storage.open_write(storage.join(out, "labels.csv")) as table,
        storage.open_write(storage.join(out, "labels.jsonl")) as lines,
    ):
        add = csv_writer(table, CSV_FIELDS)
        for row in _rows(predictions):
            add(_csv_row(row))
            lines.write(_json_line(row))


def _rows(predictions: Predictions) -> Iterator[dict[str, Any]]:
    for table in predictions.tables(list(_READ)):
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


def _export_frames(pictures: Iterable[Taken], out: str) -> tuple[int, Counter[str]]:
    """Write the frames; return their number and the count of videos without any, by reason."""
    frames, missing = 0, Counter[str]()
    with contextlib.ExitStack() as stack:
        for taken in pictures:
            row = taken.row
            if taken.error_type is not None:
                if not missing:
                    file = stack.enter_context(storage.open_write(storage.join(out, MISSING_FILE)))
                    add = csv_writer(file, MISSING_FIELDS)
                place = {"video_id": row["video_id"], "uri": storage.redact(row["uri"])}
                add(place | {"error_type": taken.error_type, "error_message": taken.note})
                missing[taken.error_type] += 1
            for slot, frame in taken.slots.items():
                name = f"{slot:04d}_{row['frame_pts_s'][slot]:.3f}.jpg"
                storage.write_bytes(
                    storage.join(out, "frames", row["video_id"], name), jpeg(frame, JPEG_QUALITY)
                )
                frames += 1
    return frames, missing


def _take(
    predictions: Predictions,
    sides: Sequence[np.ndarray],
    num_processes: int,
    progress: Progress | None,
) -> Iterator[Taken]:
    """Yield the frames of every video, grouped by their shorter side so that none is upscaled."""
    firsts = (
        of_part[np.sort(np.unique(of_part, return_index=True)[1])].tolist() for of_part in sides
    )
    groups = [side for side in dict.fromkeys(chain.from_iterable(firsts)) if side]
    total = sum(int((of_part > 0).sum()) for of_part in sides)
    done = 0
    for side in groups:
        wanted = (np.flatnonzero(of_part == side) for of_part in sides)
        rows = chain.from_iterable(
            predictions.part_rows(part, numbers)
            for part, numbers in enumerate(wanted)
            if len(numbers)
        )
        for taken in take_pictures(
            predictions, rows, lambda row: row["selected_slot"] or (), side, num_processes
        ):
            done += 1
            if progress is not None:
                progress(done, total)
            yield taken
