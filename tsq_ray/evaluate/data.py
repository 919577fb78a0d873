"""Features Parquet -> arrays on which every sampler and budget is measured without decoding.

Legend: V videos, T frames (slots), D dims, C classes of the bundle, N objects.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsq_ray import runs, schema, storage
from tsq_ray.bundle import Bundle
from tsq_ray.errors import ModelError, RunError
from tsq_ray.manifest import describe_splits
from tsq_ray.rows import RECOGNIZER, VISUAL

LOGITS = schema.RECOGNIZER_LOGITS.name
TRAIN_SPLIT, VAL_SPLIT = "train", "val"
_TENSORS = ("frame_index", "frame_pts_s", "visual", "object_ids", "object_probs", LOGITS)
_COLUMNS = ("video_id", "uri", "labels", "split", "status", "fps", *_TENSORS)


@dataclass(frozen=True)
class VideoSet:
    """The labelled videos of a split that are ok, sorted by id, and the account of the others."""

    video_ids: list[str]
    uris: list[str]
    targets: np.ndarray
    """Multi-hot bool [V, C], in the bundle's order."""
    frame_index: np.ndarray
    """int32 [V, T]."""
    frame_pts_s: np.ndarray
    """float32 [V, T]."""
    visual: np.ndarray
    """float16 [V, T, D]."""
    object_ids: np.ndarray
    """int16 [V, T, N]."""
    object_probs: np.ndarray
    """float16 [V, T, N]."""
    logits: np.ndarray
    """float16 [V, T, C], the recogniser's of each frame."""
    fps: tuple[float, float]
    """Lowest and highest average frame rate."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> count, of the split's rows."""

    def __len__(self) -> int:
        return len(self.video_ids)

    @property
    def num_frames(self) -> int:
        """T"""
        return self.frame_index.shape[1]


@dataclass(frozen=True)
class Features:
    """A finished extraction, as evaluation needs it."""

    uri: str
    run: dict[str, Any]
    classes: list[str]
    """The bundle's."""
    measured: VideoSet
    split: str | None
    """Of the measured videos; None: all rows."""
    training: VideoSet | None
    """What samplers that need fitting learn from: split `train`; None where there is no such split apart from the measured one."""
    unknown_labels: list[str]
    """Names of labels that the bundle lacks."""


def load_features(uri: str, bundle: Bundle, split: str | None) -> Features:
    """Read the features of a finished extraction with `recognizer_logits`, made with the bundle's own encoder and recogniser.

    `split` defaults to `val`; all rows where no row has a split. RunError where the logits, the split or labels are missing, ModelError
    where other weights made the features.
    """
    uri = storage.normalize(uri)
    run = runs.read_run(uri, "features")
    shown = storage.redact(uri)
    parts = runs.list_parts(uri)
    if not parts:
        raise RunError(f"{shown}: no part-*.parquet here, the run has no videos; name features that hold some")
    _check_logits(parts[0].uri, shown)
    _check_weights(run, bundle, shown)
    table = pa.concat_tables([runs.read_part(part.uri, list(_COLUMNS)) for part in parts]).sort_by("video_id")
    names = list(run["classes"])
    splits = table["split"].to_pylist()
    wanted = _measured_split(splits, split, shown)
    measured = _video_set(_rows(table, wanted), names, bundle.classes)
    if not len(measured):
        raise RunError(f"{shown}: no labelled video that is ok in split {wanted!r}; there is nothing to measure ({measured.left_out})")
    training = None
    if TRAIN_SPLIT in splits and wanted not in (None, TRAIN_SPLIT):
        training = _video_set(_rows(table, TRAIN_SPLIT), names, bundle.classes)
    known = set(bundle.classes)
    return Features(
        uri, run, bundle.classes, measured, wanted, training if training else None, sorted(name for name in names if name not in known)
    )


def _check_logits(part_uri: str, shown: str) -> None:
    with storage.open_read(part_uri) as file:
        columns = pq.read_schema(file).names
    if LOGITS not in columns:
        raise RunError(
            f"{shown}: the features lack {LOGITS}, without which no sampler is measured; extract them with the recogniser into "
            "another folder: tsq extract MANIFEST --out URI --recognizer RECOGNIZER, with the settings of these"
        )


def _check_weights(run: dict[str, Any], bundle: Bundle, shown: str) -> None:
    assert bundle.recognizer is not None, "the caller refuses a bundle without a recogniser"
    for name, have in ((VISUAL, bundle.encoder.backbone_hash()), (RECOGNIZER, bundle.recognizer.state_hash())):
        made = run["weights"][name]
        if made != have:
            raise ModelError(
                f"{shown}: were made with another {'recogniser' if name == RECOGNIZER else 'visual encoder'} (sha256 {made[:12]}) than "
                f"the bundle's ({have[:12]}); name the bundle of these features, or extract again with its --encoder and --recognizer"
            )


def _measured_split(splits: list[str | None], split: str | None, shown: str) -> str | None:
    there = {name for name in splits if name}
    if split is None and not there:
        return None
    wanted = split or VAL_SPLIT
    if wanted not in there:
        raise RunError(f"{shown}: no row of split {wanted!r}; {describe_splits(splits)}; choose one with --split")
    return wanted


def _rows(table: pa.Table, split: str | None) -> pa.Table:
    return table if split is None else table.filter(pc.equal(table["split"], split))


def _video_set(table: pa.Table, names: list[str], classes: list[str]) -> VideoSet:
    """Rows of one split; labels are mapped by name to the bundle's order."""
    position = {name: number for number, name in enumerate(classes)}
    left_out: Counter[str] = Counter()
    kept, targets = [], []
    for row, (status, labels) in enumerate(zip(table["status"].to_pylist(), table["labels"].to_pylist(), strict=True)):
        known = [position[names[label]] for label in labels or () if names[label] in position]
        if status != "ok":
            left_out["failed"] += 1
        elif not known:
            left_out["labels that the bundle lacks" if labels else "unlabelled"] += 1
        else:
            kept.append(row)
            targets.append(np.bincount(known, minlength=len(classes)).astype(bool))
    table = table.take(pa.array(kept, pa.int64()))
    arrays = {name: schema.tensor_to_numpy(table[name]) for name in _TENSORS}
    fps = [value for value in table["fps"].to_pylist() if value]
    return VideoSet(
        video_ids=table["video_id"].to_pylist(),
        uris=table["uri"].to_pylist(),
        targets=np.stack(targets) if targets else np.zeros((0, len(classes)), bool),
        frame_index=arrays["frame_index"],
        frame_pts_s=arrays["frame_pts_s"],
        visual=arrays["visual"],
        object_ids=arrays["object_ids"],
        object_probs=arrays["object_probs"],
        logits=arrays[LOGITS],
        fps=(min(fps, default=0.0), max(fps, default=0.0)),
        left_out=dict(left_out),
    )
