"""Build one self-contained HTML page: totals, failures, quality and cards of some videos."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from tsq_ray import storage
from tsq_ray.config import TSQ_MODES, flatten
from tsq_ray.reporting.agreement import agreement_rows, agreement_svg, measured_videos, verdict
from tsq_ray.reporting.curves import Mark, saliency_svg, time_text
from tsq_ray.reporting.losses import PARTS, losses_svg
from tsq_ray.reporting.pictures import Progress, VideoFrames, data_uri, decode_again, uniform_slots
from tsq_ray.reporting.predictions import Place, Predictions, read_predictions
from tsq_ray.reporting.summary import Summary, summarize
from tsq_ray.results import ReportSummary

THUMBNAIL_PX = 120
"""Shorter side of a thumbnail: 160 x 120 for 4:3."""
JPEG_QUALITY = 78
MAX_CLASSES_SHOWN = 12
_LONG_KEYS = ("parts", "classes", "bundle_classes", "counts", "training_curve", "agreement")
_VERDICTS = {"right": "right", "wrong": "wrong", "unlabelled": "no label", "failed": "failed"}


def build_report(
    predictions_uri: str,
    out: str,
    max_videos: int = 60,
    num_processes: int = 2,
    progress: Progress | None = None,
) -> ReportSummary:
    """Write the report of a predictions folder to `out` (a path or URI) and return its totals.

    The page opens offline: images are data URIs, and the content security policy forbids all
    requests. Frames are decoded again from the videos by `num_processes` child processes; a missing
    video gets a note instead. `choice.choose_shown` picks up to `max_videos` videos for cards.
    Raises RunError or StorageError if the predictions cannot be read.
    """
    out = storage.normalize(out)
    predictions = read_predictions(predictions_uri)
    summary = summarize(predictions, max_videos)
    totals, figures, budget = (
        summary.totals,
        summary.quality,
        _budget(predictions, summary.max_chosen),
    )
    cards, without_pictures = _cards(predictions, summary.shown, budget, num_processes, progress)
    page = _render(
        title=storage.redact(storage.name_of(predictions.uri)),
        uri=storage.redact(predictions.uri),
        facts=_facts(predictions, budget),
        settings=_settings(predictions.run),
        cost=_cost(summary),
        training=_training(predictions.run),
        agreement=_agreement(predictions.run),
        totals=totals,
        quality=figures,
        classes=summary.classes,
        max_classes=MAX_CLASSES_SHOWN,
        failed=[_place(row) | _reason(row) for row in summary.failed],
        num_failed=totals["failed"],
        cards=cards,
        num_videos=totals["videos"],
        budget=budget,
        num_frames=predictions.num_frames,
        sampler=_sampler_name(predictions),
    )
    storage.write_bytes(out, page.encode("utf-8"))
    kept = ("inputs", "ok", "failed", "skipped", "adds_up", "failures", "warned")
    measured = ("judged", "top1", "map", "map_interpolated", "unknown_labels")
    return ReportSummary(
        out=storage.redact(out),
        **{key: totals[key] for key in kept},
        **{key: figures[key] for key in measured},
        shown=len(cards),
        without_pictures=without_pictures,
    )


def _render(**context: Any) -> str:
    files = importlib.resources.files("tsq_ray.reporting")
    script, style = ((files / name).read_text("utf-8") for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "seconds": time_text,
        "count": lambda value: f"{value:,}",
        "percent": lambda value: f"{100 * value:.1f} %",
    }
    template = environment.from_string((files / "report.html.j2").read_text("utf-8"))
    return template.render(
        script=Markup(script), style=Markup(style), script_hash=digest, **context
    )  # trusted: both are files of this package


def _cards(
    predictions: Predictions,
    shown: Sequence[tuple[Place, str]],
    budget: int,
    num_processes: int,
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], int]:
    """Return the cards in the order of `shown`, and the number of ok videos without pictures."""

    def shown_slots(row: Mapping[str, Any]) -> list[int]:
        uniform = uniform_slots(predictions.num_frames, budget)
        return sorted({*(row["selected_slot"] or ()), *uniform})

    rows = predictions.rows([place for place, _ in shown])
    cards = [
        _head(predictions, row, verdict, order)
        for order, (row, (_, verdict)) in enumerate(zip(rows, shown, strict=True))
    ]
    ok = [number for number, (_, verdict) in enumerate(shown) if verdict != "failed"]
    decoded = decode_again(
        predictions, [rows[number] for number in ok], shown_slots, THUMBNAIL_PX, num_processes
    )
    for done, (number, frames) in enumerate(zip(ok, decoded, strict=True), start=1):
        cards[number] |= _body(predictions, frames, budget)
        if progress is not None:
            progress(done, len(ok))
    return cards, sum(bool(card.get("note")) for card in cards)


def _head(
    predictions: Predictions, row: Mapping[str, Any], verdict: str, order: int
) -> dict[str, Any]:
    known = set(predictions.bundle_classes)
    return {
        "order": order,
        "id": row["video_id"],
        "verdict": verdict,
        "verdict_text": _VERDICTS[verdict],
        "labels": [(name, not known or name in known) for name in row["label_names"] or ()],
        "score": (row["top_scores"] or [0.0])[0],
        "warnings": [storage.redact(warning) for warning in row["warnings"] or ()],
        "facts": "",
        "caption": row.get("caption"),
        "top": [],
        **_place(row),
        **_reason(row),
    }


def _place(row: Mapping[str, Any]) -> dict[str, str]:
    uri = storage.redact(row["uri"])
    return {"name": storage.redact(storage.name_of(row["uri"])) or uri, "uri": uri}


def _reason(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "error_type": row["error_type"] or "internal",
        "error_message": storage.redact(row["error_message"] or ""),
    }


def _body(predictions: Predictions, frames: VideoFrames, budget: int) -> dict[str, Any]:
    """Return the rest of an ok video's card: predictions, film strips and curves."""
    row = frames.row
    labels = set(row["label_names"] or ())
    pts = [float(time) for time in row["frame_pts_s"]]
    marks = [
        Mark(float(time), by)
        for time, by in zip(row["selected_pts_s"] or (), row["selected_by"] or (), strict=True)
    ]
    pictures = {slot: data_uri(frame, JPEG_QUALITY) for slot, frame in frames.slots.items()}
    by_time = {pts[slot]: slot for slot in uniform_slots(predictions.num_frames, budget)}
    uniform = [by_time[time] for time in sorted(by_time)]
    curves = (
        ("visual", _floats(row["saliency_visual"])),
        ("textual", _floats(row["saliency_textual"])),
    )
    return {
        "facts": _video_facts(row),
        "top": [
            (name, float(score), name in labels)
            for name, score in zip(row["top_labels"], row["top_scores"], strict=True)
        ],
        "note": frames.note,
        "note_type": frames.error_type,
        "chosen": [
            {"src": pictures.get(slot), "mark": mark}
            for slot, mark in zip(row["selected_slot"] or (), marks, strict=True)
        ],
        "uniform": [{"src": pictures.get(slot), "pts_s": pts[slot]} for slot in uniform],
        "curve": saliency_svg(
            pts, row["duration_s"] or 0.0, curves, marks, [pts[slot] for slot in uniform]
        ),
    }


