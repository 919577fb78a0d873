"""Batches: run folders of `tsq score`, filled by the endpoint's own graph beside single requests.

A batch has a folder of its own below `serve.batches_uri`: `batch.json` (what clients see),
`manifest.parquet` and `lines.json` if it was sent as JSON lines, `predictions/` (the run folder),
and at the end `output.jsonl` and `errors.jsonl`. Nothing else is kept, so that a batch resumes where
it was when the endpoint starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import serve

from tsq_ray import storage
from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.config import Config
from tsq_ray.decode import VideoSource
from tsq_ray.errors import RunError, StorageError, TsqError, VideoError
from tsq_ray.manifest import Manifest, VideoRef, read_manifest, video_id, write_manifest
from tsq_ray.manifest.videos import VideoRows
from tsq_ray.rows import Answer, plain_row
from tsq_ray.runs.bulk import Selection
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.verify import verify
from tsq_ray.runtime.parts import part_rows
from tsq_ray.schema import table_from_rows
from tsq_ray.score_run import ScoreRun, prediction_of
from tsq_ray.serving.graph import Graph, TimeLimits, Video
from tsq_ray.serving.loopback import bind_to_loopback
from tsq_ray.serving.metrics import BatchMetrics
from tsq_ray.serving.requests.models import Batch, BatchLine, BatchList, BatchRequest, RequestCounts
from tsq_ray.serving.requests.problems import RequestError
from tsq_ray.serving.requests.uris import check_uri
from tsq_ray.serving.requests.webhooks import call

_log = logging.getLogger("ray.serve")
_PATIENCE_S = 600.0
_BUSY_WAIT_S = 5.0
_WAITS_S = (5, 20, 60, 300)
_LOOK_UPS = 32
_CARD, _LINES = "batch.json", "lines.json"


class Cancelled(Exception):
    """The batch is to be cancelled."""


@dataclass
class _Running:
    """A batch that is in hand."""

    card: Batch
    webhook: str | None = None
    lines: list[BatchLine] | None = None
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


class BatchRunner:
    """Keeps the batches below a folder and runs those that have not ended, one after the other."""

    def __init__(self, model: str, config: Config, graph: Graph) -> None:
        self._model, self._config, self._graph = model, config, graph
        self._root = storage.normalize(config.serve.batches_uri)
        self._sha256 = read_bundle_settings(model)[1]
        self._running: dict[str, _Running] = {}
        self._turn = asyncio.Lock()
        self._places = asyncio.Semaphore(config.serve.batch_videos)
        self._metrics = BatchMetrics()

    def _at(self, batch: str, *names: str) -> str:
        return storage.join(self._root, batch, *names)

    # ------------------------------------------------------------------------------- what is asked

    async def create(
        self,
        wanted: BatchRequest | None,
        lines: Sequence[BatchLine],
        key: str | None,
    ) -> Batch:
        """Start a batch over a manifest or over lines, or return the one that has this key."""
        now = time.time()
        batch = f"batch_{int(now * 1000):014d}_{secrets.token_hex(6)}"
        if key is not None and (known := await asyncio.to_thread(self._claim, key, batch)) != batch:
            return await self.get(known)
        given = wanted.manifest if wanted is not None else self._at(batch, "manifest.parquet")
        card = Batch(
            id=batch,
            model=self._sha256,
            input_uri=storage.redact(given),
            predictions_uri=self._at(batch, "predictions"),
            metadata=wanted.metadata if wanted is not None else {},
            created_at=int(now),
        )
        running = _Running(
            card, wanted.webhook if wanted is not None else None, list(lines) or None
        )
        await asyncio.to_thread(self._save_new, running, given)
        self._start(running)
        return card

    def _claim(self, key: str, batch: str) -> str:
        """Return the batch that has this idempotency key: `batch`, or an earlier one."""
        place = storage.join(self._root, "keys", storage.sha256_of(key.encode()))
        if storage.create_bytes(place, batch.encode()):
            return batch
        return storage.read_text(place)

    def _save_new(self, running: _Running, given: str) -> None:
        lines = [line.model_dump() for line in running.lines or ()]
        content = {"manifest": given, "webhook": running.webhook, "lines": lines}
        storage.write_bytes(self._at(running.card.id, _LINES), json.dumps(content).encode())
        self._save(running.card)

    def _save(self, card: Batch) -> None:
        storage.write_bytes(self._at(card.id, _CARD), card.model_dump_json().encode())

    async def get(self, batch: str, with_problems: bool = False) -> Batch:
        """Return a batch. Raises RequestError 404 if there is none."""
        if batch in self._running:
            card = self._running[batch].card
        else:
            card = await asyncio.to_thread(self._read, batch)
        if with_problems and card.status == "completed":
            found = await asyncio.to_thread(verify, card.predictions_uri)
            return card.model_copy(update={"problems": list(found.problems)})
        return card

    def _read(self, batch: str) -> Batch:
        unknown = RequestError(404, f"no batch {batch[:100]!r}")
        if not batch.startswith("batch_") or not batch.replace("_", "").isalnum():
            raise unknown
        try:
            return Batch.model_validate_json(storage.read_bytes(self._at(batch, _CARD)))
        except StorageError as error:
            if error.error_type == "not_found":
                raise unknown from None
            raise

    def _read_asked(self, batch: str) -> dict[str, Any]:
        """Return the manifest, the lines and the webhook of a batch."""
        content: dict[str, Any] = json.loads(storage.read_bytes(self._at(batch, _LINES)))
        return content

    async def cancel(self, batch: str) -> Batch:
        """Cancel a batch that has not ended; its rows so far are kept."""
        card = await self.get(batch)
        running = self._running.get(batch)
        if card.has_ended or running is None or running.cancelled:
            return card
        running.cancelled = True
        await self._enter(running, "cancelling")
        return running.card

    async def newest(self, limit: int, after: str | None) -> BatchList:
        """Return the newest batches, those older than `after` if it is given."""
        names = await asyncio.to_thread(self._names)
        older = [name for name in names if after is None or name < after]
        found = [await self.get(name) for name in older[:limit]]
        return BatchList(data=found, has_more=len(older) > limit)

    def _names(self) -> list[str]:
        """Return the ids of all batches, the newest first."""
        if not storage.is_folder(self._root):
            return []
        places = (parent_name(file.uri) for file in storage.walk(self._root) if is_card(file.uri))
        return sorted(places, reverse=True)

    # -------------------------------------------------------------------------------- what is done

    async def resume(self) -> None:
        """Start the batches that had not ended when the endpoint did."""
        for name in reversed(await asyncio.to_thread(self._names)):
            card = await self.get(name)
            if not card.has_ended and name not in self._running:
                content = await asyncio.to_thread(self._read_asked, name)
                lines = [BatchLine(**line) for line in content["lines"]]
                running = _Running(card, content["webhook"], lines or None)
                running.cancelled = card.status == "cancelling"
                self._start(running)

    def _start(self, running: _Running) -> None:
        self._running[running.card.id] = running
        running.task = asyncio.create_task(self._run(running))

    async def _run(self, running: _Running) -> None:
        try:
            async with self._turn:
                await self._score_patiently(running)
            await self._enter(running, "completed")
        except Cancelled:
            await self._enter(running, "cancelled")
        except TsqError as error:
            await self._enter(running, "failed", errors=[storage.redact(str(error))[:500]])
        except Exception as error:  # noqa: BLE001  the batch must not stay without an end
            _log.exception("batch %s failed", running.card.id)
            await self._enter(running, "failed", errors=[f"internal: {type(error).__name__}"])
        card = running.card
        del self._running[card.id]
        if running.webhook is not None:
            content = {"type": f"batch.{card.status}", "data": card.model_dump(mode="json")}
            await call(running.webhook, card.id, content, self._config.serve.webhook_prefixes)

    async def _enter(self, running: _Running, status: str, **more: Any) -> None:
        stamp = {f"{status}_at": int(time.time())}
        running.card = running.card.model_copy(update={"status": status} | stamp | more)
        await asyncio.to_thread(self._save, running.card)

    async def _score_patiently(self, running: _Running) -> None:
        """Score, and go on where it was while storage does not answer for a time."""
        for wait_s in _WAITS_S:
            try:
                return await self._score(running)
            except StorageError as error:
                if error.error_type != "unavailable":
                    raise
                _log.warning("batch %s waits: %s", running.card.id, error)
            await asyncio.sleep(wait_s)
        return await self._score(running)

    async def _score(self, running: _Running) -> None:
        """Score the videos that have no row yet. Raises Cancelled."""
        manifest = await self._manifest(running)
        selection = Selection.of(manifest)
        scored = ScoreRun.of(selection, self._model, running.card.predictions_uri, self._config)
        async with self._held(scored, running):
            todo = scored.run.todo
            ok, failed = scored.run.count_settled()
            running.card.request_counts = RequestCounts(
                total=len(manifest.rows), completed=ok, failed=failed
            )
            await self._enter(running, "in_progress")
            size = part_rows(scored.schema, self._config.output, len(manifest.rows))
            for start in range(0, len(todo), size):
                await self._part(running, scored, todo[start : start + size])
            await self._enter(running, "finalizing")
            record = await asyncio.to_thread(scored.close, running.seconds)
        counts = record["counts"]
        running.card.request_counts = RequestCounts(
            total=counts["inputs"], completed=counts["ok"], failed=counts["failed"]
        )
        await asyncio.to_thread(self._write_lines, running)
        running.card.output_uri = self._at(running.card.id, "output.jsonl")
        running.card.error_uri = self._at(running.card.id, "errors.jsonl")

    @contextlib.asynccontextmanager
    async def _held(self, scored: ScoreRun, running: _Running) -> Any:
        """Hold the run folder; during an update the replica before this one may still do."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            _stop_if_cancelled(running)
            try:
                run = await asyncio.to_thread(scored.run.__enter__)
                break
            except RunError as error:
                if "writes to this folder" not in str(error) or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_BUSY_WAIT_S)
        try:
            yield run
        finally:
            await asyncio.to_thread(scored.run.__exit__)

    async def _manifest(self, running: _Running) -> Manifest:
        """Read the manifest, or make the one of the lines."""
        place = self._at(running.card.id, "manifest.parquet")
        if running.lines is None:
            content = await asyncio.to_thread(self._read_asked, running.card.id)
            return await asyncio.to_thread(read_manifest, content["manifest"])
        if not await asyncio.to_thread(storage.is_file, place):
            uris = list(dict.fromkeys(line.uri for line in running.lines))
            gate = asyncio.Semaphore(_LOOK_UPS)
            refs = await asyncio.gather(*(_look_up(uri, gate) for uri in uris))
            made = Manifest(VideoRows.of(refs), [], running.card.id, (running.card.id,))
            await asyncio.to_thread(write_manifest, made, place)
        return await asyncio.to_thread(read_manifest, place)

    async def _part(self, running: _Running, scored: ScoreRun, refs: Sequence[VideoRef]) -> None:
        rows = await asyncio.gather(*(self._row(running, scored, ref) for ref in refs))
        _stop_if_cancelled(running)
        table = table_from_rows(rows, scored.schema)
        await asyncio.to_thread(scored.run.publish, table)
        self._metrics.written(rows)
        await asyncio.to_thread(self._save, running.card)

    async def _row(self, running: _Running, scored: ScoreRun, ref: VideoRef) -> dict[str, Any]:
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
            check_uri(ref.uri, self._config.serve.allowed_uri_prefixes)
            # a line that storage could not look up has no size to compare with
            source = VideoSource.of(ref) if ref.size_bytes else VideoSource(ref.uri)
            return await self._graph.score(Video(source, ref.video_id))
        except RequestError as error:
            return Answer(error=VideoError("access_denied", str(error)))
        except Exception as error:  # noqa: BLE001  the boundary where a failure becomes a row
            return Answer(error=VideoError("internal", f"the graph failed: {type(error).__name__}"))

    def _write_lines(self, running: _Running) -> None:
        """Write the answers and the failures as JSON lines, in the order of the parts."""
        asked: dict[str, list[str]] = {}
        for line in running.lines or ():
            asked.setdefault(video_id(line.uri), []).append(line.custom_id)
        batch = running.card.id
        with (
            storage.open_write(self._at(batch, "output.jsonl")) as output,
            storage.open_write(self._at(batch, "errors.jsonl")) as errors,
        ):
            for row in _rows(running.card.predictions_uri):
                for custom_id in asked.get(row["video_id"], [row["video_id"]]):
                    answered = {"custom_id": custom_id, **row}
                    file = output if row["status"] == "ok" else errors
                    file.write(json.dumps(answered).encode() + b"\n")


