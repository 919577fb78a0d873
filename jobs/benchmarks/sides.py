"""One side of jobs/benchmarks/decode.py, in its own process: `python sides.py NAME OPTIONS_JSON`.

For each line of standard input it decodes and resizes the frames of all videos once, and prints the
seconds and the number of frames as JSON. The first line of output is the start-up time. Imports are
lazy because a peer may be installed in an environment of its own.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Round = Callable[[], int | list[float]]


def main() -> None:
    """Run a round for each line of input."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    started = time.perf_counter()
    try:
        work = {
            "exact": _ours,
            "keyframe": _ours,
            "cpu": _cpu,
            "read_videos": _read_videos,
            "daft": _daft,
        }[name](name, options)
    except ImportError as error:
        _say({"missing": str(error)})
        return
    _say({"seconds": time.perf_counter() - started})
    for _ in sys.stdin:
        started = time.perf_counter()
        frames = work()
        _say({"seconds": time.perf_counter() - started, "frames": frames})


def _say(answer: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def _ours(strategy: str, options: dict[str, Any]) -> Round:
    """This package's decoder in `workers` killable child processes."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tsq_ray.config import validate_config
    from tsq_ray.decode import DecodedVideo, DecodePool, FrameSpec, VideoSource

    config = validate_config(
        {
            "decode": {
                "strategy": strategy.replace("exact", "uniform"),
                "num_frames": options["frames"],
            }
        }
    )
    pool = DecodePool(config.decode, {"picture": FrameSpec(options["size"])}, options["workers"])
    sources = [VideoSource(path) for path in options["paths"]]

    def work() -> int:
        videos = pool.decode(sources)
        assert all(isinstance(video, DecodedVideo) for video in videos), videos
        return sum(
            len(video.frames["picture"]) for video in videos if isinstance(video, DecodedVideo)
        )

    return work


def _cpu(name: str, options: dict[str, Any]) -> Round:
    """CPU seconds per video of the decoder in `options["checkout"]`, in this process."""
    sys.path.insert(0, options["checkout"])
    import tsq_ray
    from tsq_ray.config import validate_config
    from tsq_ray.decode import FrameSpec, VideoSource, decode_video

    assert str(tsq_ray.__file__).startswith(options["checkout"]), tsq_ray.__file__
    config = validate_config(
        {"decode": {"strategy": options["strategy"], "num_frames": options["frames"]}}
    )

    def work() -> list[float]:
        spent = [time.process_time()]
        for path in options["paths"]:
            decode_video(VideoSource(path), config.decode, {"picture": FrameSpec(options["size"])})
            spent.append(time.process_time())
        return [after - before for before, after in itertools.pairwise(spent)]

    return work


def _read_videos(name: str, options: dict[str, Any]) -> Round:
    """Ray Data's `read_videos`: one frame per second, its minimum, resized by its decoder."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tsq_ray.runtime import cluster

    started = cluster.connect()
    ray = started.__enter__()  # kept until this process ends

    cluster.quiet_data()

    def work() -> int:
        size = options["size"]
        data = ray.data.read_videos(options["paths"], fps=1, resize=(size, size))
        assert started  # the closure keeps the cluster alive
        return sum(
            len(batch["frame"])
            for batch in data.iter_batches(batch_size=None, batch_format="numpy")
        )

    return work


def _daft(name: str, options: dict[str, Any]) -> Round:
    """T frames by Daft: one per T-th of the duration.

    One file at a time, because Daft 0.7.26 hung on two at once (two cores).
    """
    import av  # Daft's decoder
    import daft

    def interval(path: str) -> float:
        with av.open(path) as container:
            assert container.duration is not None
            return container.duration / 1_000_000 / options["frames"]

    every = {path: interval(path) for path in options["paths"]}

    def work() -> int:
        found = 0
        for path, seconds in every.items():
            size = options["size"]
            found += len(
                daft.read_video_frames(
                    path, image_height=size, image_width=size, sample_interval_seconds=seconds
                ).collect()
            )
        return found

    return work


if __name__ == "__main__":
    main()
