"""Summaries as text, for people: what each command prints without --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tsq_ray.cost import Price, Used
from tsq_ray.results import (
    Counts,
    Estimate,
    EvaluatedTable,
    EvaluationSummary,
    FinetuneSummary,
    ImportSummary,
    IndexSummary,
    LabelSummary,
    RunSummary,
    TrainingSummary,
    Verification,
)

if TYPE_CHECKING:
    from tsq_ray.serving.bench import BenchSummary


def run_text(run: RunSummary, cost: Mapping[str, float] | None = None) -> str:
    """Format the final summary of extract or score, with its cost."""
    counts = run.counts
    lines = [counts_text(counts)]
    if counts.failed_by_type:
        lines.append(f"failed: {pairs(counts.failed_by_type)}")
    if counts.with_warnings:
        lines.append(f"ok with warnings: {counts.with_warnings}")
    if run.already_done:
        lines.append("already done: nothing to do")
    elif run.done_now < counts.done:
        earlier = counts.done - run.done_now
        lines.append(f"done in this run: {run.done_now}, in earlier runs: {earlier}")
    if run.done_now and run.stage_seconds:
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in run.stage_seconds.items())
        lines.append(
            f"seconds by stage, summed over workers: {stages}; "
            f"slowest: {run.slowest_stage}; {run.wall_seconds:.1f} s in total"
        )
    if run.done_now and (used := Used.of_run(run.record)) is not None:
        lines.append(_used_text(used, cost))
    lines += _happened_lines(run.record.get("happened", {}))
    return "\n".join([*lines, *_metric_lines(run.metrics), f"out: {run.out}"])


def _used_text(used: Used, cost: Mapping[str, float] | None) -> str:
    footage = f" for {used.video_hours:.4g} hours of video" if used.videos else ""
    return (
        f"used {used.cpu_hours:.4g} CPU hours, {used.gpu_hours:.4g} GPU hours{footage}"
        + _tokens_text(used.tokens_in, used.tokens_out)
        + _cost_text(cost, used.dense)
    )


def _happened_lines(happened: Mapping[str, float]) -> list[str]:
    texts = {
        "nodes_lost": "nodes lost: {}",
        "videos_done_again": "videos done again: {}",
        "waited_s": "waited for room on the cluster: {} s",
        "rows_removed": "rows of changed, deleted or repeated videos removed: {}",
    }
    parts = [text.format(happened[name]) for name, text in texts.items() if name in happened]
    return [f"in this run: {'; '.join(parts)}"] if parts else []


def _metric_lines(measured: Mapping[str, Any]) -> list[str]:
    lines = []
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
    return lines


def counts_text(counts: Counts) -> str:
    """Format the accounting: inputs = ok + failed + skipped."""
    why = ", ".join(f"{count} by --{name}" for name, count in counts.skipped_by.items() if count)
    text = (
        f"{counts.inputs} inputs = {counts.ok} ok + {counts.failed} failed "
        f"+ {counts.skipped} skipped"
    )
    return text + (f" ({why})" if why else "")


def estimate_text(estimate: Estimate) -> str:
    """Format the estimate of --dry-run."""
    lines = [
        f"to do: {estimate.videos} of {estimate.inputs} videos, "
        f"{_megabytes(estimate.bytes_in)} to read"
    ]
    if estimate.videos:
        lines.append(
            f"would take {estimate.wall_seconds:.0f} s on {_nodes(estimate)}, "
            f"including start-up: {estimate.seconds_a_video} s per video "
            f"with {estimate.workers} workers"
        )
        hours = f"{estimate.cpu_hours} CPU hours, {estimate.gpu_hours} GPU hours"
        lines.append(
            f"would use {hours} for {estimate.video_hours} hours of video"
            + _tokens_text(estimate.tokens_in, estimate.tokens_out)
            + _cost_text(estimate.cost, estimate.dense)
        )
        lines.append(f"would write {_megabytes(estimate.bytes_out)}")
        if estimate.tokens_in:
            lines.append(
                f"the probe itself asked the server: {estimate.probed_tokens_in} tokens sent, "
                f"{estimate.probed_tokens_out} received"
            )
        lines.append(
            f"based on a probe of {len(estimate.probed)} videos, "
            f"{estimate.probed_failed} of which failed (--json names all of them)"
        )
    return "\n".join(lines)


def _nodes(estimate: Estimate) -> str:
    gpus = f", {estimate.gpus} GPUs" if estimate.gpus else ""
    return f"{estimate.nodes} node{'s' * (estimate.nodes > 1)} ({estimate.cpus:g} CPUs{gpus})"


def _tokens_text(tokens_in: int, tokens_out: int) -> str:
    return f"; {tokens_in} tokens sent, {tokens_out} received" if tokens_in or tokens_out else ""


def _cost_text(cost: Mapping[str, float] | None, dense: float | None) -> str:
    """Format the cost, and that of recognising all frames, as the end of a sentence."""
    text = ""
    if cost is not None:
        units = {"per_video": "a video", "per_video_hour": "an hour of video"}
        each = [f"{cost[name]:g} {unit}" for name, unit in units.items() if name in cost]
        each += [f"of which tokens {cost['tokens']:g}"] if "tokens" in cost else []
        text += f"; cost {cost['total']:g}" + (f" ({', '.join(each)})" if each else "")
    if dense is not None:
        text += f"; recognising all frames: about {dense:g} times as much"
        text += f" ({cost['dense_total']:g})" if cost is not None else ""
    return text


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def bench_text(bench: BenchSummary) -> str:
    """Format the measurements of an endpoint."""
    lines = [f"{bench.by:>8} {'ok/s':>7} {'p50 s':>7} {'p95 s':>7} {'p99 s':>7}  answers; CPU ms"]
    for point in bench.points:
        latencies = [point.p50_s, point.p95_s, point.p99_s]
        shown = " ".join("      -" if value is None else f"{value:7.3f}" for value in latencies)
        answers = ", ".join(f"{count} x {status}" for status, count in point.statuses.items())
        cpu = sorted(point.cpu_ms.items(), key=lambda item: -item[1])
        total = sum(point.cpu_ms.values())
        spent = f"; {total:.0f} = " + ", ".join(f"{n} {ms:.0f}" for n, ms in cpu) if cpu else ""
        lines.append(f"{point.load:8g} {point.ok_per_s:7.2f} {shown}  {answers}{spent}")
    unit = "clients" if bench.by == "clients" else "requests/s"
    lines.append(f"best {bench.best_ok_per_s:.2f}/s; saturated at {bench.saturated_at:g} {unit}")
    return "\n".join(lines)


def index_text(summary: IndexSummary) -> str:
    """Format the summary of index."""
    lines = [
        f"{summary.videos} videos, {summary.classes} classes, labels from {summary.labels_from}",
        f"labelled {summary.labelled}, unlabelled {summary.unlabelled}; "
        f"splits: {pairs(summary.splits)}",
        f"new {summary.new}, changed {summary.changed}, deleted {summary.deleted}, "
        f"unchanged {summary.unchanged}",
    ]
    # keys of `left_out` are a suffix for files that are not videos, a reason for everything else
    left, examples = summary.left_out, summary.left_out_examples
    other = {name: left[name] for name in left if name.startswith(".") or name == "(no suffix)"}
    if other:
        lines.append(f"left out, no video suffix: {pairs(other)}")
    for reason, count in left.items():
        if reason not in other:
            more = ", ..." if count > len(examples[reason]) else ""
            lines.append(f"left out, {reason}: {count}: {', '.join(examples[reason])}{more}")
    if summary.missing:
        shown = ", ".join(summary.missing[:5]) + (", ..." if len(summary.missing) > 5 else "")
        lines.append(f"missing, named by the labels but not found: {len(summary.missing)}: {shown}")
    return "\n".join([*lines, f"out: {summary.out}"])


def label_text(summary: LabelSummary, price: Price | None = None) -> str:
    """Format the summary of label, with its cost at these prices."""
    lines = [
        summary.verdict,
        *_agreement_lines(summary),
        f"the sample, {summary.sample} videos; agreement measured on {summary.held_out} of them:",
        _priced_text(summary.features, price),
        *_sampler_lines(summary.training, price),
        "the archive:",
        _priced_text(summary.predictions, price),
    ]
    if summary.used is not None:
        used = Used(**summary.used)
        lines.append(f"sample, training and archive together {_used_text(used, used.cost(price))}")
    return "\n".join([*lines, f"report: {summary.report}"])


def _priced_text(run: RunSummary, price: Price | None) -> str:
    used = Used.of_run(run.record)
    return run_text(run, None if used is None else used.cost(price))


def _sampler_lines(training: TrainingSummary | None, price: Price | None) -> list[str]:
    if training is None:
        return []
    used = Used.of_hours(training.used)
    return ["the sampler:", training_text(training, None if used is None else used.cost(price))]


def _agreement_lines(summary: LabelSummary) -> list[str]:
    from tsq_ray.reporting.agreement import agreement_rows

    lines = [["K", "TSQNet agrees", "cost", "uniform agrees", "cost"]]
    for row in agreement_rows({"curve": summary.curve, "chosen": summary.chosen}):
        lines.append([str(row["name"])])
        for point in (row.get("sampler"), row.get("uniform")):
            lines[-1] += ["-", "-"] if point is None else _agreement_cells(point)
        lines[-1] += ["chosen"] if row["chosen"] else []
    return _aligned(lines)


def _agreement_cells(point: Mapping[str, Any]) -> list[str]:
    share, low, high, cost = (
        f"{100 * point[name]:.0f}" for name in ("top1", "low", "high", "cost")
    )
    return [f"{share} % ({low} to {high})", f"{cost} %"]


def _hours_lines(
    summary: TrainingSummary | FinetuneSummary | EvaluationSummary,
    cost: Mapping[str, float] | None,
) -> list[str]:
    used = Used.of_hours(summary.used)
    return [_used_text(used, cost)] if used is not None and not was_done(summary) else []


def was_done(summary: TrainingSummary | FinetuneSummary | EvaluationSummary) -> bool:
    """Whether an earlier call had done this work, and paid for it."""
    return not isinstance(summary, EvaluationSummary) and summary.already_done


def training_text(summary: TrainingSummary, cost: Mapping[str, float] | None = None) -> str:
    """Format the summary of train, with its cost."""
    resumed = summary.resumed_after_epoch
    again = f", resumed after epoch {resumed}" if resumed else ""
    return "\n".join(
        [
            *_trained_on(summary),
            f"losses: {_figures(summary.losses)}",
            f"speed: {summary.videos_per_s} videos/s, workers: {summary.workers}{again}",
            *_hours_lines(summary, cost),
            *_happened_lines(summary.happened),
            f"out: {summary.out}",
        ]
    )


def finetune_text(summary: FinetuneSummary, cost: Mapping[str, float] | None = None) -> str:
    """Format the summary of finetune, with its cost."""
    lines = _trained_on(summary)
    if summary.failed:
        lines.append(f"failed: {pairs(summary.failed)} (first: {', '.join(summary.failed_videos)})")
    if summary.losses:
        lines.append(f"losses: {_figures(summary.losses)}")
    lines.append(f"accuracy on the training videos: {summary.train_accuracy}")
    if summary.val_top1 is not None:
        lines.append(
            f"on the validation videos: top1 {summary.val_top1:.4f}, "
            f"mAP {summary.val_mAP:.4f} (weights of the last epoch)"
        )
    lines += [*_hours_lines(summary, cost), *_happened_lines(summary.happened)]
    return "\n".join([*lines, f"out: {summary.out}"])


def import_text(summary: ImportSummary) -> str:
    """Format the summary of import."""
    done = ["already done: nothing to do"] if summary.already_done else []
    more = ", ..." if summary.classes > len(summary.first_classes) else ""
    what = (
        f"pictures of {summary.size} x {summary.size}, {summary.parameters / 1e6:.1f} million "
        f"parameters, {summary.gflops_per_frame:.2f} GFLOPs per frame"
    )
    if summary.kind == "openai":
        what = f"behind a server that receives frames of {summary.size} pixels"
    lines = [
        f"{summary.role} {summary.model} ({summary.kind}): {what}",
        f"{summary.classes} classes: {', '.join(summary.first_classes)}{more}",
        f"out: {summary.out}",
    ]
    return "\n".join([*done, *lines])


def _trained_on(summary: TrainingSummary | FinetuneSummary) -> list[str]:
    """Return the lines about the videos of a training."""
    lines = [f"warning: {warning}" for warning in summary.warnings]
    if summary.already_done:
        lines.append("already done: nothing to do")
    lines.append(f"{summary.videos} videos, {summary.classes} classes")
    if summary.left_out:
        examples = summary.unlabelled
        unlabelled = f" (unlabelled: {', '.join(examples)})" if examples else ""
        lines.append(f"left out: {pairs(summary.left_out)}{unlabelled}")
    return lines


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def evaluation_text(summary: EvaluationSummary, cost: Mapping[str, float] | None = None) -> str:
    """Format the results of evaluate: each table's rows, notes and files, and the cost."""
    lines = [line for table in summary.tables.values() for line in (*_table_lines(table), "")]
    lines += [f"trained now: {summary.trained_now}", *_hours_lines(summary, cost)]
    lines += _happened_lines(summary.happened)
    return "\n".join([*lines, f"out: {summary.out}"])


