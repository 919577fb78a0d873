"""Exact frames through PyAV, found by timestamp and proven to be those the packets announce."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from tsq_ray.decode.clock import skippable, unproven_keys
from tsq_ray.decode.frames import FrameStore, orient
from tsq_ray.decode.probe import Container, PacketTable, Stream, display_matrix, read_packets
from tsq_ray.errors import VideoError

# a keyframe packet of these codecs decodes independently (in a GIF or a screen codec it may not)
SEEKABLE_CODECS = (
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


class DecodeTrouble(Exception):
    """A fast path hit an error, a damaged frame, or a frame that is out of place."""


def to_rgb(frame: av.VideoFrame, max_pixels: int) -> np.ndarray:
    """Convert to uint8 [H, W, 3] as displayed. Raises VideoError (too_large) above `max_pixels`."""
    check_pixels(frame.width, frame.height, max_pixels)
    # frame.to_ndarray(format=...) would make a converter for each frame, which keeps it alive, with
    # a thread per core: 50 frames on 16 cores are 800 threads and 6 GB of stacks
    if not hasattr(_thread_local, "converter"):
        _thread_local.converter = VideoReformatter()
    converted = _thread_local.converter.reformat(frame, format="rgb24", threads=1)
    return orient(converted.to_ndarray(), display_matrix(frame))


_thread_local = threading.local()


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise VideoError (too_large) if width x height is above `max_pixels`."""
    if width * height > max_pixels:
        raise VideoError(
            "too_large",
            f"a frame of {width} x {height} = {width * height} pixels; "
            f"decode.max_pixels allows {max_pixels}",
        )


@contextlib.contextmanager
def errors_are_trouble(doing: str = "") -> Iterator[None]:
    """Turn FFmpeg's errors into DecodeTrouble."""
    try:
        yield
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise DecodeTrouble(f"{doing}{error}") from None


def strict_frames(
    packets: Iterable[av.Packet],
    stream: Stream,
    start: int,
    may_skip: Callable[[int | None], bool] = lambda pts: False,
) -> Iterator[av.VideoFrame]:
    """Yield frames from time `start` on, in presentation order.

    Raises DecodeTrouble at the first error or damaged frame, and if the frames do not come in the
    order of their packets' times, which are then wrong. Frames that `may_skip` accepts are left out
    if no other frame refers to them: in H.264 their header says so, and skipping them costs nothing
    (in HEVC a higher layer may still refer to them).
    """
    context = stream.codec_context
    can_skip, reorders, skips = context.name == "h264", context.has_b_frames, False
    due: list[int] = []  # times of frames that the decoder still has to output
    last = start - 1
    try:
        with errors_are_trouble():
            for packet in packets:
                pts = packet.pts
                if can_skip and skips != (packet.size > 0 and may_skip(pts)):
                    skips = not skips
                    context.skip_frame = "NONREF" if skips else "DEFAULT"
                if not skips and pts is not None and pts >= start and not packet.is_discard:
                    heapq.heappush(due, pts)
                for frame in packet.decode():
                    pts = frame.pts
                    if frame.is_corrupt or pts is None:
                        raise DecodeTrouble(f"damaged frame at {pts}")
                    if pts < start and last < start:
                        continue
                    if pts <= last or (due and due[0] < pts) or context.has_b_frames != reorders:
                        raise DecodeTrouble(f"the frame at {pts} is not in its place")
                    last = pts
                    if due and due[0] == pts:
                        heapq.heappop(due)
                    yield frame
    finally:
        context.skip_frame = "DEFAULT"


