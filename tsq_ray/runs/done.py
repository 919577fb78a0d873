"""The rows of a run folder's parts, at 18 bytes each, and which row of each video counts.

Scales to ten million videos because no step creates a Python object per row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import schema, storage
from tsq_ray.errors import ERROR_TYPES, RETRIED_ERROR_TYPES
from tsq_ray.manifest import Manifest, VideoRef, VideoRows
from tsq_ray.manifest.videos import CONTENT, keys_of, same_contents
from tsq_ray.runs.columns import read_columns

_BRIEF = [
    *(column.name for column in schema.MANIFEST if column.name != "uri"),
    "status",
    "error_type",
    "warnings",
]
_AT_A_TIME = 100
"""Number of parts to read and compare with the manifest in one batch."""
OK, FAILED, WARNED, OTHER_VERSION, RELABELLED = (1 << bit for bit in range(5))
"""Bits of a row's `flags`: its status, whether it has warnings, and whether the manifest names
another version of the file (OTHER_VERSION) or other labels or another split (RELABELLED)."""
_UNKNOWN = ERROR_TYPES.index("internal")
ROW = np.dtype(
    [
        ("key", np.uint64),
        ("place", np.int32),
        ("part", np.int32),
        ("flags", np.uint8),
        ("error", np.uint8),
    ]
)
"""A row of a part: the key of its id (`manifest.videos.keys_of`), its row in the manifest (-1:
none), the number of its part, its flags, and the index in ERROR_TYPES of a failed row's error."""


@dataclass(frozen=True)
class Part:
    """A part that was read; its rows are `num_rows` of `Done.rows` from `start`."""

    file: storage.StoredFile
    classes: list[str]
    start: int
    num_rows: int

    @property
    def name(self) -> str:
        """Name of the part's file."""
        return storage.name_of(self.file.uri)

    @property
    def age_s(self) -> float:
        """Modification time as seconds since 1970, to order rows of a video; 0 if unknown."""
        return self.file.modified.timestamp() if self.file.modified else 0.0


class Done:
    """Every row of every part, in the order of the parts, and which rows count for a manifest."""

    def __init__(self, manifest: Manifest, parts: list[Part], rows: np.ndarray) -> None:
        self.manifest, self.parts, self.rows = manifest, parts, rows

    @cached_property
    def row(self) -> np.ndarray:
        """int32: for each manifest row, the number of the row that counts; -1 if none does.

        Of a video's rows for the manifest's version of the file, ok rows win over failed ones,
        then the newest wins.
        """
        place = self.rows["place"]
        known = np.flatnonzero((place >= 0) & ~self.has(OTHER_VERSION))
        row = np.full(len(self.manifest.rows), -1, np.int32)
        row[place[known]] = known
        again = known[np.bincount(place[known], minlength=len(row))[place[known]] > 1]
        if len(again):
            best = self._best_first(again)
            places, first = np.unique(place[best], return_index=True)
            row[places] = best[first]
        return row

    def has(self, flag: int) -> np.ndarray:
        """Return whether each row has this flag (bool)."""
        return self.rows["flags"] & flag > 0

    @property
    def counting(self) -> np.ndarray:
        """The rows that count, in the manifest's order."""
        return self.rows[self.row[self.row >= 0]]

    def counts(self) -> np.ndarray:
        """Return whether each row counts (bool)."""
        mask = np.zeros(len(self.rows), bool)
        mask[self.row[self.row >= 0]] = True
        return mask

    def row_of(self, videos: VideoRows) -> np.ndarray:
        """Return `row` for these videos of the manifest."""
        if videos is self.manifest.rows:
            return self.row
        place = self.manifest.rows.places(videos.ids)
        return np.where(place >= 0, self.row[place], -1)

    def by_file(self) -> dict[storage.StoredFile, tuple[list[str], np.ndarray]]:
        """Return the class names and rows of each part that can be recognised when unchanged.

        Leaves out parts for which storage gives neither an etag nor a modification time.
        """
        parts = [part for part in self.parts if part.file.etag or part.file.modified]
        return {
            part.file: (part.classes, self.rows[part.start : part.start + part.num_rows])
            for part in parts
        }

    def _best_first(self, numbers: np.ndarray) -> np.ndarray:
        part = self.rows["part"][numbers]
        age = np.array([part.age_s for part in self.parts])[part]
        # ties go to the last part by name: parts are listed, and so numbered, by name
        return numbers[np.lexsort((numbers, -part, -age, ~self.has(OK)[numbers]))]


def list_parts(uri: str) -> list[storage.StoredFile]:
    """List the published parts of a run folder."""
    files = storage.list_folder(storage.normalize(uri))
    return [
        file
        for file in files
        if storage.name_of(file.uri).startswith("part-") and file.uri.endswith(".parquet")
    ]


