"""Build a manifest from listings.

One row per video, with a stable id; labels and splits are joined by URI, and changes since the
previous manifest are counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import storage
from tsq_ray.containers import VIDEO_SUFFIXES
from tsq_ray.errors import ManifestError, StorageError
from tsq_ray.labels import Classes, Labels, read_classes, read_labels
from tsq_ray.manifest.videos import Manifest, VideoRef, VideoRows, same_as_before

_CHUNK = 10_000
_EXAMPLES = 3


@dataclass
class Findings:
    """Counts and examples of what a listing and its labels hold, collected along the way."""

    videos: int = 0
    classes: int = 0
    labels_from: str = ""
    labelled: int = 0
    unlabelled: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Listed entries that are not videos: other files counted by suffix, the rest by reason."""
    left_out_examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few entries for each reason."""
    missing: list[str] = field(default_factory=list)
    new: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0

    def leave_out(self, uri: str, reason: str) -> None:
        """Count an entry, and keep it as an example if it is one of the first for its reason."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        examples = self.left_out_examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(storage.redact(uri))


def video_id(uri: str) -> str:
    """Return the first 16 hex digits of the sha256 of the normalised URI.

    Hashes `uri` as given if it cannot be normalised: such a name becomes a failed row, which needs
    an id too.
    """
    try:
        name = storage.normalize(uri)
    except (StorageError, OSError, ValueError):
        name = uri
    # surrogatepass: a name that is not UTF-8 needs an id too
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def list_sources(
    sources: Sequence[str], summary: Findings
) -> Iterator[tuple[str, storage.StoredFile]]:
    """Yield (source, file) once for every video below the sources; count the rest in `summary`.

    Raises ManifestError if a source holds no video, StorageError if it cannot be listed.
    """
    seen: set[str] = set()  # filled only for several sources: one listing names nothing twice
    is_folder = {source: storage.is_folder(source) for source in sources}
    for source, folder in is_folder.items():
        num_videos, others = 0, Counter[str]()
        for entry in storage.entries(source) if folder else _single_file(source):
            reason = _why_left_out(entry) if folder else None
            num_videos += reason is None
            if len(is_folder) > 1:
                is_source_itself = reason is not None and entry.uri in is_folder
                if entry.uri in seen or is_source_itself:
                    continue
                seen.add(entry.uri)
            if isinstance(entry, storage.StoredFile) and reason is None:
                yield source, entry
            else:
                others[str(reason)] += 1
                summary.leave_out(entry.uri, str(reason))
        if not num_videos:
            raise _no_video(source, others)


def _no_video(source: str, others: Counter[str]) -> ManifestError:
    counts = ", ".join(f"{reason} {count}" for reason, count in others.items())
    held = f"; it holds {others.total()} other files: {counts}" if others else ""
    return ManifestError(
        f"{storage.redact(source)}: no video found{held}; name a folder, an s3:// prefix "
        "or a file with mp4, mkv, webm, mov, avi or another video suffix"
    )


def _why_left_out(entry: storage.StoredFile | storage.LeftOut) -> str | None:
    if isinstance(entry, storage.LeftOut):
        return entry.reason
    suffix = _suffix(entry.uri)
    return None if suffix in VIDEO_SUFFIXES else suffix or "(no suffix)"


def _single_file(source: str) -> Iterator[storage.StoredFile]:
    try:
        yield storage.stat(source)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError) and error.error_type == "not_found":
            raise ManifestError(
                f"{storage.redact(source)}: no such file, folder, bucket or prefix; check the name"
            ) from None
        raise


def _suffix(uri: str) -> str:
    name = storage.name_of(uri)
    return "." + name.rpartition(".")[2].lower() if "." in name else ""


def assemble_manifest(
    sources: Sequence[str],
    labels: str | Sequence[str] = (),
    classes_file: str | None = None,
    split_name: str | None = None,
    old: Manifest | None = None,
    labels_format: str | None = None,
) -> tuple[Manifest, Findings]:
    """List `sources` and join the labels.

    The arguments are those of `build_manifest`; `old` is the manifest to compare with. Raises
    ManifestError.
    """
    sources = list(dict.fromkeys(map(storage.normalize, sources)))
    if not sources:
        raise ManifestError("no source given; name a folder, an s3:// prefix or video files")
    for source in sources:
        if not storage.is_utf8(source):
            raise ManifestError(
                f"{storage.redact(source)}: the name is not UTF-8, which a manifest requires; "
                "rename it"
            )
    summary = Findings()
    files = _Listed.of(list_sources(sources, summary))
    _check_ids(files.rows)
    fixed = read_classes(classes_file) if classes_file is not None else None
    found = read_labels(
        [labels] if isinstance(labels, str) else labels, files, fixed, labels_format
    )
    summary.labels_from, summary.missing = found.origin, found.missing
    rows, classes = _join(files.rows, found, fixed, split_name, summary)
    summary.videos, summary.classes = len(rows), len(classes)
    counted = pc.value_counts(rows.table["split"])
    summary.splits = {
        record["values"] or "(none)": record["counts"] for record in counted.to_pylist()
    }
    _compare(rows, old, summary)
    identity = hashlib.sha256("\n".join(sorted(sources)).encode()).hexdigest()[:16]
    return Manifest(rows, classes, identity, tuple(sources)), summary


