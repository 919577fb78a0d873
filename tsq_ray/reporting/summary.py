"""The contents of a report, collected part by part: totals, quality on labelled videos, cards."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import storage
from tsq_ray.quality import (
    FAILED,
    RIGHT,
    UNLABELLED,
    WRONG,
    ClassFigures,
    class_figures,
    first_of,
    label_pairs,
    mean_over_classes,
    verdicts,
)
from tsq_ray.reporting.choice import best_candidates, choose_shown
from tsq_ray.reporting.predictions import Place, Predictions

MAX_EXAMPLES = 3
MAX_WARNINGS = 30
MAX_CONFUSIONS = 15
MAX_FAILED_LISTED = 500
VERDICTS = {RIGHT: "right", WRONG: "wrong", UNLABELLED: "unlabelled", FAILED: "failed"}
_MILLISECONDS = ("decode_ms", "sample_ms", "recognize_ms")
_READ = [
    *("video_id", "uri", "status", "error_type", "error_message", "warnings", "label_names"),
    *("top_labels", "top_scores", "selected_slot", "duration_s", *_MILLISECONDS),
]
_PENDING = 20_000
"""Candidates collected before the best of them are chosen."""


@dataclass(frozen=True)
class Summary:
    """What a report states about all rows."""

    totals: dict[str, Any]
    """inputs = ok + failed + skipped; failures by error type and warnings, most frequent first.

    `skipped` and the expected counts come from `_run.json`; `adds_up` is False if the rows
    contradict them."""
    quality: dict[str, Any]
    """Top-1, mAP by both conventions, AP by class and the pairs confused at top-1, over the ok
    videos with a label among the bundle's classes.

    Labels are mapped to those classes by name; other names are counted in `unknown_labels` and left
    out. Both mAP values are None without `scores` or without the bundle's class order."""
    classes: list[tuple[str, int]]
    """For each class, the number of videos whose best class it is, most frequent first."""
    failed: list[dict[str, Any]]
    """`uri`, `error_type` and `error_message` of the first failed rows."""
    means_ms: dict[str, float]
    """Mean time per video of each step, in milliseconds; steps without any timing are left out."""
    duration_s: float
    """Total duration of all videos."""
    max_chosen: int
    """Maximum number of frames chosen for a video."""
    shown: list[tuple[Place, str]]
    """Place and verdict of each video with a card, in page order."""


def summarize(predictions: Predictions, max_videos: int) -> Summary:
    """Summarise the parts, one at a time; with labels and `scores`, they are read twice more."""
    tally = _Tally(predictions.bundle_classes, max_videos)
    for part, table in enumerate(predictions.tables(_READ)):
        tally.add(part, table)
    figures = None
    if predictions.has_scores and predictions.bundle_classes and tally.judged:
        figures = class_figures(predictions.readers, predictions.bundle_classes)
    sums = tally.sums
    return Summary(
        totals=tally.totals(predictions.run),
        quality=tally.quality(figures),
        classes=sorted(tally.predicted.items(), key=lambda item: (-item[1], item[0])),
        failed=tally.failed,
        means_ms={
            name: sums[name] / tally.timed[name] for name in _MILLISECONDS if tally.timed[name]
        },
        duration_s=sums["duration_s"],
        max_chosen=tally.max_chosen,
        shown=tally.shown(),
    )


