"""Parse a request: the media type, the options and the video, or the batch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from tsq_ray.config import ServeConfig
from tsq_ray.decode import VideoSource
from tsq_ray.manifest import video_id
from tsq_ray.serving.requests.models import (
    BatchLine,
    BatchOptions,
    BatchRequest,
    LinesOptions,
    Options,
    UriRequest,
)
from tsq_ray.serving.requests.problems import RequestError
from tsq_ray.serving.requests.shares import WHOLE, Quota, Share
from tsq_ray.serving.requests.uploads import LimitedBody, Upload, received
from tsq_ray.serving.requests.uris import check_uri
from tsq_ray.serving.requests.webhooks import check_webhook

_MAX_JSON_BYTES = 16 * 1024
_MAX_LINES_BYTES = 64 * 2**20
_LINES = ("application/jsonl", "application/x-ndjson")
_BINARY = ("", "application/octet-stream", "multipart/form-data")
_PATHS = ThreadPoolExecutor(16, "tsq-paths")
"""Separate threads for checking paths, so that a hanging mount holds up no other request."""
_Parsed = TypeVar("_Parsed", bound=BaseModel)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ScoreRequest:
    """The video of a request, and what to return about it."""

    source: VideoSource
    video_id: str
    """Derived from the URI; for an upload the first 16 hex digits of its sha256."""
    options: Options
    upload: Upload | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The answer's columns that a manifest would supply."""
        return {
            "video_id": self.video_id,
            "uri": self.source.uri,
            "size_bytes": self.upload.size_bytes if self.upload is not None else None,
            "etag": None,
            "modified": None,
        }


@contextlib.asynccontextmanager
async def read_score_request(
    request: Request, settings: ServeConfig, quota: Quota, share: Share = WHOLE
) -> AsyncIterator[ScoreRequest]:
    """Yield the video that a request asks for; an upload is kept for the duration of the `with`.

    `quota`: the bytes of uploads in flight. Raises RequestError if the request is refused.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await LimitedBody(request, _MAX_JSON_BYTES).request.body()
        parsed = validate(UriRequest, body)
        uri = await in_thread(check_uri, parsed.uri, settings.allowed_uri_prefixes)
        yield ScoreRequest(VideoSource(uri), video_id(uri), parsed)
        return
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "Content-Encoding is not supported; send the file unencoded")
    if kind not in _BINARY and not kind.startswith("video/"):
        raise RequestError(
            415,
            f"Content-Type {kind[:100]!r} is not supported; send application/json, "
            "multipart/form-data, application/octet-stream or video/*",
        )
    options = validate(Options, dict(request.query_params))
    limit = int(settings.max_upload_mb * 2**20)
    async with received(request, kind, limit, quota, share) as upload:
        name = f"upload:{upload.name}" if upload.name else "upload"
        yield ScoreRequest(VideoSource(name), upload.sha256[:16], options, upload)


def validate(model: type[_Parsed], content: bytes | dict[str, Any], prefix: str = "") -> _Parsed:
    """Validate JSON or query parameters. Raises RequestError 400 that names the field."""
    try:
        if isinstance(content, bytes):
            return model.model_validate_json(content)
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        allowed = ", ".join(model.model_fields)
        message = f"{prefix}{where}: {first['msg']}; allowed: {allowed}"
        raise RequestError(400, message) from None


async def read_batch_request(
    request: Request, settings: ServeConfig, quota: Quota, share: Share = WHOLE
) -> tuple[BatchOptions, list[BatchLine]]:
    """Return a batch's input: a BatchRequest without lines, or other options with lines.

    `quota`: the bytes of uploads in flight, to which lines belong until they are parsed. Raises
    RequestError if the request is refused.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    prefixes = settings.allowed_uri_prefixes
    if kind == "application/json":
        parsed = validate(BatchRequest, await LimitedBody(request, _MAX_JSON_BYTES).request.body())
        manifest = await in_thread(check_uri, parsed.manifest, prefixes)
        return _with_checked_webhook(parsed.model_copy(update={"manifest": manifest}), settings), []
    if kind not in _LINES:
        allowed = "send application/json or application/jsonl"
        raise RequestError(415, f"Content-Type {kind[:100]!r} is not supported; {allowed}")
    options = _with_checked_webhook(validate(LinesOptions, dict(request.query_params)), settings)
    body = LimitedBody(request, _MAX_LINES_BYTES, quota, share)
    try:
        content = await body.request.body()
        lines = await asyncio.to_thread(_parse_lines, content, settings.max_batch_lines)
    finally:
        body.give_back()
    ids = {line.custom_id for line in lines}
    if not lines or len(ids) < len(lines):
        why = "the same custom_id occurs twice" if lines else "no lines"
        raise RequestError(400, f"{why}; send one line of JSON per video")
    return options, await in_thread(_checked_lines, lines, prefixes)


async def in_thread(work: Callable[..., _Result], *arguments: Any) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(_PATHS, work, *arguments)


def _checked_lines(lines: list[BatchLine], prefixes: Iterable[str]) -> list[BatchLine]:
    return [line.model_copy(update={"uri": check_uri(line.uri, prefixes)}) for line in lines]


def _with_checked_webhook(options: BatchOptions, settings: ServeConfig) -> BatchOptions:
    if options.webhook is None:
        return options
    webhook = check_webhook(options.webhook, settings.webhook_prefixes)
    return options.model_copy(update={"webhook": webhook})


def _parse_lines(body: bytes, limit: int) -> list[BatchLine]:
    lines = [(number, line) for number, line in enumerate(body.splitlines(), 1) if line.strip()]
    if len(lines) > limit:
        raise RequestError(413, f"{len(lines)} lines; the limit is {limit}; send a manifest")
    return [validate(BatchLine, line, f"line {number}: ") for number, line in lines]
