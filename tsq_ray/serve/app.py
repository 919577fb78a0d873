"""The endpoint: POST /v1/score with an upload or a `uri`, GET /v1/model, GET /healthz.

`build` is also the import path of a Serve config file: `tsq_ray.serve.app:build` with args {model, settings, anonymous}.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from tsq_ray import storage
from tsq_ray.bundle import read_bundle_settings
from tsq_ray.config import Config, ServeConfig
from tsq_ray.errors import ConfigError, StorageError, UserError
from tsq_ray.manifest import VideoRef, video_id
from tsq_ray.serve.graph import Graph, bind_graph
from tsq_ray.serve.settings import scoring_config
from tsq_ray.stages import plain_row

TOKEN_VARIABLE = "TSQ_TOKEN"
_STATUS_OF = {"not_found": 404, "access_denied": 403, "unavailable": 503, "too_large": 413, "timeout": 504, "internal": 500}
"""HTTP status of a failed video by its error type; 422 for what is wrong with the video itself."""

api = FastAPI(title="tsq_ray", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")


class RequestError(UserError):
    """A request that is refused; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@api.exception_handler(RequestError)
async def _refuse(_: Request, error: RequestError) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse({"status": "refused", "error_message": str(error)}, status_code=error.status, headers=headers)


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
        self.config, self.token = config, token
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
        settings = self.config.serve
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        check_length(request.headers.get("content-length"), settings)
        if kind == "application/json":
            row = await self._score_uri(await read_limited(request.stream(), 64 * 1024))
        elif kind == "multipart/form-data":
            row = await self._score_upload(*await read_form(request, settings))
        else:
            data = await read_limited(request.stream(), int(settings.max_upload_mb * 2**20))
            row = await self._score_upload(data, "upload")
        status = 200 if row["status"] == "ok" else _STATUS_OF.get(row["error_type"], 422)
        return JSONResponse(plain_row(row), status_code=status)

    async def _score_uri(self, body: bytes) -> dict[str, Any]:
        try:
            content = json.loads(body)
            uri = content["uri"]
        except (ValueError, KeyError, TypeError):
            raise RequestError(400, 'the JSON body must be {"uri": "s3://..."}') from None
        if not isinstance(uri, str) or not uri:
            raise RequestError(400, f"uri is {uri!r}; expected a non-empty string")
        uri = check_prefix(uri, self.config.serve)
        return await self.graph.score(VideoRef(video_id(uri), uri, None))  # type: ignore[arg-type]

    async def _score_upload(self, data: bytes, name: str) -> dict[str, Any]:
        if not data:
            raise RequestError(400, "the body is empty; send the video's bytes, a form with a `file`, or JSON with a `uri`")
        digest = hashlib.sha256(data).hexdigest()[:16]
        return await self.graph.score(VideoRef(digest, f"upload:{os.path.basename(name)}", len(data)), data)


def check_token(header: str | None, token: str | None) -> None:
    """RequestError 401 unless `header` carries the bearer token; no token configured means no check."""
    if token is None:
        return
    given = (header or "").removeprefix("Bearer ").strip()
    if not header or not header.startswith("Bearer ") or not hmac.compare_digest(given.encode(), token.encode()):
        raise RequestError(401, "a valid token is needed: send the header Authorization: Bearer TOKEN")


def check_length(header: str | None, settings: ServeConfig) -> None:
    """RequestError 413 for a body that says itself that it is too large."""
    if header is not None and header.isdigit() and int(header) > settings.max_upload_mb * 2**20 + 64 * 1024:
        raise RequestError(413, f"the upload has {int(header)} bytes; at most {settings.max_upload_mb} MiB are taken")


async def read_limited(stream: AsyncIterator[bytes], limit: int) -> bytes:
    """The body, or RequestError 413 as soon as it passes `limit` bytes."""
    parts, size = [], 0
    async for part in stream:
        size += len(part)
        if size > limit:
            raise RequestError(413, f"the body is larger than {limit} bytes, the most that is taken")
        parts.append(part)
    return b"".join(parts)


async def read_form(request: Request, settings: ServeConfig) -> tuple[bytes, str]:
    """(content, file name) of the form's `file`; the body is limited before it is parsed."""
    limit = int(settings.max_upload_mb * 2**20) + 64 * 1024
    body = await read_limited(request.stream(), limit)
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    form = await Request(request.scope, receive).form(max_files=1)  # type: ignore[arg-type]
    file = form.get("file")
    if file is None or isinstance(file, str):
        raise RequestError(400, "the form has no `file`; send it as: curl -F file=@video.mp4")
    return await file.read(), file.filename or "upload"


def check_prefix(uri: str, settings: ServeConfig) -> str:
    """The normalised `uri`, if it lies below an allowed prefix; RequestError 403 otherwise."""
    place = storage.normalize(uri)
    if ".." not in place.split("/"):
        for prefix in settings.allowed_uri_prefixes:
            base = storage.normalize(prefix).rstrip("/")
            if place == base or place.startswith(base + "/"):
                return place
    allowed = ", ".join(settings.allowed_uri_prefixes) or "none (set serve.allowed_uri_prefixes)"
    raise RequestError(403, f"uri {storage.redact(uri)!r} is not below an allowed prefix; allowed: {allowed}")


def application(model: str, config: Config, token: str | None) -> Any:
    """The whole application, bound; `token` None lets everybody in."""
    decoder, sampler, recognizer = bind_graph(model, config)
    options = {
        "num_replicas": 1,
        "graceful_shutdown_wait_loop_s": 0.1,
        "ray_actor_options": {"num_cpus": 0.1},
        "max_ongoing_requests": config.serve.max_queued_requests,
        "max_queued_requests": config.serve.max_queued_requests,
    }
    return Ingress.options(**options).bind(model, config, decoder, sampler, recognizer, token)  # type: ignore[attr-defined]


def build(args: Mapping[str, Any]) -> Any:
    """Builder for Serve config files. args: model (bundle URI), settings (nested, optional), anonymous (default false).

    Raises ConfigError where no token is set (environment variable TSQ_TOKEN) and anonymous is not true.
    """
    model = args.get("model")
    if not model:
        raise ConfigError("args.model is missing: name the bundle's URI")
    anonymous = str(args.get("anonymous", False)).lower() in ("1", "true", "yes")
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not anonymous:
        raise ConfigError(
            f"no token: set the environment variable {TOKEN_VARIABLE}, or args.anonymous = true behind a gateway that checks requests"
        )
    try:
        return application(model, scoring_config(model, settings=args.get("settings")), token)
    except StorageError as error:
        raise ConfigError(str(error)) from error


__all__ = ["TOKEN_VARIABLE", "application", "build"]