def _table_lines(table: EvaluatedTable) -> list[str]:
    rows = [list(row.values()) for row in table.rows]
    if rows:
        rows.insert(0, list(table.rows[0]))
    marks = ("trend in the paper", "warning", "not measured")
    notes = [f"  {note}" for note in table.notes if note.startswith(marks)]
    return [table.title, *_aligned(rows), *notes, f"  files: {', '.join(table.files)}"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return each row as a line, with its cells aligned in columns."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


def prediction_text(row: Mapping[str, Any]) -> str:
    """Format one video's labels and chosen frames, or its error."""
    if row["status"] != "ok":
        return f"{row['uri']}: failed: {row['error_type']}: {row['error_message']}"
    best = ", ".join(
        f"{name} {value:.3f}"
        for name, value in zip(row["top_labels"], row["top_scores"], strict=True)
    )
    frames = ", ".join(f"{pts:.2f} s" for pts in row["selected_pts_s"])
    warned = "".join(f"\n  warning: {warning}" for warning in row["warnings"])
    caption = f"\n  {row['caption']}" if row.get("caption") else ""
    return f"{row['uri']}: {best}\n  frames at {frames}{caption}{warned}"


def verification_text(result: Verification) -> str:
    """Format what verify found."""
    number = len(result.problems)
    verdict = f"does not add up: {number} problems" if number else "adds up"
    lines = [
        f"{result.uri}: {result.kind}: {counts_text(result.counts)}",
        f"checked {', '.join(result.checks)}: {verdict}",
    ]
    return "\n".join([*lines, *(f"  {problem}" for problem in result.problems)])


def pairs(counts: Mapping[str, Any]) -> str:
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
