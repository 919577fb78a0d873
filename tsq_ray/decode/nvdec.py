"""The decoder of an NVIDIA GPU (`decode.backend = "nvdec"`), through the FFmpeg that PyAV bundles.

FFmpeg takes packets, seeks and timestamps as it does without a GPU, and its decoded pictures come down to main memory: so the frames are found, checked and
converted by the same code, and a codec or a size that the GPU does not take is decoded on the CPU. AV1 is one of these, since
FFmpeg's first choice for it, dav1d, does not know the GPU.
"""

from __future__ import annotations

import functools
import glob
import os

import av
from av.codec.hwaccel import HWAccel

NO_GPU = 'decode.backend is "nvdec", and this node has no NVIDIA decoder: decoded on the CPU'


@functools.cache
def accelerator() -> HWAccel | None:
    """What makes `av.open` decode on the GPU, one of them for the life of this process; None where there is none."""
    found = HWAccel("cuda", device=str(_ordinal()), options={"primary_ctx": "1"})
    try:
        # held for good: the first of a process takes a GPU some 0.2 s to set up, and each video would do it again
        _held.append(found.create(av.Codec("h264", "r")))
    except (av.error.FFmpegError, NotImplementedError):
        return None
    return found


_held: list[HWAccel] = []


def _ordinal() -> int:
    """Which of the GPUs that this process may see: the children of a node are shared out among them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*") if visible is None else visible.split(","))
    return os.getpid() % max(1, count)
