"""The paper's tables and figures from a bench. Cells are fractions 0..1; tables.py formats them."""

from __future__ import annotations

from collections.abc import Callable

from tsq_ray.config import TSQMode
from tsq_ray.evaluation import plots
from tsq_ray.evaluation.ablations import TABLES, Ablation, Row, ablation
from tsq_ray.evaluation.bench import Bench
from tsq_ray.evaluation.catalogue import METHODS, SELECTING, method_named
from tsq_ray.evaluation.comparisons import figure3, selectors, table2, teacher, teacher_methods
from tsq_ray.evaluation.measures import MeanOverSeeds, measure_sampler
from tsq_ray.evaluation.methods import learned_sampler, specs_of
from tsq_ray.evaluation.tables import Cell, Table, TableColumn, single, trend_notes
from tsq_ray.evaluation.trainings import TrainingSpec
from tsq_ray.model.flops import Counting, cost_table

Make = Callable[[Bench, str], Table]


ON_REQUEST = ("teacher",)
"""Tables that are made only if --table names them, because they need many trainings."""


def names() -> list[str]:
    """Return the allowed values of --table, in the order in which they are made."""
    return ["table1", "table2", "figure3", *TABLES, "figure4", "selectors", *ON_REQUEST]


def default_names() -> list[str]:
    """Return the tables that are made without --table."""
    return [name for name in names() if name not in ON_REQUEST]


def specs_for(bench: Bench, name: str) -> list[TrainingSpec]:
    """Return the trainings that a table needs; none if the features have no training videos."""
    if bench.features.training is None or name == "table1":
        return []
    if name in ("table2", "figure3"):
        return [spec for method in METHODS for spec in specs_of(bench, method)]
    if name == "selectors":
        return [spec for method in SELECTING for spec in specs_of(bench, method)]
    if name == "teacher":
        return [spec for method in teacher_methods(bench) for spec in specs_of(bench, method)]
    if name == "figure4":
        return specs_of(bench, method_named("tsqnet"))[:1]
    return [_spec(bench, row, seed) for row in _ablation(bench, name).rows for seed in bench.seeds]


def make(bench: Bench, name: str, out: str) -> Table:
    """Make one table from finished trainings; images are written below `out`."""
    made: dict[str, Make] = {
        "table1": table1,
        "table2": table2,
        "figure3": figure3,
        "figure4": figure4,
        "selectors": selectors,
        "teacher": teacher,
    }
    return made[name](bench, out) if name in made else ablation_table(bench, name)


def _ablation(bench: Bench, name: str) -> Ablation:
    return ablation(name, bench.config, bench.videos.object_ids.shape[-1])


def _spec(bench: Bench, row: Row, seed: int) -> TrainingSpec:
    return bench.spec(row.train, row.text, seed)


def table1(bench: Bench, out: str) -> Table:
    """Return the bundle's cost per video, module by module, counted both ways."""
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
        [*field[:4], single(field[4]), single(field[5]), single(true[4]), single(true[5])]
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


def ablation_table(bench: Bench, name: str) -> Table:
    """Measure each configuration and column at `sampler.budget`; notes say if the trends held."""
    design, budget = _ablation(bench, name), bench.config.sampler.most_frames
    notes = list(design.notes)
    if bench.features.training is None:
        rows: list[list[Cell]] = []
        notes.append(
            "not measured: the features have no split 'train' other than the measured split"
        )
    else:
        rows = [
            [
                *row.cells,
                *(_cell(bench, row, row.mode or mode, budget, notes) for _, mode in design.columns),
            ]
            for row in design.rows
        ]
        texts = len(design.head)
        for trend in design.trends:
            titles = [
                _cell_name(design, row, column) for row, column in (trend.better, trend.worse)
            ]
            better, worse = (
                rows[row][texts + column] for row, column in (trend.better, trend.worse)
            )
            notes += trend_notes([(titles[0], titles[1], better, worse)])
    columns = [
        *(TableColumn(title) for title in design.head),
        *(
            TableColumn(f"{title} mAP".replace("mAP mAP", "mAP"), "%")
            for title, _ in design.columns
        ),
    ]
    notes.append(
        "± is half the 95 % interval of the mean over the seeds; trends compare seed by seed, "
        "in points of mAP"
    )
    return Table(
        name, f"{design.title}; K = {budget} of T = {bench.videos.num_frames}", columns, rows, notes
    )


def _cell_name(design: Ablation, row: int, column: int) -> str:
    cells = " + ".join(design.rows[row].cells)
    return cells if len(design.columns) == 1 else f"{design.columns[column][0]} at {cells}"


def _cell(bench: Bench, row: Row, mode: TSQMode, budget: int, notes: list[str]) -> Cell:
    values = []
    for seed in bench.seeds:
        learned = bench.learned[_spec(bench, row, seed)]
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
    spec = specs_of(bench, method_named("tsqnet"))[0]
    title = f"Figure 4: TSQ embeddings before and after training, seed {bench.seeds[0]}"
    learned = bench.learned.get(spec)
    if learned is None or learned.diverged:
        return Table(
            "figure4", title, columns, [], ["not made: no split 'train', or the training diverged"]
        )
    if any(len(learned.arrays[name]) < 2 for name in learned.arrays if name.endswith("_after")):
        return Table("figure4", title, columns, [], ["not made: the network has a single query"])
    teacher = bench.teacher_targets(spec.config)
    classes = bench.bundle.classes
    if teacher is not None:
        classes = [classes[index] for index in teacher.classes]
    maps = {
        (module, moment): plots.project(learned.arrays[f"{module}_{moment}"])
        for module in ("visual", "textual")
        for moment in ("before", "after")
        if f"{module}_before" in learned.arrays
    }
    rows: list[list[Cell]] = [
        [module, moment, name, f"{x:.3f}", f"{y:.3f}"]
        for (module, moment), points in maps.items()
        for name, (x, y) in zip(classes, points.tolist(), strict=True)
    ]
    notes = [
        "t-SNE (scikit-learn, perplexity min(30, (C - 1) / 3), initialised by PCA, seed 0) of the "
        "embeddings themselves, before the convolution"
    ]
    pictures = plots.embedding_maps(maps, classes, out, "figure4") if maps else []
    return Table("figure4", title, columns, rows, notes, pictures[:1])
