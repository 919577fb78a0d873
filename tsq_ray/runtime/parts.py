"""Parts of the run folder: rows from Ray Data, collected and published."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import schema, storage
from tsq_ray.config import OutputConfig
from tsq_ray.errors import RunFailed, StorageError
from tsq_ray.rows import num_recognized
from tsq_ray.runs.folder import write_part
from tsq_ray.runtime.blocks import MAX_BLOCK_ROWS
from tsq_ray.runtime.metrics import PublishedPart
from tsq_ray.runtime.nodes import Pool

RETRIES: dict[str, int] = {"max_restarts": 100, "max_task_retries": 60}
"""Retry limits of a stage's workers.

By default Ray Data retries without limit, so a batch that always kills its worker would run
forever. A lost node uses up many retries: for the 10 to 30 s until Ray declares it dead, every task
sent to it is retried about once a second.
"""
STAGE_SECONDS = (DECODE_S, ENCODE_S, SAMPLE_S, RECOGNIZE_S) = (
    "_decode_s",
    "_encode_s",
    "_sample_s",
    "_recognize_s",
)
"""Columns that carry a row's seconds in each stage as far as `write_parts`, which drops them."""
FETCHED = "_fetched_bytes"
"""The same for the bytes read from storage."""
_BATCHES_PER_OUTPUT = 4
_MIN_PART_ROWS = 128
_PARTS_OF_LARGE_RUN = 1000
_OTHER_BYTES = 300
"""Size of a row without its tensors: URI, codec, numbers, warnings."""
_MIB = 2**20
AMOUNTS = (ROWS, VIDEO_S, SAMPLED, RECOGNIZED, *TOKENS) = (
    *("rows", "video_s", "sampled", "recognized"),
    *(column.name for column in schema.TOKENS),
)
"""Keys of the sums from `write_parts` that are not seconds of a stage: rows written, seconds of
footage in them, frames sampled and recognised in those that a recogniser saw, and the tokens that
its server counted."""
_ERROR, _WRITE, _VIDEOS, _BYTES, _READ = "error", "write", "videos", "bytes", "fetched"
_WRITE_WAITS_S = (5, 10, 20, 40)


def pool_options(pool: Pool) -> dict[str, Any]:
    """Return the `map_batches` arguments that run a stage on this pool."""
    import ray

    compute = ray.data.ActorPoolStrategy(
        min_size=pool.minimum, max_size=max(pool.limit, pool.minimum), initial_size=pool.start
    )
    options: dict[str, Any] = {
        "compute": compute,
        "num_cpus": pool.cpus,
        "memory": pool.memory,
        "batch_format": "pyarrow",
    }
    options |= {"num_gpus": pool.gpus} if pool.gpus else {}
    options |= {"label_selector": dict(pool.labels)} if pool.labels else {}
    return options | RETRIES


def row_bytes(arrow: pa.Schema) -> int:
    """Return the approximate size of a row of this schema in bytes, before compression."""
    total = _OTHER_BYTES
    for column in arrow:
        if isinstance(column.type, pa.FixedShapeTensorType):
            total += int(np.prod(column.type.shape)) * column.type.value_type.bit_width // 8
    return total


