"""Answers to requests that get no prediction: problem details (RFC 9457)."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

from tsq_ray import storage
from tsq_ray.errors import DecoderKilled, DiskFull, Failure, UserError

MEDIA_TYPE = "application/problem+json"
MODEL_HEADER = "X-TSQ-Model"
_STATUS_OF = {
    "not_found": 404,
    "access_denied": 502,  # storage refuses the endpoint's keys, not the client's
    "unavailable": 503,
    "too_large": 413,
    "timeout": 504,
    "internal": 500,
}
"""HTTP status of a failed video by error type; 422 if the video itself is at fault."""
_RETRY_AFTER_S = {503: 5.0, 507: 30.0}
"""Default seconds until a retry, by status."""


class RequestError(UserError):
    """A request that gets no prediction.

    `status` is the HTTP status, `error_type` says why a video failed, and `retry_after_s` when to
    retry.
    """

    def __init__(
        self,
        status: int,
        message: str,
        error_type: str | None = None,
        retry_after_s: float | None = None,
        video: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.error_type, self.video = status, error_type, video
        self.model: str | None = None
        """The bundle's sha256, if its stages found the error."""
        self.retry_after_s = retry_after_s or _RETRY_AFTER_S.get(status, retry_after_s)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # pickled when a replica raises it to another
        return type(self), (
            self.status,
            str(self),
            self.error_type,
            self.retry_after_s,
            self.video,
        )

    @classmethod
    def of(cls, failure: Failure, video: dict[str, Any], model: str | None = None) -> RequestError:
        """Return the answer for a video that cannot be used, as found by the stages of `model`."""
        status = _STATUS_OF.get(failure.error_type, 422)
        if isinstance(failure, DiskFull):
            status = 507
        elif isinstance(failure, DecoderKilled):
            status = 503
        error = cls(status, str(failure), failure.error_type, video=video)
        error.model = model
        return error


def problem(
    error: RequestError, request_id: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return the answer for `error`: type, title, status, detail, request_id and the video."""
    content: dict[str, Any] = {
        "type": f"urn:tsq-ray:{error.error_type}" if error.error_type else "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": storage.redact(" ".join(str(error).split()))[:500],
        "request_id": request_id,
    }
    if error.error_type:
        content["error_type"] = error.error_type
    if error.video:
        content["video"] = error.video
    headers = dict(headers or {})
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.model:
        headers[MODEL_HEADER] = error.model
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return JSONResponse(content, error.status, headers, MEDIA_TYPE)
