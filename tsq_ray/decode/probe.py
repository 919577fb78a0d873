"""Open a container and find what it really holds: the stream, its frames and its keyframes.

`scan` reads every packet, without decoding, and is exact for any container. `read_index` reads only
the sample table of an unfragmented MP4/MOV, so that a keyframe of a remote object costs only a few
byte ranges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO, cast

import av
import av.container
import av.video.stream
import numpy as np
from av.codec.hwaccel import HWAccel
from av.stream import Discard

from tsq_ray.containers import FORMATS
from tsq_ray.decode.clock import doubtful, in_order, jumps, max_step
from tsq_ray.decode.plan import end_of
from tsq_ray.errors import VideoError

_NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS: a raw elementary stream
_DISCONTINUOUS = 0x200  # AVFMT_TS_DISCONT: its clock may restart
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: cover art of a music file
_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx"}
_MAGICS = (
    b"\x1aE\xdf\xa3",
    b"OggS",
    b"FLV\x01",
    b"GIF8",
    b"\x00\x00\x01\xba",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
)
UPRIGHT = (1, 0, 0, 1)

Container = av.container.InputContainer
Stream = av.video.stream.VideoStream


def looks_like_container(head: bytes) -> bool:
    """Whether the first bytes are those of a video container, complete or not."""
    if head[4:8] in _BOXES or head.startswith(_MAGICS):
        return True
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return True
    return len(head) > 376 and head[0] == head[188] == head[376] == 0x47  # MPEG transport stream


def open_container(
    file: str | BinaryIO, uri: str, head: bytes, accelerator: HWAccel | None = None
) -> Container:
    """Open a local path or a seekable file, to be decoded by `accelerator` if possible.

    Raises VideoError if it is not a video container (not_video) or lacks its index (truncated).
    """
    target: Any = f"file:{file}" if isinstance(file, str) else file
    try:
        return av.open(
            target,
            mode="r",
            metadata_errors="ignore",
            options={"format_whitelist": FORMATS},
            hwaccel=accelerator,
        )
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        if looks_like_container(head):
            raise VideoError(
                "truncated",
                f"{uri}: a video container that is cut off or lacks its index ({error.strerror})",
            ) from None
        what = "an empty file" if not head else "not recognised as video"
        raise VideoError("not_video", f"{uri}: {what}; a video file is needed") from None


def pick_stream(container: Container, uri: str) -> Stream:
    """The video stream that a player shows.

    Raises VideoError: not_video if the file has none, unsupported if it has no known decoder.
    """
    videos = [
        stream for stream in container.streams.video if not stream.disposition & _ATTACHED_PICTURE
    ]
    if not videos:
        raise VideoError(
            "not_video", f"{uri}: no video stream (audio only?); a video file is needed"
        )
    best = container.streams.best("video")
    stream = best if best in videos else videos[0]
    if stream.codec_context is None:
        raise VideoError(
            "unsupported",
            f"{uri}: no decoder for this video codec; convert the file, for example to H.264",
        )
    stream.codec_context.thread_count = 1
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all  # the demuxer then skips their bytes altogether
    return stream


def read_packets(container: Container, stream: Stream) -> Iterator[av.Packet]:
    """Yield the packets of `stream` from the container's current position.

    Raises VideoError (unsupported) at an encrypted packet, which a decoder may take for a damaged
    picture.
    """
    for packet in container.demux(stream):
        if packet.has_sidedata("encryption_info"):
            raise VideoError(
                "unsupported", "the video is encrypted (DRM); decrypt the file with its key first"
            )
        yield packet


def is_raw(container: Container) -> bool:
    """Whether this is a raw stream without timestamps; FFmpeg takes random bytes for one too."""
    return bool(container.format.flags & _NO_TIMESTAMPS)


def max_trusted_step(container: Container, time_base: Fraction) -> int:
    """The longest step between two frames that is trusted, in `time_base`."""
    return max_step(time_base, bool(container.format.flags & _DISCONTINUOUS))


@dataclass
class PacketTable:
    """The displayed frames of a stream according to its packets, in presentation order.

    Times are in the stream's time base.
    """

    pts: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    """The same times in decoding order."""
    end: int = 0
    key_pts: list[int] = field(default_factory=list)
    """Times of the displayed keyframes, ascending."""
    key_dts: list[int] = field(default_factory=list)
    """Decoding times of the same keyframes, for seeking."""
    key_sizes: list[int] = field(default_factory=list)
    """Bytes of their packets, to check that a seek gives each picture its own time."""
    num_packets: int = 0
    num_discarded: int = 0
    """Packets hidden by an edit list."""
    reliable: bool = True
    """Every packet has a unique time, and the times can result from reordering.

    Only decoding proves them right.
    """
    doubtful: list[int] = field(default_factory=list)
    """Indices into `pts` of frames whose place only a decode in order proves (`clock.doubtful`)."""
    open_gops: bool = False
    """Some frame is decoded after a keyframe and displayed before it."""
    damaged: bool = False
    """The demuxer hit an error or a truncated packet."""

    @property
    def reordered(self) -> bool:
        """Whether the decoding order of the frames differs from the display order."""
        return self.order != self.pts


def scan(container: Container, stream: Stream) -> PacketTable:
    """Read every packet of `stream`; the container must be at its beginning."""
    table = PacketTable()
    last_duration: int | None = None
    last_pts: int | None = None
    keys: list[tuple[int, int, int]] = []
    key_time: int | None = None
    packets = read_packets(container, stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            table.damaged = True
            break
        if packet.size == 0:
            continue
        table.num_packets += 1
        table.damaged |= packet.is_corrupt
        if packet.pts is None:
            table.reliable = False
            continue
        if key_time is not None and packet.pts < key_time:
            table.open_gops = True
        if packet.is_keyframe:
            key_time = packet.pts
        if packet.is_discard:
            table.num_discarded += 1
            continue
        table.order.append(packet.pts)
        if last_pts is None or packet.pts >= last_pts:
            last_pts, last_duration = packet.pts, packet.duration
        if packet.is_keyframe:
            dts = packet.dts if packet.dts is not None else packet.pts
            keys.append((packet.pts, dts, packet.size))
    keys.sort()
    table.pts = sorted(table.order)
    table.key_pts, table.key_dts, table.key_sizes = ([key[i] for key in keys] for i in range(3))
    table.reliable &= len(set(table.pts)) == len(table.pts) and in_order(table.order, table.key_pts)
    # reordered times are wrong if the codec does not reorder
    table.reliable &= stream.codec_context.has_b_frames or not table.reordered
    if table.reliable:
        table.doubtful = doubtful(table.pts) if table.reordered else []
        assert stream.time_base is not None
        limit = max_trusted_step(container, stream.time_base)
        table.reliable = not jumps(table.pts, limit)
        table.end = end_of(table.pts, last_duration, stream.duration)
    return table


@dataclass
class SampleIndex:
    """The sample table of an MP4/MOV, known without reading a packet."""

    dts: list[int]
    """Decoding times of the displayed frames, ascending."""
    end_dts: int
    """Decoding time at which the last displayed frame ends; end_dts - dts[0] is the duration."""
    key_dts: list[int]
    key_pos: list[int]
    """Byte position of each displayed keyframe, to check that a seek arrived at it."""
    key_before: list[int]
    """Number of displayed frames that are decoded before each keyframe."""


def read_index(container: Container, stream: Stream, size_bytes: int | None) -> SampleIndex | None:
    """The sample table, or None if the container has none that covers the whole file."""
    if (
        "mp4" not in container.format.name.split(",")
        or not stream.frames
        or stream.duration is None
        or stream.time_base is None
    ):
        return None
    entries = list(stream.index_entries)
    shown = [entry for entry in entries if not entry.is_discard]
    if not shown or any(a.timestamp >= b.timestamp for a, b in itertools.pairwise(entries)):
        return None
    if size_bytes is None or max(entry.pos + entry.size for entry in entries) > size_bytes:
        return None  # truncated
    times = [entry.timestamp for entry in shown]
    steps = np.diff(times)
    if (
        stream.codec_context.has_b_frames
        and len(steps)
        and int(steps.max()) > 2 * int(np.median(steps))
    ):
        # with reordering and a variable rate, decoding times do not give presentation times
        return None
    if jumps(times, max_trusted_step(container, stream.time_base)):
        return None
    end = end_of(times, None if len(times) > 1 else stream.duration, stream.duration)
    # a hybrid file continues in fragments, which this table does not list
    if container.duration is not None and (end - times[0]) * stream.time_base < Fraction(
        container.duration, 1_000_000
    ) * Fraction(4, 5):
        return None
    index = SampleIndex(times, end, [], [], [])
    for before, entry in enumerate(shown):
        if entry.is_keyframe:
            index.key_dts.append(entry.timestamp)
            index.key_pos.append(entry.pos)
            index.key_before.append(before)
    # frames decoded before the first displayed keyframe depend on a hidden one, which only `scan`
    # handles
    return index if index.key_before and index.key_before[0] == 0 else None


def display_matrix(frame: av.VideoFrame) -> Sequence[int]:
    """(a, b, c, d) of the frame's display matrix, each -1, 0 or 1: quarter turns and flips."""
    quarter_turns = {0: UPRIGHT, 90: (0, -1, 1, 0), -90: (0, 1, -1, 0)}
    rotation = quarter_turns.get(round(frame.rotation / 90) * 90, (-1, 0, 0, -1))
    try:
        items = list(cast("Iterable[Any]", frame.side_data))
    except ValueError:  # a kind of side data unknown to this PyAV
        return rotation
    for item in items:
        if item.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(item), "<i4")[:5].tolist()
            if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
                return _sign(a), 0, 0, _sign(d)
            return 0, _sign(b), _sign(c), 0
    return rotation


def _sign(value: int) -> int:
    return -1 if value < 0 else 1


def claimed_packets(stream: Stream) -> int | None:
    """The number of packets in the header's sample table; None without such a table."""
    return len(stream.index_entries) if stream.frames else None
