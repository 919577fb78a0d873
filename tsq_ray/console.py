"""What the commands print for a person: summaries as text."""

from __future__ import annotations

from typing import Any


def run_text(run: dict[str, Any], out: str) -> str:
    """Closing summary of extract and score."""
    counts = run["counts"]
    lines = [counts_text(counts)]
    if counts["failed_by_type"]:
        lines.append("failed: " + ", ".join(f"{name} {count}" for name, count in counts["failed_by_type"].items()))
    if counts["with_warnings"]:
        lines.append(f"ok with warnings: {counts['with_warnings']}")
    if run["stage_seconds"]:
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in run["stage_seconds"].items())
        lines.append(
            f"seconds by stage, summed over workers: {stages}; {run['slowest_stage']} held it back; {run['wall_seconds']:.1f} s in all"
        )
    measured = run.get("metrics") or {}
    if measured.get("labelled"):
        figures = [f"{name} {measured[name]:.4f}" for name in ("mAP", "mAP_interpolated", "top1") if name in measured]
        lines.append(f"{', '.join(figures)} over {measured['labelled']} labelled videos")
    if measured.get("unknown_labels"):
        lines.append(f"labels that the model does not know, left out: {', '.join(measured['unknown_labels'])}")
    lines.append(f"out: {out}")
    return "\n".join(lines)


def counts_text(counts: dict[str, Any]) -> str:
    """inputs = ok + failed + skipped."""
    skipped = counts["skipped_by"]
    why = ", ".join(f"{count} by --{name}" for name, count in skipped.items() if count)
    text = f"{counts['inputs']} inputs = {counts['ok']} ok + {counts['failed']} failed + {counts['skipped']} skipped"
    return text + (f" ({why})" if why else "")


def index_text(summary: dict[str, Any], out: str) -> str:
    """What index found."""
    lines = [f"{summary['videos']} videos, {summary['classes']} classes, labels from {summary['labels_from']}"]
    lines.append(f"labelled {summary['labelled']}, unlabelled {summary['unlabelled']}; splits: {pairs(summary['splits'])}")
    lines.append(f"new {summary['new']}, changed {summary['changed']}, deleted {summary['deleted']}, unchanged {summary['unchanged']}")
    if summary["left_out"]:
        lines.append(f"left out, no video by its name: {pairs(summary['left_out'])}")
    if summary["missing"]:
        shown = ", ".join(summary["missing"][:5]) + (", ..." if len(summary["missing"]) > 5 else "")
        lines.append(f"missing, named by the labels but not found: {len(summary['missing'])}: {shown}")
    return "\n".join([*lines, f"out: {out}"])


def training_text(summary: dict[str, Any]) -> str:
    """What finetune and train did."""
    lines = [f"warning: {warning}" for warning in summary["warnings"]]
    if summary.get("already_done"):
        lines.append("done already: nothing to do")
    lines.append(f"{summary['videos']} videos, {summary['classes']} classes")
    if summary["left_out"]:
        named = f" (unlabelled: {', '.join(summary['unlabelled'])})" if summary["unlabelled"] else ""
        lines.append(f"left out: {pairs(summary['left_out'])}{named}")
    if summary.get("failed"):
        lines.append(f"failed: {pairs(summary['failed'])} (first: {', '.join(summary['failed_videos'])})")
    if "losses" in summary:
        lines.append("losses: " + ", ".join(f"{name} {value:.4f}" for name, value in summary["losses"].items()))
    if "train_accuracy" in summary:
        lines.append(f"accuracy on the training videos: {summary['train_accuracy']}")
    return "\n".join([*lines, f"out: {summary['out']}"])


def prediction_text(row: dict[str, Any]) -> str:
    """One video's labels and frames."""
    if row["status"] != "ok":
        return f"{row['uri']}: failed: {row['error_type']}: {row['error_message']}"
    best = ", ".join(f"{name} {value:.3f}" for name, value in zip(row["top_labels"], row["top_scores"], strict=True))
    frames = ", ".join(f"{pts:.2f} s" for pts in row["selected_pts_s"])
    warned = "".join(f"\n  warning: {warning}" for warning in row["warnings"])
    return f"{row['uri']}: {best}\n  frames at {frames}{warned}"


def pairs(counts: dict[str, Any]) -> str:
    """Counts in one line."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def tree_text(tree: dict[str, Any], indent: str = "") -> str:
    """Nested values, one a line."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", tree_text(value, indent + "  ")] if value else [f"{indent}{key}: -"]
        else:
            lines.append(f"{indent}{key}: {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return "\n".join(lines)
