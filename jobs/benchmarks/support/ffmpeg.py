"""The ffmpeg program as a peer: its commands for chosen frames, and the CPU time of a program."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tsq_ray.decode import DecodedVideo


def cpu_of_program(command: Sequence[str]) -> float:
    """Run a program and return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ffmpeg_commands(program: str, path: Path, video: DecodedVideo, size: int) -> list[list[str]]:
    """Return two commands that decode the frames of `video`: one pass, and a seek per frame."""
    picture = f"scale={size}:{size}:flags=bilinear,format=rgb24"
    start = [program, "-v", "error", "-nostdin", "-filter_threads", "1"]
    wanted = "+".join(f"eq(n,{index})" for index in sorted(set(video.frame_index.tolist())))
    count = str(len(set(video.frame_index.tolist())))
    one_pass = [
        *start,
        "-threads",
        "1",
        "-i",
        str(path),
        "-an",
        "-vf",
        f"select='{wanted}',{picture}",
        "-vsync",
        "passthrough",
    ]
    seeks = list(start)
    times = sorted(set(video.frame_pts_s.tolist()))
    for pts in times:
        seeks += [
            "-threads",
            "1",
            "-ss",
            f"{max(0.0, pts - 0.5 / max(video.fps, 1)):.4f}",
            "-i",
            str(path),
        ]
    for number in range(len(times)):
        seeks += ["-map", f"{number}:v:0", "-vf", picture, "-frames:v", "1", "-f", "null", "-"]
    return [[*one_pass, "-frames:v", count, "-f", "null", "-"], seeks]
