"""Names of files: local paths and URIs, and the file system of each."""

from __future__ import annotations

import os
import posixpath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tsq_ray.errors import StorageError
from tsq_ray.storage import local_files, s3
from tsq_ray.storage.advice import SCHEME, is_local, redact
from tsq_ray.storage.local_files import is_utf8

_REMOTE = ("http", "https", "memory", "gs", "gcs", "az", "abfs", "abfss", "hdfs")


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
    """The normalised `uri`, with links resolved if it is local."""
    normalized = normalize(uri)
    return os.path.realpath(normalized) if is_local(normalized) else normalized


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
    path = local_path(uri)
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


def object_at(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and path of one remote file. StorageError if `uri` is a whole bucket."""
    fs, path = filesystem(uri)
    if uri.startswith("s3://") and "/" not in path:
        raise StorageError("not_found", f"{uri}: a bucket; name a key in it, s3://BUCKET/KEY")
    return fs, path


def local_path(uri: str) -> str | None:
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
