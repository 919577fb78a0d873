"""Resources do not depend on the videos of a run.

Memory stays under the bound of docs/operations.md, and the object store does not spill.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support.archive import CLASSES, write_clip
from support.bundle import make_bundle
from support.cluster import SETTINGS, Driver, marked, tsq

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MIB = 2**20
WORKERS, MAX_MEMORY_MB = 2, 1024
FIXED_MB, WORKER_MB = 2560, 1024
"""From docs/operations.md: Ray with idle processes, driver and writer; a worker with networks."""


def repeat(
    path: Path, codec: str, size: tuple[int, int], rate: int, num_frames: int, distinct: int = 1
) -> Path:
    """A video that repeats the same few keyframe packets: hours long or 8K, yet cheap to make."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec,
            rate=rate,
            options={"g": "1"} | ({"preset": "ultrafast"} if codec == "libx264" else {}),
        )
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        packets = []
        for number in range(distinct):
            picture = np.repeat(
                np.repeat(rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8), 8, 0),
                8,
                1,
            )
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            packets += stream.encode(frame)
        packets += stream.encode()
        payloads = [bytes(packet) for packet in packets]
        for number in range(num_frames):
            packet = av.Packet(payloads[number % len(payloads)])
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, rate), True
            packet.pts = packet.dts = number
            packet.duration = 1
            container.mux(packet)
    return path


def heavy_archive(folder: Path) -> Path:
    """8K, 6 hours, 100 frames per second, and plain clips."""
    folder.mkdir()
    for number in range(3):
        repeat(folder / f"8k_{number}.mp4", "libx264", (7680, 4320), 30, 30, 3)
    repeat(folder / "six_hours.mp4", "mpeg4", (64, 48), 30, 6 * 3600 * 30 - 30)
    repeat(folder / "hundred_fps.mp4", "libx264", (1920, 1080), 100, 3000, 3)
    for number in range(12):
        write_clip(folder / f"clip_{number}.mp4", CLASSES[number % len(CLASSES)], seed=number)
    return folder


@contextlib.contextmanager
def peak_of(mark: str) -> Iterator[dict[str, Any]]:
    """Peak resident memory of the marked processes in MiB, and which of them held it.

    The sum counts shared pages in each process.
    """
    found: dict[str, Any] = {"mb": 0.0, "by": {}}
    stop = threading.Event()
    page = os.sysconf("SC_PAGESIZE")

    def watch() -> None:
        while not stop.wait(0.2):
            by: Counter[str] = Counter()
            for pid in marked(mark):
                with contextlib.suppress(OSError, IndexError):
                    title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:60]
                    by[title] += (
                        int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page // MIB
                    )
            if sum(by.values()) > found["mb"]:
                found.update(mb=sum(by.values()), by=dict(by.most_common(8)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("command", "strategy"), [("extract", "uniform"), ("extract", "keyframe"), ("score", "uniform")]
)
def test_memory_stays_under_its_bound(tmp_path: Path, command: str, strategy: str) -> None:
    videos, manifest, out = (
        heavy_archive(tmp_path / "videos"),
        tmp_path / "m.parquet",
        tmp_path / "out",
    )
    assert tsq("index", videos, "--out", manifest).code == 0
    sets = [f"decode.max_memory_mb={MAX_MEMORY_MB}", "decode.timeout_s=600"]
    argv = [command, manifest, "--out", out, "--json"]
    if command == "extract":
        (tmp_path / "settings.toml").write_text(SETTINGS)
        sets += [f"decode.strategy={strategy}", f"resources.workers={WORKERS}"]
        argv += ["--config", tmp_path / "settings.toml"]
    else:
        sets += ["resources.decoders=1", f"serve.decoder_processes={WORKERS}"]
        argv += ["--model", make_bundle(tmp_path / "bundle")]
    with (
        Driver(
            [*argv, *(item for one in sets for item in ("--set", one))], tmp_path / "run"
        ) as driver,
        peak_of(driver.mark) as peak,
    ):
        run = driver.ended(1500).json
    print(
        json.dumps(
            {"command": command, "strategy": strategy, **peak, "seconds": run["wall_seconds"]},
            indent=1,
        )
    )
    assert run["counts"]["ok"] == run["counts"]["inputs"] == 17
    assert 0 < peak["mb"] <= FIXED_MB + WORKERS * (WORKER_MB + MAX_MEMORY_MB)


def spilled_bytes(ray: Any) -> int:
    """What the object store has written to disk since it started."""
    from ray._private import internal_api

    return int(
        internal_api.get_memory_info_reply(
            internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
        ).store_stats.spilled_bytes_total
    )


def test_the_object_store_does_not_spill(ray_cluster: Any, tmp_path: Path) -> None:
    """More frames than the store holds, decoded faster than they are encoded: decoding waits."""
    (tmp_path / "videos").mkdir()
    clip = write_clip(tmp_path / "clip.mp4", CLASSES[0], seed=0)
    for number in range(80):
        shutil.copy(clip, tmp_path / f"videos/{number}.mp4")
    assert tsq("index", tmp_path / "videos", "--out", tmp_path / "m.parquet").code == 0
    sets = ["decode.num_frames=16", "resources.decoders=2", "resources.batch_size=4"]
    sets += [
        f"encoders.{name}.size=256" for name in ("visual", "objects")
    ]  # 80 x 6.3 MB of frames, in a store of 256 MiB
    argv = ["extract", tmp_path / "m.parquet", "--out", tmp_path / "features", "--json"]
    (tmp_path / "settings.toml").write_text(SETTINGS)
    before = spilled_bytes(ray_cluster)
    run = tsq(
        *argv,
        "--config",
        tmp_path / "settings.toml",
        *(item for one in sets for item in ("--set", one)),
    ).json
    assert run["counts"]["ok"] == 80
    assert spilled_bytes(ray_cluster) == before == 0
