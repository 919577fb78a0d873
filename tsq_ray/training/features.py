"""Read features from Parquet into training arrays, and select the rows to train on.

Shapes: V videos, T frames, D dims, C classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsq_ray import schema, storage
from tsq_ray.config import Task
from tsq_ray.errors import RunError, RunFailed
from tsq_ray.manifest import VideoRows, describe_splits
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.folder import read_run
from tsq_ray.training.cache import Create, node_arrays
from tsq_ray.training.teacher import FRAME_INDEX, LOGITS, Teacher, check_logits, soft_targets

DEFAULT_SPLIT = "train"

VISUAL_COLUMN, OBJECT_IDS, OBJECT_PROBS, TARGETS = "visual", "object_ids", "object_probs", "targets"
OBJECT_COLUMNS = (OBJECT_IDS, OBJECT_PROBS)
_ROW_COLUMNS = ["video_id", "uri", "split", "status", "labels"]
_READERS = 4
"""Parts read at a time."""


@dataclass(frozen=True)
class FeatureSource:
    """The features to train on, as every worker reads them."""

    uri: str
    split: str | None
    task: Task
    columns: tuple[str, ...]
    """The tensor columns to read."""
    max_videos: int
    """A sample of at most this many videos; 0: all."""
    teacher: Teacher | None
    """The recogniser whose logits give the targets; None: the labels do."""
    key: str
    """Hash of everything that the arrays depend on."""

    @classmethod
    def of(
        cls,
        features_uri: str,
        split: str | None,
        task: Task,
        with_objects: bool = True,
        max_videos: int = 0,
        teacher: Teacher | None = None,
    ) -> FeatureSource:
        """Describe the features at a URI; raises RunError if it is not a finished extraction."""
        uri, columns = (
            storage.normalize(features_uri),
            (VISUAL_COLUMN, *OBJECT_COLUMNS) if with_objects else (VISUAL_COLUMN,),
        )
        content = json.dumps(
            [
                read_run(uri, "features"),
                uri,
                split,
                columns,
                max_videos,
                teacher and asdict(teacher),
            ],
            sort_keys=True,
        )
        key = hashlib.sha256(content.encode()).hexdigest()[:20]
        return cls(uri, split, task, columns, max_videos, teacher, key)

    @property
    def read_columns(self) -> tuple[str, ...]:
        """The tensor columns to read, including those that only the targets need."""
        return self.columns if self.teacher is None else (*self.columns, LOGITS, FRAME_INDEX)


@dataclass
class TrainingVideos:
    """The videos that a training uses, sorted by video id, and why the others are left out."""

    count: int
    """V, the number of videos used."""
    labels: pa.ChunkedArray
    """Their labels; may be null with a teacher."""
    classes: list[str]
    """C names: those of the features, or the teacher's."""
    parts: list[tuple[str, np.ndarray]]
    """URI of each part, and the index of each of its rows among the V videos; -1 if not used."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> count."""
    unlabelled_uris: list[str] = field(default_factory=list)
    """URIs of the first unlabelled videos."""
    warnings: list[str] = field(default_factory=list)


