"""Listing -> one Parquet row a video: stable ids, labels and splits joined by URI, incremental update."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq

from tsq_ray import schema, storage
from tsq_ray.errors import ManifestError, StorageError
from tsq_ray.labels import VIDEO_SUFFIXES, Classes, Labels, read_classes, read_labels


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


@dataclass(frozen=True)
class Manifest:
    """Rows, class names, and where they came from; `sha256` is the hash of the file it was read from."""

    rows: list[VideoRef]
    classes: list[str]
    id: str = ""
    sources: tuple[str, ...] = ()
    sha256: str = ""
    uri: str = ""


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
    missing: list[str] = field(default_factory=list)
    new: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0


def video_id(uri: str) -> str:
    """First 16 hex digits of the sha256 of the normalised URI."""
    return hashlib.sha256(storage.normalize(uri).encode()).hexdigest()[:16]


def list_sources(sources: Sequence[str], left_out: Counter[str]) -> Iterator[tuple[str, storage.StoredFile]]:
    """(source, file) of every video below the sources, each once; other suffixes are counted in `left_out`.

    ManifestError where a source matches nothing; StorageError where it cannot be listed.
    """
    seen: set[str] = set()
    for source in sources:
        found = 0
        folder = storage.is_folder(source)
        for file in storage.walk(source) if folder else _one(source):
            suffix = _suffix(file.uri)
            if folder and suffix not in VIDEO_SUFFIXES:
                left_out[suffix or "(no suffix)"] += 1
                continue
            found += 1
            if file.uri not in seen:
                seen.add(file.uri)
                yield source, file
        if not found:
            other = f"; it holds {sum(left_out.values())} other files" if left_out else ""
            raise ManifestError(
                f"{storage.redact(source)}: no video found{other}; name a folder, an s3:// prefix or a file with "
                "mp4, mkv, webm, mov, avi or another video suffix"
            )


def _one(source: str) -> Iterator[storage.StoredFile]:
    try:
        yield storage.stat(source)
    except StorageError as error:
        if error.error_type == "not_found":
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
    sources = [storage.normalize(source) for source in sources]
    if not sources:
        raise ManifestError("no source given; name a folder, an s3:// prefix or video files")
    summary = IndexSummary()
    left_out: Counter[str] = Counter()
    files = list(list_sources(sources, left_out))
    summary.left_out = dict(left_out)
    rows = [VideoRef(video_id(file.uri), file.uri, file.size_bytes, file.etag, file.modified) for _, file in files]
    fixed = read_classes(classes_file) if classes_file is not None else None
    found = read_labels([labels] if isinstance(labels, str) else labels, files, fixed, labels_format)
    summary.labels_from, summary.missing = found.origin, found.missing
    rows, classes = _join(rows, found, fixed, split_name, summary)
    summary.videos, summary.classes = len(rows), len(classes)
    summary.splits = dict(Counter(row.split or "(none)" for row in rows))
    _compare(rows, old, summary)
    identity = hashlib.sha256("\n".join(sorted(sources)).encode()).hexdigest()[:16]
    return Manifest(rows, classes, identity, tuple(sources)), summary


def _join(
    rows: list[VideoRef], labels: Labels, fixed: Classes | None, split_name: str | None, summary: IndexSummary
) -> tuple[list[VideoRef], list[str]]:
    found = sorted({name for names, _ in labels.by_uri.values() for name in names})
    classes = fixed.names if fixed else found
    index = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in found if name not in index]
    if fixed and unknown:
        raise ManifestError(f"{storage.redact(fixed.uri)}: lacks {len(unknown)} classes of the labels, first {unknown[0]!r}; add them")
    joined = []
    for row in rows:
        names, split = labels.by_uri.get(row.uri, ((), None))
        numbers = tuple(sorted(index[name] for name in names)) or None
        joined.append(replace(row, labels=numbers, split=split_name or split))
    summary.labelled = sum(row.labels is not None for row in joined)
    summary.unlabelled = len(joined) - summary.labelled
    return joined, classes


def _compare(rows: list[VideoRef], old: Manifest | None, summary: IndexSummary) -> None:
    before = {row.video_id: row for row in old.rows} if old else {}
    for row in rows:
        was = before.pop(row.video_id, None)
        if was is None:
            summary.new += 1
        elif same_content(row, was):
            summary.unchanged += 1
        else:
            summary.changed += 1
    summary.deleted = len(before)


def same_content(row: VideoRef, was: VideoRef) -> bool:
    """Whether two rows of a video show the same file: size and etag, or the modification time where there is no etag."""
    if row.size_bytes != was.size_bytes or row.etag != was.etag:
        return False
    return row.etag is not None or row.modified == was.modified


def write_manifest(manifest: Manifest, uri: str) -> None:
    """Publish the manifest as one Parquet file."""
    arrow = schema.manifest_schema(manifest.classes)
    identity = json.dumps({"id": manifest.id, "sources": [storage.redact(source) for source in manifest.sources]})
    arrow = arrow.with_metadata({**(arrow.metadata or {}), schema.MANIFEST_KEY: identity.encode()})
    table = schema.table_from_rows((vars(row) for row in manifest.rows), arrow)
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
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
    except (pa.ArrowInvalid, OSError):
        raise ManifestError(f"manifest {storage.redact(uri)}: not a Parquet file; make one with tsq index") from None
    missing = [column.name for column in schema.MANIFEST if column.name not in table.column_names]
    if missing or schema.MANIFEST_KEY not in (table.schema.metadata or {}):
        what = f"lacks the columns {missing}" if missing else "lacks the manifest's metadata"
        raise ManifestError(f"manifest {storage.redact(uri)}: {what}; make one with tsq index")
    identity = json.loads(table.schema.metadata[schema.MANIFEST_KEY])
    names = [column.name for column in schema.MANIFEST]
    rows = []
    for record in table.select(names).to_pylist():
        labels = record.pop("labels")
        rows.append(VideoRef(**record, labels=tuple(labels) if labels else None))
    return Manifest(rows, schema.classes_of(table.schema), identity["id"], tuple(identity["sources"]), storage.sha256_of(data), uri)


def choose_split(manifest: Manifest, split: str | None) -> list[VideoRef]:
    """The rows of one split, or all. ManifestError where no row has that split."""
    if split is None:
        return manifest.rows
    rows = [row for row in manifest.rows if row.split == split]
    if not rows:
        raise ManifestError(f"--split {split}: no video has it; {describe_splits(row.split for row in manifest.rows)}")
    return rows


def describe_splits(splits: Iterator[str | None] | Sequence[str | None]) -> str:
    """ "there is: train (320), val (100)", for error messages."""
    counts = Counter(split or "(none)" for split in splits)
    return "there is: " + ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
