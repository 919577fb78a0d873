"""The endpoint: POST /v1/score with an upload or a `uri`, GET /v1/model, GET /healthz.

Every answer is JSON. What is not a prediction row has `status` ("refused" | "failed"), `error_message` and, where a video is the reason,
`error_type`. `build` is also the import path of a Serve config file: `tsq_ray.serve.app:build` with args {model, settings, anonymous}.
"""

# no `from __future__ import annotations` here: Serve sends the routes to the replicas by value, where FastAPI could not look up the
# name `Request` in a string, and would take it for a query parameter

import asyncio
import hashlib
import hmac
import json
import logging
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import Message

from tsq_ray import storage
from tsq_ray.bundle import read_bundle_settings
from tsq_ray.config import Config, ServeConfig
from tsq_ray.errors import ConfigError, StorageError, UserError
from tsq_ray.manifest import VideoRef, video_id
from tsq_ray.serve.access import TOKEN_VARIABLE, read_token
from tsq_ray.serve.graph import Graph, bind_graph, deployment_options
from tsq_ray.serve.settings import scoring_config
from tsq_ray.stages import plain_row

_STATUS_OF = {"not_found": 404, "access_denied": 403, "unavailable": 503, "too_large": 413, "timeout": 504, "internal": 500}
"""HTTP status of a failed video by its error type; 422 for what is wrong with the video itself."""
_MAX_JSON_BYTES = 16 * 1024
_FORM_BYTES = 64 * 1024  # what a form may hold beside its file
_TRIES = 2
_log = logging.getLogger("ray.serve")

api = FastAPI(title="tsq_ray", docs_url=None, redoc_url=None, openapi_url=None)


class RequestError(UserError):
    """A request without a prediction; `status` is the HTTP status, `error_type` says why a video failed."""

    def __init__(self, status: int, message: str, error_type: str | None = None) -> None:
        super().__init__(message)
        self.status, self.error_type = status, error_type


def _refusal(status: int, message: str, error_type: str | None = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    content = {"status": "failed" if error_type else "refused", "error_type": error_type, "error_message": storage.redact(message)}
    return JSONResponse({key: value for key, value in content.items() if value is not None}, status, headers)


@api.exception_handler(RequestError)
async def _refuse(_: Request, error: RequestError) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return _refusal(error.status, str(error), error.error_type, headers)


@api.exception_handler(HTTPException)
async def _refuse_http(request: Request, error: HTTPException) -> JSONResponse:
    there_is = "; there is POST /v1/score, GET /v1/model, GET /healthz" if error.status_code in (404, 405) else ""
    return _refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}{there_is}", headers=error.headers)


@api.exception_handler(Exception)
async def _fail(_: Request, error: Exception) -> JSONResponse:
    return _refusal(500, f"{type(error).__name__} in the endpoint; its log says more", "internal")


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Checks requests and runs the graph; bulk scoring calls `score_video` through a handle."""

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
        self.graph = Graph(decoder, sampler, recognizer)
        content, digest = read_bundle_settings(model)
        self.model = {
            "sha256": digest,
            "classes": content["classes"],
            "task": content["task"],
            "num_frames": config.decode.num_frames,
            "budget": config.sampler.budget,
            "mode": config.sampler.mode,
        }

    async def score_video(self, ref: VideoRef) -> dict[str, Any]:
        """The prediction row of one video of a manifest."""
        return await self.graph.score(ref)

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
            raise RequestError(429, f"{self.in_hand} requests are in hand, as many as are taken; try again later")
        self.in_hand += 1
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                row = await self._score(*await read_request(request, self.settings))
        except TimeoutError:
            raise RequestError(
                504, f"no answer within serve.request_timeout_s = {self.settings.request_timeout_s:g} s", "timeout"
            ) from None
        finally:
            self.in_hand -= 1
        status = 200 if row["status"] == "ok" else _STATUS_OF.get(row["error_type"], 422)
        return JSONResponse(plain_row(row), status_code=status)

    async def _score(self, ref: VideoRef, upload: bytes | None) -> dict[str, Any]:
        for attempt in range(_TRIES):
            try:
                return await self.graph.score(ref, upload)
            except Exception as error:  # noqa: BLE001  the border: whatever becomes of a replica, the client gets an answer
                # where a replica died Serve starts another one, and the second try waits for it
                _log.error("the graph failed, try %d of %d: %s", attempt + 1, _TRIES, storage.redact(str(error)))
        raise RequestError(500, f"the graph failed {_TRIES} times; the endpoint's log says more", "internal")


def check_token(header: str | None, token: str | None) -> None:
    """RequestError 401 unless `header` carries the bearer token; no token configured means no check."""
    if token is None:
        return
    scheme, _, given = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise RequestError(401, "a valid token is needed: send the header Authorization: Bearer TOKEN")


async def read_request(request: Request, settings: ServeConfig) -> tuple[VideoRef, bytes | None]:
    """The video that is asked for: a row for its `uri`, or a made-up row and the upload. RequestError for what is refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    most = int(settings.max_upload_mb * 2**20)
    if kind == "application/json":
        uri = check_prefix(read_uri(await limited(request, _MAX_JSON_BYTES).body()), settings)
        return VideoRef(video_id(uri), uri, None), None  # type: ignore[arg-type]
    if kind == "multipart/form-data":
        data, name = await read_form(limited(request, most + _FORM_BYTES))
    else:
        data, name = await limited(request, most).body(), ""
    if len(data) > most:
        raise RequestError(413, f"the file has {len(data)} bytes; at most {most} are taken")
    digest = hashlib.sha256(data).hexdigest()[:16]
    return VideoRef(digest, f"upload:{os.path.basename(name)}" if name else "upload", len(data)), data


