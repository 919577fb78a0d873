"""Videos of numbered frames in containers that report false times, and their true content."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av

from support.video import number_of, write_video

TICKS = 90_000
"""Ticks per second of the clocks here, as in MPEG."""
STEP = TICKS // 24
_PES_VIDEO = range(0xE0, 0xF0)
_PACKET = 188
_LEAST_STEP = (
    100  # about a millisecond: decoding times must differ in the time base of any container
)

Clock = Callable[[int], int | None]
"""Number of a frame in presentation order -> its time in ticks; None if it has none."""


def right(number: int) -> int:
    """The clock of a healthy file."""
    return number * STEP


def sequential(path: Path) -> list[tuple[int, int | None]]:
    """(shown number, time) of every frame of a sequential decode, in the decoder's order."""
    found = []
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            with contextlib.suppress(
                av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError
            ):
                found += [
                    (number_of(frame.to_ndarray(format="rgb24")), frame.pts)
                    for frame in packet.decode()
                ]
    return found


def write_clock(source: Path, path: Path, clock: Clock, by_decoding: bool = False) -> Path:
    """Remux `source` (frame i at i/24 s) so that frame i has the time `clock(i)`.

    Decoding times ascend, as muxers require.

    `by_decoding`: i is the place in decoding order instead, as if presentation times were made up
    from decoding times.

    An AVI stores only decoding times, so there the clock's steps are those of decoding. Raises
    FFmpeg's errors if the container cannot hold such times.
    """
    if path.suffix == ".ts":
        return _write_ts(source, path, clock)
    options = {"avoid_negative_ts": "disabled"}
    if path.name.endswith(IN_FRAGMENTS):
        options["movflags"] = "frag_keyframe+empty_moov+default_base_moof"
    with av.open(str(source)) as given, av.open(str(path), "w", options=options) as made:
        template = given.streams.video[0]
        stream = made.add_stream_from_template(template)
        packets = [packet for packet in given.demux(template) if packet.size]
        ranks = (
            list(range(len(packets))) if by_decoding else _ranks([packet.pts for packet in packets])
        )
        if path.suffix == ".avi" and template.codec_context.name == "h264":
            start_codes = av.BitStreamFilterContext("h264_mp4toannexb", template)
            packets = [made for packet in packets for made in start_codes.filter(packet)]
        times = [clock(rank) for rank in ranks]
        assert None not in times, "only a transport stream can leave times out"
        clock_times = _with_decoding_times(times, ranks)  # type: ignore[arg-type]
        for packet, (pts, dts) in zip(packets, clock_times, strict=True):
            packet.stream, packet.time_base = stream, Fraction(1, TICKS)
            packet.pts, packet.dts, packet.duration = pts, dts, STEP
            made.mux(packet)
    return path


def _ranks(pts: Sequence[int | None]) -> list[int]:
    order = sorted(time for time in pts if time is not None)
    return [order.index(time) for time in pts if time is not None]


