"""The paper's tables and figures from a bench. Cells are fractions 0..1; tables.py formats them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tsq_ray.config import TSQMode
from tsq_ray.evaluation import plots
from tsq_ray.evaluation.ablations import TABLES, Ablation, Row, ablation
from tsq_ray.evaluation.bench import Bench
from tsq_ray.evaluation.measures import Clock, MeanOverSeeds, measure_sampler
from tsq_ray.evaluation.methods import (
    METHODS,
    SELECTING,
    Measured,
    Method,
    cost_of,
    jobs_of,
    learned_sampler,
    measured_at,
    possible,
    score_notes,
)
from tsq_ray.evaluation.tables import Cell, Table, TableColumn, verdict
from tsq_ray.evaluation.trainings import TrainingSpec
from tsq_ray.model.flops import Counting, cost_table

Make = Callable[[Bench, str], Table]
_TABLE2_SIGNS = (
    ("tsqnet", "uniform"),
    ("tsqnet", "random"),
    ("tsqnet", "maxconf-l"),
    ("tsqnet", "maxconf"),
    ("maxconf-l", "uniform"),
)


def names() -> list[str]:
    """Return the allowed values of --table, in the order in which all are made."""
    return ["table1", "table2", "figure3", *TABLES, "figure4", "selectors"]


def jobs_for(bench: Bench, name: str) -> list[TrainingSpec]:
    """Return the trainings that a table needs; none if the features have no training videos."""
    if bench.features.training is None or name == "table1":
        return []
    if name in ("table2", "figure3"):
        return [job for method in METHODS for job in jobs_of(bench, method)]
    if name == "selectors":
        return [job for method in SELECTING for job in jobs_of(bench, method)]
    if name == "figure4":
        return jobs_of(bench, _method("tsqnet"))[:1]
    return [_job(bench, row, seed) for row in _ablation(bench, name).rows for seed in bench.seeds]


def make(bench: Bench, name: str, out: str) -> Table:
    """Make one table from finished trainings; images are written below `out`."""
    made: dict[str, Make] = {
        "table1": table1,
        "table2": table2,
        "figure3": figure3,
        "figure4": figure4,
        "selectors": selectors,
    }
    return made[name](bench, out) if name in made else ablation_table(bench, name)


def _ablation(bench: Bench, name: str) -> Ablation:
    return ablation(name, bench.config, bench.videos.object_ids.shape[-1])


def _method(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def _job(bench: Bench, row: Row, seed: int) -> TrainingSpec:
    return bench.job(row.train, row.text, seed)


def table1(bench: Bench, out: str) -> Table:
    """Return the bundle's cost per video, module by module, by both countings."""
    bundle, budget = bench.bundle, bench.config.sampler.most_frames
    assert bundle.recognizer is not None
    columns = [TableColumn("Module"), TableColumn("Arch."), TableColumn("Res."), TableColumn("#F")]
    columns += [
        TableColumn("GFLOPs/F", "G"),
        TableColumn("GFLOPs", "G"),
        TableColumn("true GFLOPs/F", "G"),
        TableColumn("true GFLOPs", "G"),
    ]
    mode: TSQMode = "both" if bundle.sampler.shape.modules == "both" else "visual"

    def rows_of(counting: Counting) -> list[tuple[str, str, str, str, float | None, float]]:
        assert bundle.recognizer is not None
        table = cost_table(
            mode,
            num_frames=bench.videos.num_frames,
            budget=budget,
            recognizer=bundle.recognizer.config,
            visual=bundle.encoders.visual,
            objects=bundle.encoders.objects,
            shape=bundle.sampler.shape,
            counting=counting,
        )
        shown = [
            (
                r.module,
                r.arch or "-",
                str(r.resolution or "-"),
                str(r.num_frames or "-"),
                r.gflops_per_frame,
                r.gflops,
            )
            for r in table.rows
        ]
        return [*shown, ("Total", "-", "-", "-", None, table.gflops)]

    rows: list[list[Cell]] = [
        [*field[:4], _single(field[4]), _single(field[5]), _single(true[4]), _single(true[5])]
        for field, true in zip(rows_of("field"), rows_of("true"), strict=True)
    ]
    notes = [
        "GFLOPs: 1e9 multiply-adds by the field's convention (convolutions, plus 2 per output "
        "element of a batch normalisation, without the classifier; sizes other than 224 scaled by "
        "(size / 224)^2; the queries computed for every video)",
        "true GFLOPs: as it runs, counted at the true size with the queries folded",
    ]
    return Table(
        "table1",
        f"Table 1: cost per video, T = {bench.videos.num_frames}, K = {budget}",
        columns,
        rows,
        notes,
    )


