"""Read files, and publish them atomically."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, BinaryIO, cast

from tsq_ray.errors import UserError
from tsq_ray.storage import local_files
from tsq_ray.storage.advice import is_local, is_refused_condition, redact, storage_errors
from tsq_ray.storage.listing import kind_of, stored_file
from tsq_ray.storage.local_files import StoredFile
from tsq_ray.storage.paths import filesystem, join, local_path, name_of, object_at

_MAX_NAME_BYTES = 255


def open_read(uri: str, **options: Any) -> BinaryIO:
    """Open a seekable binary file, to be used in a `with`; s3:// reads fetch byte ranges."""
    with storage_errors(uri):
        local = local_path(uri)
        if local is not None:
            return local_files.open_file(local)
        fs, path = object_at(uri)
        return cast(BinaryIO, fs.open(path, "rb", **options))


def read_ranges(uris: Sequence[str], ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read bytes [start, end) of each of these remote files, in parallel."""
    if not uris:
        return []
    fs, _ = filesystem(uris[0])
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    contents = fs.cat_ranges(
        [fs._strip_protocol(uri) for uri in uris], starts, ends, on_error="return"
    )
    for uri, content in zip(uris, contents, strict=True):
        if isinstance(content, Exception):
            with storage_errors(uri, "read"):
                raise content
    return cast(list[bytes], contents)


def read_bytes(uri: str) -> bytes:
    with storage_errors(uri, "read"):
        local = local_path(uri)
        if local is not None:
            with local_files.open_file(local) as file:
                return file.read()
        fs, path = object_at(uri)
        return cast(bytes, fs.cat_file(path))


def read_text(uri: str) -> str:
    """Read the whole content as UTF-8. Raises UserError if it is not UTF-8."""
    data = read_bytes(uri)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        problem = "UTF-16, not UTF-8 text" if utf16 else "not UTF-8 text"
        raise UserError(f"{redact(uri)}: {problem}; save it as UTF-8") from None


def write_bytes(uri: str, data: bytes) -> None:
    """Publish atomically: readers see the old content or the new, never a part of it."""
    with storage_errors(uri, "write"):
        local = local_path(uri)
        if local is not None:
            local_files.write(local, data)
            return
        fs, path = object_at(uri)
        fs.pipe_file(path, data)  # an object becomes visible only once it is complete


@contextlib.contextmanager
def open_write(uri: str) -> Iterator[BinaryIO]:
    """Open a file that is published atomically, for content too large for memory.

    It is published when the `with` ends, and not at all if the `with` raises. For remote storage,
    the content is first collected in a local temporary file.
    """
    with storage_errors(uri, "write"):
        local = local_path(uri)
        if local is not None:
            with local_files.open_write(local) as file:
                yield file
            return
        fs, path = object_at(uri)
        with tempfile.NamedTemporaryFile() as temporary:
            yield cast(BinaryIO, temporary)
            temporary.flush()
            fs.put_file(temporary.name, path)


def create_bytes(uri: str, data: bytes) -> bool:
    """Publish a new file; return False if one exists. Only one of concurrent callers succeeds.

    Stores without conditional writes may let several succeed.
    """
    with storage_errors(uri, "write"):
        local = local_path(uri)
        if local is not None:
            return local_files.create(local, data)
        fs, path = object_at(uri)
        return kind_of(uri) is None and _write_if(fs, path, data, mode="create")


def replace_bytes(uri: str, expected: bytes, data: bytes) -> bool:
    """Publish `data` if the content is still `expected`; return False if it changed or is gone.

    Only one of concurrent callers succeeds, with the exception given in `create_bytes`.
    """
    with storage_errors(uri, "write"):
        local = local_path(uri)
        if local is not None:
            return local_files.replace(local, expected, data)
        fs, path = object_at(uri)
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
        local = local_path(uri)
        if local is not None:
            os.remove(local)
            return
        fs, path = filesystem(uri)
        fs.rm_file(path)


def remove_folder(uri: str) -> None:
    """Delete a folder or prefix and everything below it; a missing one is not an error."""
    with storage_errors(uri, "delete"), contextlib.suppress(FileNotFoundError):
        local = local_path(uri)
        if local is not None:
            local_files.remove_folder(local)
            return
        fs, path = filesystem(uri)
        # not fs.rm, which reads `*`, `?` and `[` in a name as a pattern; folders are listed too,
        # since some stores keep them as objects
        for name in (*reversed(fs.find(path, withdirs=True)), path):
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(name)


def remove_empty_folder(uri: str) -> None:
    """Delete a local folder if it is empty; elsewhere, a folder is only a part of names."""
    if (local := local_path(uri)) is not None:
        with contextlib.suppress(OSError):
            os.rmdir(local)


def download(uri: str, folder: str | os.PathLike[str]) -> str:
    """Copy one file into `folder` and return its path; a local file's own path is returned."""
    if is_local(uri):
        return uri
    name = name_of(uri)
    if not name or len(name.encode("utf-8", "replace")) > _MAX_NAME_BYTES:  # S3 keys may be longer
        name = "download"
    target = os.path.join(folder, name)
    with storage_errors(uri, "fetch"):
        fs, path = object_at(uri)
        fs.get_file(path, target)
    return target


async def fetch(uri: str, target: str, check: Callable[[StoredFile], None]) -> StoredFile:
    """Copy a remote file to the path `target` and return its StoredFile.

    `check` may raise before the copy. Cancelling the call ends the transfer.
    """
    with storage_errors(uri, "fetch"):
        fs, path = object_at(uri)
        file = await _info(fs, path)
        check(file)
        if not fs.async_impl:
            await asyncio.to_thread(fs.get_file, path, target)
            return file
        # in one stream: parallel parts would be held in memory
        options = {"max_concurrency": 1} if uri.startswith("s3://") else {}
        await _on_fs_loop(fs, fs._get_file(path, target, **options))
        return file


async def look_up(uri: str) -> StoredFile:
    """Return the StoredFile of a remote file. Cancelling the call ends the request."""
    with storage_errors(uri, "look up"):
        return await _info(*object_at(uri))


async def _info(fs: Any, path: str) -> StoredFile:
    lookup = _on_fs_loop(fs, fs._info(path)) if fs.async_impl else asyncio.to_thread(fs.info, path)
    return stored_file(fs, await lookup)


async def _on_fs_loop(fs: Any, work: Coroutine[Any, Any, Any]) -> Any:
    """Await `work` on the event loop of an fsspec file system, which runs in its own thread."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, fs.loop))


def sha256_of(data: bytes) -> str:
    """SHA-256 as a hex digest."""
    return hashlib.sha256(data).hexdigest()
