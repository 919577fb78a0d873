"""Measure an endpoint under load, from outside."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp
import numpy as np

from tsq_ray import storage
from tsq_ray.errors import ConfigError, RunFailed, StorageError
from tsq_ray.serving.access import is_loopback, read_token

_TIMEOUT_S = 600.0
_NEAR_BEST = 0.95
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class BenchPoint:
    """One measurement of an endpoint under load."""

    load: float
    """Clients at a time, or requests per second."""
    ok_per_s: float
    """Predictions per second."""
    p50_s: float | None
    """Median latency of the predictions, in seconds; None if there were none."""
    p95_s: float | None
    p99_s: float | None
    statuses: Mapping[str, int]
    """Answers by HTTP status; requests without an answer by error name."""
    cpu_ms: Mapping[str, float]
    """CPU milliseconds per prediction by process; empty if the endpoint is on another machine."""


@dataclass(frozen=True)
class BenchSummary:
    """What `tsq bench` measured."""

    by: Literal["clients", "rate"]
    points: tuple[BenchPoint, ...]
    best_ok_per_s: float
    saturated_at: float
    """The smallest load with at least 95 % of the best predictions per second."""


def numbers(option: str, text: str) -> list[float]:
    """Parse a list of numbers such as "1,2,4". Raises ConfigError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if option == "--clients" and any(value % 1 for value in found if math.isfinite(value)):
        raise ConfigError(f"{option} {text!r}: expected whole numbers, for example 1,2,4")
    if not found or not all(0 < value < math.inf for value in found):
        raise ConfigError(f"{option} {text!r}: expected numbers above 0, for example 1,2,4")
    return found


def measure_endpoint(
    url: str,
    videos: Sequence[str],
    clients: Sequence[float],
    rates: Sequence[float] | None = None,
    seconds: float = 20.0,
) -> BenchSummary:
    """Upload the videos in turn and measure the answers, for each number of clients or each rate.

    Closed loop: each client sends its next request when it has its answer. Open loop (`rates`, per
    second): requests are sent without waiting for answers. If the endpoint is on this machine, the
    CPU time of its processes is measured too. Raises ConfigError for a file that cannot be read,
    RunFailed if the endpoint is not ready.
    """
    try:
        bodies = [storage.read_bytes(storage.normalize(video)) for video in videos]
    except StorageError as error:
        raise ConfigError(str(error)) from None
    return asyncio.run(_measure(url.rstrip("/"), bodies, clients, rates, seconds))


async def _measure(
    url: str,
    bodies: Sequence[bytes],
    clients: Sequence[float],
    rates: Sequence[float] | None,
    seconds: float,
) -> BenchSummary:
    headers = {"Content-Type": "video/mp4"}
    if token := read_token():
        headers["Authorization"] = f"Bearer {token}"
    async with aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
    ) as session:
        await _check_ready(session, url)
        points = []
        for load in rates if rates is not None else clients:
            run = _Run(session, f"{url}/v1/score", itertools.cycle(bodies), seconds)
            points.append(await (run.open(load) if rates is not None else run.closed(int(load))))
    best = max(point.ok_per_s for point in points)
    saturated = next(point.load for point in points if point.ok_per_s >= _NEAR_BEST * best)
    return BenchSummary("clients" if rates is None else "rate", tuple(points), best, saturated)


async def _check_ready(session: aiohttp.ClientSession, url: str) -> None:
    try:
        async with session.get(f"{url}/readyz") as response:
            if response.status == 200:
                return
            why = f"HTTP {response.status}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        why = str(error)
    raise RunFailed(f"{url}: the endpoint is not ready ({why}); start it with: tsq serve")


@dataclass
class _Run:
    """One measurement."""

    session: aiohttp.ClientSession
    url: str
    bodies: Iterator[bytes]
    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    async def closed(self, clients: int) -> BenchPoint:
        """Have each client send its next request when it has its answer."""
        started, before = time.monotonic(), cpu_seconds(self.url)
        await asyncio.gather(*(self._client(started + self.seconds) for _ in range(clients)))
        return self._point(float(clients), started, before)

    async def _client(self, end: float) -> None:
        while time.monotonic() < end:
            await self._ask()

    async def open(self, rate: float) -> BenchPoint:
        """Send `rate` requests per second."""
        started, before = time.monotonic(), cpu_seconds(self.url)
        sent = []
        for number in range(max(1, round(rate * self.seconds))):
            await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            sent.append(asyncio.create_task(self._ask()))
        await asyncio.gather(*sent)
        return self._point(rate, started, before)

    async def _ask(self) -> None:
        started = time.monotonic()
        try:
            async with self.session.post(self.url, data=next(self.bodies)) as response:
                await response.read()
                status = str(response.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            status = type(error).__name__
        self.statuses[status] += 1
        if status == "200":
            self.latencies.append(time.monotonic() - started)

    def _point(self, load: float, started: float, before: dict[str, float]) -> BenchPoint:
        took = time.monotonic() - started
        after, answered = cpu_seconds(self.url), max(1, len(self.latencies))
        spent = {name: after[name] - before.get(name, 0.0) for name in after}
        p50, p95, p99 = (
            np.percentile(self.latencies, [50, 95, 99]).tolist() if self.latencies else [None] * 3
        )
        return BenchPoint(
            load=load,
            ok_per_s=len(self.latencies) / took,
            p50_s=p50,
            p95_s=p95,
            p99_s=p99,
            statuses=dict(self.statuses),
            cpu_ms={name: 1000 * value / answered for name, value in spent.items() if value > 0},
        )


def cpu_seconds(url: str) -> dict[str, float]:
    """Return the CPU seconds of the endpoint's processes by name; empty if it is elsewhere."""
    host = url.partition("://")[2].partition("/")[0].rpartition(":")[0].strip("[]")
    if not is_loopback(host):
        return {}
    found: dict[str, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        name = process_name(line)
        if name is not None:
            spent = (int(fields[11]) + int(fields[12])) / _TICKS
            found[name] = found.get(name, 0.0) + spent
    return found


def process_name(line: str) -> str | None:
    """Return the name under which a process of an endpoint is counted, from its command line."""
    if line.startswith("ray::"):
        # the title also names the method that an actor runs at the moment
        return line.split()[0].removeprefix("ray::").rpartition(":")[2].partition(".")[0]
    program = os.path.basename(line.partition(" ")[0])
    if "tsq_ray.decode.sandbox" in line:
        return "decoding processes"
    return program if program in ("raylet", "gcs_server", "haproxy") else None
