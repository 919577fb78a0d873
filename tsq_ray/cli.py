"""`tsq`: thin. Parses the command line, loads the settings, calls one function of the package and prints its summary.

The stages are imported inside the commands, so that `tsq --help` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from tsq_ray.console import (
    bare_retry,
    counts_text,
    end_run,
    estimate_text,
    evaluation_text,
    guarded,
    index_text,
    prediction_text,
    prepare_output,
    show,
    training_text,
    tree_text,
    without_options,
)
from tsq_ray.errors import RunError
from tsq_ray.options import (
    Address,
    AsJson,
    ConfigFile,
    Debug,
    DryRun,
    Encoder,
    Limit,
    MaxFailed,
    Model,
    Out,
    Recognizer,
    Retry,
    Role,
    Scores,
    Sets,
    Split,
    Submit,
    TakeOver,
    WaitS,
)
from tsq_ray.runtime.session import Session

app = typer.Typer(
    name="tsq",
    help="Label very large video archives cheaply: choose the salient frames, recognise only those.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(wanted: bool) -> None:
    """`tsq --version`."""
    if wanted:
        from tsq_ray import __version__

        print(f"tsq_ray {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="The package's version."
        ),
    ] = False,
) -> None:
    """Label very large video archives cheaply: choose the salient frames, recognise only those."""


@app.command()
def index(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Folders, s3:// prefixes or files.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="MANIFEST",
            help="The manifest: a Parquet file, or a folder of shards (ends in /, or over a million videos).",
        ),
    ],
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="Labels, in any known format; repeatable; or: folders, none.",
        ),
    ] = None,
    labels_format: Annotated[
        str | None,
        typer.Option(
            "--labels-format",
            metavar="NAME",
            help="The format of the labels, where their content does not tell.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes", metavar="FILE", help="Class names, one a line: fixes their order."
        ),
    ] = None,
    split_name: Annotated[
        str | None, typer.Option("--split-name", metavar="NAME", help="Split of all rows.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="List again: new, changed and deleted videos.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List videos, join their labels, write the manifest."""
    from tsq_ray import manifest as manifests
    from tsq_ray import storage

    old = manifests.find_old(out, update)
    made, summary = manifests.build_manifest(
        sources, labels or (), classes, split_name, old, labels_format
    )
    manifests.write_manifest(made, out)
    show(
        vars(summary) | {"out": storage.redact(out)},
        as_json,
        index_text(vars(summary), storage.redact(out)),
    )