def _rows(predictions_uri: str) -> Iterator[dict[str, Any]]:
    for part in list_parts(predictions_uri):
        for row in read_part(part.uri).to_pylist():
            yield plain_row({name: value for name, value in row.items() if value is not None})


def _stop_if_cancelled(running: _Running) -> None:
    if running.cancelled:
        raise Cancelled


async def _look_up(uri: str, gate: asyncio.Semaphore) -> VideoRef:
    """Return the manifest row of a URI; without what storage says if it does not answer."""
    async with gate:
        try:
            found = await asyncio.to_thread(storage.stat, uri)
        except StorageError:
            return VideoRef(video_id(uri), uri, 0)
    return VideoRef(video_id(uri), uri, found.size_bytes, found.etag, found.modified)


def is_card(uri: str) -> bool:
    """Return whether a file says what a batch is."""
    return storage.name_of(uri) == _CARD and parent_name(uri).startswith("batch_")


def parent_name(uri: str) -> str:
    """Return the name of a file's folder."""
    return storage.name_of(storage.parent_of(uri))


@serve.deployment
class Batches:
    """The one replica that keeps the batches."""

    def __init__(
        self, model: str, config: Config, decoder: Any, sampler: Any, recognizer: Any
    ) -> None:
        bind_to_loopback()
        limits = TimeLimits.of(config, _PATIENCE_S)
        self._runner = BatchRunner(model, config, Graph(decoder, sampler, recognizer, limits))
        self._tasks = [asyncio.create_task(self._runner.resume())]

    async def create(
        self,
        wanted: BatchRequest | None,
        lines: Sequence[BatchLine],
        key: str | None,
    ) -> Batch:
        """Start a batch; see BatchRunner.create."""
        return await self._runner.create(wanted, lines, key)

    async def get(self, batch: str, with_problems: bool) -> Batch:
        """Return a batch."""
        return await self._runner.get(batch, with_problems)

    async def cancel(self, batch: str) -> Batch:
        """Cancel a batch."""
        return await self._runner.cancel(batch)

    async def newest(self, limit: int, after: str | None) -> BatchList:
        """Return the newest batches."""
        return await self._runner.newest(limit, after)