def _floats(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _video_facts(row: Mapping[str, Any]) -> str:
    facts = [time_text(row["duration_s"])] if row["duration_s"] is not None else []
    facts += [f"{row['width']} × {row['height']}"] if row["width"] and row["height"] else []
    facts += [f"{row['fps']:.4g} fps"] if row["fps"] else []
    return " · ".join([*facts, *([row["codec"]] if row["codec"] else [])])


def _sampler(predictions: Predictions) -> Mapping[str, Any]:
    section = predictions.config.get("sampler")
    return section if isinstance(section, dict) else {}


def _budget(predictions: Predictions, max_chosen: int) -> int:
    """Return K from the settings, else the maximum number of frames chosen for a video."""
    sampler = _sampler(predictions)
    budget = sampler.get("max_budget" if sampler.get("budget") == "adaptive" else "budget")
    return (
        budget
        if isinstance(budget, int) and 1 <= budget <= predictions.num_frames
        else max_chosen or 1
    )


def _sampler_name(predictions: Predictions) -> str:
    mode = str(_sampler(predictions).get("mode", "both"))
    return "the sampler" if mode in TSQ_MODES else f"the baseline {mode}"


def _facts(predictions: Predictions, budget: int) -> list[tuple[str, str]]:
    """Return the main facts about the run; those missing from `_run.json` are left out."""
    run, config = predictions.run, predictions.config
    flat = flatten(config)
    versions = run.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    adaptive = flat.get("sampler.budget") == "adaptive"
    with_lambda = flat.get("sampler.mode", "both") == "both"
    facts = [
        ("Model", _uri_of(run.get("model") or run.get("bundle") or config.get("model"))),
        ("Manifest", _uri_of(run.get("manifest"))),
        ("Finished", str(run.get("ended") or "").replace("T", " ").replace("+00:00", " UTC")),
        ("Candidate frames (T)", predictions.num_frames),
        (
            "Frames recognised (K)",
            f"adaptive, up to {budget}" if adaptive else flat.get("sampler.budget"),
        ),
        ("Sampler", flat.get("sampler.mode")),
        ("Lambda (visual share)", flat.get("sampler.lambda_visual") if with_lambda else None),
        ("Decoding", flat.get("decode.strategy")),
        ("Task", run.get("task")),
        ("Seed", flat.get("sampler.seed")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(name, storage.redact(str(value))) for name, value in facts if value not in (None, "")]


def _uri_of(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("uri")
    return str(value) if value else None


def _settings(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return everything in `_run.json` except long lists, which the page shows elsewhere."""
    flat = flatten({key: value for key, value in run.items() if key not in _LONG_KEYS})
    texts = ((key, storage.redact(str(value))) for key, value in sorted(flat.items()))
    return [(key, text if len(text) <= 300 else text[:300] + " …") for key, text in texts]


def _training(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the plot of the training losses and each loss in the first and the last epoch.

    None if the run has no `training_curve`.
    """
    curve = run.get("training_curve")
    if not curve:
        return None
    parts = [
        (name, curve[0][name], curve[-1][name]) for name in ("loss", *PARTS) if name in curve[0]
    ]
    return {"epochs": len(curve), "drawing": losses_svg(curve), "parts": parts}


def _agreement(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return sentence, plot and table of agreement with the recogniser; None if not measured."""
    record = run.get("agreement")
    if not record:
        return None
    parts = {"verdict": verdict(record), "drawing": agreement_svg(record)}
    return parts | {"rows": agreement_rows(record), "videos": measured_videos(record)}


def _cost(summary: Summary) -> list[tuple[str, str]]:
    """Return the mean time per video of each step, and the total duration of the videos."""
    names = {
        "decode_ms": "Mean decoding time",
        "sample_ms": "Mean sampling time",
        "recognize_ms": "Mean recognition time",
    }
    cost = [
        (names[name], f"{mean:,.0f} ms" if mean >= 10 else f"{mean:.1f} ms")
        for name, mean in summary.means_ms.items()
    ]
    if seconds := summary.duration_s:
        cost.append(
            (
                "Total duration",
                f"{seconds / 3600:,.1f} h" if seconds >= 7200 else f"{seconds / 60:,.1f} min",
            )
        )
    return cost
