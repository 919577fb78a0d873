"""The Serve graph: decoder -> sampler -> recogniser. Bulk scoring and the endpoint run the same one.

Frames go from replica to replica through the object store, not through the caller: each stage
returns a reference, and the next stage fetches what it names. A stage that is lost is then an
error of the fetch, which the caller sees; given a response as an argument, Serve's router would
take the lost stage for the next one and retry without end.
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
from tsq_ray.decode import DecodedVideo, DecodePool, VideoSource
from tsq_ray.errors import StorageError, TsqError, VideoError
from tsq_ray.rows import Answer, picture_specs
from tsq_ray.runtime.nodes import Layout, Pool
from tsq_ray.serving.batching import Batches
from tsq_ray.storage import sha256_of

if TYPE_CHECKING:  # torch: only in the replicas that need it
    from tsq_ray.stages import Sampled

Failure = VideoError | StorageError
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0


class WrongVersion(TsqError):
    """A stage was asked for another version than its own: stages of two versions never answer together."""


class Lost(TsqError):
    """What a stage was to work on is gone, with the replica or the node that held it."""


@dataclass(frozen=True)
class Handed:
    """What a stage hands on: a reference of its result, or why there is none."""

    result: Any
    version: str


@dataclass(frozen=True)
class TimeLimits:
    """Seconds that one hop may take, waiting included, and that all tries of a video may take."""

    decode: float
    network: float
    total: float

    @classmethod
    def of(cls, config: Config, total: float | None = None) -> TimeLimits:
        """Of these settings; a video of a request has `serve.request_timeout_s`."""
        network = config.serve.request_timeout_s
        return cls(config.decode.timeout_s + network, network, total or network)


def graph_version(digest: str, config: Config) -> str:
    """What an answer depends on: the bundle's sha256 and a hash of the settings."""
    parts: Any = {
        "decode": True,
        "encoders": True,
        "sampler": True,
        "resources": {"precision", "resize"},
    }
    settings = config.model_dump(mode="json", include=parts)
    return f"{digest}+{sha256_of(json.dumps(settings, sort_keys=True).encode())[:16]}"


class Graph:
    """The three deployments in a row, as whoever calls them sees them."""

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
        """What the stages say of one video; a video that cannot be used is an answer too.

        `name` seeds the random baseline. A dead or unavailable replica (one that does not answer
        within a hop's limit is one), and it alone, is tried again until `limits.total` is over: then the answer is a failure `unavailable`. Raises
        what a stage raises for another reason.
        """
        ends, wait_s = time.monotonic() + self.limits.total, _FIRST_WAIT_S
        while True:
            try:
                return await self._try(source, name, upload)
            except Exception as error:
                if not is_lost(error):
                    raise
                if time.monotonic() + wait_s >= ends:
                    why = f"no replica answered for {self.limits.total:g} s ({type(error).__name__}); run again"
                    return Answer(error=VideoError("unavailable", why))
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def _try(self, source: VideoSource, name: str, upload: bytes | None) -> Answer:
        handed = await _hop(self.decoder.remote(source, upload), self.limits.decode)
        handed = await _hop(self.sampler.remote(name, handed), self.limits.network)
        return await _hop(self.recognizer.remote(handed), self.limits.network)


async def _hop(response: Any, limit_s: float) -> Any:
    """The answer of a stage, cancelled when its time is over or the caller gives up."""
    try:
        async with asyncio.timeout(limit_s):
            return await response
    except (TimeoutError, asyncio.CancelledError):
        response.cancel()
        raise


def is_lost(error: BaseException) -> bool:
    """Whether an error means that a replica, its node or what it held is gone or not there yet."""
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
    """Options of a deployment: resources, autoscaling between minimum and limit; `max_queued` -1: nothing is turned away."""
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
    # a container may have fewer than the machine: Ray knows
    here, there = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here]
    return max(1, min([there, *(count for count in cpus if count)]))


async def _hand_on(result: Any, version: str) -> Handed:
    failed = isinstance(result, Failure)
    return Handed(result if failed else await asyncio.to_thread(ray.put, result), version)


