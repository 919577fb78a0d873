"""Fetching the video of a `uri`: limits, odd web servers, addresses that may not be asked."""

from __future__ import annotations

import asyncio
import http.server
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import pytest

from tsq_ray import storage
from tsq_ray.errors import DiskFull, StorageError, VideoError
from tsq_ray.serving.requests.fetching import Fetcher
from tsq_ray.storage import StoredFile

DATA = bytes(range(256)) * 40
CHUNK = 2**18
BIG = bytes(8 * CHUNK)


class Web(http.server.BaseHTTPRequestHandler):
    """/data, /small (10 bytes), /endless (no length, never ends), /stalls, /silent, /slow,
    /trickle, /move, /NUMBER for a status."""

    released = threading.Event()

    def do_GET(self) -> None:
        what = self.path.partition("?")[0].rpartition("/")[2]
        if what.isdecimal():
            self.send_response(int(what))
            self.end_headers()
            return
        if what == "silent":
            self.released.wait(60)
            return
        self.send_response(302 if what == "move" else 200)
        if what == "move":
            self.send_header("Location", "/data")
        elif what != "endless":
            size = len(BIG) if what in ("slow", "trickle") else len(DATA)
            self.send_header("Content-Length", str(10 if what == "small" else size))
        self.send_header("ETag", '"v1"')
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 10:00:00 GMT")
        self.end_headers()
        try:
            if what == "endless":
                while not self.released.is_set():
                    self.wfile.write(DATA)
            if what == "stalls":
                self.wfile.write(DATA[:10])
                self.released.wait(60)
            if what in ("slow", "trickle"):  # at 850 KiB/s for 2.4 s, or hardly
                for start in range(0, len(BIG), CHUNK):
                    self.wfile.write(BIG[start : start + (CHUNK if what == "slow" else 10)])
                    self.released.wait(0.3)
            if what == "small":
                self.wfile.write(DATA[:10])
            if what == "data":
                self.wfile.write(DATA)
        except OSError:  # the client has gone away
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        Web.released.set()
        server.shutdown()


async def fetch(
    uri: str, prefixes: tuple[str, ...], max_bytes: int = 2**20, patient: bool = False
) -> tuple[bytes, str]:
    fetcher = Fetcher(prefixes, 1.5, max_bytes, 4)
    async with fetcher.fetched(uri, patient) as found:
        return Path(found.path).read_bytes(), str(found.file.etag)


def test_a_file_with_what_its_server_says(port: int) -> None:
    prefix = f"http://127.0.0.1:{port}/open"
    assert asyncio.run(fetch(f"{prefix}/data?signature=x", (prefix,))) == (DATA, "v1")


def test_a_local_file_is_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(DATA)
    assert asyncio.run(fetch(str(path), (str(tmp_path),))) == (DATA, "None")


async def look_up(uri: str, prefixes: tuple[str, ...]) -> StoredFile:
    return await Fetcher(prefixes, 1.5, 2**20, 4).look_up(uri)


@pytest.mark.parametrize(("name", "size"), [("data", len(DATA)), ("endless", 0)])
def test_a_look_up_reads_no_body(port: int, name: str, size: int) -> None:
    prefix = f"http://127.0.0.1:{port}/open"
    found = asyncio.run(look_up(f"{prefix}/{name}?signature=x", (prefix,)))
    when = datetime(2026, 11, 26, 10, tzinfo=timezone.utc)
    assert (found.size_bytes, found.etag, found.modified) == (size, "v1", when)


@pytest.mark.parametrize(
    ("name", "error_type"),
    [("move", "unsupported"), ("404", "not_found"), ("500", "unavailable"), ("silent", "timeout")],
)
def test_a_look_up_that_finds_nothing(port: int, name: str, error_type: str) -> None:
    prefix = f"http://127.0.0.1:{port}/open"
    with pytest.raises((VideoError, StorageError)) as caught:
        asyncio.run(look_up(f"{prefix}/{name}?signature=SECRET", (prefix,)))
    assert caught.value.error_type == error_type
    assert "SECRET" not in str(caught.value)
    with pytest.raises(StorageError, match="its address is not public"):
        asyncio.run(look_up(f"http://localhost:{port}/data", ("http://",)))


def test_a_look_up_of_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(DATA)
    found = asyncio.run(look_up(str(tmp_path / "a.mp4"), (str(tmp_path),)))
    assert (found.size_bytes, found.etag) == (len(DATA), None)
    with pytest.raises(StorageError, match="no such file"):
        asyncio.run(look_up(str(tmp_path / "b.mp4"), (str(tmp_path),)))


