"""Odd but valid files, each made here, and files that are no video.

Containers, codecs, pixel formats, sizes, rates, tracks.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, features
from support.clock import sequential
from support.video import number_of, picture, write_audio, write_video

from tsq_ray.config import DecodeConfig
from tsq_ray.decode import DecodedVideo, FrameSpec, VideoSource, decode_video
from tsq_ray.decode.types import with_whole_frames
from tsq_ray.errors import VideoError

SIZE = (96, 64)
COUNT = 40


def decode(path: Path, strategy: str = "uniform", **more: Any) -> DecodedVideo:
    config = DecodeConfig.model_validate({"num_frames": 8, "strategy": strategy, **more})
    return decode_video(VideoSource(str(path)), config, {"all": FrameSpec(64)})


def check(path: Path, num_frames: int = COUNT) -> DecodedVideo:
    """Both strategies give the pictures of a sequential decode, without a warning."""
    truth = [number for number, _ in sequential(path)]
    for strategy in ("keyframe", "uniform"):
        video = decode(path, strategy)
        assert video.source_num_frames == num_frames
        assert [number_of(rgb) for rgb in video.slots("all")] == [
            truth[i] for i in video.frame_index
        ]
        assert video.warnings == []
    return video


KINDS: dict[str, dict[str, Any]] = {
    "h264.flv": {"b_frames": 2},
    "flv1.flv": {"codec": "flv"},
    "wmv2.wmv": {"codec": "wmv2"},
    "msmpeg4.asf": {"codec": "msmpeg4"},
    "mpeg2.mxf": {"codec": "mpeg2video", "options": {"bf": "0"}},
    "h263.3gp": {"codec": "h263", "size": (176, 144)},
    "raw.y4m": {"codec": "wrapped_avframe"},
    "mpeg2.vob": {"codec": "mpeg2video"},
    "h264.m2ts": {"b_frames": 2},
    "cinepak.avi": {"codec": "cinepak", "pix_fmt": "rgb24"},
    "msvideo1.avi": {"codec": "msvideo1", "pix_fmt": "rgb555le"},
    "zmbv.avi": {"codec": "zmbv", "pix_fmt": "bgr0"},
    "ffv1.avi": {"codec": "ffv1"},
    "raw.avi": {"codec": "rawvideo"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "flashsv.flv": {"codec": "flashsv", "pix_fmt": "bgr24"},
    "live.mkv": {"container_options": {"live": "1"}},
    "vp8.ogv": {"codec": "libvpx"},
    "live.webm": {"codec": "libvpx-vp9", "container_options": {"live": "1"}},
    "pipe.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}},
    "thousand_a_second.mp4": {"times": [i * 24 / 1000 for i in range(COUNT)]},
    "one_in_ten_seconds.mp4": {"times": [i * 240 for i in range(COUNT)]},
    "one_keyframe.mp4": {"gop": 1000, "b_frames": 3},
    "grey.mp4": {"pix_fmt": "gray"},
    "444.mkv": {"pix_fmt": "yuv444p"},
    "rgb.mkv": {"codec": "libx264rgb", "pix_fmt": "rgb24"},
    "lossless.mkv": {"options": {"qp": "0"}},
    "ten_bits.mkv": {"codec": "libx265", "pix_fmt": "yuv420p10le"},
    "alpha.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"},
    "prores_alpha.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le"},
    "png.mov": {"codec": "png", "pix_fmt": "rgba"},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "argb"},
    "animated.png": {"codec": "apng", "pix_fmt": "rgba"},
    "av1.mp4": {"codec": "libsvtav1", "size": (160, 96)},
}


@pytest.mark.parametrize("name", KINDS)
def test_containers_codecs_and_pixel_formats(tmp_path: Path, name: str) -> None:
    options = {"size": SIZE} | KINDS[name]
    path = tmp_path / name
    times = options.pop("times", None)
    if name.startswith("thousand"):
        write_fast(path)
    else:
        if name == "animated.png":
            path = tmp_path / "animated.apng"
        write_video(path, COUNT, times=times, **options)
    check(path)


def write_fast(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(picture(number, *SIZE), format="rgb24").reformat(
                format="yuv420p"
            )
            frame.pts, frame.time_base = number, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("size", [(1, 400), (1, 4000), (1, 8000), (4000, 1), (2, 2), (3, 5)])
def test_thin_and_tiny_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_plain(tmp_path / "thin.mov", size)
    video = decode(path)
    assert (video.width, video.height, video.source_num_frames) == (*size, 10)
    assert video.slots("all").shape == (8, 64, 64, 3)


@pytest.mark.parametrize("size", [(1, 800), (800, 1)])
def test_the_networks_get_thin_pictures_in_their_sizes(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    specs = {
        resize: FrameSpec(64, resize)  # type: ignore[arg-type]
        for resize in ("squash", "crop")
    }
    source = VideoSource(str(write_plain(tmp_path / "thin.mov", size)))
    video = decode_video(source, DecodeConfig(num_frames=8), with_whole_frames(specs))
    assert {name: video.slots(name).shape for name in video.frames} == dict.fromkeys(
        specs, (8, 64, 64, 3)
    ), "a strip would be enlarged many times before its centre is cropped, so it is resized at once"
    greys = [int(rgb[32, 32, 0]) for rgb in video.slots("crop")]
    assert greys == [20 * i for i in video.frame_index]


def write_plain(path: Path, size: tuple[int, int]) -> Path:
    """Ten grey frames in a codec that takes any size."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=24)
        stream.width, stream.height, stream.pix_fmt = *size, "rgb24"
        for number in range(10):
            rgb = np.full((size[1], size[0], 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return path


def add_track(
    container: Any, codec: str, first: int, pix_fmt: str = "yuv420p"
) -> tuple[Any, list[Any]]:
    """A stream of COUNT frames that show `first`, `first` + 1, ..., and its packets."""
    stream = container.add_stream(codec, rate=24)
    stream.width, stream.height, stream.pix_fmt = *SIZE, pix_fmt
    packets = []
    for number in range(COUNT):
        frame = av.VideoFrame.from_ndarray(picture(first + number, *SIZE), format="rgb24").reformat(
            format=pix_fmt
        )
        frame.pts, frame.time_base = number, Fraction(1, 24)
        packets += stream.encode(frame)
    return stream, packets + stream.encode()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_default_one_of_two_tracks_is_shown(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"two.{suffix}"
    with av.open(str(path), "w") as container:
        tracks = [add_track(container, "libx264", first) for first in (0, 100)]
        tracks[0][0].disposition = Disposition(0)
        tracks[1][0].disposition = Disposition.default
        for _, packets in tracks:
            container.mux(packets)
    assert [number_of(rgb) for rgb in decode(path).slots("all")] == [
        100 + i for i in decode(path).frame_index
    ]


def cover() -> bytes:
    data = BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "JPEG")
    return data.getvalue()


@pytest.mark.parametrize("place", ["first", "last"])
def test_cover_art_is_not_the_film(tmp_path: Path, place: str) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        if place == "first":
            add_cover(container)
            _, packets = add_track(container, "libx264", 0)
        else:
            _, packets = add_track(container, "libx264", 0)
            add_cover(container)
        mux_cover(container)
        container.mux(packets)
    video = decode(path)
    assert (video.source_num_frames, [number_of(rgb) for rgb in video.slots("all")]) == (
        COUNT,
        video.frame_index.tolist(),
    )


def add_cover(container: Any) -> None:
    stream = container.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
    stream.disposition = Disposition.attached_pic


def mux_cover(container: Any) -> None:
    packet = av.Packet(cover())
    packet.stream = next(
        stream for stream in container.streams if stream.codec_context.name == "mjpeg"
    )
    packet.pts = packet.dts = 0
    container.mux(packet)


def test_a_cover_attached_to_a_matroska_film_is_not_the_film(tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        container.add_attachment("cover.jpg", "image/jpeg", cover())
        _, packets = add_track(container, "libx264", 0)
        container.mux(packets)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2, "FFmpeg shows the cover as a stream"
    check(path)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_track_of_one_jpeg_is_not_the_film(tmp_path: Path, place: str) -> None:
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        if place == "last":
            _, packets = add_track(container, "libx264", 0)
        jpeg = container.add_stream("mjpeg", rate=1)
        jpeg.width, jpeg.height, jpeg.pix_fmt = 64, 64, "yuvj420p"
        if place == "first":
            _, packets = add_track(container, "libx264", 0)
        mux_cover(container)
        container.mux(packets)
    for strategy in ("uniform", "keyframe"):
        video = decode(path, strategy)
        assert (video.codec, video.source_num_frames, video.warnings) == ("h264", COUNT, [])
        assert [number_of(rgb) for rgb in video.slots("all")] == video.frame_index.tolist()


@pytest.mark.parametrize("suffix", ["m4a", "mp3"])
def test_music_with_a_cover_is_not_a_video(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"music.{suffix}"
    with av.open(str(path), "w", format={"m4a": "mp4"}.get(suffix, suffix)) as container:
        sound = container.add_stream("aac" if suffix == "m4a" else "mp3", rate=44100, layout="mono")
        add_cover(container)
        mux_cover(container)
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1152), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 44100, 1152 * i
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    renamed = path.rename(tmp_path / "music.mp4")
    with pytest.raises(VideoError, match="a video file is needed") as failure:
        decode(renamed)
    assert failure.value.error_type == "not_video"


def archive(kind: str) -> bytes:
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("a.txt", kind)
    return data.getvalue()


def image(kind: str, count: int = 1, **options: Any) -> bytes:
    """An image file that shows the number 3, or a moving one of 3, 4, ..."""
    data = BytesIO()
    first, *others = [Image.fromarray(picture(3 + i, *SIZE)) for i in range(count)]
    moves = {"save_all": True, "append_images": others, "duration": 40} if others else {}
    first.save(data, kind, **moves, **options)
    return data.getvalue()


NO_VIDEOS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: image("JPEG"),
    "png": lambda: image("PNG"),
    "webp": lambda: image("WEBP"),
    "moving webp": lambda: image("WEBP", count=5),
    "html": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
    "pointer of Git LFS": lambda: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    ),
    "zip": lambda: archive("zip"),
    "playlist": lambda: b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:9,\nfirst.ts\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("kind", NO_VIDEOS)
def test_what_is_no_video(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(NO_VIDEOS[kind]())
    with pytest.raises(VideoError, match="a video file is needed") as failure:
        decode(path)
    assert failure.value.error_type == "not_video"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
@pytest.mark.parametrize("count", [1, 5])
def test_an_avif_is_a_video(tmp_path: Path, count: int) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(image("AVIF", count))
    for strategy in ("uniform", "keyframe"):
        video = decode(path, strategy)
        assert (video.codec, video.source_num_frames, video.warnings) == ("av1", count, [])
        assert [number_of(rgb) for rgb in video.slots("all")] == [3 + i % count for i in range(8)]


def test_an_encrypted_film_is_a_failure_of_its_own(tmp_path: Path) -> None:
    locked = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": "00" * 15 + "01",
        "encryption_kid": "00" * 15 + "02",
    }
    path = write_video(tmp_path / "locked.mp4", COUNT, size=SIZE, container_options=locked)
    for strategy in ("keyframe", "uniform"):
        with pytest.raises(VideoError, match="encrypted") as failure:
            decode(path, strategy)
        assert failure.value.error_type == "unsupported"


def test_two_mp4_files_joined_are_the_first(tmp_path: Path) -> None:
    part = write_video(tmp_path / "part.mp4", COUNT, size=SIZE)
    (tmp_path / "joined.mp4").write_bytes(part.read_bytes() * 2)
    check(tmp_path / "joined.mp4")


def test_a_stream_that_starts_within_a_group_says_what_is_missing(tmp_path: Path) -> None:
    data = write_video(tmp_path / "whole.ts", COUNT, size=SIZE, b_frames=0).read_bytes()
    path = tmp_path / "late.ts"
    path.write_bytes(
        data[: 3 * 188] + data[8 * 188 :]
    )  # the tables, then from the middle of the first group on
    video = decode(path)
    truth = [number for number, _ in sequential(path)]
    assert [number_of(rgb) for rgb in video.slots("all")] == [truth[i] for i in video.frame_index]
    assert video.warnings == [f"38 frames are stored, {len(truth)} can be decoded"]


def test_half_of_a_matroska_film(tmp_path: Path) -> None:
    data = write_video(tmp_path / "whole.mkv", COUNT, size=SIZE, b_frames=0).read_bytes()
    path = tmp_path / "half.mkv"
    path.write_bytes(data[: len(data) // 2])
    truth = [number for number, _ in sequential(path)]
    assert 8 < len(truth) < COUNT
    for strategy in ("uniform", "keyframe"):
        video = decode(path, strategy)
        assert [number_of(rgb) for rgb in video.slots("all")] == [
            truth[i] for i in video.frame_index
        ]
        [warning] = video.warnings
        assert warning.startswith("header says 1.7 s, the frames last ")


def test_a_raw_stream_has_no_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "raw.h264", COUNT, size=SIZE)
    for strategy in ("uniform", "keyframe"):
        video = decode(path, strategy)
        assert video.source_num_frames == COUNT
        assert [number_of(rgb) for rgb in video.slots("all")] == video.frame_index.tolist()
        assert video.warnings == ["no timestamps in the file: 25 frames per second assumed"]


def test_a_film_longer_than_allowed_names_the_setting(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "slow.mp4", COUNT, times=[i * 24 * 60 for i in range(COUNT)], size=SIZE
    )
    with pytest.raises(VideoError, match=r"decode\.max_duration_s allows 600") as failure:
        decode(path, max_duration_s=600)
    assert failure.value.error_type == "too_large"


def test_nothing_is_written_next_to_a_video(tmp_path: Path) -> None:
    write_audio(tmp_path / "sound.mp4")
    with pytest.raises(VideoError, match="no video stream"):
        decode(tmp_path / "sound.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["sound.mp4"]
