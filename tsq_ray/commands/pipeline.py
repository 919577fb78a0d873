"""Commands from archive to labelled rows: index, extract, finetune, import, train, score."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tsq_ray.commands.jobs import Dashboard, submit_command
from tsq_ray.console import end_run, show, show_priced
from tsq_ray.cost import Price
from tsq_ray.errors import RunError
from tsq_ray.log import LogFormat
from tsq_ray.options import (
    Address,
    AsJson,
    ConfigFile,
    Debug,
    DryRun,
    Encoder,
    KeptScores,
    LabelFiles,
    LabelsFormat,
    Limit,
    LogFormats,
    ManifestOut,
    MaxFailed,
    Model,
    Nodes,
    Out,
    Prices,
    Recognizer,
    Retry,
    Role,
    Scores,
    Sets,
    SharedFs,
    Sources,
    Split,
    Submit,
    TakeOver,
    WaitS,
)
from tsq_ray.runtime.session import Session
from tsq_ray.summaries import (
    estimate_text,
    finetune_text,
    import_text,
    index_text,
    training_text,
)


def index(
    context: typer.Context,
    sources: Sources,
    out: ManifestOut,
    labels: LabelFiles = None,
    labels_format: LabelsFormat = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes", metavar="FILE", help="Class names, one per line; fixes their order."
        ),
    ] = None,
    split_name: Annotated[
        str | None,
        typer.Option("--split-name", metavar="NAME", help="Assign all rows to this split."),
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Update an existing manifest: new, changed and deleted videos."
        ),
    ] = False,
    address: Dashboard = None,
    submit: Submit = False,
    shared_fs: SharedFs = False,
    as_json: AsJson = False,
    log_format: LogFormats = LogFormat.text,
    debug: Debug = False,
) -> None:
    """List videos, join their labels and write the manifest."""
    if submit:
        return submit_command(context)
    from tsq_ray.manifest import build_manifest

    summary = build_manifest(
        sources,
        out,
        labels=labels or (),
        labels_format=labels_format,
        classes=classes,
        split_name=split_name,
        update=update,
    )
    return show(summary, as_json, index_text(summary))


def extract(
    context: typer.Context,
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
    shared_fs: SharedFs = False,
    dry_run: DryRun = False,
    nodes: Nodes = None,
    price: Prices = None,
    max_failed: MaxFailed = None,
    as_json: AsJson = False,
    log_format: LogFormats = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Extract the features of every video, one row per video (Ray Data)."""
    from tsq_ray.config import load_config

    settings = load_config(config, sets or ())
    prices = _prices(price, nodes, dry_run)
    if submit:
        return submit_command(context, settings)
    session = Session(address, wait_s, show_progress=not as_json, debug=debug, shared_fs=shared_fs)
    rows: dict[str, Any] = {"split": split, "limit": limit, "retry_failed": retry_failed}
    networks: dict[str, Any] = {"encoder": encoder, "recognizer": recognizer}
    if dry_run:
        from tsq_ray.estimate import Target, estimate_extract

        target = Target(session, nodes, prices)
        estimate = estimate_extract(manifest, settings, out=out, target=target, **networks, **rows)
        return show(estimate, as_json, estimate_text(estimate))
    from tsq_ray.extraction import extract as run

    done = run(manifest, out, settings, take_over=take_over, session=session, **networks, **rows)
    return end_run(done, as_json, max_failed, prices)


def _prices(price: str | None, nodes: int | None, dry_run: bool) -> Price | None:
    """Return the prices of --price. Raises RunError for --nodes without --dry-run."""
    if nodes is not None and not dry_run:
        raise RunError(
            f"--nodes {nodes} needs --dry-run, which predicts for that many nodes; "
            "a run uses the nodes that its cluster has"
        )
    return Price.parse(price) if price is not None else None


