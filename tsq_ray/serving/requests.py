"""Parsing of requests, and their checks: the token, the size, the `uri`."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.types import Message

from tsq_ray import storage
from tsq_ray.config import ServeConfig
from tsq_ray.decode import VideoSource
from tsq_ray.errors import UserError
from tsq_ray.manifest import video_id

_MAX_JSON_BYTES = 16 * 1024
_FORM_BYTES = 64 * 1024  # what a form may hold in addition to its file


class RequestError(UserError):
    """A request that gets no prediction.

    `status` is the HTTP status, `error_type` says why a video failed.
    """

    def __init__(self, status: int, message: str, error_type: str | None = None) -> None:
        super().__init__(message)
        self.status, self.error_type = status, error_type


def check_token(header: str | None, token: str | None) -> None:
    """Raise RequestError 401 unless `header` carries the bearer token. None disables the check."""
    if token is None:
        return
    scheme, _, given = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(
        given.strip().encode(), token.encode()
    ):
        raise RequestError(
            401, "a valid token is required: send the header Authorization: Bearer TOKEN"
        )


@dataclass(frozen=True)
class Asked:
    """The video of a request: its location, or the name and content of its upload."""

    source: VideoSource
    video_id: str
    """Derived from the URI; for an upload the first 16 hex digits of its sha256."""
    upload: bytes | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The answer's columns that a manifest would supply."""
        size = len(self.upload) if self.upload is not None else None
        return {
            "video_id": self.video_id,
            "uri": self.source.uri,
            "size_bytes": size,
            "etag": None,
            "modified": None,
        }


async def read_request(request: Request, settings: ServeConfig) -> Asked:
    """Return the video that a request asks for. Raises RequestError if the request is refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    most = int(settings.max_upload_mb * 2**20)
    if kind == "application/json":
        uri = check_prefix(read_uri(await limited(request, _MAX_JSON_BYTES).body()), settings)
        return Asked(VideoSource(uri), video_id(uri))
    if kind == "multipart/form-data":
        data, name = await read_form(limited(request, most + _FORM_BYTES))
    else:
        data, name = await limited(request, most).body(), ""
    if len(data) > most:
        raise RequestError(413, f"the file has {len(data)} bytes; the limit is {most}")
    digest = hashlib.sha256(data).hexdigest()[:16]
    return Asked(
        VideoSource(f"upload:{os.path.basename(name)}" if name else "upload"), digest, data
    )


def limited(request: Request, limit: int) -> Request:
    """Return the request with a limit on its body.

    Raises RequestError 413 as soon as more than `limit` bytes are announced or received.
    """
    refusal = RequestError(413, f"the body is larger than the limit of {limit} bytes")
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
    """Return the `uri` of a JSON body. Raises RequestError 400 if it has none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    uri = content.get("uri") if isinstance(content, dict) else None
    if not isinstance(uri, str) or not uri or not uri.isprintable():
        raise RequestError(
            400, 'the JSON body must be {"uri": "s3://..."}, with a non-empty, printable string'
        )
    return uri


async def read_form(request: Request) -> tuple[bytes, str]:
    """Return content and name of the form's `file`. Raises RequestError 400 if it has none."""
    async with request.form(max_files=1) as form:
        file = form.get("file")
        if file is None or isinstance(file, str):
            raise RequestError(400, "the form has no `file`; send it as: curl -F file=@video.mp4")
        return await file.read(), file.filename or ""


def check_prefix(uri: str, settings: ServeConfig) -> str:
    """Return `uri` normalised. Raises RequestError 403 if it is not below an allowed prefix."""
    try:
        place = "" if uri.startswith("~") else storage.real_path(uri)
    except (OSError, ValueError):  # the name is too long or contains a NUL
        place = ""
    if ".." not in unquote(place).replace("\\", "/").split("/"):
        for prefix in settings.allowed_uri_prefixes:
            if place.startswith(storage.real_path(prefix).rstrip("/") + "/"):
                return place
    allowed = ", ".join(settings.allowed_uri_prefixes) or "none (set serve.allowed_uri_prefixes)"
    raise RequestError(
        403,
        f"uri {storage.redact(uri)!r} is not below an allowed prefix; "
        f"allowed: {storage.redact(allowed)}",
    )
