"""fsspec: open, list, publish atomically. Local paths and s3:// take the same calls.

An S3 endpoint and its keys come from the usual environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Failures are
StorageError with a closed error type; messages never hold a query string or a secret.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from tsq_ray.errors import ErrorType, StorageError, UserError

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]+")
_DENIED_CODES = {
    "401",
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "AllAccessDisabled",
}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_MISSING_CODES = {"404", "NoSuchKey", "NoSuchBucket", "NotFound", "NoSuchUpload"}


@dataclass(frozen=True)
class StoredFile:
    """One file as its listing shows it: `modified` in UTC, `etag` None on local disks."""

    uri: str
    size_bytes: int
    etag: str | None
    modified: datetime | None


def normalize(uri: str | os.PathLike[str]) -> str:
    """The one spelling of a place: an absolute local path without a scheme, or `scheme://...` without doubled slashes at the end."""
    text = os.fspath(uri)
    match = _SCHEME.match(text)
    if match is None:
        return str(Path(text).expanduser().absolute().resolve(strict=False)) if text else text
    scheme, rest = match.group(1).lower(), text[match.end() :]
    if scheme in ("file", "local"):
        return normalize(rest)
    if scheme == "s3a":
        scheme = "s3"
    return f"{scheme}://{rest.rstrip('/')}"


def is_local(uri: str) -> bool:
    """Whether `uri` is a path of this machine's file system."""
    return _SCHEME.match(uri) is None


def join(base: str, *parts: str) -> str:
    """Path or URI below `base`."""
    return posixpath.join(base, *parts)


def name_of(uri: str) -> str:
    """The last part of a path or URI, without a query."""
    return posixpath.basename(uri.rstrip("/").partition("?")[0] if not is_local(uri) else uri.rstrip("/"))


def parent_of(uri: str) -> str:
    """The folder of a path or URI."""
    return posixpath.dirname(uri.rstrip("/"))