def finetune(
    context: typer.Context,
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    role: Annotated[Role, typer.Option("--role", help="What the classifier is for.")],
    out: Out,
    config: ConfigFile = None,
    sets: Sets = None,
    split: Split = None,
    limit: Limit = None,
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
    """Train a frame classifier: the sampler's encoder or the recogniser.

    Trains the whole network (Ray Train), or only a head on a frozen backbone.
    """
    from tsq_ray.config import load_config

    settings = load_config(config, sets or ())
    prices = Price.parse(price) if price is not None else None
    if submit:
        return submit_command(context, settings)
    from tsq_ray.training import finetune as run

    session = Session(address, wait_s, show_progress=not as_json, debug=debug, shared_fs=shared_fs)
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
    return show_priced(summary, as_json, finetune_text, prices)


def import_(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm name; hub id, folder or URI of a transformers model; or, with "
            "recognizer.kind=openai, the name of a model on a server.",
        ),
    ],
    out: Out,
    role: Annotated[
        Role, typer.Option("--role", help="What the classifier is for.")
    ] = Role.recognizer,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FILE", help="Class names, one per line, in order."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="TEXT",
            help="Text of a class for CLIP or SigLIP, with {} for its name (repeatable).",
        ),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a pretrained network as a classifier, without training."""
    from tsq_ray.importing import import_config, import_network

    settings = import_config(model, role.value, config, sets or ())
    summary = import_network(
        settings, out, role.value, classes=classes, templates=tuple(template or ())
    )
    show(summary, as_json, import_text(summary))


def train(
    context: typer.Context,
    features: Annotated[str, typer.Argument(metavar="FEATURES")],
    out: Annotated[
        str, typer.Option("--out", metavar="BUNDLE", help="Folder of the bundle to write.")
    ],
    encoder: Encoder = None,
    recognizer: Recognizer = None,
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
    """Train TSQNet on features (Ray Train) and write the bundle."""
    prices = Price.parse(price) if price is not None else None
    if submit:
        from tsq_ray.config import load_config

        return submit_command(context, load_config(config, sets or ()))
    from tsq_ray.training import train as run
    from tsq_ray.training import training_config

    settings = training_config(features, config, sets or ())
    session = Session(address, wait_s, show_progress=not as_json, debug=debug, shared_fs=shared_fs)
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
    return show_priced(summary, as_json, training_text, prices)


def score(
    context: typer.Context,
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    model: Model,
    out: Out,
    config: ConfigFile = None,
    sets: Sets = None,
    split: Split = None,
    limit: Limit = None,
    retry_failed: Retry = None,
    take_over: TakeOver = False,
    scores: KeptScores = Scores.all,
    address: Address = None,
    wait_s: WaitS = 0.0,
    submit: Submit = False,
    shared_fs: SharedFs = False,
    dry_run: DryRun = False,
    nodes: Nodes = None,
    price: Prices = None,
    max_failed: MaxFailed = None,
    as_json: AsJson = False,
    log_format: LogFormats = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Label every video, one row of predictions per video (Ray Data drives the Serve graph)."""
    from tsq_ray.bundle.overrides import scoring_config

    settings = scoring_config(model, config, sets or ())
    prices = _prices(price, nodes, dry_run)
    if submit:
        return submit_command(context)  # the weights are in the bundle
    session = Session(address, wait_s, show_progress=not as_json, debug=debug, shared_fs=shared_fs)
    rows: dict[str, Any] = {"split": split, "limit": limit, "retry_failed": retry_failed}
    if dry_run:
        from tsq_ray.estimate import Target, estimate_score

        target = Target(session, nodes, prices)
        estimate = estimate_score(manifest, model, settings, out=out, target=target, **rows)
        return show(estimate, as_json, estimate_text(estimate))
    from tsq_ray.scoring import score as run

    done = run(
        manifest,
        model,
        out,
        settings,
        take_over=take_over,
        with_scores=scores is Scores.all,
        session=session,
        **rows,
    )
    return end_run(done, as_json, max_failed, prices)
