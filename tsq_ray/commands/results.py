"""Commands that use bundles and runs: predict, evaluate, report, export, verify, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tsq_ray import chat
from tsq_ray.commands.jobs import submit_command
from tsq_ray.console import show, show_priced
from tsq_ray.cost import Price
from tsq_ray.errors import RunError
from tsq_ray.log import LogFormat
from tsq_ray.options import (
    Address,
    AsJson,
    BatchModel,
    ConfigFile,
    Debug,
    DocumentRoot,
    ExportFormats,
    FrameUrls,
    LogFormats,
    Model,
    Out,
    Prices,
    Prompt,
    Sets,
    SharedFs,
    Split,
    Submit,
    TakeOver,
    WaitS,
)
from tsq_ray.runtime.session import Session
from tsq_ray.summaries import evaluation_text, prediction_text, tree_text, verification_text


def predict(
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Paths or URIs.")],
    model: Model,
    config: ConfigFile = None,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Label one or a few videos on this machine, without Ray."""
    from tsq_ray.bundle.overrides import scoring_config
    from tsq_ray.prediction import predict_rows

    rows = predict_rows(videos, model, scoring_config(model, config, sets or ()))
    show({"videos": rows}, as_json, "\n".join(map(prediction_text, rows)))
    if all(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


def evaluate(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FEATURES|PREDICTIONS...",
            help="One features folder with recognizer_logits, or finished score runs.",
        ),
    ],
    model: Model,
    out: Out,
    annotations: Annotated[
        str | None,
        typer.Option(
            "--annotations",
            metavar="FILE",
            help="Annotated salient segments (docs/evaluation.md).",
        ),
    ] = None,
    tables: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            metavar="NAME",
            help="Only this table or figure, e.g. table2 or figure3; repeatable; default: all.",
        ),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    split: Split = None,
    take_over: TakeOver = False,
    address: Address = None,
    wait_s: WaitS = 0.0,
    submit: Submit = False,
    shared_fs: SharedFs = False,
    price: Prices = None,
    as_json: AsJson = False,
    log_format: LogFormats = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Compute the paper's tables, or compare finished predictions.

    The tables cover samplers x budgets, ablations and GFLOPs; the comparison, quality and cost.
    """
    prices = Price.parse(price) if price is not None else None
    if submit:
        from tsq_ray.config import load_config

        return submit_command(context, load_config(config, sets or ()))
    from tsq_ray.evaluation import evaluate as run
    from tsq_ray.evaluation import evaluation_config

    settings = evaluation_config(model, config, sets or ())
    session = Session(address, wait_s, show_progress=not as_json, debug=debug, shared_fs=shared_fs)
    options: dict[str, Any] = {"annotations": annotations, "tables": tables or (), "split": split}
    summary = run(sources, model, out, settings, take_over=take_over, session=session, **options)
    return show_priced(summary, as_json, evaluation_text, prices)


def report(
    predictions: Annotated[str, typer.Argument(metavar="PREDICTIONS")],
    out: Annotated[str, typer.Option("--out", metavar="FILE.html", help="HTML page to write.")],
    max_videos: Annotated[
        int, typer.Option("--max-videos", min=0, help="Number of videos shown with their frames.")
    ] = 60,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a self-contained HTML page about a run.

    Shows totals, failures, mAP and the chosen frames of each video.
    """
    from tsq_ray.reporting import build_report

    summary = build_report(predictions, out, max_videos=max_videos)
    show(summary, as_json, f"report: {summary.out}")


def export(
    predictions: Annotated[str, typer.Argument(metavar="PREDICTIONS")],
    out: Out,
    formats: ExportFormats = None,
    frames: Annotated[
        bool | None,
        typer.Option(
            "--frames/--no-frames",
            help="Write the chosen frames as JPEG; "
            "default: yes, unless --format is given without frames.",
        ),
    ] = None,
    size: Annotated[
        int, typer.Option("--size", metavar="PIXELS", help="Shorter side of the frames.")
    ] = 480,
    batch_model: BatchModel = None,
    prompt: Prompt = chat.PROMPT,
    frame_urls: FrameUrls = None,
    document_root: DocumentRoot = "/",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Export labels as CSV and JSONL, the chosen frames as JPEG, or both for other tools.

    The formats for other tools are Label Studio's tasks, ActivityNet's JSON, and requests for
    OpenAI's Batch API.
    """
    from tsq_ray.reporting import export_predictions

    what = formats or ["labels", "frames"]
    if frames is not None:
        what = [name for name in what if name != "frames"] + ["frames"] * frames
    summary = export_predictions(
        predictions,
        out,
        what=what,
        size=size,
        batch_model=batch_model or "",
        prompt=prompt,
        frame_urls=frame_urls or "",
        document_root=document_root,
    )
    show(summary, as_json, "\n".join(f"{key}: {value}" for key, value in vars(summary).items()))


def verify(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Run folder of extract or score.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check the row accounting of a run; exit code 1 if it does not add up."""
    from tsq_ray.runs.verify import verify as run

    found = run(uri)
    show(found, as_json, verification_text(found))
    if found.problems:
        raise typer.Exit(1)


def info(
    context: typer.Context,
    uri: Annotated[str | None, typer.Argument(metavar="BUNDLE|MANIFEST|URI")] = None,
    cluster: Annotated[
        bool,
        typer.Option(
            "--cluster",
            help="Show the Ray cluster and the layouts of runs on it: with a manifest, of runs "
            "over it; with a bundle, of scoring.",
        ),
    ] = False,
    address: Address = None,
    submit: Submit = False,
    shared_fs: SharedFs = False,
    config: ConfigFile = None,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Describe a bundle, manifest, run folder or cluster.

    Shows counts, classes, settings, provenance and GFLOPs; for a cluster, what is free, which jobs
    hold the rest, and how runs would be laid out.
    """
    from tsq_ray.describe import describe

    if not cluster and uri is None:
        raise RunError("info takes a bundle, manifest or run folder, or --cluster, or both")
    if submit and not cluster:
        raise RunError("--submit: info runs as a job only with --cluster; leave it out")
    if submit:
        return submit_command(context)
    found = describe(uri) if uri is not None else {}
    if cluster:
        found = _cluster_for(uri, found, Session(address, debug=debug), config, sets)
    return show(found, as_json, tree_text(found))


def _cluster_for(
    uri: str | None,
    found: dict[str, Any],
    session: Session,
    config: Path | None,
    sets: list[str] | None,
) -> dict[str, Any]:
    """Describe the cluster and run layouts on it: for a manifest, a bundle, or neither.

    `found` is the description of `uri`.
    """
    from tsq_ray.bundle.overrides import scoring_config
    from tsq_ray.config import load_config
    from tsq_ray.runtime.overview import describe_cluster

    kind = found.get("kind")
    if uri is not None and kind == "bundle":
        settings = scoring_config(uri, config, sets or ())
        return describe_cluster(session, settings, stages=("score", "serve"))
    if kind not in (None, "manifest"):
        raise RunError(f"info {uri} --cluster: takes a manifest or a bundle, this is {kind}")
    settings = load_config(config, sets or ())
    if kind is None:
        return describe_cluster(session, settings)
    return describe_cluster(session, settings, found["videos"], ("extract", "finetune", "score"))
