"""What the parts of a run folder hold: every row in short, as an Arrow table, and the one row of each video that counts.

The same for ten videos and ten million: no step here makes an object a row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsq_ray import schema, storage
from tsq_ray.errors import RETRIED_ERROR_TYPES, RunError
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, same_contents

_IDENTITY = [column for column in schema.MANIFEST if column.name != "uri"]  # a third of what the rows take, and the id says it
_CONTENT = ["size_bytes", "etag", "modified"]
_BRIEF = [*(column.name for column in _IDENTITY), "status", "error_type", "warnings"]
_SCHEMA = pa.schema(
    [
        *(column.field({}) for column in _IDENTITY),
        pa.field("status", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("has_warnings", pa.bool_()),
        pa.field("part", pa.int32()),
    ]
)
EMPTY = _SCHEMA.empty_table()
"""What `done_rows` finds in an empty folder."""
_REMOTE_READERS = 16
_COLUMN_READS = {"cache_type": "bytes", "block_size": 16 * 1024}
"""Of some columns of a remote part: their own bytes, which lie side by side, and not the tensors behind them."""
_COMPACT = 100
"""Parts that are read ahead and put together at a time."""


_ROWS = 100_000
"""Rows that are copied at a time to be compared."""


@dataclass(frozen=True)
class Part:
    """A part that was read: `age_s` orders rows of the same video (larger is newer), `start` and `num_rows` say which rows are its own."""

    name: str
    age_s: float
    classes: list[str]
    start: int
    num_rows: int


class DoneRows:
    """Every row of every part, part after part; columns as in `_SCHEMA`, `part` the number of the part."""

    def __init__(self, table: pa.Table, parts: list[Part]) -> None:
        self.table, self.parts = table, parts

    def __len__(self) -> int:
        return self.table.num_rows

    def part_of(self) -> np.ndarray:
        """int32: the number of each row's part."""
        return self.table["part"].to_numpy()


class Current:
    """The one row of each video of a manifest that counts; `rows` without what the manifest itself says of the file.

    `place`: the manifest's row of each done row, -1 where it does not count as one. `row`: for each manifest row the number of its done
    row, -1 where it has none.
    """

    def __init__(self, rows: DoneRows, manifest: Manifest, place: np.ndarray, row: np.ndarray) -> None:
        self.rows, self.manifest, self.place, self.row = rows, manifest, place, row

    @cached_property
    def table(self) -> pa.Table:
        """The rows that count, in the manifest's order."""
        return self.rows.table.take(pa.array(self.row[self.row >= 0]))

    def row_of(self, videos: VideoRows) -> np.ndarray:
        """int64: as `row`, for these videos of the manifest."""
        if videos is self.manifest.rows:
            return self.row.copy()
        place = self.manifest.rows.places(videos.ids)
        return np.where(place >= 0, self.row[place], -1)

    def __len__(self) -> int:
        return int((self.row >= 0).sum())

    def counts(self) -> np.ndarray:
        """bool: whether each done row counts."""
        mask = np.zeros(len(self.rows), bool)
        mask[self.row[self.row >= 0]] = True
        return mask


