"""The endpoint's FastAPI application, and its answers to requests that no route handles."""

# no `from __future__ import annotations`: FastAPI could not resolve the annotations' names

import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from ray import serve
from starlette.exceptions import HTTPException

from tsq_ray.serving.requests.problems import RequestError, problem

api = FastAPI(title="tsq_ray", docs_url=None, redoc_url=None, openapi_url=None)
api.router.redirect_slashes = False


def request_id(request: Request) -> str:
    """Return the id that Serve gave the request or took from its header x-request-id."""
    context = serve.context._get_serve_request_context()
    return context.request_id or request.headers.get("x-request-id") or uuid.uuid4().hex


def _refused(
    request: Request, error: RequestError, headers: dict[str, str] | None = None
) -> Response:
    """Answer, log and count a request that no method of the ingress handles."""
    record = {"request_id": request_id(request), "path": request.url.path[:200]}
    answer = problem(error, record["request_id"], headers)
    ingress: Any = serve.get_replica_context().servable_object
    ingress.record_answer(record, answer, error)
    return answer


@api.exception_handler(HTTPException)
async def _refuse_http(request: Request, error: HTTPException) -> Response:
    hint = "; see /openapi.json" if error.status_code in (404, 405) else ""
    message = f"{request.method} {request.url.path[:200]}: {error.detail}{hint}"
    refused = RequestError(error.status_code, message)
    return _refused(request, refused, dict(error.headers or {}))


@api.exception_handler(RequestValidationError)
async def _refuse_parameters(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return _refused(request, RequestError(400, f"{where}: {first['msg']}"))


@api.exception_handler(RequestError)
async def _refuse(request: Request, error: RequestError) -> Response:
    return problem(error, request_id(request))


@api.exception_handler(Exception)
async def _fail(request: Request, error: Exception) -> Response:
    return problem(internal(error), request_id(request))


def internal(error: Exception) -> RequestError:
    """Return the answer to a request that hit a bug in the endpoint."""
    return RequestError(500, f"{type(error).__name__} in the endpoint; see its log", "internal")
