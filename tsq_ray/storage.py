"""Open, list and publish files atomically, with the same calls for local paths and s3://.

The S3 endpoint and keys come from the usual environment variables (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, ...; AWS_NO_SIGN_REQUEST=true reads public buckets without keys,
AWS_REQUEST_PAYER=requester pays for requests). Failures raise StorageError with an error type from
the closed list; messages never contain a query string or a secret.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tsq_ray import local_files, s3
from tsq_ray.advice import SCHEME, classify, is_local, is_refused_condition, redact, storage_errors
from tsq_ray.errors import StorageError, UserError
from tsq_ray.local_files import LeftOut, StoredFile, is_utf8

_REMOTE = ("http", "https", "memory", "gs", "gcs", "az", "abfs", "abfss", "hdfs")
_MAX_NAME_BYTES = 255


def normalize(uri: str | os.PathLike[str]) -> str:
    """Return the canonical spelling: an absolute local path without a scheme, or `scheme://...`.

    Links are not followed: a video and a link to it are two different URIs.
    """
    text = os.fspath(uri)
    match = SCHEME.match(text)
    if match is None:
        return local_files.absolute(text)
    scheme, rest = match.group(1).lower(), text[match.end() :]
    if scheme in ("file", "local"):
        return normalize(rest)
    if scheme == "s3a":
        scheme = "s3"
    return f"{scheme}://{rest.rstrip('/')}"


def real_path(uri: str | os.PathLike[str]) -> str:
    """The normalised `uri`; if it is local, with its links resolved."""
    place = normalize(uri)
    return os.path.realpath(place) if is_local(place) else place


def join(base: str, *parts: str) -> str:
    """Return a path or URI below `base`."""
    return posixpath.join(base, *parts)


def name_of(uri: str) -> str:
    """The last component of a path or URI, without the query of an http(s) URL."""
    if uri.startswith(("http://", "https://")):
        uri = uri.partition("?")[0]
    return posixpath.basename(uri.rstrip("/"))


def parent_of(uri: str) -> str:
    """The folder that contains a path or URI."""
    return posixpath.dirname(uri.rstrip("/"))


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri` and the path in it. Raises StorageError for an unknown scheme."""
    path = _local_path(uri)
    if path is not None:
        return LocalFileSystem(), path
    scheme = uri.partition("://")[0].lower()
    if "\0" in uri or not is_utf8(uri):
        raise StorageError("not_found", f"{redact(uri)!r}: a URI must be UTF-8 without NUL")
    if scheme in ("s3", "s3a") and not uri.partition("://")[2].partition("/")[0]:
        raise StorageError("not_found", f"{uri}: no bucket name; expected s3://BUCKET/KEY")
    try:
        # not fsspec's url_to_fs, which reads `a::b` as one file system inside another
        if scheme in ("s3", "s3a"):
            fs = s3.open_file_system()
        elif scheme in _REMOTE:
            fs = fsspec.filesystem(
                scheme, **fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(uri)
            )
        else:
            raise ValueError(f"scheme {scheme} is not supported")
    except (ImportError, ValueError, TypeError) as error:
        raise StorageError(
            "unsupported",
            f"{redact(uri)}: this kind of storage cannot be opened ({error}); "
            "use a local path or an s3:// URI",
        ) from None
    return fs, fs._strip_protocol(uri)