@dataclass
class TrainingSet:
    """The features and labels of the videos of a training, sorted by video id."""

    videos: TrainingVideos
    arrays: dict[str, np.ndarray]
    """`visual` float16 [V, T, D], `object_ids` int16 [V, T, n], `object_probs` float16 [V, T, n],
    `targets` bool [V, C], or float16 from a teacher."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def classes(self) -> list[str]:
        return self.videos.classes

    @property
    def visual(self) -> np.ndarray:
        """float16 [V, T, D]."""
        return self.arrays[VISUAL_COLUMN]

    @property
    def targets(self) -> np.ndarray:
        """Multi-hot bool [V, C], or soft float16 from a teacher."""
        return self.arrays[TARGETS]

    @property
    def labels(self) -> Iterator[list[int]]:
        """The class ids of each labelled video, ascending."""
        return (np.flatnonzero(row).tolist() for row in self.targets)


def multi_hot(labels: pa.ChunkedArray, num_classes: int) -> np.ndarray:
    """Turn lists of labels into bool [V, C]."""
    lists = labels.combine_chunks()
    targets = np.zeros((len(lists), num_classes), bool)
    targets[pc.list_parent_indices(lists), pc.list_flatten(lists)] = True
    return targets


def training_split(
    splits: pa.ChunkedArray, split: str | None, what: str
) -> tuple[str | None, list[str]]:
    """Choose the split: `split` if given, else `train`; all rows if no row has a split.

    Returns the split (None: all rows) and warnings. Raises RunError if there are splits, but not
    this one.
    """
    names = {name for name in pc.unique(splits).to_pylist() if name}
    if split is None and not names:
        return None, [
            f"{what} has no splits: training uses all rows, so nothing is held out for evaluation"
        ]
    chosen = split or DEFAULT_SPLIT
    if chosen not in names:
        raise RunError(
            f"{what}: no row of split {chosen!r}; {describe_splits(splits)}; "
            "choose one with --split"
        )
    return chosen, []


def check_classes(classes: list[str], labelled: int, what: str) -> None:
    """Raise RunError if no video is labelled or there are fewer than two classes."""
    if labelled == 0:
        raise RunError(
            f"{what}: no labelled video; index it with labels (class folders, --labels FILE)"
        )
    if len(classes) < 2:
        raise RunError(
            f"{what}: {len(classes)} class ({', '.join(classes)}); training needs at least two"
        )


def check_single_labels(labels: pa.ChunkedArray, task: str, what: str) -> None:
    """Raise RunError if the task is "single" and a video has several labels."""
    several = pc.sum(pc.greater(pc.list_value_length(labels), 1)).as_py() or 0
    if task == "single" and several:
        raise RunError(
            f"{what}: {several} of {len(labels)} videos have several labels; set train.task=multi "
            "(--set train.task=multi)"
        )


def select_videos(source: FeatureSource) -> TrainingVideos:
    """Select the ok rows of the split in a finished extraction; reads no tensors.

    Without a teacher, only labelled rows are selected. Raises RunError if none is usable.
    """
    what = f"features {storage.redact(source.uri)}"
    parts = [part.uri for part in list_parts(source.uri)]
    if not parts:
        raise RunError(f"{what}: the run has no videos")
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda part: read_part(part, _ROW_COLUMNS), parts))
    table = pa.concat_tables(tables)
    table = table.append_column("row", pa.array(np.arange(table.num_rows))).sort_by("video_id")
    chosen, warnings = training_split(table["split"], source.split, what)
    left_out: dict[str, int] = {}
    if chosen is not None:
        in_split = table.filter(pc.equal(table["split"], chosen))
        left_out["other_split"] = table.num_rows - in_split.num_rows
        table = in_split
    ok = table.filter(pc.equal(table["status"], "ok"))
    left_out["failed"] = table.num_rows - ok.num_rows
    unlabelled = ok.filter(pc.is_null(ok["labels"])) if source.teacher is None else ok.slice(0, 0)
    left_out["unlabelled"] = unlabelled.num_rows
    if source.teacher is None:
        ok = ok.filter(pc.is_valid(ok["labels"]))
    if source.max_videos:
        # ids are hashes, so the first ones in their order are a random sample
        left_out["max_videos"] = max(0, ok.num_rows - source.max_videos)
        ok = ok.slice(0, source.max_videos)
    if source.teacher is None:
        classes = list(read_run(source.uri, "features")["classes"])
        check_classes(classes, ok.num_rows, what)
        check_single_labels(ok["labels"], source.task, what)
    else:
        classes = list(source.teacher.classes)
        check_logits(parts, ok.num_rows, len(classes), what)
    places = np.full(sum(part.num_rows for part in tables), -1)
    places[ok["row"].to_numpy()] = np.arange(ok.num_rows)
    by_part = np.split(places, np.cumsum([part.num_rows for part in tables])[:-1])
    unlabelled_uris = [storage.redact(name) for name in unlabelled["uri"].slice(0, 5).to_pylist()]
    rows = list(zip(parts, by_part, strict=True))
    return TrainingVideos(
        ok.num_rows, ok["labels"], classes, rows, left_out, unlabelled_uris, warnings
    )


def copy_features(
    source: FeatureSource,
    videos: TrainingVideos,
    create: Create,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Copy the selected rows into arrays made by `create`, a few parts at a time.

    `progress` is called with the number of videos copied so far.
    """
    parts = [(part, places) for part, places in videos.parts if (places >= 0).any()]
    with storage.open_read(parts[0][0]) as file:
        types = {name: pq.read_schema(file).field(name).type for name in source.columns}
    num_videos, teacher = videos.count, source.teacher
    arrays = {
        name: create(
            name, np.dtype(column.value_type.to_pandas_dtype()), (num_videos, *column.shape)
        )
        for name, column in types.items()
    }

    dtype = np.dtype(bool if teacher is None else np.float16)
    targets = create(TARGETS, dtype, (num_videos, len(videos.classes)))

    def copy(part: str, places: np.ndarray) -> int:
        table = read_part(part, list(source.read_columns)).filter(pa.array(places >= 0))
        rows = places[places >= 0]
        for name, array in arrays.items():
            array[rows] = schema.tensor_to_numpy(table[name])
        if teacher is not None:
            logits, index = (schema.tensor_to_numpy(table[name]) for name in (LOGITS, FRAME_INDEX))
            targets[rows] = soft_targets(logits, index, teacher.num_frames, source.task)
        return len(table)

    done = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for count in pool.map(copy, *zip(*parts, strict=True)):
            progress(done := done + count)
    if teacher is None:
        targets[:] = multi_hot(videos.labels, len(videos.classes))


