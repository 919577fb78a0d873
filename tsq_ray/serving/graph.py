"""The Serve graph: decoder -> sampler -> recogniser, shared by bulk scoring and the endpoint.

Frames pass from replica to replica through the object store, not through the caller: each stage
returns a reference, which the next stage fetches. If a replica is lost, the fetch fails and the
caller sees the error. With a response passed as an argument instead, Serve's router would mistake
the lost replica for one of the next stage and retry forever.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.config import TSQ_MODES, Config, EncodersConfig, ModelConfig
from tsq_ray.decode import DecodedVideo, DecodePool, Outcome, VideoSource
from tsq_ray.errors import Failure, TsqError, VideoError
from tsq_ray.rows import Answer, picture_specs
from tsq_ray.runtime.nodes import Layout, Pool
from tsq_ray.serving.batching import Batches
from tsq_ray.storage import sha256_of

if TYPE_CHECKING:  # torch: only in the replicas that need it
    from tsq_ray.stages import Sampled

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0


class WrongVersion(TsqError):
    """A stage was called for another version than its own.

    Stages of different versions never contribute to one answer.
    """


class Lost(TsqError):
    """The input of a stage is gone, with the replica or node that held it."""


@dataclass(frozen=True)
class Handed:
    """What a stage hands on: a reference to its result, or the failure."""

    result: Any
    version: str


@dataclass(frozen=True)
class TimeLimits:
    """Limits in seconds: per hop, including waiting, and for all attempts at a video."""

    decode: float
    network: float
    total: float

    @classmethod
    def of(cls, config: Config, total: float | None = None) -> TimeLimits:
        """Return the limits of these settings; `total` defaults to `serve.request_timeout_s`."""
        network = config.serve.request_timeout_s
        return cls(config.decode.timeout_s + network, network, total or network)


def graph_version(digest: str, config: Config) -> str:
    """Return what identifies an answer: the bundle's sha256 and a hash of the settings."""
    parts: Any = {
        "decode": True,
        "encoders": True,
        "sampler": True,
        "resources": {"precision", "resize"},
    }
    settings = config.model_dump(mode="json", include=parts)
    return f"{digest}+{sha256_of(json.dumps(settings, sort_keys=True).encode())[:16]}"


class Graph:
    """The caller's view of the three deployments in sequence."""

    def __init__(
        self,
        decoder: DeploymentHandle,
        sampler: DeploymentHandle,
        recognizer: DeploymentHandle,
        limits: TimeLimits,
    ) -> None:
        self.decoder, self.sampler, self.recognizer, self.limits = (
            decoder,
            sampler,
            recognizer,
            limits,
        )

    async def score(self, source: VideoSource, name: str, upload: bytes | None = None) -> Answer:
        """Score one video; a video that cannot be used is an answer too.

        `name` seeds the random baseline. Only a dead or unavailable replica is retried, which
        includes one that does not answer within a hop's limit. After `limits.total` the answer is a
        failure `unavailable`. Raises what a stage raises for any other reason.
        """
        ends, wait_s = time.monotonic() + self.limits.total, _FIRST_WAIT_S
        while True:
            try:
                return await self._try(source, name, upload)
            except Exception as error:
                if not is_lost(error):
                    raise
                if time.monotonic() + wait_s >= ends:
                    why = (
                        f"no replica answered for {self.limits.total:g} s "
                        f"({type(error).__name__}); run again"
                    )
                    return Answer(error=VideoError("unavailable", why))
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def _try(self, source: VideoSource, name: str, upload: bytes | None) -> Answer:
        handed = await _hop(self.decoder.remote(source, upload), self.limits.decode)
        handed = await _hop(self.sampler.remote(name, handed), self.limits.network)
        return await _hop(self.recognizer.remote(handed), self.limits.network)


async def _hop(response: Any, limit_s: float) -> Any:
    """Wait for the answer of a stage; cancel it at the time limit or if the caller gives up."""
    try:
        async with asyncio.timeout(limit_s):
            return await response
    except (TimeoutError, asyncio.CancelledError):
        response.cancel()
        raise


def is_lost(error: BaseException) -> bool:
    """Return whether a replica, its node or what it held is gone or not available yet."""
    from ray import exceptions
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    lost = (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
    )
    kinds = (
        *lost,
        DeploymentUnavailableError,
        ReplicaUnavailableError,
        Lost,
        WrongVersion,
        TimeoutError,
    )
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kinds):
            return True
        seen = getattr(seen, "cause", None) or seen.__cause__
    return False


def deployment_options(pool: Pool, max_ongoing: int, max_queued: int = -1) -> dict[str, Any]:
    """Return a deployment's options: resources, and autoscaling between minimum and limit.

    With `max_queued` -1 no request is rejected.
    """
    actor: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus}
    options: dict[str, Any] = {
        "ray_actor_options": actor | ({"memory": pool.memory} if pool.memory else {}),
        "max_ongoing_requests": max_ongoing,
        "max_queued_requests": max_queued,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    if pool.minimum == pool.limit:
        return options | {"num_replicas": pool.start}
    scaling = {
        "min_replicas": pool.minimum,
        "initial_replicas": pool.start,
        "max_replicas": pool.limit,
        "target_ongoing_requests": max(1.0, max_ongoing / 2),
    }
    return options | {"autoscaling_config": scaling}


def _batches(
    work: Callable[[list[Any]], list[Any]], config: Config, placed: Layout
) -> Batches[Any, Any]:
    settings = config.serve
    threads = config.resources.threads or min(placed.threads, _node_cpus())
    return Batches(
        work,
        settings.batch_size,
        settings.batch_wait_s,
        threads,
        placed.on_gpu,
        config.resources.compile,
    )


def _node_cpus() -> int:
    # in a container os.cpu_count() may be too high; Ray knows the actual number
    here, there = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here]
    return max(1, min([there, *(count for count in cpus if count)]))


