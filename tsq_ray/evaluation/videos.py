"""Load features into arrays on which every sampler and budget is measured without decoding.

Shapes: V videos, T frames (slots), D dims, C classes of the bundle, N objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsq_ray import schema, storage
from tsq_ray.bundle.weights import Bundle
from tsq_ray.errors import ModelError, RunError
from tsq_ray.manifest import describe_splits
from tsq_ray.rows import RECOGNIZER, VISUAL
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.folder import read_run

LOGITS = schema.RECOGNIZER_LOGITS.name
TRAIN_SPLIT, VAL_SPLIT = "train", "val"
EVERY_SPLIT = "*"
"""Stands for all rows, whatever their split."""
_TENSORS = ("frame_index", "frame_pts_s", "visual", "object_ids", "object_probs", LOGITS)
_ROW_COLUMNS = ["video_id", "uri", "labels", "split", "status", "fps"]


@dataclass(frozen=True, eq=False)
class VideoSet:
    """The ok videos of a split, sorted by id, and counts of the others.

    Unlabelled videos are left out, unless `load_features` was called with `labelled=False`.
    """

    video_ids: list[str]
    uris: list[str]
    targets: np.ndarray
    """Multi-hot bool [V, C], in the bundle's order; all False for a video without labels."""
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
    """float16 [V, T, C], the recogniser's logits of each frame."""
    fps: tuple[float, float]
    """Lowest and highest average frame rate."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of the split's rows left out, by reason."""

    def __len__(self) -> int:
        return len(self.video_ids)

    @property
    def num_frames(self) -> int:
        """T, the number of frames (slots) per video."""
        return self.frame_index.shape[1]


@dataclass(frozen=True)
class EvaluationFeatures:
    """A finished extraction, ready for evaluation."""

    uri: str
    run: dict[str, Any]
    classes: list[str]
    """The bundle's classes."""
    measured: VideoSet
    split: str | None
    """Split of the measured videos; None: all rows."""
    training: VideoSet | None
    """Split `train`, from which samplers learn; None if it is missing or the measured one."""
    unknown_labels: list[str]
    """Names of labels that the bundle lacks."""
    labelled: bool = True
    """Whether every video has a label; otherwise nothing can learn from labels."""


def load_features(
    uri: str,
    bundle: Bundle,
    split: str | None,
    max_videos: int = 0,
    *,
    labelled: bool = True,
    with_training: bool = True,
) -> EvaluationFeatures:
    """Read the features of a finished extraction.

    They must hold `recognizer_logits` and be made with the bundle's own encoder and recogniser.
    `split` defaults to `val`, or to all rows if no row has a split; EVERY_SPLIT: all rows. If a
    split has more than `max_videos` videos, a random sample of that many is read (0: all).
    `labelled`: leave out videos without labels. `with_training`: read the training videos too.

    Raises RunError if logits, split or labels are missing, ModelError if the features were made
    with other weights.
    """
    uri = storage.normalize(uri)
    run = read_run(uri, "features")
    shown = storage.redact(uri)
    parts = [part.uri for part in list_parts(uri)]
    if not parts:
        raise RunError(
            f"{shown}: no part-*.parquet here, so the run has no videos; name a features folder "
            "with videos"
        )
    arrow = _schema_with_logits(parts[0], shown)
    _check_weights(run, bundle, shown)
    table = _read_rows(parts)
    names = list(run["classes"])
    measured_split = _measured_split(table["split"], split, shown)

    def video_set(split: str | None) -> VideoSet:
        rows = table if split is None else table.filter(pc.equal(table["split"], split))
        return _video_set(parts, rows, names, bundle.classes, arrow, max_videos, labelled)

    measured = video_set(measured_split)
    if not len(measured):
        only = "; only --table teacher needs no labels" * labelled
        raise RunError(
            f"{shown}: split {measured_split!r} has no ok video{' with a label' * labelled}, so "
            f"nothing can be measured (left out: {measured.left_out}){only}"
        )
    can_train = with_training and measured_split not in (None, TRAIN_SPLIT)
    training = video_set(TRAIN_SPLIT) if can_train else None
    known = set(bundle.classes)
    return EvaluationFeatures(
        uri,
        run,
        bundle.classes,
        measured,
        measured_split,
        training if training else None,
        sorted(name for name in names if name not in known),
        labelled,
    )


def _schema_with_logits(part_uri: str, shown: str) -> pa.Schema:
    with storage.open_read(part_uri) as file:
        arrow = pq.read_schema(file)
    if LOGITS not in arrow.names:
        raise RunError(
            f"{shown}: the features lack {LOGITS}, which every measurement needs; extract them "
            "into another folder with the same settings and the recogniser: "
            "tsq extract MANIFEST --out URI --recognizer RECOGNIZER"
        )
    return arrow


