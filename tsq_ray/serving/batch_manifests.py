"""The manifests of batches: the client's, those made from JSON lines, copies from web servers.

Web servers are contacted under the endpoint's own rules: one request, to an address that is checked
first, within a time limit.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import ManifestError, StorageError, VideoError
from tsq_ray.manifest import Manifest, VideoRef, read_manifest, video_id, write_manifest
from tsq_ray.manifest.videos import VideoRows
from tsq_ray.serving.batch_folders import BatchFolders, BatchInput
from tsq_ray.serving.requests.fetching import Fetcher
from tsq_ray.serving.requests.uris import WEB

_LOOK_UPS, _LOOK_UPS_A_BATCH = 32, 8
"""Concurrent look-ups in total and per batch: slow sources leave room for other batches."""


class BatchManifests:
    """Makes and reads the manifests of batches."""

    def __init__(self, folders: BatchFolders, config: Config) -> None:
        self._folders, settings = folders, config.serve
        self._fetcher = Fetcher(
            settings.allowed_uri_prefixes,
            settings.fetch_timeout_s,
            config.decode.max_bytes,
            _LOOK_UPS,
        )

    async def make(self, batch: str, videos: BatchInput, cancelled: Callable[[], bool]) -> None:
        """Make the manifest from lines, or copy it from a web server, unless the folder has it.

        Raises StorageError, and VideoError (too_large or timeout).
        """
        place = self._place(batch, videos)
        is_web = videos.manifest.startswith(WEB)
        if not (videos.lines or is_web) or await asyncio.to_thread(storage.is_file, place):
            return
        if is_web:
            async with self._fetcher.fetched(videos.manifest, patient=True) as found:
                await asyncio.to_thread(_copy, found.path, place)
            return
        gate = asyncio.Semaphore(_LOOK_UPS_A_BATCH)
        uris = dict.fromkeys(line.uri for line in videos.lines)
        refs = await asyncio.gather(*(self._look_up(uri, gate, cancelled) for uri in uris))
        if not cancelled():
            made = Manifest(VideoRows.of(refs), [], batch, (batch,))
            await asyncio.to_thread(write_manifest, made, place)

    def read(self, batch: str, videos: BatchInput) -> Manifest:
        """Read the manifest of a batch. Raises ManifestError that names the client's manifest."""
        place = self._place(batch, videos)
        try:
            return read_manifest(place)
        except ManifestError as error:
            message = str(error).replace(place, storage.redact(videos.manifest))
            raise ManifestError(message) from None

    def _place(self, batch: str, videos: BatchInput) -> str:
        is_web = videos.manifest.startswith(WEB)
        return self._folders.at(batch, "manifest.parquet") if is_web else videos.manifest

    async def _look_up(
        self, uri: str, gate: asyncio.Semaphore, cancelled: Callable[[], bool]
    ) -> VideoRef:
        """Return the manifest row of a URI; size 0 and no etag if its storage does not answer."""
        async with gate:
            try:
                found = None if cancelled() else await self._fetcher.look_up(uri)
            except (StorageError, VideoError):
                found = None
        if found is None:
            return VideoRef(video_id(uri), uri, 0)
        return VideoRef(video_id(uri), uri, found.size_bytes, found.etag, found.modified)


def _copy(path: str, place: str) -> None:
    with open(path, "rb") as source, storage.open_write(place) as target:
        shutil.copyfileobj(source, target)
