"""The manifests of batches: given ones, those of lines, and copies from web servers.

The endpoint's own rules hold for both: a web server is asked once, at an address that is checked
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
"""Look-ups at a time, and those of one batch: slow sources leave places to other batches."""


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

    async def make(self, batch: str, given: BatchInput, cancelled: Callable[[], bool]) -> None:
        """Write the manifest of lines, or copy that of a web server, unless the folder has it.

        Raises StorageError, and VideoError: too_large, or timeout.
        """
        place = self._place(batch, given)
        is_web = given.manifest.startswith(WEB)
        if not (given.lines or is_web) or await asyncio.to_thread(storage.is_file, place):
            return
        if is_web:
            async with self._fetcher.fetched(given.manifest, patient=True) as found:
                await asyncio.to_thread(_copy, found.path, place)
            return
        gate = asyncio.Semaphore(_LOOK_UPS_A_BATCH)
        uris = dict.fromkeys(line.uri for line in given.lines)
        refs = await asyncio.gather(*(self._look_up(uri, gate, cancelled) for uri in uris))
        if not cancelled():
            made = Manifest(VideoRows.of(refs), [], batch, (batch,))
            await asyncio.to_thread(write_manifest, made, place)

    def read(self, batch: str, given: BatchInput) -> Manifest:
        """Read the manifest of a batch. Raises ManifestError that names the given one."""
        place = self._place(batch, given)
        try:
            return read_manifest(place)
        except ManifestError as error:
            told = str(error).replace(place, storage.redact(given.manifest))
            raise ManifestError(told) from None

    def _place(self, batch: str, given: BatchInput) -> str:
        is_web = given.manifest.startswith(WEB)
        return self._folders.at(batch, "manifest.parquet") if is_web else given.manifest

    async def _look_up(
        self, uri: str, gate: asyncio.Semaphore, cancelled: Callable[[], bool]
    ) -> VideoRef:
        """Return the manifest row of a URI; without what storage says if it does not answer."""
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
