"""Bulk scoring: Ray Data drives the Serve graph, predictions go to Parquet, one row per video."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from tsq_ray import quality, schema, storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import NO_RECOGNIZER, read_bundle_settings, read_curves
from tsq_ray.config import Config
from tsq_ray.errors import ModelError, VideoError
from tsq_ray.manifest import VideoRef, read_manifest
from tsq_ray.results import RunSummary
from tsq_ray.rows import Answer, prediction_row, source_of
from tsq_ray.runs.bulk import BulkRun, Selection
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.identity import Identity
from tsq_ray.runtime import cluster, parts, progress
from tsq_ray.runtime.bulk import Work, run_bulk
from tsq_ray.runtime.nodes import Layout
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.serving.replicas import LOOK_EVERY_S, STAGES, FlowCounts, Replicas

_PATIENCE_S = 600.0
"""How long a video whose replicas are lost waits for their replacements."""
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
        config: from `scoring_config`, whose defaults are used without it.
        split: only the videos of this split.
        limit: at most this many videos, in the order of the manifest.
        retry_failed: also do the videos that failed for this reason again; "all" for any.
        take_over: take the folder from another run that is writing to it.
        with_scores: keep the scores of all classes, which the metrics need.
        session: the cluster to use and the output to show.
    """
    started = time.time()
    out, model = storage.normalize(out), storage.normalize(model)
    config = config or scoring_config(model)
    content, digest = read_bundle_settings(model)
    if "recognizer" not in content["files"]:
        raise ModelError(f"{storage.redact(model)}: {NO_RECOGNIZER}")
    manifest = read_manifest(manifest_uri)
    selection = Selection.of(manifest, split, limit, retry_failed)
    classes = list(content["classes"])
    arrow = schema.predictions_schema(
        config.decode.num_frames, len(classes), manifest.classes, with_scores
    )
    more = {
        "model": {"uri": storage.redact(model), "sha256": digest},
        "bundle_classes": classes,
        "task": content["task"],
        "with_scores": with_scores,
        "training_curve": read_curves(model),
    }
    identity = _identity(content, digest, config, with_scores)
    options: dict[str, Any] = {"started": started, "take_over": take_over}
    with BulkRun(out, "predictions", identity, selection, config, **options) as run:
        seconds = _score_todo(run, model, arrow, manifest.classes, session) if run.todo else {}
        record = run.close(seconds, lambda: more | {"metrics": measure_predictions(out, classes)})
    return RunSummary.of(storage.redact(out), record)


def _score_todo(
    run: BulkRun, model: str, arrow: pa.Schema, labels: list[str], session: Session
) -> dict[str, float]:
    """Send the videos that have no row through the graph; return the seconds by stage.

    `labels`: the manifest's class names.
    """
    with cluster.connect(session) as ray:
        counts = progress.start_counts(FlowCounts)
        plan = ScorePlan(f"tsq-score-{_unique(model)}", arrow, labels, counts, run.config)
        replicas = Replicas(ray, plan.app, run.config, model, counts, len(run.todo))
        work = _work(plan, replicas.placed, session.debug)
        with (
            replicas.deployed(session),
            cluster.asking_for_nodes(ray, replicas.placed, run.config),
        ):
            return run_bulk("score", run, work, session, ticks=(replicas.tick,), app=plan.app)


def _identity(bundle: dict[str, Any], digest: str, config: Config, with_scores: bool) -> Identity:
    sampler = config.sampler.model_dump(mode="json")
    if config.sampler.mode != "random":
        sampler.pop("seed")
    if config.sampler.budget != "adaptive":  # keeps runs made before these settings valid
        sampler.pop("max_budget")
        sampler.pop("margin")
    # for the same reason the backend counts only if it differs from the bundle's own
    own = bundle["config"]["decode"].get("backend", config.decode.backend)
    backend = config.decode.backend
    decode = {"decode": {"backend": backend}} if backend != own else {}
    scores = "all" if with_scores else "top"
    return Identity.of(model_sha256=digest, sampler=sampler, scores=scores, **decode)


def _unique(name: str) -> str:
    return hashlib.sha256(f"{name}{time.time_ns()}".encode()).hexdigest()[:8]


def _work(plan: ScorePlan, placed: Layout, debug: bool) -> Work:
    senders = placed["sender"]

    def stage(data: Any) -> Any:
        import ray

        parts.hand_on_after(cluster.quiet_data(debug), plan.schema, _BATCH_ROWS)
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

    many = replace(senders, start=senders.start * _BLOCKS_AT_A_TIME)
    return Work(many, placed["writer"], stage, plan.schema, plan.counts)


class ScoreWorker:
    """Send videos through the graph, at most `share` at a time, and collect their rows."""

    def __init__(self, plan: ScorePlan) -> None:
        from ray import serve

        from tsq_ray.serving.graph import Graph, TimeLimits

        self.plan, self.name = plan, _unique("sender")
        decoder, sampler, recognizer = (
            serve.get_deployment_handle(name.capitalize(), plan.app) for name in STAGES
        )
        self.graph = Graph(decoder, sampler, recognizer, TimeLimits.of(plan.config, _PATIENCE_S))
        self.loop = asyncio.new_event_loop()
        self.on_its_way = 0
        self.share = 1
        self.changed = asyncio.Condition()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._ask_for_share(), self.loop)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Yield transport tables with the prediction rows of a block of manifest rows."""
        rows = [
            asyncio.run_coroutine_threadsafe(self._row(ref), self.loop)
            for ref in parts.refs_of(block)
        ]
        for batch in parts.batches(rows, _BATCH_ROWS):
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

    async def _row(self, ref: VideoRef) -> dict[str, Any]:
        async with self.changed:
            await self.changed.wait_for(lambda: self.on_its_way < self.share)
            self.on_its_way += 1
        try:
            row = prediction_row(ref, await self._answer(ref))
        finally:
            self.on_its_way -= 1
            async with self.changed:
                self.changed.notify_all()
        if ref.labels is not None:
            row["label_names"] = [self.plan.classes[number] for number in ref.labels]
        seconds = {
            f"_{stage}_s": (row.get(f"{stage}_ms") or 0.0) / 1000
            for stage in ("decode", "sample", "recognize")
        }
        return row | seconds

    async def _answer(self, ref: VideoRef) -> Answer:
        try:
            return await self.graph.score(source_of(ref), ref.video_id)
        except Exception as error:  # noqa: BLE001  the boundary where a failure becomes a row
            cause = cluster.root_cause(error)
            return Answer(
                error=VideoError("internal", f"the graph failed: {type(cause).__name__}: {cause}")
            )


def measure_predictions(predictions_uri: str, classes: Sequence[str]) -> dict[str, Any]:
    """Return mAP (both conventions) and top-1 over the labelled videos that are ok.

    Label names that the bundle lacks are counted and left out.
    """
    readers = [partial(read_part, part.uri) for part in list_parts(predictions_uri)]
    return quality.measure_parts(readers, classes)
