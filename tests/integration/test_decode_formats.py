"""Every real file of the development data, compared with an independent full decode by PyAV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
import pytest
from PIL import Image
from support.video import write_video

from jobs.benchmarks.support.s3 import BUCKETS, S3Server
from tsq_ray import storage
from tsq_ray.config import DecodeConfig
from tsq_ray.decode import DecodedVideo, DecodePool, FrameSpec, VideoSource, decode_video, job
from tsq_ray.errors import StorageError, VideoError

pytestmark = pytest.mark.data

SPECS = {"small": FrameSpec(64)}
FORMATS = [
    "androidx_bbb_800x640_768kbps_30fps_avc_non_reference_3b.mp4",
    "androidx_bbb_800x640_768kbps_30fps_avc_pyramid_3b.mp4",
    "androidx_bbb_800x640_768kbps_30fps_vp9.mp4",
    "androidx_bbb_960x540_60fps_vp8.webm",
    "androidx_bt601.mp4",
    "androidx_fragmented_captions.mp4",
    "androidx_fragmented_captions_h265.mp4",
    "androidx_h265_bframes.mp4",
    "androidx_hdr10-av1.mp4",
    "androidx_hlg10-color-test.mp4",
    "androidx_iibbibb_editlist_videoonly.mp4",
    "androidx_sample_av1.mp4",
    "androidx_sample_ipcm_24le.mp4",
    "androidx_sample_portrait.mp4",
    "androidx_sample_rotate_and_reflect.mp4",
    "androidx_sample_sef_slow_motion.mp4",
    "androidx_sample_with_it35_track.mp4",
    "androidx_sample_with_nero_chapters_only.mp4",
    "androidx_water_180_mvhevc_5frames.mov",
    "decord_flipping_a_pancake.mkv",
    "decord_unordered.mov",
    "decord_video_0.mov",
    "decord_video_180.mov",
    "decord_video_270.mov",
    "decord_video_90.mov",
    "synthetic_ok_16x16.mp4",
    "synthetic_ok_1frame.mp4",
    "synthetic_ok_8frames.mp4",
    "synthetic_ok_anim.gif",
    "synthetic_ok_av1.mkv",
    "synthetic_ok_h264_bframes_faststart.mp4",
    "synthetic_ok_h264_moov_end.mp4",
    "synthetic_ok_hevc.mp4",
    "synthetic_ok_hevc_10bit.mp4",
    "synthetic_ok_mpeg2_interlaced.mpg",
    "synthetic_ok_mpeg4.avi",
    "synthetic_ok_odd_321x241_yuv444.mp4",
    "synthetic_ok_vfr.mp4",
    "synthetic_ok_vp9.webm",
    "torchcodec_av1_video.mkv",
    "torchcodec_bt709_full_range.mp4",
    "torchcodec_h264_10bits.mp4",
    "torchcodec_h265_10bits.mp4",
    "torchcodec_h265_video.mp4",
    "torchcodec_nasa_13013.mp4",
]
LARGE = (
    "androidx_sample_fragmented_seekable_multiple_sidx.mp4"  # 600 frames of 1080p: half a minute
)
DAMAGED = "decord_corrupted.mp4"  # decodes with warnings
LONGER = ["long/charades.mp4", "long/car-detection.mp4", "untrimmed/untrimmed_64s_0.mp4"]
# H.264 with and without non-reference frames, HEVC, VP9, AV1, 10 bits, rotations
BY_THE_TABLE = [
    "formats/androidx_bbb_800x640_768kbps_30fps_avc_non_reference_3b.mp4",
    "formats/androidx_bbb_800x640_768kbps_30fps_avc_pyramid_3b.mp4",
    "formats/androidx_bbb_800x640_768kbps_30fps_vp9.mp4",
    "formats/androidx_h265_bframes.mp4",
    "formats/androidx_sample_av1.mp4",
    "formats/androidx_sample_portrait.mp4",
    "formats/androidx_sample_rotate_and_reflect.mp4",
    "formats/synthetic_ok_h264_bframes_faststart.mp4",
    "formats/synthetic_ok_hevc_10bit.mp4",
    "formats/torchcodec_h264_10bits.mp4",
    "formats/torchcodec_nasa_13013.mp4",
    *LONGER,
]
# display matrices from these files' headers: turns of the stored picture, then a reflection
TURNS = {"decord_video_90.mov": 3, "decord_video_180.mov": 2, "decord_video_270.mov": 1}


@dataclass
class Reference:
    """Every frame of a file in presentation order, as shown, at 64 x 64."""

    pictures: np.ndarray
    times_s: np.ndarray
    is_key: np.ndarray
    size: tuple[int, int]


def every_frame(container: Any, stream: Any) -> Iterator[Any]:
    """Every frame that decodes, in order; skips packets that do not."""
    for packet in container.demux(stream):
        with suppress(av.error.InvalidDataError):
            yield from packet.decode()


@cache
def reference(path: Path) -> Reference:
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for frame in every_frame(container, stream):
            rgb = frame.to_ndarray(format="rgb24")
            rgb = (
                rgb.transpose(1, 0, 2)
                if path.name == "androidx_sample_rotate_and_reflect.mp4"
                else np.rot90(rgb, TURNS.get(path.name, 0))
            )
            image = Image.fromarray(np.ascontiguousarray(rgb))
            frames.append(
                (
                    frame.pts,
                    np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)),
                    frame.key_frame,
                    image.size,
                )
            )
        time_base = float(stream.time_base)
    assert [frame[0] for frame in frames] == sorted(frame[0] for frame in frames)
    times = np.asarray([(frame[0] - frames[0][0]) * time_base for frame in frames])
    return Reference(
        np.stack([frame[1] for frame in frames]),
        times,
        np.asarray([bool(frame[2]) for frame in frames]),
        frames[0][3],
    )


def decode(path: Path, strategy: str, num_frames: int) -> DecodedVideo:
    return decode_video(
        VideoSource(str(path)),
        DecodeConfig.model_validate({"strategy": strategy, "num_frames": num_frames}),
        SPECS,
    )


def check(path: Path, decoded: DecodedVideo, num_frames: int) -> None:
    known = reference(path)
    assert decoded.source_num_frames == len(known.times_s)
    assert (decoded.width, decoded.height) == known.size
    assert decoded.frame_pts_s == pytest.approx(
        known.times_s[decoded.frame_index], abs=1e-4, rel=1e-5
    )
    assert (decoded.slots("small") == known.pictures[decoded.frame_index]).all()
    assert decoded.frame_index.shape == decoded.slot_frame.shape == (num_frames,)
    assert decoded.duration_s >= known.times_s[-1]


def check_choice(path: Path, decoded: DecodedVideo, num_frames: int) -> None:
    """Each interval's keyframe nearest its middle, else the frame shown in the middle."""
    known = reference(path)
    intervals = np.minimum(
        known.times_s / decoded.duration_s * num_frames + 1e-6, num_frames - 0.001
    ).astype(int)
    for i, index in enumerate(decoded.frame_index):
        keys = np.flatnonzero(known.is_key & (intervals == i))
        centre = (i + 0.5) / num_frames * decoded.duration_s
        if len(keys):
            assert index == keys[np.abs(known.times_s[keys] - centre).argmin()]
        else:
            assert index == np.searchsorted(known.times_s, centre + 1e-6, side="right") - 1


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize(
    "name",
    [f"formats/{name}" for name in FORMATS]
    + LONGER
    + [pytest.param(f"formats/{LARGE}", marks=pytest.mark.slow)],
)
def test_pictures_and_times_are_those_of_a_whole_decode(
    data_dir: Path, name: str, strategy: str
) -> None:
    path = data_dir / name
    for num_frames in (3, 16):
        decoded = decode(path, strategy, num_frames)
        check(path, decoded, num_frames)
        assert decoded.warnings == []
        known = reference(path)
        count = len(known.times_s)
        if count < num_frames:
            assert decoded.frame_index.tolist() == [i % count for i in range(num_frames)]
        elif strategy == "uniform":
            positions = (np.arange(num_frames) + 0.5) / num_frames * decoded.duration_s + 1e-9
            assert (
                decoded.frame_index.tolist()
                == (np.searchsorted(known.times_s, positions, side="right") - 1).tolist()
            )


