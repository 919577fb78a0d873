"""Bulk scoring: Ray Data drives the Serve graph, predictions go to Parquet, one row a video."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from tsq_ray import quality, runs, runtime, schema, storage
from tsq_ray.artifact import NO_RECOGNIZER, read_bundle_settings, read_curves
from tsq_ray.config import Config
from tsq_ray.errors import ModelError, VideoError
from tsq_ray.manifest import VideoRef, choose_split, read_manifest
from tsq_ray.rows import failed_row
from tsq_ray.sections import ReplicaConfig

_TRIES = 3


@dataclass(frozen=True)
class ScorePlan:
    """What a worker needs to know; travels to it whole."""

    app: str
    schema: pa.Schema
    classes: list[str]
    counts: Any
    timeout_s: float


def score(
    manifest_uri: str,
    model: str,
    out: str,
    config: Config,
    *,
    split: str | None = None,
    limit: int | None = None,
    retry_failed: str | None = None,
    with_scores: bool = True,
    address: str | None = None,
    show_progress: bool = True,
    debug: bool = False,
) -> dict[str, Any]:
    """Predictions of every video of a manifest into the run folder `out`; goes on where an earlier run stopped.

    `config` comes from `serve.settings.scoring_config`. Returns the content of `_run.json`, with mAP and top-1 under "metrics"
    where there are labels. Raises UserError for wrong input, RunFailed where the run failed or does not add up.
    """
    started = time.time()
    out, model = storage.normalize(out), storage.normalize(model)
    content, digest = read_bundle_settings(model)
    if "recognizer" not in content["files"]:
        raise ModelError(f"{storage.redact(model)}: {NO_RECOGNIZER}")
    manifest = read_manifest(manifest_uri)
    wanted = choose_split(manifest, split)[:limit]
    retry = runs.retry_reasons(retry_failed)
    classes = list(content["classes"])
    arrow = schema.predictions_schema(config.decode.num_frames, len(classes), manifest.classes, with_scores)
    todo = runs.enter(out, "predictions", _identity(content, digest, config, with_scores), manifest, wanted, retry)
    seconds: dict[str, float] = {}
    if todo:
        runs.reopen(out)
        with runtime.cluster(address, debug) as ray:
            counts = runtime.start_counts()
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            bulk = bulk_config(config, nodes, len(todo))
            senders = num_senders(bulk, nodes, len(todo))
            with serve_graph(model, bulk, debug) as app:
                plan = ScorePlan(app, arrow, manifest.classes, counts, config.decode.timeout_s + config.serve.request_timeout_s)
                try:
                    seconds = runtime.run_with_progress(
                        lambda: _run_pipeline(ray, todo, plan, out, bulk, senders, debug),
                        counts,
                        len(todo),
                        "score",
                        show_progress,
                    )
                except ray.exceptions.RayError as error:
                    raise runtime.run_failed(error, "score") from error
    more = {
        "model": {"uri": storage.redact(model), "sha256": digest},
        "bundle_classes": classes,
        "task": content["task"],
        "with_scores": with_scores,
        "training_curve": read_curves(model),
    }
    return runs.close_run(
        out, "predictions", manifest, wanted, todo, split, config, started, seconds, lambda: more | {"metrics": measure(out, classes)}
    )


def _identity(bundle: dict[str, Any], digest: str, config: Config, with_scores: bool) -> dict[str, Any]:
    sampler = config.sampler.model_dump(mode="json")
    if config.sampler.mode != "random":
        sampler.pop("seed")
    if config.sampler.budget != "adaptive":  # it says all; the runs of before these settings are the same
        sampler.pop("max_budget")
        sampler.pop("margin")
    identity = {"model_sha256": digest, "sampler": sampler, "scores": "all" if with_scores else "top"}
    # likewise of what the bundle says: only another backend than its own
    own = bundle["config"]["decode"].get("backend", config.decode.backend)
    return identity | ({"decode": {"backend": config.decode.backend}} if config.decode.backend != own else {})


@contextlib.contextmanager
def serve_graph(model: str, config: Config, debug: bool) -> Iterator[str]:
    """The graph deployed for the time of the `with`, without HTTP; yields the application's name."""
    from ray import serve

    from tsq_ray.serve.app import application

    runtime.quiet_data(debug)
    name = f"tsq-score-{hashlib.sha256(f'{model}{time.time_ns()}'.encode()).hexdigest()[:8]}"
    # a Serve instance that runs already, an endpoint's for example, keeps its own HTTP options
    serve.start(proxy_location="Disabled", logging_config={"log_level": "INFO" if debug else "ERROR", "enable_access_log": False})
    try:
        serve.run(application(model, config, None), name=name, route_prefix=None)
    except Exception as error:
        raise runtime.run_failed(error, "score: the graph") from error
    try:
        yield name
    finally:
        serve.delete(name)


