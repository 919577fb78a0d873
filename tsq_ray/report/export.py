"""Predictions -> files for other tools: labels as CSV and JSON lines, the chosen frames as JPEG."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from tsq_ray import storage
from tsq_ray.errors import RunError, UserError
from tsq_ray.report.data import Predictions, read_predictions
from tsq_ray.report.pictures import Progress, Taken, jpeg, take_pictures
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
_VIDEO_ID = re.compile(r"[0-9a-f]{16}")
_READ = (
    *("video_id", "uri", "status", "error_type", "error_message", "warnings", "label_names"),
    *("top_labels", "top_scores", "selected_slot", "selected_pts_s", "selected_by"),
)


def export_predictions(
    predictions_uri: str,
    out: str,
    what: Sequence[str] = WHAT,
    size: int = 480,
    num_processes: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a predictions folder's labels and chosen frames below `out` (a folder or prefix).

    - `labels.csv` and `labels.jsonl`: one row a video, the failed ones with their reason. UTF-8; in the CSV several values of a
      cell are joined by `|`, and a cell that a spreadsheet would take for a formula (it begins with = + - @ or white
      space that hides one) has an apostrophe in front.
    - `frames/<video_id>/<slot>_<seconds>.jpg`: the chosen frames in the video's aspect, shorter side `size` pixels, or the video's own
      where that is smaller. A video
      that is gone or fails now is in `frames_missing.csv` with its reason.

    Returns {"out", "videos", "failed" (videos without a label), "frames", "frames_missing" {error type: videos}, "files"}.
    Raises UserError for an unknown `what`, RunError or StorageError where the predictions cannot be read or `out` not written.
    """
    unknown = [item for item in what if item not in WHAT]
    if unknown or not what:
        raise UserError(f"export: {', '.join(unknown) or 'nothing'} cannot be exported; there is: {', '.join(WHAT)}")
    if size < 16:
        raise UserError(f"export: size {size} is too small; the shorter side has at least 16 pixels")
    predictions = read_predictions(predictions_uri)
    out = storage.normalize(out)
    rows = list(_rows(predictions))
    summary: dict[str, Any] = {
        "out": storage.redact(out),
        "videos": len(rows),
        "failed": sum(row["status"] != "ok" for row in rows),
        "frames": 0,
        "frames_missing": {},
        "files": 0,
    }
    if "labels" in what:
        storage.write_bytes(storage.join(out, "labels.csv"), csv_bytes(CSV_FIELDS, map(_csv_row, rows)))
        storage.write_bytes(storage.join(out, "labels.jsonl"), _json_lines(rows))
        summary["files"] += 2
    if "frames" in what:
        ok = [index for index, row in enumerate(rows) if row["status"] == "ok"]
        frames, missing = _export_frames(predictions, ok, out, size, num_processes, progress)
        summary["frames"] = frames
        summary["files"] += frames
        summary["frames_missing"] = dict(Counter(row["error_type"] for row in missing).most_common())
        if missing:
            storage.write_bytes(storage.join(out, MISSING_FILE), csv_bytes(MISSING_FIELDS, missing))
            summary["files"] += 1
    return summary


def csv_bytes(fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as UTF-8 CSV with a header; text that a spreadsheet would run as a formula has an apostrophe in front."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)  # CRLF, as RFC 4180 has it; a lone CR in a cell is then quoted
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _harmless(value) for name, value in row.items()})
    return text.getvalue().encode("utf-8")


def _harmless(value: Any) -> Any:
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value


def _rows(predictions: Predictions) -> Iterator[dict[str, Any]]:
    for batch in predictions.table.select(_READ).to_batches():
        for row in batch.to_pylist():
            if not _VIDEO_ID.fullmatch(row["video_id"]):  # it becomes a folder's name
                raise RunError(f"{storage.redact(predictions.uri)}: video_id {row['video_id']!r}; allowed are 16 hex digits, score again")
            yield row | {
                "uri": storage.redact(row["uri"]),
                "error_message": None if row["error_message"] is None else storage.redact(row["error_message"]),
                "warnings": [storage.redact(warning) for warning in row["warnings"] or ()],
            }


def _csv_row(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {name: row[name] for name in ("video_id", "uri", "status", "error_type", "error_message")}
    for i, (label, score) in enumerate(zip(row["top_labels"] or (), row["top_scores"] or (), strict=True), start=1):
        cells |= {f"label_{i}": label, f"score_{i}": round(score, 6)}
    cells["label_names"] = "|".join(row["label_names"] or ())
    cells["selected_pts_s"] = "|".join(f"{time:.3f}" for time in row["selected_pts_s"] or ())
    cells["selected_by"] = "|".join(row["selected_by"] or ())
    cells["warnings"] = "|".join(row["warnings"])
    return cells


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Floats as short as float32 allows: 0.9, not 0.8999999761581421."""
    lines = []
    for row in rows:
        rounded = {
            name: [round(value, 6) for value in row[name]] if row[name] is not None else None for name in ("top_scores", "selected_pts_s")
        }
        lines.append(json.dumps({**row, **rounded}, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


def _export_frames(
    predictions: Predictions, indices: Sequence[int], out: str, size: int, num_processes: int, progress: Progress | None
) -> tuple[int, list[dict[str, Any]]]:
    """How many frames were written, and the videos without any."""
    frames, missing = 0, []
    for taken in _take(predictions, indices, size, num_processes, progress):
        row = taken.row
        if taken.error_type is not None:
            place = {"video_id": row["video_id"], "uri": storage.redact(row["uri"])}
            missing.append(place | {"error_type": taken.error_type, "error_message": taken.note})
        for slot, frame in taken.slots.items():
            name = f"{slot:04d}_{row['frame_pts_s'][slot]:.3f}.jpg"
            storage.write_bytes(storage.join(out, "frames", row["video_id"], name), jpeg(frame, JPEG_QUALITY))
            frames += 1
    return frames, missing


def _take(predictions: Predictions, indices: Sequence[int], size: int, num_processes: int, progress: Progress | None) -> Iterator[Taken]:
    """The frames of every video; those smaller than `size` by groups of their own size, so that nothing is blown up."""
    shapes = predictions.table.select(["width", "height"]).take(pa.array(indices, pa.int64())).to_pylist()
    groups: dict[int, list[int]] = {}
    for index, shape in zip(indices, shapes, strict=True):
        groups.setdefault(min([size, *(side for side in shape.values() if side)]), []).append(index)
    done = 0
    for side, group in groups.items():
        for taken in take_pictures(predictions, group, lambda row: row["selected_slot"] or (), side, num_processes):
            done += 1
            if progress is not None:
                progress(done, len(indices))
            yield taken