def _check_weights(run: dict[str, Any], bundle: Bundle, shown: str) -> None:
    assert bundle.recognizer is not None, "the caller must refuse a bundle without a recogniser"
    if (clip := bundle.recognizer.config.clip_frames) > 1:
        raise ModelError(
            f"{shown}: the recogniser takes clips of {clip} frames, but features hold answers to "
            "single frames only; score with several settings and compare the predictions"
        )
    for name, expected in (
        (VISUAL, bundle.encoder.backbone_hash()),
        (RECOGNIZER, bundle.recognizer.state_hash()),
    ):
        sha256 = run["weights"][name]
        if sha256 != expected:
            network = "recogniser" if name == RECOGNIZER else "visual encoder"
            raise ModelError(
                f"{shown}: made with a {network} (sha256 {sha256[:12]}) other than the bundle's "
                f"({expected[:12]}); name the bundle of these features, or extract again with its "
                "--encoder and --recognizer"
            )


def _read_rows(parts: Sequence[str]) -> pa.Table:
    """Read all rows without tensors, sorted by video_id; `part` and `row` say where each lies."""
    tables = []
    for number, uri in enumerate(parts):
        table = read_part(uri, _ROW_COLUMNS)
        table = table.append_column("part", pa.array(np.full(len(table), number, np.int32)))
        tables.append(table.append_column("row", pa.array(np.arange(len(table), dtype=np.int32))))
    return pa.concat_tables(tables).sort_by("video_id").combine_chunks()


def _measured_split(splits: pa.ChunkedArray, split: str | None, shown: str) -> str | None:
    known = {name for name in pc.unique(splits).to_pylist() if name}
    if split == EVERY_SPLIT or (split is None and not known):
        return None
    chosen = split or VAL_SPLIT
    if chosen not in known:
        raise RunError(
            f"{shown}: no row of split {chosen!r}; {describe_splits(splits)}; "
            "choose one with --split"
        )
    return chosen


def _video_set(
    parts: Sequence[str],
    table: pa.Table,
    names: list[str],
    classes: list[str],
    arrow: pa.Schema,
    max_videos: int,
    labelled_only: bool,
) -> VideoSet:
    """Load the rows of one split; labels are mapped by name to the bundle's order."""
    position = {name: number for number, name in enumerate(classes)}
    in_bundle = np.array([position.get(name, -1) for name in names], np.int64)
    lists = table["labels"].combine_chunks()
    rows, labels = (
        pc.list_parent_indices(lists).to_numpy(),
        in_bundle[pc.list_flatten(lists).to_numpy()],
    )
    rows, labels, labelled = (
        rows[labels >= 0],
        labels[labels >= 0],
        np.bincount(rows, minlength=len(table)) > 0,
    )
    ok = pc.equal(table["status"], "ok").to_numpy()
    known = np.bincount(rows, minlength=len(table)) > 0
    taken = ok & known if labelled_only else ok
    targets = np.zeros((int(taken.sum()), len(classes)), bool)
    targets[(np.cumsum(taken) - 1)[rows[taken[rows]]], labels[taken[rows]]] = True
    left_out = {
        "failed": ~ok,
        "unlabelled": ok & ~labelled & ~taken,
        "labels that the bundle lacks": ok & labelled & ~taken,
    }
    kept = table.filter(pa.array(taken))
    others: dict[str, int] = {}
    if 0 < max_videos < len(kept):
        # ids are hashes, so the first ones in their order are a random sample
        others = {"above evaluate.max_videos": len(kept) - max_videos}
        kept, targets = kept.slice(0, max_videos), targets[:max_videos]
    arrays = _tensors(parts, kept, arrow)
    fps = pc.min_max(kept["fps"].filter(pc.greater(kept["fps"], 0))).as_py()
    return VideoSet(
        video_ids=kept["video_id"].to_pylist(),
        uris=kept["uri"].to_pylist(),
        targets=targets,
        frame_index=arrays["frame_index"],
        frame_pts_s=arrays["frame_pts_s"],
        visual=arrays["visual"],
        object_ids=arrays["object_ids"],
        object_probs=arrays["object_probs"],
        logits=arrays[LOGITS],
        fps=(fps["min"] or 0.0, fps["max"] or 0.0),
        left_out={reason: int(mask.sum()) for reason, mask in left_out.items() if mask.any()}
        | others,
    )


def _tensors(parts: Sequence[str], kept: pa.Table, arrow: pa.Schema) -> dict[str, np.ndarray]:
    """Return the tensors of these rows, read part by part so that nothing is in memory twice."""
    types = {name: arrow.field(name).type for name in _TENSORS}
    arrays = {
        name: np.empty((len(kept), *of.shape), of.value_type.to_pandas_dtype())
        for name, of in types.items()
    }
    part, row = kept["part"].to_numpy(), kept["row"].to_numpy()
    by_part = np.argsort(part, kind="stable")
    for places in np.split(by_part, np.flatnonzero(np.diff(part[by_part])) + 1):
        if len(places):
            table = read_part(parts[part[places[0]]], list(_TENSORS)).take(pa.array(row[places]))
            for name, array in arrays.items():
                array[places] = schema.tensor_to_numpy(table[name])
    return arrays
