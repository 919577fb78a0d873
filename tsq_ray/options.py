"""Options that several commands of `tsq` share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Role(StrEnum):
    """What finetune's output is for."""

    encoder = "encoder"
    recognizer = "recognizer"


class Scores(StrEnum):
    """How much of the scores predictions keep."""

    all = "all"
    top = "top"


ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings as TOML.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="section.key=value", help="One setting; repeatable."),
]
Split = Annotated[
    str | None, typer.Option("--split", metavar="NAME", help="Only rows of this split.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N videos.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="A Ray cluster (auto, host:port, ray://...); default: start one here."
    ),
]
WaitS = Annotated[
    float,
    typer.Option(
        "--wait-s",
        min=0,
        metavar="SECONDS",
        help="Give up when the cluster has had no room for so long; default: wait.",
    ),
]
Submit = Annotated[
    bool,
    typer.Option(
        "--submit", help="Run as a Ray job on the cluster at --address (its dashboard's URL)."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Probe a few videos and say what would run: time, GPU hours, output size."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="The summary as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks and Ray's logs.")]
MaxFailed = Annotated[
    float | None,
    typer.Option(
        "--max-failed",
        min=0,
        max=1,
        metavar="FRACTION",
        help="More failed videos than this are an error.",
    ),
]
Retry = Annotated[
    str | None,
    typer.Option(
        "--retry-failed",
        metavar="[REASON]",
        help="Do failed videos again: all, or those of one reason.",
    ),
]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Take the folder from another run that writes to it.")
]
Out = Annotated[
    str, typer.Option("--out", metavar="URI", help="Where the result goes: a path or s3:// URI.")
]
Encoder = Annotated[
    str | None, typer.Option("--encoder", metavar="URI", help="A frame encoder from tsq finetune.")
]
Recognizer = Annotated[
    str | None, typer.Option("--recognizer", metavar="URI", help="A recogniser from tsq finetune.")
]
Model = Annotated[str, typer.Option("--model", metavar="BUNDLE", help="The bundle from tsq train.")]
