"""Decode on an NVIDIA GPU (`decode.backend = "nvdec"`), through the FFmpeg that PyAV bundles.

FFmpeg handles packets, seeks and timestamps as without a GPU and copies the decoded pictures to
main memory, so the same code finds, checks and converts the frames. Codecs and sizes that the GPU
does not support are decoded on the CPU. AV1 is one of these, because dav1d, FFmpeg's first choice
for it, does not support the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os

import av
from av.codec.hwaccel import HWAccel

NO_GPU = 'decode.backend is "nvdec", but this node has no NVIDIA decoder: decoded on the CPU'


@functools.cache
def accelerator() -> HWAccel | None:
    """The object that makes `av.open` decode on the GPU, one per process; None without a GPU."""
    # FFmpeg refuses to share the context of a process in which torch has set it up
    choices: tuple[dict[str, object], ...] = ({"primary_ctx": "1"}, {})
    for options in choices:
        decoder = HWAccel("cuda", device=str(_ordinal()), options=options)
        with contextlib.suppress(av.error.FFmpegError, NotImplementedError):
            # kept for the life of the process: setting up a GPU takes about 0.2 s, which every
            # video would otherwise pay again
            _contexts.append(decoder.create(av.Codec("h264", "r")))
            return decoder
    return None


_contexts: list[HWAccel] = []


def _ordinal() -> int:
    """Pick one of the visible GPUs, so that a node's child processes spread over all of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*") if visible is None else visible.split(","))
    return os.getpid() % max(1, count)
