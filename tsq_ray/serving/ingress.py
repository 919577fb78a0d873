"""The endpoint's HTTP interface: scoring, batches, models, health, and its documentation.

A prediction is answered as JSON, anything else as problem details.
"""

# `serve.ingress` pickles the routes by value while this module is still being imported, so
# everything they use must be defined above them. `from __future__ import annotations` is left out:
# FastAPI could not resolve the names of the annotations.

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tsq_ray import storage
from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.config import Config
from tsq_ray.errors import StorageError
from tsq_ray.rows import plain_row
from tsq_ray.runtime import cluster
from tsq_ray.serving import facts
from tsq_ray.serving.api import api, internal, request_id
from tsq_ray.serving.graph import STAGES, Graph, TimeLimits, Video, model_of
from tsq_ray.serving.loopback import bind_to_loopback
from tsq_ray.serving.metrics import IngressMetrics
from tsq_ray.serving.openapi import (
    BATCHES,
    PROBLEMS,
    REFUSALS,
    SCORE,
    docs_asset,
    docs_page,
    document,
    start_page,
)
from tsq_ray.serving.requests.admission import Admission
from tsq_ray.serving.requests.models import (
    Batch,
    BatchLine,
    BatchList,
    Health,
    ModelCard,
    ModelList,
)
from tsq_ray.serving.requests.parse import Asked, asked, asked_batch
from tsq_ray.serving.requests.problems import RequestError, problem
from tsq_ray.serving.requests.shares import Places
from tsq_ray.serving.requests.tokens import AboveRate, Access, Token

_log = logging.getLogger("ray.serve")
_PING_S, _READY_S = 5.0, 30.0
MODEL_HEADER = "X-TSQ-Model"

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
Work = Callable[[Request, Token, dict[str, Any]], Awaitable[Response]]


def _most_replicas() -> int:
    """Return how many replicas of this deployment there may be, as it is deployed."""
    deployed = serve.get_replica_context()._deployment_config
    scaling = deployed.autoscaling_config
    return int(scaling.max_replicas if scaling is not None else deployed.num_replicas or 1)


