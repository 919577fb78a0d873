"""Listing -> one Parquet row a video: stable ids, labels and splits joined by URI, incremental update."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsq_ray import schema, storage
from tsq_ray.containers import VIDEO_SUFFIXES
from tsq_ray.errors import ManifestError, StorageError
from tsq_ray.labels import Classes, Labels, read_classes, read_labels


@dataclass(frozen=True)
class VideoRef:
    """One manifest row: labels index the manifest's classes; None where nothing is known."""

    video_id: str
    uri: str
    size_bytes: int
    etag: str | None = None
    modified: datetime | None = None
    labels: tuple[int, ...] | None = None
    split: str | None = None


_NAMES = [column.name for column in schema.MANIFEST]
_CHUNK = 10_000
_EXAMPLES = 3


class VideoRows(Sequence[VideoRef]):
    """Manifest rows as an Arrow table; a VideoRef is made when it is asked for. A million take 150 MB, as objects they would take 1 GB."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.select(_NAMES)

    @classmethod
    def of(cls, rows: Iterable[VideoRef]) -> VideoRows:
        """From VideoRefs; VideoRows stay what they are."""
        if isinstance(rows, VideoRows):
            return rows
        arrow, source, tables = schema.manifest_schema(None), iter(rows), []
        while chunk := list(islice(source, _CHUNK)):
            tables.append(schema.table_from_rows((vars(row) for row in chunk), arrow))
        return cls(pa.concat_tables(tables) if tables else arrow.empty_table())

    @property
    def ids(self) -> pa.ChunkedArray:
        """The video ids."""
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

    def places(self, ids: pa.ChunkedArray) -> np.ndarray:
        """int64: the row of each id, -1 where it has none."""
        return pc.fill_null(pc.index_in(ids, value_set=self.ids.combine_chunks()), -1).to_numpy().astype(np.int64)


def _ref(record: dict[str, Any]) -> VideoRef:
    labels = record.pop("labels")
    return VideoRef(**record, labels=tuple(labels) if labels else None)


@dataclass(frozen=True)
class Manifest:
    """Rows (any VideoRefs; kept as VideoRows), class names, and where they came from; `sha256` is the hash of the file it was read from."""

    rows: VideoRows
    classes: list[str]
    id: str = ""
    sources: tuple[str, ...] = ()
    sha256: str = ""
    uri: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", VideoRows.of(self.rows))


@dataclass
class IndexSummary:
    """What `build_manifest` found, in numbers and names."""

    videos: int = 0
    classes: int = 0
    labels_from: str = ""
    labelled: int = 0
    unlabelled: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Entries of the listing that are no rows, by reason or, of other files, by suffix."""
    left_out_examples: dict[str, list[str]] = field(default_factory=dict)
    """The first of each reason."""
    missing: list[str] = field(default_factory=list)
    new: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0

    def leave_out(self, uri: str, reason: str) -> None:
        """Count an entry, and name it where it is one of the first."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        examples = self.left_out_examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(storage.redact(uri))


def video_id(uri: str) -> str:
    """First 16 hex digits of the sha256 of the normalised URI."""
    place = storage.normalize(uri).encode("utf-8", "surrogatepass")  # a failed row needs an id, too
    return hashlib.sha256(place).hexdigest()[:16]


def list_sources(sources: Sequence[str], summary: IndexSummary) -> Iterator[tuple[str, storage.StoredFile]]:
    """(source, file) of every video below the sources, each once; the rest is counted in `summary`.

    ManifestError where a source matches nothing; StorageError where it cannot be listed.
    """
    seen: set[str] = set()  # one listing names nothing twice
    is_folder = {source: storage.is_folder(source) for source in sources}
    for source, folder in is_folder.items():
        found, others = 0, Counter[str]()
        for entry in storage.entries(source) if folder else _one(source):
            reason = _why_left_out(entry) if folder else None
            found += reason is None
            if len(is_folder) > 1:
                named_outright = reason is not None and entry.uri in is_folder
                if entry.uri in seen or named_outright:
                    continue
                seen.add(entry.uri)
            if isinstance(entry, storage.StoredFile) and reason is None:
                yield source, entry
            else:
                others[str(reason)] += 1
                summary.leave_out(entry.uri, str(reason))
        if not found:
            counts = ", ".join(f"{reason} {count}" for reason, count in others.items())
            held = f"; it holds {others.total()} other files: {counts}" if others else ""
            raise ManifestError(
                f"{storage.redact(source)}: no video found{held}; name a folder, an s3:// prefix "
                "or a file with mp4, mkv, webm, mov, avi or another video suffix"
            )


def _why_left_out(entry: storage.StoredFile | storage.LeftOut) -> str | None:
    if isinstance(entry, storage.LeftOut):
        return entry.reason
    suffix = _suffix(entry.uri)
    return None if suffix in VIDEO_SUFFIXES else suffix or "(no suffix)"


def _one(source: str) -> Iterator[storage.StoredFile]:
    try:
        yield storage.stat(source)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError) and error.error_type == "not_found":
            raise ManifestError(f"{storage.redact(source)}: no such file, folder, bucket or prefix; check the name") from None
        raise


def _suffix(uri: str) -> str:
    name = storage.name_of(uri)
    return "." + name.rpartition(".")[2].lower() if "." in name else ""


def build_manifest(
    sources: Sequence[str],
    labels: str | Sequence[str] = (),
    classes_file: str | None = None,
    split_name: str | None = None,
    old: Manifest | None = None,
    labels_format: str | None = None,
) -> tuple[Manifest, IndexSummary]:
    """List `sources` and join the labels.

    `labels`: label files (`labels_format`: the name of their format, else by their content; see labels.py), "folders" or "none"; by
    default the class folders where every video lies in one. `classes_file`: class names, one a line, that fix the label order
    (else alphabetical). `old`: the manifest to compare with (--update). Raises ManifestError.
    """
    sources = list(dict.fromkeys(map(storage.normalize, sources)))
    if not sources:
        raise ManifestError("no source given; name a folder, an s3:// prefix or video files")
    for source in sources:
        if not storage.is_utf8(source):
            raise ManifestError(f"{storage.redact(source)}: the name is not UTF-8, as a manifest needs it; rename it")
    summary = IndexSummary()
    files = _Listed.of(list_sources(sources, summary))
    _check_ids(files.rows)
    fixed = read_classes(classes_file) if classes_file is not None else None
    found = read_labels([labels] if isinstance(labels, str) else labels, files, fixed, labels_format)
    summary.labels_from, summary.missing = found.origin, found.missing
    rows, classes = _join(files.rows, found, fixed, split_name, summary)
    summary.videos, summary.classes = len(rows), len(classes)
    counted = pc.value_counts(rows.table["split"])
    summary.splits = {record["values"] or "(none)": record["counts"] for record in counted.to_pylist()}
    _compare(rows, old, summary)
    identity = hashlib.sha256("\n".join(sorted(sources)).encode()).hexdigest()[:16]
    return Manifest(rows, classes, identity, tuple(sources)), summary


def _check_ids(rows: VideoRows) -> None:
    """Each id stands for one row, or every run over them would miss one. ManifestError otherwise."""
    if pc.count_distinct(rows.ids).as_py() == len(rows):
        return
    counts = pc.value_counts(rows.ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
    first, second = rows.table.filter(pc.equal(rows.ids, twice))["uri"].to_pylist()[:2]
    raise ManifestError(f"{storage.redact(first)} and {storage.redact(second)} have the same video_id {twice}; rename one of the two")


class _Listed(Sequence[tuple[str, str]]):
    """(source, URI) of every video found, and their manifest rows, without labels."""

    def __init__(self, sources: list[str], source_of: np.ndarray, rows: VideoRows) -> None:
        self.sources, self.source_of, self.rows = sources, source_of, rows

    @classmethod
    def of(cls, found: Iterable[tuple[str, storage.StoredFile]]) -> _Listed:
        """Takes one page after the other into Arrow."""
        sources: dict[str, int] = {}
        numbers: list[np.ndarray] = []

        def refs() -> Iterator[VideoRef]:
            pages = iter(found)
            while page := list(islice(pages, _CHUNK)):
                numbers.append(np.array([sources.setdefault(source, len(sources)) for source, _ in page], np.int32))
                for _, file in page:
                    yield VideoRef(video_id(file.uri), file.uri, file.size_bytes, file.etag, file.modified)

        rows = VideoRows.of(refs())
        return cls(list(sources), np.concatenate([*numbers, np.zeros(0, np.int32)]), rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for start in range(0, len(self), _CHUNK):
            uris = self.rows.table["uri"].slice(start, _CHUNK).to_pylist()
            yield from ((self.sources[number], uri) for number, uri in zip(self.source_of[start : start + _CHUNK], uris, strict=True))

    def __getitem__(self, key: Any) -> Any:
        return list(self)[key] if isinstance(key, slice) else (self.sources[self.source_of[key]], self.rows[key].uri)


def _join(
    rows: VideoRows, labels: Labels, fixed: Classes | None, split_name: str | None, summary: IndexSummary
) -> tuple[VideoRows, list[str]]:
    found = sorted({name for names, _ in labels.by_uri.values() for name in names})
    classes = fixed.names if fixed else found
    index = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in found if name not in index]
    if fixed and unknown:
        raise ManifestError(f"{storage.redact(fixed.uri)}: lacks {len(unknown)} classes of the labels, first {unknown[0]!r}; add them")
    named = [labels.by_uri.get(uri, ((), None)) for uri in rows.table["uri"].to_pylist()] if labels.by_uri else [((), None)] * len(rows)
    columns = {
        "labels": [sorted(index[name] for name in names) or None for names, _ in named],
        "split": [split_name or split for _, split in named],
    }
    table = rows.table
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    summary.unlabelled = table["labels"].null_count
    summary.labelled = len(rows) - summary.unlabelled
    return VideoRows(table), classes


def _compare(rows: VideoRows, old: Manifest | None, summary: IndexSummary) -> None:
    if old is None:
        summary.new = len(rows)
        return
    before = old.rows.places(rows.ids)
    known = np.flatnonzero(before >= 0)
    same = same_contents(rows.table.take(pa.array(known)), old.rows.table.take(pa.array(before[known])))
    summary.new = len(rows) - len(known)
    summary.unchanged = int(same.sum())
    summary.changed = len(known) - summary.unchanged
    summary.deleted = len(old.rows) - len(np.unique(before[known]))


def same_contents(rows: pa.Table, was: pa.Table) -> np.ndarray:
    """bool: whether two tables name the same version of a file, row by row: size and etag, and the time where storage gives no etag."""
    etag = rows["etag"]
    same = pc.and_(pc.equal(rows["size_bytes"], was["size_bytes"]), _equal(etag, was["etag"]))
    return pc.and_(same, pc.or_(pc.is_valid(etag), _equal(rows["modified"], was["modified"]))).to_numpy()


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(left, right), pc.and_(pc.is_null(left), pc.is_null(right)))


def write_manifest(manifest: Manifest, uri: str) -> None:
    """Publish the manifest as one Parquet file."""
    arrow = schema.manifest_schema(manifest.classes)
    identity = json.dumps({"id": manifest.id, "sources": [storage.redact(source) for source in manifest.sources]})
    arrow = arrow.with_metadata({**(arrow.metadata or {}), schema.MANIFEST_KEY: identity.encode()})
    table = manifest.rows.table.cast(arrow)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=100_000)
    storage.write_bytes(storage.normalize(uri), sink.getvalue().to_pybytes())


def read_manifest(uri: str) -> Manifest:
    """Read and check a manifest. ManifestError where the file is missing or is something else."""
    uri = storage.normalize(uri)
    try:
        data = storage.read_bytes(uri)
    except StorageError as error:
        if error.error_type == "not_found":
            raise ManifestError(
                f"manifest {storage.redact(uri)}: no such file; make one with tsq index SOURCE --out {storage.redact(uri)}"
            ) from None
        if isinstance(error.__cause__, IsADirectoryError):
            raise ManifestError(f"manifest {uri}: is a folder; name the Parquet file that tsq index wrote") from None
        raise
    try:
        # not by pq.read_table, nor with pre_buffer: one of Arrow's threads may drop the bytes as the interpreter ends, which aborts the process
        with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
            table = file.read(use_threads=False)
    except (pa.ArrowInvalid, OSError):
        raise ManifestError(f"manifest {storage.redact(uri)}: not a Parquet file; make one with tsq index") from None
    missing = [column.name for column in schema.MANIFEST if column.name not in table.column_names]
    if missing or schema.MANIFEST_KEY not in (table.schema.metadata or {}):
        what = f"lacks the columns {missing}" if missing else "lacks the manifest's metadata"
        raise ManifestError(f"manifest {storage.redact(uri)}: {what}; make one with tsq index")
    identity = json.loads(table.schema.metadata[schema.MANIFEST_KEY])
    rows = VideoRows(table)
    return Manifest(rows, schema.classes_of(table.schema), identity["id"], tuple(identity["sources"]), storage.sha256_of(data), uri)


def choose_split(manifest: Manifest, split: str | None) -> VideoRows:
    """The rows of one split, or all. ManifestError where no row has that split."""
    if split is None:
        return manifest.rows
    rows = VideoRows(manifest.rows.table.filter(pc.equal(manifest.rows.table["split"], split)))
    if not rows:
        raise ManifestError(f"--split {split}: no video has it; {describe_splits(manifest.rows.table['split'].to_pylist())}")
    return rows


def describe_splits(splits: Iterator[str | None] | Sequence[str | None]) -> str:
    """ "there is: train (320), val (100)", for error messages."""
    counts = Counter(split or "(none)" for split in splits)
    return "there is: " + ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
