"""The decoder's children as real processes: they hang, crash, run out of memory; the pool lives."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pebble
import pytest
from support.video import number_of, write_video

from tsq_ray.config import DecodeConfig
from tsq_ray.decode import DecodedVideo, DecodePool, FrameSpec, VideoSource, decode_video
from tsq_ray.decode import child as children
from tsq_ray.decode.sandbox import _describe_exit
from tsq_ray.errors import DecoderKilled, StorageError, VideoError

SPECS = {"wide": FrameSpec(64)}
SETTINGS = DecodeConfig(num_frames=4, timeout_s=20)
HOARD: list[np.ndarray] = []


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("sandbox") / "v.mp4", 24))


def act(
    source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> DecodedVideo:
    """In the child: do what the name says, or an ordinary decode."""
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


def heavy_modules(
    source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> DecodedVideo:
    """In the child: report which heavy modules are loaded."""
    raise VideoError(
        "internal",
        ",".join(name for name in ("torch", "ray", "transformers") if name in sys.modules)
        or "none",
    )


@pytest.mark.parametrize(
    ("what", "error_type", "message"),
    [
        ("hang", "timeout", "not decoded within decode.timeout_s = 2 s"),
        ("segfault", "decoder_crash", "SIGSEGV"),
        ("killed", "decoder_crash", "SIGKILL"),
        ("exit", "decoder_crash", "exit code 3"),
        ("bomb", "out_of_memory", "decode.max_memory_mb = 512"),
        ("bug", "internal", "KeyError"),
    ],
)
def test_an_incident_with_one_video_affects_only_that_video(
    video: str, what: str, error_type: str, message: str
) -> None:
    settings = DecodeConfig(num_frames=4, timeout_s=2 if what == "hang" else 20, max_memory_mb=512)
    with DecodePool(settings, SPECS, task=act) as pool:
        before, failed, after, missing = pool.decode(
            [VideoSource(uri) for uri in (video, f"/{what}", video, "/no/such.mp4")]
        )
    assert isinstance(failed, VideoError)
    assert failed.error_type == error_type
    assert message in str(failed)
    for outcome in (before, after):
        assert isinstance(outcome, DecodedVideo)
        assert (
            [number_of(rgb) for rgb in outcome.slots("wide")]
            == outcome.frame_index.tolist()
            == [3, 9, 15, 21]
        )
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
    """The memory of one video is returned before the next.

    Each of them alone fits the limit, two do not.
    """
    path = write_video(
        tmp_path / "large.mp4",
        2,
        size=(3840, 2160),
        gop=1,
        b_frames=0,
        options={"preset": "ultrafast"},
    )
    with DecodePool(DecodeConfig(num_frames=2, timeout_s=60, max_memory_mb=384), SPECS) as pool:
        outcomes = pool.decode([VideoSource(str(path))] * 8)
    assert [str(outcome) for outcome in outcomes if not isinstance(outcome, DecodedVideo)] == []


def test_a_child_that_keeps_much_memory_is_replaced_before_the_next_video(video: str) -> None:
    with DecodePool(
        DecodeConfig(num_frames=4, timeout_s=20, max_memory_mb=512), SPECS, task=act
    ) as pool:
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
            assert all(
                isinstance(outcome, DecodedVideo)
                for outcome in pool.decode([VideoSource(video)] * 3)
            )


def test_closing_answers_waiting_videos() -> None:
    pool = DecodePool(SETTINGS, SPECS, task=act)
    futures = [pool.submit(VideoSource(uri)) for uri in ("/hang", "/hang")]
    pool.close()
    assert [
        "closed before this video was done" in str(future.result(timeout=30)) for future in futures
    ] == [True, True]
    with pytest.raises(ValueError, match="closed"):
        pool.submit(VideoSource("/pid"))


def test_a_video_that_is_given_up_frees_its_child(video: str) -> None:
    with DecodePool(SETTINGS, SPECS, 1, act) as pool:
        running, queued, waiting = (pool.submit(VideoSource("/x/hang")) for _ in range(3))
        for given_up in (waiting, queued, running):
            pool.cancel(given_up)
        outcomes = [given_up.result(10) for given_up in (running, queued, waiting)]
        assert [str(outcome) for outcome in outcomes] == ["/x/hang: decoding was cancelled"] * 3
        assert isinstance(pool.submit(VideoSource(video)).result(20), DecodedVideo)
        pool.cancel(running)  # a video that is done is left alone


# ------------------------------------------------------------ children that are killed from outside


def planned(
    source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> DecodedVideo:
    """In the child: do what line n of VIDEO.plan says for call n, then an ordinary decode.

    VIDEO.calls has a line per call: process, start, and the end if it ended.
    """
    calls = Path(f"{source.uri}.calls")
    before = calls.read_text().splitlines() if calls.exists() else []
    began = time.monotonic()
    calls.write_text("\n".join([*before, f"{os.getpid()} {began}"]))
    plan = Path(f"{source.uri}.plan")
    steps = plan.read_text().splitlines() if plan.exists() else []
    for step in steps[len(before)].split() if len(before) < len(steps) else ():
        if step.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[step])
        elif step.startswith("exit"):
            os._exit(int(step.removeprefix("exit")))
        else:
            time.sleep(float(step))
    decoded = decode_video(source, settings, specs)
    calls.write_text("\n".join([*before, f"{os.getpid()} {began} {time.monotonic()}"]))
    return decoded


@pytest.fixture
def plan(tmp_path: Path, video: str) -> Callable[..., str]:
    """plan("name", "step step", ...) -> a video whose call n performs the steps of line n."""

    def make(name: str, *lines: str) -> str:
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(Path(video).read_bytes())
        Path(f"{path}.plan").write_text("\n".join(lines))
        return str(path)

    return make


def calls_of(uri: str) -> list[list[float]]:
    """[process, start, end] of each call that ended, [process, start] of each that did not."""
    calls = Path(f"{uri}.calls")
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [[float(value) for value in line.split()] for line in lines]


def wait_for_call(uri: str, number: int) -> int:
    """The process of this call, once it exists."""
    deadline = time.monotonic() + 30
    while len(calls_of(uri)) < number:
        assert time.monotonic() < deadline, f"no call {number} of {uri}"
        time.sleep(0.01)
    return int(calls_of(uri)[number - 1][0])


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_child_killed_from_outside_is_not_the_videos_fault(
    plan: Callable[..., str], name: str, num_processes: int
) -> None:
    uris = [plan("a"), plan("b", name), plan("c")]
    with DecodePool(SETTINGS, SPECS, num_processes, planned) as pool:
        outcomes = pool.decode([VideoSource(uri) for uri in uris])
    assert [str(outcome) for outcome in outcomes if not isinstance(outcome, DecodedVideo)] == []
    assert [len(calls_of(uri)) for uri in uris] == [1, 2, 1]
    assert len({call[0] for call in calls_of(uris[1])}) == 2, "the second try has a fresh child"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "cause unknown"),
        (3, "exit code 3"),
        (-11, "SIGSEGV"),
        (-9, "SIGKILL, perhaps the system's out-of-memory killer"),
        (-40, "signal 40"),
    ],
)
def test_how_a_child_died_is_said(code: int | None, said: str) -> None:
    assert _describe_exit(code) == said


@pytest.mark.parametrize(
    ("lines", "message", "num_calls"),
    [
        (
            ["SIGKILL"] * 4,
            r"died twice, the second time as the only video in this worker \(SIGKILL",
            2,
        ),
        (
            ["SIGTERM"] * 4,
            r"died twice, the second time as the only video in this worker \(SIGTERM",
            2,
        ),
        (["SIGKILL", "SIGSEGV"], r"died twice, .* \(SIGSEGV", 2),
        (["SIGSEGV"], r"the decoder process died \(SIGSEGV", 1),
        (["SIGABRT"], r"the decoder process died \(SIGABRT", 1),
        (["exit3"], r"the decoder process died \(exit code 3", 1),
        (["exit255"], r"the decoder process died \(exit code 255", 1),
    ],
    ids=["killed", "terminated", "killed-segfault", "segfault", "abort", "exit", "exit255"],
)
def test_how_often_a_video_is_retried_when_its_child_dies(
    plan: Callable[..., str], lines: list[str], message: str, num_calls: int
) -> None:
    uris = [plan("a"), plan("b", *lines), plan("c")]
    with DecodePool(SETTINGS, SPECS, 2, planned) as pool:
        before, failed, after = pool.decode([VideoSource(uri) for uri in uris])
    assert isinstance(failed, VideoError)
    assert failed.error_type == "decoder_crash"
    assert isinstance(failed, DecoderKilled) == (lines[-1] in ("SIGKILL", "SIGTERM"))
    assert re.search(message, str(failed))
    assert len(calls_of(uris[1])) == num_calls
    assert isinstance(before, DecodedVideo)
    assert isinstance(after, DecodedVideo)


def test_a_child_is_killed_while_it_decodes(plan: Callable[..., str]) -> None:
    uri = plan("a", "60")
    with DecodePool(SETTINGS, SPECS, task=planned) as pool:
        future = pool.submit(VideoSource(uri))
        os.kill(wait_for_call(uri, 1), signal.SIGTERM)
        assert isinstance(future.result(timeout=30), DecodedVideo)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_of_the_children_is_killed(
    plan: Callable[..., str], how: signal.Signals
) -> None:
    """Its children end with it, and nothing says how."""
    uris = [plan("a", "60"), plan("b", "60"), plan("twice", "60", "60"), plan("c")]
    with DecodePool(SETTINGS, SPECS, 3, planned) as pool:
        futures = [pool.submit(VideoSource(uri)) for uri in uris]
        for uri in uris[:3]:
            wait_for_call(uri, 1)
        os.kill(children._SERVER._forkserver_pid, how)
        wait_for_call(uris[2], 2)
        os.kill(children._SERVER._forkserver_pid, how)
        a, b, twice, c = [future.result(timeout=60) for future in futures]
    assert all(isinstance(outcome, DecodedVideo) for outcome in (a, b, c))
    assert isinstance(twice, DecoderKilled)
    assert "died twice, the second time as the only video in this worker (SIGKILL" in str(twice)


def test_children_that_end_before_they_take_a_video_are_not_its_fault(
    video: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DecodePool(SETTINGS, SPECS, 1, act) as pool:
        start = pool._new_pool

        def ended(num_processes: int) -> pebble.ProcessPool:
            made = start(num_processes)
            made.stop()
            made.join()
            return made

        monkeypatch.setattr(pool, "_new_pool", ended)
        (failed,) = pool.decode([VideoSource(video)])
    assert isinstance(failed, DecoderKilled)
    assert "the decoder process died (cause unknown)" in str(failed)


def test_a_second_try_is_alone(plan: Callable[..., str]) -> None:
    """No other video decodes meanwhile, neither a running one nor a later one."""
    killed = [plan("k1", "SIGKILL", "0.5"), plan("k2", "0.2 SIGKILL", "0.5")]
    others = [plan("a", "1"), *(plan(f"o{number}", "0.1") for number in range(8))]
    with DecodePool(SETTINGS, SPECS, 3, planned) as pool:
        futures = [pool.submit(VideoSource(uri)) for uri in [*killed, *others]]
        wait_for_call(killed[0], 2)
        late = plan("late")
        futures.append(pool.submit(VideoSource(late)))
        outcomes = [future.result(timeout=60) for future in futures]
    assert [str(outcome) for outcome in outcomes if not isinstance(outcome, DecodedVideo)] == []
    seconds = [calls_of(uri)[1] for uri in killed]
    rest = [call for uri in [*others, late] for call in calls_of(uri)]
    for number, (_, start, end) in enumerate(seconds):
        beside = [
            call for call in [*rest, seconds[1 - number]] if call[1] < end and call[2] > start
        ]
        assert beside == []


def test_the_time_limit_counts_for_each_try(plan: Callable[..., str]) -> None:
    slow, hanging = plan("slow", "1 SIGKILL", "1"), plan("hanging", "SIGKILL", "60")
    with DecodePool(DecodeConfig(num_frames=4, timeout_s=1.8), SPECS, 2, planned) as pool:
        outcomes = pool.decode([VideoSource(slow), VideoSource(hanging)])
    assert isinstance(outcomes[0], DecodedVideo)
    assert isinstance(outcomes[1], VideoError)
    assert outcomes[1].error_type == "timeout"


@pytest.mark.parametrize("second_runs", [True, False])
def test_closing_answers_a_second_try(plan: Callable[..., str], second_runs: bool) -> None:
    killed, other, late = plan("killed", "SIGKILL", "60"), plan("other", "60"), plan("late")
    pool = DecodePool(SETTINGS, SPECS, 2, planned)
    uris = [killed, late] if second_runs else [killed, other, late]
    futures = [pool.submit(VideoSource(uri)) for uri in uris]
    wait_for_call(killed, 2 if second_runs else 1)
    if not second_runs:
        time.sleep(1)  # the other one continues, so the second try and perhaps the late one wait
    pool.close()
    outcomes = [future.result(timeout=30) for future in futures]
    assert "closed before this video was done" in str(outcomes[0])
    assert all(isinstance(outcome, (DecodedVideo, VideoError)) for outcome in outcomes)


# --------------------------------------------------------------------------------------------------


def test_children_are_light() -> None:
    with DecodePool(SETTINGS, SPECS, task=heavy_modules) as pool:
        assert str(pool.decode([VideoSource("x")])[0]) == "none"


def _run(code: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (
        [sys.executable, str(code)] if isinstance(code, Path) else [sys.executable, "-c", code]
    )
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=True
    )


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
def test_a_script_without_a_main_guard_runs_once_and_silently(
    tmp_path: Path, video: str, as_file: bool
) -> None:
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


@pytest.mark.parametrize("length", [84, 150])
def test_a_long_temporary_folder(
    tmp_path: Path, video: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch systems create folders longer than a Unix socket's path may be."""
    folder = Path(f"{tmp_path}/".ljust(length, "x"))
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    done = _run(SCRIPT, video)
    assert (done.stdout, done.stderr) == ("main runs\n24\n", "")
    assert list(folder.iterdir()) == []


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
    parent = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
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


def test_a_pool_that_cannot_be_started_midway_loses_no_video(
    plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a process may open no more files.

    A real limit would also affect the tests' own files.
    """
    uris = [plan("a"), plan("b", "SIGKILL"), plan("c"), plan("d")]
    with DecodePool(SETTINGS, SPECS, 1, planned) as pool:
        first = pool._new_pool
        calls: list[int] = []

        def start(num_processes: int) -> object:
            calls.append(num_processes)
            if len(calls) > 1:
                raise OSError(24, "Too many open files")
            return first(num_processes)

        monkeypatch.setattr(pool, "_new_pool", start)
        futures = [pool.submit(VideoSource(uri)) for uri in uris]
        outcomes = [future.result(timeout=60) for future in futures]
    assert len(calls) == 2
    assert isinstance(outcomes[0], DecodedVideo)
    lost = [outcome for outcome in outcomes if not isinstance(outcome, DecodedVideo)]
    assert lost
    assert all(
        "cannot start a decoder process: [Errno 24] Too many open files" in str(outcome)
        for outcome in lost
    )
