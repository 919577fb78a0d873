"""Features Parquet -> arrays for training: which rows are taken, and which are left out and why.

Legend: V videos, T frames, D dims, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import runs, schema, storage
from tsq_ray.errors import RunError
from tsq_ray.manifest import VideoRef, describe_splits

DEFAULT_SPLIT = "train"


@dataclass
class TrainingSet:
    """The videos a training takes, and the account of the others."""

    video_ids: list[str]
    visual: np.ndarray
    """float16 [V, T, D]."""
    object_ids: np.ndarray
    """int16 [V, T, 10]."""
    object_probs: np.ndarray
    """float16 [V, T, 10]."""
    labels: list[list[int]]
    classes: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> count."""
    named: list[str] = field(default_factory=list)
    """The first unlabelled videos, by URI."""
    warnings: list[str] = field(default_factory=list)

    @property
    def targets(self) -> np.ndarray:
        """Multi-hot bool [V, C]."""
        return multi_hot(self.labels, len(self.classes))


def multi_hot(labels: list[list[int]], num_classes: int) -> np.ndarray:
    """Label lists -> bool [V, C]."""
    targets = np.zeros((len(labels), num_classes), bool)
    for row, numbers in enumerate(labels):
        targets[row, numbers] = True
    return targets


def training_split(splits: list[str | None], split: str | None, what: str) -> tuple[str | None, list[str]]:
    """Which split to take: the one asked for, else `train`, else all rows with a warning where no row has a split.

    Returns the split (None: all) and warnings. RunError where splits exist but none has the name.
    """
    names = {name for name in splits if name}
    if split is None and not names:
        return None, [f"{what} has no splits: training takes all rows, so nothing is held out to measure on"]
    wanted = split or DEFAULT_SPLIT
    if wanted not in names:
        raise RunError(f"{what}: no row of split {wanted!r}; {describe_splits(splits)}; choose one with --split")
    return wanted, []


def check_classes(classes: list[str], labelled: int, what: str) -> None:
    """RunError where there is nothing to learn: no labels, or fewer than two classes."""
    if labelled == 0:
        raise RunError(f"{what}: no labelled video; index it with labels (class folders, --labels FILE)")
    if len(classes) < 2:
        raise RunError(f"{what}: {len(classes)} class ({', '.join(classes)}); training needs at least two")


def single_labels(labels: list[list[int]], task: str, what: str) -> None:
    """RunError where the task is single and a video has several labels."""
    several = sum(len(numbers) > 1 for numbers in labels)
    if task == "single" and several:
        raise RunError(f"{what}: {several} of {len(labels)} videos have several labels; set train.task=multi (--set train.task=multi)")


def load_training_set(features_uri: str, split: str | None, task: str) -> TrainingSet:
    """The rows of a finished extraction that training takes: ok, of the split, labelled."""
    uri = storage.normalize(features_uri)
    run = runs.read_run(uri, "features")
    table = pa.concat_tables([runs.read_part(part.uri) for part in runs.list_parts(uri)])
    table = table.sort_by("video_id")
    chosen, warnings = training_split(table["split"].to_pylist(), split, f"features {storage.redact(uri)}")
    left_out: dict[str, int] = {}
    if chosen is not None:
        in_split = table.filter(pc.equal(table["split"], chosen))
        left_out["other_split"] = table.num_rows - in_split.num_rows
        table = in_split
    ok = table.filter(pc.equal(table["status"], "ok"))
    left_out["failed"] = table.num_rows - ok.num_rows
    unlabelled = ok.filter(pc.is_null(ok["labels"]))
    left_out["unlabelled"] = unlabelled.num_rows
    ok = ok.filter(pc.is_valid(ok["labels"]))
    classes = list(run["classes"])
    check_classes(classes, ok.num_rows, f"features {storage.redact(uri)}")
    labels = ok["labels"].to_pylist()
    single_labels(labels, task, f"features {storage.redact(uri)}")
    return TrainingSet(
        video_ids=ok["video_id"].to_pylist(),
        visual=schema.tensor_to_numpy(ok["visual"]),
        object_ids=schema.tensor_to_numpy(ok["object_ids"]),
        object_probs=schema.tensor_to_numpy(ok["object_probs"]),
        labels=labels,
        classes=classes,
        left_out=left_out,
        named=[storage.redact(name) for name in unlabelled["uri"].to_pylist()[:5]],
        warnings=warnings,
    )


def training_rows(rows: list[VideoRef], split: str | None, what: str) -> tuple[list[VideoRef], dict[str, int], list[str], list[str]]:
    """Manifest rows that training takes: (rows, left out by reason, first unlabelled URIs, warnings)."""
    chosen, warnings = training_split([row.split for row in rows], split, what)
    inside = [row for row in rows if chosen is None or row.split == chosen]
    labelled = [row for row in inside if row.labels]
    unlabelled = [storage.redact(row.uri) for row in inside if not row.labels]
    return labelled, {"other_split": len(rows) - len(inside), "unlabelled": len(unlabelled)}, unlabelled[:5], warnings


def describe_left_out(left_out: dict[str, int]) -> dict[str, Any]:
    """Only the reasons that occurred."""
    return {reason: count for reason, count in left_out.items() if count}
