"""Containers x codecs x false clocks: each picture is the frame of its row, lies are reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support.clock import (
    CONTAINERS,
    NUM_FRAMES,
    STEP,
    TICKS,
    Clock,
    joined,
    right,
    sequential,
    write_clock,
    write_packed_b_frames,
    write_sources,
)
from support.video import number_of, picture, write_video

from tsq_ray.config import DecodeConfig
from tsq_ray.decode import DecodedVideo, FrameSpec, VideoSource, decode_video, job
from tsq_ray.errors import VideoError

SLOW = pytest.mark.slow
HOUR = 3600 * TICKS
HEALTHY = ("right", "starts at one hour", "wraps at 33 bits")
CLOCKS: dict[str, Clock] = {
    "right": right,
    "starts at one hour": lambda i: right(i) + HOUR,
    "wraps at 33 bits": lambda i: right(i) + (1 << 33) - TICKS - 20 * STEP,
    "jumps": lambda i: right(i) + (HOUR if i >= 30 else 0),
    "starts again": lambda i: right(i % 30),
    "one far ahead": lambda i: right(i) + (HOUR if i == 30 else 0),
    "one a little ahead": lambda i: right(i) + (2 * TICKS + 1000 if i == 20 else 0),
    "one behind": lambda i: right(i) + 2 * HOUR - (HOUR if i == 30 else 0),
    "threes share a time": lambda i: right(i // 3 * 3),
    "neighbours swapped": lambda i: right(i ^ 1),
    "two pairs swapped": lambda i: right(i ^ 1 if i in (20, 21, 40, 41) else i),
    "threes rotated": lambda i: right(i // 3 * 3 + (i + 1) % 3),
    "stands still for a second": lambda i: right(i) + (TICKS if i >= 30 else 0),
}
NOT_IN_AVI = ("starts at one hour", "wraps at 33 bits", "jumps", "one far ahead", "one behind")
"""An AVI counts frames: its clock can stand still only for a while."""
FEWER_TIMES = ("avi", "mpg")
"""A program stream stamps only the first of the frames that begin in one of its packets."""
MAIN_WAYS = (("uniform", "pyav", 16), ("keyframe", "pyav", 16), ("keyframe", "pyav", 4))
WAYS = (
    *MAIN_WAYS,
    ("uniform", "decord", 16),
    ("uniform", "pyav", 16, (0.1, 0.9) * 8),
    ("uniform", "pyav", 5, (0.0,) * 5),
)
EVERY_WAY = ("right", "jumps", "two pairs swapped")
SAMPLE = {
    ("ts", "h264_open"),
    ("mpg", "mpeg2_b"),
    ("mkv", "h264_flat_b"),
    ("mkv", "mpeg4"),
    ("webm", "vp8"),
    ("webm", "vp9"),
    ("mp4", "h264_b"),
    ("fragments.mp4", "hevc_b"),
    ("avi", "mpeg4_b"),
    ("flv", "h264"),
}
"""Every container and every codec; the other pairs are slow."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("sources"))


def decode(
    path: Path,
    strategy: str = "uniform",
    backend: str = "pyav",
    num_frames: int = 16,
    places: tuple[float, ...] | None = None,
    **more: Any,
) -> DecodedVideo:
    config = DecodeConfig.model_validate(
        {"strategy": strategy, "backend": backend, "num_frames": num_frames, **more}
    )
    return decode_video(VideoSource(str(path), places=places), config, {"all": FrameSpec(64)})