def redact(text: str) -> str:
    """`text` with the query part of every http(s) URL left out: presigned URLs carry their secret there."""
    return _QUERY.sub(r"\1?...", text)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri` and the path within it. UserError for an unknown scheme."""
    try:
        fs, path = fsspec.core.url_to_fs(uri, **_options(uri))
    except (ImportError, ValueError) as error:
        raise UserError(f"{redact(uri)}: storage of this kind cannot be opened ({error}); use a local path or an s3:// URI") from None
    return fs, path


def _options(uri: str) -> dict[str, Any]:
    if not uri.startswith("s3://"):
        return {}
    # a listing of a moment ago must not hide what another process wrote since
    return {
        "use_listings_cache": False,
        "config_kwargs": {"retries": {"max_attempts": 4, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 30},
    }


def classify(error: BaseException) -> ErrorType:
    """not_found, access_denied or unavailable: what a storage exception means.

    Keys that expired are `unavailable`: they will be renewed, and the next run tries again by itself.
    """
    chain = []
    seen: BaseException | None = error
    while seen is not None:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    if _EXPIRED_CODES & {_code(seen) for seen in chain}:
        return "unavailable"  # before the rest: s3fs wraps it in a PermissionError
    for seen in chain:
        code, status = _code(seen), getattr(seen, "status", None)
        if isinstance(seen, FileNotFoundError) or code in _MISSING_CODES or status == 404:
            return "not_found"
        if isinstance(seen, PermissionError) or code in _DENIED_CODES or status in (401, 403):
            return "access_denied"
        if type(seen).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            return "access_denied"
    return "unavailable"


def _code(error: BaseException) -> str:
    """The code in a botocore error's response, empty where it is no such error."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


@contextlib.contextmanager
def storage_errors(uri: str, doing: str = "open") -> Iterator[None]:
    """Turn what a file system raises into StorageError with a type and a message that names `uri`."""
    try:
        yield
    except (StorageError, UserError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError("unavailable", f"{redact(uri)}: the disk is full; free some room and run again") from error
        raise StorageError(classify(error), _message(uri, doing, error)) from error
    except Exception as error:  # botocore's and aiohttp's errors share no base class with anything
        if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "asyncio"):
            raise
        raise StorageError(classify(error), _message(uri, doing, error)) from error


def _message(uri: str, doing: str, error: BaseException) -> str:
    kind = classify(error)
    advice = {
        "not_found": "no such file, folder or bucket; check the name",
        "access_denied": "access denied; check the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the rights",
        "unavailable": "storage does not answer as it should; check AWS_ENDPOINT_URL and the network, then run again",
    }[kind]
    detail = redact(" ".join(str(error).split()))[:200]
    return f"cannot {doing} {redact(uri)}: {advice}" + (f" ({detail})" if kind == "unavailable" and detail else "")


def open_read(uri: str, **options: Any) -> BinaryIO:
    """A seekable binary file; reads of s3:// fetch ranges. Used in a `with`."""
    with storage_errors(uri):
        fs, path = filesystem(uri)
        return cast(BinaryIO, fs.open(path, "rb", **options))


def read_bytes(uri: str) -> bytes:
    """The whole content."""
    with storage_errors(uri, "read"):
        fs, path = filesystem(uri)
        return cast(bytes, fs.cat_file(path))


def read_text(uri: str) -> str:
    """The whole content as UTF-8; UserError where it is not."""
    try:
        return read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{redact(uri)}: not UTF-8 text") from None


def stat(uri: str) -> StoredFile:
    """Size, etag and modification time now; StorageError where there is no such file."""
    with storage_errors(uri, "look up"):
        fs, path = filesystem(uri)
        return _stored(fs, fs.info(path))


def exists(uri: str) -> bool:
    """Whether a file or folder is there; access and network failures are raised, not taken for a no."""
    return _kind(uri) is not None


def is_file(uri: str) -> bool:
    """Whether `uri` is a file or an object, and no folder."""
    return _kind(uri) == "file"


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder or a prefix with something below it."""
    return _kind(uri) == "directory"


def _kind(uri: str) -> str | None:
    with storage_errors(uri, "look up"):
        fs, path = filesystem(uri)
        try:
            return cast(str, fs.info(path)["type"])
        except FileNotFoundError:
            return None


def walk(uri: str) -> Iterator[StoredFile]:
    """Every file below a folder or prefix; hidden names and names with `_` in front are passed over.

    Sorted by folder and name on disks, by key on S3, where one page of a thousand keys after the other is asked for. StorageError where any
    of the folders cannot be listed.
    """
    with storage_errors(uri, "list"):
        fs, path = filesystem(uri)
        if uri.startswith("s3://"):
            yield from _pages(fs, path)
            return
        yield from _below(fs, path)


def _below(fs: Any, path: str) -> Iterator[StoredFile]:
    # not by fs.walk: that passes in silence over a folder below the first one that it cannot read
    with storage_errors(path, "list"):
        listed = {name_of(entry["name"]): entry for entry in fs.ls(path, detail=True) if entry["name"].rstrip("/") != path}
    visible = [listed[name] for name in sorted(listed) if not _hidden(name)]
    yield from (_stored(fs, entry) for entry in visible if entry["type"] != "directory")
    for entry in visible:
        if entry["type"] == "directory":
            yield from _below(fs, entry["name"].rstrip("/"))


def _hidden(name: str) -> bool:
    return name.startswith((".", "_")) or name == "lost+found"  # which is the file system's own


def _pages(fs: Any, path: str) -> Iterator[StoredFile]:
    bucket, _, folder = path.partition("/")
    prefix = f"{folder}/" if folder else ""
    wanted: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = fs.call_s3("list_objects_v2", **wanted)
        for item in page.get("Contents", ()):
            key = item["Key"]
            # a key with a slash at its end is a folder's mark
            if not key.endswith("/") and not any(map(_hidden, key[len(prefix) :].split("/"))):
                yield StoredFile(f"s3://{bucket}/{key}", int(item["Size"]), item["ETag"].strip('"'), item["LastModified"])
        if not page.get("IsTruncated"):
            return
        wanted["ContinuationToken"] = page["NextContinuationToken"]


def list_folder(uri: str) -> list[StoredFile]:
    """Files directly in a folder, hidden ones too, sorted; empty where there is no such folder."""
    with storage_errors(uri, "list"):
        fs, path = filesystem(uri)
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            (_stored(fs, entry) for entry in entries if entry["type"] == "file" and entry["name"].rstrip("/") != path),
            key=lambda file: file.uri,
        )


def _stored(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> StoredFile:
    modified = info.get("LastModified") or info.get("mtime")
    if isinstance(modified, (int, float)):
        modified = datetime.fromtimestamp(modified, tz=timezone.utc)
    etag = info.get("ETag")
    local = "file" in fs.protocol or "local" in fs.protocol if isinstance(fs.protocol, tuple) else fs.protocol == "file"
    return StoredFile(
        uri=info["name"] if local else fs.unstrip_protocol(info["name"]),
        size_bytes=int(info.get("size") or 0),
        etag=str(etag).strip('"') if etag else None,
        modified=modified,
    )


def write_bytes(uri: str, data: bytes) -> None:
    """Publish atomically: readers see the old content or the whole new one, never a part of it."""
    with storage_errors(uri, "write"):
        fs, path = filesystem(uri)
        if not is_local(uri):
            fs.pipe_file(path, data)  # an object appears with its last byte
            return
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        # readers of Parquet folders skip names with a dot in front
        temporary = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def check_writable(folder: str) -> None:
    """StorageError now, rather than after long work, where nothing can be written below `folder`."""
    probe = join(folder, f".probe-{uuid.uuid4().hex[:8]}")
    write_bytes(probe, b"")
    remove(probe)


def remove(uri: str) -> None:
    """Delete one file; not an error where it is gone already."""
    with storage_errors(uri, "delete"):
        fs, path = filesystem(uri)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)


def remove_folder(uri: str) -> None:
    """Delete a folder or prefix and all below it; not an error where it is gone already."""
    with storage_errors(uri, "delete"):
        fs, path = filesystem(uri)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def download(uri: str, folder: str | os.PathLike[str]) -> str:
    """A local copy of one file in `folder`, or the path itself where it is local already."""
    if is_local(uri):
        return uri
    target = os.path.join(folder, name_of(uri) or "download")
    with storage_errors(uri, "fetch"):
        fs, path = filesystem(uri)
        fs.get_file(path, target)
    return target


def sha256_of(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()
