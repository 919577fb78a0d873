"""The Serve graph: decoder -> sampler -> recogniser. Bulk scoring and the endpoint run the same one.

Each deployment hands its answer to the next one by reference: frames go from replica to replica, not through the caller.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from tsq_ray.artifact import read_bundle_settings
from tsq_ray.config import TSQ_MODES, Config, EncodersConfig, ModelConfig
from tsq_ray.decode import DecodedVideo, DecodePool, VideoSource
from tsq_ray.errors import StorageError, VideoError
from tsq_ray.manifest import VideoRef
from tsq_ray.rows import picture_specs, source_of
from tsq_ray.sections import ReplicaConfig, ScaleConfig
from tsq_ray.serve.batching import Answer, Batches, Item

if TYPE_CHECKING:  # torch: only in the replicas that need it
    from tsq_ray.stages import Sampled

Decoded = tuple[VideoRef, DecodedVideo | VideoError | StorageError]


def deployment_options(config: ScaleConfig, max_ongoing: int, max_queued: int = -1) -> dict[str, Any]:
    """Options of a deployment: resources, autoscaling between minimum and maximum; `max_queued` -1: nothing is turned away."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        "max_ongoing_requests": max_ongoing,
        "max_queued_requests": max_queued,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    if config.min_replicas == config.max_replicas:
        return options | {"num_replicas": config.min_replicas}
    scaling = {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": max(1.0, max_ongoing / 2),
    }
    return options | {"autoscaling_config": scaling}


def _batches(work: Callable[[list[Item]], list[Answer]], config: Config, on_gpu: bool) -> Batches[Item, Answer]:
    settings, how = config.serve, config.resources
    return Batches(work, settings.batch_size, settings.batch_wait_s, how.threads or _node_cpus(), on_gpu, how.compile)


def _node_cpus() -> int:
    # a container may have fewer than the machine: Ray knows
    here, there = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here]
    return max(1, min([there, *(count for count in cpus if count)]))


@serve.deployment
class Decoder:
    """Fetches and decodes in killable children."""

    def __init__(self, model: str, config: Config) -> None:
        content, _ = read_bundle_settings(model)
        made_with, answerer = content["config"], content["config"]["recognizer"]
        networks = [config.serve.recognizer] + ([config.serve.sampler] if config.sampler.mode in (*TSQ_MODES, "maxconf-l") else [])
        specs = picture_specs(
            EncodersConfig.model_validate(made_with["encoders"]),
            "objects" in content["files"],
            ModelConfig.model_validate(answerer) if answerer is not None else None,
            config.sampler.mode,
            config.resources.resizes_on_device(all(network.num_gpus > 0 for network in networks)),
        )
        self.pool = DecodePool(config.decode, specs, config.serve.decoder_processes)

    async def __call__(self, ref: VideoRef, upload: bytes | None = None) -> Decoded:
        """A manifest row, or an upload under a made-up row, -> its frames or its failure."""
        if upload is None:
            return ref, await asyncio.wrap_future(self.pool.submit(source_of(ref)))
        # to its end also where the request is given up: a child may be reading the upload
        return ref, await asyncio.shield(asyncio.ensure_future(self._decode_upload(ref.uri, upload)))

    async def _decode_upload(self, name: str, upload: bytes) -> DecodedVideo | VideoError | StorageError:
        # a file without a name: it goes with this process, whatever ends it; the children read it through /proc
        with tempfile.TemporaryFile(prefix="tsq-upload-") as file:
            await asyncio.to_thread(_write, file, upload)
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            outcome = await asyncio.wrap_future(self.pool.submit(VideoSource(path)))
        if isinstance(outcome, DecodedVideo):
            return outcome
        return type(outcome)(outcome.error_type, str(outcome).replace(path, name))


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()


@serve.deployment
class Sampler:
    """Encodes the T frames and chooses K."""

    def __init__(self, model: str, config: Config) -> None:
        from tsq_ray.bundle import load_bundle
        from tsq_ray.stages import Sample

        sample = Sample(load_bundle(model), config.sampler, how=config.resources)
        self.batches: Batches[Decoded, Sampled] = _batches(sample, config, sample.device.type == "cuda")

    async def __call__(self, item: Decoded) -> Sampled:
        """One video's frames, or its failure, -> its row so far and the pictures to recognise."""
        return await self.batches(item)


@serve.deployment
class Recognizer:
    """Recognises the chosen frames."""

    def __init__(self, model: str, config: Config) -> None:
        from tsq_ray.bundle import load_recognizer
        from tsq_ray.stages import Recognize

        recognize = Recognize(load_recognizer(model), config.sampler, how=config.resources)
        self.batches: Batches[Sampled, dict[str, Any]] = _batches(recognize, config, recognize.device.type == "cuda")

    async def __call__(self, item: Sampled) -> dict[str, Any]:
        """One video's chosen frames -> its prediction row."""
        return await self.batches(item)


class Graph:
    """The three deployments in a row."""

    def __init__(self, decoder: DeploymentHandle, sampler: DeploymentHandle, recognizer: DeploymentHandle) -> None:
        self.decoder, self.sampler, self.recognizer = decoder, sampler, recognizer

    async def score(self, ref: VideoRef, upload: bytes | None = None) -> dict[str, Any]:
        """The prediction row of one video; a failed video is a row too."""
        decoded = self.decoder.remote(ref, upload)
        return await self.recognizer.remote(self.sampler.remote(decoded))


def bind_graph(model: str, config: Config) -> tuple[Any, ...]:
    """The three deployments with the options of `config.serve`, bound to the bundle at `model`."""
    settings = config.serve
    parts: list[tuple[Any, ReplicaConfig]] = [(Decoder, settings.decoder), (Sampler, settings.sampler), (Recognizer, settings.recognizer)]
    # no bound on the queues: the entry limits what comes in, and between the stages nothing may be turned away
    return tuple(part.options(**deployment_options(scale, scale.max_ongoing_requests)).bind(model, config) for part, scale in parts)
