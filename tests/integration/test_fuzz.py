"""Damaged files through the real sandbox: each gets its row in time and affects no other."""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.fuzz import MUTATIONS, mutated
from support.video import write_video

from tsq_ray import schema
from tsq_ray.config import DecodeConfig
from tsq_ray.decode import DecodedVideo, DecodePool, FrameSpec, VideoSource
from tsq_ray.manifest import VideoRef
from tsq_ray.rows import failed_row, identity_row, source_columns
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.folder import write_part

NUM_FRAMES, LIMIT_S, MARGIN_S = 8, 20.0, 2.0
SPECS = {"visual": FrameSpec(48)}
SENSIBLE = {
    "not_video",
    "truncated",
    "corrupt",
    "unsupported",
    "too_large",
    "timeout",
    "decoder_crash",
    "out_of_memory",
}
"""Error types that a damaged file may get; the others mean storage or a defect of ours."""


def write_damaged(files: list[Path], seed: int, folder: Path) -> VideoRef:
    name, data = mutated(files, seed)
    path = folder / name
    path.write_bytes(data)
    modified = datetime.fromtimestamp(os.stat(path).st_mtime, tz=timezone.utc)
    return VideoRef(f"{seed:016x}", str(path), len(data), None, modified, None, None)


def row_of(ref: VideoRef, outcome: object) -> dict[str, object]:
    if not isinstance(outcome, DecodedVideo):
        return failed_row(ref, outcome)  # type: ignore[arg-type]
    check_whole(outcome)
    features = {
        "visual": np.zeros((NUM_FRAMES, 2), np.float16),
        "object_ids": np.zeros((NUM_FRAMES, 10), np.int16),
    }
    features["object_probs"] = np.zeros((NUM_FRAMES, 10), np.float16)
    return (
        identity_row(ref)
        | source_columns(outcome)
        | features
        | {"frame_index": outcome.frame_index}
    )


def check_whole(video: DecodedVideo) -> None:
    """An ok row has all its frames in their places."""
    assert video.slots("visual").shape == (NUM_FRAMES, 48, 48, 3)
    assert 0 <= video.frame_index.min() <= video.frame_index.max() < video.source_num_frames
    assert np.isfinite(video.frame_pts_s).all()
    assert video.frame_pts_s.min() >= 0
    assert video.frame_pts_s.max() <= video.duration_s + 1e-3
    if video.source_num_frames >= NUM_FRAMES:
        assert (np.diff(video.frame_index) >= 0).all()
    assert video.width > 0
    assert video.height > 0
    assert video.codec


def decode_all(refs: list[VideoRef], strategy: str) -> list[dict[str, object]]:
    """One row per file; `seconds` is its cost, one file at a time."""
    rows = []
    with DecodePool(
        DecodeConfig.model_validate(
            {"strategy": strategy, "num_frames": NUM_FRAMES, "timeout_s": LIMIT_S}
        ),
        SPECS,
    ) as pool:
        for ref in refs:
            started = time.monotonic()
            (outcome,) = pool.decode([VideoSource.of(ref)])
            rows.append(row_of(ref, outcome) | {"seconds": time.monotonic() - started})
    return rows


def check_rows(rows: list[dict[str, object]], refs: list[VideoRef], folder: Path) -> None:
    """Every file has its row, every failure a fitting type, and the rows make a part."""
    assert [row["video_id"] for row in rows] == [ref.video_id for ref in refs]
    wrong = {
        row["uri"]: row["error_message"]
        for row in rows
        if row["status"] == "failed" and row["error_type"] not in SENSIBLE
    }
    assert wrong == {}
    late = {
        row["uri"]: row["seconds"]
        for row in rows
        if row["seconds"] > LIMIT_S + MARGIN_S  # type: ignore[operator]
    }
    assert late == {}, "a file may cost its time limit and two seconds"
    arrow = schema.features_schema(NUM_FRAMES, 2, None, None)
    table = schema.table_from_rows(
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows], arrow
    )
    name = write_part(str(folder), table, "zstd")
    done = read_part(str(folder / name))
    assert Counter(done["status"].to_pylist()) == Counter(str(row["status"]) for row in rows)
    assert pa.compute.count_distinct(table["video_id"]).as_py() == len(refs)


MADE = {
    "h264_b.mp4": {"b_frames": 3},
    "h264_open.mkv": {"open_gop": True},
    "h264.ts": {"b_frames": 2},
    "hevc.mp4": {"codec": "libx265"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
"""Files that the tests make, so that they run without the development data."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("made")
    return [write_video(folder / name, num_frames=30, **how) for name, how in MADE.items()]


@pytest.fixture(scope="module")
def real_files(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "formats").iterdir())


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
def test_a_sample_of_damaged_files(files: list[Path], tmp_path: Path, strategy: str) -> None:
    start = 1000 if strategy == "uniform" else 2000
    refs = [write_damaged(files, seed, tmp_path) for seed in range(start, start + 20)]
    check_rows(decode_all(refs, strategy), refs, tmp_path / "features")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
def test_damaged_files(real_files: list[Path], tmp_path: Path, strategy: str) -> None:
    """250 per strategy: 500 in all."""
    start = 0 if strategy == "uniform" else 250
    refs = [write_damaged(real_files, seed, tmp_path) for seed in range(start, start + 250)]
    rows = decode_all(refs, strategy)
    check_rows(rows, refs, tmp_path / "features")
    by_type = Counter(row.get("error_type") or "ok" for row in rows)
    assert len(by_type) >= 4, f"the damage is too tame: {by_type}"
    assert by_type["ok"] > 50, f"the damage is too wild: {by_type}"


def test_damage_is_the_same_every_time(files: list[Path]) -> None:
    for seed in range(len(MUTATIONS)):
        assert mutated(files, seed) == mutated(files, seed)
        assert mutated(files, seed)[1] != mutated(files, seed + len(MUTATIONS))[1]


@pytest.mark.parametrize("kind", ["files", pytest.param("real_files", marks=pytest.mark.data)])
def test_undamaged_files_are_never_failures(request: pytest.FixtureRequest, kind: str) -> None:
    """The counterpart for `internal` and similar errors: an intact file is ok."""
    with DecodePool(DecodeConfig(num_frames=NUM_FRAMES, timeout_s=60), SPECS) as pool:
        for path in request.getfixturevalue(kind):
            (outcome,) = pool.decode(
                [
                    VideoSource.of(
                        VideoRef("0" * 16, str(path), path.stat().st_size, None, None, None, None)
                    )
                ]
            )
            assert isinstance(outcome, DecodedVideo), outcome
            check_whole(outcome)
