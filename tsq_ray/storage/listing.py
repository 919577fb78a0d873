"""Look up and list files and folders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, cast

import fsspec

from tsq_ray.errors import StorageError
from tsq_ray.storage import local_files
from tsq_ray.storage.advice import classify, redact, storage_errors
from tsq_ray.storage.local_files import LeftOut, StoredFile, is_utf8
from tsq_ray.storage.paths import filesystem, local_path, name_of

_HIDDEN = re.compile(r"(?:.*?/)??\.[^/]*/?", re.DOTALL)
"""A key up to its first component that begins with a dot; a match of a folder ends in /."""


def stat(uri: str) -> StoredFile:
    """Look up the current size, etag and modification time. Raises StorageError if it is missing.

    The error type is `not_video` for a FIFO, a socket or a device, and `unsupported` for a name
    that no manifest can hold.
    """
    with storage_errors(uri, "look up"):
        if not is_utf8(uri):
            raise StorageError("unsupported", f"{redact(uri)}: its name is not UTF-8; rename it")
        local = local_path(uri)
        if local is not None:
            return local_files.look_up(local)
        fs, path = filesystem(uri)
        return stored_file(fs, fs.info(path))


def exists(uri: str) -> bool:
    """Whether a file or folder exists. Access and network failures are raised, not returned."""
    return kind_of(uri) is not None


def is_file(uri: str) -> bool:
    """Whether `uri` is a file or an object, not a folder."""
    return kind_of(uri) == "file"


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder or a non-empty prefix."""
    return kind_of(uri) == "directory"


def kind_of(uri: str) -> str | None:
    with storage_errors(uri, "look up"):
        local = local_path(uri)
        if local is not None:
            return local_files.kind_of(local)
        fs, path = filesystem(uri)
        try:
            return cast(str, fs.info(path)["type"])
        except FileNotFoundError as error:
            if classify(error) != "not_found":
                raise
            return None


def entries(uri: str) -> Iterator[StoredFile | LeftOut]:
    """Yield every entry below a folder or prefix: a file, or a LeftOut.

    Sorted by folder and name on disks, by key on S3, which is listed in pages of a thousand keys.
    Raises StorageError if any of the folders cannot be listed.
    """
    local = local_path(uri)
    if local is not None:
        try:
            yield from local_files.walk(local)
        except OSError as error:
            with storage_errors(str(error.filename or uri), "list"):
                raise
        return
    with storage_errors(uri, "list"):
        fs, path = filesystem(uri)
        yield from _s3_entries(fs, path) if uri.startswith("s3://") else _entries_below(fs, path)


def walk(uri: str) -> Iterator[StoredFile]:
    """Yield the files among `entries`."""
    return (entry for entry in entries(uri) if isinstance(entry, StoredFile))


def _entries_below(fs: Any, path: str) -> Iterator[StoredFile | LeftOut]:
    # not fs.walk, which silently skips subfolders that it cannot read
    with storage_errors(fs.unstrip_protocol(path), "list"):
        listed = [entry for entry in fs.ls(path, detail=True) if entry["name"].rstrip("/") != path]
    folders = []
    for entry in sorted(listed, key=lambda entry: (name_of(entry["name"]), entry["type"])):
        name = name_of(entry["name"])
        if name.startswith("."):
            yield LeftOut(fs.unstrip_protocol(entry["name"]), local_files.HIDDEN)
        elif entry["type"] == "directory":
            folders.append(entry["name"].rstrip("/"))
        else:
            yield stored_file(fs, entry)
    for folder in folders:
        yield from _entries_below(fs, folder)


def _s3_entries(fs: Any, path: str) -> Iterator[StoredFile | LeftOut]:
    bucket, _, folder = path.partition("/")
    prefix = f"{folder}/" if folder else ""
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    last_hidden = ""
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        for item in page.get("Contents", ()):
            key, size = item["Key"], int(item["Size"])
            uri = f"s3://{bucket}/{key}"
            if hidden := _HIDDEN.match(key, len(prefix)):
                path = key[: hidden.end()]
                if path != last_hidden:  # the keys of a folder are consecutive
                    yield LeftOut(f"s3://{bucket}/{path.rstrip('/')}", local_files.HIDDEN)
                last_hidden = path
            elif not key.endswith("/"):
                yield StoredFile(uri, size, item["ETag"].strip('"'), item["LastModified"])
            elif size:  # an empty one is a folder marker
                yield LeftOut(uri, "name ends in /")
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def list_folder(uri: str) -> list[StoredFile]:
    """List the files directly in a folder, sorted, with hidden ones; empty if it is missing."""
    with storage_errors(uri, "list"):
        local = local_path(uri)
        if local is not None:
            return local_files.list_folder(local)
        fs, path = filesystem(uri)
        try:
            listed = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        files = (entry for entry in listed if entry["type"] == "file")
        return sorted(
            (stored_file(fs, entry) for entry in files if entry["name"].rstrip("/") != path),
            key=lambda file: file.uri,
        )


def stored_file(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> StoredFile:
    modified, etag = info.get("LastModified"), info.get("ETag")
    return StoredFile(
        uri=fs.unstrip_protocol(info["name"]),
        size_bytes=int(info.get("size") or 0),
        etag=str(etag).strip('"') if etag else None,
        modified=modified if isinstance(modified, datetime) else None,
    )
