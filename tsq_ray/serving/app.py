"""The endpoint: POST /v1/score with an upload or a `uri`, GET /v1/model, GET /healthz.

Every answer is JSON. What is not a prediction row has `status` ("refused" | "failed"), `error_message` and, where a video is the reason,
`error_type`. `build` is also the import path of a Serve config file: `tsq_ray.serving.app:build` with args {model, settings, anonymous}.
"""

# `serve.ingress` pickles the routes by value while this module is still being imported. So what they use stands above them, and there is
# no `from __future__ import annotations`: FastAPI could not look the name `Request` up, and would take it for a query parameter.

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.config import Config
from tsq_ray.errors import ConfigError, StorageError
from tsq_ray.rows import failure_columns, plain_row
from tsq_ray.runtime import cluster
from tsq_ray.runtime.nodes import Cluster, Layout
from tsq_ray.runtime.placement import layout
from tsq_ray.serving.access import TOKEN_VARIABLE, read_token
from tsq_ray.serving.graph import Graph, TimeLimits, bind_graph, deployment_options
from tsq_ray.serving.requests import Asked, RequestError, check_token, read_request

_STATUS_OF = {
    "not_found": 404,
    "access_denied": 403,
    "unavailable": 503,
    "too_large": 413,
    "timeout": 504,
    "internal": 500,
}
"""HTTP status of a failed video by its error type; 422 for what is wrong with the video itself."""
_log = logging.getLogger("ray.serve")

api = FastAPI(title="tsq_ray", docs_url=None, redoc_url=None, openapi_url=None)


def _refusal(
    status: int,
    message: str,
    error_type: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    content = {
        "status": "failed" if error_type else "refused",
        "error_type": error_type,
        "error_message": storage.redact(message),
    }
    return JSONResponse(
        {key: value for key, value in content.items() if value is not None}, status, headers
    )


@api.exception_handler(RequestError)
async def _refuse(_: Request, error: RequestError) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return _refusal(error.status, str(error), error.error_type, headers)


@api.exception_handler(HTTPException)
async def _refuse_http(request: Request, error: HTTPException) -> JSONResponse:
    there_is = (
        "; there is POST /v1/score, GET /v1/model, GET /healthz"
        if error.status_code in (404, 405)
        else ""
    )
    return _refusal(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}{there_is}",
        headers=error.headers,
    )


@api.exception_handler(Exception)
async def _fail(_: Request, error: Exception) -> JSONResponse:
    return _refusal(500, f"{type(error).__name__} in the endpoint; its log says more", "internal")


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Checks requests and runs the graph."""

    def __init__(
        self,
        model: str,
        config: Config,
        decoder: DeploymentHandle,
        sampler: DeploymentHandle,
        recognizer: DeploymentHandle,
        token: str | None,
    ) -> None:
        self.settings, self.token = config.serve, token
        self.in_hand = 0
        self.graph = Graph(decoder, sampler, recognizer, TimeLimits.of(config))
        content, digest = read_bundle_settings(model)
        self.model = {
            "sha256": digest,
            "classes": content["classes"],
            "task": content["task"],
            "num_frames": config.decode.num_frames,
            "budget": config.sampler.budget,
            "mode": config.sampler.mode,
        }

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Answers while this replica lives; needs no token."""
        return {"status": "ok"}

    @api.get("/v1/model")
    async def describe(self, request: Request) -> dict[str, Any]:
        """Classes and settings of the model that is served."""
        check_token(request.headers.get("authorization"), self.token)
        return self.model

    @api.post("/v1/score")
    async def score(self, request: Request) -> JSONResponse:
        """Score one video: JSON {"uri": ...}, the file as the body, or a form with a `file`."""
        check_token(request.headers.get("authorization"), self.token)
        if self.in_hand >= self.settings.max_queued_requests:
            raise RequestError(
                429, f"{self.in_hand} requests are in hand, as many as are taken; try again later"
            )
        self.in_hand += 1
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                row = await self._score(await read_request(request, self.settings))
        except TimeoutError:
            raise RequestError(
                504,
                f"no answer within serve.request_timeout_s = {self.settings.request_timeout_s:g} s",
                "timeout",
            ) from None
        finally:
            self.in_hand -= 1
        status = 200 if row["status"] == "ok" else _STATUS_OF.get(row["error_type"], 422)
        return JSONResponse(plain_row(row), status_code=status)

    async def _score(self, asked: Asked) -> dict[str, Any]:
        try:
            answer = await self.graph.score(asked.source, asked.video_id, asked.upload)
        except (
            Exception
        ) as error:  # the boundary: whatever a stage raises, the client gets an answer
            _log.error("the graph failed: %s", storage.redact(str(error)))
            raise RequestError(
                500, "the graph failed; the endpoint's log says more", "internal"
            ) from error
        return asked.identity | (
            failure_columns(answer.error) if answer.error is not None else answer.columns
        )


