"""Fetch the video of a `uri` into an unnamed local file, within limits of time and size."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import IO, Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import StorageError, VideoError
from tsq_ray.serving.requests.uploads import write_all
from tsq_ray.serving.requests.uris import WEB, may_connect, named_hosts
from tsq_ray.storage import StoredFile

_CHUNK = 1 << 20
_CONNECT_S = 10.0
_SLOWEST_BYTES_S = 256 * 1024
"""Average rate below which a patient fetch gives up, so that no server blocks a slot forever."""
_LOOK_S = 0.5
_CONCURRENT_NAMES = 32
_TYPE_OF = {401: "access_denied", 403: "access_denied", 404: "not_found", 410: "not_found"}
_ADVICE = {
    "access_denied": "the server refuses access; a presigned URL may have expired",
    "not_found": "no such file; check the URL",
}


@dataclass(frozen=True)
class Fetched:
    """A video on this machine, and what its storage reports about it."""

    path: str
    file: StoredFile


class Fetcher:
    """Fetches videos, a limited number at a time, outside the decoding processes."""

    def __init__(
        self, prefixes: Iterable[str], timeout_s: float, max_bytes: int, limit: int
    ) -> None:
        self._named_hosts = named_hosts(prefixes)
        self._timeout_s, self._max_bytes = timeout_s, max_bytes
        self._slots = asyncio.Semaphore(limit)
        self._web: aiohttp.ClientSession | None = None
        self._paths = ThreadPoolExecutor(limit, "tsq-paths")

    @contextlib.asynccontextmanager
    async def fetched(self, uri: str, patient: bool = False) -> AsyncIterator[Fetched]:
        """Yield the video as a local file, valid inside the `with`; a local one is read in place.

        `patient`: wait for a big file as long as data keeps arriving. Raises StorageError, and
        VideoError (too_large, or timeout after the limit).
        """
        with tempfile.TemporaryFile(prefix="tsq-fetch-", buffering=0) as file:
            async with self._limited(uri, file if patient else None):
                found = await self._fetch(uri, file)
            yield found

    async def look_up(self, uri: str) -> StoredFile:
        """Return what storage reports about a video; size 0 if unknown.

        The same rules apply as for fetching. Raises StorageError, and VideoError timeout after
        the limit.
        """
        async with self._limited(uri):
            if storage.is_local(uri):
                return await self._stat(uri)
            if not uri.startswith(WEB):
                return await storage.look_up(uri)
            # not HEAD, which presigned URLs refuse
            with storage.storage_errors(uri, "look up"):
                async with self._answered(uri) as response:
                    return _stored(uri, response, response.content_length or 0)

    @contextlib.asynccontextmanager
    async def _limited(self, uri: str, growing: IO[bytes] | None = None) -> AsyncIterator[None]:
        """Hold a slot within the time limit, which is extended as the file `growing` grows."""
        async with self._slots:
            try:
                async with asyncio.timeout(self._timeout_s) as limit:
                    with _extended_by_growth(limit, growing):
                        yield
            except TimeoutError:
                why = f"not fetched within serve.fetch_timeout_s = {self._timeout_s:g} s"
                why += f" or at {_SLOWEST_BYTES_S // 1024} KiB/s" if growing is not None else ""
                raise VideoError("timeout", f"{storage.redact(uri)}: {why}") from None

    async def _stat(self, uri: str) -> StoredFile:
        return await asyncio.get_running_loop().run_in_executor(self._paths, storage.stat, uri)

    async def _fetch(self, uri: str, file: IO[bytes]) -> Fetched:
        if storage.is_local(uri):
            found = await self._stat(uri)
            self._check_size(uri, found.size_bytes)
            return Fetched(uri, found)
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        with storage.storage_errors(uri, "fetch"):
            get = self._get_web if uri.startswith(WEB) else self._get_object
            found = await get(uri, file, path)
        return Fetched(path, found)

    def _check_size(self, uri: str, size: int) -> None:
        if size > self._max_bytes:
            shown = storage.redact(uri)
            allowed = f"decode.max_bytes allows {self._max_bytes}"
            raise VideoError("too_large", f"{shown}: at least {size} bytes; {allowed}")

    async def _get_web(self, uri: str, file: IO[bytes], path: str) -> StoredFile:
        async with self._answered(uri) as response:
            self._check_size(uri, response.content_length or 0)
            size = 0
            async for chunk in response.content.iter_chunked(_CHUNK):
                size += len(chunk)
                self._check_size(uri, size)
                await asyncio.to_thread(write_all, file, chunk)
            return _stored(uri, response, size)

    @contextlib.asynccontextmanager
    async def _answered(self, uri: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield a web server's answer before its body is read. Raises StorageError for errors."""
        async with self._session().get(uri, allow_redirects=False) as response:
            if response.status != 200:
                raise _refused(uri, response.status)
            yield response

    def _session(self) -> aiohttp.ClientSession:
        if self._web is None:
            self._web = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=PublicResolver(self._named_hosts), limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                auto_decompress=False,
                trust_env=False,
            )
        return self._web

    async def _get_object(self, uri: str, file: IO[bytes], path: str) -> StoredFile:
        return await storage.fetch(uri, path, lambda found: self._check_size(uri, found.size_bytes))


