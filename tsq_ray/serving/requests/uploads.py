"""Uploads: streamed to an unnamed file as they arrive, and read there by the decoder.

An unnamed file disappears with the process that holds it, however that process ends. Other
processes on the node read it through /proc; a decoder on another node receives it in chunks, from a
task on the upload's node or, if that node accepts no tasks, from the object store.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from starlette.requests import Request
from starlette.types import Message

from tsq_ray.serving.requests.forms import Form
from tsq_ray.serving.requests.problems import RequestError
from tsq_ray.serving.requests.shares import WHOLE, Quota, Share

_CHUNK = 1 << 20
_CHUNKS_AHEAD = 4
_FORM_BYTES = 64 * 1024
"""What a form may hold in addition to its file."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Upload:
    """A file that a process of `node` holds open."""

    node: str
    path: str
    size_bytes: int
    sha256: str
    name: str
    """File name sent by the client; may be empty."""
    chunks: tuple[Any, ...] = ()
    """References to its content, once it is in the object store."""

    async def in_object_store(self) -> Upload:
        """Return the upload with its content in the object store; for the process that holds it.

        Nodes that are being drained accept no tasks, but keep their objects.
        """
        return replace(self, chunks=await asyncio.to_thread(self._put))

    def _put(self) -> tuple[Any, ...]:
        with open(self.path, "rb") as file:
            return tuple(map(ray.put, _pieces(file)))


class LimitedBody:
    """A request's body with a limit on its size; its bytes count against the quota."""

    def __init__(
        self, request: Request, limit: int, quota: Quota | None = None, share: Share = WHOLE
    ) -> None:
        """Raise RequestError 413 or 503 at once if the announced size exceeds a limit.

        Announced bytes are not reserved, or one client could block the others by announcing many.
        """
        self._receive, self._limit = request.receive, limit
        self._quota, self._share = quota, share
        self.request = Request(request.scope, self._next)
        self.size = self.taken = 0
        announced = request.headers.get("content-length", "")
        if announced.isdecimal():
            self._check(int(announced))
            self._check_room(int(announced))

    async def _next(self) -> Message:
        message = await self._receive()
        self.size += len(message.get("body", b""))
        self._check(self.size)
        self._take(self.size)
        return message

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise RequestError(413, f"the body is larger than the limit of {self._limit} bytes")

    def _check_room(self, count: int) -> None:
        quota, share = self._quota, self._share
        if quota is not None and not quota.has_room(share, count):
            mine, allowed = quota.used_by(share.client), quota.allowed(share)
            held, limit = (mine, allowed) if mine + count > allowed else (quota.used, quota.limit)
            raise RequestError(
                503,
                f"uploads of {held} bytes are in flight and the limit is {limit:.0f}; "
                "try again later, or send a uri",
            )

    def _take(self, size: int) -> None:
        self._check_room(size - self.taken)
        if self._quota is not None:
            self._quota.take(self._share, size - self.taken)
            self.taken = size

    def give_back(self) -> None:
        """Return the bytes to the quota."""
        if self._quota is not None:
            self._quota.give_back(self._share, self.taken)
            self.taken = 0


@contextlib.asynccontextmanager
async def received(
    request: Request, kind: str, max_bytes: int, quota: Quota, share: Share = WHOLE
) -> AsyncIterator[Upload]:
    """Yield the upload of a request, valid inside the `with`.

    Raises RequestError: 400 for a malformed form or an empty file, 413 above `max_bytes`, 503 above
    the quota, 507 if the disk is full. `kind` is the body's media type.
    """
    is_form = kind == "multipart/form-data"
    body = LimitedBody(request, max_bytes + (_FORM_BYTES if is_form else 0), quota, share)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(body.give_back)
        try:
            file, stream = stack.enter_context(_unnamed()), body.request.stream()
            form = Form(request.headers["content-type"]) if is_form else None
            digest = await _store(form.file(stream) if form is not None else stream, file)
            upload = _upload(file, digest, form.file_name if form is not None else "")
        except OSError as error:
            if error.errno not in _FULL:
                raise
            why = "the endpoint's disk is full; try again later"
            raise RequestError(507, why, "unavailable") from error
        if not upload.size_bytes:
            raise RequestError(400, "the file is empty; send a video")
        if upload.size_bytes > max_bytes:
            why = f"the file has {upload.size_bytes} bytes; the limit is {max_bytes}"
            raise RequestError(413, why)
        yield upload


async def _store(chunks: AsyncIterator[bytes], file: IO[bytes]) -> str:
    """Write chunks to the file as they arrive, and return their sha256."""
    digest, waiting = hashlib.sha256(), bytearray()
    async for chunk in chunks:
        waiting += chunk
        if len(waiting) >= _CHUNK:
            await asyncio.to_thread(write_all, file, bytes(waiting))
            digest.update(waiting)
            waiting.clear()
    await asyncio.to_thread(write_all, file, bytes(waiting))
    digest.update(waiting)
    return digest.hexdigest()


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def _unnamed() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="tsq-upload-", buffering=0)


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write everything to an unbuffered file, so that closing it cannot fail."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _upload(file: IO[bytes], digest: str, name: str) -> Upload:
    path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
    return Upload(_node_id(), path, os.fstat(file.fileno()).st_size, digest, name)


@contextlib.asynccontextmanager
async def local_path(upload: Upload) -> AsyncIterator[str]:
    """Yield a path to the upload on this node, valid inside the `with`.

    Raises RayError if the upload's node is lost or accepts no tasks, OSError if the disk is full.
    """
    if upload.node == _node_id():
        yield upload.path
        return
    with _unnamed() as file:
        async for chunk in _content(upload):
            await asyncio.to_thread(write_all, file, chunk)
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


async def _content(upload: Upload) -> AsyncIterator[bytes]:
    for chunk in upload.chunks:
        yield await chunk
    if upload.chunks:
        return
    chunks: Any = _read_chunks.options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(upload.node, soft=False),
        _generator_backpressure_num_objects=_CHUNKS_AHEAD,
    ).remote(upload.path)
    async for chunk in chunks:
        yield await chunk


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")
def _read_chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from _pieces(file)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_CHUNKS_AHEAD * _CHUNK):
        yield piece
