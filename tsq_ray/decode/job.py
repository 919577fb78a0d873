"""Decode the T frames of one video, and decide when to decode the whole file instead.

The frames of an intact file are planned from its packet table, and only what they need is decoded.
At the first sign of damage (a truncated packet, fewer packets than the header's table promises, an
error or a damaged frame while decoding) the whole file is decoded, and the positions run over the
frames that decode. One frame is enough: fewer than T are repeated cyclically. Anything missing
becomes a warning. No frame at all is an error: `truncated` if the file ends early, cannot be read
further or holds no packets, `unsupported` if the codec is unknown, `not_video` for a raw stream
(random bytes look like one), else `corrupt`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.codec.hwaccel import HWAccel

from tsq_ray.config import DecodeConfig
from tsq_ray.decode import decord_backend, fetch, nvdec, pyav_backend
from tsq_ray.decode.clock import LongStep, longest_step
from tsq_ray.decode.frames import FrameStore
from tsq_ray.decode.indexed import IndexedReader
from tsq_ray.decode.plan import (
    Places,
    distinct,
    frame_at,
    interval_of,
    keyframe_choice,
    position,
    uniform_indices,
)
from tsq_ray.decode.probe import (
    Container,
    PacketTable,
    Stream,
    claimed_packets,
    is_raw,
    open_container,
    pick_stream,
    read_index,
    read_packets,
    scan,
)
from tsq_ray.decode.pyav_backend import DecodeTrouble
from tsq_ray.decode.survivors import Survivors, decode_survivors, find_survivors
from tsq_ray.decode.types import DecodedVideo, FrameSpec
from tsq_ray.errors import VideoError

_MAX_WITHOUT_KEYFRAME = 0.25  # share of intervals; with more, byte ranges do not pay


@dataclass(frozen=True)
class Extent:
    """The frames of a video in time: ascending `pts` until `end`, in units of `time_base`."""

    pts: Sequence[int]
    end: int
    time_base: Fraction

    @property
    def duration_s(self) -> Fraction:
        """From the first frame's start to the last frame's end."""
        return (self.end - self.pts[0]) * self.time_base

    @property
    def longest_step(self) -> LongStep:
        """The frame that is shown longest."""
        return longest_step(self.pts, self.end, self.time_base)


class DecodeJob:
    """Decodes one video."""

    def __init__(
        self,
        name: str,
        size: int,
        settings: DecodeConfig,
        specs: Mapping[str, FrameSpec],
        places: Places = None,
    ) -> None:
        self.name, self.size, self.settings, self.specs, self.places = (
            name,
            size,
            settings,
            specs,
            places,
        )
        self.warnings: list[str] = []

    def by_index(self, container: Container) -> DecodedVideo | None:
        """Decode by strategy `keyframe` and the sample table; None if it is incomplete or wrong."""
        try:
            return self._by_index(container)
        except DecodeTrouble:
            return None

    def _by_index(self, container: Container) -> DecodedVideo | None:
        stream = self._stream(container)
        index = read_index(container, stream, self.size)
        count = self.settings.num_frames
        if index is None or len(index.dts) < count:
            return None
        self._check_duration(Extent(index.dts, index.end_dts, _time_base(stream)))
        reader = IndexedReader(container, stream, index, self.settings.max_pixels)
        choice = keyframe_choice(reader.key_pts, reader.start, reader.end, count, self.places)
        # if keyframes are rare, nearly the whole file is needed: better to read it in one go and
        # decode it with all timestamps known
        if choice.count(None) > count * _MAX_WITHOUT_KEYFRAME:
            return None
        store = FrameStore(self.specs, count)
        times, indices = [0] * count, [0] * count
        without_keyframe = []
        for i, key in enumerate(choice):
            placed = reader.keyframe(key) if key is not None else None
            if placed is None or interval_of(placed.pts, reader.start, reader.end, count) != i:
                without_keyframe.append(i)
                continue
            store.put(i, placed.rgb)
            times[i], indices[i] = placed.pts, placed.index
        for i in without_keyframe:
            placed = reader.frame_at(position(reader.start, reader.end, count, i, self.places))
            store.put(i, placed.rgb)
            times[i], indices[i] = placed.pts, placed.index
        if sorted(times) != times or sorted(indices) != indices or indices[-1] >= len(index.dts):
            raise DecodeTrouble("keyframes are not where the sample table says")
        _, first, slot_frame = np.unique(indices, return_index=True, return_inverse=True)
        store.frames = {name: frames[first] for name, frames in store.frames.items()}
        extent = Extent(reader.pts, reader.end, _time_base(stream))
        return self._result(stream, store, slot_frame, indices, times, extent)

    def exact(self, path: str) -> DecodedVideo:
        """Decode a local file, identifying every frame by its timestamp."""
        with self._open(path) as (container, stream):
            claimed = claimed_packets(stream)
            table = scan(container, stream)
        if (
            table.reliable
            and not table.damaged
            and (claimed is None or table.num_packets >= claimed)
        ):
            for accelerator in self._accelerators():
                # a GPU may lack memory or surfaces for a file that was scanned without trouble, or
                # output frames that cannot be converted
                trouble = (
                    (DecodeTrouble,)
                    if accelerator is None
                    else (DecodeTrouble, VideoError, MemoryError, av.error.FFmpegError)
                )
                with (
                    contextlib.suppress(*trouble),
                    self._open(path, accelerator) as (container, stream),
                ):
                    extent = Extent(table.pts, table.end, _time_base(stream))
                    self._check_duration(extent)
                    return self._by_table(path, container, stream, table, extent)
        return self._from_survivors(path)

    def _accelerators(self) -> list[HWAccel | None]:
        """The decoders to try, in order; None is the CPU."""
        if self.settings.backend != "nvdec":
            return [None]
        accelerator = nvdec.accelerator()
        if accelerator is None:
            self.warnings.append(nvdec.NO_GPU)
            return [None]
        return [accelerator, None]

    @contextlib.contextmanager
    def _open(
        self, path: str, accelerator: HWAccel | None = None
    ) -> Iterator[tuple[Container, Stream]]:
        with open_container(path, self.name, fetch.read_head(path), accelerator) as container:
            yield container, self._stream(container)

    def _stream(self, container: Container) -> Stream:
        stream = pick_stream(container, self.name)
        pyav_backend.check_pixels(
            stream.codec_context.width or 0,
            stream.codec_context.height or 0,
            self.settings.max_pixels,
        )
        return stream

    def _plan(self, table: PacketTable) -> list[int]:
        """Return an index into `table.pts` for each slot."""
        count = self.settings.num_frames
        indices = uniform_indices(table.pts, table.end, count, self.places)
        if self.settings.strategy == "keyframe" and len(table.pts) >= count:
            for i, key in enumerate(
                keyframe_choice(table.key_pts, table.pts[0], table.end, count, self.places)
            ):
                if key is not None:
                    indices[i] = frame_at(table.pts, table.key_pts[key])
        return indices

    def _by_table(
        self,
        path: str,
        container: Container,
        stream: Stream,
        table: PacketTable,
        extent: Extent,
    ) -> DecodedVideo:
        indices = self._plan(table)
        wanted, slot_frame = distinct(indices)
        store = FrameStore(self.specs, len(wanted))
        if not (
            self.settings.backend == "decord"
            and self._by_decord(path, container, stream, table, wanted, store)
        ):
            pyav_backend.decode_exact(
                container, stream, table, wanted, store, self.settings.max_pixels
            )
        times = [table.pts[i] for i in indices]
        return self._result(stream, store, slot_frame, indices, times, extent)

    def _by_decord(
        self,
        path: str,
        container: Container,
        stream: Stream,
        table: PacketTable,
        wanted: Sequence[int],
        store: FrameStore,
    ) -> bool:
        """Decode with decord; return False if it cannot be trusted with this file."""
        first = next(
            pyav_backend.strict_frames(read_packets(container, stream), stream, table.pts[0]), None
        )
        if first is None or decord_backend.refusal(stream, table, first) is not None:
            return False
        pyav_backend.check_pixels(first.width, first.height, self.settings.max_pixels)
        try:
            decord_backend.decode_exact(
                path, _time_base(stream), table, wanted, (first.width, first.height), store
            )
        except DecodeTrouble:
            return False
        return True

    def _from_survivors(self, path: str) -> DecodedVideo:
        with self._open(path) as (container, stream):
            claimed = claimed_packets(stream)
            survivors = find_survivors(container, stream)
            if not survivors.pts:
                raise self._nothing_decodes(container, survivors, claimed)
        self._warn_of_damage(survivors, claimed)
        extent = Extent(survivors.pts, survivors.end, survivors.time_base)
        self._check_duration(extent)
        indices = uniform_indices(
            survivors.pts, survivors.end, self.settings.num_frames, self.places
        )
        wanted, slot_frame = distinct(indices)
        store = FrameStore(self.specs, len(wanted))
        with self._open(path) as (container, stream):
            decode_survivors(container, stream, wanted, store, self.settings.max_pixels)
            assert store.complete
            times = [survivors.pts[i] for i in indices]
            return self._result(stream, store, slot_frame, indices, times, extent)

    def _nothing_decodes(
        self, container: Container, survivors: Survivors, claimed: int | None
    ) -> VideoError:
        if is_raw(container):
            return VideoError(
                "not_video", f"{self.name}: not recognised as video; a video file is needed"
            )
        if survivors.walk.unsupported:
            return VideoError(
                "unsupported",
                f"{self.name}: the decoder does not support this kind of video; "
                "convert the file, for example to H.264",
            )
        if (
            survivors.walk.demux_failed
            or survivors.walk.num_packets == 0
            or (claimed is not None and survivors.walk.num_packets < claimed)
        ):
            return VideoError(
                "truncated", f"{self.name}: the file is cut off: none of its frames can be decoded"
            )
        return VideoError(
            "corrupt",
            f"{self.name}: none of its {survivors.walk.num_packets} packets can be decoded",
        )

    def _warn_of_damage(self, survivors: Survivors, claimed: int | None) -> None:
        count, walk = len(survivors.pts), survivors.walk
        stored = walk.num_packets - walk.num_discarded
        if claimed is not None and claimed > walk.num_packets:
            self.warnings.append(
                f"header says {claimed - walk.num_discarded} frames, {count} can be decoded"
            )
        elif (walk.num_errors or walk.num_before_key) and count < stored:
            self.warnings.append(f"{stored} frames are stored, {count} can be decoded")
        elif walk.demux_failed:
            self.warnings.append(
                f"the file cannot be read to its end; {count} frames can be decoded"
            )
        if survivors.num_damaged:
            self.warnings.append(
                f"damaged: {survivors.num_damaged} of the {count} frames that can be decoded"
            )
        if survivors.clock_fault is not None:
            self.warnings.append(survivors.clock_fault)

    def _check_duration(self, extent: Extent) -> None:
        if extent.duration_s > self.settings.max_duration_s:
            step = extent.longest_step
            raise VideoError(
                "too_large",
                f"{self.name}: lasts {float(extent.duration_s):.0f} s; "
                f"decode.max_duration_s allows {self.settings.max_duration_s:g}"
                + (f" ({step})" if step.doubtful else ""),
            )

    def _warn_of_duration(self, stream: Stream, duration: float, start_s: float) -> None:
        header = _header_duration(stream)
        # some containers count the duration from time zero, not from the first frame
        if (
            header is not None
            and min(abs(header - duration), abs(header - start_s - duration)) > 1 + 0.1 * duration
        ):
            self.warnings.append(f"header says {header:.1f} s, the frames last {duration:.1f} s")

    def _warn_of_long_step(self, extent: Extent, indices: list[int]) -> None:
        step, shown = extent.longest_step, len(set(indices))
        if len(extent.pts) >= len(indices) and shown <= len(indices) / 2:
            self.warnings.append(
                f"{len(indices)} slots hold {shown} distinct frames of {len(extent.pts)}: {step}"
            )
        elif step.doubtful:
            self.warnings.append(str(step))

    def _result(
        self,
        stream: Stream,
        store: FrameStore,
        slot_frame: np.ndarray,
        indices: list[int],
        times: list[int],
        extent: Extent,
    ) -> DecodedVideo:
        start, count, time_base = extent.pts[0], len(extent.pts), extent.time_base
        duration = float(extent.duration_s)
        self._warn_of_duration(stream, duration, float(start * time_base))
        self._warn_of_long_step(extent, indices)
        return DecodedVideo(
            frames=store.frames,
            slot_frame=slot_frame.astype(np.int32),
            frame_index=np.asarray(indices, np.int32),
            frame_pts_s=np.asarray([float((pts - start) * time_base) for pts in times], np.float32),
            duration_s=duration,
            fps=count / duration if duration > 0 else 0.0,
            width=store.width,
            height=store.height,
            codec=stream.codec_context.codec.canonical_name,
            source_num_frames=count,
            warnings=self.warnings,
            decode_ms=0.0,
        )


def _time_base(stream: Stream) -> Fraction:
    assert stream.time_base is not None
    return stream.time_base


def _header_duration(stream: Stream) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * _time_base(stream))
    microseconds = cast(Container, stream.container).duration
    return microseconds / 1_000_000 if microseconds else None
