"""The tables that compare samplers. Cells are fractions 0..1; tables.py formats them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tsq_ray.errors import RunError
from tsq_ray.evaluation import plots
from tsq_ray.evaluation.bench import Bench
from tsq_ray.evaluation.catalogue import SELECTING, TEACHING, Method, score_notes
from tsq_ray.evaluation.measures import Clock, MeanOverSeeds
from tsq_ray.evaluation.methods import Measured, cost_of, measurable, measure_at_budgets
from tsq_ray.evaluation.tables import Cell, Table, TableColumn, single, trend_notes

_TABLE2_TRENDS = (
    ("tsqnet", "uniform"),
    ("tsqnet", "random"),
    ("tsqnet", "maxconf-l"),
    ("tsqnet", "maxconf"),
    ("maxconf-l", "uniform"),
)


def table2(bench: Bench, out: str) -> Table:
    """Measure every sampler at `sampler.budget`."""
    budget, clock = (
        bench.config.sampler.most_frames,
        Clock(bench.features.run, bench.bundle, bench.videos.num_frames),
    )
    methods, notes = measurable(bench)
    maps: dict[str, MeanOverSeeds] = {}
    rows: list[list[Cell]] = []
    for method in methods:
        for measured in measure_at_budgets(bench, method, (budget,)):
            maps[method.name] = measured.map
            rows.append([method.name, str(measured.budget), *_figures(bench, measured, clock)])
            notes += _diverged(measured)
    columns = [TableColumn("sampler"), TableColumn("K"), *_COLUMNS]
    notes += [f"{method.name}: {_describe(bench, method)}" for method in methods]
    notes += trend_notes(
        [(better, worse, maps.get(better), maps.get(worse)) for better, worse in _TABLE2_TRENDS]
    )
    return Table(
        "table2",
        f"Table 2: samplers at K = {budget} of T = {bench.videos.num_frames}",
        columns,
        rows,
        notes + _legend(clock),
    )


def figure3(bench: Bench, out: str) -> Table:
    """Measure every sampler at every budget: the accuracy-cost plot and its data."""
    clock = Clock(bench.features.run, bench.bundle, bench.videos.num_frames)
    methods, notes = measurable(bench)
    rows: list[list[Cell]] = []
    lines, levels = [], {}
    for method in methods:
        results = measure_at_budgets(bench, method, bench.config.evaluate.budgets)
        for measured in results:
            rows.append([method.name, str(measured.budget), *_figures(bench, measured, clock)])
        notes += _diverged(results[0]) if results else []
        costs = [cost_of(bench, method, _frames(measured), "field") for measured in results]
        known = [cost for cost in costs if cost is not None]
        if results and len(known) == len(costs):
            lines.append(plots.Line(method.name, known, [measured.map for measured in results]))
        elif results:
            levels[f"{method.name}, K = {results[-1].budget}"] = results[-1].map
    title = f"Accuracy and cost by budget, T = {bench.videos.num_frames}"
    pictures = plots.accuracy_cost(lines, levels, out, "figure3", title)
    columns = [TableColumn("sampler"), TableColumn("K"), *_COLUMNS]
    return Table(
        "figure3",
        f"Figure 3: {title[0].lower()}{title[1:]}",
        columns,
        rows,
        notes + _legend(clock),
        pictures[:1],
    )


_COLUMNS = (
    *(TableColumn(title, "%") for title in ("mAP", "mAP interpolated", "top-1", "agreement")),
    TableColumn("on evidence", "%"),
    TableColumn("frames", "n"),
    *(TableColumn(title, "G") for title in ("GFLOPs", "true GFLOPs")),
    TableColumn("s/video", "s"),
)


def selectors(bench: Bench, out: str) -> Table:
    """Measure the selectors of 2024 to 2026 at `sampler.budget`, each with each score.

    The row tsqnet is the paper's selection, regardless of `sampler.selection`.
    """
    sampler = bench.config.sampler.model_copy(update={"selection": "top"})
    bench = replace(bench, config=bench.config.model_copy(update={"sampler": sampler}))
    budget, num_frames = bench.config.sampler.most_frames, bench.videos.num_frames
    clock = Clock(bench.features.run, bench.bundle, num_frames)
    methods, notes = measurable(bench, SELECTING)
    results = [each for method in methods for each in measure_at_budgets(bench, method, (budget,))]
    rows: list[list[Cell]] = []
    for measured, gain in zip(results, _over_tsqnet(results), strict=True):
        names = (measured.method.selector or measured.method.name, measured.method.score or "-")
        rows.append([*names, *_figures(bench, measured, clock), gain])
        notes += _diverged(measured)
    notes += [f"{name}: {what}" for name, what in score_notes().items()]
    notes.append(
        "over tsqnet: points of mAP over TSQNet's plain top K, seed by seed; the selection itself, "
        "about T^2 D multiply-adds, is not counted as cost"
    )
    columns = [TableColumn("selector"), TableColumn("score"), *_COLUMNS]
    columns.append(TableColumn("over tsqnet", "%"))
    title = f"Selectors at K = {budget} of T = {num_frames}"
    return Table("selectors", title, columns, rows, notes + _legend(clock))


def _over_tsqnet(results: Sequence[Measured]) -> list[Cell]:
    """Return each sampler's mAP minus TSQNet's, seed by seed."""
    tsqnet = next((each.map for each in results if each.method.name == "tsqnet"), None)
    return [
        each.map.minus(tsqnet) if tsqnet is not None and each.method.name != "tsqnet" else None
        for each in results
    ]


def _figures(bench: Bench, measured: Measured, clock: Clock) -> list[Cell]:
    field, true = (
        cost_of(bench, measured.method, _frames(measured), counting)
        for counting in ("field", "true")
    )
    seconds = clock.seconds(true) if true is not None else None
    quality = [
        measured.map,
        measured.map_interpolated,
        measured.top1,
        measured.agreement,
        measured.recall,
        MeanOverSeeds((measured.frames.mean,)),
    ]
    return [*quality, single(field), single(true), single(seconds)]


def _frames(measured: Measured) -> float:
    """Return the frames whose cost counts: K, even for shorter videos; the mean if adaptive."""
    return measured.frames.mean if measured.method.adaptive else measured.budget


def _diverged(measured: Measured) -> list[str]:
    return (
        [
            f"{measured.method.name}: the training of {measured.diverged} seeds diverged; "
            "excluded from its results"
        ]
        if measured.diverged
        else []
    )


def _describe(bench: Bench, method: Method) -> str:
    if method.name != "oracle":
        return method.what
    by = "the recogniser's probability of the true class"
    order = (
        f"frames in a known salient segment first, then by {by}"
        if bench.annotations is not None
        else f"by {by}; no annotations given"
    )
    return f"{method.what}: {order}; no cost, since it knows the answer"


def _legend(clock: Clock) -> list[str]:
    notes = [
        "± is half the 95 % interval of the mean over the seeds (Student's t); values without it "
        "do not depend on a seed",
        "agreement: share of the videos with the dense recogniser's best class (all T frames)",
        "on evidence: mean share of the chosen frames that lie in a known salient segment; frames: "
        "mean number of frames recognised",
        "GFLOPs by the field's convention, true GFLOPs as it runs (table 1)",
    ]
    if clock.known:
        notes.append(
            "s/video: an estimate; decoding as the extraction measured it, its encoding time "
            "apportioned by true GFLOPs"
        )
    return notes


def teacher_methods(bench: Bench) -> list[Method]:
    """Return the samplers of the table `teacher` for which there are enough training videos.

    A sampler is also left out if its teacher finds too few classes, or if it learns from labels
    that the features lack.
    """
    available = _available(bench)
    methods = []
    for method in measurable(bench, TEACHING)[0]:
        settings = method.train or {}
        if settings.get("max_videos", 0) >= available > 0:
            continue
        if method.train and "target" not in settings and not bench.features.labelled:
            continue
        try:
            bench.teacher_targets(bench.spec(method.train or {}, {}, bench.seeds[0]).config)
        except RunError:
            continue
        methods.append(method)
    return methods


def _available(bench: Bench) -> int:
    training = bench.features.training
    return len(training) if training is not None else 0


def _left_out(bench: Bench, methods: Sequence[Method]) -> list[str]:
    """Return notes on the samplers of the table `teacher` that were not measured."""
    missing = [method for method in TEACHING if method not in methods]
    notes = []
    if not bench.features.labelled:
        notes.append("the features have no labels: no mAP, no top-1, and tsqnet is not measured")
        missing = [method for method in missing if method.name != "tsqnet"]
    sizes = {(method.train or {}).get("max_videos"): method for method in missing}
    whole = sizes.get(_available(bench))
    if whole is not None and any(method.name == "teacher" for method in methods):
        notes.append(f"{whole.name}: the same as teacher, which learns from all training videos")
        missing.remove(whole)
    if missing:
        names = ", ".join(method.name for method in missing)
        notes.append(f"not measured, too few training videos: {names}")
    return notes


def teacher(bench: Bench, out: str) -> Table:
    """Compare a teacher with labels at `sampler.budget`, by labels and by the dense answer."""
    budget, num_frames = bench.config.sampler.most_frames, bench.videos.num_frames
    clock = Clock(bench.features.run, bench.bundle, num_frames)
    methods, notes = teacher_methods(bench), measurable(bench, TEACHING)[1]
    results = [each for method in methods for each in measure_at_budgets(bench, method, (budget,))]
    rows: list[list[Cell]] = []
    for measured, gain in zip(results, _over_tsqnet(results), strict=True):
        figures = _figures(bench, measured, clock)
        rows.append([measured.method.name, *figures, measured.agreement_map, gain])
        notes += _diverged(measured)
    notes += _left_out(bench, methods)
    notes.append(
        "agreement mAP: with the dense recogniser's classes as ground truth; tsqnet learns from "
        "the labels of the training videos, teacher from the recogniser's answers; over tsqnet: "
        "points of mAP, seed by seed"
    )
    columns = [TableColumn("sampler"), *_COLUMNS, TableColumn("agreement mAP", "%")]
    columns.append(TableColumn("over tsqnet", "%"))
    title = f"Teacher and labels at K = {budget} of T = {num_frames}"
    return Table("teacher", title, columns, rows, notes + _legend(clock))