def part_rows(arrow: pa.Schema, output: OutputConfig, videos: int) -> int:
    """Return the rows per part: as `output` says, but at most a thousandth of a large run."""
    if output.rows_per_file:
        return output.rows_per_file
    fill = max(1, int(output.part_mb * _MIB / row_bytes(arrow)))
    return min(fill, max(_MIN_PART_ROWS, -(-videos // _PARTS_OF_LARGE_RUN)))


def limit_output_blocks(context: Any, arrow: pa.Schema, batch_size: int) -> None:
    """Make workers emit rows every few batches, even in the middle of a block."""
    context.target_max_block_size = max(
        1, _BATCHES_PER_OUTPUT * batch_size * row_bytes(arrow) * 9 // 10
    )


def transport_table(rows: Sequence[Mapping[str, Any]], arrow: pa.Schema, counts: Any) -> pa.Table:
    """Return rows of a run as a table that Ray Data does not alter, and report them to `counts`.

    Tensors become plain lists; STAGE_SECONDS hold the seconds that each row took, FETCHED the
    bytes.
    """
    counts.add_rows.remote(
        [row["video_id"] for row in rows], [row.get("error_type") for row in rows]
    )
    table = schema.to_storage(schema.table_from_rows(rows, arrow))
    for name in (*STAGE_SECONDS, FETCHED):
        table = table.append_column(
            pa.field(name, pa.float64()),
            pa.array([row.get(name) or 0.0 for row in rows], pa.float64()),
        )
    return table


def write_parts(
    data: Any,
    writers: Pool,
    out: str,
    arrow: pa.Schema,
    output: OutputConfig,
    rows: int,
    published: Callable[[PublishedPart], None] = lambda part: None,
) -> dict[str, float]:
    """Run a dataset of transport tables and publish its rows as parts of about `rows` rows.

    `published` is called for each part. Returns the sums of what WritePart returns. Raises
    RunFailed if a part cannot be written.
    """
    # a bundle of blocks may exceed `rows`: the larger batch size keeps the excess from becoming a
    # part of its own
    data = data.map_batches(
        WritePart,
        batch_size=rows + _BATCHES_PER_OUTPUT * MAX_BLOCK_ROWS,
        fn_constructor_args=(out, arrow, output.compression),
        **pool_options(writers),
    )
    # map_batches has no argument for the number of rows at which blocks are sent to a writer
    object.__setattr__(data._logical_plan.dag, "min_rows_per_bundled_input", rows)
    totals: dict[str, float] = {}
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in table.to_pylist():
            error, videos = row.pop(_ERROR), json.loads(row.pop(_VIDEOS))
            if error is not None:
                raise RunFailed(error)
            size, fetched = int(row.pop(_BYTES)), int(row.pop(_READ))
            for name, value in row.items():
                totals[name] = totals.get(name, 0.0) + value
            spent = {name: row[name] for name in row.keys() - {*AMOUNTS}}
            published(
                PublishedPart(videos, size, fetched, spent, {name: row[name] for name in TOKENS})
            )
    return totals


def _amounts(rows: pa.Table) -> dict[str, float]:
    """Return the AMOUNTS of some rows."""
    sampled = recognized = 0
    if "selected_slot" in rows.column_names:
        live = rows.filter(pc.is_valid(rows["selected_slot"]))
        frames = pc.list_value_length(live["frame_pts_s"]).to_pylist()
        sampled = sum(frames)
        recognized = sum(map(num_recognized, frames, live["selected_by"].to_pylist()))
    seconds = pc.sum(rows["duration_s"]).as_py() or 0.0
    known = [name for name in TOKENS if name in rows.column_names]
    tokens = [pc.sum(rows[name]).as_py() or 0 for name in known] or [0] * len(TOKENS)
    values = (len(rows), seconds, sampled, recognized, *tokens)
    return dict(zip(AMOUNTS, map(float, values), strict=True))


class WritePart:
    """Write rows as one part of the run folder, atomically."""

    def __init__(self, out: str, arrow: pa.Schema, compression: str) -> None:
        self.out, self.arrow, self.compression = out, arrow, compression

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write a transport table.

        Returns one row: seconds by stage, AMOUNTS, the number of videos by error type as JSON,
        their size in bytes, and a storage error, if any.

        The error is a column because Ray Data would strip an exception of its cause.
        """
        started = time.perf_counter()
        error = None
        try:
            self._publish(schema.from_storage(batch, self.arrow))
        except StorageError as failure:
            error = str(failure)
        sums = {
            name.strip("_").removesuffix("_s"): pc.sum(batch[name]).as_py()
            for name in STAGE_SECONDS
        }
        sums |= {_WRITE: time.perf_counter() - started} | _amounts(batch)
        sums[_BYTES] = float(pc.sum(batch["size_bytes"]).as_py() or 0)
        sums[_READ] = float(pc.sum(batch[FETCHED]).as_py() or 0)
        videos = Counter(error_type or "" for error_type in batch["error_type"].to_pylist())
        return pa.table(
            {name: pa.array([value]) for name, value in sums.items()}
            | {_VIDEOS: [json.dumps(videos)], _ERROR: pa.array([error], pa.string())}
        )

    def _publish(self, rows: pa.Table) -> None:
        """Write the part. Retries, so that a short outage of the bucket does not end the run."""
        for wait_s in () if storage.is_local(self.out) else _WRITE_WAITS_S:
            try:
                write_part(self.out, rows, self.compression)
                return
            except StorageError as error:
                if error.error_type != "unavailable":
                    raise
            time.sleep(wait_s)
        write_part(self.out, rows, self.compression)
