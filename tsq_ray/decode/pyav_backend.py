"""Decoding through PyAV: exact frames by timestamp, keyframes by byte range, and what is left of a damaged file."""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from tsq_ray.decode.frames import FrameStore, orient
from tsq_ray.decode.plan import end_of
from tsq_ray.decode.probe import Container, PacketTable, SampleIndex, Stream, display_matrix
from tsq_ray.errors import VideoError

# a packet marked as a keyframe starts afresh (a GIF's or a screen codec's may not)
_SEEKABLE_CODECS = (
    "h264",
    "hevc",
    "vp8",
    "vp9",
    "av1",
    "mpeg4",
    "mpeg2video",
    "mpeg1video",
    "h263",
    "mjpeg",
    "prores",
    "dnxhd",
    "vvc",
    "theora",
    "wmv3",
    "vc1",
)
_MAX_LEADING = 64  # packets looked at behind a keyframe for frames that are shown before it


class DecodeTrouble(Exception):
    """A fast path met an error, a damaged frame, or a frame that is not where it should be."""


def to_rgb(frame: av.VideoFrame, max_pixels: int) -> np.ndarray:
    """uint8 [H, W, 3] as shown; too_large where the frame has more than `max_pixels`."""
    check_pixels(frame.width, frame.height, max_pixels)
    return orient(frame.to_ndarray(format="rgb24"), display_matrix(frame))


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """too_large where width x height is above `max_pixels`."""
    if width * height > max_pixels:
        raise VideoError("too_large", f"a frame of {width} x {height} = {width * height} pixels; decode.max_pixels allows {max_pixels}")


@contextlib.contextmanager
def _errors_are_trouble(doing: str = "") -> Iterator[None]:
    try:
        yield
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise DecodeTrouble(f"{doing}{error}") from None


def strict_frames(
    packets: Iterable[av.Packet], stream: Stream, is_wanted: Callable[[int | None], bool] = lambda pts: True
) -> Iterator[av.VideoFrame]:
    """Frames from here on in presentation order; DecodeTrouble at the first error or damaged frame.

    Frames whose timestamp is not wanted may be left out, where they serve no other as a reference: in H.264 these are known by their
    header and cost nothing then (in HEVC a higher layer may still refer to them).
    """
    context = stream.codec_context
    try:
        with _errors_are_trouble():
            for packet in packets:
                if context.name == "h264":
                    context.skip_frame = "DEFAULT" if packet.size == 0 or is_wanted(packet.pts) else "NONREF"
                for frame in packet.decode():
                    if frame.is_corrupt or frame.pts is None:
                        raise DecodeTrouble(f"damaged frame at {frame.pts}")
                    yield frame
    finally:
        context.skip_frame = "DEFAULT"


def decode_exact(
    container: Container, stream: Stream, table: PacketTable, wanted: Sequence[int], store: FrameStore, max_pixels: int
) -> None:
    """Put the frames `wanted` (ascending indices into `table.pts`) into the store, by seeks to keyframes.

    Each picture is known by its timestamp; DecodeTrouble where one does not come at its own.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec not in _SEEKABLE_CODECS:
        raise DecodeTrouble(f"a keyframe of {codec} is not known to decode by itself")
    targets = [table.pts[index] for index in wanted]
    needed = frozenset(targets)
    frames: Iterator[av.VideoFrame] = iter(())
    current = None
    for i, target in enumerate(targets):
        key = bisect_right(table.key_pts, target) - 1
        if key < 0:
            raise DecodeTrouble(f"no keyframe before {target}")
        if key != current:
            frames, current = _frames_from_key(container, stream, table, key, needed), key
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= target), None)
        if frame is None or frame.pts != target:
            raise DecodeTrouble(f"no frame at {target}")
        store.put(i, to_rgb(frame, max_pixels))


def _frames_from_key(container: Container, stream: Stream, table: PacketTable, key: int, needed: frozenset[int]) -> Iterator[av.VideoFrame]:
    """Frames from keyframe number `key` on, without those that are decoded after it but need what came before it."""
    time = table.key_pts[key]
    # FFmpeg's MP4 reader takes the time for one of presentation, and with a decoding time goes to the keyframe before: twice the work
    first_try = [] if table.open_gops else [time]
    # some containers have no index, and a seek in them may arrive late: start earlier
    for start in dict.fromkeys((*first_try, *(table.key_dts[number] for number in (key, max(key - 1, 0), max(key - 3, 0))))):
        _seek(container, stream, start)
        frames = strict_frames(container.demux(stream), stream, needed.__contains__)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= time:
            return (frame for frame in itertools.chain([first], frames) if frame.pts is not None and frame.pts >= time)
    raise DecodeTrouble(f"no seek arrives at {time} or before")


def _seek(container: Container, stream: Stream, time: int) -> None:
    with _errors_are_trouble(f"cannot seek to {time}: "):
        container.seek(time, stream=stream)


@dataclass
class Survivors:
    """The frames of a damaged or unindexed file that do decode, found by decoding all of it."""

    pts: list[int]
    """Ascending."""
    order: list[int]
    """For each of them its number in the decoder's output."""
    end: int
    time_base: Fraction
    num_damaged: int
    num_errors: int
    num_packets: int
    num_discarded: int
    """Packets that an edit list hides."""
    demux_failed: bool
    unsupported: bool
    untimed: bool


