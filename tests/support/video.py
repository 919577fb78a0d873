"""Small videos that tests make: every frame shows its own number, so a wrong frame shows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8
RATE = 24


def picture(number: int, width: int = 160, height: int = 96) -> np.ndarray:
    """uint8 [height, width, 3]: the number as 8 black or white blocks, a grey level below them.

    The blocks fill the upper half.
    """
    rgb = np.full((height, width, 3), 40 + number % 160, np.uint8)
    block = width // BITS
    for bit in range(BITS):
        rgb[: height // 2, bit * block : (bit + 1) * block] = 255 if number >> bit & 1 else 0
    return rgb


def number_of(rgb: np.ndarray) -> int:
    """The number shown by a decoded picture of any size."""
    height, width = rgb.shape[:2]
    block = width / BITS
    return sum(
        int(rgb[height // 4, int((bit + 0.5) * block)].mean() > 128) << bit for bit in range(BITS)
    )


def write_video(
    path: Path,
    num_frames: int = 60,
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    gop: int = 12,
    b_frames: int = 2,
    open_gop: bool = False,
    size: tuple[int, int] = (160, 96),
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A video of numbered frames.

    `times` are their presentation times in 1/24 s (default: 0, 1, 2, ...).
    """
    chosen = (
        {"g": str(gop), "bf": str(b_frames), "crf": "18"}
        if codec in ("libx264", "libx265")
        else {"g": str(gop)}
    )
    if codec == "libx264":
        chosen["x264-params"] = f"scenecut=0:keyint={gop}:min-keyint={gop}:open-gop={int(open_gop)}"
    if codec == "libx265":
        chosen["x265-params"] = (
            f"log-level=none:scenecut=0:keyint={gop}:min-keyint={gop}"
            f":bframes={b_frames}:open-gop={int(open_gop)}"
        )
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=RATE, options=chosen | (options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, RATE)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24").reformat(
                format=pix_fmt
            )
            frame.pts = times[number] if times is not None else number
            frame.time_base = Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if codec == "libsvtav1":
        # as root, this encoder makes the thread that opened it real-time: nothing else would run
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def write_audio(path: Path) -> Path:
    """Half a second of silence, no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
