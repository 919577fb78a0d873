"""Blocks of videos: the units in which Ray Data passes them to workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray.manifest import VideoRef, VideoRows

MAX_BLOCK_ROWS = 128
"""Maximum number of rows to recompute when a worker is lost."""
_BLOCKS_PER_WORKER = 8
_MAX_BLOCKS = 20_000
"""Blocks per execution: each costs the driver 9 kB, and delays the first by some milliseconds."""
T = TypeVar("T")


def executions(todo: Sequence[VideoRef], workers: int) -> Iterator[Any]:
    """Yield the videos to process as Ray datasets of manifest rows, the largest files first.

    A run of up to _MAX_BLOCKS blocks is a single dataset.
    """
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
        # from_blocks, because reading a file asks for a whole free CPU, which a small cluster full
        # of workers never has, and from_arrow sends each block to a task of its own to count its
        # rows, which takes three times as long and 50 kB per block
        data = ray.data.from_blocks(blocks)
        del table, blocks  # Ray's object store holds them
        yield data


def cut_blocks(sizes: np.ndarray, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Order videos of these sizes, the largest first, and cut the order into blocks.

    Returns the order and the bounds of the blocks in it. A block is what a worker takes at a time:
    at most MAX_BLOCK_ROWS videos and at most its share of the bytes, so that no worker ends up with
    all the large files.
    """
    order = np.argsort(-sizes, kind="stable")
    blocks = _BLOCKS_PER_WORKER * max(1, workers)
    rows = min(MAX_BLOCK_ROWS, -(-len(sizes) // blocks))
    ends = np.cumsum(sizes[order], dtype=np.float64)
    max_bytes = ends[-1] / blocks if len(ends) else 0.0
    bounds = [0]
    while (start := bounds[-1]) < len(sizes):
        before = ends[start - 1] if start else 0.0
        stop = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
        bounds.append(min(stop, start + rows, len(sizes)))
    return order, np.array(bounds)


def refs_of(table: pa.Table) -> list[VideoRef]:
    """Return the manifest rows of a batch."""
    return list(VideoRows(table))


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items, `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