@pytest.mark.parametrize(
    ("name", "error_type", "message"),
    [
        ("move", "unsupported", "the server redirects (HTTP 302)"),
        ("404", "not_found", "HTTP 404"),
        ("401", "access_denied", "HTTP 401"),
        ("500", "unavailable", "HTTP 500"),
        ("206", "unavailable", "HTTP 206"),
        ("stalls", "timeout", "serve.fetch_timeout_s = 1.5 s"),
        ("endless", "too_large", "decode.max_bytes allows 1048576"),
    ],
)
def test_a_server_that_gives_no_video(port: int, name: str, error_type: str, message: str) -> None:
    prefix = f"http://127.0.0.1:{port}/open"
    with pytest.raises((VideoError, StorageError)) as caught:
        asyncio.run(fetch(f"{prefix}/{name}?signature=SECRET", (prefix,)))
    assert caught.value.error_type == error_type
    assert message in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_big_file_may_take_as_long_as_it_keeps_coming(port: int) -> None:
    prefix = f"http://127.0.0.1:{port}/open"

    def get(name: str, patient: bool) -> tuple[bytes, str]:
        return asyncio.run(fetch(f"{prefix}/{name}", (prefix,), 2**22, patient))

    assert get("slow", True) == (BIG, "v1")
    for name, patient, message in (
        ("slow", False, "serve.fetch_timeout_s = 1.5 s$"),
        ("trickle", True, "serve.fetch_timeout_s = 1.5 s or at 256 KiB/s$"),
        ("stalls", True, "or at 256 KiB/s$"),
    ):
        with pytest.raises(VideoError, match=message) as caught:
            get(name, patient)
        assert caught.value.error_type == "timeout"


def test_a_name_of_a_private_address_is_not_asked(port: int) -> None:
    with pytest.raises(StorageError, match="its address is not public"):
        asyncio.run(fetch(f"http://localhost:{port}/data", ("http://",)))
    named = f"http://localhost:{port}/"
    assert asyncio.run(fetch(f"{named}data", (named,)))[0] == DATA


def test_a_name_is_resolved_once(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that moves after its address was checked leads to the address that was checked."""

    class Elsewhere(Web):
        def do_GET(self) -> None:
            self.send_error(500)

    asked: list[object] = []
    resolve = socket.getaddrinfo

    def moving(host: object, *arguments: Any, **named: Any) -> Any:
        if host != "moving.example":
            return resolve(host, *arguments, **named)
        asked.append(host)
        return resolve("127.0.0.1" if len(asked) == 1 else "127.0.0.2", *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    prefix = f"http://moving.example:{port}/"
    with http.server.ThreadingHTTPServer(("127.0.0.2", port), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert asyncio.run(fetch(f"{prefix}data", (prefix,)))[0] == DATA
        assert len(asked) == 1
        with pytest.raises(StorageError, match="HTTP 500"):
            asyncio.run(fetch(f"{prefix}data", (prefix,)))
        server.shutdown()


def test_a_host_that_does_not_answer() -> None:
    with pytest.raises(StorageError, match="no connection") as caught:
        asyncio.run(fetch("http://127.0.0.1:9/data", ("http://127.0.0.1:9/",)))
    assert caught.value.error_type == "unavailable"


def test_a_full_disk_is_told_once(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's device that has no room for a single byte."""

    def full(prefix: str, buffering: int = -1) -> IO[bytes]:
        return open("/dev/full", "wb", buffering=buffering)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    prefix = f"http://127.0.0.1:{port}/open"
    with pytest.raises(DiskFull, match="the disk is full"):
        asyncio.run(fetch(f"{prefix}/small", (prefix,)))


@pytest.mark.parametrize("uri", ["http://away-{}.example/a.mp4", "/mnt/away/{}.mp4"])
def test_what_hangs_keeps_no_thread_of_the_others(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that no server answers for, and a mount that is away."""
    back = threading.Event()

    def hang(*_: object, **__: object) -> object:
        back.wait(60)
        raise OSError("away")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(storage, "stat", hang)

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        fetcher = Fetcher(("http://", "/mnt/away"), 3, 2**20, 8)
        waiting = [
            asyncio.create_task(fetcher.fetched(uri.format(number)).__aenter__())
            for number in range(6)
        ]
        await asyncio.sleep(0.2)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "put"), 2) == "put"
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, VideoError)
            assert result.error_type == "timeout"
        back.set()

    asyncio.run(run())


def test_special_files_are_no_videos(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorageError, match="FIFO") as caught:
        asyncio.run(fetch(str(tmp_path / "fifo"), (str(tmp_path),)))
    assert caught.value.error_type == "not_video"