def _with_decoding_times(times: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(pts, dts): decoding times are the sorted times, shifted so that none is after its frame."""
    dts = sorted(times)
    for i in range(1, len(dts)):
        dts[i] = max(dts[i], dts[i - 1] + _LEAST_STEP)
    back = max(d - t for d, t in zip(dts, times, strict=True))
    return [(t + max(0, back), d) for d, t in zip(dts, times, strict=True)]


def _write_ts(source: Path, path: Path, clock: Clock) -> Path:
    """A transport stream, its clock rewritten in the bytes: no muxer would write some of these."""
    plain = path.with_suffix(".plain.ts")
    with av.open(str(source)) as given, av.open(str(plain), "w") as made:
        template = given.streams.video[0]
        stream = made.add_stream_from_template(template)
        for packet in given.demux(template):
            if packet.size:
                packet.stream = stream
                made.mux(packet)
    data = bytearray(plain.read_bytes())
    headers = list(_pes_headers(data))
    ranks = _ranks([_read_time(data, at + 9) for at in headers])
    for at, rank in zip(headers, ranks, strict=True):
        _set_time(data, at, clock(rank))
    path.write_bytes(data)
    return path


def joined(path: Path, *parts: Path) -> Path:
    """Files joined one after the other, like a recorder's segments."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def _pes_headers(data: bytearray) -> list[int]:
    """Where each frame header of the video begins."""
    found = []
    for start in range(0, len(data), _PACKET):
        begins, extended = data[start + 1] & 0x40, data[start + 3] & 0x20
        at = start + 4 + (1 + data[start + 4] if extended else 0)
        if begins and data[at : at + 3] == b"\x00\x00\x01" and data[at + 3] in _PES_VIDEO:
            found.append(at)
    return found


def _read_time(data: bytearray, at: int) -> int:
    high, middle, low = (
        data[at] >> 1 & 7,
        data[at + 1] << 7 | data[at + 2] >> 1,
        data[at + 3] << 7 | data[at + 4] >> 1,
    )
    return high << 30 | middle << 15 | low


def _write_time(data: bytearray, at: int, time: int) -> None:
    time %= 1 << 33
    data[at : at + 5] = (
        (data[at] & 0xF1 | (time >> 30 & 7) << 1).to_bytes(1, "big")
        + ((time >> 15 & 0x7FFF) << 1 | 1).to_bytes(2, "big")
        + ((time & 0x7FFF) << 1 | 1).to_bytes(2, "big")
    )


def _set_time(data: bytearray, at: int, time: int | None) -> None:
    """Set a frame's time and shift its decoding time with it.

    None: the header says that the frame has no time.
    """
    flags = data[at + 7]
    if time is None:
        data[at + 7] = flags & 0x3F
        length = data[at + 8]
        data[at + 9 : at + 9 + length] = b"\xff" * length
        return
    if flags & 0x40:
        delay = _read_time(data, at + 9) - _read_time(data, at + 14)
        _write_time(data, at + 14, time + TICKS - delay)
    _write_time(data, at + 9, time + TICKS)


SOURCES = {
    "h264": {"codec": "libx264", "b_frames": 0},
    "h264_b": {"codec": "libx264", "b_frames": 3},
    "h264_flat_b": {"codec": "libx264", "b_frames": 3, "options": {"b-pyramid": "none"}},
    "h264_open": {"codec": "libx264", "b_frames": 3, "open_gop": True},
    "hevc_b": {"codec": "libx265", "b_frames": 3},
    "mpeg4": {"codec": "mpeg4"},
    "mpeg4_b": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg2_b": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "vp8": {"codec": "libvpx", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "vp9": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
}
_MPEG = set(SOURCES) - {"vp8", "vp9"}
IN_FRAGMENTS = ".fragments.mp4"
CONTAINERS = {
    "ts": _MPEG - {"mpeg4", "mpeg4_b"},  # the transport stream would have to repeat their headers
    "mpg": {"mpeg2_b"},
    "mkv": _MPEG,
    "webm": {"vp8", "vp9"},
    "mp4": _MPEG,
    IN_FRAGMENTS[1:]: {"h264", "h264_b", "hevc_b"},
    "avi": {"h264", "h264_b", "h264_flat_b", "mpeg4", "mpeg4_b"},
    "flv": {"h264", "h264_b", "h264_flat_b", "h264_open"},
}
NUM_FRAMES = 60


def write_sources(folder: Path) -> dict[str, Path]:
    """One video per codec, its frames at their right times."""
    return {
        name: write_video(
            folder / f"{name}.mkv",
            NUM_FRAMES,
            gop=12,
            size=(96, 64),
            **options,  # type: ignore[arg-type]
        )
        for name, options in SOURCES.items()
    }


def write_packed_b_frames(path: Path) -> Path:
    """An AVI as DivX 5 wrote them.

    A B-frame lies in the packet of the frame it refers to; an empty picture takes its place.
    """
    plain = write_video(
        path.with_suffix(".plain.mkv"), NUM_FRAMES, "mpeg4", size=(96, 64), options={"bf": "1"}
    )
    with av.open(str(plain)) as given, av.open(str(path), "w") as made:
        template = given.streams.video[0]
        stream = made.add_stream_from_template(template)
        packets = [packet for packet in given.demux(template) if packet.size]
        header = (
            bytes(template.codec_context.extradata or b"") + b"\x00\x00\x01\xb2DivX503b1393p\x00"
        )
        datas = [bytes(packet) for packet in packets]
        datas[0] = header + datas[0]
        for i in range(2, len(packets)):
            if packets[i].pts < packets[i - 1].pts:
                datas[i - 1] += datas[i]
                datas[i] = b"\x00\x00\x01\xb6\x50\x9f"  # a P picture, not coded
        for i, (data, old) in enumerate(zip(datas, packets, strict=True)):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 24)
            packet.pts = packet.dts = i
            packet.duration, packet.is_keyframe = 1, old.is_keyframe
            made.mux(packet)
    return path
