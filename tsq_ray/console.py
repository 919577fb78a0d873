"""Console input and output of the commands.

Formats summaries as text, turns errors into one line and an exit code, and edits command lines.
"""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from tsq_ray.errors import StorageError, TsqError, UserError

USAGE_ERROR: Any = typer.BadParameter.__base__
"""click's UsageError, taken from typer because newer versions of typer bundle their own click."""
_TYPER_INTERRUPTED = 130
"""Exit code that newer versions of typer return for a KeyboardInterrupt."""
_INTERRUPTED = "interrupted; run the same command again: saved work is not repeated"


class _Output(io.FileIO):
    """Standard output or error whose reader may go away, as in `tsq info ... | head -1`.

    The command then finishes normally, and its remaining output is discarded.
    """

    def write(self, data: Any) -> int:
        """Write the data, or discard it if the reader is gone."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
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


def show(summary: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the summary on stdout, as JSON or as text."""
    print(json.dumps(summary, default=str, indent=1) if as_json else text)  # noqa: T201


def end_run(run: dict[str, Any], out: str, as_json: bool, max_failed: float | None) -> None:
    """Print the final summary of extract or score.

    Exits with code 1 if the fraction of failed videos is above --max-failed.
    """
    from tsq_ray.storage import redact

    counts = run["counts"]
    show(run, as_json, run_text(run, redact(out)))
    done = counts["ok"] + counts["failed"]
    if max_failed is not None and done and counts["failed"] / done > max_failed:
        line = f"{counts['failed']} of {done} videos failed, above --max-failed {max_failed}"
        print(f"error: {line}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1)


def run_text(run: dict[str, Any], out: str) -> str:
    """Format the final summary of extract or score."""
    counts = run["counts"]
    lines = [counts_text(counts)]
    if counts["failed_by_type"]:
        lines.append(
            "failed: "
            + ", ".join(f"{name} {count}" for name, count in counts["failed_by_type"].items())
        )
    if counts["with_warnings"]:
        lines.append(f"ok with warnings: {counts['with_warnings']}")
    now = run["videos_done_now"]
    if run.get("already_done"):
        lines.append("already done: nothing to do")
    elif now < counts["ok"] + counts["failed"]:
        earlier = counts["ok"] + counts["failed"] - now
        lines.append(f"done in this run: {now}, in earlier runs: {earlier}")
    if now and run["stage_seconds"]:
        stages = ", ".join(
            f"{name} {seconds:.1f} s" for name, seconds in run["stage_seconds"].items()
        )
        lines.append(
            f"seconds by stage, summed over workers: {stages}; "
            f"slowest: {run['slowest_stage']}; {run['wall_seconds']:.1f} s in total"
        )
    measured = run.get("metrics") or {}
    if measured.get("labelled"):
        figures = [
            f"{name} {measured[name]:.4f}"
            for name in ("mAP", "mAP_interpolated", "top1")
            if name in measured
        ]
        lines.append(f"{', '.join(figures)} over {measured['labelled']} labelled videos")
    if measured.get("unknown_labels"):
        lines.append(
            f"labels unknown to the model, left out: {', '.join(measured['unknown_labels'])}"
        )
    lines.append(f"out: {out}")
    return "\n".join(lines)


def counts_text(counts: dict[str, Any]) -> str:
    """Format the accounting: inputs = ok + failed + skipped."""
    skipped = counts["skipped_by"]
    why = ", ".join(f"{count} by --{name}" for name, count in skipped.items() if count)
    text = (
        f"{counts['inputs']} inputs = {counts['ok']} ok + {counts['failed']} failed "
        f"+ {counts['skipped']} skipped"
    )
    return text + (f" ({why})" if why else "")


def estimate_text(estimate: dict[str, Any]) -> str:
    """Format the estimate of --dry-run."""
    lines = [
        f"to do: {estimate['videos']} of {estimate['inputs']} videos, "
        f"{_megabytes(estimate['bytes_in'])} to read"
    ]
    if estimate["videos"]:
        lines.append(
            f"would take {estimate['wall_seconds']:.0f} s on a machine like this one, "
            f"including start-up: {estimate['seconds_a_video']} s per video "
            f"with {estimate['workers']} workers "
            f"({estimate['cpu_hours']} CPU hours, {estimate['gpu_hours']} GPU hours)"
        )
        lines.append(f"would write {_megabytes(estimate['bytes_out'])}")
        lines.append(
            f"based on a probe of {len(estimate['probed'])} videos, "
            f"{estimate['probed_failed']} of which failed (--json names them)"
        )
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def index_text(summary: dict[str, Any], out: str) -> str:
    """Format the summary of index."""
    lines = [
        f"{summary['videos']} videos, {summary['classes']} classes, "
        f"labels from {summary['labels_from']}"
    ]
    lines.append(
        f"labelled {summary['labelled']}, unlabelled {summary['unlabelled']}; "
        f"splits: {pairs(summary['splits'])}"
    )
    lines.append(
        f"new {summary['new']}, changed {summary['changed']}, deleted {summary['deleted']}, "
        f"unchanged {summary['unchanged']}"
    )
    # keys of `left_out` are a suffix for files that are not videos, a reason for everything else
    left, examples = summary["left_out"], summary["left_out_examples"]
    other = {name: left[name] for name in left if name.startswith(".") or name == "(no suffix)"}
    if other:
        lines.append(f"left out, no video suffix: {pairs(other)}")
    for reason, count in left.items():
        if reason not in other:
            more = ", ..." if count > len(examples[reason]) else ""
            lines.append(f"left out, {reason}: {count}: {', '.join(examples[reason])}{more}")
    if summary["missing"]:
        shown = ", ".join(summary["missing"][:5]) + (", ..." if len(summary["missing"]) > 5 else "")
        lines.append(
            f"missing, named by the labels but not found: {len(summary['missing'])}: {shown}"
        )
    return "\n".join([*lines, f"out: {out}"])


def training_text(summary: dict[str, Any]) -> str:
    """Format the summary of finetune or train."""
    lines = [f"warning: {warning}" for warning in summary["warnings"]]
    if summary.get("already_done"):
        lines.append("already done: nothing to do")
    lines.append(f"{summary['videos']} videos, {summary['classes']} classes")
    if summary["left_out"]:
        named = (
            f" (unlabelled: {', '.join(summary['unlabelled'])})" if summary["unlabelled"] else ""
        )
        lines.append(f"left out: {pairs(summary['left_out'])}{named}")
    if summary.get("failed"):
        lines.append(
            f"failed: {pairs(summary['failed'])} (first: {', '.join(summary['failed_videos'])})"
        )
    if "losses" in summary:
        lines.append(
            "losses: "
            + ", ".join(f"{name} {value:.4f}" for name, value in summary["losses"].items())
        )
    if "videos_per_s" in summary:
        again = (
            f", resumed after epoch {summary['went_on_after_epoch']}"
            if summary["went_on_after_epoch"]
            else ""
        )
        lines.append(
            f"speed: {summary['videos_per_s']} videos/s, workers: {summary['workers']}{again}"
        )
    if "train_accuracy" in summary:
        lines.append(f"accuracy on the training videos: {summary['train_accuracy']}")
    if "val_top1" in summary:
        lines.append(
            f"on the validation videos: top1 {summary['val_top1']:.4f}, "
            f"mAP {summary['val_mAP']:.4f} (weights of the last epoch)"
        )
    return "\n".join([*lines, f"out: {summary['out']}"])


def evaluation_text(summary: dict[str, Any]) -> str:
    """Format the results of evaluate: each table's rows, notes and files."""
    lines = []
    for table in summary["tables"].values():
        rows = (
            [list(table["rows"][0]), *(list(row.values()) for row in table["rows"])]
            if table["rows"]
            else []
        )
        widths = (
            [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
            if rows
            else []
        )
        lines += [
            table["title"],
            *(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
                for row in rows
            ),
        ]
        lines += [
            f"  {note}"
            for note in table["notes"]
            if note.startswith(("sign in the paper", "warning", "not measured"))
        ]
        lines += [f"  files: {', '.join(table['files'])}", ""]
    return "\n".join([*lines, f"trained now: {summary['trained_now']}", f"out: {summary['out']}"])


def prediction_text(row: dict[str, Any]) -> str:
    """Format one video's labels and chosen frames, or its error."""
    if row["status"] != "ok":
        return f"{row['uri']}: failed: {row['error_type']}: {row['error_message']}"
    best = ", ".join(
        f"{name} {value:.3f}"
        for name, value in zip(row["top_labels"], row["top_scores"], strict=True)
    )
    frames = ", ".join(f"{pts:.2f} s" for pts in row["selected_pts_s"])
    warned = "".join(f"\n  warning: {warning}" for warning in row["warnings"])
    return f"{row['uri']}: {best}\n  frames at {frames}{warned}"


def pairs(counts: dict[str, Any]) -> str:
    """Format counts on one line."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def tree_text(tree: dict[str, Any], indent: str = "") -> str:
    """Format nested values, one per line."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += (
                [f"{indent}{key}:", tree_text(value, indent + "  ")]
                if value
                else [f"{indent}{key}: -"]
            )
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{indent}{key}: {text}")
    return "\n".join(lines)


def without_options(argv: Sequence[str], flags: Sequence[str], options: Sequence[str]) -> list[str]:
    """Remove `flags`, and `options` with their values, from a command line."""
    kept, skip = [], False
    for item in argv:
        if skip:
            skip = False
        elif item in options:
            skip = True
        elif item not in flags and not item.startswith(tuple(f"{option}=" for option in options)):
            kept.append(item)
    return kept


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
            return fail(_INTERRUPTED, 1, debug)
        return code if isinstance(code, int) else 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return fail(_INTERRUPTED, 1, debug)
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


def fail(message: str, code: int, debug: bool) -> int:
    """Print one line on stderr, after the traceback with --debug, and return the exit code."""
    from tsq_ray.storage import redact

    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(redact(message).split())}", file=sys.stderr)  # noqa: T201
    return code