def check(
    path: Path, healthy: bool = False, told: bool = True, ways: Sequence[Any] = WAYS
) -> list[DecodedVideo]:
    """Every picture is that of a sequential decode; few distinct frames and wrong times are told.

    `told`: of wrong times by every way with 16 slots, else by the first way only, and of two
    neighbours in each other's place only if either is chosen: no other picture depends on it.
    """
    found = sequential(path)
    if not found:  # an edit list may hide every frame
        for way in ways:
            with pytest.raises(VideoError, match="can be decoded"):
                decode(path, *way)
        return []
    truth, times = [number for number, _ in found], [time for _, time in found]
    known = len(times) > 1 and None not in times
    gaps = np.diff(np.array(times, np.int64)) if known else np.ones(1)
    late = np.flatnonzero(gaps <= 0)
    ascends = None not in times and not len(late)
    swapped = len(late) == 1 and gaps.min() > -np.median(gaps)
    steps = gaps if ascends else np.ones(1)
    jumps = steps.max() >= 100 * np.median(steps) and steps.max() * tick(path) >= 3
    decoded = [decode(path, *way) for way in ways]
    for way, video in zip(ways, decoded, strict=True):
        shown = [number_of(picture) for picture in video.slots("all")]
        assert shown == [truth[i] for i in video.frame_index], (path.name, way)
        assert video.source_num_frames == len(truth), (path.name, way)
        assert len(truth) < 16 or (np.diff(video.frame_pts_s) >= 0).all(), (path.name, way)
        said = path.name, way, video.warnings
        few = len(set(video.frame_index.tolist())) <= len(shown) / 2 and len(truth) >= 16
        assert not few or any("slots hold" in text for text in said[-1]), said
        wrong = any(re.search(WRONG_TIMES, text) for text in said[-1])
        apart = swapped and not np.isin(video.frame_index, [*late, *(late + 1)]).any()
        must = len(shown) == 16 and (told or (way == ways[0] and not apart))
        assert wrong or ascends or not must, said
        assert wrong or not jumps or any("a clock that jumped" in text for text in said[-1]), said
        assert not (healthy and said[-1]), said
    return decoded


WRONG_TIMES = r"the timestamps of \d+ frames are wrong|no timestamp"


def tick(path: Path) -> float:
    """The unit of the file's times in seconds."""
    with av.open(str(path)) as container:
        return float(container.streams.video[0].time_base or 0)


def test_the_sample_has_every_container_and_codec() -> None:
    containers, codecs = zip(*SAMPLE, strict=True)
    assert set(containers) == set(CONTAINERS)
    assert set(codecs) == set.union(*CONTAINERS.values())


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        pytest.param(
            container,
            codec,
            marks=() if (container, codec) in SAMPLE else SLOW,
        )
        for container in CONTAINERS
        for codec in sorted(CONTAINERS[container])
    ],
)
def test_every_picture_is_the_one_named(
    sources: dict[str, Path], tmp_path: Path, container: str, codec: str
) -> None:
    for name, clock in CLOCKS.items():
        if container == "avi" and name in NOT_IN_AVI:
            continue
        path = write_clock(sources[codec], tmp_path / f"{codec} {name}.{container}", clock)
        # an AVI has only decoding times: FFmpeg invents the times of reordered frames
        invented = container == "avi" and codec in ("h264_b", "h264_flat_b")
        decoded = check(
            path,
            healthy=name in HEALTHY and not invented,
            ways=WAYS if name in EVERY_WAY else MAIN_WAYS,
        )
        if container not in FEWER_TIMES and name in (
            "jumps",
            "starts again",
            "one far ahead",
            "one a little ahead",
        ):
            assert all(len(set(video.frame_index.tolist())) == 16 for video in decoded[:1]), name
        if name in HEALTHY or (
            container != "mpg" and name in ("jumps", "one far ahead", "neighbours swapped")
        ):
            # if an edit list hides a frame whose time lies before all others, it is gone
            assert decoded[0].duration_s == pytest.approx(NUM_FRAMES / 24, abs=0.1), name


@pytest.mark.parametrize("container", ["mkv", "mp4"])
@pytest.mark.parametrize(
    "codec", [codec for codec in sorted(CONTAINERS["mkv"]) if codec not in ("h264", "mpeg4")]
)
@pytest.mark.parametrize("late", [pytest.param(0, marks=SLOW), 1])
def test_decoding_times_in_place_of_presentation_times(
    sources: dict[str, Path], tmp_path: Path, codec: str, container: str, late: int
) -> None:
    path = write_clock(
        sources[codec],
        tmp_path / f"{codec}.{container}",
        lambda i: right(i + late),
        by_decoding=True,
    )
    check(path, told=False)


