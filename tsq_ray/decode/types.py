"""Inputs and outputs of decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from tsq_ray.errors import Failure

if TYPE_CHECKING:
    from tsq_ray.manifest import VideoRef

Centre = Literal["down", "nearest"]


@dataclass(frozen=True)
class FrameSpec:
    """One output picture size; `resize` is applied with antialiasing to the frame as displayed.

    `squash`: the whole frame to size x size; `crop`: the shorter side to round(size * 8/7), then
    the central size x size; `keep`: the shorter side to `size`, keeping the aspect ratio; `none`:
    the original frame, see `with_whole_frames`. With `resize_to`, `crop` resizes the shorter side
    to that many pixels and rounds the longer one down, as torchvision and transformers do, and
    `squash` resizes to that square before it takes the centre. `centre` sets how the crop's corner
    is rounded: `down` as in transformers, or to the `nearest` integer, half to even, as in
    torchvision.
    """

    size: int
    resize: Literal["squash", "crop", "keep", "none"] = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    resize_to: int = 0
    centre: Centre = "down"


WHOLE = "whole"
"""Name of the original-size frames, which are resized on the networks' device."""
_MAX_DATA_RATIO = 2


def with_whole_frames(specs: Mapping[str, FrameSpec]) -> dict[str, FrameSpec]:
    """Return `specs` plus WHOLE, which replaces them for a video with small frames.

    Such a video yields only its original frames: at most twice the data of the resized pictures.
    """
    pixels = _MAX_DATA_RATIO * sum(spec.size**2 for spec in specs.values())
    return {**specs, WHOLE: FrameSpec(math.isqrt(pixels), "none")}


@dataclass(frozen=True)
class VideoSource:
    """One video as recorded in the manifest; fields that are None are not checked on the file.

    `places`: T numbers in 0..1, the position of the wanted frame within each of the T intervals;
    None: the middle of each.
    """

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    modified: datetime | None = None
    places: tuple[float, ...] | None = None

    @classmethod
    def of(cls, ref: VideoRef) -> Self:
        """Return what the decoder needs from a manifest row."""
        return cls(ref.uri, ref.size_bytes, ref.etag, ref.modified)


@dataclass
class DecodedVideo:
    """The T frames of one video in every requested size; distinct source frames are stored once."""

    frames: dict[str, np.ndarray]
    """Spec name -> uint8 [N, h, w, 3], RGB, N distinct source frames in time order.

    h = w = size except for `keep` and `none`. Holds either WHOLE alone, if that was requested and
    the frames have at most size² pixels, or all the others.
    """
    slot_frame: np.ndarray
    """int32 [T]: which of the N frames fills each slot."""
    frame_index: np.ndarray
    """int32 [T]: each slot's frame index in the source.

    Counts the frames that exist, in presentation order.
    """
    frame_pts_s: np.ndarray
    """float32 [T]: each slot's presentation time in seconds, relative to the first frame."""
    duration_s: float
    """From the first frame's start to the last frame's end, in seconds."""
    fps: float
    """Average frame rate: source_num_frames / duration_s (0 if the duration is unknown)."""
    width: int
    """Displayed width in pixels, after rotation."""
    height: int
    """Displayed height in pixels, after rotation."""
    codec: str
    """FFmpeg's codec name (h264, hevc, av1, ...)."""
    source_num_frames: int
    """Number of frames that exist and are displayed, whatever the header says."""
    warnings: list[str]
    """Anything missing or wrong in the file, one line each."""
    decode_ms: float
    """Wall-clock time to fetch, decode and resize, in milliseconds."""
    fetched_bytes: int = 0
    """Bytes read from remote storage."""

    def slots(self, name: str) -> np.ndarray:
        """Return a copy, uint8 [T, h, w, 3]: each slot's picture in the size `name`."""
        return self.frames[name][self.slot_frame]


Outcome = DecodedVideo | Failure
"""The result of decoding a video."""
