"""Decode what can be decoded of a file with damage or untrusted timestamps, in decoder order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av

from tsq_ray.decode.clock import rebuild
from tsq_ray.decode.frames import FrameStore
from tsq_ray.decode.plan import end_of
from tsq_ray.decode.probe import Container, Stream, is_raw, max_trusted_step, read_packets
from tsq_ray.decode.pyav_backend import to_rgb


@dataclass
class Survivors:
    """The frames of a file that decode, found by decoding all of it."""

    pts: list[int]
    """Time of each frame in decoder order, ascending, in `time_base`."""
    end: int
    time_base: Fraction
    num_damaged: int
    walk: Walk
    """The pass that found them, with its error counts."""
    clock_fault: str | None
    """The fault in the timestamps if `pts` had to be rebuilt, unless the damage explains it."""


def find_survivors(container: Container, stream: Stream) -> Survivors:
    """Decode a newly opened file once, without converting pictures, to plan the positions."""
    walk = Walk(container, stream)
    times: list[int | None] = []
    damaged = last_duration = 0
    for frame in walk.frames():
        times.append(frame.pts)
        damaged += frame.is_corrupt
        last_duration = frame.duration
    count, untimed = len(times), times.count(None)
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    if is_raw(container) or not count or untimed > count / 2:
        what = (
            "no timestamps in the file"
            if untimed in (0, count)
            else f"{untimed} of {count} frames have no timestamp"
        )
        assumed = f"{what}: {float(rate):g} frames per second assumed"
        return Survivors(list(range(count)), count, 1 / rate, damaged, walk, assumed)
    time_base = stream.time_base or Fraction(1, 25)
    fixed = rebuild(
        times,
        time_base,
        max_trusted_step(container, time_base),
        max(1, round(1 / (rate * time_base))),
    )
    if fixed is not None:
        fault = None if damaged and fixed.only_swapped else fixed.fault
        return Survivors(
            fixed.pts, fixed.pts[-1] + fixed.step, fixed.time_base, damaged, walk, fault
        )
    pts = [time for time in times if time is not None]
    return Survivors(pts, end_of(pts, last_duration), time_base, damaged, walk, None)


def decode_survivors(
    container: Container, stream: Stream, wanted: Sequence[int], store: FrameStore, max_pixels: int
) -> None:
    """Decode the reopened file again and put the `wanted` frames into the store in that order.

    `wanted` are frame numbers in decoder order.
    """
    place = {number: i for i, number in enumerate(wanted)}
    last = max(place)
    for number, frame in enumerate(Walk(container, stream).frames()):
        if number in place:
            store.put(place[number], to_rgb(frame, max_pixels))
        if number == last:
            return


class Walk:
    """Decodes the whole stream, continuing after every error; counts packets and errors."""

    def __init__(self, container: Container, stream: Stream) -> None:
        self.container, self.stream = container, stream
        self.num_packets = self.num_discarded = self.num_errors = 0
        self.num_before_key = 0  # packets before the first keyframe: undecodable
        self.demux_failed = self.unsupported = False

    def frames(self) -> Iterator[av.VideoFrame]:
        """Yield every frame that the decoder outputs, damaged ones too."""
        packets = read_packets(self.container, self.stream)
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
                self.num_before_key += (
                    self.num_before_key == self.num_packets and not packet.is_keyframe
                )
                self.num_packets += 1
                self.num_discarded += packet.is_discard
                yield from self._decode(packet)
            else:
                yield from self._decode(None)

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            return self.stream.decode(packet)
        except av.error.MemoryError:
            raise
        except (
            av.error.DecoderNotFoundError,
            av.error.PatchWelcomeError,
            av.error.NotImplementedError,
        ):
            self.unsupported = True
        except av.error.EOFError:  # already flushed
            return []
        except av.error.FFmpegError:
            self.num_errors += 1
        return []
