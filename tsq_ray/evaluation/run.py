"""`tsq evaluate`: turn features or finished predictions into the paper's tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tsq_ray import log, provenance, storage
from tsq_ray.bundle.settings import NOT_TAUGHT, read_bundle_settings
from tsq_ray.bundle.weights import Bundle, load_bundle
from tsq_ray.config import Config, check_budget, load_config
from tsq_ray.errors import ConfigError, ModelError, RunError
from tsq_ray.evaluation import paper
from tsq_ray.evaluation.annotations import read_annotations
from tsq_ray.evaluation.bench import Bench, Trainings, train_all
from tsq_ray.evaluation.compare import compare
from tsq_ray.evaluation.store import Store
from tsq_ray.evaluation.tables import Table
from tsq_ray.evaluation.videos import EvaluationFeatures, load_features
from tsq_ray.results import EvaluatedTable, EvaluationSummary
from tsq_ray.runs.folder import read_json, read_run, write_json
from tsq_ray.runs.identity import Identity
from tsq_ray.runs.lease import Lease
from tsq_ray.runtime.session import DEFAULT_SESSION, Session

_IDENTITY_FILE = "evaluation.json"
"""The identity, written before the results; a folder with that of another evaluation is refused."""


def evaluation_config(
    model: str, path: str | Path | None = None, sets: Sequence[str] = ()
) -> Config:
    """Load the settings: those the bundle was trained with, then the TOML file, then `sets`."""
    content, _ = read_bundle_settings(model)
    base = {name: content["config"][name] for name in ("decode", "encoders", "sampler")}
    base["train"] = {**(content["provenance"].get("train") or {}), "task": content["task"]}
    return load_config(path, sets, base)


def check_installed() -> None:
    """Raise RunError if the packages that only evaluation needs are not installed."""
    missing = [name for name in ("scipy", "sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        raise RunError(f"evaluate needs {', '.join(missing)}: pip install 'tsq-ray[evaluate]'")


def evaluate(
    sources: str | Sequence[str],
    model: str,
    out: str,
    config: Config | None = None,
    *,
    annotations: str | None = None,
    tables: Sequence[str] = (),
    split: str | None = None,
    take_over: bool = False,
    session: Session = DEFAULT_SESSION,
) -> EvaluationSummary:
    """Make the paper's tables from one features folder, or compare finished predictions.

    Raises UserError for wrong input, RunFailed if a training fails.

    Args:
        sources: one run folder of `tsq extract --recognizer`, or one or more of `tsq score`.
        model: the bundle that provides the networks, the frame head and the training settings.
        out: folder for a Markdown and a CSV file per table, the plots and the finished trainings,
            from which a killed evaluation resumes.
        config: the settings; `evaluation_config(model)` by default.
        annotations: a file of known salient segments (docs/evaluation.md has the formats).
        tables: names of tables, such as "table2" or "figure3"; all of them by default. "teacher"
            alone needs no labels.
        split: split to measure; by default `val`, or every row if the features have no splits.
        take_over: take the folder from another run that writes to it.
        session: the cluster to use and the output to show.
    """
    check_installed()
    sources = [sources] if isinstance(sources, str) else sources
    started = time.time()
    out = storage.normalize(out)
    _check_tables(tables)
    kind = _kind_of(sources)
    bundle = _bundle_to_measure(model)
    known = read_annotations(annotations) if annotations else None
    if kind == "predictions":
        if tables or split:
            raise RunError(
                "--table and --split are for features; leave them out to compare predictions"
            )
        table = compare(sources, bundle, known)
        with Lease(out, take_over=take_over):
            made = [(table, table.write(out, [_model_line(model, bundle), _version()]))]
        return _summary(out, made, started, Trainings(), {"runs": len(sources)})
    config = config or evaluation_config(model)
    features = _features(sources[0], bundle, config, tables, split)
    _check_budgets(config, features, bundle)
    bench = Bench(bundle, features, config, known, Store(out, _data(features, bundle)))
    names, header = list(tables) or _possible(bench), _header(bench, model, annotations)
    with Lease(out, take_over=take_over) as lease:
        begin = _check_identity(bench, out)
        trained = _train(bench, names, session, lease, begin)
        made = [_make(bench, name, out, header) for name in names]
    return _summary(out, made, started, trained, _counts(features))


def _check_tables(tables: Sequence[str]) -> None:
    unknown = [name for name in tables if name not in paper.names()]
    if unknown:
        raise RunError(f"--table {unknown[0]}: no such table; allowed: {', '.join(paper.names())}")


def _kind_of(sources: Sequence[str]) -> str:
    """Return the common kind of the sources; raises RunError if they cannot be combined."""
    if not sources:
        raise RunError("evaluate: no source given; name a features folder or finished score runs")
    kinds = {read_run(uri)["kind"] for uri in sources}
    if kinds == {"features"} and len(sources) > 1:
        raise RunError(
            f"evaluate takes one features folder at a time, got {len(sources)}; run it once per "
            "folder, for example for T = 16 and for T = 50"
        )
    if len(kinds) > 1:
        raise RunError(
            "evaluate takes features or predictions, not both at once; run it once for each"
        )
    return kinds.pop()


def _bundle_to_measure(model: str) -> Bundle:
    """Load the bundle. Raises ModelError if it has no recogniser or an untaught sampler."""
    bundle = load_bundle(model)
    if bundle.recognizer is None:
        raise ModelError(
            f"--model {storage.redact(model)}: the bundle has no recogniser to measure; train it "
            "again with --recognizer URI"
        )
    if not bundle.is_taught:
        raise ModelError(f"--model {storage.redact(model)}: {NOT_TAUGHT}")
    return bundle


def _features(
    uri: str, bundle: Bundle, config: Config, tables: Sequence[str], split: str | None
) -> EvaluationFeatures:
    """Load the features; only the table `teacher` can do without labels."""
    labelled = list(tables) != ["teacher"] or bool(read_run(uri, "features")["classes"])
    limit = config.evaluate.max_videos
    return load_features(uri, bundle, split, limit, labelled=labelled)


def _check_budgets(config: Config, features: EvaluationFeatures, bundle: Bundle) -> None:
    """Raise ConfigError if a K is above the T of the features."""
    num_frames = features.measured.num_frames
    check_budget(config.sampler, num_frames, bundle.task)
    too_large = [budget for budget in config.evaluate.budgets if budget > num_frames]
    if too_large:
        raise ConfigError(
            f"evaluate.budgets: K = {too_large[0]} is above T = {num_frames} "
            "of the features; leave it out, for example --set evaluate.budgets=[1,2,3]"
        )


def _train(
    bench: Bench,
    names: Sequence[str],
    session: Session,
    lease: Lease,
    begin: Callable[[], None],
) -> Trainings:
    """Do the trainings that these tables need and the store lacks.

    `begin` is called before anything is written.
    """
    specs = [spec for name in names for spec in paper.specs_for(bench, name)]
    trained = train_all(bench, specs, session, lease, begin)
    lease.check()
    if not trained.number:
        begin()
    return trained


def _make(bench: Bench, name: str, out: str, header: list[str]) -> tuple[Table, list[str]]:
    table = paper.make(bench, name, out)
    return table, table.write(out, header)


def _possible(bench: Bench) -> list[str]:
    """Return the default tables whose trainings the bundle's settings allow; log the others."""
    possible = []
    for name in paper.default_names():
        try:
            paper.specs_for(bench, name)
        except ConfigError as error:
            log.say(f"evaluate: {name} is left out: {error}")
        else:
            possible.append(name)
    return possible


