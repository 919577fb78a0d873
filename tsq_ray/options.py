"""Options shared by several `tsq` commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tsq_ray.log import LogFormat, use_format


class Role(StrEnum):
    """Purpose of the classifier that `tsq finetune` or `tsq import` writes."""

    encoder = "encoder"
    recognizer = "recognizer"


class Scores(StrEnum):
    """Which scores predictions keep."""

    all = "all"
    top = "top"


ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings file in TOML.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="section.key=value", help="Set one setting; repeatable."),
]
Split = Annotated[
    str | None, typer.Option("--split", metavar="NAME", help="Use only rows of this split.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Use only the first N videos.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray cluster (auto, host:port, ray://...); default: start one on this machine.",
    ),
]
WaitS = Annotated[
    float,
    typer.Option(
        "--wait-s",
        min=0,
        metavar="SECONDS",
        help="Give up after waiting this long for room on the cluster; default: wait forever.",
    ),
]
Submit = Annotated[
    bool,
    typer.Option(
        "--submit", help="Run as a Ray job on the cluster at --address (its dashboard's URL)."
    ),
]
SharedFs = Annotated[
    bool,
    typer.Option(
        "--shared-fs", help="Every node of the cluster has this machine's paths, --out among them."
    ),
]
LogFormats = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        callback=use_format,
        help="Format of the lines on stderr: text, or json with time and run.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Probe a few videos, here or on the cluster at --address, and estimate the run: "
        "time, hours, output size, cost.",
    ),
]
Nodes = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        min=1,
        metavar="N",
        help="With --dry-run: predict for N nodes like the one probed.",
    ),
]
Prices = Annotated[
    str | None,
    typer.Option(
        "--price",
        metavar="cpu=X,gpu=Y",
        help="Hourly prices of a CPU and of a GPU; the summary then includes the cost.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and Ray's logs.")]
MaxFailed = Annotated[
    float | None,
    typer.Option(
        "--max-failed",
        min=0,
        max=1,
        metavar="FRACTION",
        help="Exit with code 1 if more than this fraction of the videos failed.",
    ),
]
Retry = Annotated[
    str | None,
    typer.Option(
        "--retry-failed",
        metavar="[REASON]",
        help="Retry failed videos: all, or those that failed for REASON.",
    ),
]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Take over the folder from another run that holds it.")
]
ManifestOut = Annotated[
    str,
    typer.Option(
        "--out",
        metavar="MANIFEST",
        help="Manifest to write: a Parquet file, or a folder of shards "
        "(if it ends in /, or for over a million videos).",
    ),
]
LabelFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="Label file in any known format (repeatable), or: folders, none.",
    ),
]
LabelsFormat = Annotated[
    str | None,
    typer.Option(
        "--labels-format",
        metavar="NAME",
        help="Format of the label files, if it cannot be recognised from their content.",
    ),
]
Out = Annotated[str, typer.Option("--out", metavar="URI", help="Path or s3:// URI of the result.")]
ExportFormats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="labels, frames, openai-batch, label-studio or activitynet; repeatable; "
        "default: labels and frames.",
    ),
]
BatchModel = Annotated[
    str | None,
    typer.Option("--batch-model", metavar="NAME", help="openai-batch: model to ask."),
]
Prompt = Annotated[
    str,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="openai-batch: question, with {classes}, {num_frames} and {seconds}.",
    ),
]
FrameUrls = Annotated[
    str | None,
    typer.Option(
        "--frame-urls",
        metavar="URL",
        help="openai-batch: URL at which the service finds the folder --out and its frames; "
        "default: the requests contain the frames.",
    ),
]
DocumentRoot = Annotated[
    str,
    typer.Option(
        "--document-root",
        metavar="FOLDER",
        help="label-studio: its LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT.",
    ),
]
Encoder = Annotated[
    str | None,
    typer.Option("--encoder", metavar="URI", help="Frame encoder from tsq finetune or import."),
]
Recognizer = Annotated[
    str | None,
    typer.Option("--recognizer", metavar="URI", help="Recogniser from tsq finetune or import."),
]
Model = Annotated[str, typer.Option("--model", metavar="BUNDLE", help="Bundle from tsq train.")]
KeptScores = Annotated[
    Scores, typer.Option("--scores", help="all: keep every score; top: only the best labels.")
]
Sources = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help="Folders, s3:// prefixes or files.")
]
