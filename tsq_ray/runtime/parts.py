"""Blocks of videos for Ray Data, and the parts of the run folder that its last stage writes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import runs, schema, storage
from tsq_ray.config import OutputConfig
from tsq_ray.errors import RunFailed, StorageError
from tsq_ray.manifest import VideoRef, VideoRows
from tsq_ray.runtime.nodes import Pool

RETRIES: dict[str, int] = {"max_restarts": 100, "max_task_retries": 60}
"""Of a stage's workers. Ray Data's own are endless: a batch that kills its worker each time would never end the run.

A lost node takes many: until Ray believes that it is gone, 10 to 30 s, every task sent to it is tried again about once a second.
"""
STAGE_SECONDS = (DECODE_S, ENCODE_S, SAMPLE_S, RECOGNIZE_S) = (
    "_decode_s",
    "_encode_s",
    "_sample_s",
    "_recognize_s",
)
"""Columns that carry a row's seconds in each stage up to `write_parts`; they are not written."""
MAX_BLOCK_ROWS = 128
"""What a lost worker does again at most."""
_BLOCKS_PER_WORKER = 16
_MAX_BLOCKS = 20_000
"""Of one execution: each costs the driver 9 kB, and some milliseconds before the first one runs."""
_HAND_ON_BATCHES = 4
_MIN_PART_ROWS = 128
_PARTS_OF_LARGE_RUN = 1000
_OTHER_BYTES = 300
"""Of a row without its tensors: URI, codec, numbers, warnings."""
_MIB = 2**20
T = TypeVar("T")
ROWS = "rows"
"""Among what `write_parts` sums up: the rows that were written."""
_ERROR, _WRITE = "error", "write"
_WRITE_WAITS_S = (5, 10, 20, 40)


def pool_options(pool: Pool) -> dict[str, Any]:
    """Arguments of `map_batches` that run a stage as this pool."""
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
    return options | ({"num_gpus": pool.gpus} if pool.gpus else {}) | RETRIES


def executions(todo: Sequence[VideoRef], workers: int) -> Iterator[Any]:
    """The videos to do as Ray datasets of manifest rows, the largest files first; mostly one."""
    import ray

    rows = VideoRows.of(todo)
    order, bounds = cut_blocks(pc.fill_null(rows.table["size_bytes"], 0).to_numpy(), workers)
    for first in range(0, len(bounds) - 1, _MAX_BLOCKS):
        ends = bounds[first : first + _MAX_BLOCKS + 1]
        table = rows.take(order[ends[0] : ends[-1]]).table.replace_schema_metadata(None)
        blocks = [
            table.slice(start - ends[0], end - start)
            for start, end in itertools.pairwise(ends.tolist())
        ]
        # Not read from a file: reading asks for a whole free CPU, which a small cluster full of workers never has. And not by
        # `from_arrow`: that sends each block to a task of its own to count its rows, three times the time and 50 kB a block.
        data = ray.data.from_blocks(blocks)
        del table, blocks  # they are in Ray's object store now
        yield data


