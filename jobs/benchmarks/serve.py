"""Measure the endpoint: against bulk scoring at the same load, idle, and overloaded.

python jobs/benchmarks/serve.py --model runs/bundle VIDEO... [--seconds 60 --rounds 2 --clients 4]

Starts `tsq serve`. In each round `--clients` clients upload the videos in a loop, then `tsq score`
scores them in bulk while the endpoint is idle; the fastest round of each side counts, because other
load can only slow a round down. Then the endpoint is measured with one client, two and `--clients`
(it is saturated by the fewest that reach 95 % of the best rate), under a flood of `--flood` times
`--clients`, with one client and with `--clients` right after it, in an open loop at three quarters
of its rate, and idle (its CPU time per second without a request). CPU time of HTTP and Serve is
that of everything but the sampler, the recogniser and the decoding processes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.benchmarks.support.s3 import free_ports
from jobs.benchmarks.support.timed import TimedCounts, counted_by, steady
from tsq_ray import scoring
from tsq_ray.manifest import assemble_manifest, write_manifest
from tsq_ray.runtime import cluster
from tsq_ray.runtime.session import Session
from tsq_ray.serving.bench import BenchPoint, cpu_seconds, measure_endpoint
from tsq_ray.serving.replicas import FlowCounts

_WORK = ("Sampler", "Recognizer", "decoding processes")
_START_S = 600.0


class TimedFlow(TimedCounts, FlowCounts):
    """Counts of a scoring run that record when each row was finished."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    options = _options(argv)
    with tempfile.TemporaryDirectory() as folder, _serving(options, Path(folder)) as (url, start_s):
        say = sys.stdout.write
        say(f"ready after {start_s:.0f} s\n\n| | videos/s | p50 s | p95 s | p99 s | answers | ")
        say("CPU ms | of that HTTP + Serve |\n")
        say("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |\n")

        def point(clients: int, name: str = "", seconds: float = options.seconds) -> BenchPoint:
            (found,) = measure_endpoint(url, options.videos, [clients], seconds=seconds).points
            say(_row(name or f"{clients} clients", found))
            sys.stdout.flush()
            return found

        point(options.clients, "warm-up", options.seconds / 4)
        http, bulk = [], []
        for turn in range(options.rounds):
            http.append(point(options.clients).ok_per_s)
            bulk.append(_bulk(options, Path(folder, f"round{turn}")))
            say(f"| bulk | {bulk[-1]:.2f} | | | | | | |\n")
        loads = sorted({1, 2, options.clients})
        ramp = measure_endpoint(url, options.videos, loads, seconds=options.seconds)
        for found in ramp.points:
            say(_row(f"{found.load:g} client{'s' * (found.load > 1)}", found))
        before = ramp.points[-1].ok_per_s
        flood = point(options.flood * options.clients).ok_per_s
        lone = point(1, "1 client right after", 1.0)
        last = point(options.clients)
        normal = (before + last.ok_per_s) / 2
        rate = round(0.75 * normal, 2)
        (spread,) = measure_endpoint(url, options.videos, [], [rate], options.seconds).points
        say(_row(f"{rate} requests/s", spread))
        idle = _idle_cpu_ms(url)
        say(f"\nHTTP / bulk: {max(http) / max(bulk):.2f}; ")
        say(f"saturated at {ramp.saturated_at:g} clients; ")
        say(f"{options.flood} times the clients: {flood / normal:.2f} of before and after; ")
        say(f"right after: {dict(lone.statuses)}\n")
        say(f"CPU ms per request at {options.clients} clients: {_by_process(last.cpu_ms)}\n")
        say(f"idle: {sum(idle.values()):.0f} ms CPU per second ({_by_process(idle)})\n")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", nargs="+", help="files to upload and to score")
    parser.add_argument("--model", required=True, help="the bundle")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--flood", type=int, default=6, help="factor on --clients for the overload")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bulk-videos", type=int, default=120, help="videos per bulk round")
    return parser.parse_args(argv)


@contextlib.contextmanager
def _serving(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, float]]:
    """Run `tsq serve` for the `with`; yield its URL and the seconds until it was ready."""
    port, metrics_port = free_ports(2, below=10000)
    command = [sys.executable, "-m", "tsq_ray", "serve", "--model", options.model]
    command += ["--port", str(port), "--set", f"serve.metrics_port={metrics_port}"]
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TSQ_TOKEN"}
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            while not _is_ready(url):
                assert process.poll() is None, (folder / "serve.log").read_text()
                assert time.monotonic() < started + _START_S, "the endpoint did not become ready"
                time.sleep(0.2)
            yield url, time.monotonic() - started
        finally:
            process.terminate()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz") as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def _bulk(options: argparse.Namespace, folder: Path) -> float:
    """Return the videos per second of bulk scoring in steady state."""
    copies = folder / "videos"
    copies.mkdir(parents=True)
    for number, video in zip(range(options.bulk_videos), itertools.cycle(options.videos)):
        (copies / f"{number}.mp4").symlink_to(Path(video).resolve())
    manifest_uri = str(folder / "manifest.parquet")
    write_manifest(assemble_manifest([str(copies)])[0], manifest_uri)
    session = Session(show_progress=False)
    with cluster.connect(session) as ray:
        counts = ray.remote(num_cpus=0)(TimedFlow).remote()
        with counted_by(counts):
            scoring.score(manifest_uri, options.model, str(folder / "out"), session=session)
        return steady(ray.get(counts.done_at.remote()), os.cpu_count() or 1)


def _row(name: str, found: BenchPoint) -> str:
    total = sum(found.cpu_ms.values())
    overhead = total - sum(found.cpu_ms.get(process, 0.0) for process in _WORK)
    answers = ", ".join(f"{count} x {status}" for status, count in found.statuses.items())
    latencies = [
        f"{value:.2f}" if value is not None else ""
        for value in (found.p50_s, found.p95_s, found.p99_s)
    ]
    cells = [name, f"{found.ok_per_s:.2f}", *latencies, answers, f"{total:.0f}", f"{overhead:.0f}"]
    return "| " + " | ".join(cells) + " |\n"


def _by_process(cpu_ms: Mapping[str, float]) -> str:
    largest = sorted(cpu_ms.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.0f}" for name, value in largest if value >= 1)


def _idle_cpu_ms(url: str, seconds: float = 30.0) -> Mapping[str, float]:
    """Return the CPU milliseconds per second of each process while the endpoint is idle."""
    before = cpu_seconds(url)
    time.sleep(seconds)
    after = cpu_seconds(url)
    return {name: 1000 * (after[name] - before.get(name, 0.0)) / seconds for name in after}


if __name__ == "__main__":
    sys.exit(main())
