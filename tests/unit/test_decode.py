"""decode_video on videos whose frames carry their number: frames, sizes, errors, warnings."""

from __future__ import annotations

import fcntl
import os
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from av.codec.hwaccel import HWAccel
from support.video import RATE, number_of, picture, write_audio, write_video

from tsq_ray import storage
from tsq_ray.config import DecodeConfig
from tsq_ray.decode import (
    WHOLE,
    DecodedVideo,
    FrameSpec,
    VideoSource,
    decode_video,
    fetch,
    job,
    nvdec,
    video,
    with_whole_frames,
)
from tsq_ray.decode.frames import FrameStore, orient, resize_picture, target_size
from tsq_ray.decode.indexed import IndexedReader
from tsq_ray.errors import StorageError, VideoError

SPECS = {"wide": FrameSpec(64)}


def decode(
    path: Path,
    strategy: str = "uniform",
    num_frames: int = 8,
    specs: dict[str, FrameSpec] | None = None,
    **more: Any,
) -> DecodedVideo:
    settings = DecodeConfig.model_validate({"strategy": strategy, "num_frames": num_frames, **more})
    return decode_video(VideoSource(str(path)), settings, specs or SPECS)


def numbers(decoded: DecodedVideo) -> list[int]:
    return [number_of(rgb) for rgb in decoded.slots("wide")]


KINDS = {
    "h264.mp4": {},
    "h264_b.mp4": {"b_frames": 4, "gop": 30},
    "h264_open_gop.mkv": {"open_gop": True, "b_frames": 3},
    "h264.ts": {"b_frames": 3},
    "hevc_open_gop.mp4": {"codec": "libx265", "open_gop": True, "b_frames": 3},
    "hevc.mkv": {"codec": "libx265"},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "mpeg4.avi": {"codec": "mpeg4", "pix_fmt": "yuv420p"},
    "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2},
    "odd_444.mp4": {"size": (161, 97), "pix_fmt": "yuv444p"},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: write_video(folder / name, 61, **kind)  # type: ignore[arg-type]
        for name, kind in KINDS.items()
    }


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize("num_frames", [1, 3, 8, 25, 61])
@pytest.mark.parametrize("name", KINDS)
def test_every_picture_is_the_frame_it_claims_to_be(
    videos: dict[str, Path], name: str, num_frames: int, strategy: str
) -> None:
    decoded = decode(videos[name], strategy, num_frames)
    assert decoded.source_num_frames == 61
    assert numbers(decoded) == decoded.frame_index.tolist()
    assert decoded.frame_pts_s == pytest.approx(decoded.frame_index / RATE, abs=2e-3)
    assert decoded.duration_s == pytest.approx(61 / RATE, abs=0.05)
    assert decoded.warnings == []
    if strategy == "uniform":
        assert decoded.frame_index.tolist() == [
            int((i + 0.5) * 61 / num_frames) for i in range(num_frames)
        ]


def test_variable_frame_rate_by_timestamp(tmp_path: Path) -> None:
    times = [0, 1, 2, 3, 40, 41, 42, 43, 44, 80]
    decoded = decode(write_video(tmp_path / "v.mkv", 10, times=times, b_frames=0), num_frames=5)
    positions = [(i + 0.5) / 5 * decoded.duration_s * RATE for i in range(5)]
    assert numbers(decoded) == [
        max(k for k, time in enumerate(times) if time <= position + 0.05) for position in positions
    ]
    assert numbers(decoded) == decoded.frame_index.tolist()
    assert len(decoded.frames["wide"]) == len(set(numbers(decoded))) < 5


@pytest.mark.parametrize("name", ["h264.mp4", "h264_open_gop.mkv", "hevc_open_gop.mp4"])
def test_keyframe_strategy_takes_keyframes_where_there_are_any(
    videos: dict[str, Path], name: str
) -> None:
    # keyframes at 0, 12, 24, 36, 48, 60; centres at 7.6, 22.9, 38.1, 53.4
    decoded = decode(videos[name], "keyframe", 4)
    assert decoded.frame_index.tolist() == [12, 24, 36, 48]
    assert numbers(decoded) == [12, 24, 36, 48]


def test_keyframe_strategy_takes_the_exact_frame_elsewhere(videos: dict[str, Path]) -> None:
    # keyframes at 0, 30 and 60 only
    decoded = decode(videos["h264_b.mp4"], "keyframe", 6)
    assert decoded.frame_index.tolist() == [0, 15, 30, 35, 45, 60]
    assert numbers(decoded) == [0, 15, 30, 35, 45, 60]


