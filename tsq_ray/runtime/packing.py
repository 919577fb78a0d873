"""Decoded videos as Arrow values, on their way from decoding workers to encoding ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tsq_ray.decode import WHOLE, DecodedVideo, FrameSpec, Outcome
from tsq_ray.decode.frames import target_size
from tsq_ray.errors import VideoError

_FRAMES = "frames_"
_PACKED = {
    "error_type": pa.string(),
    "error_message": pa.string(),
    "warnings": pa.list_(pa.string()),
    "slot_frame": pa.list_(pa.int32()),
    "frame_index": pa.list_(pa.int32()),
    "frame_pts_s": pa.list_(pa.float32()),
    "duration_s": pa.float64(),
    "fps": pa.float64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "codec": pa.string(),
    "source_num_frames": pa.int64(),
    "decode_ms": pa.float64(),
    "fetched_bytes": pa.int64(),
}


def packed_fields(names: Sequence[str]) -> dict[str, pa.DataType]:
    """Return the types of the columns that `pack_video` makes."""
    return _PACKED | {f"{_FRAMES}{name}": pa.large_binary() for name in names}


def pack_video(video: Outcome, names: Sequence[str]) -> dict[str, Any]:
    """Return a decoded video, or its failure, as Arrow values.

    Packs those of the pictures `names` that the video has.
    """
    if not isinstance(video, DecodedVideo):
        return {"error_type": video.error_type, "error_message": str(video)}
    lists = {
        name: getattr(video, name).tolist() for name in ("slot_frame", "frame_index", "frame_pts_s")
    }
    plain = {
        name: getattr(video, name)
        for name in _PACKED
        if name not in lists and not name.startswith("error_")
    }
    return (
        lists
        | plain
        | {
            f"{_FRAMES}{name}": video.frames[name].tobytes()
            for name in names
            if name in video.frames
        }
    )


def unpack_video(
    record: Mapping[str, Any], specs: Mapping[str, FrameSpec]
) -> DecodedVideo | VideoError:
    """Invert `pack_video`."""
    if record["error_type"] is not None:
        return VideoError(record["error_type"], record["error_message"])
    values = {name: record[name] for name in _PACKED if not name.startswith("error_")}
    for name, dtype in (
        ("slot_frame", np.int32),
        ("frame_index", np.int32),
        ("frame_pts_s", np.float32),
    ):
        values[name] = np.array(values[name], dtype)
    frames = {}
    for name, spec in specs.items():
        if (data := record[f"{_FRAMES}{name}"]) is not None:
            width, height = record["width"], record["height"]
            if name != WHOLE:
                square = (spec.size, spec.size)
                keeps = spec.resize == "keep"
                width, height = target_size(width, height, spec) if keeps else square
            frames[name] = np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)
    return DecodedVideo(frames=frames, **values)
