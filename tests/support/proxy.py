"""A misbehaving S3 server: a proxy in front of the real one that fails some requests."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "expect")


@dataclass(frozen=True)
class Trouble:
    """Status and code of S3's error answer; status 0 cuts the connection in the middle of it."""

    status: int
    code: str


SLOW_DOWN = Trouble(503, "SlowDown")
INTERNAL_ERROR = Trouble(500, "InternalError")
CUT = Trouble(0, "cut")
EXPIRED_TOKEN = Trouble(400, "ExpiredToken")  # S3 answers 400
ARCHIVED = Trouble(403, "InvalidObjectState")  # the answer to reading an object in Glacier
EXPIRED_TOKEN_403 = Trouble(403, "ExpiredToken")  # as some S3-compatible servers do


class S3Proxy:
    """Passes requests on to `backend`, or fails them.

    `decide` is called for every request: (method, path with the query) -> a Trouble, or None to
    pass it on.
    """

    def __init__(self, backend: str) -> None:
        self.backend = urlsplit(backend)
        self.given: list[tuple[Trouble, str, str]] = []
        self.headers: list[dict[str, str]] = []
        """Headers of every request, names in lower case."""
        self.sent = 0
        """Bytes of content sent to clients."""
        self.slow: tuple[str, float] = ("", 0.0)
        """A suffix of paths, and the seconds that a GET of them takes longer."""
        self._lock = threading.Lock()
        self._decide: Callable[[str, str], Trouble | None] = lambda method, path: None
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def heal(self) -> None:
        """Stop all trouble and forget what was sent."""
        with self._lock:
            self._decide = lambda method, path: None
            self.given.clear()
            self.headers.clear()

    def trouble(
        self, trouble: Trouble, count: int | None = None, after: int = 0, only: str | None = None
    ) -> None:
        """Give `trouble` to all further requests, or to `count` of them; pass on the first `after`.

        `only`: requests with this method.
        """
        with self._lock:
            seen = itertools.count()

            def decide(method: str, path: str) -> Trouble | None:
                if only not in (None, method) or next(seen) < after:
                    return None
                return trouble if count is None or len(self.given) < count else None

            self._decide = decide
            self.given.clear()

    def pick(self, method: str, path: str) -> Trouble | None:
        with self._lock:
            picked = self._decide(method, path)
            if picked is not None:
                self.given.append((picked, method, path))
            return picked


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: S3Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _pass_on(self) -> None:
        body = self._body()
        self.proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
        suffix, seconds = self.proxy.slow
        if self.command == "GET" and urlsplit(self.path).path.endswith(suffix):
            time.sleep(seconds)
        trouble = self.proxy.pick(self.command, self.path)
        if trouble is not None and trouble.status:
            self._refuse(trouble)
            return
        try:
            status, headers, content = self._ask(body)
        except OSError:  # no server behind it: the client sees a dead connection
            self.close_connection = True
            return
        if trouble is not None and not content:  # carried out, but the client does not know
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        length = next(
            (value for name, value in headers if name.lower() == "content-length"),
            str(len(content)),
        )
        if status != 204:
            self.send_header(
                "Content-Length", length if self.command == "HEAD" else str(len(content))
            )
        self.end_headers()
        if trouble is not None:
            content = content[: len(content) // 2]
            self.close_connection = True
        self.proxy.sent += 0 if self.command == "HEAD" else len(content)
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(
            str(self.proxy.backend.hostname), self.proxy.backend.port, timeout=60
        )
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )  # Host is part of the signature
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _refuse(self, trouble: Trouble) -> None:
        content = (
            f'<?xml version="1.0"?><Error><Code>{trouble.code}</Code><Message>the proxy says '
            f"{trouble.code}</Message></Error>"
        ).encode()
        self.send_response_only(trouble.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def running_proxy(backend: str) -> Iterator[S3Proxy]:
    """Run the proxy for the `with` block."""
    proxy = S3Proxy(backend)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
