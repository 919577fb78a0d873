"""Console input and output of the commands; errors become one line and an exit code."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import typer

from tsq_ray import log
from tsq_ray.cost import Price, Used
from tsq_ray.errors import StorageError, TsqError, UserError
from tsq_ray.results import (
    Counts,
    EvaluationSummary,
    FinetuneSummary,
    RunSummary,
    TrainingSummary,
)
from tsq_ray.summaries import run_text, was_done

USAGE_ERROR: Any = typer.BadParameter.__base__
"""click's UsageError, taken from typer because newer versions of typer bundle their own click."""
_TYPER_INTERRUPTED = 130
"""Exit code that newer versions of typer return for a KeyboardInterrupt."""


class _Output(io.FileIO):
    """Standard output or error whose reader may go away, as in `tsq info ... | head -1`.

    The command then finishes normally, and its remaining output is discarded.
    """

    def write(self, data: Any) -> int:
        """Write the data, or discard it if the reader is gone."""
        try:
            return super().write(data)
        except BrokenPipeError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.fileno())
            os.close(devnull)
            return len(memoryview(data).cast("B"))


def prepare_output() -> None:
    """Make this process's standard streams accept any text and survive the loss of their reader.

    Text that the stream's encoding cannot represent, such as a file name that is not UTF-8, is
    shown with backslashes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue  # a caller replaced it with another kind of object
        if stream is not getattr(sys, f"__{name}__"):
            stream.reconfigure(errors="backslashreplace")
            continue
        stream.flush()
        output = _Output(stream.fileno(), "w", closefd=False)
        wrapped = io.TextIOWrapper(
            output if stream.write_through else io.BufferedWriter(output),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, wrapped)


def show(summary: Any, as_json: bool, text: str) -> None:
    """Print the summary, a dataclass or a dictionary, on stdout as JSON or as text."""
    if as_json and not isinstance(summary, dict):
        summary = dataclasses.asdict(summary)
    print(json.dumps(summary, default=str, indent=1) if as_json else text)  # noqa: T201


_Priced = TypeVar("_Priced", FinetuneSummary, TrainingSummary, EvaluationSummary)


def show_priced(
    summary: _Priced,
    as_json: bool,
    text: Callable[[_Priced, Mapping[str, float] | None], str],
    price: Price | None,
) -> None:
    """Print the summary of a training or an evaluation, with its cost at these prices."""
    used = None if was_done(summary) else Used.of_hours(summary.used)
    cost = used.cost(price) if used is not None else None
    shown = dataclasses.asdict(summary) | ({"cost": cost} if cost is not None else {})
    show(shown, as_json, text(summary, cost))


def end_run(
    run: RunSummary, as_json: bool, max_failed: float | None, price: Price | None = None
) -> None:
    """Print the final summary of extract or score, with its cost at these prices.

    Exits with code 1 if the fraction of failed videos is above --max-failed.
    """
    counts, record = run.counts, dict(run.record)
    used = Used.of_run(record)
    if used is not None and (cost := used.cost(price)) is not None:
        record["cost"] = cost
    show(record, as_json, run_text(run, record.get("cost")))
    refuse_failures(counts, max_failed)


def refuse_failures(counts: Counts, max_failed: float | None) -> None:
    """Exit with code 1 if the fraction of failed videos is above --max-failed."""
    if max_failed is not None and counts.done and counts.failed / counts.done > max_failed:
        line = f"{counts.failed} of {counts.done} videos failed, above --max-failed {max_failed}"
        log.say(f"error: {line}")
        raise typer.Exit(1)


def bare_retry(argv: list[str]) -> list[str]:
    """Insert `all` after a `--retry-failed` that has no reason."""
    from tsq_ray.errors import ERROR_TYPES

    fixed = []
    for number, item in enumerate(argv):
        fixed.append(item)
        following = argv[number + 1] if number + 1 < len(argv) else ""
        if (
            item == "--retry-failed"
            and following not in (*ERROR_TYPES, "all")
            and (not following or following.startswith("-"))
        ):
            fixed.append("all")
    return fixed


def guarded(run: Callable[[], Any], debug: bool) -> int:
    """Call `run` and turn exceptions into a one-line error and an exit code."""
    try:
        code = run()
        if code == _TYPER_INTERRUPTED:
            return _interrupted(debug)
        return code if isinstance(code, int) else 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(debug)
    except (UserError, StorageError) as error:
        return fail(str(error), 2, debug)
    except TsqError as error:
        return fail(str(error), 1, debug)
    except USAGE_ERROR as error:
        where = error.ctx.command_path if error.ctx else "tsq"
        return fail(f"{' '.join(error.format_message().split())} (see {where} --help)", 2, debug)
    # any other exception is a defect, which must still be reported as one line
    except Exception as error:  # noqa: BLE001
        message = " ".join(str(error).split())[:300]
        return fail(f"unexpected {type(error).__name__}: {message} (--debug shows where)", 1, debug)


def _interrupted(debug: bool) -> int:
    advice = "; run the same command again: saved work is not repeated" if log.has_run() else ""
    return fail(f"interrupted{advice}", 1, debug)


def fail(message: str, code: int, debug: bool) -> int:
    """Print one line on stderr, after the traceback with --debug, and return the exit code."""
    from tsq_ray.storage import redact

    if debug:
        traceback.print_exc()
    log.say(f"error: {' '.join(redact(message).split())}", exit_code=code)
    return code
