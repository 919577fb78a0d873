"""What goes into a decode and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class FrameSpec:
    """One wanted picture size; `resize` is applied with antialiasing to the frame as it is shown.

    `squash`: the whole frame to size x size; `crop`: the shorter side to round(size * 8/7), then the centre size x size;
    `keep`: the shorter side to `size`, the aspect kept; `none`: the frame as it is, see `with_whole_frames`.
    """

    size: int
    resize: Literal["squash", "crop", "keep", "none"] = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


WHOLE = "whole"
"""Name of the frames as they are, from which the networks' device makes the pictures."""
_MOST_DATA = 2


def with_whole_frames(specs: Mapping[str, FrameSpec]) -> dict[str, FrameSpec]:
    """`specs`, but of a video whose frames are small only the frames as they are, named WHOLE: at most twice the data of the pictures."""
    pixels = _MOST_DATA * sum(spec.size**2 for spec in specs.values())
    return {**specs, WHOLE: FrameSpec(math.isqrt(pixels), "none")}


@dataclass(frozen=True)
class VideoSource:
    """One video as the manifest saw it; what is None is not compared with the file of now.

    `places`: where in each of the T intervals its frame is looked for, T numbers of 0..1; None: in the middle of each.
    """

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    modified: datetime | None = None
    places: tuple[float, ...] | None = None


@dataclass
class DecodedVideo:
    """The T frames of one video, each distinct source frame stored once, in every size asked for."""

    frames: dict[str, np.ndarray]
    """Spec name -> uint8 [N, h, w, 3], RGB, N distinct source frames in time order (h = w = size but for `keep`).

    Either WHOLE alone, where that was asked for and the frames have at most size² pixels, or all others.
    """
    slot_frame: np.ndarray
    """int32 [T]: which of the N frames fills each slot."""
    frame_index: np.ndarray
    """int32 [T]: the slot's frame in the source, counted in presentation order over the frames that exist."""
    frame_pts_s: np.ndarray
    """float32 [T]: its presentation time in seconds after the first frame's."""
    duration_s: float
    """From the first frame's start to the last frame's end, in seconds."""
    fps: float
    """Average frame rate: source_num_frames / duration_s (0 where the duration is unknown)."""
    width: int
    """Width in pixels as shown, that is after rotation."""
    height: int
    """Height in pixels as shown."""
    codec: str
    """FFmpeg's name of the codec (h264, hevc, av1, ...)."""
    source_num_frames: int
    """Number of frames that exist and are shown, whatever the header says."""
    warnings: list[str]
    """What was missing or wrong in the file, one line each."""
    decode_ms: float
    """Wall-clock time of fetch, decode and resize, in milliseconds."""

    def slots(self, name: str) -> np.ndarray:
        """uint8 [T, h, w, 3]: the picture of each slot in the size `name` (a copy)."""
        return self.frames[name][self.slot_frame]
