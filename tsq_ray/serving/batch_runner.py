"""Runs batches: run folders of `tsq score`, filled by the graph alongside single requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tsq_ray import storage
from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.config import Config
from tsq_ray.decode import VideoSource
from tsq_ray.errors import RunError, StorageError, TsqError, VideoError
from tsq_ray.manifest import VideoRef
from tsq_ray.rows import Answer, Row
from tsq_ray.runs.bulk import Selection
from tsq_ray.runs.lease import Lease
from tsq_ray.runs.verify import verify
from tsq_ray.runtime.parts import part_rows
from tsq_ray.schema import table_from_rows
from tsq_ray.score_run import ScoreRun, prediction_of
from tsq_ray.serving.batch_folders import WEBHOOK, BatchFolders, BatchInput, Claim
from tsq_ray.serving.batch_manifests import BatchManifests
from tsq_ray.serving.batch_webhooks import BatchWebhooks
from tsq_ray.serving.graph import Graph, Video, graph_version
from tsq_ray.serving.metrics import BatchMetrics
from tsq_ray.serving.requests.models import (
    Batch,
    BatchLine,
    BatchList,
    BatchOptions,
    BatchRequest,
    RequestCounts,
)
from tsq_ray.serving.requests.parse import in_thread
from tsq_ray.serving.requests.problems import RequestError
from tsq_ray.serving.requests.uris import check_uri

_log = logging.getLogger("ray.serve")
PATIENCE_S = 600.0
"""How long a batch waits for a replica, or for the run folder that an old replica holds."""
_BUSY_WAIT_S = 5.0
_WAITS_S = (5, 20, 60, 300)
_Found = TypeVar("_Found")


class Cancelled(Exception):
    """The client cancelled the batch."""


class Ended(Exception):
    """Another replica has ended the batch."""


@dataclass
class _Running:
    """A batch that has not ended."""

    card: Batch
    videos: BatchInput | None = None
    """None until it is read, for a batch from before the endpoint started."""
    cancelled: bool = False
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    seconds: dict[str, float] = field(default_factory=dict)


class BatchRunner:
    """Keeps the batches below a folder and runs those that have not ended, one at a time."""

    def __init__(self, model: str, config: Config, graph: Graph) -> None:
        self._model, self._config, self._graph = model, config, graph
        self._folders = BatchFolders(config.serve.batches_uri)
        self._manifests = BatchManifests(self._folders, config)
        self._webhooks = BatchWebhooks(self._folders, config)
        self._sha256 = read_bundle_settings(model)[1]
        self._version = graph_version(self._sha256, config)
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._claiming, self._turn = asyncio.Lock(), asyncio.Lock()
        self._places = asyncio.Semaphore(config.serve.batch_videos)
        self._metrics = BatchMetrics()

    def _start_task(self, work: Coroutine[Any, Any, _Found]) -> asyncio.Task[_Found]:
        """Start a task and keep a reference to it until it has ended."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def create(
        self, options: BatchOptions | None, lines: Sequence[BatchLine], key: str | None
    ) -> Batch:
        """Start a batch over the manifest of a BatchRequest or over lines.

        If the key already has a batch, return that one. Raises RequestError 422 if the key belongs
        to another request.
        """
        # shielded: a client that disconnects must not leave half a batch
        return await asyncio.shield(
            self._start_task(self._create(options or BatchOptions(), lines, key))
        )

    async def _create(
        self, options: BatchOptions, lines: Sequence[BatchLine], key: str | None
    ) -> Batch:
        batch = f"batch_{int(time.time() * 1000):014d}_{secrets.token_hex(6)}"
        if key is None:
            return await self._new(batch, options, lines)
        async with self._claiming:
            new = await asyncio.to_thread(Claim.of, batch, [options, *lines])
            claim = await asyncio.to_thread(self._folders.claim, key, new)
            if claim.request != new.request:
                why = "belongs to another request; use a new key for each request"
                raise RequestError(422, f"Idempotency-Key: {why}")
            # a key without a batch: the endpoint ended, or storage failed, between the two writes
            return await self._find(claim.batch) or await self._new(claim.batch, options, lines)

    async def _new(self, batch: str, options: BatchOptions, lines: Sequence[BatchLine]) -> Batch:
        at = self._folders.at
        own = at(batch, "manifest.parquet")
        manifest = options.manifest if isinstance(options, BatchRequest) else own
        videos = BatchInput(manifest=manifest, lines=list(lines), version=self._version)
        card = Batch(
            id=batch,
            model=self._sha256,
            input_uri=storage.redact(videos.manifest),
            predictions_uri=at(batch, "predictions"),
            metadata=options.metadata,
            created_at=int(time.time()),
        )
        await asyncio.to_thread(self._folders.create, card, videos, options.webhook)
        self._start(_Running(card, videos))
        return card

    async def _find(self, batch: str) -> Batch | None:
        if batch in self._running:
            return self._running[batch].card
        return await asyncio.to_thread(self._folders.card, batch)

    async def get(self, batch: str, with_problems: bool = False) -> Batch:
        """Return a batch. Raises RequestError 404 if it is unknown."""
        card = await self._find(batch)
        if card is None:
            raise RequestError(404, f"no batch {batch[:100]!r}")
        if with_problems and card.status == "completed":
            found = await asyncio.to_thread(verify, card.predictions_uri)
            return card.model_copy(update={"problems": list(found.problems)})
        return card

    async def cancel(self, batch: str) -> Batch:
        """Cancel a batch that has not ended; the rows it already has are kept."""
        card = await self.get(batch)
        if card.has_ended:
            return card
        running = self._ensure_started(card)
        if not running.cancelled:
            running.cancelled = True
            await self._set_status(running, "cancelling")
        return running.card

    async def newest(self, limit: int, after: str | None) -> BatchList:
        """Return the newest batches, or with `after` the newest ones older than that."""
        names = await asyncio.to_thread(self._folders.names)
        older = [name for name in names if after is None or name < after]
        found = [await self.get(name) for name in older[:limit]]
        return BatchList(data=found, has_more=len(older) > limit)

    async def resume(self) -> None:
        """Start the batches left unfinished when the endpoint last ended, once storage answers."""
        for wait_s in _retry_waits():
            try:
                names = await asyncio.to_thread(self._folders.names)
                uncalled = set(await asyncio.to_thread(self._folders.names, WEBHOOK))
                left = [
                    name
                    for name in reversed(names)
                    if not await self._try_to_resume(name, name in uncalled)
                ]
            except StorageError as error:
                _log.warning("the batches cannot be listed: %s", storage.redact(str(error)))
            else:
                if not left:
                    return
            await asyncio.sleep(wait_s)

    async def _try_to_resume(self, batch: str, has_webhook: bool) -> bool:
        """Start a batch, or call its webhook if it has ended; False if its card cannot be read."""
        try:
            card = await self._find(batch)
        except (StorageError, ValueError) as error:
            why = storage.redact(" ".join(str(error).split()))
            _log.warning("batch %s cannot be read: %s", batch, why)
            return False
        if card is not None and not card.has_ended:
            self._ensure_started(card)
        elif card is not None and has_webhook:
            self._start_task(self._webhooks.call(card))
        return True

    def _ensure_started(self, card: Batch) -> _Running:
        """Return the running batch; start it if it is not running."""
        if card.id not in self._running:
            self._start(_Running(card, cancelled=card.status == "cancelling"))
        return self._running[card.id]

    def _start(self, running: _Running) -> None:
        self._running[running.card.id] = running
        self._start_task(self._run(running))

    async def _run(self, running: _Running) -> None:
        status, errors = "completed", []
        try:
            # before its turn, so that slow sources do not delay other batches
            await self._retry_while_unavailable(running, self._prepare)
            async with self._turn:
                await self._retry_while_unavailable(running, self._score)
        except Cancelled:
            status = "cancelled"
        except Ended:
            status = ""
        except TsqError as error:
            status, errors = "failed", [storage.redact(str(error))[:500]]
        except Exception as error:  # noqa: BLE001  the batch must reach a final status
            _log.exception("batch %s failed", running.card.id)
            status, errors = "failed", [f"internal: {type(error).__name__}"]
        if status:
            await self._end(running, status, errors)
        del self._running[running.card.id]
        await self._webhooks.call(running.card)

    async def _end(self, running: _Running, status: str, errors: list[str]) -> None:
        """Write the final status of a batch, retrying until storage accepts it."""
        for wait_s in _retry_waits():
            try:
                await self._set_status(running, status, errors=errors)
                break
            except StorageError as error:
                _log.warning("the end of batch %s waits: %s", running.card.id, error)
            await asyncio.sleep(wait_s)

    async def _set_status(self, running: _Running, status: str, **fields: Any) -> None:
        async with running.saving:
            if status == "cancelling" and running.card.has_ended:
                return
            if status in ("in_progress", "finalizing"):
                _stop_if_cancelled(running)
            stamp = {f"{status}_at": int(time.time())}
            running.card = running.card.model_copy(update={"status": status} | stamp | fields)
            await asyncio.to_thread(self._folders.save, running.card)

    async def _retry_while_unavailable(
        self, running: _Running, step: Callable[[_Running], Awaitable[None]]
    ) -> None:
        """Run a step, and retry it a few times while storage is unavailable."""
        for wait_s in _WAITS_S:
            try:
                return await step(running)
            except StorageError as error:
                if error.error_type != "unavailable":
                    raise
                _log.warning("batch %s waits: %s", running.card.id, error)
            await asyncio.sleep(wait_s)
        return await step(running)

    async def _prepare(self, running: _Running) -> None:
        """Read the batch's input and make its manifest. Raises Cancelled."""
        batch = running.card.id
        if running.videos is None:
            running.videos = await asyncio.to_thread(self._folders.input, batch)
        await self._manifests.make(batch, running.videos, lambda: running.cancelled)
        _stop_if_cancelled(running)

    async def _score(self, running: _Running) -> None:
        """Score the videos that have no row yet. Raises Cancelled."""
        videos = running.videos
        assert videos is not None, "prepared"
        if videos.version not in ("", self._version):
            await self._start_over(running, videos)
        manifest = await asyncio.to_thread(self._manifests.read, running.card.id, videos)
        selection = Selection.of(manifest)
        scored = ScoreRun.of(selection, self._model, running.card.predictions_uri, self._config)
        async with self._held(running, scored.run):
            await asyncio.to_thread(scored.run.begin)
            todo = scored.run.todo
            total, (ok, failed) = len(manifest.rows), scored.run.count_settled()
            running.card.request_counts = RequestCounts(total=total, completed=ok, failed=failed)
            await self._set_status(running, "in_progress")
            size = part_rows(scored.schema, self._config.output, total)
            for start in range(0, len(todo), size):
                await self._part(running, scored, todo[start : start + size])
            await self._set_status(running, "finalizing")
            record = await asyncio.to_thread(scored.close, running.seconds)
        counts = record["counts"]
        running.card.request_counts = RequestCounts(
            total=counts["inputs"], completed=counts["ok"], failed=counts["failed"]
        )
        running.card.output_uri, running.card.error_uri = await asyncio.to_thread(
            self._folders.write_answers, running.card, videos.lines
        )

    async def _start_over(self, running: _Running, videos: BatchInput) -> None:
        """Move a batch that another version began to a new run folder; the old rows stay."""
        card = running.card
        async with self._held(running, Lease(card.predictions_uri)):
            name = f"predictions-{storage.sha256_of(self._version.encode())[:12]}"
            card.predictions_uri = self._folders.at(card.id, name)
            card.model, videos.version = self._sha256, self._version
            await asyncio.to_thread(self._folders.save, card)
            await asyncio.to_thread(self._folders.save_input, card.id, videos)

    @contextlib.asynccontextmanager
    async def _held(self, running: _Running, folder: Any) -> AsyncIterator[None]:
        """Hold a run folder, given as a run or a lease.

        During an update the old replica may still hold it for a while. Raises Cancelled, or Ended
        if that replica has ended the batch.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            _stop_if_cancelled(running)
            try:
                await asyncio.to_thread(folder.__enter__)
                break
            except RunError as error:
                if "writes to this folder" not in str(error) or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_BUSY_WAIT_S)
        try:
            card = await asyncio.to_thread(self._folders.card, running.card.id)
            if card is not None and card.has_ended:
                running.card = card
                raise Ended
            running.cancelled |= card is not None and card.status == "cancelling"
            _stop_if_cancelled(running)
            yield
        finally:
            await asyncio.to_thread(folder.__exit__)

    async def _part(self, running: _Running, scored: ScoreRun, refs: Sequence[VideoRef]) -> None:
        rows = await asyncio.gather(*(self._row(running, scored, ref) for ref in refs))
        _stop_if_cancelled(running)
        table = table_from_rows(rows, scored.schema)
        await asyncio.to_thread(scored.run.publish, table)
        self._metrics.written(rows)
        async with running.saving:
            await asyncio.to_thread(self._folders.save, running.card)

    async def _row(self, running: _Running, scored: ScoreRun, ref: VideoRef) -> Row:
        async with self._places:
            _stop_if_cancelled(running)
            answer = await self._answer(ref)
        counts = running.card.request_counts
        counts.failed += answer.error is not None
        counts.completed += answer.error is None
        for stage in ("decode", "sample", "recognize"):
            spent = (answer.columns.get(f"{stage}_ms") or 0.0) / 1000
            running.seconds[stage] = running.seconds.get(stage, 0.0) + spent
        return prediction_of(ref, answer, scored.labels)

    async def _answer(self, ref: VideoRef) -> Answer:
        try:
            await in_thread(check_uri, ref.uri, self._config.serve.allowed_uri_prefixes)
            # a line that could not be looked up has no size to compare with
            source = VideoSource.of(ref) if ref.size_bytes else VideoSource(ref.uri)
            return await self._graph.score(Video(source, ref.video_id, in_batch=True))
        except RequestError as error:
            return Answer(error=VideoError("access_denied", str(error)))
        except Exception as error:  # noqa: BLE001  the boundary where a failure becomes a row
            return Answer(error=VideoError("internal", f"the graph failed: {type(error).__name__}"))


def _retry_waits() -> Iterator[float]:
    """Yield the waits between endless retries, in seconds."""
    return itertools.chain(_WAITS_S, itertools.repeat(_WAITS_S[-1]))


def _stop_if_cancelled(running: _Running) -> None:
    if running.cancelled:
        raise Cancelled
