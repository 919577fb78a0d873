"""The endpoint in trouble: it ends, its processes are killed, clients and sources are slow."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.archive import Archive, make_archive
from support.bundle import make_bundle
from support.endpoint import (
    ANSWER_S,
    END_S,
    Endpoint,
    Load,
    is_ended,
    memory_of,
    same_answer,
    serving,
)

from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.prediction import predict_rows

pytestmark = pytest.mark.ray

NAME = "train/1_1.mp4"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("served") / "videos")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def data(archive: Archive) -> bytes:
    return (archive.root / NAME).read_bytes()


@pytest.fixture(scope="module")
def row(archive: Archive, bundle: str) -> dict[str, Any]:
    return predict_rows([str(archive.root / NAME)], bundle, scoring_config(bundle))[0]


class SlowBody:
    """An upload that pauses in the middle until it is released, for at most `most_s`."""

    def __init__(self, data: bytes, most_s: float = ANSWER_S) -> None:
        self.data, self.most_s, self.go_on = data, most_s, threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        yield self.data[:100]
        self.go_on.wait(self.most_s)
        yield self.data[100:]


def in_hand(endpoint: Endpoint, pool: ThreadPoolExecutor, data: bytes, count: int) -> Any:
    """Requests that the endpoint has in hand, and a function that lets them go on."""
    bodies = [SlowBody(data) for _ in range(count)]
    answers = [pool.submit(endpoint.score, content=body) for body in bodies]
    uploads = f"{endpoint.folder}/tsq-upload-"
    deadline = time.monotonic() + ANSWER_S
    while open_files(endpoint, uploads) < count:
        assert time.monotonic() < deadline, "the uploads did not begin"
        time.sleep(0.1)

    def go_on() -> list[httpx.Response]:
        for body in bodies:
            body.go_on.set()
        return [answer.result(ANSWER_S) for answer in answers]

    return go_on


def open_files(endpoint: Endpoint, prefix: str) -> int:
    """How many of the ingress replicas' open files are unnamed ones whose name began so."""
    found = 0
    for pid in endpoint.processes("Ingress"):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found += os.readlink(link).startswith(f"{endpoint.folder}/#") or os.readlink(
                    link
                ).startswith(prefix)
            except OSError:
                continue
    return found