@serve.deployment
class BulkEntry:
    """The root that Serve wants of an application; bulk scoring calls the stages themselves."""

    def __init__(self, *stages: DeploymentHandle) -> None:
        self.stages = stages

    async def __call__(self) -> None:
        """Nobody calls it."""


def bulk_application(model: str, config: Config, placed: Layout, ongoing: Mapping[str, int]) -> Any:
    """The stages alone, bound, in the numbers that the layout starts with."""
    pools = {
        name: replace(pool, minimum=pool.start, limit=pool.start)
        for name, pool in placed.pools.items()
    }
    stages = bind_graph(model, config, replace(placed, pools=pools), ongoing)
    return BulkEntry.options(**deployment_options(pools["ingress"], 1)).bind(*stages)  # type: ignore[attr-defined]


def application(model: str, config: Config, placed: Layout, token: str | None) -> Any:
    """The whole application, bound; `token` None lets everybody in."""
    # a relative prefix means the folder of whoever deploys, not of a replica
    prefixes = tuple(storage.normalize(prefix) for prefix in config.serve.allowed_uri_prefixes)
    config = config.model_copy(
        update={"serve": config.serve.model_copy(update={"allowed_uri_prefixes": prefixes})}
    )
    settings = config.serve
    ongoing = {
        name: getattr(settings, name).max_ongoing_requests
        for name in ("decoder", "sampler", "recognizer")
    }
    decoder, sampler, recognizer = bind_graph(model, config, placed, ongoing)
    # the ingress counts for itself and answers 429 in its own words; Serve's own limits lie above, for a flood and for a dead replica
    most = settings.max_queued_requests
    options = deployment_options(placed["ingress"], 2 * most, 4 * most)
    return Ingress.options(**options).bind(model, config, decoder, sampler, recognizer, token)  # type: ignore[attr-defined]


def build(args: Mapping[str, Any]) -> Any:
    """Builder for Serve config files. args: model (bundle URI), settings (nested, optional), anonymous (default false).

    Raises ConfigError where no token is set (environment variable TSQ_TOKEN) and anonymous is not true.
    """
    unknown = sorted(set(args) - {"model", "settings", "anonymous"})
    if unknown:
        raise ConfigError(f"args has {unknown[0]!r}; there is: model, settings, anonymous")
    model = args.get("model")
    if not model:
        raise ConfigError("args.model is missing: name the bundle's URI")
    anonymous = str(args.get("anonymous", False)).lower() in ("1", "true", "yes")
    token = read_token()
    if token is None and not anonymous:
        raise ConfigError(
            f"no token: set the environment variable {TOKEN_VARIABLE}, or args.anonymous = true behind a gateway that checks requests"
        )
    try:
        config = scoring_config(model, settings=args.get("settings"))
        found = cluster.read_cluster(ray, config) if ray.is_initialized() else Cluster(())
        return application(model, config, layout("serve", config, found, 1), token)
    except StorageError as error:
        raise ConfigError(str(error)) from error


__all__ = ["application", "build"]