def frames_and_logits(
    videos: TrainingVideos,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield index, `visual` [T, D] and the teacher's logits [T, C] of each video, part by part."""
    for part, places in videos.parts:
        if not (places >= 0).any():
            continue
        table = read_part(part, [VISUAL_COLUMN, LOGITS]).filter(pa.array(places >= 0))
        columns = (schema.tensor_to_numpy(table[name]) for name in (VISUAL_COLUMN, LOGITS))
        yield from zip(places[places >= 0].tolist(), *columns, strict=True)


@contextlib.contextmanager
def source_arrays(
    source: FeatureSource,
    videos: TrainingVideos | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[dict[str, np.ndarray]]:
    """Provide `TrainingSet.arrays` in mapped files shared on this machine (see cache.py).

    `progress` is called with the number of videos copied so far.
    """

    def write(create: Create) -> None:
        with_objects = OBJECT_IDS in source.columns
        current = FeatureSource.of(
            source.uri,
            source.split,
            source.task,
            with_objects,
            source.max_videos,
            source.teacher,
        )
        if current != source:
            raise RunFailed(
                f"{storage.redact(source.uri)}: the features have changed since the training "
                "began; start it again"
            )
        copy_features(source, videos or select_videos(source), create, progress)

    with node_arrays(source.key, write) as arrays:
        yield arrays


@contextlib.contextmanager
def open_training_set(
    source: FeatureSource, progress: Callable[[int], object] = lambda done: None
) -> Iterator[TrainingSet]:
    """Provide the training set of a finished extraction, in mapped files.

    `progress` is called with the number of videos copied so far.
    """
    videos = select_videos(source)
    with source_arrays(source, videos, progress) as arrays:
        yield TrainingSet(videos, arrays)


@dataclass(frozen=True)
class TrainingRows:
    """The manifest rows that a training uses, and why the others are left out."""

    rows: VideoRows
    split: str | None
    """Their split; None if the manifest has no splits."""
    left_out: dict[str, int]
    """Reason -> count."""
    unlabelled_uris: list[str]
    """URIs of the first unlabelled videos."""
    warnings: list[str]

    @classmethod
    def of(cls, rows: VideoRows, split: str | None, limit: int | None, what: str) -> TrainingRows:
        """Select the labelled rows of `split` (default: train), at most `limit`.

        Raises RunError if no row has the split.
        """
        table = rows.table
        chosen, warnings = training_split(table["split"], split, what)
        inside = (
            np.ones(len(rows), bool)
            if chosen is None
            else pc.fill_null(pc.equal(table["split"], chosen), False).to_numpy()
        )
        labelled = is_labelled(rows)
        unlabelled = rows.where(inside & ~labelled)
        usable = rows.where(inside & labelled)
        left_out = {
            "other_split": int((~inside).sum()),
            "unlabelled": len(unlabelled),
            "limit": len(usable) - len(usable[:limit]),
        }
        unlabelled_uris = [storage.redact(row.uri) for row in unlabelled[:5]]
        return cls(usable[:limit], chosen, left_out, unlabelled_uris, warnings)


def is_labelled(rows: VideoRows) -> np.ndarray:
    """Return for each row whether it has a label, bool [V]."""
    return pc.fill_null(pc.greater(pc.list_value_length(rows.table["labels"]), 0), False).to_numpy()


def describe_left_out(left_out: dict[str, int]) -> dict[str, Any]:
    """Keep only the reasons that occurred."""
    return {reason: count for reason, count in left_out.items() if count}