def find_survivors(container: Container, stream: Stream) -> Survivors:
    """Decode a newly opened file once, without converting a picture; positions then run over what came out.

    A file without timestamps gets frame numbers at the average rate.
    """
    walk = _Walk(container, stream)
    times: list[tuple[int | None, int]] = []
    damaged = 0
    durations: list[int] = []
    for frame in walk.frames():
        times.append((frame.pts, len(times)))
        damaged += frame.is_corrupt
        durations.append(frame.duration)
    time_base = stream.time_base or Fraction(1, 25)
    untimed = walk.untimed or any(pts is None for pts, _ in times)
    if untimed:
        times, durations = [(i, i) for i in range(len(times))], [1] * len(times)
        time_base = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
    first_of: dict[int, int] = {}
    for pts, number in times:
        assert pts is not None
        first_of.setdefault(pts, number)
    pts_list = sorted(first_of)
    end = end_of(pts_list, durations[first_of[pts_list[-1]]]) if pts_list else 0
    order = [first_of[pts] for pts in pts_list]
    return Survivors(
        pts_list,
        order,
        end,
        time_base,
        damaged,
        walk.num_errors,
        walk.num_packets,
        walk.num_discarded,
        walk.demux_failed,
        walk.unsupported,
        untimed,
    )


def decode_survivors(container: Container, stream: Stream, order: Sequence[int], store: FrameStore, max_pixels: int) -> None:
    """Second pass, again newly opened: put the frames with these numbers in the decoder's output into the store, in this order."""
    place = {number: i for i, number in enumerate(order)}
    last = max(place)
    for number, frame in enumerate(_Walk(container, stream).frames()):
        if number in place:
            store.put(place[number], to_rgb(frame, max_pixels))
        if number == last:
            return


class _Walk:
    """A decode of the whole stream that goes on after every error and counts what it met."""

    def __init__(self, container: Container, stream: Stream) -> None:
        self.container, self.stream = container, stream
        self.num_packets = self.num_discarded = self.num_errors = 0
        self.demux_failed = self.unsupported = False
        self.untimed = False

    def frames(self) -> Iterator[av.VideoFrame]:
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.MemoryError:
                raise
            except av.error.FFmpegError:
                self.demux_failed = True
                yield from self._decode(None)
                return
            if packet.size:
                self.num_packets += 1
                self.num_discarded += packet.is_discard
                self.untimed |= packet.pts is None and packet.dts is None
                yield from self._decode(packet)
            else:
                yield from self._decode(None)

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            return self.stream.decode(packet)
        except av.error.MemoryError:
            raise
        except (av.error.DecoderNotFoundError, av.error.PatchWelcomeError, av.error.NotImplementedError):
            self.unsupported = True
        except av.error.EOFError:  # flushed already
            return []
        except av.error.FFmpegError:
            self.num_errors += 1
        return []


@dataclass
class Placed:
    """A frame with its place in the source."""

    rgb: np.ndarray
    pts: int
    index: int


