"""Lines on stderr about what a command does: text, or JSON, one object per line (`--log-format`).

A JSON line has the time, the id of the run, the message and any facts that the caller adds.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from enum import StrEnum
from typing import Any


class LogFormat(StrEnum):
    """How lines are written."""

    text = "text"
    json = "json"


_format = LogFormat.text
_run = ""


def use_format(log_format: LogFormat) -> LogFormat:
    """Write lines in this format from now on."""
    global _format
    _format = log_format
    return log_format


def use_run(run: str) -> None:
    """Name this run in every JSON line from now on."""
    global _run
    _run = run


def has_run() -> bool:
    """Whether this process writes, or wrote, to the folder of a run that can be resumed."""
    return bool(_run)


def is_json() -> bool:
    """Whether lines are JSON."""
    return _format is LogFormat.json


def say(line: str, **facts: Any) -> None:
    """Write a line on stderr; `facts` appear in its JSON form only."""
    if is_json():
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "run": _run, "message": line} | facts, default=str)
    print(line, file=sys.stderr, flush=True)  # noqa: T201
