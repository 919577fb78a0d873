"""Decode with decord (`decode.backend = "decord"`) where it is exact; PyAV decodes everything else.

Compared with a sequential FFmpeg decode, decord was silently wrong on open groups of pictures
(HEVC: another frame after a seek), edit lists (hidden frames counted), reflections and rotations,
interlaced video (deinterlaced), 10-bit video (other colours) and very small pictures (a fourth
channel). `refusal` rejects all of these and whatever has not been compared; `decode_exact` also
requires decord's frame times to match those of the packets. decord is not the default because one
fault cannot be caught this way: on a busy machine a long skip gives up after 10,000 polls and the
reader continues as if it had arrived. On a 6-minute 1080p video with one keyframe every 10 s, one
call in twenty returned the picture of another time.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

from tsq_ray.decode.frames import FrameStore
from tsq_ray.decode.probe import UPRIGHT, PacketTable, Stream, display_matrix
from tsq_ray.decode.pyav_backend import DecodeTrouble


@functools.cache
def _decord() -> Any:
    """Import decord on first use, without the CUDA libraries it would load process-wide.

    One of them is a BLAS (nvblas) that then takes over PyTorch's matrix products on the CPU and
    crashes without a GPU; they also cost every decoding child half a second and hundreds of
    megabytes.
    """
    absent = object()
    before = sys.modules.get("nvidia", absent)
    sys.modules["nvidia"] = None  # type: ignore[assignment]
    try:
        decord = importlib.import_module("decord")
    finally:
        if before is absent:
            del sys.modules["nvidia"]
        else:
            sys.modules["nvidia"] = before  # type: ignore[assignment]
    decord.logging.set_level(decord.logging.QUIET)
    return decord


_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE
_MIN_SIDE = 32
_TOLERANCE_S = 1e-3


def refusal(stream: Stream, table: PacketTable, first: av.VideoFrame) -> str | None:
    """Return why PyAV must decode this file, or None if decord is exact.

    `first` is the first decoded frame.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec not in ("h264", "vp9", "av1"):
        return f"codec {codec}"
    if codec == "h264" and stream.codec_context.field_order != _PROGRESSIVE:
        return "not known to be progressive"
    if first.format.name not in ("yuv420p", "yuvj420p"):
        return f"pixel format {first.format.name}"
    if tuple(display_matrix(first)) != UPRIGHT:
        return "rotated"
    if first.interlaced_frame:
        return "interlaced"
    if table.num_discarded:
        return "edit list"
    if min(first.width, first.height) < _MIN_SIDE:
        return f"only {first.width} x {first.height} pixels"
    if table.reordered or stream.codec_context.has_b_frames:
        return "frames are reordered, and only decoding them all proves that their times are right"
    if not table.key_pts or table.key_pts[0] != table.pts[0]:
        return "does not start with a keyframe"
    return None


def decode_exact(
    path: str,
    time_base: Fraction,
    table: PacketTable,
    wanted: Sequence[int],
    size: tuple[int, int],
    store: FrameStore,
) -> None:
    """Put the frames `wanted` (ascending indices into `table.pts`) of a local file into the store.

    `size` is the expected (width, height). Raises DecodeTrouble if decord fails or if its frames
    do not match the packets.
    """
    decord = _decord()
    try:
        # with almost no tolerance, a frame that cannot be decoded is an error, not a copy
        # of another frame
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
        if len(reader) != len(table.pts):
            raise DecodeTrouble(
                f"decord finds {len(reader)} frames, the packets hold {len(table.pts)}"
            )
        seen = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
        expected = np.asarray([pts - table.pts[0] for pts in table.pts], np.float64)
        expected *= float(time_base)
        # decord stores seconds as float32
        if np.abs(seen - seen[0] - expected).max() > _TOLERANCE_S + expected[-1] * 2e-7:
            raise DecodeTrouble("decord's frame times differ from those of the packets")
        for i, index in enumerate(wanted):
            rgb = reader[index].asnumpy()
            if rgb.shape != (size[1], size[0], 3):
                raise DecodeTrouble(f"decord returned a frame of shape {rgb.shape}")
            store.put(i, rgb)
    except (
        decord.DECORDError,
        decord.DECORDLimitReachedError,
        RuntimeError,
        AssertionError,
        IndexError,
        StopIteration,
    ) as error:
        raise DecodeTrouble(f"decord: {' '.join(str(error).split())[:200]}") from None