async def _take(handed: Handed, version: str) -> Any:
    """What the stage before handed on. Raises WrongVersion, or Lost where it is gone."""
    if handed.version != version:
        raise WrongVersion(f"{handed.version} was asked for, this replica has {version}")
    if isinstance(handed.result, Failure):
        return handed.result
    try:
        return await handed.result
    except ray.exceptions.RayError as error:
        # by another class than Ray's: the router acts on those itself
        raise Lost(type(error).__name__) from None


@serve.deployment
class Decoder:
    """Fetches and decodes in killable children."""

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
        """A video, or an upload under the name `source.uri`, -> its frames or its failure."""
        if upload is None:
            outcome = await asyncio.wrap_future(self.pool.submit(source))
        else:  # to its end also where the request is given up: a child may be reading the upload
            outcome = await asyncio.shield(
                asyncio.ensure_future(self._decode_upload(source.uri, upload))
            )
        return await _hand_on(outcome, self.version)

    async def _decode_upload(
        self, name: str, upload: bytes
    ) -> DecodedVideo | VideoError | StorageError:
        # a file without a name: it goes with this process, whatever ends it; the children read it through /proc
        with tempfile.TemporaryFile(prefix="tsq-upload-") as file:
            await asyncio.to_thread(_write, file, upload)
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            outcome = await asyncio.wrap_future(self.pool.submit(VideoSource(path)))
        if isinstance(outcome, DecodedVideo):
            return outcome
        return type(outcome)(outcome.error_type, str(outcome).replace(path, name))


def _all_on_gpus(config: Config, placed: Layout) -> bool:
    """Whether every network that takes pictures runs on a GPU."""
    names = ["recognizer"] + (
        ["sampler"] if config.sampler.mode in (*TSQ_MODES, "maxconf-l") else []
    )
    return all(placed[name].gpus > 0 for name in names)


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()


@serve.deployment
class Sampler:
    """Encodes the T frames and chooses K."""

    def __init__(self, model: str, config: Config, placed: Layout) -> None:
        import torch

        from tsq_ray.bundle.weights import load_bundle
        from tsq_ray.stages import Sample

        self.version = graph_version(read_bundle_settings(model)[1], config)
        device = torch.device("cuda" if placed["sampler"].gpus else "cpu")
        sample = Sample(load_bundle(model), config.sampler, device, config.resources)
        self.batches: Batches[tuple[str, Any], Sampled] = _batches(sample, config, placed)

    async def __call__(self, name: str, handed: Handed) -> Handed:
        """One video's frames, or its failure, -> its columns so far and the pictures to recognise."""
        video = await _take(handed, self.version)
        if isinstance(video, Failure):
            return handed
        return await _hand_on(await self.batches((name, video)), self.version)


@serve.deployment
class Recognizer:
    """Recognises the chosen frames."""

    def __init__(self, model: str, config: Config, placed: Layout) -> None:
        import torch

        from tsq_ray.bundle.weights import load_recognizer
        from tsq_ray.stages import Recognize

        self.version = graph_version(read_bundle_settings(model)[1], config)
        device = torch.device("cuda" if placed["recognizer"].gpus else "cpu")
        recognize = Recognize(load_recognizer(model), config.sampler, device, config.resources)
        self.batches: Batches[Sampled, Answer] = _batches(recognize, config, placed)

    async def __call__(self, handed: Handed) -> Answer:
        """One video's chosen frames, or its failure, -> its answer."""
        sampled = await _take(handed, self.version)
        if isinstance(sampled, Failure):
            return Answer(error=sampled, version=self.version)
        answer = await self.batches(sampled)
        return Answer(answer.columns, answer.error, self.version)


def bind_graph(
    model: str, config: Config, placed: Layout, ongoing: Mapping[str, int]
) -> tuple[Any, ...]:
    """The three deployments as laid out, `ongoing`: the most requests that a replica takes at a time."""
    parts: dict[str, Any] = {"decoder": Decoder, "sampler": Sampler, "recognizer": Recognizer}
    # no bound on the queues: the entry limits what comes in, and between the stages nothing may be turned away
    return tuple(
        part.options(**deployment_options(placed[name], ongoing[name])).bind(model, config, placed)
        for name, part in parts.items()
    )
