"""Listing -> one Parquet row a video: stable ids, labels (CSV, ActivityNet JSON, class folders), incremental update."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsq_ray import schema, storage
from tsq_ray.errors import ManifestError, StorageError

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".asf",
        ".avi",
        ".divx",
        ".f4v",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4a",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogv",
        ".qt",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    ]
)
"""File names that a listing takes; a file named outright is taken whatever its name."""
SPLIT_NAMES = frozenset(("train", "training", "val", "validation", "valid", "test", "testing"))
"""Folder names that are splits where class folders lie below them."""


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
    labels: str | None = None,
    classes_file: str | None = None,
    split_name: str | None = None,
    old: Manifest | None = None,
) -> tuple[Manifest, IndexSummary]:
    """List `sources` and join the labels.

    `labels`: a CSV (`path,label[,split]`) or ActivityNet JSON; "folders" or "none"; by default the class folders where every video
    lies in one (`class/video` or `split/class/video`). `classes_file`: class names, one a line, that fix the label order
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
    names = _read_labels(labels, files, summary)
    rows, classes = _join(rows, names, classes_file, split_name, summary)
    summary.videos, summary.classes = len(rows), len(classes)
    summary.splits = dict(Counter(row.split or "(none)" for row in rows))
    _compare(rows, old, summary)
    identity = hashlib.sha256("\n".join(sorted(sources)).encode()).hexdigest()[:16]
    return Manifest(rows, classes, identity, tuple(sources)), summary


_Names = dict[str, tuple[tuple[str, ...], str | None]]
"""Normalised URI -> (class names, split)."""


def _read_labels(labels: str | None, files: list[tuple[str, storage.StoredFile]], summary: IndexSummary) -> _Names:
    if labels == "none":
        summary.labels_from = "none (--labels none)"
        return {}
    if labels in (None, "folders"):
        names = _from_folders(files)
        if labels == "folders" and not names:
            raise ManifestError(
                "--labels folders: some videos do not lie in a class folder (SOURCE/class/video or SOURCE/split/class/video)"
            )
        summary.labels_from = "class folders" if names else "none"
        return names
    assert labels is not None
    summary.labels_from = storage.redact(labels)
    text = storage.read_text(storage.normalize(labels))
    if text.lstrip().startswith("{"):
        return _from_activitynet(text, labels, files, summary)
    return _from_csv(text, labels, files, summary)


def _from_folders(files: list[tuple[str, storage.StoredFile]]) -> _Names:
    names: _Names = {}
    for source, file in files:
        parts = file.uri[len(source) :].strip("/").split("/") if file.uri.startswith(source) else []
        if len(parts) == 2:
            names[file.uri] = ((_spaces(parts[0]),), None)
        elif len(parts) == 3 and parts[0].lower() in SPLIT_NAMES:
            names[file.uri] = ((_spaces(parts[1]),), parts[0])
        else:
            return {}
    return names if len({labels for labels, _ in names.values()}) > 1 else {}


def _spaces(folder: str) -> str:
    return folder.replace("_", " ").strip()


def _from_csv(text: str, labels: str, files: list[tuple[str, storage.StoredFile]], summary: IndexSummary) -> _Names:
    reader = csv.DictReader(io.StringIO(text))
    columns = [name.strip() for name in reader.fieldnames or ()]
    if "path" not in columns or "label" not in columns:
        raise ManifestError(f"{storage.redact(labels)}: columns are {columns}; expected path,label[,split]")
    reader.fieldnames = columns
    base = storage.parent_of(storage.normalize(labels))
    uris = {file.uri for _, file in files}
    names: _Names = {}
    for line in reader:
        path, label = (line["path"] or "").strip(), (line["label"] or "").strip()
        if not path:
            continue
        uri = path if not storage.is_local(path) or path.startswith("/") else storage.join(base, path)
        uri = storage.normalize(uri)
        if uri not in uris:
            summary.missing.append(path)
            continue
        classes = tuple(dict.fromkeys(part.strip() for part in label.split("|") if part.strip()))
        names[uri] = (classes, (line.get("split") or "").strip() or None)
    if not names:
        raise ManifestError(
            f"{storage.redact(labels)}: none of its {len(summary.missing)} paths is among the {len(uris)} videos found "
            f"(first: {summary.missing[:1]}); paths are relative to the folder of the CSV"
        )
    return names


def _from_activitynet(text: str, labels: str, files: list[tuple[str, storage.StoredFile]], summary: IndexSummary) -> _Names:
    try:
        database: dict[str, Any] = json.loads(text)["database"]
        entries = {key: (entry.get("subset"), [part["label"] for part in entry.get("annotations", [])]) for key, entry in database.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{storage.redact(labels)}: not ActivityNet JSON: no usable 'database' ({error!r})") from None
    by_stem: dict[str, list[str]] = {}
    for _, file in files:
        by_stem.setdefault(storage.name_of(file.uri).rpartition(".")[0].removeprefix("v_"), []).append(file.uri)
    names: _Names = {}
    subsets = {"training": "train", "validation": "val", "testing": "test"}
    for key, (subset, found) in entries.items():
        uris = by_stem.get(key.removeprefix("v_"), [])
        if not uris:
            summary.missing.append(key)
        for uri in uris:
            names[uri] = (tuple(dict.fromkeys(found)), subsets.get(str(subset), subset))
    if not names:
        raise ManifestError(
            f"{storage.redact(labels)}: none of its {len(entries)} videos is among the files found (names v_ID.mp4 or ID.mp4)"
        )
    return names


def _join(
    rows: list[VideoRef], names: _Names, classes_file: str | None, split_name: str | None, summary: IndexSummary
) -> tuple[list[VideoRef], list[str]]:
    found = sorted({name for labels, _ in names.values() for name in labels})
    classes = found
    if classes_file is not None:
        classes = [line.strip() for line in storage.read_text(storage.normalize(classes_file)).splitlines() if line.strip()]
        if len(set(classes)) != len(classes):
            raise ManifestError(f"{storage.redact(classes_file)}: a class name stands twice: {Counter(classes).most_common(1)[0][0]!r}")
        unknown = [name for name in found if name not in set(classes)]
        if unknown:
            raise ManifestError(
                f"{storage.redact(classes_file)}: lacks {len(unknown)} classes of the labels, first {unknown[0]!r}; add them"
            )
    index = {name: number for number, name in enumerate(classes)}
    joined = []
    for row in rows:
        labels, split = names.get(row.uri, ((), None))
        numbers = tuple(sorted(index[name] for name in labels)) or None
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