@app.command()
def extract(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    out: Out,
    encoder: Encoder = None,
    recognizer: Recognizer = None,
    config: ConfigFile = None,
    sets: Sets = None,
    split: Split = None,
    limit: Limit = None,
    retry_failed: Retry = None,
    take_over: TakeOver = False,
    address: Address = None,
    wait_s: WaitS = 0.0,
    submit: Submit = False,
    dry_run: DryRun = False,
    max_failed: MaxFailed = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Features of every video, one row a video (Ray Data)."""
    from tsq_ray.config import load_config

    settings = load_config(config, sets or ())
    if dry_run:
        from tsq_ray.estimate import estimate_extract

        estimate = estimate_extract(
            manifest,
            settings,
            encoder,
            recognizer,
            split=split,
            limit=limit,
            out=out,
            retry_failed=retry_failed,
        )
        return show(estimate, as_json, estimate_text(estimate))
    if submit:
        return submit_command(address)
    from tsq_ray.extraction import extract as run

    done = run(
        manifest,
        out,
        settings,
        encoder=encoder,
        recognizer=recognizer,
        split=split,
        limit=limit,
        retry_failed=retry_failed,
        take_over=take_over,
        session=Session(address, wait_s, show_progress=not as_json, debug=debug),
    )
    return end_run(done, out, as_json, max_failed)


@app.command()
def finetune(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    role: Annotated[Role, typer.Option("--role", help="What it is for.")],
    out: Out,
    config: ConfigFile = None,
    sets: Sets = None,
    split: Split = None,
    limit: Limit = None,
    take_over: TakeOver = False,
    address: Address = None,
    wait_s: WaitS = 0.0,
    submit: Submit = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a frame classifier, the sampler's encoder or the recogniser: the whole network (Ray Train), or a head on a frozen backbone."""
    from tsq_ray.config import load_config

    settings = load_config(config, sets or ())
    if submit:
        return submit_command(address)
    from tsq_ray.training import finetune as run

    session = Session(address, wait_s, show_progress=not as_json, debug=debug)
    summary = run(
        manifest,
        role.value,
        out,
        settings,
        split=split,
        limit=limit,
        take_over=take_over,
        session=session,
    )
    return show(summary, as_json, training_text(summary))


@app.command()
def train(
    features: Annotated[str, typer.Argument(metavar="FEATURES")],
    out: Annotated[str, typer.Option("--out", metavar="BUNDLE", help="The bundle, a folder.")],
    encoder: Encoder = None,
    recognizer: Recognizer = None,
    config: ConfigFile = None,
    sets: Sets = None,
    split: Split = None,
    take_over: TakeOver = False,
    address: Address = None,
    wait_s: WaitS = 0.0,
    submit: Submit = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train TSQNet on features (Ray Train) and write the bundle."""
    if submit:
        return submit_command(address)
    from tsq_ray.training import train as run
    from tsq_ray.training import training_settings

    settings = training_settings(features, config, sets or ())
    session = Session(address, wait_s, show_progress=not as_json, debug=debug)
    summary = run(
        features,
        out,
        settings,
        encoder=encoder,
        recognizer=recognizer,
        split=split,
        take_over=take_over,
        session=session,
    )
    return show(summary, as_json, training_text(summary))


@app.command()
def score(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    model: Model,
    out: Out,
    config: ConfigFile = None,
    sets: Sets = None,
    split: Split = None,
    limit: Limit = None,
    retry_failed: Retry = None,
    take_over: TakeOver = False,
    scores: Annotated[
        Scores, typer.Option("--scores", help="top: keep the best labels only.")
    ] = Scores.all,
    address: Address = None,
    wait_s: WaitS = 0.0,
    submit: Submit = False,
    dry_run: DryRun = False,
    max_failed: MaxFailed = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Label every video: Ray Data drives the Serve graph; predictions, one row a video."""
    from tsq_ray.bundle.overrides import scoring_config

    settings = scoring_config(model, config, sets or ())
    if dry_run:
        from tsq_ray.estimate import estimate_score

        estimate = estimate_score(
            manifest, model, settings, split=split, limit=limit, out=out, retry_failed=retry_failed
        )
        return show(estimate, as_json, estimate_text(estimate))
    if submit:
        return submit_command(address)
    from tsq_ray.scoring import score as run

    done = run(
        manifest,
        model,
        out,
        settings,
        split=split,
        limit=limit,
        retry_failed=retry_failed,
        take_over=take_over,
        with_scores=scores is Scores.all,
        session=Session(address, wait_s, show_progress=not as_json, debug=debug),
    )
    return end_run(done, out, as_json, max_failed)


@app.command()
def predict(
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Paths or URIs.")],
    model: Model,
    config: ConfigFile = None,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """One or a few videos, here and now, without Ray."""
    from tsq_ray.bundle.overrides import scoring_config
    from tsq_ray.prediction import predict as run
    from tsq_ray.rows import plain_row

    rows = [plain_row(row) for row in run(videos, model, scoring_config(model, config, sets or ()))]
    show({"videos": rows}, as_json, "\n".join(prediction_text(row) for row in rows))
    if all(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


@app.command()
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option("--host", help="Address to bind; beyond loopback a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    config: ConfigFile = None,
    sets: Sets = None,
    address: Address = None,
    wait_s: WaitS = 0.0,
    debug: Debug = False,
) -> None:
    """The endpoint: POST /v1/score. A bearer token comes from the environment variable TSQ_TOKEN."""
    from tsq_ray.serving.endpoint import check_address, run_endpoint

    check_address(host, port, address)  # a wrong one is told before torch is imported
    from tsq_ray.bundle.overrides import scoring_config

    settings = scoring_config(model, config, sets or ())
    run_endpoint(model, settings, host, port, Session(address, wait_s, debug=debug))


@app.command()
def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FEATURES|PREDICTIONS...",
            help="One features folder with recognizer_logits, or finished runs of score.",
        ),
    ],
    model: Model,
    out: Out,
    annotations: Annotated[
        str | None,
        typer.Option(
            "--annotations", metavar="FILE", help="Known salient segments (docs/evaluation.md)."
        ),
    ] = None,
    tables: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            metavar="NAME",
            help="Only this one, table2 or figure3 for example; repeatable; default: all.",
        ),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    split: Split = None,
    address: Address = None,
    submit: Submit = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """The paper's tables: samplers x budgets, ablations, GFLOPs; or finished predictions, compared as they are."""
    if submit:
        return submit_command(address)
    from tsq_ray.evaluation import evaluate as run
    from tsq_ray.evaluation import evaluation_settings

    settings = evaluation_settings(model, config, sets or ())
    session = Session(address, show_progress=not as_json, debug=debug)
    summary = run(
        sources,
        model,
        out,
        settings,
        annotations=annotations,
        tables=tables or (),
        split=split,
        session=session,
    )
    return show(summary, as_json, evaluation_text(summary))


@app.command()
def report(
    predictions: Annotated[str, typer.Argument(metavar="PREDICTIONS")],
    out: Annotated[str, typer.Option("--out", metavar="FILE.html", help="The page.")],
    max_videos: Annotated[
        int, typer.Option("--max-videos", min=0, help="Videos shown with their frames.")
    ] = 60,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page: totals, failures, mAP, and the chosen frames of each video."""
    from tsq_ray import storage
    from tsq_ray.reporting import build_report

    summary = build_report(
        storage.normalize(predictions), storage.normalize(out), max_videos=max_videos
    )
    show(summary, as_json, f"report: {storage.redact(storage.normalize(out))}")


@app.command()
def export(
    predictions: Annotated[str, typer.Argument(metavar="PREDICTIONS")],
    out: Out,
    frames: Annotated[
        bool, typer.Option("--frames/--no-frames", help="The chosen frames as JPEG.")
    ] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Labels as CSV and JSONL, the chosen frames as JPEG."""
    from tsq_ray import storage
    from tsq_ray.reporting import export_predictions

    summary = export_predictions(
        storage.normalize(predictions),
        storage.normalize(out),
        what=("labels", "frames") if frames else ("labels",),
    )
    show(summary, as_json, "\n".join(f"{key}: {value}" for key, value in summary.items()))


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(metavar="URI", help="What extract or score wrote.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Row accounting of a run; exit code 1 when it does not add up."""
    from tsq_ray.runs.verify import verify as run

    result = run(uri)
    counts = result["counts"]
    verdict = (
        "adds up"
        if not result["problems"]
        else f"does not add up: {len(result['problems'])} problems"
    )
    lines = [
        f"{result['uri']}: {result['kind']}: {counts_text(counts)}",
        f"checked {', '.join(result['checks'])}: {verdict}",
    ]
    show(result, as_json, "\n".join([*lines, *(f"  {problem}" for problem in result["problems"])]))
    if result["problems"]:
        raise typer.Exit(1)


@app.command()
def info(
    uri: Annotated[str | None, typer.Argument(metavar="BUNDLE|MANIFEST|URI")] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="The Ray cluster, and the layout of a run on it.")
    ] = False,
    address: Address = None,
    config: ConfigFile = None,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What is this: counts, classes, settings, provenance, GFLOPs."""
    from tsq_ray.config import load_config
    from tsq_ray.describe import describe, describe_cluster

    if cluster == (uri is not None):
        raise RunError("info takes one thing: a bundle, a manifest or a run folder, or --cluster")
    found = (
        describe_cluster(Session(address, debug=debug), load_config(config, sets or ()))
        if cluster
        else describe(uri or "")
    )
    show(found, as_json, tree_text(found))


def submit_command(address: str | None) -> None:
    """Send this very command line to a cluster as a job and follow it; exit code 1 where the job fails."""
    from tsq_ray.runtime.jobs import follow_job, submit_job

    argv = without_options(sys.argv[1:], flags=("--submit",), options=("--address",))
    job = submit_job(argv, address)
    print(f"job: {job}", file=sys.stderr)  # noqa: T201
    status = follow_job(job, address)
    print(f"job {job}: {status}", file=sys.stderr)  # noqa: T201
    if status != "SUCCEEDED":
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 the run failed, 2 wrong input."""
    prepare_output()
    # before Arrow is loaded, and for Ray's workers too: its own allocator keeps what is freed, 170 MiB of the driver at a million rows
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    arguments = bare_retry(list(sys.argv[1:] if argv is None else argv)) or ["--help"]
    debug = "--debug" in arguments
    return guarded(lambda: app(args=arguments, prog_name="tsq", standalone_mode=False), debug)


if __name__ == "__main__":
    sys.exit(main())
