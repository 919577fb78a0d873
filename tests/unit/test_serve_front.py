"""HAProxy before Serve, with a plain web server in Serve's place."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import select
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from jobs.benchmarks.support.s3 import free_ports
from tsq_ray.config import ServeConfig
from tsq_ray.errors import RunFailed
from tsq_ray.serving.front import Front, front

LARGE = 8 << 20
"""More than the buffers between server and client hold, in bytes."""


class Inner(http.server.BaseHTTPRequestHandler):
    """/large answers 8 MiB, /lost fails as Serve does, /closed closes the connection.

    All else tells the request's id.
    """

    protocol_version = "HTTP/1.1"
    posted: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        """Close the connection without an answer."""
        self.posted.append(self.path)
        self.close_connection = True

    def do_GET(self) -> None:
        if self.path == "/closed":
            self.close_connection = True
            return
        lost = self.path == "/lost"
        body = bytes(LARGE) if self.path == "/large" else self.headers["x-request-id"].encode()
        self.send_response(500 if lost else 200)
        self.send_header("Content-Type", "text/plain" if lost else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def inner() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Inner) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def outer() -> int:
    return free_ports(1)[0]


def ask(port: int, path: str = "/", request_id: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"x-request-id": request_id} if request_id else {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def haproxy_of_this_process() -> int:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    (found,) = (pid for pid in children if "haproxy" in Path(f"/proc/{pid}/comm").read_text())
    return int(found)


def test_a_killed_front_is_started_again(
    inner: int, outer: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with front("127.0.0.1", outer, inner, ServeConfig()) as running:
        assert ask(outer, "/", "a")[0] == 200
        first = haproxy_of_this_process()
        running.restart_if_ended()
        assert haproxy_of_this_process() == first
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        running.restart_if_ended()
        assert ask(outer, "/", "b") == (200, b"b")
    assert "the HTTP front has ended (signal 9); starting it again" in capsys.readouterr().err
    with pytest.raises(ConnectionRefusedError):
        ask(outer)


def test_a_front_that_cannot_start_says_why(inner: int, outer: int) -> None:
    with (
        socket.create_server(("127.0.0.1", outer)),
        pytest.raises(RunFailed, match=r"the HTTP front did not start: .*cannot bind"),
        front("127.0.0.1", outer, inner, ServeConfig()),
    ):
        pass


def test_every_answer_names_its_request(inner: int, outer: int) -> None:
    def ask_all(port: int, path: str, *ids: str | None) -> Iterator[tuple[int, str, str]]:
        for own in ids:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", path, headers={"x-request-id": own} if own else {})
                answer = connection.getresponse()
                found = json.loads(answer.read())["request_id"]
                assert found == answer.headers["x-request-id"]
                yield answer.status, own or "", found

    answers = []
    with front("127.0.0.1", outer, inner, ServeConfig()):
        for path in ("/-/routes", "/lost", "/closed"):
            answers += ask_all(outer, path, "my-id.1", None, 'a"b', "x" * 200)
    (closed,) = free_ports(1)
    with front("127.0.0.1", outer, closed, ServeConfig()):
        # it connects three times, a second apart
        answers += ask_all(outer, "/lost", "my-id.1", None)
    assert {status for status, _, _ in answers} == {404, 502, 503}
    for _, own, found in answers:
        assert found == own if own == "my-id.1" else uuid.UUID(found)
    assert len({found for *_, found in answers}) == len(answers) - 3, "new ids differ"


def test_a_connection_above_the_limit_waits_for_another_to_end(inner: int, outer: int) -> None:
    def connected() -> socket.socket:
        client = socket.create_connection(("127.0.0.1", outer), timeout=10)
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nx-request-id: a\r\n\r\n")
        return client

    with (
        front("127.0.0.1", outer, inner, ServeConfig(max_connections=2)),
        connected() as first,
        connected() as second,
    ):
        assert first.recv(12) == second.recv(12) == b"HTTP/1.1 200"
        with connected() as third:
            assert not select.select([third], [], [], 0.5)[0]
            first.close()
            assert third.recv(12) == b"HTTP/1.1 200"


def test_a_batch_whose_answer_was_lost_is_not_created_again(inner: int, outer: int) -> None:
    with front("127.0.0.1", outer, inner, ServeConfig()):
        for path in ("/v1/score", "/v1/batches"):
            with socket.create_connection(("127.0.0.1", outer), timeout=10) as client:
                # in one packet: HAProxy repeats only what it has completely
                head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"
                client.sendall(head.encode() + b"{}")
                assert client.recv(12) == b"HTTP/1.1 502"
    assert Inner.posted.count("/v1/score") > 1, "repeated"
    assert Inner.posted.count("/v1/batches") == 1


def start_reading(port: int) -> socket.socket:
    """Ask for a large answer and take its first bytes only."""
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(
        b"GET /large HTTP/1.1\r\nHost: a\r\nx-request-id: a\r\nConnection: close\r\n\r\n"
    )
    assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    return client


def finishing(running: Front, limit_s: float) -> tuple[threading.Thread, float]:
    thread = threading.Thread(target=running.finish, args=(limit_s,))
    thread.start()
    return thread, time.monotonic()


def until_refused(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            ask(port, "/", "late")
        except OSError:
            return
    raise AssertionError("connections are still accepted")


def test_an_answer_under_way_is_sent_to_its_end(inner: int, outer: int) -> None:
    with front("127.0.0.1", outer, inner, ServeConfig()) as running, start_reading(outer) as client:
        thread, _ = finishing(running, 30)
        until_refused(outer)
        received = 0
        while data := client.recv(1 << 16):
            received += len(data)
        thread.join(10)
        assert not thread.is_alive()
    assert received >= LARGE - 1000, "the answer was cut"


def test_a_client_that_does_not_read_holds_up_no_end(inner: int, outer: int) -> None:
    with front("127.0.0.1", outer, inner, ServeConfig()) as running, start_reading(outer):
        thread, started = finishing(running, 1)
        thread.join(10)
        assert 0.9 < time.monotonic() - started < 3
    with pytest.raises(ConnectionRefusedError):
        ask(outer)


def test_an_idle_connection_holds_up_no_end(inner: int, outer: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", outer, timeout=10)
    with front("127.0.0.1", outer, inner, ServeConfig()) as running:
        connection.request("GET", "/", headers={"x-request-id": "a"})
        assert connection.getresponse().read() == b"a"
        thread, started = finishing(running, 30)
        thread.join(20)
        assert time.monotonic() - started < 5
    connection.close()