class IndexedReader:
    """Keyframes, and frames near them, of an unfragmented MP4/MOV by its sample table alone: reads only their bytes."""

    def __init__(self, container: Container, stream: Stream, index: SampleIndex, max_pixels: int) -> None:
        if stream.codec_context.codec.canonical_name not in _SEEKABLE_CODECS:
            raise DecodeTrouble("a keyframe of this codec is not known to decode by itself")
        self.container, self.stream, self.index, self.max_pixels = container, stream, index, max_pixels
        self._delay = 0
        self.start = self.keyframe(0).pts
        # frames are shown a constant delay after the table's times; every keyframe's own time is read when it comes
        self._delay = self.start - index.start_dts
        self.end = index.end_dts + self._delay
        self.key_pts = [dts + self._delay for dts in index.key_dts]
        # where `frame_at` is: the keyframe it began at, what was read since and not decoded yet, when what was read is shown, in decoding order
        self._key = -1
        self._ahead: deque[av.Packet] = deque()
        self._times: list[int] = []
        self._packets: Iterator[av.Packet] = iter(())
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._current: av.VideoFrame | None = None
        self._time = self._wanted = 0
        self._read_on = True

    def keyframe(self, key: int) -> Placed:
        """Keyframe number `key`, decoded by itself."""
        self._key = -1  # the decoder leaves the place where `frame_at` was
        with _errors_are_trouble():
            packets = self._packets_from(key)
            packet = next(packets)
            assert packet.pts is not None
            index = self.index.key_before[key] + self._num_leading(packets, packet.pts)
            frames = [*self.stream.decode(packet), *self.stream.decode(None)]
        if len(frames) != 1 or frames[0].is_corrupt or frames[0].pts != packet.pts:
            raise DecodeTrouble(f"keyframe {key} does not decode by itself")
        return Placed(to_rgb(frames[0], self.max_pixels), packet.pts, index)

    def _packets_from(self, key: int) -> Iterator[av.Packet]:
        dts = self.index.key_dts[key]
        # FFmpeg takes the time for one of presentation; with a decoding time it mostly goes to the keyframe before, whose bytes nobody needs
        for time in dict.fromkeys((dts + self._delay, dts)):
            _seek(self.container, self.stream, time)
            packets = self.container.demux(self.stream)
            packet = next(packets, None)
            if packet is not None and packet.pts is not None and packet.pos == self.index.key_pos[key]:
                return itertools.chain([packet], packets)
        raise DecodeTrouble(f"a seek to keyframe {key} did not arrive there")

    @staticmethod
    def _num_leading(packets: Iterator[av.Packet], key_time: int) -> int:
        """Shown frames decoded after a keyframe and shown before it; they follow it at once."""
        leading = 0
        for packet in itertools.islice(packets, _MAX_LEADING):
            if packet.size == 0 or packet.pts is None or packet.pts > key_time or packet.is_keyframe:
                break
            leading += not packet.is_discard
        return leading

    def frame_at(self, time: int) -> Placed:
        """The frame on show at `time`, decoded from the keyframe before it. Times ascend from call to call."""
        key = max(bisect_right(self.key_pts, time) - 1, 0)
        if key != self._key:
            self._start(key)
        while not self._times or self._times[0] > time:
            if key == 0:
                raise DecodeTrouble(f"no frame at {time}")
            key -= 1
            self._start(key)
        self._time, self._read_on = time, True
        self._wanted = max(pts for pts in self._times if pts <= time)
        while True:
            if self._current is not None:
                self._settle(self._current.pts)
                if self._current.pts is not None and self._current.pts >= self._wanted:
                    break
            self._current = next(self._frames, None)
            if self._current is None:
                break
        if self._current is None or self._current.pts != self._wanted:
            raise DecodeTrouble(f"no frame at {self._wanted}")
        index = self.index.key_before[self._key] + sum(pts < self._wanted for pts in self._times)
        return Placed(to_rgb(self._current, self.max_pixels), self._wanted, index)

    def _start(self, key: int) -> None:
        """Go to keyframe number `key` and read it."""
        self._key, self._packets = key, self._packets_from(key)
        self._ahead, self._times, self._current = deque(), [], None
        # what comes after the wanted frame may be wanted next
        self._frames = strict_frames(self._undecoded(), self.stream, lambda pts: pts is None or pts >= self._wanted)
        self._read()

    def _read(self) -> bool:
        """Read a packet; False at the end."""
        with _errors_are_trouble():
            packet = next(self._packets, None)
        if packet is None:
            self._read_on = False
            return False
        self._ahead.append(packet)
        if packet.pts is not None and not packet.is_discard:
            self._times.append(packet.pts)
            if self._wanted < packet.pts <= self._time:
                self._wanted = packet.pts
        # no frame is shown before it is decoded, so that none that comes later in the file is shown by then
        self._read_on = packet.dts is not None and packet.dts <= self._time
        return True

    def _settle(self, pts: int | None) -> None:
        """Read on until it shows whether the frame of `pts` is the wanted one; no further, since all that is read ahead is held in memory."""
        while pts == self._wanted and self._read_on:
            self._read()

    def _undecoded(self) -> Iterator[av.Packet]:
        while self._ahead or self._read():
            self._settle(self._ahead[0].pts)
            yield self._ahead.popleft()
