"""What is read of a part on S3, counted between the clients and the server."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.proxy import S3Proxy

from tsq_ray import schema, storage
from tsq_ray.config import OutputConfig
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, video_id
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import OK, read_done
from tsq_ray.runs.folder import write_part
from tsq_ray.runtime.parts import part_rows

FOLDER = "s3://tsq-other/part-reads"
DIM, VIDEOS = 1280, 10**7
TAIL_BYTES, ROW_BYTES = 40_000, 40
"""Upper bounds: of a part's footer with the answers around it, and of a row's ids and numbers."""


def features(num_frames: int) -> pa.Schema:
    return schema.features_schema(num_frames, DIM, ["a"])


def random_refs(count: int) -> list[VideoRef]:
    """Videos whose ids and etags compress no better than real ones."""
    refs = []
    for size in np.random.default_rng(0).integers(10**5, 10**9, count):
        uri = f"s3://tsq-videos/a/long/enough/name/{secrets.token_hex(6)}.mp4"
        refs.append(VideoRef(video_id(uri), uri, int(size), secrets.token_hex(16)))
    return refs


@pytest.mark.parametrize(
    ("arrow", "num_frames", "limit"),
    [
        (features(50), 50, 100_000),
        pytest.param(features(16), 16, 170_000, marks=pytest.mark.slow),
        (schema.predictions_schema(16, 3, ["a"]), 0, 450_000),
    ],
    ids=["features, T = 50", "features, T = 16", "predictions"],
)
def test_finished_videos_are_known_without_reading_the_rest(
    s3_proxy: S3Proxy, arrow: pa.Schema, num_frames: int, limit: int
) -> None:
    """A part of a run over ten million videos with the default settings."""
    folder = f"{FOLDER}/{secrets.token_hex(4)}"
    count = part_rows(arrow, OutputConfig(), VIDEOS)
    assert count > 1000
    refs, rng = random_refs(count), np.random.default_rng(0)
    rows: list[dict[str, Any]] = [vars(ref) | {"status": "ok", "warnings": []} for ref in refs]
    for row in rows if num_frames else ():
        visual = rng.standard_normal((num_frames, DIM), np.float32).astype(np.float16)
        places = np.arange(num_frames)
        row |= {"visual": visual, "frame_index": places, "frame_pts_s": places / 10}
    name = write_part(folder, schema.table_from_rows(rows, arrow), "zstd")
    size = storage.stat(f"{folder}/{name}").size_bytes
    s3_proxy.sent = 0
    done = read_done(folder, Manifest(VideoRows.of(refs), ["a"]))
    assert (len(done.rows), set(done.rows["flags"].tolist())) == (count, {OK})
    assert s3_proxy.sent < TAIL_BYTES + ROW_BYTES * count < limit
    s3_proxy.sent = 0
    assert read_done(folder, done.manifest, done).rows.tolist() == done.rows.tolist()
    assert s3_proxy.sent < 10_000, "a part that was read is not read again"
    s3_proxy.sent = 0
    assert read_part(f"{folder}/{name}", ["video_id", "status", "labels"]).num_rows == count
    assert s3_proxy.sent < limit + 100_000
    s3_proxy.sent = 0
    assert read_part(f"{folder}/{name}").num_rows == count
    assert s3_proxy.sent < 1.02 * size + 80_000