def _json(content: BaseModel) -> JSONResponse:
    return JSONResponse(content.model_dump(mode="json"))


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
        batches: DeploymentHandle | None,
        token: str | None,
    ) -> None:
        bind_to_loopback()
        self.batches = batches
        settings = self.settings = config.serve
        self.access = Access(token, settings.tokens_file, _most_replicas())
        self.admission = Admission(settings.max_queued_requests, settings.request_timeout_s)
        one, all_of_them = settings.max_upload_mb * 2**20, settings.max_upload_total_mb * 2**20
        self.budget = Places(int(all_of_them), least=int(one))
        self.graph = Graph(decoder, sampler, recognizer, TimeLimits.of(config))
        content, digest = read_bundle_settings(model)
        self.card = ModelCard(
            id=digest,
            task=content["task"],
            classes=content["classes"],
            num_frames=config.decode.num_frames,
            budget=config.sampler.budget,
            mode=config.sampler.mode,
            clip_frames=config.recognizer.clip_frames,
        )
        self.metrics = IngressMetrics(self.card.model_dump())
        self.tasks = [asyncio.create_task(work) for work in (self._watch(), self._ping())]

    async def _watch(self) -> None:
        replica = serve.get_replica_context()
        await facts.watch(replica.app_name, replica.replica_id.unique_id, self.admission)

    async def _ping(self) -> None:
        while True:
            await self.graph.ping(_PING_S)
            admission = self.admission
            self.metrics.in_hand(admission.in_hand, self.budget.used, admission.expected_wait_s)
            await asyncio.sleep(_PING_S if self._silent() is None else _PING_S / 10)

    def _silent(self) -> str | None:
        """Return a stage that has not answered of late."""
        return next((name for name in STAGES if self.graph.silent_s(name) > _READY_S), None)

    @api.get("/healthz", response_model=Health)
    async def healthz(self) -> JSONResponse:
        """Whether this replica is alive; needs no token."""
        return JSONResponse({"status": "ok"})

    @api.get("/readyz", response_model=Health, responses={503: PROBLEMS[503]})
    async def readyz(self) -> JSONResponse:
        """Whether every stage answers and the endpoint accepts requests; needs no token."""
        if self.admission.draining:
            raise RequestError(503, "the endpoint is ending")
        if (silent := self._silent()) is not None:
            raise RequestError(503, f"the {silent} has not answered of late")
        return JSONResponse({"status": "ok"})

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi(self, request: Request) -> JSONResponse:
        """Describe the interface."""
        app = request.app
        app.openapi_schema = app.openapi_schema or document(app.routes)
        return JSONResponse(app.openapi_schema)

    @api.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """A page on which to try the endpoint; needs no token, its requests do."""
        return start_page()

    @api.get("/docs", include_in_schema=False)
    async def docs(self) -> Response:
        """Show the interface."""
        return docs_page()

    @api.get("/docs/{name}", include_in_schema=False)
    async def docs_file(self, name: str) -> Response:
        """Return a file of that page."""
        found = docs_asset(name)
        if found is None:
            raise HTTPException(404)
        return found

    @api.get("/v1/models", response_model=ModelList, responses={401: PROBLEMS[401]})
    async def models(self, request: Request, given: Bearer = None) -> Response:
        """List the served models, with their classes and settings."""
        return await self._observed(request, given, self._models)

    async def _models(self, _: Request, __: Token, ___: dict[str, Any]) -> Response:
        return JSONResponse({"models": [self.card.model_dump()]})

    @api.post("/v1/score", **SCORE)
    async def score(self, request: Request, given: Bearer = None) -> Response:
        """Label one video: the file as the body, a form with a `file`, or JSON with a `uri`."""
        return await self._observed(request, given, self._score)

    @api.post("/v1/batches", **BATCHES)
    async def create_batch(self, request: Request, given: Bearer = None) -> Response:
        """Score the videos of a manifest, or of JSON lines {"custom_id", "uri"}, in the background.

        With the header Idempotency-Key, a repeated request returns the same batch.
        """
        return await self._observed(request, given, self._create_batch)

    async def _create_batch(self, request: Request, token: Token, _: dict[str, Any]) -> Response:
        batches = self._batches()
        self.admission.check_open()
        wanted, lines = await asked_batch(request, self.settings)
        key = request.headers.get("idempotency-key")
        owned = f"{token.name}/{key}" if key else None
        return _json(await batches.create.remote(wanted, lines, owned))

    def _batches(self) -> Any:
        if self.batches is None:
            raise RequestError(404, "this endpoint keeps no batches: serve.batches_uri is not set")
        return self.batches

    @api.get("/v1/batches", response_model=BatchList, responses=REFUSALS)
    async def list_batches(
        self, request: Request, limit: int = 20, after: str | None = None, given: Bearer = None
    ) -> Response:
        """List the batches, the newest first: those before `after`, at most `limit` (1 to 100)."""

        async def work(*_: object) -> Response:
            if not 1 <= limit <= 100:
                raise RequestError(400, f"limit: {limit} is not in 1..100")
            return _json(await self._batches().newest.remote(limit, after))

        return await self._observed(request, given, work)

    @api.get("/v1/batches/{batch}", response_model=Batch, responses=REFUSALS)
    async def get_batch(
        self, request: Request, batch: str, verify: bool = False, given: Bearer = None
    ) -> Response:
        """Return a batch; with `verify`, also whether its rows add up."""

        async def work(*_: object) -> Response:
            return _json(await self._batches().get.remote(batch, verify))

        return await self._observed(request, given, work)

    @api.post("/v1/batches/{batch}/cancel", response_model=Batch, responses=REFUSALS)
    async def cancel_batch(self, request: Request, batch: str, given: Bearer = None) -> Response:
        """Cancel a batch; the rows that it has are kept."""

        async def work(*_: object) -> Response:
            return _json(await self._batches().cancel.remote(batch))

        return await self._observed(request, given, work)

    async def _observed(
        self, request: Request, given: HTTPAuthorizationCredentials | None, work: Work
    ) -> Response:
        """Do the work of a request with a valid token; turn errors into answers; log and count."""
        started = time.monotonic()
        headers: dict[str, str] = {}
        record: dict[str, Any] = {"request_id": request_id(request), "path": request.url.path}
        error: RequestError | None = None
        try:
            token = self.access.client(given.credentials if given else None)
            record["token"] = token.name
            headers, refused = self.access.spend(token)
            if refused is not None:
                raise refused
            with self.admission.answering():
                response = await work(request, token, record)
            response.headers.update(headers)
        except Exception as raised:  # noqa: BLE001  the client must get an answer
            error = await self._error(raised)
            response = problem(error, record["request_id"], headers)
        return self.told(record, response, error, time.monotonic() - started)

    def told(
        self,
        record: dict[str, Any],
        response: Response,
        error: RequestError | None,
        seconds: float = 0.0,
    ) -> Response:
        """Log and count an answer."""
        error_type = error.error_type if error is not None else None
        if isinstance(error, AboveRate):
            error_type = "rate"
        if record["path"].startswith("/v1/"):
            self.metrics.answered(response.status_code, error_type, seconds)
        record |= {"status": response.status_code, "seconds": round(seconds, 4)}
        record |= {"error_type": error_type} if error_type else {}
        _log.info("answered", extra=record)
        return response

    async def _error(self, raised: Exception) -> RequestError:
        # one that was raised here may have a cause; one of a replica is a cause, and Ray gives its
        # wrapper the same class
        own = isinstance(raised, RequestError) and not isinstance(raised, RayError)
        cause = raised if own else cluster.root_cause(raised)
        if isinstance(cause, RequestError):
            return cause
        if isinstance(cause, StorageError):
            return RequestError.of(cause, {})
        if isinstance(raised, TimeoutError):
            limit = f"serve.request_timeout_s = {self.settings.request_timeout_s:g} s"
            return RequestError(504, f"no answer within {limit}", "timeout")
        if isinstance(raised, ClientDisconnect):
            return RequestError(400, "the client closed the connection")
        _log.error("a request failed: %s", storage.redact(str(raised)))
        return internal(raised)

    async def _score(self, request: Request, token: Token, record: dict[str, Any]) -> Response:
        preferred = "respond-async" in request.headers.get("prefer", "").lower()
        if preferred or self._is_too_late(request):
            self._batches()
            self.admission.check_open()
            async with asked(request, self.settings, self.budget, token.holds) as wanted:
                self._check_later(wanted, preferred)
            applied = {"Preference-Applied": "respond-async"} if preferred else {}
            return await self._score_later(wanted, applied)
        late: Asked | None = None
        with self.admission.admitted(token.holds):
            try:
                async with (
                    asyncio.timeout(self.settings.request_timeout_s),
                    asked(request, self.settings, self.budget, token.holds) as wanted,
                ):
                    late = wanted
                    return await self._prediction(wanted, token, record)
            except (TimeoutError, RequestError) as error:
                timed_out = isinstance(error, TimeoutError) or error.error_type == "timeout"
                if late is None or not timed_out or not self._can_be_later(late):
                    raise
        return await self._score_later(late, {})

    async def _prediction(self, wanted: Asked, token: Token, record: dict[str, Any]) -> Response:
        """Return the prediction; log its parts and count it."""
        record["video_id"] = wanted.video_id
        if wanted.upload is not None:
            record["size_bytes"] = wanted.upload.size_bytes
        self._check(wanted)
        started = time.monotonic()
        with self.admission.measured():
            row, version = await self._row(wanted, token)
        record |= {
            name: row[name] for name in ("size_bytes", "decode_ms", "sample_ms", "recognize_ms")
        }
        self.metrics.scored(row, time.monotonic() - started)
        return JSONResponse(row, headers={MODEL_HEADER: version})

    def _is_too_late(self, request: Request) -> bool:
        """Whether the prediction would be late, and the request can become a batch instead."""
        is_json = request.headers.get("content-type", "").startswith("application/json")
        return is_json and self.batches is not None and self.admission.late_s > 0

    def _can_be_later(self, wanted: Asked) -> bool:
        """Whether a batch of one can answer: the endpoint keeps the video's URI, but no options."""
        no_options = not wanted.options.model_fields_set - {"uri"}
        return self.batches is not None and wanted.upload is None and no_options

    def _check_later(self, wanted: Asked, preferred: bool) -> None:
        if self._can_be_later(wanted):
            return
        if wanted.upload is not None:
            raise RequestError(400, "respond-async needs a uri: an upload is not kept")
        if not preferred:  # too late, which is not its fault
            why = "the requests in hand take too long; try again later"
            raise RequestError(429, why, retry_after_s=max(1.0, self.admission.late_s))
        raise RequestError(400, "respond-async takes no options besides the uri")

    async def _score_later(self, wanted: Asked, headers: dict[str, str]) -> Response:
        """Make a batch of one and return it, with status 202."""
        line = BatchLine(custom_id=wanted.video_id, uri=wanted.source.uri)
        batch = await self._batches().create.remote(None, [line], None)
        headers = {"Location": f"/v1/batches/{batch.id}"} | headers
        return JSONResponse(batch.model_dump(mode="json"), 202, headers)

    def _check(self, wanted: Asked) -> None:
        card, options = self.card, wanted.options
        for name, given, most in (
            ("k", options.k, card.num_frames),
            ("top", options.top, len(card.classes)),
        ):
            if given is not None and given > most and name in options.model_fields_set:
                raise RequestError(400, f"{name}: {given} is above {most}, the most that there are")
        if options.k is not None and options.k % card.clip_frames:
            clip = f"the recogniser takes clips of {card.clip_frames} frames"
            raise RequestError(400, f"k: {options.k} is not a multiple; {clip}")

    async def _row(self, wanted: Asked, token: Token) -> tuple[dict[str, Any], str]:
        options = wanted.options
        answer = await self.graph.score(
            Video(
                wanted.source,
                wanted.video_id,
                wanted.upload,
                options.k,
                options.top,
                options.frames,
                share=token.holds,
            )
        )
        identity = wanted.identity
        if (file := answer.file) is not None:
            identity |= {
                "size_bytes": file.size_bytes,
                "etag": file.etag,
                "modified": file.modified.isoformat() if file.modified else None,
            }
        if answer.error is not None:
            raise RequestError.of(answer.error, plain_row(identity))
        model = model_of(answer.version)
        row = plain_row({"model": model} | identity | answer.columns)
        if not options.scores:
            row.pop("scores", None)
        return row, model
