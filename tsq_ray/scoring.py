"""Bulk scoring: Ray Data drives the Serve graph, predictions go to Parquet, one row per video."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.config import Config
from tsq_ray.decode import VideoSource
from tsq_ray.errors import VideoError
from tsq_ray.manifest import VideoRef, read_manifest
from tsq_ray.results import RunSummary
from tsq_ray.rows import Answer, Row
from tsq_ray.runs.bulk import Selection
from tsq_ray.runtime import blocks, cluster, parts, progress
from tsq_ray.runtime.bulk import BulkObserver, Work, run_bulk
from tsq_ray.runtime.nodes import Layout
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.score_run import ScoreRun, prediction_of
from tsq_ray.serving.graph import Video
from tsq_ray.serving.replicas import LOOK_EVERY_S, FlowCounts, Replicas

_PATIENCE_S = 600.0
"""How long a video waits for replacements of lost replicas."""
_BLOCKS_AT_A_TIME = 4
"""Per sender: while one block's last videos are in flight, the next blocks keep the graph busy."""
_BATCH_ROWS = 32


@dataclass(frozen=True)
class ScorePlan:
    """Everything a sender needs; serialised to it."""

    app: str
    schema: pa.Schema
    classes: list[str]
    counts: Any
    config: Config


def score(
    manifest_uri: str,
    model: str,
    out: str,
    config: Config | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    retry_failed: str | None = None,
    take_over: bool = False,
    with_scores: bool = True,
    session: Session = DEFAULT_SESSION,
) -> RunSummary:
    """Score every video of a manifest into the run folder `out`, resuming an earlier run.

    The summary has mAP and top-1 if the videos have labels. Raises UserError for wrong input,
    RunFailed if the run failed or does not add up.

    Args:
        manifest_uri: what `build_manifest` wrote.
        model: the bundle.
        out: the run folder.
        config: from `scoring_config`; its defaults if omitted.
        split: only the videos of this split.
        limit: at most this many videos, in the order of the manifest.
        retry_failed: also retry the videos that failed for this reason; "all" for any.
        take_over: take the folder from another run that is writing to it.
        with_scores: keep the scores of all classes, which the metrics need.
        session: the cluster to use and the output to show.
    """
    started = time.time()
    out, model = storage.normalize(out), storage.normalize(model)
    config = config or scoring_config(model)
    selection = Selection.of(read_manifest(manifest_uri), split, limit, retry_failed)
    options: dict[str, Any] = {"started": started, "take_over": take_over}
    scored = ScoreRun.of(selection, model, out, config, with_scores=with_scores, **options)
    with scored.run as run:
        seconds = _score_todo(scored, model, session) if run.todo else {}
        record = scored.close(seconds)
    return RunSummary.of(storage.redact(out), record)


def _score_todo(scored: ScoreRun, model: str, session: Session) -> dict[str, float]:
    """Send the videos without a row through the graph; return the seconds by stage."""
    run = scored.run
    with (
        cluster.connect(session, out=run.out) as ray,
        BulkObserver(ray, run, "score", progress.start_counts(FlowCounts)) as observer,
    ):
        app = f"tsq-score-{_unique(model)}"
        plan = ScorePlan(app, scored.schema, scored.labels, observer.counts, run.config)
        replicas = Replicas(ray, plan.app, run.config, model, observer.counts, len(run.todo))
        work = _work(plan, replicas.placed)
        with (
            replicas.deployed(session, observer.observe),
            cluster.asking_for_nodes(ray, replicas.placed, run.config),
        ):
            return run_bulk(observer, work, session, ticks=(replicas.tick,), app=plan.app)


def _unique(name: str) -> str:
    return hashlib.sha256(f"{name}{time.time_ns()}".encode()).hexdigest()[:8]


def _work(plan: ScorePlan, placed: Layout) -> Work:
    senders = placed["sender"]

    def stage(data: Any) -> Any:
        import ray

        options = parts.pool_options(senders)
        options["compute"] = ray.data.ActorPoolStrategy(
            min_size=senders.minimum,
            max_size=senders.limit,
            initial_size=senders.start,
            max_concurrent_calls_per_actor=_BLOCKS_AT_A_TIME,
            enable_true_multi_threading=True,
        )
        # no batch size, because Ray Data would wait for blocks to fill a batch
        return data.map_batches(
            ScoreWorker, batch_size=None, fn_constructor_args=(plan,), **options
        )

    pool = replace(senders, start=senders.start * _BLOCKS_AT_A_TIME)
    return Work(pool, placed["writer"], stage, plan.schema, _BATCH_ROWS)


class ScoreWorker:
    """Send videos through the graph, at most `share` at a time, and collect their rows."""

    def __init__(self, plan: ScorePlan) -> None:
        from tsq_ray.serving.graph import Graph, TimeLimits, handles

        self.plan, self.name = plan, _unique("sender")
        limits = TimeLimits.of(plan.config, _PATIENCE_S)
        self.graph = Graph(**handles(plan.app), limits=limits)
        self.loop = asyncio.new_event_loop()
        self.in_flight = 0
        self.share = 1
        self.changed = asyncio.Condition()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._ask_for_share(), self.loop)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Yield transport tables with the prediction rows of a block of manifest rows."""
        rows = [
            asyncio.run_coroutine_threadsafe(self._row(ref), self.loop)
            for ref in blocks.refs_of(block)
        ]
        for batch in blocks.batches(rows, _BATCH_ROWS):
            yield parts.transport_table(
                [row.result() for row in batch], self.plan.schema, self.plan.counts
            )

    async def _ask_for_share(self) -> None:
        import ray

        while True:
            with contextlib.suppress(ray.exceptions.RayError):  # the loop asks again
                self.share = await self.plan.counts.share.remote(self.name)
            async with self.changed:
                self.changed.notify_all()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _row(self, ref: VideoRef) -> Row:
        async with self.changed:
            await self.changed.wait_for(lambda: self.in_flight < self.share)
            self.in_flight += 1
        try:
            answer = await self._answer(ref)
        finally:
            self.in_flight -= 1
            async with self.changed:
                self.changed.notify_all()
        row = prediction_of(ref, answer, self.plan.classes)
        stages = (
            (parts.DECODE_S, "decode_ms"),
            (parts.SAMPLE_S, "sample_ms"),
            (parts.RECOGNIZE_S, "recognize_ms"),
        )
        seconds = {name: (row.get(column) or 0.0) / 1000 for name, column in stages}
        return row | seconds | {parts.FETCHED: answer.fetched_bytes}

    async def _answer(self, ref: VideoRef) -> Answer:
        try:
            return await self.graph.score(Video(VideoSource.of(ref), ref.video_id))
        except Exception as error:  # noqa: BLE001  the boundary where a failure becomes a row
            cause = cluster.root_cause(error)
            return Answer(
                error=VideoError("internal", f"the graph failed: {type(cause).__name__}: {cause}")
            )