def table2(bench: Bench, out: str) -> Table:
    """Measure every sampler at `sampler.budget`."""
    budget, clock = (
        bench.config.sampler.most_frames,
        Clock(bench.features.run, bench.bundle, bench.videos.num_frames),
    )
    methods, notes = possible(bench)
    found: dict[str, MeanOverSeeds] = {}
    rows: list[list[Cell]] = []
    for method in methods:
        for measured in measured_at(bench, method, (budget,)):
            found[method.name] = measured.map
            rows.append([method.name, str(measured.budget), *_figures(bench, measured, clock)])
            notes += _diverged(measured)
    columns = [TableColumn("sampler"), TableColumn("K"), *_COLUMNS]
    notes += [f"{method.name}: {_what(bench, method)}" for method in methods]
    notes += _signs(
        [(better, worse, found.get(better), found.get(worse)) for better, worse in _TABLE2_SIGNS]
    )
    return Table(
        "table2",
        f"Table 2: samplers at K = {budget} of T = {bench.videos.num_frames}",
        columns,
        rows,
        notes + _reading(clock),
    )


def figure3(bench: Bench, out: str) -> Table:
    """Measure every sampler at every budget: the accuracy-cost plot and its data."""
    clock = Clock(bench.features.run, bench.bundle, bench.videos.num_frames)
    methods, notes = possible(bench)
    rows: list[list[Cell]] = []
    lines, level = [], {}
    for method in methods:
        found = measured_at(bench, method, bench.config.evaluate.budgets)
        for measured in found:
            rows.append([method.name, str(measured.budget), *_figures(bench, measured, clock)])
        notes += _diverged(found[0]) if found else []
        costs = [cost_of(bench, method, _frames(measured), "field") for measured in found]
        known = [cost for cost in costs if cost is not None]
        if found and len(known) == len(costs):
            lines.append(plots.Line(method.name, known, [measured.map for measured in found]))
        elif found:
            level[f"{method.name}, K = {found[-1].budget}"] = found[-1].map
    title = f"Accuracy and cost by budget, T = {bench.videos.num_frames}"
    pictures = plots.accuracy_cost(lines, level, out, "figure3", title)
    columns = [TableColumn("sampler"), TableColumn("K"), *_COLUMNS]
    return Table(
        "figure3",
        f"Figure 3: {title[0].lower()}{title[1:]}",
        columns,
        rows,
        notes + _reading(clock),
        pictures[:1],
    )


_COLUMNS = (
    *(TableColumn(title, "%") for title in ("mAP", "mAP interpolated", "top-1", "on evidence")),
    TableColumn("frames", "n"),
    *(TableColumn(title, "G") for title in ("GFLOPs", "true GFLOPs")),
    TableColumn("s/video", "s"),
)


def selectors(bench: Bench, out: str) -> Table:
    """Measure the selectors of 2024 to 2026 at `sampler.budget`, each by each score."""
    budget, num_frames = bench.config.sampler.most_frames, bench.videos.num_frames
    clock = Clock(bench.features.run, bench.bundle, num_frames)
    methods, notes = possible(bench, SELECTING)
    found = [one for method in methods for one in measured_at(bench, method, (budget,))]
    plain = next((one.map for one in found if one.method.name == "tsqnet"), None)
    rows: list[list[Cell]] = []
    for one in found:
        names = (one.method.selector or one.method.name, one.method.score or "-")
        over = one.map.above(plain) if plain is not None and one.method.name != "tsqnet" else None
        rows.append([*names, *_figures(bench, one, clock), over])
        notes += _diverged(one)
    notes += [f"{name}: {what}" for name, what in score_notes().items()]
    notes.append(
        "over tsqnet: points of mAP over TSQNet's plain top K, seed by seed; the selection itself, "
        "some T^2 D multiply-adds, is not counted as cost"
    )
    columns = [TableColumn("selector"), TableColumn("score"), *_COLUMNS]
    columns.append(TableColumn("over tsqnet", "%"))
    title = f"Selectors at K = {budget} of T = {num_frames}"
    return Table("selectors", title, columns, rows, notes + _reading(clock))


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
        measured.recall,
        MeanOverSeeds((measured.frames.mean,)),
    ]
    return [*quality, _single(field), _single(true), _single(seconds)]


def _frames(measured: Measured) -> float:
    """Return the frames the cost counts: K, even for shorter videos; the mean if adaptive."""
    return measured.frames.mean if measured.method.adaptive else measured.budget


def _single(value: float | None) -> MeanOverSeeds | None:
    return None if value is None else MeanOverSeeds((value,))


