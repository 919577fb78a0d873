"""Manifest rows as Arrow tables."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import schema
from tsq_ray.errors import ManifestError


@dataclass(frozen=True)
class VideoRef:
    """One manifest row. `labels` index the manifest's classes; None means unknown."""

    video_id: str
    uri: str
    size_bytes: int
    etag: str | None = None
    modified: datetime | None = None
    labels: tuple[int, ...] | None = None
    split: str | None = None


_NAMES = [column.name for column in schema.MANIFEST]
CONTENT = ["size_bytes", "etag", "modified"]
"""Columns that distinguish versions of a file."""
_ID_BYTES = 16
_VIDEO_ID = re.compile("[0-9a-f]{16}")
_DIGIT_OF = np.full(256, 255, np.uint8)
"""Value of each ASCII hex digit; 255 for any other byte."""
_DIGIT_OF[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_CHUNK = 10_000
_AT_A_TIME = 100_000
"""Rows copied at a time."""
MAPPED_ROWS = 100_000
"""Tables with more rows than this are kept in a memory-mapped file."""


class VideoRows(Sequence[VideoRef]):
    """Manifest rows as an Arrow table; each VideoRef is created on access.

    A million rows take 150 MB (`manifest.files` keeps those on disk); as objects they would take
    1 GB.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.select(_NAMES)

    @classmethod
    def of(cls, rows: Iterable[VideoRef]) -> VideoRows:
        """Build from VideoRefs; return VideoRows unchanged."""
        if isinstance(rows, VideoRows):
            return rows
        arrow, source, tables = schema.manifest_schema(None), iter(rows), []
        while chunk := list(islice(source, _CHUNK)):
            tables.append(schema.table_from_rows((vars(row) for row in chunk), arrow))
        return cls(pa.concat_tables(tables) if tables else arrow.empty_table())

    @property
    def ids(self) -> pa.ChunkedArray:
        """The column of video ids."""
        return self.table["video_id"]

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[VideoRef]:
        for start in range(0, len(self), _CHUNK):
            yield from map(_ref, self.table.slice(start, _CHUNK).to_pylist())

    @overload
    def __getitem__(self, key: int) -> VideoRef: ...
    @overload
    def __getitem__(self, key: slice) -> VideoRows: ...
    def __getitem__(self, key: int | slice) -> VideoRef | VideoRows:
        places = range(len(self))[key]
        if isinstance(places, int):
            return _ref(self.table.slice(places, 1).to_pylist()[0])
        if len(places) == len(self) and places.step == 1:
            return self
        if places.step == 1:
            return VideoRows(self.table.slice(places.start, len(places)))
        return VideoRows(self.table.take(pa.array(places, pa.int64())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """Ascending keys of the ids, and the row of each: 12 bytes per row."""
        keys = keys_of(self.ids)
        order = np.argsort(keys, kind="stable").astype(np.int32)
        return keys[order], order

    def places(self, ids: pa.ChunkedArray) -> np.ndarray:
        """Return the row of each id as int32; -1 for an unknown id."""
        return self.places_of(keys_of(ids))

    def places_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, as `places` does; `keys` come from `keys_of`."""
        known, order = self._by_key
        places = np.full(len(keys), -1, np.int32)
        if len(known):
            found = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hit = known[found] == keys
            places[hit] = order[found[hit]]
        return places

    @cached_property
    def _pieces(self) -> tuple[list[pa.RecordBatch], np.ndarray]:
        """The table's chunks, and the first row of each followed by the total."""
        batches = self.table.to_batches()
        return batches, np.cumsum([0, *(batch.num_rows for batch in batches)])

    def take(self, places: np.ndarray) -> VideoRows:
        """Return the rows at these places, in this order."""
        return VideoRows(self.columns_at(places, _NAMES))

    def columns_at(self, places: np.ndarray, names: Sequence[str]) -> pa.Table:
        """Return these columns of the rows at these places, in this order.

        Arrow's own `take` would first copy a chunked table into one chunk.
        """
        taken = [
            self._take(places[start : start + _AT_A_TIME], names)
            for start in range(0, len(places), _AT_A_TIME)
        ]
        return pa.concat_tables([self.table.select(names).schema.empty_table(), *taken])

    def _take(self, places: np.ndarray, names: Sequence[str]) -> pa.Table:
        batches, bounds = self._pieces
        order = np.argsort(places, kind="stable")
        ascending = places[order]
        cuts = np.searchsorted(ascending, bounds)
        taken = []
        for batch, bound, first, last in zip(batches, bounds, cuts, cuts[1:], strict=False):
            if last > first:
                taken.append(batch.select(names).take(pa.array(ascending[first:last] - bound)))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.Table.from_batches(taken).combine_chunks().take(pa.array(back))

    def where(self, mask: np.ndarray) -> VideoRows:
        """Return the rows where `mask` is true, in order; on disk if more than MAPPED_ROWS."""
        batches, bounds = self._pieces

        def kept() -> Iterator[pa.RecordBatch]:
            return (
                batch.filter(pa.array(mask[start : start + len(batch)]))
                for batch, start in zip(batches, bounds, strict=False)
            )

        if mask.sum() > MAPPED_ROWS:
            with contextlib.suppress(OSError):  # disk full: the rows stay in memory
                return VideoRows(mapped(self.table.schema, kept()))
        return VideoRows(pa.Table.from_batches(kept(), self.table.schema))

    def duplicate(self) -> tuple[str, list[int]] | None:
        """Return an id that two rows share, and their row numbers; None if all ids differ.

        A run over such rows would miss one of them.
        """
        keys, order = self._by_key
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if not len(twice):
            return None
        numbers = sorted(order[twice[0] : twice[0] + 2].tolist())
        return self.ids[numbers[0]].as_py(), numbers


def mapped(arrow: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Write a table to an unlinked temporary file and memory-map it.

    The operating system keeps in memory what fits. Raises OSError if the disk is full.
    """
    with tempfile.NamedTemporaryFile(prefix="tsq-manifest-") as file:
        with pa.ipc.new_file(file, arrow) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def keys_of(ids: pa.ChunkedArray) -> np.ndarray:
    """Return a uint64 key [N] per id: the value of 16 hex digits, a hash of any other id."""
    return np.concatenate([np.zeros(0, np.uint64), *map(_keys, ids.chunks)])


def _keys(ids: pa.Array) -> np.ndarray:
    if pc.all(pc.equal(pc.binary_length(ids), _ID_BYTES), min_count=0).as_py():
        wide = ids.cast(pa.binary()).cast(pa.binary(_ID_BYTES))
        digits = _DIGIT_OF[
            np.frombuffer(
                wide.buffers()[1], np.uint8, _ID_BYTES * len(wide), wide.offset * _ID_BYTES
            )
        ].reshape(-1, _ID_BYTES)
        if (digits < 16).all():
            return (digits[:, 0::2] << 4 | digits[:, 1::2]).view(">u8").ravel().astype(np.uint64)
    return np.array([_key(video_id) for video_id in ids.to_pylist()], np.uint64)


def _key(video_id: str) -> int:
    if _VIDEO_ID.fullmatch(video_id):
        return int(video_id, 16)
    return int.from_bytes(hashlib.blake2b(video_id.encode(), digest_size=8).digest(), "big")


def _ref(record: dict[str, Any]) -> VideoRef:
    labels = record.pop("labels")
    return VideoRef(**record, labels=tuple(labels) if labels else None)


@dataclass(frozen=True)
class Manifest:
    """Rows (any VideoRefs; kept as VideoRows), class names, and where they came from.

    `id` is the hash of the sources. `sha256` is the hash of the file it was read from; for a
    folder, the hash of its shards' hashes, one per line.
    """

    rows: VideoRows
    classes: list[str]
    id: str = ""
    sources: tuple[str, ...] = ()
    sha256: str = ""
    uri: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", VideoRows.of(self.rows))


def same_contents(rows: pa.Table, was: pa.Table) -> np.ndarray:
    """Return, row by row, whether two tables name the same version of a file (bool).

    Compares size and etag, and the modification time if storage gives no etag.
    """
    etag = rows["etag"]
    same = pc.and_(pc.equal(rows["size_bytes"], was["size_bytes"]), _equal(etag, was["etag"]))
    return pc.and_(
        same, pc.or_(pc.is_valid(etag), _equal(rows["modified"], was["modified"]))
    ).to_numpy()


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(left, right), pc.and_(pc.is_null(left), pc.is_null(right)))


def same_as_before(rows: VideoRows, old: VideoRows, before: np.ndarray) -> np.ndarray:
    """Compare each row with row `before` of `old` by `same_contents`; False if `before` is -1."""
    same = np.zeros(len(rows), bool)
    for start in range(0, len(rows), _AT_A_TIME):
        known = start + np.flatnonzero(before[start : start + _AT_A_TIME] >= 0)
        same[known] = same_contents(
            rows.columns_at(known, CONTENT), old.columns_at(before[known], CONTENT)
        )
    return same


def choose_split(manifest: Manifest, split: str | None) -> VideoRows:
    """Return the rows of one split, or all for None. Raises ManifestError if no row has it."""
    if split is None:
        return manifest.rows
    splits = manifest.rows.table["split"]
    rows = manifest.rows.where(pc.fill_null(pc.equal(splits, split), False).to_numpy())
    if not rows:
        raise ManifestError(f"--split {split}: no video has it; {describe_splits(splits)}")
    return rows


def describe_splits(splits: pa.ChunkedArray) -> str:
    """Return the splits with their counts for error messages: "splits: train (320), val (100)"."""
    counts = sorted(
        (row["values"] or "(none)", row["counts"]) for row in pc.value_counts(splits).to_pylist()
    )
    return "splits: " + ", ".join(f"{name} ({count})" for name, count in counts)
