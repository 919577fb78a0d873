"""What is read of a part on S3, counted between the clients and the server."""

from __future__ import annotations

import numpy as np
from support.proxy import S3Proxy

from tsq_ray import schema, storage
from tsq_ray.manifest import Manifest, VideoRef, VideoRows
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import OK, read_done
from tsq_ray.runs.folder import write_part

FOLDER = "s3://tsq-other/part-reads"
ROWS, NUM_FRAMES, DIM = 128, 50, 1280


def test_finished_videos_are_known_without_reading_the_features(s3_proxy: S3Proxy) -> None:
    rng = np.random.default_rng(0)
    refs = [
        VideoRef(
            f"{i:016x}", f"s3://tsq-videos/a/long/enough/name/{i:08}.mp4", 10**6 + i, f"{i:032x}"
        )
        for i in range(ROWS)
    ]
    rows = [
        vars(ref)
        | {
            "status": "ok",
            "warnings": [],
            "visual": rng.standard_normal((NUM_FRAMES, DIM)).astype(np.float16),
        }
        | {"frame_index": np.arange(NUM_FRAMES), "frame_pts_s": np.arange(NUM_FRAMES) / 10}
        for ref in refs
    ]
    name = write_part(
        FOLDER, schema.table_from_rows(rows, schema.features_schema(NUM_FRAMES, DIM, ["a"])), "zstd"
    )
    size = storage.stat(f"{FOLDER}/{name}").size_bytes
    assert size > 10_000_000
    s3_proxy.sent = 0
    done = read_done(FOLDER, Manifest(VideoRows.of(refs), ["a"]))
    assert (len(done.rows), done.rows["flags"].tolist()) == (ROWS, [OK] * ROWS)
    assert s3_proxy.sent < 100_000
    s3_proxy.sent = 0
    assert read_done(FOLDER, done.manifest, done).rows.tolist() == done.rows.tolist()
    assert s3_proxy.sent < 10_000, "a part that was read is not read again"
    s3_proxy.sent = 0
    assert read_part(f"{FOLDER}/{name}", ["video_id", "status", "labels"]).num_rows == ROWS
    assert s3_proxy.sent < 200_000
    s3_proxy.sent = 0
    assert read_part(f"{FOLDER}/{name}").num_rows == ROWS
    assert s3_proxy.sent < 1.02 * size