class _Tally:
    """Counts over the rows so far; counters keep the order in which their keys first appeared."""

    def __init__(self, classes: Sequence[str], max_videos: int) -> None:
        self.classes, self.max_videos = classes, max_videos
        self.verdicts = np.zeros(len(VERDICTS), np.int64)
        self.failures, self.warnings = Counter[str](), Counter[str]()
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.failed: list[dict[str, Any]] = []
        self.predicted, self.unknown = Counter[str](), Counter[str]()
        self.confusions = Counter[tuple[str, str]]()
        self.warned = self.labelled_failed = self.max_chosen = 0
        self.sums: dict[str, float] = defaultdict(float)
        self.timed: Counter[str] = Counter()
        self._candidates: list[pa.Table] = []

    @property
    def judged(self) -> int:
        """Number of ok videos with a label among the bundle's classes."""
        return int(self.verdicts[RIGHT] + self.verdicts[WRONG])

    def add(self, part: int, table: pa.Table) -> None:
        """Count the rows of a part."""
        table = table.combine_chunks()
        verdict = verdicts(table, self.classes)
        top = first_of(table["top_labels"].combine_chunks())
        self.verdicts += np.bincount(verdict, minlength=len(VERDICTS))
        _count(self.predicted, top.drop_null())
        self._count_failed(table.filter(pa.array(verdict == FAILED)))
        self._count_warnings(table["warnings"])
        self._count_labels(table, verdict, top)
        for name in (*_MILLISECONDS, "duration_s"):
            self.sums[name] += pc.sum(table[name]).as_py() or 0.0
            self.timed[name] += len(table) - table[name].null_count
        self.max_chosen = max(
            self.max_chosen, pc.max(pc.list_value_length(table["selected_slot"])).as_py() or 0
        )
        self._candidates.append(_candidates(part, table, verdict, top))
        if sum(map(len, self._candidates)) > _PENDING:
            self._candidates = [
                best_candidates(pa.concat_tables(self._candidates), self.max_videos)
            ]

    def _count_failed(self, table: pa.Table) -> None:
        reasons = _reasons(table)
        _count(self.failures, reasons)
        for reason in pc.unique(reasons).to_pylist():
            examples = self.examples[reason]
            if len(examples) < MAX_EXAMPLES:
                messages = pc.unique(table["error_message"].filter(pc.equal(reasons, reason)))
                shown = dict.fromkeys(
                    storage.redact(message or "") for message in messages.to_pylist()
                )
                examples += [text for text in shown if text and text not in examples][
                    : MAX_EXAMPLES - len(examples)
                ]
        listed = (
            table.slice(0, MAX_FAILED_LISTED - len(self.failed))
            .select(["uri", "error_message"])
            .to_pylist()
        )
        self.failed += [
            row | {"error_type": reason.as_py()}
            for row, reason in zip(listed, reasons, strict=False)
        ]

    def _count_warnings(self, lists: pa.ChunkedArray) -> None:
        self.warned += pc.sum(pc.greater(pc.list_value_length(lists), 0)).as_py() or 0
        for counted in pc.value_counts(pc.list_flatten(lists)).to_pylist():
            self.warnings[storage.redact(_without_numbers(counted["values"]))] += counted["counts"]

    def _count_labels(self, table: pa.Table, verdict: np.ndarray, top: pa.Array) -> None:
        rows, names, numbers = label_pairs(table, self.classes)
        if self.classes:
            _count(self.unknown, names.filter(pa.array(numbers < 0)))
        self.labelled_failed += len(np.unique(rows[verdict[rows] == FAILED]))
        wrong = verdict[rows] == WRONG
        predicted = pc.fill_null(top.take(pa.array(rows[wrong])), "None")
        self.confusions.update(
            zip(names.filter(pa.array(wrong)).to_pylist(), predicted.to_pylist(), strict=True)
        )

    def totals(self, run: dict[str, Any]) -> dict[str, Any]:
        """Return `Summary.totals`."""
        recorded = run.get("counts")
        counts = recorded if isinstance(recorded, dict) else {}
        skipped = _whole_number(counts.get("skipped"), 0)
        videos, failed = int(self.verdicts.sum()), int(self.verdicts[FAILED])
        expected = {"ok": videos - failed, "failed": failed, "inputs": videos + skipped}
        return expected | {
            "videos": videos,
            "skipped": skipped,
            "adds_up": all(
                _whole_number(counts.get(key), value) == value for key, value in expected.items()
            ),
            "failures": dict(self.failures.most_common()),
            "failure_examples": dict(self.examples),
            "warned": self.warned,
            "warnings": dict(self.warnings.most_common(MAX_WARNINGS)),
            "more_warnings": max(0, len(self.warnings) - MAX_WARNINGS),
        }

    def quality(self, figures: ClassFigures | None) -> dict[str, Any]:
        """Return `Summary.quality`."""
        confusions = sorted(self.confusions.items(), key=lambda item: (-item[1], item[0]))
        right = int(self.verdicts[RIGHT])
        return {
            "judged": self.judged,
            "right": right,
            "labelled_failed": self.labelled_failed,
            "unknown_labels": dict(self.unknown.most_common()),
            "top1": right / self.judged if self.judged else None,
            "map": _finite(mean_over_classes(figures.ap)) if figures else None,
            "map_interpolated": _finite(mean_over_classes(figures.ap_interpolated))
            if figures
            else None,
            "per_class": _per_class(self.classes, figures) if figures else [],
            "confusions": [(*pair, count) for pair, count in confusions[:MAX_CONFUSIONS]],
        }

    def shown(self) -> list[tuple[Place, str]]:
        """Return `Summary.shown`."""
        chosen = choose_shown(pa.concat_tables(self._candidates), self.max_videos).to_pylist()
        return [((row["part"], row["row"]), VERDICTS[row["verdict"]]) for row in chosen]


def _candidates(part: int, table: pa.Table, verdict: np.ndarray, top: pa.Array) -> pa.Table:
    failed = pa.array(verdict == FAILED)
    score = pc.fill_null(first_of(table["top_scores"].combine_chunks()), 0.0)
    return pa.table(
        {
            "part": np.full(len(table), part, np.int32),
            "row": np.arange(len(table), dtype=np.int32),
            "video_id": table["video_id"],
            "verdict": verdict,
            "key": pc.if_else(failed, _reasons(table), pc.fill_null(top, "None")),
            "top_score": score,
        }
    )


def _reasons(table: pa.Table) -> pa.Array:
    """Return the rows' error types; `internal` if a row has none."""
    reasons = pc.fill_null(table["error_type"].combine_chunks(), "")
    return pc.if_else(pc.equal(reasons, ""), "internal", reasons)


def _count(counter: Counter[str], values: pa.Array) -> None:
    for counted in pc.value_counts(values).to_pylist():
        counter[counted["values"]] += counted["counts"]


def _per_class(classes: Sequence[str], figures: ClassFigures) -> list[dict[str, Any]]:
    columns = (figures.videos, figures.predicted, figures.ap, figures.ap_interpolated)
    rows = [
        {
            "name": name,
            "videos": int(videos),
            "predicted": int(predicted),
            "ap": _finite(ap),
            "ap_interpolated": _finite(interpolated),
        }
        for name, videos, predicted, ap, interpolated in zip(classes, *columns, strict=True)
    ]
    return sorted(rows, key=lambda row: (row["ap"] is None, row["ap"] or 0.0, row["name"]))


def _without_numbers(warning: str) -> str:
    """Replace the numbers in a warning, so that warnings of one kind are counted together."""
    return " ".join("…" if _is_number(word) else word for word in warning.split())


def _is_number(word: str) -> bool:
    try:
        float(word.strip("()[],;:%s"))
    except ValueError:
        return False
    return True


def _whole_number(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