def test_few_packets_are_held_on_the_way_to_a_frame_far_from_its_keyframe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "one_keyframe.mp4", 200, gop=200, b_frames=3)
    held: list[int] = []
    read = IndexedReader._read

    def watched(self: IndexedReader) -> Any:
        outcome = read(self)
        held.append(len(self._ahead))
        return outcome

    monkeypatch.setattr(IndexedReader, "_read", watched)
    monkeypatch.setattr(job, "_MAX_WITHOUT_KEYFRAME", 1.0)
    assert numbers(decode(path, "keyframe", 4)) == [0, 74, 124, 174]
    assert len(held) > 150
    assert max(held) < 16


@pytest.mark.parametrize(
    ("strategy", "places", "expected"),
    [
        ("uniform", (0.0, 0.5, 0.99, 0.25), [0, 22, 45, 49]),
        # keyframes at 0, 12, 24, 36, 48, 60; intervals of 15.25
        ("keyframe", (0.0, 0.5, 0.99, 0.99), [0, 24, 36, 60]),
    ],
)
def test_frames_at_the_places_asked_for(
    videos: dict[str, Path], strategy: str, places: tuple[float, ...], expected: list[int]
) -> None:
    settings = DecodeConfig.model_validate({"strategy": strategy, "num_frames": 4})
    decoded = decode_video(VideoSource(str(videos["h264.mp4"]), places=places), settings, SPECS)
    assert decoded.frame_index.tolist() == expected
    assert numbers(decoded) == expected


@pytest.mark.parametrize("num_frames", [1, 4])
def test_fewer_frames_than_positions(tmp_path: Path, num_frames: int) -> None:
    decoded = decode(write_video(tmp_path / "few.mp4", num_frames), num_frames=6)
    assert decoded.frame_index.tolist() == [i % num_frames for i in range(6)]
    assert numbers(decoded) == decoded.frame_index.tolist()
    assert decoded.frames["wide"].shape == (num_frames, 64, 64, 3)
    assert decoded.slot_frame.tolist() == decoded.frame_index.tolist()


def test_one_decode_serves_all_sizes(videos: dict[str, Path]) -> None:
    specs = {
        "squash": FrameSpec(48),
        "crop": FrameSpec(56, "crop", "bicubic"),
        "keep": FrameSpec(48, "keep"),
    }
    decoded = decode(videos["h264.mp4"], num_frames=4, specs=specs)
    assert {name: frames.shape for name, frames in decoded.frames.items()} == {
        "squash": (4, 48, 48, 3),
        "crop": (4, 56, 56, 3),
        "keep": (4, 48, 80, 3),
    }
    assert all(frames.dtype == np.uint8 for frames in decoded.frames.values())
    assert (decoded.width, decoded.height, decoded.codec) == (160, 96, "h264")
    assert decoded.fps == pytest.approx(RATE, rel=1e-3)


@pytest.mark.parametrize(("side", "whole"), [(88, True), (84, False)])
def test_frames_stay_whole_where_that_is_at_most_twice_the_data_of_the_pictures(
    videos: dict[str, Path], side: int, whole: bool
) -> None:
    pictures = {"squash": FrameSpec(side), "crop": FrameSpec(16, "crop")}  # of frames of 160 x 96
    decoded = decode(videos["h264.mp4"], num_frames=4, specs=with_whole_frames(pictures))
    assert list(decoded.frames) == ([WHOLE] if whole else list(pictures))
    if whole:
        assert decoded.frames[WHOLE].shape == (4, 96, 160, 3)
        made = decode(videos["h264.mp4"], num_frames=4, specs=pictures)
        assert all(
            (resize_picture(frame, pictures["crop"]) == expected).all()
            for frame, expected in zip(decoded.frames[WHOLE], made.frames["crop"], strict=True)
        )


def test_frames_that_change_their_size_do_not_stay_whole() -> None:
    pictures, frames = (
        {"squash": FrameSpec(88)},
        [
            picture(number, *size)
            for number, size in ((1, (160, 96)), (2, (320, 200)), (3, (160, 96)))
        ],
    )
    stores = [FrameStore(specs, 3) for specs in (pictures, with_whole_frames(pictures))]
    for store in stores:
        for i in (2, 0, 1):
            store.put(i, frames[i])
    assert [list(store.frames) for store in stores] == [["squash"], ["squash"]]
    assert (stores[0].frames["squash"] == stores[1].frames["squash"]).all()
    assert stores[1].complete


