"""The endpoint as a process of its own, asked over HTTP."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.benchmarks.support.s3 import free_ports
from support.cluster import Driver, marked, titled

TOKEN = "correct-horse-battery"
START_S, ANSWER_S, END_S = 300.0, 120.0, 60.0
VIDEO = {"Content-Type": "video/mp4"}
TIMES = {"decode_ms", "sample_ms", "recognize_ms"}
SOURCE = {"video_id", "uri", "size_bytes", "etag", "modified"}
NOT_ANSWERED = {"labels", "split"}
CLOSE = 1e-6
_CLOSE = dict.fromkeys(("scores", "top_scores"), CLOSE) | {
    "saliency_visual": 1e-5,  # not between 0 and 1
    "saliency_textual": 1e-5,
}


@dataclass
class Endpoint:
    """A running server and a client that has its token."""

    driver: Driver
    url: str
    client: httpx.Client
    folder: Path
    """The server's TMPDIR."""
    metrics_url: str = ""
    model: str = ""
    """The bundle."""

    def score(self, **request: Any) -> httpx.Response:
        if "content" in request:
            request = {"headers": VIDEO} | request
        return self.client.post("/v1/score", **request)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/readyz").status_code == 200
        return False

    def processes(self, title: str) -> list[int]:
        """The server's processes whose command line contains `title`."""
        return titled(self.driver.mark, title)

    def answers_again(self, status: int = 200, **request: Any) -> httpx.Response:
        """Ask until the answer has this status."""
        deadline, others = time.monotonic() + ANSWER_S, Counter[int]()
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = self.score(**request)
                if response.status_code == status:
                    return response
                others[response.status_code] += 1
            assert time.monotonic() < deadline, f"no answer {status}, but {others}"
            time.sleep(0.2)


@contextlib.contextmanager
def running(
    argv: list[str],
    port: int,
    folder: Path,
    environment: Mapping[str, str],
    token: str | None,
    **how: Any,
) -> Iterator[Endpoint]:
    """Run a server for the `with` block, from the moment that it is ready."""
    (folder / "tmp").mkdir(parents=True)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"http://127.0.0.1:{port}"
    with (
        Driver(
            argv, folder / "serve", {"TMPDIR": str(folder / "tmp"), **environment}, **how
        ) as driver,
        httpx.Client(base_url=url, headers=headers, timeout=ANSWER_S, trust_env=False) as client,
    ):
        endpoint = Endpoint(driver, url, client, folder / "tmp")
        deadline = time.monotonic() + START_S
        while not endpoint.is_ready():
            assert driver.process.poll() is None, f"the endpoint ended: {driver.ended()}"
            assert time.monotonic() < deadline, "the endpoint does not become ready"
            time.sleep(0.2)
        yield endpoint


@contextlib.contextmanager
def serving(
    bundle: str, folder: Path, *settings: str, token: str | None = None, **environment: str
) -> Iterator[Endpoint]:
    """Run `tsq serve` for the `with` block."""
    port, metrics_port = free_ports(2, below=10000)
    argv = ["serve", "--model", bundle, "--port", str(port)]
    for setting in (f"serve.metrics_port={metrics_port}", *settings):
        argv += ["--set", setting]
    environment = {"TSQ_TOKEN": token or "", **environment}
    with running(argv, port, folder, environment, token) as endpoint:
        endpoint.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        endpoint.model = bundle
        yield endpoint


def is_ended(endpoint: Endpoint) -> None:
    """Assert that none of the server's processes is left."""
    deadline = time.monotonic() + END_S
    while left := marked(endpoint.driver.mark):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)


def same_answer(answer: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Every column except times and the source of the bytes."""
    assert answer.keys() - TIMES - {"model"} == row.keys() - TIMES - NOT_ANSWERED
    for name in row.keys() - TIMES - SOURCE - NOT_ANSWERED:
        value = row[name].tolist() if hasattr(row[name], "tolist") else row[name]
        if name in _CLOSE:
            assert answer[name] == pytest.approx(value, abs=_CLOSE[name]), name
        else:
            assert answer[name] == value, name


def memory_of(pids: list[int]) -> dict[int, int]:
    """Resident bytes that belong to each process alone or to the files that it maps."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            found[pid] = pages * os.sysconf("SC_PAGE_SIZE")
    return found


def private_memory_of(pids: list[int]) -> dict[int, int]:
    """Resident bytes of each process that are neither files nor shared memory."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            found[pid] = int(status.partition("RssAnon:")[2].split()[0]) * 1024
    return found


class Load:
    """Clients that ask in a loop, and all their answers; None for one that did not come."""

    def __init__(self, ask: Callable[[], httpx.Response], clients: int) -> None:
        self.ask = ask
        self.answers: list[tuple[float, httpx.Response | None]] = []
        """When each answer came, by the monotonic clock."""
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(clients)
        self.running: list[Future[None]] = [self.pool.submit(self._client) for _ in range(clients)]

    def _client(self) -> None:
        while not self.stop.is_set():
            try:
                answer = self.ask()
            except httpx.TransportError:
                answer = None
            self.answers.append((time.monotonic(), answer))

    def wait_until(self, wanted: Callable[[httpx.Response | None], bool]) -> None:
        """Wait for an answer that is `wanted`."""
        deadline = time.monotonic() + START_S
        while not any(wanted(answer) for _, answer in list(self.answers)):
            assert time.monotonic() < deadline, "the answer did not come"
            time.sleep(0.1)

    def wait_for(self, count: int) -> None:
        """Wait until there are so many more answers."""
        wanted, deadline = len(self.answers) + count, time.monotonic() + ANSWER_S
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, "too few answers"
            time.sleep(0.1)

    def ended(self) -> list[httpx.Response | None]:
        """Stop asking and return the answers."""
        self.stop.set()
        for running in self.running:
            running.result(ANSWER_S)
        self.pool.shutdown()
        return [answer for _, answer in self.answers]
