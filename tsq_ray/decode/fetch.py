"""Check a video's file against the manifest; copy it to this machine or read byte ranges of it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from tsq_ray import storage
from tsq_ray.config import DecodeConfig
from tsq_ray.decode.types import VideoSource
from tsq_ray.errors import StorageError, VideoError

RANGE_BYTES = 128 * 1024
"""Minimum read from a remote object: about one keyframe."""
_HEAD_BYTES = 1024
_COPIES = "tsq-decode-"
_LOCK = ".lock"


def check_source(source: VideoSource, settings: DecodeConfig, name: str) -> int:
    """Return the file size in bytes.

    Raises VideoError: source_changed, too_large or, for a folder, not_video.
    """
    if storage.is_local(source.uri) and os.path.isdir(source.uri):
        raise VideoError("not_video", f"{name}: is a folder; a video file is needed")
    now = storage.stat(source.uri)
    check_unchanged(source, now, name)
    if now.size_bytes > settings.max_bytes:
        raise VideoError(
            "too_large",
            f"{name}: {now.size_bytes} bytes; decode.max_bytes allows {settings.max_bytes}",
        )
    return now.size_bytes


def check_unchanged(source: VideoSource, now: storage.StoredFile, name: str) -> None:
    """Raise VideoError source_changed if the file is not the one that `source` describes."""
    changes = []
    if source.size_bytes is not None and source.size_bytes != now.size_bytes:
        changes.append(f"size {source.size_bytes} -> {now.size_bytes}")
    if source.etag is not None and now.etag is not None and source.etag != now.etag:
        changes.append(f"etag {source.etag} -> {now.etag}")
    # copying the same bytes over an object changes its time, but not its etag
    if source.etag is None and _differ(source.modified, now.modified):
        changes.append(f"modified {source.modified} -> {now.modified}")
    if changes:
        raise VideoError(
            "source_changed",
            f"{name}: changed since the manifest was made ({', '.join(changes)}); "
            "run tsq index --update",
        )


def _differ(before: datetime | None, now: datetime | None) -> bool:
    return (
        before is not None and now is not None and abs(before.timestamp() - now.timestamp()) > 1e-3
    )


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """Yield a local path to the object's bytes, valid inside the `with` block."""
    if storage.is_local(uri):
        yield uri
        return
    sweep_copies()
    with (
        tempfile.TemporaryDirectory(prefix=_COPIES) as folder,
        open(os.path.join(folder, _LOCK + ".new"), "wb") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, os.path.join(folder, _LOCK))  # visible only once the lock is held
        yield storage.download(uri, folder)


def sweep_copies() -> None:
    """Remove copies left behind by killed processes: those whose lock is free."""
    for folder in glob.glob(os.path.join(tempfile.gettempdir(), f"{_COPIES}*")):
        with contextlib.suppress(OSError), open(os.path.join(folder, _LOCK), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def read_head(path: str) -> bytes:
    """Return the first bytes of a local file, which identify its container."""
    with storage.open_read(path) as file:
        return file.read(_HEAD_BYTES)


@contextlib.contextmanager
def open_ranges(uri: str) -> Iterator[tuple[RangedFile, bytes]]:
    """Open a remote object as a file whose reads are byte ranges; yield it and its first bytes."""
    with storage.open_read(uri, block_size=RANGE_BYTES, cache_type="readahead") as file:
        ranges = RangedFile(file, uri)
        head = ranges.read(_HEAD_BYTES)
        ranges.seek(0)
        try:
            yield ranges, head
        finally:
            if ranges.failure is not None:
                raise ranges.failure  # FFmpeg may have taken it for the end of the file


class RangedFile:
    """A remote file that records its StorageError, because FFmpeg may swallow it."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file, self._uri = file, uri
        self.failure: StorageError | None = None
        self._read = 0

    def read(self, count: int = -1) -> bytes:
        try:
            with storage.storage_errors(self._uri, "read"):
                data = bytes(self._file.read(count))
        except StorageError as error:
            self.failure = error
            raise
        self._read += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    @property
    def fetched_bytes(self) -> int:
        """Bytes read from storage so far, read-ahead included where the file system counts it."""
        cache = getattr(self._file, "cache", None)
        return self._read if cache is None else int(cache.total_requested_bytes)