def test_frames_of_a_strip_do_not_stay_whole() -> None:
    store = FrameStore(with_whole_frames({"crop": FrameSpec(64, "crop")}), 1)
    store.put(0, np.zeros((8, 40, 3), np.uint8))
    assert list(store.frames) == ["crop"]


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (270, 3)])
@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
def test_rotation_is_honoured(tmp_path: Path, rotation: int, turns: int, strategy: str) -> None:
    path = write_video(tmp_path / "turned.mp4", 12, rotation=rotation, options={"crf": "5"})
    decoded = decode(path, strategy, 1, {"all": FrameSpec(96, "keep")})
    shown = np.rot90(picture(int(decoded.frame_index[0])), turns)
    assert (decoded.height, decoded.width) == shown.shape[:2]
    assert np.abs(decoded.slots("all")[0].astype(int) - shown).mean() < 4


def test_orient_follows_the_display_matrix() -> None:
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for matrix in [(a, 0, 0, d) for a in (-1, 1) for d in (-1, 1)] + [
        (0, b, c, 0) for b in (-1, 1) for c in (-1, 1)
    ]:
        a, b, c, d = matrix
        shown = orient(stored, matrix)
        points = {(x, y): (a * x + c * y, b * x + d * y) for x in range(3) for y in range(2)}
        left, top = min(x for x, _ in points.values()), min(y for _, y in points.values())
        assert all(
            (shown[y - top, x - left] == stored[v, u]).all() for (u, v), (x, y) in points.items()
        )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((320, 240), (341, 256)),
        ((240, 320), (256, 341)),
        ((256, 256), (256, 256)),
        ((8, 4000), (256, 128000)),
    ],
)
def test_crop_resizes_the_shorter_side_to_eight_sevenths(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert target_size(*size, FrameSpec(224, "crop")) == expected


def test_crop_takes_the_centre() -> None:
    rgb = np.zeros((70, 210, 3), np.uint8)
    rgb[:, 70:140] = 200
    assert resize_picture(rgb, FrameSpec(56, "crop"))[:, 2:-2].min() > 190


def test_resize_is_antialiased() -> None:
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    small = resize_picture(np.repeat(checkers[..., None], 3, 2).astype(np.uint8), FrameSpec(32))
    assert np.abs(small.astype(int) - 127).max() < 10


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
def test_a_file_cut_short_runs_over_what_is_left(tmp_path: Path, strategy: str) -> None:
    path = write_video(tmp_path / "whole.mp4", 60, container_options={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    decoded = decode(cut, strategy, 8)
    left = decoded.source_num_frames
    assert 20 < left < 60
    assert decoded.warnings[0] == f"header says 60 frames, {left} can be decoded"
    assert sorted(set(decoded.frame_index.tolist())) == decoded.frame_index.tolist()
    assert decoded.frame_index[-1] < left
    # a frame or two may be missing before the last one decoded, so a frame is known by its time
    assert decoded.frame_pts_s == pytest.approx(np.asarray(numbers(decoded)) / RATE, abs=2e-3)
    assert decoded.duration_s == pytest.approx(left / RATE, abs=0.15)


def test_damage_in_the_middle_is_reported(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 60)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    for i in range(start + (len(data) - start) // 4, start + (len(data) - start) // 2, 23):
        data[i] ^= 0x5A
    path.write_bytes(data)
    decoded = decode(path, num_frames=16)
    assert decoded.source_num_frames <= 60
    assert any("can be decoded" in warning for warning in decoded.warnings)
    assert len(decoded.slots("wide")) == 16


def _no_index(folder: Path) -> Path:
    path = write_video(folder / "v.mp4", 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _head_only(folder: Path) -> Path:
    path = write_video(folder / "v.mp4", 30, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])
    return path


def _all_damaged(folder: Path) -> Path:
    path = write_video(folder / "v.mp4", 30, container_options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)
    return path


def _unknown_codec(folder: Path) -> Path:
    path = write_video(folder / "v.mp4", 30)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz9"))
    return path


def _written(name: str, data: bytes) -> object:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize(
    ("make", "error_type", "match"),
    [
        (_written("empty.mp4", b""), "not_video", "an empty file"),
        (
            _written("text.mp4", b"this is not a video\n" * 20),
            "not_video",
            "not recognised as video",
        ),
        (
            _written("random.mp4", np.random.default_rng(7).bytes(50_000)),
            "not_video",
            "not recognised as video",
        ),
        (
            _written(
                "list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/hostname\n"
            ),
            "not_video",
            "not recognised as video",
        ),
        (
            _written("list.ffconcat", b"ffconcat version 1.0\nfile v.mp4\n"),
            "not_video",
            "not recognised as video",
        ),
        (lambda folder: write_audio(folder / "sound.mp4"), "not_video", "no video stream"),
        (lambda folder: folder, "not_video", "a folder"),
        (_no_index, "truncated", "cut off or lacks its index"),
        (_head_only, "truncated", "none of its frames can be decoded"),
        (_all_damaged, "corrupt", "can be decoded"),
        (_unknown_codec, "unsupported", "no decoder for this video codec"),
    ],
)
def test_error_types(
    tmp_path: Path, make: object, error_type: str, match: str, strategy: str
) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(VideoError, match=match) as caught:
        decode(path, strategy)
    assert caught.value.error_type == error_type
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize(
    ("limit", "match"),
    [
        ({"max_pixels": 160 * 95}, "160 x 96"),
        ({"max_duration_s": 2.0}, "lasts 3 s"),
        ({"max_bytes": 1000}, "max_bytes allows 1000"),
    ],
)
def test_limits(
    videos: dict[str, Path], limit: dict[str, float], match: str, strategy: str
) -> None:
    with pytest.raises(VideoError, match=match) as caught:
        decode(videos["h264.mp4"], strategy, **limit)
    assert caught.value.error_type == "too_large"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file") as caught:
        decode(tmp_path / "none.mp4")
    assert caught.value.error_type == "not_found"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 3)
    path.chmod(0)
    with pytest.raises(StorageError, match="access denied"):
        decode(path)


@pytest.mark.parametrize("change", ["size", "modified"])
def test_a_changed_source_is_refused(tmp_path: Path, change: str) -> None:
    path = write_video(tmp_path / "v.mp4", 12)
    seen = storage.stat(str(path))
    assert seen.modified is not None
    source = VideoSource(str(path), seen.size_bytes, seen.etag, seen.modified)
    settings = DecodeConfig(num_frames=4)
    assert decode_video(source, settings, SPECS).source_num_frames == 12
    stale = (
        replace(source, size_bytes=seen.size_bytes + 1)
        if change == "size"
        else replace(source, modified=seen.modified - timedelta(seconds=5))
    )
    with pytest.raises(
        VideoError, match=f"changed since the manifest was made \\({change}"
    ) as caught:
        decode_video(stale, settings, SPECS)
    assert caught.value.error_type == "source_changed"


def test_a_local_file_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "v.mp4", 12)
    seen = storage.stat(str(path))
    plain = video._decode

    def decode_then_replace(*arguments: Any) -> Any:
        decoded = plain(*arguments)
        write_video(path, 30)
        return decoded

    monkeypatch.setattr(video, "_decode", decode_then_replace)
    with pytest.raises(VideoError, match="changed since the manifest was made") as caught:
        decode_video(
            VideoSource(str(path), seen.size_bytes, seen.etag, seen.modified),
            DecodeConfig(num_frames=4),
            SPECS,
        )
    assert caught.value.error_type == "source_changed"


def test_an_object_replaced_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "memory://tsq-decode/v.mp4"
    storage.filesystem(uri)[0].pipe_file(
        "/tsq-decode/v.mp4", write_video(tmp_path / "v.mp4", 12).read_bytes()
    )
    plain = storage.download

    def replace_then_download(uri: str, folder: Any) -> str:
        storage.filesystem(uri)[0].pipe_file(
            "/tsq-decode/v.mp4", write_video(tmp_path / "other.mp4", 30).read_bytes()
        )
        return plain(uri, folder)

    monkeypatch.setattr(storage, "download", replace_then_download)
    with pytest.raises(VideoError, match="replaced while it was fetched") as caught:
        decode_video(VideoSource(uri), DecodeConfig(num_frames=4), SPECS)
    assert caught.value.error_type == "source_changed"


@pytest.mark.parametrize("range_bytes", [500, 1 << 17])
@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize("name", ["h264_b.mp4", "hevc_open_gop.mp4", "fragmented.mp4", "vp9.webm"])
def test_a_remote_object_gives_what_the_local_file_gives(
    videos: dict[str, Path],
    name: str,
    strategy: str,
    range_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # small objects are fetched whole, larger ones by ranges
    monkeypatch.setattr(fetch, "RANGE_BYTES", range_bytes)
    uri = f"memory://decode-test/{name}"
    storage.write_bytes(uri, videos[name].read_bytes())
    settings = DecodeConfig.model_validate({"strategy": strategy, "num_frames": 7})
    remote = decode_video(VideoSource(uri), settings, SPECS)
    local = decode(videos[name], strategy, 7)
    assert (remote.slots("wide") == local.slots("wide")).all()
    assert remote.frame_index.tolist() == local.frame_index.tolist()
    assert local.fetched_bytes == 0 < remote.fetched_bytes
    if strategy == "uniform":
        assert remote.fetched_bytes == videos[name].stat().st_size
    assert (remote.duration_s, remote.source_num_frames, remote.warnings) == (
        local.duration_s,
        local.source_num_frames,
        [],
    )


@pytest.mark.parametrize("name", ["h264_b.mp4", "hevc.mkv", "vp9.webm"])
def test_nvdec_without_a_gpu_decodes_on_the_cpu_and_says_so(
    videos: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvdec, "accelerator", lambda: None)
    exact, decoded = decode(videos[name]), decode(videos[name], backend="nvdec")
    assert (decoded.slots("wide") == exact.slots("wide")).all()
    assert (exact.warnings, decoded.warnings) == ([], [nvdec.NO_GPU])


def test_nvdec_on_a_gpu_that_fails_decodes_on_the_cpu(
    videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        nvdec, "accelerator", lambda: HWAccel("cuda", device="99")
    )  # there is no such GPU
    exact, decoded = decode(videos["h264_b.mp4"]), decode(videos["h264_b.mp4"], backend="nvdec")
    assert (decoded.slots("wide") == exact.slots("wide")).all()
    assert decoded.warnings == []
    with pytest.raises(VideoError, match=r"max_duration_s allows 0\.1") as caught:
        decode(videos["h264_b.mp4"], backend="nvdec", max_duration_s=0.1)
    assert caught.value.error_type == "too_large"


def test_converting_frames_starts_no_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter per frame would start one thread per core for each of the T frames."""
    path = write_video(tmp_path / "a.mp4", size=(320, 192))
    before, seen = len(os.listdir("/proc/self/task")), []
    put = FrameStore.put

    def counted(store: FrameStore, slot: int, frame: np.ndarray) -> None:
        seen.append(len(os.listdir("/proc/self/task")))
        put(store, slot, frame)

    monkeypatch.setattr(FrameStore, "put", counted)
    decode(path, num_frames=50)
    assert max(seen) <= before + 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        "h264.mp4",
        "h264_b.mp4",
        "h264_open_gop.mkv",
        "hevc_open_gop.mp4",
        "hevc.mkv",
        "vp9.webm",
        "turned.mp4",
    ],
)
def test_nvdec_gives_the_frames_of_the_cpu(name: str, tmp_path: Path) -> None:
    # 144 pixels per side is the smallest that every NVDEC takes
    path = write_video(tmp_path / name, size=(320, 192), **KINDS.get(name, {"rotation": 90}))
    exact, decoded = decode(path), decode(path, backend="nvdec")
    assert decoded.frame_index.tolist() == exact.frame_index.tolist()
    assert np.abs(decoded.slots("wide").astype(int) - exact.slots("wide")).mean() < 2
    assert decoded.warnings == []


def test_a_remote_object_that_is_no_video() -> None:
    storage.write_bytes("memory://decode-test/text.mp4", b"not a video")
    with pytest.raises(
        VideoError, match=r"^memory://decode-test/text.mp4: not recognised as video"
    ):
        decode_video(
            VideoSource("memory://decode-test/text.mp4"), DecodeConfig(strategy="keyframe"), SPECS
        )
    with pytest.raises(StorageError, match="no such file"):
        decode_video(
            VideoSource("memory://decode-test/none.mp4"), DecodeConfig(strategy="keyframe"), SPECS
        )


def test_copies_of_killed_processes_are_removed_and_those_in_use_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = [tmp_path / name for name in ("tsq-decode-dead", "tsq-decode-busy", "another")]
    for folder in folders:
        folder.mkdir()
        (folder / "video.mp4").write_bytes(b"x")
        (folder / ".lock").touch()
    with open(folders[1] / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetch.sweep_copies()
        assert [folder.exists() for folder in folders] == [False, True, True]
    storage.write_bytes(
        "memory://decode-test/copy.mp4", write_video(tmp_path / "v.mp4", 5).read_bytes()
    )
    assert (
        decode_video(
            VideoSource("memory://decode-test/copy.mp4"), DecodeConfig(num_frames=2), SPECS
        ).source_num_frames
        == 5
    )
    assert sorted(tmp_path.iterdir()) == [tmp_path / "another", tmp_path / "v.mp4"]


@pytest.mark.parametrize("name", KINDS)
def test_decord_gives_the_same_frames(videos: dict[str, Path], name: str) -> None:
    source, settings = VideoSource(str(videos[name])), DecodeConfig(num_frames=7)
    exact, decord = (
        decode_video(source, settings.model_copy(update={"backend": backend}), SPECS)
        for backend in ("pyav", "decord")
    )
    assert numbers(decord) == numbers(exact)
    assert decord.frame_index.tolist() == exact.frame_index.tolist()
