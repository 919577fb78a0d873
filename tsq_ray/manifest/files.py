"""A manifest on storage: one Parquet file, or a folder of Parquet shards.

`_manifest.json` lists the shards that `tsq index` wrote. It is published after them, so a reader
never sees a mixture of two versions. Each shard's name carries a hash of its content; the shards of
the old version are removed last. A folder without `_manifest.json` was made by another program.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsq_ray import schema, storage
from tsq_ray.errors import ManifestError, StorageError
from tsq_ray.manifest.videos import MAPPED_ROWS, Manifest, VideoRows, mapped
from tsq_ray.provenance import check_format

MANIFEST_FILE = "_manifest.json"
FORMAT = 1
MAX_FILE_ROWS = 1_000_000
"""A larger manifest is written as a folder, unless it replaces an existing file."""
SHARD_ROWS = 500_000
"""About 35 MB on storage and 70 MB in memory."""
_ROW_GROUP = 100_000
_SHARD = re.compile(r"part-\d{5}-[0-9a-f]{12}\.parquet")
_VIDEO_ID = "^[0-9a-f]{16}$"
_TRIES = 3


def find_old(out: str, update: bool) -> Manifest | None:
    """Return the manifest that `tsq index --out` will replace; None if `out` holds none yet.

    Raises ManifestError if a manifest exists but `update` is not set, or if `out` holds something
    else.
    """
    target, shown = storage.normalize(out), storage.redact(out)
    if storage.is_folder(target):
        if _read_listing(target) is None:
            foreign = (
                file.uri
                for file in storage.walk(target)
                if not _SHARD.fullmatch(storage.name_of(file.uri))
            )
            if uri := next(foreign, None):
                raise ManifestError(
                    f"--out {shown}: holds other files ({storage.redact(uri)}); "
                    "name a new file or folder"
                )
            return None
    elif not storage.exists(target):
        return None
    elif out.endswith("/"):
        raise ManifestError(f"--out {shown}: is a file; drop the trailing / or name another folder")
    if not update:
        raise ManifestError(
            f"--out {shown}: already exists; add --update to list again, or name another file"
        )
    return read_manifest(target)


def write_manifest(manifest: Manifest, uri: str) -> None:
    """Publish the manifest at `uri`, replacing any earlier one.

    Writes a folder of shards if `uri` ends in `/` or is a folder, or if the manifest has more than
    MAX_FILE_ROWS rows and `uri` is not an existing file; otherwise one file.
    """
    target = storage.normalize(uri)
    large = len(manifest.rows) > MAX_FILE_ROWS and not storage.is_file(target)
    if uri.endswith("/") or large or storage.is_folder(target):
        _write_folder(manifest, target)
        return
    with storage.open_write(target) as file:
        _write_table(manifest.rows.table, manifest, file, {"format": FORMAT})


def _identity(manifest: Manifest) -> dict[str, Any]:
    return {"id": manifest.id, "sources": [storage.redact(source) for source in manifest.sources]}


def _write_table(
    table: pa.Table, manifest: Manifest, file: BinaryIO | pa.NativeFile, extra: dict[str, Any]
) -> None:
    arrow = schema.manifest_schema(manifest.classes)
    identity = json.dumps(_identity(manifest) | extra).encode()
    arrow = arrow.with_metadata({**(arrow.metadata or {}), schema.MANIFEST_KEY: identity})
    pq.write_table(table.cast(arrow), file, compression="zstd", row_group_size=_ROW_GROUP)


def _write_folder(manifest: Manifest, folder: str) -> None:
    present = {storage.name_of(file.uri) for file in storage.list_folder(folder)}
    shards = []
    for number, start in enumerate(range(0, max(len(manifest.rows), 1), SHARD_ROWS)):
        sink = pa.BufferOutputStream()
        _write_table(
            manifest.rows.table.slice(start, SHARD_ROWS), manifest, sink, {"shard": number}
        )
        data = sink.getvalue().to_pybytes()
        digest = storage.sha256_of(data)
        name = f"part-{number:05d}-{digest[:12]}.parquet"
        if name not in present:
            storage.write_bytes(storage.join(folder, name), data)
        shards.append({"name": name, "bytes": len(data), "sha256": digest})
    listing = {
        "format": FORMAT,
        "rows": len(manifest.rows),
        **_identity(manifest),
        "shards": shards,
    }
    storage.write_bytes(
        storage.join(folder, MANIFEST_FILE), (json.dumps(listing, indent=1) + "\n").encode()
    )
    for name in present - {shard["name"] for shard in shards}:
        if _SHARD.fullmatch(name):
            storage.remove(storage.join(folder, name))


@dataclass(frozen=True)
class _Shard:
    """The content of one Parquet file; `identity` is empty if another program wrote it."""

    name: str
    table: pa.Table
    classes: list[str]
    identity: dict[str, Any]
    sha256: str


def read_manifest(uri: str) -> Manifest:
    """Read and check a manifest: a file, a folder that `tsq index` wrote, or any folder of shards.

    Shards in a folder without `_manifest.json` are read in the order of their names. Raises
    ManifestError if the manifest is missing, unfinished or not a manifest, if class names differ
    between shards, or if two rows share an id.
    """
    uri = storage.normalize(uri)
    shown = f"manifest {storage.redact(uri)}"
    if storage.is_folder(uri):
        return _read_folder(uri, shown)
    try:
        shard = _read_shard(uri, shown)
    except StorageError as error:
        if error.error_type != "not_found":
            raise
        raise ManifestError(
            f"{shown}: no such file; make one with tsq index SOURCE --out {storage.redact(uri)}"
        ) from None
    if not shard.identity:
        raise ManifestError(f"{shown}: lacks the manifest's metadata; make one with tsq index")
    return _combine([shard], shard.identity, shard.sha256, uri, shown)


def _read_folder(uri: str, shown: str) -> Manifest:
    listing = _read_listing(uri)
    if listing is None:
        return _read_plain_folder(uri, shown)
    for _ in range(_TRIES):
        try:
            shards = [_read_listed(uri, shard, shown) for shard in listing["shards"]]
        except StorageError as error:
            newer = _read_listing(uri)
            if error.error_type != "not_found" or newer in (None, listing):
                raise
            listing = newer or {}  # an update removed the old shards
        else:
            return _combine(shards, listing, _hash_of_hashes(shards), uri, shown)
    raise ManifestError(
        f"{shown}: changed while being read; wait for tsq index --update to finish, then run again"
    )


def _read_listing(folder: str) -> dict[str, Any] | None:
    """Return the content of `_manifest.json`, or None if the folder has none."""
    path = storage.join(folder, MANIFEST_FILE)
    try:
        listing = json.loads(storage.read_bytes(path))
    except StorageError as error:
        if error.error_type == "not_found":
            return None
        raise
    except ValueError:
        raise ManifestError(
            f"{storage.redact(path)}: not JSON; the file is damaged, "
            "rebuild the manifest with tsq index"
        ) from None
    check_format(listing, FORMAT, storage.redact(path), ManifestError)
    return listing


def _read_listed(folder: str, listed: dict[str, Any], shown: str) -> _Shard:
    shard = _read_shard(storage.join(folder, listed["name"]), f"{shown}: {listed['name']}")
    if shard.sha256 != listed["sha256"]:
        raise ManifestError(
            f"{shown}: {shard.name} is not the shard that {MANIFEST_FILE} lists; "
            "rebuild the manifest with tsq index --update"
        )
    return shard


def _read_plain_folder(uri: str, shown: str) -> Manifest:
    names = [storage.name_of(file.uri) for file in storage.list_folder(uri)]
    names = [name for name in names if name.endswith(".parquet") and name[0] not in "._"]
    if not names:
        raise ManifestError(
            f"{shown}: is a folder without *.parquet; "
            "name the file or the folder that tsq index wrote"
        )
    shards = []
    for name in names:
        shard = _read_shard(storage.join(uri, name), f"{shown}: {name}")
        if "shard" in shard.identity:
            raise ManifestError(
                f"{shown}: not finished, it has no {MANIFEST_FILE} yet; "
                "run the same tsq index command again"
            )
        for bad_id in shard.table["video_id"].filter(
            pc.invert(pc.match_substring_regex(shard.table["video_id"], _VIDEO_ID))
        ):
            raise ManifestError(
                f"{shown}: {name}: video_id {bad_id.as_py()!r}; "
                "expected 16 hex digits (see docs/data-format.md)"
            )
        shards.append(shard)
    # another program's manifest has no sources recorded: the folder itself stands in for them
    identity = {"id": storage.sha256_of(uri.encode())[:16], "sources": [uri]}
    return _combine(shards, identity, _hash_of_hashes(shards), uri, shown)


def _hash_of_hashes(shards: Sequence[_Shard]) -> str:
    return storage.sha256_of("\n".join(shard.sha256 for shard in shards).encode())


def _combine(
    shards: Sequence[_Shard], identity: dict[str, Any], sha256: str, uri: str, shown: str
) -> Manifest:
    classes = shards[0].classes
    for shard in shards:
        if shard.classes != classes:
            raise ManifestError(
                f"{shown}: {shard.name} and {shards[0].name} have different class names "
                f"({len(shard.classes)} and {len(classes)}); "
                "write the same ones, in the same order, into each"
            )
    rows = VideoRows(pa.concat_tables([shard.table for shard in shards]))
    if found := rows.duplicate():
        shared_id, numbers = found
        names = _names_at(shards, numbers)
        first, second = (
            f"{storage.redact(rows[number].uri)} in {name}"
            for number, name in zip(numbers, names, strict=True)
        )
        raise ManifestError(
            f"{shown}: {first} and {second} have the same video_id {shared_id}; "
            "remove one of the two"
        )
    return Manifest(rows, classes, identity["id"], tuple(identity["sources"]), sha256, uri)


def _names_at(shards: Sequence[_Shard], numbers: Sequence[int]) -> list[str]:
    """Return the name of the shard that holds each of these rows."""
    ends = np.cumsum([len(shard.table) for shard in shards])
    return [shards[int(place)].name for place in np.searchsorted(ends, numbers, side="right")]


def _read_shard(uri: str, what: str) -> _Shard:
    """Read one Parquet file and hash it, with a single download."""
    with (
        tempfile.TemporaryDirectory() as folder,
        storage.open_read(storage.download(uri, folder)) as file,
    ):
        digest = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
        file.seek(0)
        try:
            table = _read_columns(file)
        except (pa.ArrowInvalid, OSError):
            raise ManifestError(f"{what}: not a Parquet file; make one with tsq index") from None
    metadata = table.schema.metadata or {}
    classes = schema.classes_of(table.schema)
    identity = json.loads(metadata.get(schema.MANIFEST_KEY, b"{}"))
    # other programs write no format, nor did 0.1.0 in a manifest of one file
    check_format({"format": 1} | identity, FORMAT, what, ManifestError)
    table = _conform(table, classes, what)
    if len(table) > MAPPED_ROWS:
        with contextlib.suppress(OSError):  # disk full: the table stays in memory
            table = mapped(table.schema, table.combine_chunks().to_batches())
    return _Shard(storage.name_of(uri), table, classes, identity, digest)


def _read_columns(file: BinaryIO) -> pa.Table:
    """Read the manifest's columns, one row group at a time.

    Parquet's decoded buffers take three times the memory of their content; combining the chunks of
    each group frees the excess before the next group is read.
    """
    names = [column.name for column in schema.MANIFEST]
    # no pre-buffering, no threads: an Arrow thread that releases the Python file object while the
    # interpreter shuts down aborts the process
    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        arrow = parquet.schema_arrow
        # features and predictions have all of a manifest's columns, and far more data;
        # `_conform` rejects them by their schema
        if "status" in arrow.names:
            return arrow.empty_table()
        present = [name for name in names if name in arrow.names]
        groups = range(parquet.num_row_groups)
        tables = [
            parquet.read_row_group(group, present, use_threads=False).combine_chunks()
            for group in groups
        ]
        empty = arrow.empty_table().select(present)
        return pa.concat_tables([empty, *tables]).replace_schema_metadata(arrow.metadata)


def _conform(table: pa.Table, classes: Sequence[str], what: str) -> pa.Table:
    """Cast a table to the manifest's schema; nullable columns may be missing.

    Raises ManifestError if a column is missing, has another type or lacks values.
    """
    if "status" in table.column_names:
        raise ManifestError(
            f"{what}: holds features or predictions; name the manifest that they were made from"
        )
    required = [column.name for column in schema.MANIFEST if not column.nullable]
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise ManifestError(f"{what}: lacks the columns {missing}; make one with tsq index")
    columns = {}
    for field in schema.manifest_schema(None):
        try:
            present = field.name in table.column_names
            column = (
                table[field.name].cast(field.type) if present else pa.nulls(len(table), field.type)
            )
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            actual = table.schema.field(field.name).type
            raise ManifestError(
                f"{what}: {field.name} is {actual}, which cannot be cast to {field.type}"
            ) from None
        if column.null_count and field.name in required:
            raise ManifestError(
                f"{what}: {field.name} is null in {column.null_count} rows; every video needs one"
            )
        columns[field.name] = column
    numbers = pc.min_max(pc.list_flatten(columns["labels"])).as_py()
    if numbers["max"] is not None and not (numbers["min"] >= 0 and numbers["max"] < len(classes)):
        raise ManifestError(
            f"{what}: labels from {numbers['min']} to {numbers['max']}, "
            f"but {len(classes)} class names; write the names, as a JSON list in label order, "
            "into the file's metadata tsq.classes"
        )
    return pa.Table.from_arrays(list(columns.values()), schema=schema.manifest_schema(None))
