"""The quickstart's last lines: how runs on the same videos compare.

python jobs/quickstart_table.py NAME=PREDICTIONS... [--annotations FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

from tsq_ray import storage
from tsq_ray.errors import StorageError, TsqError
from tsq_ray.metrics import salient_recall
from tsq_ray.report.data import Predictions, outcomes, read_predictions
from tsq_ray.report.summary import accounting, quality

Segments = dict[str, list[tuple[float, float]]]


def read_segments(uri: str) -> Segments:
    """Normalised video URI -> its salient segments in seconds; paths in the file are relative to its folder."""
    videos = json.loads(storage.read_text(uri))["videos"]
    folder = storage.parent_of(storage.normalize(uri))
    return {storage.normalize(storage.join(folder, path)): [(s, e) for s, e in video["segments"]] for path, video in videos.items()}


def on_evidence(predictions: Predictions, segments: Segments) -> float:
    """Mean share of a video's chosen frames that lie in a salient segment; nan where no video has any."""
    columns = predictions.table.select(["uri", "selected_pts_s"]).to_pylist()
    shares = [salient_recall(row["selected_pts_s"] or [], segments.get(row["uri"], [])) for row in columns]
    known = [share for share in shares if not math.isnan(share)]
    return sum(known) / len(known) if known else math.nan


def table_row(name: str, uri: str, segments: Segments | None) -> list[str]:
    """One line of the table: sampler, ok, failed, mAP, top-1 and, with segments, the share of frames on the evidence."""
    predictions = read_predictions(uri)
    found = outcomes(predictions)
    rows, figures = accounting(predictions, found), quality(predictions, found)
    cells = [name, str(rows["ok"]), str(rows["failed"]), _figure(figures["map"]), _figure(figures["top1"])]
    return cells if segments is None else [*cells, _figure(on_evidence(predictions, segments))]


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need be, the first to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]))


def main() -> int:
    """The command line; exit code 2 where an input is wrong."""
    parser = argparse.ArgumentParser(description="Compare predictions of the same videos.")
    parser.add_argument("runs", nargs="+", metavar="NAME=PREDICTIONS")
    parser.add_argument("--annotations", metavar="FILE", help='salient segments: {"videos": {path: {"segments": [[start_s, end_s], ...]}}}')
    args = parser.parse_args()
    try:
        segments = read_segments(args.annotations) if args.annotations else None
        rows = [table_row(name, uri, segments) for name, _, uri in (run.partition("=") for run in args.runs)]
    except (TsqError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    head = ["sampler", "ok", "failed", "mAP", "top-1", *(["on evidence"] if segments is not None else [])]
    print_table([head, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