def _diverged(measured: Measured) -> list[str]:
    return (
        [
            f"{measured.method.name}: the training of {measured.diverged} seeds diverged; "
            "excluded from its results"
        ]
        if measured.diverged
        else []
    )


def _what(bench: Bench, method: Method) -> str:
    if method.name != "oracle":
        return method.what
    by = "the recogniser's probability of the true class"
    order = (
        f"frames in a known salient segment first, then by {by}"
        if bench.annotations is not None
        else f"by {by}; no annotations given"
    )
    return f"{method.what}: {order}; no cost, since it knows the answer"


def _reading(clock: Clock) -> list[str]:
    notes = [
        "± is half the 95 % interval of the mean over the seeds (Student's t); values without it "
        "do not depend on a seed",
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


def _signs(pairs: Sequence[tuple[str, str, Cell, Cell]]) -> list[str]:
    return [
        f"trend in the paper: {better} above {worse}; here {verdict(first, second)}"
        for better, worse, first, second in pairs
    ]


def ablation_table(bench: Bench, name: str) -> Table:
    """Measure each configuration and column at `sampler.budget`; notes say if the trends held."""
    wanted, budget = _ablation(bench, name), bench.config.sampler.most_frames
    notes = list(wanted.notes)
    if bench.features.training is None:
        rows: list[list[Cell]] = []
        notes.append(
            "not measured: the features have no split 'train' other than the measured split"
        )
    else:
        rows = [
            [
                *row.cells,
                *(_cell(bench, row, row.mode or mode, budget, notes) for _, mode in wanted.columns),
            ]
            for row in wanted.rows
        ]
        texts = len(wanted.head)
        for trend in wanted.trends:
            (better, first), (worse, second) = trend.better, trend.worse
            titles = [_place(wanted, row, column) for row, column in (trend.better, trend.worse)]
            notes += _signs(
                [(titles[0], titles[1], rows[better][texts + first], rows[worse][texts + second])]
            )
    columns = [
        *(TableColumn(title) for title in wanted.head),
        *(
            TableColumn(f"{title} mAP".replace("mAP mAP", "mAP"), "%")
            for title, _ in wanted.columns
        ),
    ]
    notes.append(
        "± is half the 95 % interval of the mean over the seeds; trends compare seed by seed, "
        "in points of mAP"
    )
    return Table(
        name, f"{wanted.title}; K = {budget} of T = {bench.videos.num_frames}", columns, rows, notes
    )


def _place(wanted: Ablation, row: int, column: int) -> str:
    cells = " + ".join(wanted.rows[row].cells)
    return cells if len(wanted.columns) == 1 else f"{wanted.columns[column][0]} at {cells}"


def _cell(bench: Bench, row: Row, mode: TSQMode, budget: int, notes: list[str]) -> Cell:
    values = []
    for seed in bench.seeds:
        learned = bench.learned[_job(bench, row, seed)]
        if learned.diverged:
            notes.append(
                f"{' + '.join(row.cells)}, seed {seed}: the training diverged; "
                f"excluded from its results ({mode})"
            )
        else:
            sampler = learned_sampler(bench, learned.arrays, mode)
            values.append(measure_sampler(bench.videos, sampler, budget, bench.task, None).map)
    return MeanOverSeeds(tuple(values)) if values else "diverged"


def figure4(bench: Bench, out: str) -> Table:
    """Project the TSQ embeddings before and after the first seed's training by t-SNE."""
    columns = [TableColumn(title) for title in ("module", "training", "class", "x", "y")]
    job = jobs_of(bench, _method("tsqnet"))[0]
    title = f"Figure 4: TSQ embeddings before and after training, seed {bench.seeds[0]}"
    learned = bench.learned.get(job)
    if learned is None or learned.diverged:
        return Table(
            "figure4", title, columns, [], ["not made: no split 'train', or the training diverged"]
        )
    maps = {
        (module, moment): plots.project(learned.arrays[f"{module}_{moment}"])
        for module in ("visual", "textual")
        for moment in ("before", "after")
        if f"{module}_before" in learned.arrays
    }
    rows: list[list[Cell]] = [
        [module, moment, name, f"{x:.3f}", f"{y:.3f}"]
        for (module, moment), points in maps.items()
        for name, (x, y) in zip(bench.bundle.classes, points.tolist(), strict=True)
    ]
    notes = [
        "t-SNE (scikit-learn, perplexity min(30, (C - 1) / 3), initialised by PCA, seed 0) of the "
        "embeddings themselves, before the convolution"
    ]
    pictures = plots.embedding_maps(maps, bench.bundle.classes, out, "figure4") if maps else []
    return Table("figure4", title, columns, rows, notes, pictures[:1])
