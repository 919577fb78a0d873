"""The deployment that keeps the batches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ray import serve

from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.config import Config
from tsq_ray.serving import facts
from tsq_ray.serving.batch_runner import PATIENCE_S, BatchRunner
from tsq_ray.serving.graph import Graph, TimeLimits, graph_version
from tsq_ray.serving.loopback import bind_to_loopback
from tsq_ray.serving.requests.fetching import longest_fetch_s
from tsq_ray.serving.requests.models import Batch, BatchLine, BatchList, BatchOptions
from tsq_ray.serving.requests.problems import RequestError

_Found = TypeVar("_Found")


async def in_time(work: Awaitable[_Found], limit_s: float) -> _Found:
    """Await an answer about batches. Raises RequestError 504 after `limit_s` seconds."""
    try:
        async with asyncio.timeout(limit_s):
            return await work
    except TimeoutError:
        why = f"the batches' storage did not answer within serve.request_timeout_s = {limit_s:g} s"
        raise RequestError(504, why, "timeout") from None


@serve.deployment
class Batches:
    """The single replica that keeps the batches."""

    def __init__(
        self, model: str, config: Config, decoder: Any, sampler: Any, recognizer: Any
    ) -> None:
        bind_to_loopback()
        self._limit_s = config.serve.request_timeout_s
        limits = TimeLimits.of(config, PATIENCE_S)
        limits = replace(limits, decode=limits.decode + longest_fetch_s(config))
        version = graph_version(read_bundle_settings(model)[1], config)
        graph = Graph(decoder, sampler, recognizer, limits, version)
        self._runner = BatchRunner(model, config, graph)
        app = serve.get_replica_context().app_name
        facts.wait_for_stages(app, version, type(self).__name__)
        self._tasks = [asyncio.create_task(self._runner.resume())]

    async def create(
        self, options: BatchOptions | None, lines: Sequence[BatchLine], key: str | None
    ) -> Batch:
        """Start a batch; see BatchRunner.create."""
        return await in_time(self._runner.create(options, lines, key), self._limit_s)

    async def get(self, batch: str, with_problems: bool) -> Batch:
        """Return a batch."""
        return await in_time(self._runner.get(batch, with_problems), self._limit_s)

    async def cancel(self, batch: str) -> Batch:
        """Cancel a batch."""
        return await in_time(self._runner.cancel(batch), self._limit_s)

    async def newest(self, limit: int, after: str | None) -> BatchList:
        """Return the newest batches."""
        return await in_time(self._runner.newest(limit, after), self._limit_s)
