"""Print the quickstart's closing table, which compares runs on the same videos.

python jobs/quickstart_table.py NAME=PREDICTIONS... [--annotations FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from tsq_ray.errors import StorageError, TsqError
from tsq_ray.evaluation import Annotations, on_evidence, read_annotations
from tsq_ray.reporting.predictions import read_predictions
from tsq_ray.reporting.summary import summarize


def table_row(name: str, uri: str, known: Annotations | None) -> list[str]:
    """Return one row: sampler, ok, failed, mAP and top-1.

    With known segments, also the share of chosen frames on the evidence.
    """
    predictions = read_predictions(uri)
    summary = summarize(predictions, 0)
    totals, figures = summary.totals, summary.quality
    cells = [
        name,
        str(totals["ok"]),
        str(totals["failed"]),
        _percent(figures["map"]),
        _percent(figures["top1"]),
    ]
    if known is None:
        return cells
    chosen = (
        row for table in predictions.tables(["uri", "selected_pts_s"]) for row in table.to_pylist()
    )
    return [
        *cells,
        _percent(on_evidence(((row["uri"], row["selected_pts_s"] or []) for row in chosen), known)),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
                ]
            )
        )


def main() -> int:
    """Run the command line; return 2 if an input is wrong."""
    parser = argparse.ArgumentParser(description="Compare predictions of the same videos.")
    parser.add_argument("runs", nargs="+", metavar="NAME=PREDICTIONS")
    parser.add_argument(
        "--annotations", metavar="FILE", help="known salient segments (docs/evaluation.md)"
    )
    args = parser.parse_args()
    try:
        known = read_annotations(args.annotations) if args.annotations else None
        rows = [
            table_row(name, uri, known)
            for name, _, uri in (run.partition("=") for run in args.runs)
        ]
    except (TsqError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    head = [
        "sampler",
        "ok",
        "failed",
        "mAP",
        "top-1",
        *(["on evidence"] if known is not None else []),
    ]
    print_table([head, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
