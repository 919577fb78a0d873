"""The endpoint: POST /v1/score with an upload or a `uri`, GET /v1/model, GET /healthz.

Every answer is JSON: a prediction row, or `status` ("refused" | "failed") with `error_message` and,
if a video is the reason, `error_type`. A Serve config file imports the application as
`tsq_ray.serving.app:build`, with args {model, settings, anonymous}.
"""

# `serve.ingress` pickles the routes by value while this module is still being imported, so
# everything they use must be defined above them. `from __future__ import annotations` is left out:
# FastAPI could not resolve the name `Request` and would treat it as a query parameter.

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
"""HTTP status of a failed video by error type; 422 for faults of the video itself."""
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
    allowed = (
        "; allowed: POST /v1/score, GET /v1/model, GET /healthz"
        if error.status_code in (404, 405)
        else ""
    )
    return _refusal(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}{allowed}",
        headers=error.headers,
    )


@api.exception_handler(Exception)
async def _fail(_: Request, error: Exception) -> JSONResponse:
    return _refusal(500, f"{type(error).__name__} in the endpoint; see its log", "internal")


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Check requests and run the graph on their videos."""

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
        """Report that this replica is up; needs no token."""
        return {"status": "ok"}

    @api.get("/v1/model")
    async def describe(self, request: Request) -> dict[str, Any]:
        """Return the classes and settings of the served model."""
        check_token(request.headers.get("authorization"), self.token)
        return self.model

    @api.post("/v1/score")
    async def score(self, request: Request) -> JSONResponse:
        """Score one video: JSON {"uri": ...}, the file as the body, or a form with a `file`."""
        check_token(request.headers.get("authorization"), self.token)
        if self.in_hand >= self.settings.max_queued_requests:
            raise RequestError(
                429, f"{self.in_hand} requests are in progress, which is the limit; try again later"
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
        except Exception as error:
            # the client must get an answer whatever a stage raises
            _log.error("the graph failed: %s", storage.redact(str(error)))
            raise RequestError(
                500, "the graph failed; see the endpoint's log", "internal"
            ) from error
        return asked.identity | (
            failure_columns(answer.error) if answer.error is not None else answer.columns
        )


@serve.deployment
class BulkEntry:
    """The root that Serve requires of an application; bulk scoring calls the stages directly."""

    def __init__(self, *stages: DeploymentHandle) -> None:
        self.stages = stages

    async def __call__(self) -> None:
        """Do nothing: Serve requires a callable root, which no request reaches."""


def bulk_application(model: str, config: Config, placed: Layout, ongoing: Mapping[str, int]) -> Any:
    """Bind the stages without the ingress, with as many replicas as the layout starts with."""
    pools = {
        name: replace(pool, minimum=pool.start, limit=pool.start)
        for name, pool in placed.pools.items()
    }
    stages = bind_graph(model, config, replace(placed, pools=pools), ongoing)
    options = deployment_options(pools["ingress"], 1)
    return BulkEntry.options(**options).bind(*stages)  # type: ignore[attr-defined]


def application(model: str, config: Config, placed: Layout, token: str | None) -> Any:
    """Bind the whole application; with `token` None no token is needed."""
    # a relative prefix is relative to the folder of the deploying process, not of a replica
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
    # the ingress keeps its own count and answers 429 with a message; Serve's limits are higher and
    # cover floods and dead replicas
    most = settings.max_queued_requests
    options = deployment_options(placed["ingress"], 2 * most, 4 * most)
    ingress = Ingress.options(**options)  # type: ignore[attr-defined]
    return ingress.bind(model, config, decoder, sampler, recognizer, token)


def build(args: Mapping[str, Any]) -> Any:
    """Build the application for a Serve config file.

    `args`: model (bundle URI), settings (nested, optional), anonymous (default false). Raises
    ConfigError if no token is set (environment variable TSQ_TOKEN) and anonymous is not true.
    """
    unknown = sorted(set(args) - {"model", "settings", "anonymous"})
    if unknown:
        raise ConfigError(f"unknown args key {unknown[0]!r}; allowed: model, settings, anonymous")
    model = args.get("model")
    if not model:
        raise ConfigError("args.model is missing: set it to the bundle's URI")
    anonymous = str(args.get("anonymous", False)).lower() in ("1", "true", "yes")
    token = read_token()
    if token is None and not anonymous:
        raise ConfigError(
            f"no token: set the environment variable {TOKEN_VARIABLE}, "
            "or args.anonymous = true behind a gateway that checks requests"
        )
    try:
        config = scoring_config(model, settings=args.get("settings"))
        found = cluster.read_cluster(ray, config) if ray.is_initialized() else Cluster(())
        return application(model, config, layout("serve", config, found, 1), token)
    except StorageError as error:
        raise ConfigError(str(error)) from error


__all__ = ["application", "build"]