UNEVEN: dict[str, Clock] = {
    "one short step": lambda i: right(i) - (STEP * 2 // 3 if i >= 31 else 0),
    "one long step": lambda i: right(i) + (STEP * 2 // 3 if i >= 31 else 0),
    "one frame late": lambda i: right(i) + (STEP * 2 // 3 if i == 31 else 0),
    "one of 60 twice as fast": lambda i: right(i) - (STEP // 2 if i >= 31 else 0),
}


@pytest.mark.parametrize("container", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize(
    "codec",
    [
        pytest.param("h264_b", marks=SLOW),
        "h264_open",
        pytest.param("hevc_b", marks=SLOW),
        "mpeg2_b",
    ],
)
def test_a_true_uneven_step_changes_no_plan(
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    container: str,
    codec: str,
) -> None:
    monkeypatch.setattr(job, "find_survivors", None)  # the whole file is never decoded
    for name, clock in UNEVEN.items():
        path = write_clock(sources[codec], tmp_path / f"{name}.{container}", clock)
        *_, by_keyframes = check(path, healthy=True, ways=MAIN_WAYS)
        # the sample table of an MP4 has decoding times, so a keyframe near a border may be missed
        if container != "mp4":
            assert keyframes(path).issuperset(by_keyframes.frame_index.tolist()), name


def keyframes(path: Path) -> set[int]:
    """The places of the keyframes in presentation order."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
    packets.sort(key=lambda packet: packet.pts)
    return {i for i, packet in enumerate(packets) if packet.is_keyframe}


def test_packed_b_frames(tmp_path: Path) -> None:
    for video in check(write_packed_b_frames(tmp_path / "packed.avi")):
        assert "run backwards" in video.warnings[0]


@pytest.mark.parametrize("codec", ["h264", "h264_b", "mpeg2_b", "hevc_b"])
def test_segments_one_after_the_other(sources: dict[str, Path], tmp_path: Path, codec: str) -> None:
    part = write_clock(sources[codec], tmp_path / "part.ts", right)
    later = write_clock(sources[codec], tmp_path / "later.ts", lambda i: right(i) + HOUR)
    for path in (
        joined(tmp_path / "same.ts", part, part),
        joined(tmp_path / "hour.ts", part, later),
    ):
        for video in check(path):
            assert video.source_num_frames == 2 * NUM_FRAMES
            assert video.duration_s == pytest.approx(2 * NUM_FRAMES / 24, abs=0.1)


@pytest.mark.parametrize(
    "clock",
    [lambda i: None if i % 3 else right(i), lambda i: None if i > 20 else right(i), lambda i: None],
)
@pytest.mark.parametrize("codec", ["h264", "h264_b", "mpeg2_b"])
def test_frames_without_a_time(
    sources: dict[str, Path], tmp_path: Path, codec: str, clock: Clock
) -> None:
    for video in check(write_clock(sources[codec], tmp_path / "untimed.ts", clock)):
        assert video.source_num_frames == NUM_FRAMES


def test_more_frames_per_second_than_clock_ticks(tmp_path: Path) -> None:
    path = write_clock(
        write_video(tmp_path / "source.mkv", 240, size=(96, 64)),
        tmp_path / "fast.mkv",
        lambda i: i * TICKS // 2400,
    )
    for video in check(path):
        assert video.source_num_frames == 240
        assert video.duration_s == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_picture_that_stands_still_for_a_minute(tmp_path: Path, suffix: str) -> None:
    times = [*range(24), *range(24 * 61, 24 * 62)]
    for video in check(write_video(tmp_path / f"still.{suffix}", 48, times=times, size=(96, 64))):
        assert video.duration_s == pytest.approx(62, abs=0.1)
        told_of_step(video, 60)


def told_of_step(video: DecodedVideo, seconds: int) -> None:
    """One warning, which names the step, and no cause that is not known."""
    slots, shown = len(video.frame_index), len(set(video.frame_index.tolist()))
    few = f"{slots} slots hold {shown} distinct frames of {video.source_num_frames}: "
    [warning] = video.warnings
    assert re.fullmatch(
        (few if shown <= slots / 2 else "")
        + rf"frame \d\d, at 1\.[012] s, is shown for {seconds}\.\d s, \d+ times the usual step: "
        "a still picture, lost frames or a clock that jumped",
        warning,
    ), warning


@pytest.mark.parametrize(
    "seconds", [5, pytest.param(30, marks=SLOW), pytest.param(100, marks=SLOW), 500]
)
@pytest.mark.parametrize(
    ("container", "codec"),
    [
        (container, codec)
        for container in CONTAINERS
        for codec in ("h264", "h264_b", "vp9")
        if codec in CONTAINERS[container]
    ],
)
def test_a_step_that_may_be_a_jump_of_the_clock_is_named(
    sources: dict[str, Path], tmp_path: Path, container: str, codec: str, seconds: int
) -> None:
    if container == "avi" and (seconds > 30 or codec == "h264_b"):
        pytest.skip("an AVI counts frames and has no times of its own for reordered ones")
    if (container, codec, seconds) == ("flv", "h264_b", 500):
        pytest.skip("FFmpeg takes the time of one frame away: a fault with a warning of its own")
    path = write_clock(
        sources[codec],
        tmp_path / f"step.{container}",
        lambda i: right(i) + (seconds * TICKS if i >= 30 else 0),
    )
    for video in check(path, ways=MAIN_WAYS[:2]):
        if container == "ts" and seconds == 500:
            assert "1 jump by up to 500.0 s" in video.warnings[0]
        else:
            told_of_step(video, seconds)


def test_a_step_is_named_whatever_the_number_of_distinct_frames(tmp_path: Path) -> None:
    times = [*range(1200), *range(1200 + 24 * 5, 2400 + 24 * 5)]  # at most one slot is in the step
    path = write_video(tmp_path / "long.mkv", 2400, times=times, size=(32, 16))
    for strategy in ("uniform", "keyframe"):
        [warning] = decode(path, strategy).warnings
        assert warning.startswith("frame 1199, at 50.0 s, is shown for 5.0 s, 12")


def test_a_video_made_too_long_by_one_step_says_so(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    path = write_clock(
        sources["h264"],
        tmp_path / "jump.mkv",
        lambda i: right(i) + (300 * TICKS if i >= 30 else 0),
    )
    for strategy in ("uniform", "keyframe"):
        with pytest.raises(
            VideoError, match=r"allows 120 \(frame 29, at 1\.2 s, is shown for 300\.0 s"
        ) as failure:
            decode(path, strategy, max_duration_s=120)
        assert failure.value.error_type == "too_large"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "num_frames", "duration_s", "warning"),
    [
        ("ts_concat_same_start.ts", 100, 10.0, "1 run backwards"),
        ("ts_jump_forward_1h.ts", 100, 10.0, "1 jump by"),
        ("dvr_outlier_ahead.ts", 100, 10.0, "1 jump by"),
        ("avi_h264_b.avi", 50, 5.0, "22 run backwards"),
        ("fps2400.mkv", 2400, 1.0, "1399 repeat"),
        ("start_1h.mkv", 50, 5.0, None),
    ],
)
def test_files_of_the_reports(
    data_dir: Path, name: str, num_frames: int, duration_s: float, warning: str | None
) -> None:
    for strategy in ("uniform", "keyframe"):
        video = decode(data_dir / "cases" / name, strategy)
        assert (video.source_num_frames, video.duration_s) == (
            num_frames,
            pytest.approx(duration_s, abs=0.1),
        )
        assert len(set(video.frame_index.tolist())) == 16
        assert (video.warnings == []) if warning is None else (warning in video.warnings[0])


def one_frame(far: int) -> Callable[[int, int], Clock]:
    return lambda at, size: lambda i: right(i) + (far * size if i == at else 0)


FAULTS: dict[str, Callable[[int, int], Clock]] = {
    "shift": lambda at, size: lambda i: right(i) + size * 977,
    "wrap": lambda at, size: lambda i: right(i) + (1 << 33) - TICKS - right(at),
    "jump": lambda at, size: lambda i: right(i) + (size * size * STEP if i >= at else 0),
    "restart": lambda at, size: lambda i: right(i % max(1, at)),
    "ahead": one_frame(STEP + 7),
    "far ahead": one_frame(STEP * 1999),
    "behind": lambda at, size: lambda i: right(i) + HOUR - (size * STEP // 3 if i == at else 0),
    "repeats": lambda at, size: lambda i: right(i - i % (size % 7 + 1)) if i >= at else right(i),
    "gaps": lambda at, size: lambda i: right(i) + i // (at + 1) * size * STEP,
    "missing": lambda at, size: lambda i: None if i % (size % 5 + 2) == at % 2 else right(i),
    "reordered": lambda at, size: (
        lambda i: right(at - (i - at)) if at <= i < at + size % 9 and i <= 2 * at else right(i)
    ),
}


Case = tuple[Any, ...]
"""Container, codec, and one or two faults of (name, at, size)."""


@st.composite
def clocks(draw: st.DrawFn) -> Case:
    container = draw(st.sampled_from(sorted(CONTAINERS)))
    codec = draw(st.sampled_from(sorted(CONTAINERS[container])))
    fault = st.sampled_from([name for name in FAULTS if container == "ts" or name != "missing"])
    faults = st.tuples(fault, st.integers(1, NUM_FRAMES - 1), st.integers(1, 200))
    return container, codec, *draw(st.lists(faults, min_size=1, max_size=2))


def combined(clocks: Sequence[Clock]) -> Clock:
    """Each clock's error added to those of the others."""

    def time(number: int) -> int | None:
        times = [clock(number) for clock in clocks]
        known = [time - right(number) for time in times if time is not None]
        return right(number) + sum(known) if len(known) == len(times) else None

    return time


def drawn(sources: dict[str, Path], folder: Path, case: Case) -> None:
    container, codec, *faults = case
    name = "-".join(str(part) for fault in faults for part in fault)
    clock = combined([FAULTS[fault](at, size) for fault, at, size in faults])
    try:
        path = write_clock(sources[codec], folder / f"{codec}-{name}.{container}", clock)
    except av.error.FFmpegError:
        assume(False)  # the container cannot hold such times
    check(path, told=False)


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


# one frame's time lies between those of two others, so that the packets look healthy
@example(case=("mkv", "mpeg2_b", ("behind", 57, 10)))
@example(case=("ts", "h264_flat_b", ("behind", 45, 8)))
@example(case=("ts", "h264_b", ("behind", 59, 11)))
@example(case=("ts", "mpeg2_b", ("ahead", 5, 4)))
@example(case=("mp4", "h264_open", ("behind", 30, 10)))
@example(case=("mp4", "h264_flat_b", ("behind", 39, 13)))
@example(case=("mp4", "mpeg2_b", ("ahead", 5, 7)))
# one wrong stamp in a clock that stands still is no usual step
@example(case=("flv", "h264", ("restart", 1, 1), ("far ahead", 1, 5)))
# no chosen frame is in the wrong place
@example(case=("mp4", "h264_flat_b", ("ahead", 1, 1)))
# no frame is left
@example(case=("mp4", "h264", ("restart", 15, 1), ("restart", 31, 1)))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(case=clocks())
def test_a_sample_of_drawn_clocks(sources: dict[str, Path], tmp_path: Path, case: Case) -> None:
    drawn(sources, tmp_path, case)


@SLOW
@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@given(case=clocks())
def test_drawn_clocks(sources: dict[str, Path], tmp_path: Path, case: Case) -> None:
    drawn(sources, tmp_path, case)


def test_a_seek_in_a_program_stream_gives_each_picture_its_own_time(tmp_path: Path) -> None:
    source = tmp_path / "source.mkv"
    options = {"bf": "2"}
    write_video(source, 240, gop=12, size=(96, 64), codec="mpeg2video", options=options)
    path = write_clock(source, tmp_path / "seeks.mpg", right)
    for num_frames in range(1, 17):
        check(path, healthy=True, ways=[("keyframe", "pyav", num_frames)])


def test_a_stream_that_may_reorder_and_does_not_is_read_by_its_sample_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.mkv"
    with av.open(str(source), "w") as container:
        stream = container.add_stream(
            "libx264",
            rate=24,
            options={"bf": "3", "g": "3", "x264-params": "scenecut=0:keyint=3:min-keyint=3"},
        )
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(number, 96, 64), format="rgb24").reformat(
                format="yuv420p"
            )
            frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, 24), PictureType.P
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path = write_clock(source, tmp_path / "one_clock.mp4", right)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        assert container.streams.video[0].codec_context.has_b_frames
        assert all(packet.pts == packet.dts for packet in packets)
    expected = decode(path, "keyframe").frame_index.tolist()
    monkeypatch.setattr(job, "scan", None)  # nothing is read but what the table names
    decoded = decode(path, "keyframe")
    assert (
        [number_of(rgb) for rgb in decoded.slots("all")] == decoded.frame_index.tolist() == expected
    )
    assert decoded.warnings == []
