"""The decoder's children are real processes here: they hang, crash and run out of memory, and the pool goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from video_case import number_of, write_video

from tsq_ray.config import DecodeConfig
from tsq_ray.decode import DecodedVideo, DecodePool, FrameSpec, VideoSource, decode_video
from tsq_ray.errors import StorageError, VideoError

SPECS = {"wide": FrameSpec(64)}
SETTINGS = DecodeConfig(num_frames=4, timeout_s=20)
HOARD: list[np.ndarray] = []


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("sandbox") / "v.mp4", 24))


def act(source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]) -> DecodedVideo:
    """In the child: what the name says, or an ordinary decode."""
    what = source.uri.rpartition("/")[2]
    if what == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGUSR1})
        time.sleep(600)
    if what == "nap":
        time.sleep(0.7)
        raise VideoError("corrupt", "napped")
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(3)
    if what == "bomb":
        np.ones(2 << 30, np.uint8)
    if what == "bug":
        raise KeyError("a bug")
    if what == "hoard":
        HOARD.append(np.ones(300 << 20, np.uint8))
        raise VideoError("internal", str(os.getpid()))
    if what == "pid":
        raise VideoError("internal", str(os.getpid()))
    return decode_video(source, settings, specs)


def heavy_modules(source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]) -> DecodedVideo:
    """In the child: tell which heavy modules it holds."""
    raise VideoError("internal", ",".join(name for name in ("torch", "ray", "transformers") if name in sys.modules) or "none")


@pytest.mark.parametrize(
    ("what", "error_type", "message"),
    [
        ("hang", "timeout", "not done after decode.timeout_s = 2 s"),
        ("segfault", "decoder_crash", "SIGSEGV"),
        ("killed", "decoder_crash", "SIGKILL"),
        ("exit", "decoder_crash", "exit code 3"),
        ("bomb", "out_of_memory", "decode.max_memory_mb = 512"),
        ("bug", "internal", "KeyError"),
    ],
)
def test_what_happens_to_one_video_costs_that_video_only(video: str, what: str, error_type: str, message: str) -> None:
    settings = DecodeConfig(num_frames=4, timeout_s=2 if what == "hang" else 20, max_memory_mb=512)
    with DecodePool(settings, SPECS, task=act) as pool:
        before, failed, after, missing = pool.decode([VideoSource(uri) for uri in (video, f"/{what}", video, "/no/such.mp4")])
    assert isinstance(failed, VideoError)
    assert failed.error_type == error_type
    assert message in str(failed)
    for outcome in (before, after):
        assert isinstance(outcome, DecodedVideo)
        assert [number_of(rgb) for rgb in outcome.slots("wide")] == outcome.frame_index.tolist() == [3, 9, 15, 21]
    assert isinstance(missing, StorageError)
    assert missing.error_type == "not_found"


def test_a_real_picture_too_large_for_the_memory_limit(tmp_path: Path, video: str) -> None:
    path = write_video(tmp_path / "huge.avi", 1, codec="mpeg4", size=(8000, 4000), b_frames=0)
    with DecodePool(DecodeConfig(num_frames=1, max_memory_mb=256), SPECS) as pool:
        huge, small = pool.decode([VideoSource(str(path)), VideoSource(video)])
    assert isinstance(huge, VideoError)
    assert huge.error_type == "out_of_memory"
    assert isinstance(small, DecodedVideo)


def test_large_pictures_one_after_another(tmp_path: Path) -> None:
    """What one video took is given back before the next: each of them alone fits the limit, two do not."""
    path = write_video(tmp_path / "large.mp4", 2, size=(3840, 2160), gop=1, b_frames=0, options={"preset": "ultrafast"})
    with DecodePool(DecodeConfig(num_frames=2, timeout_s=60, max_memory_mb=384), SPECS) as pool:
        outcomes = pool.decode([VideoSource(str(path))] * 8)
    assert [str(outcome) for outcome in outcomes if not isinstance(outcome, DecodedVideo)] == []


def test_a_child_that_keeps_much_memory_is_replaced_before_the_next_video(video: str) -> None:
    with DecodePool(DecodeConfig(num_frames=4, timeout_s=20, max_memory_mb=512), SPECS, task=act) as pool:
        hoarders = [str(outcome) for outcome in pool.decode([VideoSource("/hoard")] * 3)]
        (after,) = pool.decode([VideoSource(video)])
    assert len(set(hoarders)) == 3
    assert isinstance(after, DecodedVideo)


def test_waiting_does_not_count_against_the_time_limit() -> None:
    with DecodePool(DecodeConfig(num_frames=4, timeout_s=2), SPECS, task=act) as pool:
        outcomes = pool.decode([VideoSource("/nap")] * 5)
    assert [str(outcome) for outcome in outcomes] == ["napped"] * 5


def test_an_idle_child_that_is_killed_is_replaced(video: str) -> None:
    with DecodePool(SETTINGS, SPECS, task=act) as pool:
        for _ in range(2):
            os.kill(int(str(pool.decode([VideoSource("/pid")])[0])), signal.SIGKILL)
            assert all(isinstance(outcome, DecodedVideo) for outcome in pool.decode([VideoSource(video)] * 3))


def test_closing_answers_videos_that_wait() -> None:
    pool = DecodePool(SETTINGS, SPECS, task=act)
    futures = [pool.submit(VideoSource(uri)) for uri in ("/hang", "/hang")]
    pool.close()
    assert ["closed before this video was done" in str(future.result(timeout=30)) for future in futures] == [True, True]
    with pytest.raises(ValueError, match="closed"):
        pool.submit(VideoSource("/pid"))


def test_children_are_light() -> None:
    with DecodePool(SETTINGS, SPECS, task=heavy_modules) as pool:
        assert str(pool.decode([VideoSource("x")])[0]) == "none"


def _run(code: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(code)] if isinstance(code, Path) else [sys.executable, "-c", code]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True)


SCRIPT = """
import sys
print("main runs")
from tsq_ray.config import DecodeConfig
from tsq_ray.decode import DecodePool, FrameSpec, VideoSource
with DecodePool(DecodeConfig(num_frames=4), {"a": FrameSpec(64)}) as pool:
    for outcome in pool.decode([VideoSource(uri) for uri in sys.argv[1:]]):
        print(getattr(outcome, "source_num_frames", None) or outcome.error_type)
"""


@pytest.mark.parametrize("as_file", [True, False])
def test_a_script_without_a_main_guard_runs_once_and_in_silence(tmp_path: Path, video: str, as_file: bool) -> None:
    damaged = tmp_path / "damaged.mp4"
    data = bytearray(Path(video).read_bytes())
    start = data.index(b"mdat") + 200
    data[start : start + 400] = bytes(400)
    damaged.write_bytes(data)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = _run(script if as_file else SCRIPT, video, str(damaged), __file__)
    assert done.stdout.splitlines()[:2] == ["main runs", "24"]
    assert done.stdout.splitlines()[3:] == ["not_video"]
    assert done.stderr == ""


PARENT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_sandbox
from tsq_ray.decode import DecodePool, VideoSource
pool = DecodePool(test_sandbox.SETTINGS, test_sandbox.SPECS, task=test_sandbox.act)
print(pool.decode([VideoSource("/pid")])[0], flush=True)
pool.submit(VideoSource("/hang"))
sys.stdin.readline()
"""


def test_children_die_with_a_parent_that_is_killed() -> None:
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)])}
    command = [sys.executable, "-c", PARENT, str(folder)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _alive(child)
        time.sleep(0.5)  # the child is now in the video that hangs
    finally:
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 20
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