def decode_exact(
    container: Container,
    stream: Stream,
    table: PacketTable,
    wanted: Sequence[int],
    store: FrameStore,
    max_pixels: int,
) -> None:
    """Put the frames `wanted` (ascending indices into `table.pts`) into the store.

    Seeks to keyframes and identifies each picture by its timestamp. Raises DecodeTrouble if one of
    them, or one of the table's doubtful frames, does not come at its own timestamp.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec not in SEEKABLE_CODECS:
        raise DecodeTrouble(f"keyframes of {codec} are not known to decode independently")
    place = {index: i for i, index in enumerate(wanted)}
    checked = sorted({*wanted, *table.doubtful})
    targets = [table.pts[index] for index in checked]
    reordered = table.reordered or stream.codec_context.has_b_frames
    suspects = [table.pts[index] for index in table.doubtful]
    may_skip = skippable(table.order, targets, reordered, suspects)
    unproven = unproven_keys(table.order, table.key_pts) if reordered else frozenset()
    # for each frame, how many frames the decoder must have output up to and including it; the final
    # 0 is for index -1, before the first frame
    due = [*itertools.accumulate(pts not in may_skip for pts in table.pts), 0]
    frames: Iterator[av.VideoFrame] = iter(())
    current, num_output = None, 0
    for index, target in zip(checked, targets, strict=True):
        key = bisect_right(table.key_pts, target) - 1
        if key < 0:
            raise DecodeTrouble(f"no keyframe before {target}")
        if key != current:
            frames, current = (
                _frames_from_key(
                    container, stream, table, key, may_skip, table.key_pts[key] in unproven
                ),
                key,
            )
            num_output = due[bisect_left(table.pts, table.key_pts[key]) - 1]
        for frame in frames:
            assert frame.pts is not None
            num_output += frame.pts not in may_skip
            if frame.pts >= target:
                break
        else:
            raise DecodeTrouble(f"no frame at {target}")
        if frame.pts != target or num_output != due[index]:
            raise DecodeTrouble(f"the frame at {target} is not in its place")
        if index in place:
            store.put(place[index], to_rgb(frame, max_pixels))


def _frames_from_key(
    container: Container,
    stream: Stream,
    table: PacketTable,
    key: int,
    may_skip: frozenset[int],
    unproven: bool,
) -> Iterator[av.VideoFrame]:
    """Frames from keyframe number `key` on, without those that refer to frames before it.

    `unproven`: only the next frame can prove that the keyframe's own time is right.
    """
    time = table.key_pts[key]
    # FFmpeg's MP4 reader expects a presentation time; given a decoding time it seeks to the
    # previous keyframe, which doubles the work
    first_try = [] if table.open_gops else [time]
    # in containers without an index a seek may arrive late, so start earlier
    for start in dict.fromkeys(
        (*first_try, *(table.key_dts[number] for number in (key, max(key - 1, 0), max(key - 3, 0))))
    ):
        seek(container, stream, start)
        packets = _with_key(read_packets(container, stream), time, table.key_sizes[key])
        frames = strict_frames(packets, stream, time, may_skip.__contains__)
        with contextlib.suppress(DecodeTrouble):
            first = next(frames, None)
            if first is not None and first.pts == time:
                second = next(frames, None) if unproven else None
                return itertools.chain([first], () if second is None else [second], frames)
    raise DecodeTrouble(f"no seek arrives at or before {time}")


def _with_key(packets: Iterator[av.Packet], time: int, size: int) -> Iterator[av.Packet]:
    """Yield the packets. Raises DecodeTrouble if the one at `time` is not the keyframe of `size`.

    A seek in a program stream may arrive in mid-frame; the rest of that frame then takes the time
    of the next frame, and all frames after it are late.
    """
    for packet in packets:
        found = packet.pts == time
        if found and not (packet.is_keyframe and packet.size == size):
            raise DecodeTrouble(f"another frame than the keyframe came at {time}")
        yield packet
        if found:
            break
    yield from packets


def seek(container: Container, stream: Stream, time: int) -> None:
    """Seek to the keyframe at or before `time`."""
    with errors_are_trouble(f"cannot seek to {time}: "):
        container.seek(time, stream=stream)
