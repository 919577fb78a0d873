"""Finished runs of `tsq score`, compared as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tsq_ray import runs, storage
from tsq_ray.artifact import is_bundle, read_bundle_settings
from tsq_ray.bundle import Bundle, load_bundle
from tsq_ray.errors import RunError
from tsq_ray.evaluate.annotations import Annotations, on_evidence
from tsq_ray.evaluate.measures import Cost, Figure, gflops
from tsq_ray.evaluate.tables import Column, Table
from tsq_ray.score import measure

_COLUMNS = ["video_id", "uri", "status", "selected_pts_s", "decode_ms", "sample_ms", "recognize_ms"]


def compare(uris: Sequence[str], model: Bundle, annotations: Annotations | None) -> Table:
    """One row a run, and one row for each group of runs that differ in nothing but the model (its seed, say): their mean and interval."""
    found = [_Run(uri, model, annotations) for uri in uris]
    columns = [
        *(Column(title) for title in ("run", "sampler", "T", "K", "ok", "failed")),
        *(Column(title, "%") for title in ("mAP", "mAP interpolated", "top-1", "on evidence")),
        *(Column("GFLOPs", "G"), Column("true GFLOPs", "G"), Column("s/video", "s")),
    ]
    rows: list[list[Any]] = [
        [run.name, run.mode, str(run.num_frames), run.budget, str(run.ok), str(run.failed), *map(_figure, run.figures)] for run in found
    ]
    groups: dict[tuple[str, int, str], list[_Run]] = {}
    for run in found:
        groups.setdefault((run.mode, run.num_frames, run.budget), []).append(run)
    for (mode, num_frames, budget), members in groups.items():
        if len(members) > 1:
            means = [Figure(tuple(values)) for values in zip(*(run.figures for run in members), strict=True)]
            rows.append([f"mean of {len(members)} runs", mode, str(num_frames), budget, "", "", *means])
    notes = ["seconds a video: decode, sample and recognise as the runs measured them, on their machines"]
    if len({run.video_ids for run in found}) > 1:
        notes.append("warning: the runs hold different videos, so their figures are not of the same thing")
    if any(math.isnan(run.figures[4]) for run in found):
        notes.append("GFLOPs '-': the run's model is neither --model nor still at its place")
    return Table("comparison", "Finished runs", columns, rows, notes)


def _figure(value: float) -> Figure:
    return Figure((value,))


class _Run:
    """One predictions folder; `figures` in the order of the table, nan where unknown."""

    def __init__(self, uri: str, model: Bundle, annotations: Annotations | None) -> None:
        self.uri = storage.normalize(uri)
        run = runs.read_run(self.uri, "predictions")
        parts = runs.list_parts(self.uri)
        if not parts:
            raise RunError(f"{storage.redact(self.uri)}: no part-*.parquet here, the run has no videos; leave it out")
        table = pa.concat_tables([runs.read_part(part.uri, _COLUMNS) for part in parts])
        records = table.to_pylist()
        ok = [record for record in records if record["status"] == "ok"]
        self.name = storage.name_of(self.uri)
        self.ok, self.failed = len(ok), len(records) - len(ok)
        self.video_ids = frozenset(table["video_id"].to_pylist())
        sampler = run["config"]["sampler"]
        self.mode: Any = sampler["mode"]
        self.num_frames = run["config"]["decode"]["num_frames"]
        adaptive = sampler["budget"] == "adaptive"
        self.budget = f"up to {sampler['max_budget']}" if adaptive else str(sampler["budget"])
        self.frames = float(np.mean([len(record["selected_pts_s"]) for record in ok] or [0])) if adaptive else sampler["budget"]
        measured = run.get("metrics") or measure(self.uri, run["bundle_classes"])
        evidence = math.nan
        if annotations is not None:
            evidence = on_evidence(((record["uri"], record["selected_pts_s"]) for record in ok), annotations)
        self.figures = (
            *(float(measured.get(name, math.nan)) for name in ("mAP", "mAP_interpolated", "top1")),
            evidence,
            *self._gflops(run, model),
            self._seconds(ok),
        )

    def _gflops(self, run: dict[str, Any], model: Bundle) -> tuple[float, float]:
        bundle = _bundle_of(run["model"], model)
        if bundle is None or bundle.recognizer is None:
            return math.nan, math.nan
        mode: Cost = "visual" if self.mode == "both" and bundle.objects is None else "uniform" if self.mode == "random" else self.mode
        shape = bundle.sampler.shape
        return (
            gflops(bundle, mode, self.num_frames, self.frames, shape, "field"),
            gflops(bundle, mode, self.num_frames, self.frames, shape, "true"),
        )

    @staticmethod
    def _seconds(ok: Sequence[dict[str, Any]]) -> float:
        total = [sum(record[name] or 0.0 for name in ("decode_ms", "sample_ms", "recognize_ms")) / 1000 for record in ok]
        return float(np.mean(total)) if total else math.nan


def _bundle_of(made_by: dict[str, Any], model: Bundle) -> Bundle | None:
    """The bundle that made a run: --model, or the one at the place that the run names, if it is still the same."""
    if made_by["sha256"] == model.sha256:
        return model
    if is_bundle(made_by["uri"]) and read_bundle_settings(made_by["uri"])[1] == made_by["sha256"]:
        return load_bundle(made_by["uri"])
    return None
