"""Decode the T frames of one video, in this process."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import BinaryIO, cast

import av

from tsq_ray import storage
from tsq_ray.config import DecodeConfig
from tsq_ray.decode import fetch
from tsq_ray.decode.job import DecodeJob
from tsq_ray.decode.probe import (
    open_container,
)
from tsq_ray.decode.types import DecodedVideo, FrameSpec, VideoSource
from tsq_ray.errors import VideoError


def decode_video(
    source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> DecodedVideo:
    """Decode the T frames of one video in every size of `specs`, in this process on one thread.

    Raises StorageError or VideoError: those of job.py, too_large if a limit of `settings` is
    exceeded, source_changed if the file differs from the manifest, or out_of_memory. DecodePool
    enforces the time limit.
    """
    started = time.perf_counter()
    _silence()
    name = storage.redact(source.uri)
    try:
        size = fetch.check_source(source, settings, name)
        decoded = _decode(source, size, settings, specs, name)
        if storage.is_local(source.uri):
            # again, since it may have been replaced while it was read
            fetch.check_source(source, settings, name)
    except MemoryError:
        raise VideoError(
            "out_of_memory",
            f"{name}: the decoder ran out of memory; "
            f"decode.max_memory_mb is {settings.max_memory_mb}",
        ) from None
    except VideoError as error:
        text = str(error)
        shown = text if text.startswith(name) else f"{name}: {text}"
        raise VideoError(error.error_type, shown) from None
    decoded.decode_ms = (time.perf_counter() - started) * 1000
    return decoded


@functools.cache
def _silence() -> None:
    av.logging.set_level(None)


def _decode(
    source: VideoSource,
    size: int,
    settings: DecodeConfig,
    specs: Mapping[str, FrameSpec],
    name: str,
) -> DecodedVideo:
    uri = source.uri
    job = DecodeJob(name, size, settings, specs, source.places)
    by_index, fetched = settings.strategy == "keyframe", 0
    # for a small object one request for the whole is cheaper than T requests for parts
    if by_index and not storage.is_local(uri) and size > settings.num_frames * fetch.RANGE_BYTES:
        by_index = False
        with (
            fetch.open_ranges(uri) as (file, head),
            open_container(cast(BinaryIO, file), name, head) as container,
        ):
            decoded = job.by_index(container)
            fetched = file.fetched_bytes
        if decoded is not None:
            return replace(decoded, fetched_bytes=fetched)
    with fetch.local_copy(uri) as path:
        if not storage.is_local(uri):
            if (copied := os.path.getsize(path)) != size:
                raise VideoError(
                    "source_changed",
                    f"{name}: expected {size} bytes, got {copied}: replaced while it was fetched; "
                    "run tsq index --update",
                )
            fetched += copied
        decoded = None
        if by_index:
            with open_container(path, name, fetch.read_head(path)) as container:
                decoded = job.by_index(container)
        return replace(decoded or job.exact(path), fetched_bytes=fetched)