async def _hand_on(result: Any, version: str) -> Handed:
    failed = isinstance(result, Failure)
    return Handed(result if failed else await asyncio.to_thread(ray.put, result), version)


async def _take(handed: Handed, version: str) -> Any:
    """Fetch what the previous stage handed on. Raises WrongVersion, or Lost if it is gone."""
    if handed.version != version:
        raise WrongVersion(f"version {handed.version} was asked for, this replica has {version}")
    if isinstance(handed.result, Failure):
        return handed.result
    try:
        return await handed.result
    except ray.exceptions.RayError as error:
        # not one of Ray's own classes, which Serve's router would handle itself
        raise Lost(type(error).__name__) from None


@serve.deployment
class Decoder:
    """Fetch and decode videos in killable child processes."""

    def __init__(self, model: str, config: Config, placed: Layout) -> None:
        content, digest = read_bundle_settings(model)
        self.version = graph_version(digest, config)
        made_with, recognizer = content["config"], content["config"]["recognizer"]
        specs = picture_specs(
            EncodersConfig.model_validate(made_with["encoders"]),
            "objects" in content["files"],
            ModelConfig.model_validate(recognizer) if recognizer is not None else None,
            config.sampler.mode,
            config.resources.resizes_on_device(_all_on_gpus(config, placed)),
        )
        self.pool = DecodePool(config.decode, specs, placed.decoder_processes)

    async def __call__(self, source: VideoSource, upload: bytes | None = None) -> Handed:
        """Decode a video, or an upload named `source.uri`, to its frames or its failure."""
        if upload is None:
            outcome = await asyncio.wrap_future(self.pool.submit(source))
        else:  # shielded from cancellation, because a child may still be reading the upload
            outcome = await asyncio.shield(
                asyncio.ensure_future(self._decode_upload(source.uri, upload))
            )
        return await _hand_on(outcome, self.version)

    async def _decode_upload(self, name: str, upload: bytes) -> Outcome:
        # an unnamed file disappears with this process, however that ends; the children read it
        # through /proc
        with tempfile.TemporaryFile(prefix="tsq-upload-") as file:
            await asyncio.to_thread(_write, file, upload)
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            outcome = await asyncio.wrap_future(self.pool.submit(VideoSource(path)))
        if isinstance(outcome, DecodedVideo):
            return outcome
        return type(outcome)(outcome.error_type, str(outcome).replace(path, name))


def _all_on_gpus(config: Config, placed: Layout) -> bool:
    """Return whether every network that takes pictures runs on a GPU."""
    names = ["recognizer"] + (
        ["sampler"] if config.sampler.mode in (*TSQ_MODES, "maxconf-l") else []
    )
    return all(placed[name].gpus > 0 for name in names)


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()


@serve.deployment
class Sampler:
    """Encode the T frames and choose K."""

    def __init__(self, model: str, config: Config, placed: Layout) -> None:
        import torch

        from tsq_ray.bundle.weights import load_bundle
        from tsq_ray.stages import Sample

        self.version = graph_version(read_bundle_settings(model)[1], config)
        device = torch.device("cuda" if placed["sampler"].gpus else "cpu")
        sample = Sample(load_bundle(model), config.sampler, device, config.resources)
        self.batches: Batches[tuple[str, Any], Sampled] = _batches(sample, config, placed)

    async def __call__(self, name: str, handed: Handed) -> Handed:
        """Choose from one video's frames, and hand on its columns so far and the chosen pictures.

        A failure is handed on unchanged.
        """
        video = await _take(handed, self.version)
        if isinstance(video, Failure):
            return handed
        return await _hand_on(await self.batches((name, video)), self.version)


@serve.deployment
class Recognizer:
    """Recognise the chosen frames."""

    def __init__(self, model: str, config: Config, placed: Layout) -> None:
        import torch

        from tsq_ray.bundle.weights import load_recognizer
        from tsq_ray.stages import Recognize

        self.version = graph_version(read_bundle_settings(model)[1], config)
        device = torch.device("cuda" if placed["recognizer"].gpus else "cpu")
        recognize = Recognize(load_recognizer(model), config.sampler, device, config.resources)
        self.batches: Batches[Sampled, Answer] = _batches(recognize, config, placed)

    async def __call__(self, handed: Handed) -> Answer:
        """Return the answer for one video's chosen frames, or for its failure."""
        sampled = await _take(handed, self.version)
        if isinstance(sampled, Failure):
            return Answer(error=sampled, version=self.version)
        answer = await self.batches(sampled)
        return Answer(answer.columns, answer.error, self.version)


def bind_graph(
    model: str, config: Config, placed: Layout, ongoing: Mapping[str, int]
) -> tuple[Any, ...]:
    """Bind the three deployments as laid out.

    `ongoing` is the most requests that a replica of each processes at a time.
    """
    parts: dict[str, Any] = {"decoder": Decoder, "sampler": Sampler, "recognizer": Recognizer}
    # the queues are unbounded: the entry limits the number of requests, and the stages must not
    # reject any from one another
    return tuple(
        part.options(**deployment_options(placed[name], ongoing[name])).bind(model, config, placed)
        for name, part in parts.items()
    )