def read_part(part_uri: str, columns: list[str] | None = None) -> pa.Table:
    """One part, or some of its columns. RunError where it is not readable as Parquet."""
    try:
        options = {} if columns is None else _COLUMN_READS
        # both off: one of Arrow's threads may drop the file as the interpreter ends, which aborts the process
        with storage.open_read(part_uri, **options) as file, pq.ParquetFile(file, pre_buffer=False) as part:
            return part.read(columns=columns, use_threads=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RunError(f"{storage.redact(part_uri)}: not readable as Parquet ({error}); delete it and run again") from None


def list_parts(uri: str) -> list[storage.StoredFile]:
    """The visible parts of a run folder."""
    files = storage.list_folder(storage.normalize(uri))
    return [file for file in files if storage.name_of(file.uri).startswith("part-") and file.uri.endswith(".parquet")]


def done_rows(uri: str) -> DoneRows:
    """Every row of every part, in short."""
    files = list_parts(uri)
    known: dict[bytes, list[str]] = {}  # the class names are the same in nearly all parts
    parts: list[Part] = []
    tables: list[pa.Table] = []
    start = 0
    with ThreadPoolExecutor(1 if storage.is_local(uri) else _REMOTE_READERS) as pool:
        for first in range(0, len(files), _COMPACT):
            some = files[first : first + _COMPACT]
            read = []
            for file, table in zip(some, pool.map(lambda file: read_part(file.uri, _BRIEF), some), strict=True):
                names = (table.schema.metadata or {}).get(schema.CLASSES_KEY, b"[]")
                classes = known.setdefault(names, json.loads(names) if names not in known else [])
                age = file.modified.timestamp() if file.modified else 0.0
                read.append(_brief(table, len(parts)))
                parts.append(Part(storage.name_of(file.uri), age, classes, start, table.num_rows))
                start += table.num_rows
            # what Parquet decoded has room to spare, three times what it holds
            tables.append(pa.concat_tables(read).combine_chunks())
    return DoneRows(pa.concat_tables([EMPTY, *tables]), parts)


def _brief(table: pa.Table, number: int) -> pa.Table:
    warned = pc.greater(pc.fill_null(pc.list_value_length(table["warnings"]), 0), 0)
    part = pa.array(np.full(table.num_rows, number, np.int32))
    columns = [*(table[name] for name in _BRIEF[:-1]), warned, part]
    return pa.table(columns, schema=_SCHEMA)


def other_version(rows: pa.Table, manifest: Manifest, place: np.ndarray) -> np.ndarray:
    """Numbers of the rows that are of another version of their file than the manifest names; `place`: the manifest's row of each, or -1."""
    theirs, ours = manifest.rows.table.select(_CONTENT).combine_chunks(), rows.select(_CONTENT)
    other = [np.zeros(0, np.int64)]
    for start in range(0, len(rows), _ROWS):
        here = place[start : start + _ROWS]
        known = here >= 0
        same = same_contents(theirs.take(pa.array(here[known])), ours.slice(start, _ROWS).filter(pa.array(known)))
        other.append(start + np.flatnonzero(known)[~same])
    return np.concatenate(other)


def pick_current(rows: DoneRows, manifest: Manifest) -> Current:
    """The one row of each video that counts: of the file as the manifest has it, ok before failed, newest first."""
    place = manifest.rows.places(rows.table["video_id"])
    place[other_version(rows.table, manifest, place)] = -1
    known = np.flatnonzero(place >= 0)
    row = np.full(len(manifest.rows), -1, np.int64)
    row[place[known]] = known
    again = known[np.bincount(place[known], minlength=len(row))[place[known]] > 1]
    if len(again):
        best = _best_first(rows, again)
        places, first = np.unique(place[best], return_index=True)
        row[places] = best[first]
    return Current(DoneRows(rows.table.drop_columns(_CONTENT), rows.parts), manifest, place, row)


def _best_first(rows: DoneRows, numbers: np.ndarray) -> np.ndarray:
    part = rows.part_of()[numbers]
    ok = pc.equal(rows.table["status"], "ok").to_numpy()[numbers]
    age = np.array([part.age_s for part in rows.parts])[part]
    # parts are listed by name, so their numbers order as their names
    return numbers[np.lexsort((numbers, -part, -age, ~ok))]


def still_to_do(wanted: Sequence[VideoRef], current: Current, retry: Collection[str] = ()) -> VideoRows:
    """The wanted videos without a row that counts; failed ones again where their reason is in `retry` or storage was unavailable."""
    wanted, done = VideoRows.of(wanted), current.rows.table
    row = current.row_of(wanted)
    reasons = pa.array(sorted({*retry, *RETRIED_ERROR_TYPES}), pa.string())
    again = pc.and_(pc.equal(done["status"], "failed"), pc.is_in(done["error_type"], value_set=reasons)).to_numpy()
    todo = row < 0
    todo[~todo] = again[row[~todo]]
    return wanted if todo.all() else VideoRows(wanted.table.filter(pa.array(todo)))


def outdated_labels(current: Current) -> list[Part]:
    """Parts whose rows have other labels, class names or splits than the manifest has now."""
    manifest, rows = current.manifest, current.table
    wanted = manifest.rows.table.select(["labels", "split"]).filter(pa.array(current.row >= 0))
    same_split = pc.equal(pc.fill_null(rows["split"], ""), pc.fill_null(wanted["split"], "")).to_numpy()
    other = _lists_differ(rows["labels"], wanted["labels"]) | ~same_split
    parts = rows["part"].to_numpy()
    found = set(np.unique(parts[other]).tolist())
    found |= {number for number in np.unique(parts).tolist() if current.rows.parts[number].classes != manifest.classes}
    return [current.rows.parts[number] for number in sorted(found)]


def _lists_differ(left: pa.ChunkedArray, right: pa.ChunkedArray) -> np.ndarray:
    """bool: where two columns of lists of numbers differ; null is the same as empty."""
    sizes = [pc.fill_null(pc.list_value_length(column), 0).to_numpy() for column in (left, right)]
    differ = sizes[0] != sizes[1]
    alike = pa.array(~differ)
    values = [pc.list_flatten(column.filter(alike)).to_numpy() for column in (left, right)]
    owner = np.repeat(np.flatnonzero(~differ), sizes[0][~differ])
    differ[owner[values[0] != values[1]]] = True
    return differ
