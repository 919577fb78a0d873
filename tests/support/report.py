"""A small predictions folder for tests of report and export: tiny videos, handwritten rows."""

from __future__ import annotations

import colorsys
import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsq_ray import schema
from tsq_ray.config import Config, validate_config
from tsq_ray.decode import FrameSpec, VideoSource, decode_video

NUM_FRAMES = 8
BUDGET = 3
FPS = 10
CLASSES = ["cook", "swim", "</script><img src=x>", "=1+1"]
HOSTILE_NAME = "<script>alert(1)<script>&\"'.mp4"
SECRET = "https://store.example/v.mp4?X-Amz-Signature=0123456789abcdef"
SALIENCY_VISUAL = [0.02, 0.1, 0.55, 0.2, 0.05, 0.03, 0.03, 0.02]
SALIENCY_TEXTUAL = [0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.45, 0.05]


def make_video(path: Path, num_frames: int, width: int = 96, height: int = 72) -> Path:
    """A video whose colour and bar move with time."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            picture = np.full(
                (height, width, 3),
                [int(255 * c) for c in colorsys.hsv_to_rgb(i / num_frames, 0.6, 0.8)],
                np.uint8,
            )
            at = i * (width - 8) // num_frames
            picture[:, at : at + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def video_id(number: int) -> str:
    return f"{number:016x}"


def settings(num_frames: int = NUM_FRAMES) -> Config:
    return validate_config({"decode": {"num_frames": num_frames}, "sampler": {"budget": BUDGET}})


def failed_row(number: int, uri: str, error_type: str, message: str) -> dict[str, Any]:
    return {
        "video_id": video_id(number),
        "uri": uri,
        "size_bytes": 10,
        "status": "failed",
        "error_type": error_type,
        "error_message": message,
        "warnings": [],
    }


def ok_row(
    number: int, path: Path, scores: list[float], labels: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    """The row of scoring `path`, with these scores (in the order of CLASSES) and labels."""
    source = VideoSource(uri=str(path))
    specs = {"any": FrameSpec(size=16, resize="squash", interpolation="bilinear")}
    video = decode_video(source, settings().decode, specs)
    best = np.argsort(scores)[::-1]
    slots = (
        [2, 3, 6]
        if video.source_num_frames >= NUM_FRAMES
        else list(range(min(BUDGET, video.source_num_frames)))
    )
    by = ["visual", "visual", "textual"][: len(slots)]
    return {
        "video_id": video_id(number),
        "uri": str(path),
        "size_bytes": path.stat().st_size,
        "modified": datetime.fromtimestamp(path.stat().st_mtime, tz=timezone.utc),
        "label_names": labels,
        "status": "ok",
        "warnings": [],
        "duration_s": video.duration_s,
        "fps": video.fps,
        "width": video.width,
        "height": video.height,
        "codec": video.codec,
        "source_num_frames": video.source_num_frames,
        "frame_pts_s": video.frame_pts_s,
        "top_labels": [CLASSES[c] for c in best],
        "top_scores": [scores[c] for c in best],
        "scores": scores,
        "selected_slot": slots,
        "selected_index": [int(video.frame_index[slot]) for slot in slots],
        "selected_pts_s": [float(video.frame_pts_s[slot]) for slot in slots],
        "selected_by": by,
        "saliency_visual": SALIENCY_VISUAL,
        "saliency_textual": SALIENCY_TEXTUAL,
        "decode_ms": 20.0,
        "sample_ms": 30.0,
        "recognize_ms": 5.0,
        **more,
    }


def write_run(
    folder: Path,
    rows: list[dict[str, Any]],
    with_scores: bool = True,
    from_server: bool = False,
    **run: Any,
) -> Path:
    """Publish rows in two parts and `_run.json`.

    `run` replaces its keys; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = schema.predictions_schema(NUM_FRAMES, len(CLASSES), CLASSES, with_scores, from_server)
    half = (len(rows) + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        if part:
            pq.write_table(
                schema.table_from_rows(part, wanted), folder / f"part-{number:04d}.parquet"
            )
    failed = sum(row["status"] == "failed" for row in rows)
    content = {
        "format": 1,
        "kind": "predictions",
        "status": "complete",
        "counts": {"inputs": len(rows), "ok": len(rows) - failed, "failed": failed, "skipped": 0},
        "config": settings().model_dump(mode="json"),
        "bundle_classes": CLASSES,
        "model": "/models/kitchen",
        "ended": "2026-01-02T03:04:05+00:00",
        "versions": {"tsq-ray": "0.1", "torch": "2.9"},
    } | run
    (folder / "_run.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )
    return folder


@dataclass
class Case:
    """The folder, its rows, and the videos by name."""

    folder: Path
    rows: list[dict[str, Any]]
    videos: dict[str, Path] = field(default_factory=dict)


def make_case(folder: Path, with_scores: bool = True, **run: Any) -> Case:
    """Nine videos, numbered by their ids.

    1, 4, 5 are right (4 has two frames, 5 is gone), 2 and 3 wrong, 6 and 7 lack a label of the
    bundle, 8 and 9 failed.
    """
    videos = folder / "videos"
    videos.mkdir(parents=True)
    made = {
        "right": make_video(videos / "right.mp4", 40),
        "hostile": make_video(videos / HOSTILE_NAME, 30, width=64, height=96),
        "multi": make_video(videos / "multi.mp4", 30),
        "few": make_video(videos / "few.mp4", 2),
        "gone": make_video(videos / "gone.mp4", 20),
        "plain": make_video(videos / "plain.mp4", 25),
        "foreign": make_video(videos / "foreign.mp4", 25),
    }
    rows = [
        ok_row(1, made["right"], [0.1, 0.7, 0.1, 0.1], ["swim"]),
        ok_row(2, made["hostile"], [0.1, 0.1, 0.75, 0.05], ["cook"]),
        ok_row(3, made["multi"], [0.3, 0.2, 0.1, 0.4], ["cook", "swim"]),
        ok_row(4, made["few"], [0.6, 0.2, 0.1, 0.1], ["cook"], warnings=["3 of 8 frames missing"]),
        ok_row(5, made["gone"], [0.1, 0.6, 0.2, 0.1], ["swim"]),
        ok_row(6, made["plain"], [0.9, 0.05, 0.03, 0.02], warnings=["5 of 8 frames missing"]),
        ok_row(7, made["foreign"], [0.2, 0.5, 0.2, 0.1], ["juggle"]),
        failed_row(8, str(videos / "notes.txt"), "not_video", "no video stream in notes.txt"),
        failed_row(9, SECRET, "access_denied", f"cannot open {SECRET}: access denied"),
    ]
    made["gone"].unlink()
    return Case(write_run(folder / "predictions", rows, with_scores, **run), rows, made)


def write_large_run(folder: Path, num_parts: int, rows_per_part: int, num_classes: int) -> Path:
    """A predictions folder of made-up rows.

    1 in 10 failed, 2 in 3 of the others are labelled, a few have a warning or a label that the
    bundle lacks.
    """
    folder.mkdir(parents=True)
    classes = [f"class {number}" for number in range(num_classes)]
    for number in range(num_parts):
        part = _large_part(number, rows_per_part, classes)
        pq.write_table(part, folder / f"part-{number:05d}.parquet", compression="none")
    config = settings().model_dump(mode="json")
    content = {
        "format": 1,
        "kind": "predictions",
        "status": "complete",
        "config": config,
        "identity": {"sampler": config["sampler"]},
        "bundle_classes": classes,
        "model": {"uri": "/models/kitchen", "sha256": "0" * 64},
    }
    (folder / "_run.json").write_text(json.dumps(content))
    return folder


def _large_part(number: int, count: int, classes: list[str]) -> pa.Table:
    rng = np.random.default_rng(number)
    names = pa.array(classes)
    scores = rng.random((count, len(classes)), np.float32).round(3)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : schema.TOP_LABELS]
    top = np.take_along_axis(scores, best, axis=1)
    failed = rng.random(count) < 0.1
    labels = [
        [
            classes[best[row, 0] if rng.random() < 0.5 else row % len(classes)],
            *(["juggle"] if row % 50 == 0 else []),
        ]
        if row % 3
        else None
        for row in range(count)
    ]
    ids = rng.integers(0, 2**63, count)
    slots = np.tile(np.array([2, 3, 6], np.int32), count)
    wanted = schema.predictions_schema(NUM_FRAMES, len(classes), classes)
    columns: dict[str, Any] = {
        "video_id": [f"{value:016x}" for value in ids],
        "uri": [f"/archive/{value % 1000:03d}/video-{value:020d}.mp4" for value in ids],
        "size_bytes": ids,
        "label_names": labels,
        "status": np.where(failed, "failed", "ok"),
        "error_type": [
            ["timeout", "corrupt", "not_found"][row % 3] if bad else None
            for row, bad in enumerate(failed)
        ],
        "error_message": [
            f"failed after {row % 7} s" if bad else None for row, bad in enumerate(failed)
        ],
        "warnings": [
            [f"{row % 9} of 8 frames missing"] if row % 20 == 0 and not bad else []
            for row, bad in enumerate(failed)
        ],
        "duration_s": rng.random(count) * 100,
        "width": np.full(count, 320),
        "height": np.full(count, 240),
        "frame_pts_s": rng.random((count, NUM_FRAMES), np.float32),
        "top_labels": _lists(names.take(pa.array(best.reshape(-1))), len(best[0]), failed),
        "top_scores": _lists(pa.array(top.reshape(-1)), len(best[0]), failed),
        "scores": scores,
        "selected_slot": _lists(pa.array(slots), 3, failed),
        "selected_pts_s": _lists(pa.array(slots.astype(np.float32)), 3, failed),
        "selected_by": _lists(pa.array(["visual"] * len(slots)), 3, failed),
        "saliency_visual": rng.random((count, NUM_FRAMES), np.float32),
        "saliency_textual": rng.random((count, NUM_FRAMES), np.float32),
        "decode_ms": rng.random(count) * 40,
    }
    return pa.table(
        [_large_column(columns.get(field.name), field, failed) for field in wanted], schema=wanted
    )


def _large_column(values: Any, field: pa.Field, failed: np.ndarray) -> pa.Array:
    if values is None:
        return pa.nulls(len(failed), field.type)
    if isinstance(field.type, pa.FixedShapeTensorType):
        flat = pa.array(values.reshape(-1), field.type.value_type)
        return pa.ExtensionArray.from_storage(
            field.type,
            pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(failed)),
        )
    return pa.array(values, field.type)


def _lists(flat: pa.Array, size: int, null: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(
        pa.array(np.arange(len(null) + 1, dtype=np.int32) * size), flat, mask=pa.array(null)
    )
