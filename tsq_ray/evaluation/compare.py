"""Compare finished runs of `tsq score` without scoring again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import storage
from tsq_ray.bundle.settings import is_bundle, read_bundle_settings
from tsq_ray.bundle.weights import Bundle, load_bundle
from tsq_ray.errors import RunError
from tsq_ray.evaluation.annotations import Annotations, on_evidence
from tsq_ray.evaluation.measures import Cost, MeanOverSeeds, gflops
from tsq_ray.evaluation.tables import Table, TableColumn
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.folder import read_run
from tsq_ray.score_run import measure_predictions

_MILLISECONDS = ("decode_ms", "sample_ms", "recognize_ms")
_COUNTED = ["video_id", "status", "selected_pts_s", *_MILLISECONDS]


def compare(uris: Sequence[str], model: Bundle, annotations: Annotations | None) -> Table:
    """Return a table with one row per run and one per group of runs that differ only in the model.

    The row of a group, such as models of several seeds, holds the mean and its interval.
    """
    runs = [_Run(uri, model, annotations) for uri in uris]
    columns = [
        *(TableColumn(title) for title in ("run", "sampler", "T", "K", "ok", "failed")),
        *(TableColumn(title, "%") for title in ("mAP", "mAP interpolated", "top-1", "on evidence")),
        *(TableColumn("GFLOPs", "G"), TableColumn("true GFLOPs", "G"), TableColumn("s/video", "s")),
    ]
    rows: list[list[Any]] = [
        [
            run.name,
            run.mode,
            str(run.num_frames),
            run.budget,
            str(run.ok),
            str(run.failed),
            *map(_single, run.figures),
        ]
        for run in runs
    ]
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    for members in groups.values():
        if len(members) > 1:
            first = members[0]
            means = [
                MeanOverSeeds(tuple(values))
                for values in zip(*(run.figures for run in members), strict=True)
            ]
            name, num_frames = f"mean of {len(members)} runs", str(first.num_frames)
            rows.append([name, first.mode, num_frames, first.budget, "", "", *means])
    notes = [
        "s/video: decoding, sampling and recognition as each run measured them, on its machine"
    ]
    if len({run.videos for run in runs}) > 1:
        notes.append("warning: the runs hold different videos, so their results are not comparable")
    if any(math.isnan(run.figures[4]) for run in runs):
        notes.append(
            "GFLOPs '-': the run's model is not --model and is no longer at the recorded URI"
        )
    return Table("comparison", "Finished runs", columns, rows, notes)


def _single(value: float) -> MeanOverSeeds:
    return MeanOverSeeds((value,))


class _Run:
    """One predictions folder; `figures` in column order, nan if unknown."""

    def __init__(self, uri: str, model: Bundle, annotations: Annotations | None) -> None:
        self.uri = storage.normalize(uri)
        run = read_run(self.uri, "predictions")
        parts = [part.uri for part in list_parts(self.uri)]
        if not parts:
            raise RunError(
                f"{storage.redact(self.uri)}: no part-*.parquet here, so the run has no videos; "
                "leave this folder out"
            )
        count = _count(parts)
        self.name = storage.name_of(self.uri)
        self.ok, self.failed, self.videos = count.ok, count.rows - count.ok, count.videos
        sampler = run["config"]["sampler"]
        self.mode: Any = sampler["mode"]
        self.num_frames = run["config"]["decode"]["num_frames"]
        adaptive = sampler["budget"] == "adaptive"
        self.budget = f"up to {sampler['max_budget']}" if adaptive else str(sampler["budget"])
        own = {name: value for name, value in run["identity"]["sampler"].items() if name != "seed"}
        decode = [run["config"]["decode"]["strategy"], self.num_frames]
        self.group = json.dumps([own, *decode], sort_keys=True)
        """Equal for runs that differ only in the model."""
        self.frames = count.chosen / max(count.ok, 1) if adaptive else sampler["budget"]
        measured = run.get("metrics") or measure_predictions(self.uri, run["bundle_classes"])
        self.figures = (
            *(float(measured.get(name, math.nan)) for name in ("mAP", "mAP_interpolated", "top1")),
            math.nan if annotations is None else on_evidence(_chosen(parts), annotations),
            *self._gflops(run, model),
            count.seconds / count.ok if count.ok else math.nan,
        )

    def _gflops(self, run: dict[str, Any], model: Bundle) -> tuple[float, float]:
        bundle = _bundle_of(run["model"], model)
        if bundle is None or bundle.recognizer is None:
            return math.nan, math.nan
        mode: Cost = (
            "visual"
            if self.mode == "both" and bundle.objects is None
            else "uniform"
            if self.mode == "random"
            else self.mode
        )
        shape = bundle.sampler.shape
        return (
            gflops(bundle, mode, self.num_frames, self.frames, shape, "field"),
            gflops(bundle, mode, self.num_frames, self.frames, shape, "true"),
        )


@dataclass(frozen=True)
class _Counts:
    """Totals over the rows of a run; `chosen` frames and `seconds` count ok rows only."""

    rows: int
    ok: int
    chosen: int
    seconds: float
    videos: str
    """Hash of the sorted video ids, equal for runs over the same videos."""


def _count(parts: Sequence[str]) -> _Counts:
    ids, rows, ok, chosen, seconds = [], 0, 0, 0, 0.0
    for uri in parts:
        table = read_part(uri, _COUNTED)
        rows += len(table)
        ids.append(table["video_id"].to_numpy().astype(np.bytes_))
        table = table.filter(pc.equal(table["status"], "ok"))
        ok += len(table)
        chosen += pc.sum(pc.list_value_length(table["selected_pts_s"])).as_py() or 0
        seconds += (
            sum(pc.sum(table[name].cast(pa.float64())).as_py() or 0.0 for name in _MILLISECONDS)
            / 1000
        )
    videos = np.sort(np.concatenate(ids))  # 16 bytes per row
    return _Counts(rows, ok, chosen, seconds, storage.sha256_of(videos.tobytes()))


def _chosen(parts: Sequence[str]) -> Iterator[tuple[str, Sequence[float]]]:
    """Yield the URI and the times of the chosen frames of each ok video."""
    for uri in parts:
        table = read_part(uri, ["uri", "status", "selected_pts_s"])
        rows = table.filter(pc.equal(table["status"], "ok")).select(["uri", "selected_pts_s"])
        yield from ((row["uri"], row["selected_pts_s"]) for row in rows.to_pylist())


def _bundle_of(recorded: dict[str, Any], model: Bundle) -> Bundle | None:
    """Return the bundle of a run: `model`, or the recorded one if it is unchanged, else None."""
    sha256 = recorded["sha256"]
    if sha256 == model.sha256:
        return model
    if is_bundle(recorded["uri"]) and read_bundle_settings(recorded["uri"])[1] == sha256:
        return load_bundle(recorded["uri"])
    return None