def test_an_endpoint_that_is_told_to_end_answers_what_it_has_in_hand(
    bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    with serving(bundle, tmp_path, "serve.drain_s=60") as endpoint, ThreadPoolExecutor(4) as pool:
        go_on = in_hand(endpoint, pool, data, 4)
        endpoint.driver.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + END_S
        while (refused := endpoint.score(content=data)).status_code != 503:
            assert refused.status_code == 200
            assert time.monotonic() < deadline, "new requests are still accepted"
        assert refused.headers["Retry-After"] == "5"
        assert "the endpoint is ending" in refused.json()["detail"]
        assert endpoint.client.get("/readyz").status_code == 503
        assert endpoint.client.get("/healthz").status_code == 200
        for answer in go_on():
            assert answer.status_code == 200
            same_answer(answer.json(), row)
        ended = endpoint.driver.ended(END_S)
        assert ended.code == 0, ended
        shown = ended.err.strip().splitlines()
        assert shown[-2:] == [
            "ending: answering the requests in hand, for at most 60 s",
            "stopped",
        ]
        assert "Traceback" not in ended.out + ended.err
        assert "\x1b[" not in ended.err, "no colours in a file"
        is_ended(endpoint)
        assert list(endpoint.folder.glob("tsq-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(
    bundle: str, data: bytes, number: int, tmp_path: Path
) -> None:
    with serving(bundle, tmp_path, "serve.drain_s=600") as endpoint, ThreadPoolExecutor(1) as pool:
        go_on = in_hand(endpoint, pool, data, 1)
        endpoint.driver.process.send_signal(number)
        deadline = time.monotonic() + END_S
        while endpoint.client.get("/readyz").status_code != 503:
            assert time.monotonic() < deadline, "the first signal had no effect"
        endpoint.driver.process.send_signal(number)
        assert endpoint.driver.ended(END_S).code == 0
        is_ended(endpoint)
        with contextlib.suppress(httpx.TransportError):
            assert go_on()[0].status_code in (502, 503)


STAGES = ("ServeReplica:tsq:Decoder", "ServeReplica:tsq:Sampler", "ServeReplica:tsq:Recognizer")
OTHERS = ("ServeReplica:tsq:Ingress", "ProxyActor", "ServeController")


@pytest.mark.slow
def test_processes_are_killed_under_load(
    bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    """No answer is lost with a stage; every answer is JSON whatever is killed."""
    with serving(bundle, tmp_path) as endpoint:
        for title in (*STAGES, *OTHERS):
            load = Load(lambda: endpoint.score(content=data), 4)
            load.wait_for(4)
            os.kill(endpoint.processes(title)[0], signal.SIGKILL)
            load.wait_for(8)
            answers = load.ended()
            for answer in answers:
                assert answer is not None, f"{title}: a connection was closed without an answer"
                if answer.status_code == 200:
                    same_answer(answer.json(), row)
                else:
                    assert title in OTHERS, f"{title}: {answer.status_code} {answer.text}"
                    assert answer.status_code in (502, 503)
                    assert answer.json()["status"] == answer.status_code
                    assert answer.headers["Retry-After"]
            same_answer(endpoint.answers_again(content=data).json(), row)


@pytest.mark.slow
def test_a_killed_decoding_process_is_not_the_videos_fault(
    bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    with serving(bundle, tmp_path) as endpoint, ThreadPoolExecutor(1) as pool:
        endpoint.score(content=data)
        answers = []
        for _ in range(10):
            waiting = pool.submit(endpoint.score, content=data)
            for pid in decoding_processes(endpoint):
                os.kill(pid, signal.SIGKILL)
            answers.append(waiting.result(ANSWER_S))
        for answer in answers:
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                same_answer(answer.json(), row)
        assert sum(answer.status_code == 200 for answer in answers) >= 5


def decoding_processes(endpoint: Endpoint) -> list[int]:
    """The decoder's children: those of its fork server."""
    parents = {pid: parent_of(pid) for pid in endpoint.processes("")}
    (decoder,) = endpoint.processes("ServeReplica:tsq:Decoder")
    servers = [pid for pid, parent in parents.items() if parent == decoder]
    return [pid for pid, parent in parents.items() if parent in servers]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


# ------------------------------------------------------------------------------ slow and odd sources


class Stalling(http.server.BaseHTTPRequestHandler):
    """/open/V serves the video, /slow stalls in mid-body, /move redirects, /NUMBER is a status."""

    data = b""
    released = threading.Event()

    def do_GET(self) -> None:
        what = self.path.rpartition("/")[2]
        if what.isdecimal():
            self.send_response(int(what))
            self.end_headers()
            return
        if what == "move":
            self.send_response(302)
            self.send_header("Location", "/closed/secret")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("ETag", '"of-this-version"')
        self.end_headers()
        self.wfile.write(self.data[:100])
        if what == "slow":
            self.released.wait(ANSWER_S)
        self.wfile.write(self.data[100:])

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def web(data: bytes) -> Iterator[str]:
    """A web server on loopback, at http://127.0.0.1:PORT."""
    Stalling.data = data
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Stalling.released.set()
        server.shutdown()


def test_slow_and_odd_sources(
    bundle: str, data: bytes, row: dict[str, Any], web: str, tmp_path: Path
) -> None:
    """Eight sources that stall hold up no upload; redirects and statuses are told as they are."""
    settings = (f'serve.allowed_uri_prefixes=["{web}/open"]', "serve.fetch_timeout_s=6")
    with serving(bundle, tmp_path, *settings) as endpoint, ThreadPoolExecutor(8) as pool:

        def ask(name: str) -> httpx.Response:
            return endpoint.score(json={"uri": f"{web}/open/{name}"})

        slow = [pool.submit(ask, "slow") for _ in range(8)]
        time.sleep(1)
        same_answer(endpoint.score(content=data).json(), row)
        found = ask("video.mp4").json()
        same_answer(found, row)
        assert (found["size_bytes"], found["etag"]) == (len(data), "of-this-version")
        assert not any(waiting.done() for waiting in slow), "the upload waited for them"
        for waiting in slow:
            late = waiting.result(ANSWER_S)
            assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
            assert "serve.fetch_timeout_s = 6 s" in late.json()["detail"]
        for name, status, error_type in (
            ("move", 422, "unsupported"),
            ("404", 404, "not_found"),
            ("403", 502, "access_denied"),
            ("500", 503, "unavailable"),
            ("429", 503, "unavailable"),
        ):
            answer = ask(name)
            assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
        assert endpoint.score(json={"uri": f"{web}/closed/secret"}).status_code == 403


# ----------------------------------------------------------------------------- limits and the memory


@pytest.mark.slow
def test_limits(bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path) -> None:
    settings = (
        "serve.max_queued_requests=2",
        "serve.request_timeout_s=12",
        "serve.ingress.min_replicas=1",
        "serve.ingress.max_replicas=1",
        "serve.header_timeout_s=2",
    )
    with serving(bundle, tmp_path, *settings) as endpoint, ThreadPoolExecutor(2) as pool:
        same_answer(endpoint.score(content=data).json(), row)  # loopback needs no token
        go_on = in_hand(endpoint, pool, data, 2)
        full = endpoint.score(content=data)
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) >= 1
        assert "2 requests are in hand" in full.json()["detail"]
        assert [answer.status_code for answer in go_on()] == [200, 200]

        late = endpoint.score(content=SlowBody(data, 20))
        assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
        assert "serve.request_timeout_s = 12 s" in late.json()["detail"]
        assert endpoint.score(content=data).status_code == 200
        assert headers_that_never_end(endpoint) == 408


def headers_that_never_end(endpoint: Endpoint) -> int:
    """The status for a client that does not send its headers to the end."""
    import socket

    port = int(endpoint.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as client:
        client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: a\r\n")
        return int(client.recv(1000).split()[1])


@pytest.mark.slow
def test_large_uploads_cost_no_memory(bundle: str, data: bytes, tmp_path: Path) -> None:
    """Four uploads of 150 MB at a time: each is a file, and the memory is given back."""
    with serving(bundle, tmp_path) as endpoint, ThreadPoolExecutor(4) as pool:

        def ask(content: bytes) -> httpx.Response:
            return endpoint.score(content=content)

        # every process has worked once, so that only the uploads are new
        assert {answer.status_code for answer in pool.map(ask, [data] * 12)} == {200}
        most: dict[int, int] = {}
        before = memory_of(endpoint.processes(""))

        def upload(_: int) -> int:
            chunk = bytes(2**20)
            return endpoint.score(content=(chunk for _ in range(150))).status_code

        waiting = [pool.submit(upload, number) for number in range(4)]
        while not all(one.done() for one in waiting):
            for pid, size in memory_of(endpoint.processes("")).items():
                most[pid] = max(size, most.get(pid, 0))
            time.sleep(0.1)
        assert [one.result() for one in waiting] == [422] * 4
        grown = sum(size - before.get(pid, 0) for pid, size in most.items())
        assert grown < 400 * 2**20, f"{grown / 2**20:.0f} MiB"
