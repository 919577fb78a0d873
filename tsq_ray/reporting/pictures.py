"""Decode the frames of scored videos again, in the same slots, at another size."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from tsq_ray import storage
from tsq_ray.decode import DecodePool, FrameSpec, Outcome
from tsq_ray.errors import StorageError, VideoError
from tsq_ray.reporting.predictions import Predictions, video_source
from tsq_ray.rows import Row

SPEC = "picture"
_TOLERANCE_S = 0.05

Progress = Callable[[int, int], None]
"""Called with (videos done, total videos)."""


@dataclass(frozen=True)
class VideoFrames:
    """The frames of one row: `slots` maps a slot to uint8 [H, W, 3] RGB.

    Without frames, `error_type` and `note` give the reason.
    """

    row: Row
    slots: dict[int, np.ndarray]
    note: str = ""
    error_type: str | None = None


def decode_again(
    predictions: Predictions,
    rows: Iterable[Row],
    slots_of: Callable[[Row], Sequence[int]],
    size: int,
    num_processes: int,
) -> Iterator[VideoFrames]:
    """Decode the videos of `rows` again with the run's settings and yield them in order.

    Each has the frames of the slots `slots_of(row)`; `size` is the shorter side in pixels. A video
    that is missing, has changed or fails to decode has a note instead of frames. About
    2 x `num_processes` videos are in memory at a time.
    """
    specs = {SPEC: FrameSpec(size=size, resize="keep", interpolation="bilinear")}
    waiting = iter(rows)
    group = list(islice(waiting, 2 * num_processes))
    if not group:
        return
    with DecodePool(predictions.decode_settings(), specs, num_processes) as pool:
        while group:
            for row, decoded in zip(
                group, pool.decode([video_source(row) for row in group]), strict=True
            ):
                yield _video_frames(row, decoded, slots_of(row))
            group = list(islice(waiting, 2 * num_processes))


def _video_frames(row: Row, decoded: Outcome, slots: Sequence[int]) -> VideoFrames:
    if isinstance(decoded, (VideoError, StorageError)):
        return VideoFrames(row, {}, storage.redact(str(decoded)), decoded.error_type)
    scored = row["frame_pts_s"]
    if scored is None or not np.allclose(decoded.frame_pts_s, scored, rtol=0, atol=_TOLERANCE_S):
        return VideoFrames(
            row,
            {},
            "its frame times have changed since it was scored; score the video again",
            "source_changed",
        )
    frames = decoded.frames[SPEC]
    return VideoFrames(row, {slot: frames[decoded.slot_frame[slot]] for slot in slots})


def uniform_slots(num_frames: int, budget: int) -> list[int]:
    """Return the K slots of the uniform baseline: floor((i + 0.5) T / K)."""
    return [int((i + 0.5) * num_frames / budget) for i in range(budget)]


def jpeg(frame: np.ndarray, quality: int) -> bytes:
    """Encode a frame [H, W, 3] as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def data_uri(frame: np.ndarray, quality: int) -> str:
    """Return a frame as a data: URI for <img src>."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(frame, quality)).decode("ascii")
