"""The command that labels an archive without labels, end to end."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from tsq_ray.commands.jobs import submit_command
from tsq_ray.console import refuse_failures, show
from tsq_ray.cost import Price, Used
from tsq_ray.log import LogFormat
from tsq_ray.options import (
    Address,
    AsJson,
    ConfigFile,
    Debug,
    KeptScores,
    LogFormats,
    MaxFailed,
    Out,
    Prices,
    Scores,
    Sets,
    SharedFs,
    Sources,
    Submit,
    WaitS,
)
from tsq_ray.results import LabelSummary
from tsq_ray.runtime.session import Session
from tsq_ray.summaries import label_text

Sample = Annotated[
    int,
    typer.Option("--sample", metavar="N", help="Videos of which the recogniser sees all T frames."),
]


def label(
    context: typer.Context,
    sources: Sources,
    recognizer: Annotated[
        str,
        typer.Option(
            "--recognizer",
            metavar="URI",
            help="Recogniser from tsq finetune or import, the teacher.",
        ),
    ],
    out: Out,
    sample: Sample = 500,
    agreement: Annotated[
        float,
        typer.Option(
            "--agreement",
            metavar="SHARE",
            help="Minimum share of held-out videos that K frames label like all T frames.",
        ),
    ] = 0.95,
    config: ConfigFile = None,
    sets: Sets = None,
    scores: KeptScores = Scores.all,
    address: Address = None,
    wait_s: WaitS = 0.0,
    submit: Submit = False,
    shared_fs: SharedFs = False,
    price: Prices = None,
    max_failed: MaxFailed = None,
    as_json: AsJson = False,
    log_format: LogFormats = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Label an archive without labels: the recogniser teaches a sampler, then sees only K frames.

    Indexes, extracts a sample, trains, chooses the cheapest K that agrees, scores and reports.
    """
    from tsq_ray.config import load_config

    settings = load_config(config, sets or ())
    prices = Price.parse(price) if price is not None else None
    if submit:
        return submit_command(context, settings)
    from tsq_ray.labelling import label as run

    done = run(
        sources,
        recognizer,
        out,
        settings,
        sample=sample,
        agreement=agreement,
        with_scores=scores is Scores.all,
        session=Session(
            address, wait_s, show_progress=not as_json, debug=debug, shared_fs=shared_fs
        ),
    )
    _show(done, as_json, prices)
    refuse_failures(done.predictions.counts, max_failed)


def _show(done: LabelSummary, as_json: bool, prices: Price | None) -> None:
    cost = Used(**done.used).cost(prices) if done.used is not None else None
    show(asdict(done) | {"cost": cost}, as_json, label_text(done, prices))