def bulk_config(config: Config, nodes: Sequence[Mapping[str, float]], videos: int) -> Config:
    """Replicas for a bulk run: as many as the cluster holds, all from the start.

    `nodes`: resources of each, as Ray names them. Networks: one replica of each a GPU, at most `resources.gpus`; without GPUs one of each a node with CPUs, which uses all of its cores.
    """
    serve, most = config.serve, config.resources.gpus
    cores = [node["CPU"] for node in nodes if node.get("CPU")] or [1.0]
    cpus, there = sum(cores), sum(node.get("GPU", 0.0) for node in nodes)
    gpus = min(there, most) if most >= 0 else there
    decoders = int(max(1, min(config.resources.decoders or max(1, (cpus - 1) // 2), videos)))
    processes = max(1, int(min(serve.decoder_processes, cpus)))
    networks = int(max(1, min(gpus or len(cores), videos)))
    gpu = 0.5 if gpus else 0.0
    ahead = 2 * serve.batch_size if gpus else max(2 * serve.batch_size, int(2 * max(cores)))

    def replicas(count: int, num_cpus: float, num_gpus: float, ongoing: int) -> ReplicaConfig:
        return ReplicaConfig(min_replicas=count, max_replicas=count, num_cpus=num_cpus, num_gpus=num_gpus, max_ongoing_requests=ongoing)

    return config.model_copy(
        update={
            "serve": serve.model_copy(
                update={
                    "decoder": replicas(decoders, min(1.0, cpus / 8, min(cores) / 2), 0.0, 2 * processes),
                    "decoder_processes": processes,
                    "sampler": replicas(networks, 0.2, gpu, ahead),
                    "recognizer": replicas(networks, 0.2, gpu, ahead),
                }
            )
        }
    )


def num_senders(bulk: Config, nodes: Sequence[Mapping[str, float]], videos: int) -> int:
    """Workers that send videos to the graph, so many that their batches fill its decoders and samplers, at most one a CPU.

    At least two: while one waits for its last video the other keeps the graph busy.
    """
    cpus = int(sum(node.get("CPU", 0.0) for node in nodes))
    room = sum(part.max_replicas * part.max_ongoing_requests for part in (bulk.serve.decoder, bulk.serve.sampler))
    return min(max(2, min(-(-room // bulk.resources.batch_size), cpus)), videos)


def _run_pipeline(
    ray: Any, todo: Sequence[VideoRef], plan: ScorePlan, out: str, config: Config, senders: int, debug: bool
) -> dict[str, float]:
    runtime.quiet_data(debug)
    batch = config.resources.batch_size
    block = runtime.block_rows(len(todo), senders, batch, config.output.rows_per_file)
    data = runtime.todo_dataset(ray, todo, block).map_batches(
        ScoreWorker,
        compute=ray.data.ActorPoolStrategy(size=senders),
        num_cpus=0.1 / senders,  # they only wait
        batch_size=batch,
        batch_format="pyarrow",
        fn_constructor_args=(plan,),
        **runtime.RETRIES,
    )
    return runtime.write_parts(data, out, plan.schema, config.output, block)


class ScoreWorker:
    """Sends a batch of videos through the graph and gathers their rows."""

    def __init__(self, plan: ScorePlan) -> None:
        from ray import serve

        self.plan = plan
        self.handle = serve.get_app_handle(plan.app)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Manifest rows -> transport table of prediction rows."""
        refs = runtime.refs_of(batch)
        pending = [self.handle.score_video.remote(ref) for ref in refs]
        rows = []
        for ref, response in zip(refs, pending, strict=True):
            row = self._answer(ref, response)
            if ref.labels is not None:
                row["label_names"] = [self.plan.classes[number] for number in ref.labels]
            for stage in ("decode", "sample", "recognize"):
                row[f"_{stage}_s"] = (row.get(f"{stage}_ms") or 0.0) / 1000
            rows.append(row)
            self.plan.counts.add.remote([row.get("error_type")])
        return runtime.transport_table(rows, self.plan.schema)

    def _answer(self, ref: VideoRef, response: Any) -> dict[str, Any]:
        for attempt in range(_TRIES):
            try:
                return response.result(timeout_s=self.plan.timeout_s)
            except Exception as error:  # noqa: BLE001  the border: whatever becomes of a replica, the video keeps its row
                if attempt + 1 == _TRIES:
                    cause = runtime.root_cause(error)
                    message = f"the graph failed {_TRIES} times: {type(cause).__name__}: {cause}"
                    return failed_row(ref, VideoError("internal", message))
                time.sleep(1 + attempt)
                response = self.handle.score_video.remote(ref)
        raise AssertionError("unreachable")


def measure(predictions_uri: str, classes: Sequence[str]) -> dict[str, Any]:
    """mAP (both conventions) and top-1 over the labelled videos that are ok; names that the bundle lacks are counted and left out."""
    parts = [partial(runs.read_part, part.uri) for part in runs.list_parts(predictions_uri)]
    return quality.measure(parts, classes)