def longest_fetch_s(config: Config) -> float:
    """Return the longest that a patient fetch may take, in seconds."""
    return config.serve.fetch_timeout_s + config.decode.max_bytes / _SLOWEST_BYTES_S


@contextlib.contextmanager
def _extended_by_growth(limit: asyncio.Timeout, file: IO[bytes] | None) -> Iterator[None]:
    """Extend a time limit as a file grows, if one is given."""

    async def extend(file: IO[bytes], initial: float) -> None:
        while not limit.expired():
            limit.reschedule(initial + os.fstat(file.fileno()).st_size / _SLOWEST_BYTES_S)
            await asyncio.sleep(_LOOK_S)

    initial = limit.when()
    if file is None or initial is None:
        yield
        return
    extender = asyncio.get_running_loop().create_task(extend(file, initial))
    try:
        yield
    finally:
        extender.cancel()


class PublicResolver(AbstractResolver):
    """Resolves names to the addresses that the endpoint may connect to, and to no others.

    It has its own threads, so that names which do not resolve hold up nothing else.
    """

    def __init__(self, hosts: Iterable[str]) -> None:
        self._named_hosts = frozenset(hosts)
        self._threads = ThreadPoolExecutor(_CONCURRENT_NAMES, "tsq-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        tcp, flags = socket.SOCK_STREAM, socket.AI_ADDRCONFIG
        look_up = partial(socket.getaddrinfo, host, port, family, tcp, flags=flags)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        allowed = [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST,
            )
            for kind, _, protocol, _, address in found
            if may_connect(host, str(address[0]), self._named_hosts)
        ]
        if not allowed:
            why = (
                "its address is not public; name the host in serve.allowed_uri_prefixes to allow it"
            )
            raise StorageError("unsupported", f"host {host}: {why}")
        return allowed

    async def close(self) -> None:
        self._threads.shutdown(wait=False)


def _refused(uri: str, status: int) -> StorageError:
    name = storage.redact(uri)
    if 300 <= status < 400:
        why = f"the server redirects (HTTP {status}), which the endpoint does not follow"
        return StorageError("unsupported", f"cannot fetch {name}: {why}; name the final URL")
    kind: Any = _TYPE_OF.get(status, "unavailable")
    why = _ADVICE.get(kind, "the server does not answer as expected; try again later")
    return StorageError(kind, f"cannot fetch {name}: HTTP {status}: {why}")


def _stored(uri: str, response: aiohttp.ClientResponse, size_bytes: int) -> StoredFile:
    headers = response.headers
    etag = (headers.get("ETag") or "").strip('"') or None
    return StoredFile(uri, size_bytes, etag, _date(headers.get("Last-Modified")))


def _date(header: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(header) if header else None
    except ValueError:
        return None
