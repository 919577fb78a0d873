"""Decode keyframes, and frames near them, of an unfragmented MP4 or MOV.

The sample table locates them, so only their bytes are read.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np

from tsq_ray.decode.probe import Container, SampleIndex, Stream, read_packets
from tsq_ray.decode.pyav_backend import (
    SEEKABLE_CODECS,
    DecodeTrouble,
    errors_are_trouble,
    seek,
    strict_frames,
    to_rgb,
)

_OFF_GRID = 0.3  # share of the usual step
_MAX_LEADING = 64  # packets inspected after a keyframe for frames displayed before it


@dataclass
class Placed:
    """A frame and its place in the source."""

    rgb: np.ndarray
    pts: int
    index: int


class IndexedReader:
    """Reads frames of one container, located by its sample table."""

    def __init__(
        self, container: Container, stream: Stream, index: SampleIndex, max_pixels: int
    ) -> None:
        if stream.codec_context.codec.canonical_name not in SEEKABLE_CODECS:
            raise DecodeTrouble("keyframes of this codec are not known to decode independently")
        self.container, self.stream, self.index, self.max_pixels = (
            container,
            stream,
            index,
            max_pixels,
        )
        self._delay = 0
        self._reorders = stream.codec_context.has_b_frames
        self.start = self.keyframe(0).pts
        # frames are displayed a constant delay after the table's times; each keyframe's own time is
        # read from its packet
        self._delay = self.start - index.dts[0]
        self.pts = [dts + self._delay for dts in index.dts]
        self.end = index.end_dts + self._delay
        self.key_pts = [dts + self._delay for dts in index.key_dts]
        # state of `frame_at`: its keyframe, packets read but not yet decoded, and the times read
        self._key = -1
        self._ahead: deque[av.Packet] = deque()
        self._seen = _Groups()
        self._packets: Iterator[av.Packet] = iter(())
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._current: av.VideoFrame | None = None
        self._time = self._wanted = 0
        self._read_on = True

    def keyframe(self, key: int) -> Placed:
        """Decode keyframe number `key` independently of other frames."""
        self._key = -1  # the decoder moves away from the position of `frame_at`
        with errors_are_trouble():
            packets = self._packets_from(key)
            packet = next(packets)
            assert packet.pts is not None
            after = self._packets_after(packets, packet.pts)
            early = [other for other in after if other.pts is not None and other.pts < packet.pts]
            if early and (not self._reorders or early != after[: len(early)]):
                raise DecodeTrouble("frames have times before a keyframe that they cannot precede")
            if self._reorders and self._is_suspicious(packet.pts, early, after):
                raise DecodeTrouble("a frame next to a keyframe may have a wrong time")
            leading = sum(not other.is_discard for other in early)
            if self._reorders and (early or not self._shows_reordering(after)):
                frames = self._proven(itertools.chain([packet], after, packets), packet.pts)
            else:
                frames = [*self.stream.decode(packet), *self.stream.decode(None)]
        if len(frames) != 1 or frames[0].is_corrupt or frames[0].pts != packet.pts:
            raise DecodeTrouble(f"keyframe {key} does not decode independently")
        return Placed(
            to_rgb(frames[0], self.max_pixels), packet.pts, self.index.key_before[key] + leading
        )

    def _is_suspicious(
        self, key_time: int, early: Sequence[av.Packet], after: Sequence[av.Packet]
    ) -> bool:
        """Whether one time near a keyframe is off the grid of even steps that the others are on.

        A decoder that starts at the keyframe cannot decode the frames displayed before it, so only
        decoding the whole file tells a wrong time there from a right one.
        """
        step = (self.index.end_dts - self.index.dts[0]) / len(self.index.dts)
        if step <= 0:
            return True
        before = sorted(key_time - other.pts for other in early if other.pts is not None)
        places = np.arange(1, len(before) + 1)
        if (np.abs(np.array(before) / step - places) > _OFF_GRID).any():
            return True
        steps = [(other.pts - key_time) / step for other in after if other.pts is not None]
        return sum(abs(value - round(value)) > _OFF_GRID for value in steps) == 1

    def _proven(self, packets: Iterator[av.Packet], start: int) -> list[av.VideoFrame]:
        """The first frame, once the next one has proven its place."""
        frames = strict_frames(packets, self.stream, start)
        first = next(frames, None)
        next(frames, None)
        return [] if first is None else [first]

    def _packets_from(self, key: int) -> Iterator[av.Packet]:
        dts = self.index.key_dts[key]
        # FFmpeg expects a presentation time; given a decoding time it mostly seeks to the previous
        # keyframe, whose bytes are not needed
        for time in dict.fromkeys((dts + self._delay, dts)):
            seek(self.container, self.stream, time)
            packets = read_packets(self.container, self.stream)
            packet = next(packets, None)
            if (
                packet is not None
                and packet.pts is not None
                and packet.pos == self.index.key_pos[key]
            ):
                return itertools.chain([packet], packets)
        raise DecodeTrouble(f"a seek to keyframe {key} arrived elsewhere")

    @staticmethod
    def _packets_after(packets: Iterator[av.Packet], key_time: int) -> list[av.Packet]:
        """The packets after a keyframe: first any displayed before it, then two more."""
        after: list[av.Packet] = []
        later = 0
        for packet in itertools.islice(packets, _MAX_LEADING):
            after.append(packet)
            later += packet.pts is None or packet.pts > key_time
            if packet.size == 0 or later == 2:
                break
        return after

    @staticmethod
    def _shows_reordering(after: Sequence[av.Packet]) -> bool:
        """Whether the last two packets in `after` are displayed in reverse decoding order."""
        times = [packet.pts for packet in after[-2:]]
        return (
            len(times) == 2
            and times[0] is not None
            and times[1] is not None
            and times[1] < times[0]
        )

    def frame_at(self, time: int) -> Placed:
        """The frame displayed at `time`, decoded from the previous keyframe.

        Times must ascend from call to call.
        """
        key = max(bisect_right(self.key_pts, time) - 1, 0)
        if key != self._key:
            self._start(key)
        while self._seen.first > time:
            if key == 0:
                raise DecodeTrouble(f"no frame at {time}")
            key -= 1
            self._start(key)
        self._time, self._read_on = time, True
        self._wanted = self._seen.last_until(time)
        while True:
            if self._current is not None:
                self._settle(self._current.pts)
                if self._current.pts is not None and self._current.pts >= self._wanted:
                    break
            self._current = next(self._frames, None)
            if self._current is None:
                break
        late = any(packet.pts is not None and packet.pts < self._wanted for packet in self._ahead)
        if self._current is None or self._current.pts != self._wanted or late:
            raise DecodeTrouble(f"the frame at {self._wanted} is not in its place")
        index = self.index.key_before[self._key] + self._seen.num_before(self._wanted)
        return Placed(to_rgb(self._current, self.max_pixels), self._wanted, index)

    def _start(self, key: int) -> None:
        """Seek to keyframe number `key` and read its packet."""
        self._key, self._packets = key, self._packets_from(key)
        self._ahead, self._seen, self._current = deque(), _Groups(), None
        self._wanted = self._time = self.key_pts[key]
        self._read()
        self._frames = strict_frames(
            self._undecoded(), self.stream, self._seen.first, self._may_skip
        )

    def _may_skip(self, pts: int | None) -> bool:
        # a frame after the wanted one may be wanted next
        if pts is None or pts >= self._wanted:
            return False
        return not self._reorders or self._seen.proves_nothing(pts, self._wanted)

    def _read(self) -> bool:
        """Read a packet; return False at the end."""
        with errors_are_trouble():
            packet = next(self._packets, None)
        if packet is None:
            self._read_on = False
            return False
        self._ahead.append(packet)
        if packet.pts is not None and not packet.is_discard:
            self._seen.add(packet.pts)
            if self._wanted < packet.pts <= self._time:
                self._wanted = packet.pts
        # no frame is displayed before it is decoded, so no later packet can be displayed by then
        self._read_on = packet.dts is not None and packet.dts <= self._time
        return True

    def _settle(self, pts: int | None) -> None:
        """Read ahead until it is clear whether the frame at `pts` is the wanted one.

        Stops there, because packets read ahead are held in memory.
        """
        while pts == self._wanted and self._read_on:
            self._read()

    def _undecoded(self) -> Iterator[av.Packet]:
        while self._ahead or self._read():
            self._settle(self._ahead[0].pts)
            yield self._ahead.popleft()


class _Groups:
    """Presentation times of the packets read since a keyframe, in decoding order and by group.

    For groups see `clock.anchor_groups`.
    """

    def __init__(self) -> None:
        self._times: list[int] = []
        self._group: dict[int, int] = {}
        self._anchors: list[int] = []

    @property
    def first(self) -> int:
        """The time of the keyframe."""
        return self._times[0]

    def add(self, pts: int) -> None:
        """Add a time. Raises DecodeTrouble if no reordering can produce it."""
        if pts in self._group or (len(self._anchors) > 1 and pts < self._anchors[-2]):
            raise DecodeTrouble(f"no reordering of frames explains the time {pts}")
        if not self._anchors or pts > self._anchors[-1]:
            self._anchors.append(pts)
        self._times.append(pts)
        self._group[pts] = len(self._anchors)

    def last_until(self, time: int) -> int:
        """The latest time that is not after `time`."""
        return max(pts for pts in self._times if pts <= time)

    def num_before(self, pts: int) -> int:
        """The number of times before `pts`."""
        return sum(time < pts for time in self._times)

    def proves_nothing(self, pts: int, wanted: int) -> bool:
        """Whether the frame at `pts` is in a group other than `wanted`'s and not its anchor."""
        group = self._group.get(pts)
        return (
            group is not None
            and group != self._group.get(wanted)
            and self._anchors[group - 1] != pts
        )
