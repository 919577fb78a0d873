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
from tsq_ray.config import LEARNED_MODES, Config, EncodersConfig
from tsq_ray.decode import DecodedVideo, DecodePool, Outcome, VideoSource
from tsq_ray.decode.fetch import check_unchanged
from tsq_ray.errors import Failure, StorageError, VideoError
from tsq_ray.rows import Answer, best_labels, picture_specs
from tsq_ray.runtime.nodes import Layout, Pool
from tsq_ray.serving import facts, warmup
from tsq_ray.serving.graph import (
    Busy,
    InputLost,
    Ongoing,
    StageResult,
    UploadOutOfReach,
    Video,
    WrongVersion,
    graph_version,
)
from tsq_ray.serving.loopback import bind_to_loopback
from tsq_ray.serving.metrics import DecoderMetrics
from tsq_ray.serving.recognizers import (
    NetworkRecognizer,
    RecognizerBackend,
    ServerRecognizer,
    microbatches,
)
from tsq_ray.serving.requests.fetching import Fetcher
from tsq_ray.serving.requests.shares import Quota
from tsq_ray.serving.requests.uploads import local_path
from tsq_ray.storage import StoredFile, redact, storage_errors

_SHUTDOWN_SLACK_S = 5.0
_HEALTH_EVERY_S, _HEALTH_LIMIT_S, _IDLE_S = 10.0, 60.0, 30.0


def deployment_options(
    pool: Pool, max_ongoing: int, config: Config, bulk: bool = False
) -> dict[str, Any]:
    """Return a deployment's options: resources, replacement and autoscaling.

    Serve itself rejects no request: the entry to the graph limits their number. A replaced replica
    finishes its requests, unless it belongs to a scoring run (`bulk`), which repeats them.
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
    # an ingress refuses requests above its own limit, so Serve never counts `max_ongoing` of them
    handled = config.serve.max_queued_requests if pool.name == "ingress" else max_ongoing
    default = 2 * config.serve.decoder_processes if pool.name == "decoder" else handled / 2
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
    """Bind the three deployments according to the layout.

    `bulk`: for a scoring run, in which the decoding children fetch the videos themselves.
    """
    parts: dict[str, Any] = {"decoder": Decoder, "sampler": Sampler, "recognizer": Recognizer}
    return tuple(
        part.options(**deployment_options(placed[name], ongoing[name], config, bulk)).bind(
            model, config, placed, bulk
        )
        for name, part in parts.items()
    )


class _Stage(abc.ABC):
    """What the three deployments share: their version and health checks."""

    def __init__(self, model: str, config: Config) -> None:
        bind_to_loopback()
        self._content, digest = read_bundle_settings(model)
        self._version = graph_version(digest, config)
        self._answered_at = 0.0

    def _wait_for_other_stages(self, bulk: bool) -> None:
        """Wait for the other stages of this version, so that an update leaves no gap."""
        if not bulk:
            app = serve.get_replica_context().app_name
            facts.wait_for_stages(app, self._version, type(self).__name__)

    def version(self) -> str:
        """Return the version that this replica answers for."""
        return self._version

    async def check_health(self) -> None:
        """Process a made-up video, unless a request was answered recently."""
        if time.monotonic() - self._answered_at > _IDLE_S:
            await self._self_test()
            self._answered_at = time.monotonic()

    @abc.abstractmethod
    async def _self_test(self) -> None:
        """Process a made-up video. Raises what goes wrong."""

    async def _pass_on(self, result: Any, file: StoredFile | None) -> StageResult:
        self._answered_at = time.monotonic()
        failed = isinstance(result, Failure)
        return StageResult(
            result if failed else await asyncio.to_thread(ray.put, result), self._version, file
        )

    async def _fetch_input(self, previous: StageResult) -> Any:
        """Fetch the previous stage's result. Raises WrongVersion, or InputLost if it is gone."""
        if previous.version != self._version:
            raise WrongVersion(f"asked for version {previous.version}, this is {self._version}")
        if isinstance(previous.result, Failure):
            return previous.result
        try:
            return await previous.result
        except ray.exceptions.RayError as error:
            # not a Ray exception, which Serve's router would handle itself
            raise InputLost(type(error).__name__) from None


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
        self._fetch_quota = Quota(settings.max_fetches)
        self._metrics = DecoderMetrics()
        self._wait_for_other_stages(bulk)

    async def __call__(self, video: Video) -> StageResult:
        """Return a video's frames or its failure."""
        try:
            async with self._source(video) as (source, file):
                outcome = await self._decode(source)
        except (VideoError, StorageError) as error:
            return await self._pass_on(error, None)
        if isinstance(outcome, Failure) and source.uri != video.source.uri:
            message = str(outcome).replace(source.uri, video.source.uri)
            outcome = type(outcome)(outcome.error_type, message)
        return await self._pass_on(outcome, file)

    @contextlib.asynccontextmanager
    async def _source(self, video: Video) -> AsyncIterator[tuple[VideoSource, StoredFile | None]]:
        """Yield what the decoding children read: the upload, the fetched file or the URI itself."""
        if video.upload is not None:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    with storage_errors(video.source.uri, "copy"):
                        path = await stack.enter_async_context(local_path(video.upload))
                except ray.exceptions.RayError as error:  # like that of `_fetch_input`
                    raise UploadOutOfReach(type(error).__name__) from None
                yield VideoSource(path), None
        elif self._fetcher is not None:
            if not self._fetch_quota.has_room(video.share):
                raise Busy(f"{self._fetch_quota.used} videos are being fetched")
            async with contextlib.AsyncExitStack() as stack:
                with self._fetch_quota.held(video.share):
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

    async def _self_test(self) -> None:
        with warmup.video_file() as path:
            outcome = await self._decode(VideoSource(path))
        if not isinstance(outcome, DecodedVideo):
            raise outcome


