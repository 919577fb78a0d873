"""Made-up videos, to warm up a replica and to check that it still works."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tsq_ray.decode import DecodedVideo, FrameSpec

if TYPE_CHECKING:
    from tsq_ray.stages import Sampled

_SIDE, _FRAMES, _RATE = 64, 4, 4


@contextlib.contextmanager
def video_file() -> Iterator[str]:
    """Yield the path of a video of a few grey frames, valid inside the `with`.

    It is in memory, so that a full disk does not make an idle decoder unhealthy.
    """
    with open(os.memfd_create("tsq-warmup"), "wb", buffering=0) as file:
        file.write(_encoded())
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


@functools.cache
def _encoded() -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", "matroska") as container:
        stream: Any = container.add_stream("mpeg4", rate=_RATE)
        stream.width = stream.height = _SIDE
        stream.pix_fmt = "yuv420p"
        picture = np.full((_SIDE, _SIDE, 3), 127, np.uint8)
        for _ in range(_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def decoded_video(specs: Mapping[str, FrameSpec], num_frames: int) -> DecodedVideo:
    """Return `num_frames` black frames, decoded in every size of `specs`."""
    slots = np.arange(num_frames, dtype=np.int32)
    frames = {
        name: np.zeros((num_frames, spec.size, spec.size, 3), np.uint8)
        for name, spec in specs.items()
    }
    seconds = slots.astype(np.float32)
    return DecodedVideo(
        frames, slots, slots, seconds, num_frames, 1.0, 1, 1, "none", num_frames, [], 0.0
    )


def sampled_video(size: int, budget: int) -> Sampled:
    """Return `budget` black frames of `size` x `size` pixels, all of them chosen."""
    from tsq_ray.model.choosers import Uniform, View
    from tsq_ray.networks.inference import Pictures
    from tsq_ray.stages import Sampled

    slots = np.arange(budget, dtype=np.int32)
    pictures = Pictures(np.zeros((budget, size, size, 3), np.uint8))
    chooser = Uniform(budget)
    row = {"frame_pts_s": slots.astype(np.float32)}
    return Sampled(row, pictures, slots, chooser.candidates(View(slots)), chooser)