def limited(request: Request, limit: int) -> Request:
    """The same request with its body under a limit: RequestError 413 as soon as more than `limit` bytes are announced or have come."""
    refusal = RequestError(413, f"the body is larger than {limit} bytes, the most that is taken")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise refusal
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise refusal
        return message

    return Request(request.scope, receive)


def read_uri(body: bytes) -> str:
    """The `uri` of a JSON body; RequestError 400 where there is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    uri = content.get("uri") if isinstance(content, dict) else None
    if not isinstance(uri, str) or not uri or not uri.isprintable():
        raise RequestError(400, 'the JSON body must be {"uri": "s3://..."}, with a string that is not empty')
    return uri


async def read_form(request: Request) -> tuple[bytes, str]:
    """(content, file name) of the form's `file`; RequestError 400 where there is none."""
    async with request.form(max_files=1) as form:
        file = form.get("file")
        if file is None or isinstance(file, str):
            raise RequestError(400, "the form has no `file`; send it as: curl -F file=@video.mp4")
        return await file.read(), file.filename or ""


def check_prefix(uri: str, settings: ServeConfig) -> str:
    """The normalised `uri`, if it lies below an allowed prefix; RequestError 403 otherwise."""
    try:
        place = storage.normalize(uri)
    except (OSError, RuntimeError, ValueError):  # a ~user that does not exist, a name that is too long
        place = ""
    # fsspec takes `a::b` for one file system inside another
    if "::" not in place and ".." not in unquote(place).replace("\\", "/").split("/"):
        for prefix in settings.allowed_uri_prefixes:
            if place.startswith(storage.normalize(prefix).rstrip("/") + "/"):
                return place
    allowed = ", ".join(settings.allowed_uri_prefixes) or "none (set serve.allowed_uri_prefixes)"
    raise RequestError(403, f"uri {storage.redact(uri)!r} is not below an allowed prefix; allowed: {storage.redact(allowed)}")


def application(model: str, config: Config, token: str | None) -> Any:
    """The whole application, bound; `token` None lets everybody in."""
    # a relative prefix means the folder of whoever deploys, not of a replica
    prefixes = tuple(storage.normalize(prefix) for prefix in config.serve.allowed_uri_prefixes)
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"allowed_uri_prefixes": prefixes})})
    decoder, sampler, recognizer = bind_graph(model, config)
    # the ingress counts for itself and answers 429 in its own words; Serve's own limits lie above, for a flood and for a dead replica
    most = config.serve.max_queued_requests
    options = deployment_options(config.serve.ingress, 2 * most, 4 * most)
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
        return application(model, scoring_config(model, settings=args.get("settings")), token)
    except StorageError as error:
        raise ConfigError(str(error)) from error


__all__ = ["application", "build"]