def _check_ids(rows: VideoRows) -> None:
    """Raise ManifestError if two rows share an id: every run would then miss one of them."""
    if found := rows.duplicate():
        shared_id, numbers = found
        first, second = (storage.redact(rows[number].uri) for number in numbers)
        raise ManifestError(
            f"{first} and {second} have the same video_id {shared_id}; rename one of the two"
        )


class _Listed(Sequence[tuple[str, str]]):
    """Sequence of (source, URI), one per video found; `rows` are the manifest rows, unlabelled."""

    def __init__(self, sources: list[str], source_of: np.ndarray, rows: VideoRows) -> None:
        self.sources, self.source_of, self.rows = sources, source_of, rows

    @classmethod
    def of(cls, found: Iterable[tuple[str, storage.StoredFile]]) -> _Listed:
        """Collect a listing page by page, converting each page to Arrow."""
        sources: dict[str, int] = {}
        numbers: list[np.ndarray] = []

        def refs() -> Iterator[VideoRef]:
            pages = iter(found)
            while page := list(islice(pages, _CHUNK)):
                numbers.append(
                    np.array(
                        [sources.setdefault(source, len(sources)) for source, _ in page], np.int32
                    )
                )
                for _, file in page:
                    yield VideoRef(
                        video_id(file.uri), file.uri, file.size_bytes, file.etag, file.modified
                    )

        rows = VideoRows.of(refs())
        return cls(list(sources), np.concatenate([*numbers, np.zeros(0, np.int32)]), rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for start in range(0, len(self), _CHUNK):
            uris = self.rows.table["uri"].slice(start, _CHUNK).to_pylist()
            yield from (
                (self.sources[number], uri)
                for number, uri in zip(self.source_of[start : start + _CHUNK], uris, strict=True)
            )

    def __getitem__(self, key: Any) -> Any:
        return (
            list(self)[key]
            if isinstance(key, slice)
            else (self.sources[self.source_of[key]], self.rows[key].uri)
        )


def _join(
    rows: VideoRows,
    labels: Labels,
    fixed: Classes | None,
    split_name: str | None,
    summary: Findings,
) -> tuple[VideoRows, list[str]]:
    found = sorted({name for names, _ in labels.by_uri.values() for name in names})
    classes = fixed.names if fixed else found
    index = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in found if name not in index]
    if fixed and unknown:
        raise ManifestError(
            f"{storage.redact(fixed.uri)}: lacks {len(unknown)} classes of the labels, "
            f"first {unknown[0]!r}; add them"
        )
    table = rows.table
    columns: dict[str, list[pa.Array]] = {"labels": [], "split": []}
    for start in range(0, len(rows), _CHUNK):
        uris = table["uri"].slice(start, _CHUNK).to_pylist()
        known = [labels.by_uri.get(uri, ((), None)) for uri in uris]
        values = {
            "labels": [sorted(index[name] for name in names) or None for names, _ in known],
            "split": [split_name or split for _, split in known],
        }
        for name, chunks in columns.items():
            chunks.append(pa.array(values[name], table.schema.field(name).type))
    for name, chunks in columns.items():
        field = table.schema.field(name)
        table = table.set_column(
            table.schema.get_field_index(name), field, pa.chunked_array(chunks, field.type)
        )
    summary.unlabelled = table["labels"].null_count
    summary.labelled = len(rows) - summary.unlabelled
    return VideoRows(table), classes


def _compare(rows: VideoRows, old: Manifest | None, summary: Findings) -> None:
    if old is None:
        summary.new = len(rows)
        return
    before = old.rows.places(rows.ids)
    num_known = int((before >= 0).sum())
    summary.new = len(rows) - num_known
    summary.unchanged = int(same_as_before(rows, old.rows, before).sum())
    summary.changed = num_known - summary.unchanged
    summary.deleted = len(old.rows) - len(np.unique(before[before >= 0]))