def _object(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and path of one remote file. StorageError if `uri` is a whole bucket."""
    fs, path = filesystem(uri)
    if uri.startswith("s3://") and "/" not in path:
        raise StorageError("not_found", f"{uri}: a bucket; name a key in it, s3://BUCKET/KEY")
    return fs, path


def _local_path(uri: str) -> str | None:
    """The path of a local `uri`, else None. StorageError if no file can have that name."""
    match = SCHEME.match(uri)
    if match is not None and match.group(1).lower() not in ("file", "local"):
        return None
    path = normalize(uri)
    if not path or "\0" in path:
        raise StorageError(
            "not_found", f"{path!r}: not a path: it is empty or contains NUL; name a file or folder"
        )
    return path


def open_read(uri: str, **options: Any) -> BinaryIO:
    """Open a seekable binary file, to be used in a `with`; s3:// reads fetch byte ranges."""
    with storage_errors(uri):
        local = _local_path(uri)
        if local is not None:
            return local_files.open_file(local)
        fs, path = _object(uri)
        return cast(BinaryIO, fs.open(path, "rb", **options))


def read_ranges(uris: Sequence[str], ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read bytes [start, end) of each of these remote files, in parallel."""
    if not uris:
        return []
    fs, _ = filesystem(uris[0])
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    found = fs.cat_ranges(
        [fs._strip_protocol(uri) for uri in uris], starts, ends, on_error="return"
    )
    for uri, content in zip(uris, found, strict=True):
        if isinstance(content, Exception):
            with storage_errors(uri, "read"):
                raise content
    return cast(list[bytes], found)


def read_bytes(uri: str) -> bytes:
    with storage_errors(uri, "read"):
        local = _local_path(uri)
        if local is not None:
            with local_files.open_file(local) as file:
                return file.read()
        fs, path = _object(uri)
        return cast(bytes, fs.cat_file(path))


def read_text(uri: str) -> str:
    """Read the whole content as UTF-8. Raises UserError if it is not UTF-8."""
    data = read_bytes(uri)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = "UTF-16, not UTF-8 text" if utf16 else "not UTF-8 text"
        raise UserError(f"{redact(uri)}: {found}; save it as UTF-8") from None


def stat(uri: str) -> StoredFile:
    """Look up the current size, etag and modification time. Raises StorageError if it is missing.

    The error type is `not_video` for a FIFO, a socket or a device, and `unsupported` for a name
    that no manifest can hold.
    """
    with storage_errors(uri, "look up"):
        if not is_utf8(uri):
            raise StorageError("unsupported", f"{redact(uri)}: its name is not UTF-8; rename it")
        local = _local_path(uri)
        if local is not None:
            return local_files.look_up(local)
        fs, path = filesystem(uri)
        return _stored(fs, fs.info(path))


def exists(uri: str) -> bool:
    """Whether a file or folder exists. Access and network failures are raised, not returned."""
    return _kind(uri) is not None


def is_file(uri: str) -> bool:
    """Whether `uri` is a file or an object, not a folder."""
    return _kind(uri) == "file"


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder or a non-empty prefix."""
    return _kind(uri) == "directory"


def _kind(uri: str) -> str | None:
    with storage_errors(uri, "look up"):
        local = _local_path(uri)
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
    """Yield every entry below a folder or prefix: a file, or an entry left out and why.

    Sorted by folder and name on disks, by key on S3, which is listed page by page, a thousand keys
    each. Raises StorageError if any of the folders cannot be listed.
    """
    local = _local_path(uri)
    if local is not None:
        try:
            yield from local_files.walk(local)
        except OSError as error:
            with storage_errors(str(error.filename or uri), "list"):
                raise
        return
    with storage_errors(uri, "list"):
        fs, path = filesystem(uri)
        yield from _pages(fs, path) if uri.startswith("s3://") else _below(fs, path)


def walk(uri: str) -> Iterator[StoredFile]:
    """Yield the files among `entries`."""
    return (entry for entry in entries(uri) if isinstance(entry, StoredFile))


def _below(fs: Any, path: str) -> Iterator[StoredFile | LeftOut]:
    # not fs.walk, which silently skips subfolders that it cannot read
    with storage_errors(fs.unstrip_protocol(path), "list"):
        found = [entry for entry in fs.ls(path, detail=True) if entry["name"].rstrip("/") != path]
    folders = []
    for entry in sorted(found, key=lambda entry: (name_of(entry["name"]), entry["type"])):
        name = name_of(entry["name"])
        if name.startswith("."):
            yield LeftOut(fs.unstrip_protocol(entry["name"]), local_files.HIDDEN)
        elif entry["type"] == "directory":
            folders.append(entry["name"].rstrip("/"))
        else:
            yield _stored(fs, entry)
    for folder in folders:
        yield from _below(fs, folder)


def _pages(fs: Any, path: str) -> Iterator[StoredFile | LeftOut]:
    bucket, _, folder = path.partition("/")
    prefix = f"{folder}/" if folder else ""
    wanted: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = fs.call_s3("list_objects_v2", **wanted)
        for item in page.get("Contents", ()):
            key, size = item["Key"], int(item["Size"])
            uri = f"s3://{bucket}/{key}"
            if any(part.startswith(".") for part in key.removeprefix(prefix).split("/")):
                yield LeftOut(uri, local_files.HIDDEN)
            elif not key.endswith("/"):
                yield StoredFile(uri, size, item["ETag"].strip('"'), item["LastModified"])
            elif size:  # an empty one is a folder marker
                yield LeftOut(uri, "name ends in /")
        if not page.get("IsTruncated"):
            return
        wanted["ContinuationToken"] = page["NextContinuationToken"]


def list_folder(uri: str) -> list[StoredFile]:
    """List the files directly in a folder, hidden ones too, sorted; empty if it is missing."""
    with storage_errors(uri, "list"):
        local = _local_path(uri)
        if local is not None:
            return local_files.list_folder(local)
        fs, path = filesystem(uri)
        try:
            found = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        files = (entry for entry in found if entry["type"] == "file")
        return sorted(
            (_stored(fs, entry) for entry in files if entry["name"].rstrip("/") != path),
            key=lambda file: file.uri,
        )


def _stored(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> StoredFile:
    modified, etag = info.get("LastModified"), info.get("ETag")
    return StoredFile(
        uri=fs.unstrip_protocol(info["name"]),
        size_bytes=int(info.get("size") or 0),
        etag=str(etag).strip('"') if etag else None,
        modified=modified if isinstance(modified, datetime) else None,
    )


def write_bytes(uri: str, data: bytes) -> None:
    """Publish atomically: readers see the old content or all of the new one, never a part."""
    with storage_errors(uri, "write"):
        local = _local_path(uri)
        if local is not None:
            local_files.write(local, data)
            return
        fs, path = _object(uri)
        fs.pipe_file(path, data)  # an object becomes visible only once it is complete


@contextlib.contextmanager
def open_write(uri: str) -> Iterator[BinaryIO]:
    """Open a file, for content too large for memory, that is published atomically.

    It is published when the `with` ends, and not at all if the `with` raises. For remote storage
    the content is first collected in a local temporary file.
    """
    with storage_errors(uri, "write"):
        local = _local_path(uri)
        if local is not None:
            with local_files.open_write(local) as file:
                yield file
            return
        fs, path = _object(uri)
        with tempfile.NamedTemporaryFile() as waiting:
            yield cast(BinaryIO, waiting)
            waiting.flush()
            fs.put_file(waiting.name, path)


def create_bytes(uri: str, data: bytes) -> bool:
    """Publish a new file; return False if one exists. Of concurrent callers one succeeds.

    Stores without conditional writes may let two of them succeed.
    """
    with storage_errors(uri, "write"):
        local = _local_path(uri)
        if local is not None:
            return local_files.create(local, data)
        fs, path = _object(uri)
        return _kind(uri) is None and _write_if(fs, path, data, mode="create")


def replace_bytes(uri: str, expected: bytes, data: bytes) -> bool:
    """Publish `data` if the content is still `expected`; return False if it changed or is gone.

    Of concurrent callers one succeeds, with the exception given in `create_bytes`.
    """
    with storage_errors(uri, "write"):
        local = _local_path(uri)
        if local is not None:
            return local_files.replace(local, expected, data)
        fs, path = _object(uri)
        try:
            etag = fs.info(path).get("ETag")
            condition = {"IfMatch": etag} if etag and uri.startswith(("s3://", "s3a://")) else {}
            return fs.cat_file(path) == expected and _write_if(fs, path, data, **condition)
        except FileNotFoundError:
            return False


def _write_if(fs: Any, path: str, data: bytes, **condition: Any) -> bool:
    """Write an object if the store confirms the condition; return whether it was written."""
    try:
        fs.pipe_file(path, data, **condition)
    except OSError as error:
        if error.errno == errno.ENOSYS:  # the store has no conditional writes
            fs.pipe_file(path, data)
        elif is_refused_condition(error):
            return False
        else:
            raise
    return True


def check_writable(folder: str) -> None:
    """Raise StorageError early, before long work, if nothing can be written below `folder`."""
    probe = join(folder, f".probe-{uuid.uuid4().hex[:8]}")
    write_bytes(probe, b"")
    remove(probe)


def remove(uri: str) -> None:
    """Delete one file; a missing file is not an error."""
    with storage_errors(uri, "delete"), contextlib.suppress(FileNotFoundError):
        local = _local_path(uri)
        if local is not None:
            os.remove(local)
            return
        fs, path = filesystem(uri)
        fs.rm_file(path)


def remove_folder(uri: str) -> None:
    """Delete a folder or prefix and all below it; a missing one is not an error."""
    with storage_errors(uri, "delete"), contextlib.suppress(FileNotFoundError):
        local = _local_path(uri)
        if local is not None:
            local_files.remove_folder(local)
            return
        fs, path = filesystem(uri)
        # not fs.rm, which reads `*`, `?` and `[` in a name as a pattern; folders are listed too,
        # since some stores keep them as objects
        for name in (*reversed(fs.find(path, withdirs=True)), path):
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(name)


def download(uri: str, folder: str | os.PathLike[str]) -> str:
    """Copy one file into `folder` and return its path; a local file is returned as it is."""
    if is_local(uri):
        return uri
    name = name_of(uri)
    if not name or len(name.encode("utf-8", "replace")) > _MAX_NAME_BYTES:  # S3 keys may be longer
        name = "download"
    target = os.path.join(folder, name)
    with storage_errors(uri, "fetch"):
        fs, path = _object(uri)
        fs.get_file(path, target)
    return target


def sha256_of(data: bytes) -> str:
    """SHA-256 as a hex digest."""
    return hashlib.sha256(data).hexdigest()