@pytest.mark.parametrize("name", BY_THE_TABLE)
def test_frames_between_keyframes_by_the_sample_table_alone(
    data_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        job, "_MAX_WITHOUT_KEYFRAME", 1.0
    )  # even if a file with few keyframes would otherwise be decoded whole
    monkeypatch.delattr(job.DecodeJob, "exact")
    for num_frames in (7, 16):
        decoded = decode(data_dir / name, "keyframe", num_frames)
        check(data_dir / name, decoded, num_frames)
        check_choice(data_dir / name, decoded, num_frames)


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
def test_pictures_of_a_damaged_file_are_those_of_its_own_decode(
    data_dir: Path, strategy: str
) -> None:
    path = data_dir / "formats" / DAMAGED
    check(path, decode(path, strategy, 16), 16)


def test_no_format_is_left_out(data_dir: Path) -> None:
    assert sorted([*FORMATS, LARGE, DAMAGED]) == sorted(
        path.name for path in (data_dir / "formats").iterdir()
    )


@pytest.mark.parametrize("name", LONGER)
def test_keyframe_strategy_on_real_footage(data_dir: Path, name: str) -> None:
    check_choice(data_dir / name, decode(data_dir / name, "keyframe", 16), 16)


def test_frame_counts_are_those_of_the_list(data_dir: Path) -> None:
    with open(data_dir / "VIDEOS.tsv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file, delimiter="\t")}
    # of its two streams the list describes the first, a player shows the larger
    names = [
        name
        for name in FORMATS
        if name != "torchcodec_nasa_13013.mp4" and rows[f"formats/{name}"]["frames"]
    ]
    # one frame of each of these is hidden by an edit list
    hidden = {
        "androidx_iibbibb_editlist_videoonly.mp4": 1,
        "androidx_sample_sef_slow_motion.mp4": 1,
    }
    assert len(names) > 25
    for name in names:
        counted = decode(data_dir / "formats" / name, "uniform", 2).source_num_frames
        assert counted == int(rows[f"formats/{name}"]["frames"]) - hidden.get(name, 0), name


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize(
    ("name", "error_type", "match"),
    [
        ("bad_audio_only.m4a", "not_video", "no video stream"),
        ("bad_audio_only.mp4", "not_video", "no video stream"),
        ("bad_random.mp4", "not_video", "not recognised as video"),
        ("bad_text.mp4", "not_video", "not recognised as video"),
        ("bad_truncated_no_moov.mp4", "truncated", "lacks its index"),
        ("bad_zero_bytes.mp4", "not_video", "an empty file"),
    ],
)
def test_bad_files(data_dir: Path, name: str, error_type: str, match: str, strategy: str) -> None:
    with pytest.raises(VideoError, match=match) as caught:
        decode(data_dir / "bad" / name, strategy, 16)
    assert caught.value.error_type == error_type


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize(
    ("name", "count", "warnings"),
    [
        (
            "bad/bad_truncated_faststart.mp4",
            56,
            [
                "header says 96 frames, 56 can be decoded",
                "header says 4.0 s, the frames last 2.3 s",
            ],
        ),
        (
            "bad/bad_bitflips_mdat.mp4",
            89,
            [
                "96 frames are stored, 89 can be decoded",
                "damaged: 61 of the 89 frames that can be decoded",
            ],
        ),
        (
            "formats/decord_corrupted.mp4",
            49,
            [
                "50 frames are stored, 49 can be decoded",
                "damaged: 1 of the 49 frames that can be decoded",
            ],
        ),
        ("bad/sample_fragmented_sei.mp4", 30, []),
    ],
)
def test_damaged_files_run_over_what_decodes(
    data_dir: Path, name: str, count: int, warnings: list[str], strategy: str
) -> None:
    decoded = decode(data_dir / name, strategy, 16)
    assert decoded.source_num_frames == count
    assert decoded.warnings == warnings
    assert decoded.frame_index.tolist() == sorted(set(decoded.frame_index.tolist()))
    assert decoded.frame_index[-1] < count
    assert decoded.duration_s < 10


def test_keyframes_of_an_s3_object_take_byte_ranges_only(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "size": (640, 352)}
    quality = {"qmin": "1", "qmax": "1", "flags": "+qscale", "global_quality": "118"}
    path = write_video(tmp_path / "a.mov", num_frames=600, options=quality, **pictures)
    uri = f"s3://{BUCKETS[0]}/decode/video.mov"
    storage.write_bytes(uri, path.read_bytes())
    opened: list[Any] = []
    plain_open = storage.open_read

    def watched(uri: str, **options: Any) -> BinaryIO:
        file = plain_open(uri, **options)
        if uri.startswith("s3://"):
            opened.append(cast(Any, file).cache)
        return file

    monkeypatch.setattr(storage, "open_read", watched)
    settings = DecodeConfig(strategy="keyframe", num_frames=4)
    remote, local = (
        decode_video(VideoSource(place), settings, SPECS) for place in (uri, str(path))
    )
    assert (remote.slots("small") == local.slots("small")).all()
    assert remote.frame_pts_s.tolist() == local.frame_pts_s.tolist()
    assert len(opened) == 1
    assert opened[0].total_requested_bytes < path.stat().st_size / 2
    missing = f"s3://{BUCKETS[0]}/decode/none.mp4"
    with DecodePool(settings, SPECS) as pool:
        outcomes = pool.decode([VideoSource(uri), VideoSource(missing)])
    assert isinstance(outcomes[0], DecodedVideo)
    assert isinstance(outcomes[1], StorageError)
    assert outcomes[1].error_type == "not_found"
