"""The endpoint's OpenAPI document and its two pages, which load nothing from other sites."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel
from starlette.routing import BaseRoute

from tsq_ray.serving.requests.models import (
    Batch,
    BatchLine,
    BatchRequest,
    LinesOptions,
    Options,
    Prediction,
    Problem,
    UriRequest,
)
from tsq_ray.serving.requests.problems import MEDIA_TYPE, MODEL_HEADER

_DESCRIPTION = (
    "Labels videos: a small sampler looks at T frames, chooses the K most salient ones, and a "
    "recogniser labels the video from those."
)
_REASONS = {
    400: "the request is malformed; `detail` names the field",
    401: "no valid token",
    403: "the `uri` is not below an allowed prefix",
    404: "no such video",
    413: "the upload or the video exceeds a limit",
    415: "the media type is not supported",
    422: "the video cannot be used: `error_type` is not_video, truncated, corrupt, unsupported, "
    "decoder_crash or out_of_memory",
    429: "too many requests in flight, or above the token's rate; `Retry-After` says when to retry",
    500: "an error in the endpoint; see its log",
    502: "storage refuses the endpoint's own keys",
    503: "storage does not answer, or the endpoint is ending; `Retry-After` says when to retry",
    504: "a time limit has passed",
    507: "the endpoint's disk is full; `Retry-After` says when to retry",
}
_WITH_RETRY_AFTER = (429, 503, 507)
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; media-src blob: http: https:; connect-src 'self'"
}
"""The page may send requests to the endpoint only."""
_MODEL_HEADER = {
    MODEL_HEADER: {"description": "SHA-256 of the bundle", "schema": {"type": "string"}}
}
_REQUEST_ID = {
    "x-request-id": {
        "description": "the request's id; the client's own if it sent one",
        "schema": {"type": "string"},
    }
}


def _problem(status: int) -> dict[str, Any]:
    headers = dict(_REQUEST_ID)
    if status in _WITH_RETRY_AFTER:
        headers["Retry-After"] = {
            "description": "seconds to wait before another try",
            "schema": {"type": "integer"},
        }
    return {
        "model": Problem,
        "description": f"{HTTPStatus(status).phrase}: {_REASONS[status]}",
        "headers": headers,
    }


PROBLEMS = {status: _problem(status) for status in _REASONS}
"""The documented answers other than predictions, by status."""


def _binary(media_type: str) -> dict[str, Any]:
    return {media_type: {"schema": {"type": "string", "format": "binary"}}}


def _query_parameters(model: type[BaseModel], where: str) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": f"{schema.pop('description', '')} (for {where})",
            "schema": schema,
        }
        for name, schema in model.model_json_schema()["properties"].items()
    ]


_PREFER = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`respond-async`: answer 202 with a batch of this one `uri`; no options allowed",
    "schema": {"type": "string", "examples": ["respond-async"]},
}
SCORE: dict[str, Any] = {
    "response_model": Prediction,
    "responses": {
        200: {"description": "The prediction", "headers": _MODEL_HEADER | _REQUEST_ID},
        202: {
            "model": Batch,
            "description": "A batch of this video, if the answer takes too long",
        },
        **PROBLEMS,
    },
    "openapi_extra": {
        "parameters": [*_query_parameters(Options, "uploads"), _PREFER],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": UriRequest.model_json_schema()},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {"file": {"type": "string", "format": "binary"}},
                    }
                },
                **_binary("application/octet-stream"),
                **_binary("video/*"),
            },
        },
    },
}
"""How POST /v1/score is documented."""


REFUSALS: dict[int | str, Any] = {
    status: PROBLEMS[status] for status in (400, 401, 404, 429, 500, 503, 504)
}
"""The documented problems of requests about batches."""
BATCHES: dict[str, Any] = {
    "response_model": Batch,
    "responses": {
        422: PROBLEMS[422] | {"description": "The Idempotency-Key belongs to another request"},
        **{status: PROBLEMS[status] for status in (400, 401, 403, 404, 413, 415)},
        **{status: PROBLEMS[status] for status in (429, 500, 503, 504)},
    },
    "openapi_extra": {
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "a repeated request with the same key returns the same batch; "
                "a different request with that key is refused",
                "schema": {"type": "string", "maxLength": 255},
            },
            *_query_parameters(LinesOptions, "JSON lines"),
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": BatchRequest.model_json_schema()},
                "application/jsonl": {"schema": BatchLine.model_json_schema()},
            },
        },
    },
}
"""How POST /v1/batches is documented."""


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI document of these routes."""
    from tsq_ray import __version__

    found = get_openapi(
        title="tsq_ray", version=__version__, description=_DESCRIPTION, routes=routes
    )
    for path in found["paths"].values():
        for operation in path.values():
            for status, answer in operation["responses"].items():
                content = answer.get("content", {})
                if int(status) >= 400 and "application/json" in content:
                    content[MEDIA_TYPE] = content.pop("application/json")
    return found


@functools.cache
def start_page() -> HTMLResponse:
    """Return the page at /."""
    page = importlib.resources.files("tsq_ray.serving").joinpath("page.html")
    return HTMLResponse(page.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)


def docs_page() -> HTMLResponse:
    """Return the page at /docs."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="tsq_ray",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )


_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


@functools.cache
def docs_asset(name: str) -> Response | None:
    """Return a file that the page at /docs loads; None for any other name."""
    if name not in _ASSETS:
        return None
    content = importlib.resources.files("fastapi_offline").joinpath("static", name).read_bytes()
    return Response(content, media_type=_ASSETS[name])
