"""The figures of a report: row accounting, metrics where labels exist, and which videos get a card."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import storage
from tsq_ray.quality import average_precisions, mean_average_precision
from tsq_ray.report.data import Outcome, Predictions
from tsq_ray.schema import tensor_to_numpy

MAX_EXAMPLES = 3
MAX_WARNINGS = 30
MAX_CONFUSIONS = 15


def accounting(predictions: Predictions, found: Sequence[Outcome]) -> dict[str, Any]:
    """inputs = ok + failed + skipped, failures by error type and warnings, each most frequent first.

    `skipped` and the expected number of inputs come from `_run.json`; `adds_up` is False where the rows say something else.
    """
    failed = [outcome for outcome in found if outcome.verdict == "failed"]
    counts = predictions.run.get("counts")
    counts = counts if isinstance(counts, dict) else {}
    skipped = _whole(counts.get("skipped"), 0)
    ok = len(found) - len(failed)
    expected = {"ok": ok, "failed": len(failed), "inputs": len(found) + skipped}
    examples: dict[str, list[str]] = defaultdict(list)
    for outcome in failed:
        messages = examples[str(outcome.error_type)]
        if outcome.error_message and outcome.error_message not in messages and len(messages) < MAX_EXAMPLES:
            messages.append(outcome.error_message)
    by_type = Counter(str(outcome.error_type) for outcome in failed)
    warned = Counter(storage.redact(_general(warning)) for outcome in found for warning in outcome.warnings)
    return {
        "inputs": len(found) + skipped,
        "ok": ok,
        "failed": len(failed),
        "skipped": skipped,
        "adds_up": all(_whole(counts.get(key), value) == value for key, value in expected.items()),
        "failures": dict(by_type.most_common()),
        "failure_examples": dict(examples),
        "warned": sum(bool(outcome.warnings) for outcome in found),
        "warnings": dict(warned.most_common(MAX_WARNINGS)),
        "more_warnings": max(0, len(warned) - MAX_WARNINGS),
    }


def quality(predictions: Predictions, found: Sequence[Outcome]) -> dict[str, Any]:
    """Top-1, mAP by both conventions, AP by class and the wrong top-1 pairs, over the ok videos with a label that the bundle has.

    Labels are mapped by name to the bundle's classes; names it lacks are counted in `unknown_labels` and left out. The
    mAP figures are None without `scores` or without the bundle's class order.
    """
    judged = [outcome for outcome in found if outcome.verdict in ("right", "wrong")]
    known = set(predictions.bundle_classes)
    unknown = Counter(name for outcome in found for name in outcome.labels if known and name not in known)
    figures: dict[str, Any] = {
        "judged": len(judged),
        "right": sum(outcome.verdict == "right" for outcome in judged),
        "labelled_failed": sum(outcome.verdict == "failed" and bool(outcome.labels) for outcome in found),
        "unknown_labels": dict(unknown.most_common()),
        "top1": None,
        "map": None,
        "map_interpolated": None,
        "per_class": [],
        "confusions": _confusions(judged),
    }
    if not judged:
        return figures
    figures["top1"] = figures["right"] / len(judged)
    if predictions.has_scores and known:
        scores, targets = _matrices(predictions, judged)
        figures["map"] = _finite(mean_average_precision(scores, targets))
        figures["map_interpolated"] = _finite(mean_average_precision(scores, targets, interpolated=True))
        figures["per_class"] = _per_class(predictions.bundle_classes, scores, targets)
    return figures


def predicted_classes(found: Iterable[Outcome]) -> list[tuple[str, int]]:
    """How often each class is the best one, most frequent first."""
    counts = Counter(outcome.top_label for outcome in found if outcome.top_label is not None)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def choose_shown(found: Sequence[Outcome], max_videos: int) -> list[Outcome]:
    """Which videos get a card, in the page's order; the same for the same predictions.

    All where they fit. Else the wrong ones (the most confident first) take up to half of the room and the failed ones up to
    a sixth (one of each reason, then another of each); the others take the rest, one of each predicted class, then another
    of each, and so on. Room that a group leaves goes to the next of them in the order others, wrong, failed.
    """
    wrong = sorted((o for o in found if o.verdict == "wrong"), key=lambda o: (-o.top_score, o.video_id))
    failed = _round_robin([o for o in found if o.verdict == "failed"], lambda o: str(o.error_type))
    others = _round_robin([o for o in found if o.verdict in ("right", "unlabelled")], lambda o: str(o.top_label))
    num_wrong, num_failed = min(len(wrong), max_videos // 2), min(len(failed), max_videos // 6)
    num_others = min(len(others), max_videos - num_wrong - num_failed)
    num_wrong = min(len(wrong), max_videos - num_failed - num_others)
    num_failed = min(len(failed), max_videos - num_wrong - num_others)
    return wrong[:num_wrong] + others[:num_others] + failed[:num_failed]


def _round_robin(group: Iterable[Outcome], key: Any) -> list[Outcome]:
    """By turns one of each key; within a key by video_id, which is a hash and so prefers no folder and no date."""
    turns: Counter[str] = Counter()
    placed: list[tuple[int, str, str, Outcome]] = []
    for outcome in sorted(group, key=lambda o: o.video_id):
        name = key(outcome)
        placed.append((turns[name], name, outcome.video_id, outcome))
        turns[name] += 1
    return [outcome for _, _, _, outcome in sorted(placed, key=lambda item: item[:3])]


def _matrices(predictions: Predictions, judged: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets [N, C] of the judged videos."""
    column = predictions.table.column("scores").take(pa.array([outcome.index for outcome in judged]))
    present = pc.is_valid(column).to_pylist()
    scores = tensor_to_numpy(column.filter(pa.array(present)))
    position = {name: i for i, name in enumerate(predictions.bundle_classes)}
    kept = [outcome for outcome, there in zip(judged, present, strict=True) if there]
    targets = np.zeros((len(kept), len(position)), dtype=bool)
    for row, outcome in enumerate(kept):
        targets[row, [position[name] for name in outcome.labels if name in position]] = True
    return scores, targets


def _per_class(classes: Sequence[str], scores: np.ndarray, targets: np.ndarray) -> list[dict[str, Any]]:
    plain, interpolated = average_precisions(scores, targets), average_precisions(scores, targets, interpolated=True)
    best = scores.argmax(axis=1)
    rows = [
        {
            "name": name,
            "videos": int(targets[:, c].sum()),
            "predicted": int((best == c).sum()),
            "ap": _finite(plain[c]),
            "ap_interpolated": _finite(interpolated[c]),
        }
        for c, name in enumerate(classes)
    ]
    return sorted(rows, key=lambda row: (row["ap"] is None, row["ap"] or 0.0, row["name"]))


def _confusions(judged: Iterable[Outcome]) -> list[tuple[str, str, int]]:
    pairs = Counter((label, str(o.top_label)) for o in judged if o.verdict == "wrong" for label in o.labels)
    return [(*pair, count) for pair, count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:MAX_CONFUSIONS]]


def _general(warning: str) -> str:
    """A warning without its numbers, so that the same kind is counted together."""
    return " ".join("…" if _is_number(word) else word for word in warning.split())


def _is_number(word: str) -> bool:
    try:
        float(word.strip("()[],;:%s"))
    except ValueError:
        return False
    return True


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