def _all_on_gpus(config: Config, placed: Layout) -> bool:
    """Return whether every network that takes pictures runs on a GPU."""
    names = ["recognizer"] + ["sampler"] * (config.sampler.mode in LEARNED_MODES)
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
            # a server's replica loads no torch, so it gets the pictures as JPEG files
            return sampled if server is None else [question_of(x, server.config) for x in sampled]

        work([self._made_up()])
        self._microbatches = microbatches(work, config, placed)
        self._wait_for_other_stages(bulk)

    async def __call__(self, video: Video, previous: StageResult) -> StageResult:
        """Choose from one video's frames, and pass on its columns so far and the chosen pictures.

        A failure is passed on unchanged.
        """
        decoded = await self._fetch_input(previous)
        if isinstance(decoded, Failure):
            return previous
        sampled = await self._microbatches((video.video_id, decoded, video.budget))
        return await self._pass_on(sampled, previous.file)

    def _made_up(self) -> tuple[str, DecodedVideo, None]:
        return "", warmup.decoded_video(self._specs, self._num_frames), None

    async def _self_test(self) -> None:
        await self._microbatches(self._made_up())


@serve.deployment
class Recognizer(_Stage):
    """Recognise the chosen frames, with a network or a server."""

    def __init__(self, model: str, config: Config, placed: Layout, bulk: bool) -> None:
        super().__init__(model, config)
        server = server_of(self._content, config)
        self._backend: RecognizerBackend = (
            ServerRecognizer(server)
            if server is not None
            else NetworkRecognizer(model, config, placed)
        )
        self._wait_for_other_stages(bulk)

    async def __call__(self, video: Video, previous: StageResult) -> Answer:
        """Return the answer for one video's chosen frames, or for its failure."""
        sampled = await self._fetch_input(previous)
        file = previous.file
        if isinstance(sampled, Failure):
            return Answer(error=sampled, version=self._version, file=file)
        answer = await self._backend.answer(sampled)
        self._answered_at = time.monotonic()
        columns = answer.columns
        if answer.error is None:
            columns |= best_labels(columns["scores"], self._backend.classes, video.top)
            if video.with_frames:
                columns["frames"] = await asyncio.to_thread(self._frames, sampled, columns)
        return Answer(columns, answer.error, self._version, file, answer.fetched_bytes)

    def _frames(self, sampled: Any, columns: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the chosen frames as the recogniser saw them, in the video's aspect ratio."""
        pictures = self._backend.jpegs(sampled, columns)
        chosen = zip(columns["selected_index"], columns["selected_pts_s"], pictures, strict=True)
        return [
            {"index": int(index), "seconds": float(seconds), "jpeg": jpeg}
            for index, seconds, jpeg in chosen
        ]

    async def _self_test(self) -> None:
        await self._backend.check()
