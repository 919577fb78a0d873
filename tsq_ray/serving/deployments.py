"""The three Serve deployments of the graph: Decoder, Sampler and Recognizer."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve

from tsq_ray.bundle.settings import read_bundle_settings, recognizer_of, server_of
from tsq_ray.config import TSQ_MODES, Config, EncodersConfig
from tsq_ray.decode import DecodedVideo, DecodePool, Outcome, VideoSource
from tsq_ray.decode.fetch import check_unchanged
from tsq_ray.errors import Failure, StorageError, VideoError
from tsq_ray.rows import Answer, best_labels, picture_specs
from tsq_ray.runtime.nodes import Layout, Pool
from tsq_ray.serving import facts, warmup
from tsq_ray.serving.graph import Busy, Handed, Lost, Ongoing, Video, WrongVersion, graph_version
from tsq_ray.serving.loopback import bind_to_loopback
from tsq_ray.serving.metrics import DecoderMetrics
from tsq_ray.serving.recognizers import (
    NetworkRecognizer,
    Recognizing,
    ServerRecognizer,
    microbatches,
)
from tsq_ray.serving.requests.fetching import Fetcher
from tsq_ray.serving.requests.shares import Places
from tsq_ray.serving.requests.uploads import local_path
from tsq_ray.storage import StoredFile, redact, storage_errors

_SHUTDOWN_SLACK_S = 5.0
_HEALTH_EVERY_S, _HEALTH_LIMIT_S, _IDLE_S = 10.0, 60.0, 30.0
_MEET_S = 120.0


def deployment_options(
    pool: Pool, max_ongoing: int, config: Config, bulk: bool = False
) -> dict[str, Any]:
    """Return a deployment's options: resources, replacement and autoscaling.

    No request is rejected by Serve: the entry to the graph limits their number. A replica that is
    replaced finishes its requests, unless it belongs to a scoring run (`bulk`), which repeats them.
    """
    actor: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus}
    actor |= {"memory": pool.memory} if pool.memory else {}
    actor |= {"label_selector": dict(pool.labels)} if pool.labels else {}
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "max_ongoing_requests": max_ongoing,
        "max_queued_requests": -1,
        # an update starts the new replicas before it stops the old ones, which finish their work
        "max_surge_percent": 100,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": _SHUTDOWN_SLACK_S
        + (0 if bulk else config.serve.request_timeout_s),
        "health_check_period_s": _HEALTH_EVERY_S,
        "health_check_timeout_s": _HEALTH_LIMIT_S,
    }
    if pool.minimum == pool.limit:
        return options | {"num_replicas": pool.start}
    scale = getattr(config.serve, pool.name)
    default = 2 * config.serve.decoder_processes if pool.name == "decoder" else max_ongoing / 2
    scaling = {
        "min_replicas": pool.minimum,
        "initial_replicas": pool.start,
        "max_replicas": pool.limit,
        "target_ongoing_requests": max(1.0, scale.target_ongoing_requests or default),
        "upscale_delay_s": scale.upscale_delay_s,
        "downscale_delay_s": scale.downscale_delay_s,
    }
    return options | {"autoscaling_config": scaling}


def bind_graph(
    model: str, config: Config, placed: Layout, ongoing: Ongoing, bulk: bool = False
) -> tuple[Any, ...]:
    """Bind the three deployments as laid out.

    `bulk`: for a scoring run, whose decoding children fetch the videos themselves.
    """
    parts: dict[str, Any] = {"decoder": Decoder, "sampler": Sampler, "recognizer": Recognizer}
    return tuple(
        part.options(**deployment_options(placed[name], ongoing[name], config, bulk)).bind(
            model, config, placed, bulk
        )
        for name, part in parts.items()
    )


class _Stage(abc.ABC):
    """What the three deployments share: their version, and the checks of their health."""

    def __init__(self, model: str, config: Config) -> None:
        bind_to_loopback()
        self._content, digest = read_bundle_settings(model)
        self._version = graph_version(digest, config)
        self._answered = 0.0

    def _is_loaded(self, bulk: bool) -> None:
        """Wait for the other stages of this version, so that an update leaves no gap."""
        if not bulk:
            facts.meet(
                serve.get_replica_context().app_name, self._version, type(self).__name__, _MEET_S
            )

    def version(self) -> str:
        """Return the version that this replica answers for."""
        return self._version

    async def check_health(self) -> None:
        """Process a made-up video, unless a request was answered a moment ago."""
        if time.monotonic() - self._answered > _IDLE_S:
            await self._try()
            self._answered = time.monotonic()

    @abc.abstractmethod
    async def _try(self) -> None:
        """Process a made-up video. Raises whatever is wrong."""

    async def _hand_on(self, result: Any, file: StoredFile | None) -> Handed:
        self._answered = time.monotonic()
        failed = isinstance(result, Failure)
        return Handed(
            result if failed else await asyncio.to_thread(ray.put, result), self._version, file
        )

    async def _take(self, handed: Handed) -> Any:
        """Fetch what the previous stage handed on. Raises WrongVersion, or Lost if it is gone."""
        if handed.version != self._version:
            raise WrongVersion(f"asked for version {handed.version}, this is {self._version}")
        if isinstance(handed.result, Failure):
            return handed.result
        try:
            return await handed.result
        except ray.exceptions.RayError as error:
            # not one of Ray's own classes, which Serve's router would handle itself
            raise Lost(type(error).__name__) from None


@serve.deployment
class Decoder(_Stage):
    """Fetch and decode videos in killable child processes."""

    def __init__(self, model: str, config: Config, placed: Layout, bulk: bool) -> None:
        super().__init__(model, config)
        content = self._content
        specs = picture_specs(
            EncodersConfig.model_validate(content["config"]["encoders"]),
            "objects" in content["files"],
            recognizer_of(content),
            config.sampler.mode,
            config.resources.resizes_on_device(_all_on_gpus(config, placed)),
        )
        self._pool = DecodePool(config.decode, specs, placed.decoder_processes)
        settings = config.serve
        self._fetcher = (
            None
            if bulk
            else Fetcher(
                settings.allowed_uri_prefixes,
                settings.fetch_timeout_s,
                config.decode.max_bytes,
                settings.max_fetches,
            )
        )
        self._fetches = Places(settings.max_fetches)
        self._metrics = DecoderMetrics()
        self._is_loaded(bulk)

    async def __call__(self, video: Video) -> Handed:
        """Decode a video to its frames or its failure."""
        try:
            async with self._source(video) as (source, file):
                outcome = await self._decode(source)
        except (VideoError, StorageError) as error:
            return await self._hand_on(error, None)
        if isinstance(outcome, Failure) and source.uri != video.source.uri:
            told = str(outcome).replace(source.uri, video.source.uri)
            outcome = type(outcome)(outcome.error_type, told)
        return await self._hand_on(outcome, file)

    @contextlib.asynccontextmanager
    async def _source(self, video: Video) -> AsyncIterator[tuple[VideoSource, StoredFile | None]]:
        """Yield what the decoding children read: the upload, the fetched file or the URI itself."""
        if video.upload is not None:
            async with contextlib.AsyncExitStack() as stack:
                with storage_errors(video.source.uri, "copy"):
                    path = await stack.enter_async_context(local_path(video.upload))
                yield VideoSource(path), None
        elif self._fetcher is not None:
            if not self._fetches.has_room(video.share):
                raise Busy(f"{self._fetches.used} videos are being fetched")
            async with contextlib.AsyncExitStack() as stack:
                with self._fetches.held(video.share):
                    fetched = self._fetcher.fetched(video.source.uri, video.in_batch)
                    found = await stack.enter_async_context(fetched)
                check_unchanged(video.source, found.file, redact(video.source.uri))
                yield VideoSource(found.path), found.file
        else:
            yield video.source, None

    async def _decode(self, source: VideoSource) -> Outcome:
        decoded = self._pool.submit(source)
        try:
            return await asyncio.wrap_future(decoded)
        except asyncio.CancelledError:
            self._pool.cancel(decoded)
            raise
        finally:
            self._metrics.lost(self._pool.children_lost)

    async def _try(self) -> None:
        with warmup.video_file() as path:
            outcome = await self._decode(VideoSource(path))
        if not isinstance(outcome, DecodedVideo):
            raise outcome


def _all_on_gpus(config: Config, placed: Layout) -> bool:
    """Return whether every network that takes pictures runs on a GPU."""
    names = ["recognizer"] + (
        ["sampler"] if config.sampler.mode in (*TSQ_MODES, "maxconf-l") else []
    )
    return all(placed[name].gpus > 0 for name in names)


@serve.deployment
class Sampler(_Stage):
    """Encode the T frames and choose K."""

    def __init__(self, model: str, config: Config, placed: Layout, bulk: bool) -> None:
        import torch

        from tsq_ray.bundle.weights import load_bundle
        from tsq_ray.stages import Sample, bundle_specs, question_of

        super().__init__(model, config)
        device = torch.device("cuda" if placed["sampler"].gpus else "cpu")
        bundle = load_bundle(model)
        self._specs = bundle_specs(bundle, config.sampler.mode)
        self._num_frames = bundle.decode.num_frames
        sample = Sample(bundle, config.sampler, device, config.resources)
        server = server_of(self._content, config)

        def work(items: list[tuple[str, Any, int | None]]) -> list[Any]:
            sampled = sample([item[:2] for item in items], [item[2] for item in items])
            # a server's replica loads no torch, so that it is handed pictures as files
            return sampled if server is None else [question_of(x, server.config) for x in sampled]

        work([self._made_up()])
        self._microbatches = microbatches(work, config, placed)
        self._is_loaded(bulk)

    async def __call__(self, video: Video, handed: Handed) -> Handed:
        """Choose from one video's frames, and hand on its columns so far and the chosen pictures.

        A failure is handed on unchanged.
        """
        decoded = await self._take(handed)
        if isinstance(decoded, Failure):
            return handed
        sampled = await self._microbatches((video.video_id, decoded, video.budget))
        return await self._hand_on(sampled, handed.file)

    def _made_up(self) -> tuple[str, DecodedVideo, None]:
        return "", warmup.decoded_video(self._specs, self._num_frames), None

    async def _try(self) -> None:
        await self._microbatches(self._made_up())


@serve.deployment
class Recognizer(_Stage):
    """Recognise the chosen frames, by a network or a server."""

    def __init__(self, model: str, config: Config, placed: Layout, bulk: bool) -> None:
        super().__init__(model, config)
        server = server_of(self._content, config)
        self._work: Recognizing = (
            ServerRecognizer(server)
            if server is not None
            else NetworkRecognizer(model, config, placed)
        )
        self._is_loaded(bulk)

    async def __call__(self, video: Video, handed: Handed) -> Answer:
        """Return the answer for one video's chosen frames, or for its failure."""
        sampled = await self._take(handed)
        file = handed.file
        if isinstance(sampled, Failure):
            return Answer(error=sampled, version=self._version, file=file)
        answer = await self._work.answer(sampled)
        self._answered = time.monotonic()
        columns = answer.columns
        if answer.error is None:
            columns |= best_labels(columns["scores"], self._work.classes, video.top)
            if video.with_frames:
                columns["frames"] = await asyncio.to_thread(self._frames, sampled, columns)
        return Answer(columns, answer.error, self._version, file, answer.fetched_bytes)

    def _frames(self, sampled: Any, columns: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the chosen frames as the recogniser saw them, in the shape of the video."""
        pictures = self._work.jpegs(sampled, columns)
        places = zip(columns["selected_index"], columns["selected_pts_s"], pictures, strict=True)
        return [
            {"index": int(index), "seconds": float(seconds), "jpeg": jpeg}
            for index, seconds, jpeg in places
        ]

    async def _try(self) -> None:
        await self._work.check()
