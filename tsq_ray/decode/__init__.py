"""Videos to frames: a sampling plan, exact and keyframe decoding, and a sandbox.

The sandbox limits the damage of a crash or a hang to one video.
"""

from tsq_ray.decode.sandbox import DecodePool
from tsq_ray.decode.types import (
    WHOLE,
    Centre,
    DecodedVideo,
    FrameSpec,
    Outcome,
    VideoSource,
    with_whole_frames,
)
from tsq_ray.decode.video import decode_video

__all__ = [
    "WHOLE",
    "Centre",
    "DecodePool",
    "DecodedVideo",
    "FrameSpec",
    "Outcome",
    "VideoSource",
    "decode_video",
    "with_whole_frames",
]