def cut_blocks(sizes: np.ndarray, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which videos of these sizes are done, the largest first, and the bounds of the blocks in it.

    A block is what a worker takes at a time. It has at most MAX_BLOCK_ROWS videos and, so that
    nobody is left alone with all the large files, at most its share of the bytes.
    """
    order = np.argsort(-sizes, kind="stable")
    blocks = _BLOCKS_PER_WORKER * max(1, workers)
    rows = min(MAX_BLOCK_ROWS, -(-len(sizes) // blocks))
    ends = np.cumsum(sizes[order], dtype=np.float64)
    most = ends[-1] / blocks if len(ends) else 0.0
    bounds = [0]
    while (start := bounds[-1]) < len(sizes):
        before = ends[start - 1] if start else 0.0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        bounds.append(min(stop, start + rows, len(sizes)))
    return order, np.array(bounds)


def row_bytes(arrow: pa.Schema) -> int:
    """Bytes of a row of this schema before compression, nearly."""
    total = _OTHER_BYTES
    for column in arrow:
        if isinstance(column.type, pa.FixedShapeTensorType):
            total += int(np.prod(column.type.shape)) * column.type.value_type.bit_width // 8
    return total


def part_rows(arrow: pa.Schema, output: OutputConfig, videos: int) -> int:
    """Rows of a part: what `output` asks for, and of a large run no more than a thousandth."""
    if output.rows_per_file:
        return output.rows_per_file
    fill = max(1, int(output.part_mb * _MIB / row_bytes(arrow)))
    return min(fill, max(_MIN_PART_ROWS, -(-videos // _PARTS_OF_LARGE_RUN)))


def hand_on_after(context: Any, arrow: pa.Schema, batch_size: int) -> None:
    """Let workers hand rows on after a few batches, whatever they have to do yet."""
    context.target_max_block_size = max(
        1, _HAND_ON_BATCHES * batch_size * row_bytes(arrow) * 9 // 10
    )


def refs_of(table: pa.Table) -> list[VideoRef]:
    """Manifest rows of a batch."""
    return list(VideoRows(table))


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items, `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def transport_table(rows: Sequence[Mapping[str, Any]], arrow: pa.Schema, counts: Any) -> pa.Table:
    """Rows of a run as a table that Ray Data leaves alone: tensors as plain lists, and the seconds that each row took. `counts` counts them."""
    counts.add.remote([row.get("error_type") for row in rows])
    table = schema.to_storage(schema.table_from_rows(rows, arrow))
    for name in STAGE_SECONDS:
        table = table.append_column(
            pa.field(name, pa.float64()),
            pa.array([row.get(name) or 0.0 for row in rows], pa.float64()),
        )
    return table


def write_parts(
    data: Any, writers: Pool, out: str, arrow: pa.Schema, output: OutputConfig, rows: int
) -> dict[str, float]:
    """Run a dataset of transport tables and publish its rows as parts of about `rows` rows; sums of what WritePart returns."""
    # a batch is all that a writer is given, so that what is above `rows` makes no part of its own
    data = data.map_batches(
        WritePart,
        batch_size=rows + _HAND_ON_BATCHES * MAX_BLOCK_ROWS,
        fn_constructor_args=(out, arrow, output.compression),
        **pool_options(writers),
    )
    # no argument of map_batches says from how many rows on blocks are given to a writer
    object.__setattr__(data._logical_plan.dag, "min_rows_per_bundled_input", rows)
    totals: dict[str, float] = {}
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        for message in table[_ERROR].drop_null().to_pylist():
            raise RunFailed(message)
        for name in table.drop_columns(_ERROR).column_names:
            totals[name] = totals.get(name, 0.0) + pc.sum(table[name]).as_py()
    return totals


class WritePart:
    """Rows -> one part of the run folder, whole or not at all."""

    def __init__(self, out: str, arrow: pa.Schema, compression: str) -> None:
        self.out, self.arrow, self.compression = out, arrow, compression

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Transport table -> one row of seconds by stage, with what storage said where it failed: an exception would lose its cause on the way."""
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
        sums |= {_WRITE: time.perf_counter() - started, ROWS: float(len(batch))}
        return pa.table(
            {name: pa.array([value]) for name, value in sums.items()}
            | {_ERROR: pa.array([error], pa.string())}
        )

    def _publish(self, rows: pa.Table) -> None:
        """A bucket that is away for a moment must not cost the rows that are made, and with them the run."""
        for wait_s in () if storage.is_local(self.out) else _WRITE_WAITS_S:
            try:
                runs.write_part(self.out, rows, self.compression)
                return
            except StorageError as error:
                if error.error_type != "unavailable":
                    raise
            time.sleep(wait_s)
        runs.write_part(self.out, rows, self.compression)