def _counts(features: EvaluationFeatures) -> dict[str, Any]:
    return {
        "videos": len(features.measured),
        "left_out": features.measured.left_out,
        "split": features.split or "(all rows)",
    }


def _data(features: EvaluationFeatures, bundle: Bundle) -> dict[str, Any]:
    """Return the identity of the data that every training in the folder depends on."""
    run = features.run
    ids = [features.measured.video_ids, features.training.video_ids if features.training else []]
    return {
        "features": {"manifest": run["manifest"]["sha256"], "config": run["identity"]},
        "bundle": bundle.sha256,
        "split": features.split,
        "videos": storage.sha256_of(json.dumps(ids).encode()),
        "classes": storage.sha256_of(json.dumps(features.classes).encode()),
    }


def _trainings(config: Config) -> dict[str, Any]:
    return config.train.record(exclude={"seed", "num_workers", "checkpoint_every"})


def _check_identity(bench: Bench, out: str) -> Callable[[], None]:
    """Return a function that records the identity in the folder unless it is there.

    Raises RunError if the folder holds another evaluation.
    """
    sampler = bench.config.sampler.record(exclude={"seed"})
    identity = Identity.of(data=bench.store.data, sampler=sampler, train=_trainings(bench.config))
    path = storage.join(out, _IDENTITY_FILE)
    recorded = read_json(path)
    if recorded is None:
        return lambda: write_json(path, identity.parts)
    identity.refuse_other(recorded, out, "holds another evaluation")
    return lambda: None