def read_done(uri: str, manifest: Manifest, known: Done | None = None) -> Done:
    """Read every row of every part of a run folder, reusing parts unchanged since `known`."""
    files, before = list_parts(uri), known.by_file() if known is not None else {}
    parts: list[Part] = []
    pieces: list[np.ndarray] = [np.zeros(0, ROW)]
    start = 0
    for first in range(0, len(files), _AT_A_TIME):
        batch = files[first : first + _AT_A_TIME]
        read = _read([file for file in batch if file not in before], manifest)
        for file in batch:
            classes, rows = before[file] if file in before else read[file]
            # nearly all parts have the manifest's class names: sharing its list saves memory
            parts.append(
                Part(
                    file,
                    manifest.classes if classes == manifest.classes else classes,
                    start,
                    len(rows),
                )
            )
            pieces.append(rows)
            start += len(rows)
    all_rows = np.concatenate(pieces)
    all_rows["part"] = np.repeat(np.arange(len(parts)), [part.num_rows for part in parts])
    return Done(manifest, parts, all_rows)


def _read(
    files: Sequence[storage.StoredFile], manifest: Manifest
) -> dict[storage.StoredFile, tuple[list[str], np.ndarray]]:
    """Read the class names and rows of each of these parts."""
    if not files:
        return {}
    tables = read_columns(files, _BRIEF)
    bounds = np.cumsum([len(table) for table in tables])[:-1]
    pieces = np.split(_compare(tables, manifest), bounds)
    return {
        file: (schema.classes_of(table.schema), rows)
        for file, table, rows in zip(files, tables, pieces, strict=True)
    }


def _compare(tables: Sequence[pa.Table], manifest: Manifest) -> np.ndarray:
    """Convert the tables' rows to `ROW` and set their flags; `part` is left at 0."""
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    rows = np.zeros(len(table), ROW)
    rows["key"] = keys_of(table["video_id"])
    rows["place"] = place = manifest.rows.places_of(rows["key"])
    rows["error"] = pc.fill_null(
        pc.index_in(table["error_type"], pa.array(ERROR_TYPES)), _UNKNOWN
    ).to_numpy()
    warned = pc.greater(pc.fill_null(pc.list_value_length(table["warnings"]), 0), 0).to_numpy()
    flags = (
        OK * _equals(table["status"], "ok")
        + FAILED * _equals(table["status"], "failed")
        + WARNED * warned
    )
    known = place >= 0
    ours, theirs = (
        table.filter(pa.array(known)),
        manifest.rows.columns_at(place[known], [*CONTENT, "labels", "split"]),
    )
    flags[known] += OTHER_VERSION * ~same_contents(theirs, ours)
    same_split = pc.equal(
        pc.fill_null(ours["split"], ""), pc.fill_null(theirs["split"], "")
    ).to_numpy()
    flags[known] += RELABELLED * (_lists_differ(ours["labels"], theirs["labels"]) | ~same_split)
    rows["flags"] = flags
    return rows


def _equals(column: pa.ChunkedArray, value: str) -> np.ndarray:
    return pc.fill_null(pc.equal(column, value), False).to_numpy()


def still_to_do(wanted: Sequence[VideoRef], done: Done, retry: Collection[str] = ()) -> VideoRows:
    """Return the wanted videos without a row that counts, and failed ones that are retried.

    A failure is retried if its reason is in `retry` or in RETRIED_ERROR_TYPES (storage was
    unavailable).
    """
    wanted = VideoRows.of(wanted)
    row = done.row_of(wanted)
    reasons = [
        number
        for number, reason in enumerate(ERROR_TYPES)
        if reason in {*retry, *RETRIED_ERROR_TYPES}
    ]
    again = done.has(FAILED) & np.isin(done.rows["error"], reasons)
    todo = row < 0
    todo[~todo] = again[row[~todo]]
    return wanted if todo.all() else wanted.where(todo)


def outdated_labels(done: Done) -> list[Part]:
    """Return the parts whose labels, class names or splits differ from the manifest's."""
    rows = done.counting
    found = set(np.unique(rows["part"][rows["flags"] & RELABELLED > 0]).tolist())
    found |= {
        number
        for number in np.unique(rows["part"]).tolist()
        if done.parts[number].classes != done.manifest.classes
    }
    return [done.parts[number] for number in sorted(found)]


def _lists_differ(left: pa.ChunkedArray, right: pa.ChunkedArray) -> np.ndarray:
    """Return where two columns of lists of numbers differ (bool); null equals empty."""
    sizes = [pc.fill_null(pc.list_value_length(column), 0).to_numpy() for column in (left, right)]
    differ = sizes[0] != sizes[1]
    alike = pa.array(~differ)
    values = [pc.list_flatten(column.filter(alike)).to_numpy() for column in (left, right)]
    owner = np.repeat(np.flatnonzero(~differ), sizes[0][~differ])
    differ[owner[values[0] != values[1]]] = True
    return differ
