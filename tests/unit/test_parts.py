"""Blocks of videos and the sizes of parts: arithmetic, without Ray."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.archive import CLASSES
from support.bundle import NUM_FRAMES
from support.evaluate import feature_row

from tsq_ray import schema
from tsq_ray.config import OutputConfig
from tsq_ray.runtime.blocks import MAX_BLOCK_ROWS, cut_blocks
from tsq_ray.runtime.parts import limit_output_blocks, part_rows

_SIZES: dict[str, list[int]] = {
    "none": [],
    "one": [7],
    "alike": [5] * 1000,
    "one is huge": [1] * 999 + [10**9],
    "nothing is known of the sizes": [0] * 300,
    "many": list(range(50_000)),
}


@pytest.mark.parametrize("workers", [1, 2, 64, 3200])
@pytest.mark.parametrize("sizes", _SIZES.values(), ids=_SIZES.keys())
def test_blocks_hold_each_video_once_the_largest_first(sizes: list[int], workers: int) -> None:
    order, bounds = cut_blocks(np.array(sizes, np.int64), workers)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert [sizes[number] for number in order] == sorted(sizes, reverse=True)
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    rows = np.diff(bounds)
    assert ((rows >= 1) & (rows <= MAX_BLOCK_ROWS)).all()


def test_a_few_videos_are_shared_out_among_all_workers() -> None:
    assert np.diff(cut_blocks(np.full(18, 10), 2)[1]).tolist() == [1] * 18


def test_a_huge_video_is_a_block_of_its_own() -> None:
    order, bounds = cut_blocks(np.array([1] * 999 + [10**9]), 1)
    assert order[0] == 999
    assert bounds[1] == 1


@pytest.mark.parametrize(
    ("videos", "output", "rows"),
    [
        (300, {}, 128),  # the minimum
        (10_000_000, {}, 1026),  # 128 MiB of 50 x 1280 float16
        (200_000, {}, 200),  # a thousandth of a large run
        (10_000_000, {"part_mb": 64}, 513),
        (300, {"rows_per_file": 5}, 5),
    ],
)
def test_rows_of_a_part(videos: int, output: dict[str, float], rows: int) -> None:
    arrow = schema.features_schema(50, 1280, ["a"], None, 10)
    assert part_rows(arrow, OutputConfig.model_validate(output), videos) == rows


def test_a_worker_passes_rows_on_by_the_fourth_batch() -> None:
    """Ray Data passes a block on once it holds more than the target."""
    dim, batch = 1280, 8
    arrow = schema.features_schema(NUM_FRAMES, dim, CLASSES, len(CLASSES))
    rows = [feature_row(f"{seed}", "train", 0, dim, seed) for seed in range(batch)]
    size = schema.to_storage(schema.table_from_rows(rows, arrow)).nbytes
    context = SimpleNamespace(target_max_block_size=128 * 2**20)
    limit_output_blocks(context, arrow, batch)
    assert 3 * size < context.target_max_block_size < 4 * size