def _header(bench: Bench, model: str, annotations: str | None) -> list[str]:
    """Return the lines above each table: what was measured and how."""
    features, videos, config = bench.features, bench.videos, bench.config
    run, made = features.run, features.run["config"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in videos.left_out.items()) or "none"
    skipped = run["counts"]["skipped"]
    versions = run["versions"]
    decoders = ", ".join(
        f"{name} {versions[name]}" for name in ("av", "decord2") if name in versions
    )
    training = f"{len(features.training)} of split 'train'" if features.training else "none"
    low, high = videos.fps
    lines = [
        f"data: {storage.redact(features.uri)} "
        f"(manifest sha256 {run['manifest']['sha256'][:12]}); "
        f"split {features.split or 'none, all rows'}: "
        f"{len(videos)} videos measured, left out: {left_out}; "
        f"{skipped} manifest inputs without features; trained on: {training}",
        f"T = {videos.num_frames}, K = {config.sampler.most_frames}, "
        f"lambda_v = {config.sampler.lambda_visual:g}, TSQNet's selection: "
        f"{config.sampler.selection}; "
        f"fps of the videos: {low:.3g}" + (f" to {high:.3g}" if high > low else ""),
        f"decoder: {made['decode']['strategy']} by {made['decode']['backend']} ({decoders}); "
        f"batch size: {made['resources']['batch_size']} videos in extraction, "
        f"{config.train.batch_size} in training; {config.train.epochs} epochs",
        f"seeds: {', '.join(map(str, bench.seeds))}; known salient segments: "
        f"{storage.redact(storage.normalize(annotations)) if annotations else 'none given'}",
        f"label order: the bundle's, {len(features.classes)} classes "
        f"(sha256 {storage.sha256_of(json.dumps(features.classes).encode())[:12]}): "
        f"{', '.join(features.classes[:3])}, ...",
        f"{_model_line(model, bench.bundle)}; recogniser {_recognizer_name(bench.bundle)}",
        _version(),
    ]
    if features.unknown_labels:
        lines.append(
            f"labels that the bundle lacks, left out: {', '.join(features.unknown_labels)}"
        )
    return lines


def _recognizer_name(bundle: Bundle) -> str:
    if bundle.recognizer is None:
        return "-"
    config = bundle.recognizer.config
    note = " (behind a server: its multiply-adds are unknown and count as 0)"
    return config.model + (note if config.kind == "openai" else "")


def _model_line(model: str, bundle: Bundle) -> str:
    return f"model: {storage.redact(storage.normalize(model))} (sha256 {bundle.sha256[:12]})"


def _version() -> str:
    versions, revision = provenance.versions(), provenance.git_revision()
    shown = ", ".join(
        f"{name} {versions[name]}"
        for name in ("tsq-ray", "torch", "ray", "timm")
        if name in versions
    )
    return f"version: {shown}" + (f", git {revision[:12]}" if revision else "")


def _summary(
    out: str,
    made: list[tuple[Table, list[str]]],
    started: float,
    trained: Trainings,
    measured: dict[str, Any],
) -> EvaluationSummary:
    return EvaluationSummary(
        out=storage.redact(out),
        measured=measured,
        trained_now=trained.number,
        tables={
            table.name: EvaluatedTable(
                title=table.title,
                files=(*files, *table.pictures),
                rows=tuple(
                    dict(zip(table.titles, row, strict=True))
                    for row in table.formatted_rows()
                    if table.name != "figure4"
                ),
                notes=tuple(table.notes),
            )
            for table, files in made
        },
        seconds=round(time.time() - started, 2),
        happened=trained.happened,
        used=trained.used,
    )
