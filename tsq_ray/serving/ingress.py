"""The endpoint's HTTP interface: scoring, batches, models, health, and its documentation.

Predictions are returned as JSON, errors as problem details.
"""

# `serve.ingress` pickles the routes by value while this module is being imported: all they use must
# be defined above them. No `from __future__ import annotations`: FastAPI could not resolve them.

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
from tsq_ray.rows import Row, plain_row
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
from tsq_ray.serving.requests.parse import ScoreRequest, read_batch_request, read_score_request
from tsq_ray.serving.requests.problems import MODEL_HEADER, RequestError, problem
from tsq_ray.serving.requests.shares import Quota
from tsq_ray.serving.requests.tokens import AboveRate, Access, Token

_log = logging.getLogger("ray.serve")
_PING_S, _READY_S = 5.0, 30.0

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
Work = Callable[[Request, Token, dict[str, Any]], Awaitable[Response]]


def _max_replicas() -> int:
    """Return the largest number of replicas that this deployment may have."""
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
        self.access = Access(token, settings.tokens_file, _max_replicas())
        self.admission = Admission(settings.max_queued_requests, settings.request_timeout_s)
        one, total = settings.max_upload_mb * 2**20, settings.max_upload_total_mb * 2**20
        self.upload_quota = Quota(int(total), minimum=int(one))
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
            admission, quota = self.admission, self.upload_quota
            self.metrics.in_flight(admission.in_flight, quota.used, admission.expected_wait_s)
            await asyncio.sleep(_PING_S if self._silent_stage() is None else _PING_S / 10)

    def _silent_stage(self) -> str | None:
        """Return a stage that has not answered recently, if any."""
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
        if (silent := self._silent_stage()) is not None:
            raise RequestError(503, f"the {silent} has not answered recently")
        return JSONResponse({"status": "ok"})

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi(self, request: Request) -> JSONResponse:
        """Describe the interface."""
        app = request.app
        app.openapi_schema = app.openapi_schema or document(app.routes)
        return JSONResponse(app.openapi_schema)

    @api.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """Show a page for trying the endpoint; it needs no token, but its requests do."""
        return start_page()

    @api.get("/docs", include_in_schema=False)
    async def docs(self) -> Response:
        """Show the interface."""
        return docs_page()

    @api.get("/docs/{name}", include_in_schema=False)
    async def docs_file(self, name: str) -> Response:
        """Return a file that the page at /docs loads."""
        found = docs_asset(name)
        if found is None:
            raise HTTPException(404)
        return found

    @api.get("/v1/models", response_model=ModelList, responses={401: PROBLEMS[401]})
    async def models(self, request: Request, bearer: Bearer = None) -> Response:
        """List the served models, with their classes and settings."""
        return await self._observed(request, bearer, self._models)

    async def _models(self, _: Request, __: Token, ___: dict[str, Any]) -> Response:
        return JSONResponse({"models": [self.card.model_dump()]})

    @api.post("/v1/score", **SCORE)
    async def score(self, request: Request, bearer: Bearer = None) -> Response:
        """Label one video: the file as the body, a form with a `file`, or JSON with a `uri`."""
        return await self._observed(request, bearer, self._score)

    @api.post("/v1/batches", **BATCHES)
    async def create_batch(self, request: Request, bearer: Bearer = None) -> Response:
        """Score the videos of a manifest, or of JSON lines {"custom_id", "uri"}, in the background.

        With the header Idempotency-Key, a repeated request returns the same batch.
        """
        return await self._observed(request, bearer, self._create_batch)

    async def _create_batch(self, request: Request, token: Token, _: dict[str, Any]) -> Response:
        batches = self._batches()
        self.admission.check_open()
        quota, share = self.upload_quota, token.client_share
        parsed, lines = await read_batch_request(request, self.settings, quota, share)
        key = request.headers.get("idempotency-key")
        owned = f"{token.name}/{key}" if key else None
        return _json(await batches.create.remote(parsed, lines, owned))

    def _batches(self) -> Any:
        if self.batches is None:
            raise RequestError(404, "this endpoint keeps no batches: serve.batches_uri is not set")
        return self.batches

    @api.get("/v1/batches", response_model=BatchList, responses=REFUSALS)
    async def list_batches(
        self, request: Request, limit: int = 20, after: str | None = None, bearer: Bearer = None
    ) -> Response:
        """List at most `limit` batches (1 to 100), newest first; `after`: those older than it."""

        async def work(*_: object) -> Response:
            if not 1 <= limit <= 100:
                raise RequestError(400, f"limit: {limit} is not in 1..100")
            return _json(await self._batches().newest.remote(limit, after))

        return await self._observed(request, bearer, work)

    @api.get("/v1/batches/{batch}", response_model=Batch, responses=REFUSALS)
    async def get_batch(
        self, request: Request, batch: str, verify: bool = False, bearer: Bearer = None
    ) -> Response:
        """Return a batch; with `verify`, also whether its rows add up."""

        async def work(*_: object) -> Response:
            return _json(await self._batches().get.remote(batch, verify))

        return await self._observed(request, bearer, work)

    @api.post("/v1/batches/{batch}/cancel", response_model=Batch, responses=REFUSALS)
    async def cancel_batch(self, request: Request, batch: str, bearer: Bearer = None) -> Response:
        """Cancel a batch; the rows it already has are kept."""

        async def work(*_: object) -> Response:
            return _json(await self._batches().cancel.remote(batch))

        return await self._observed(request, bearer, work)

    async def _observed(
        self, request: Request, bearer: HTTPAuthorizationCredentials | None, work: Work
    ) -> Response:
        """Check the token, do the work, turn errors into answers; log and count the answer."""
        started = time.monotonic()
        headers: dict[str, str] = {}
        record: dict[str, Any] = {"request_id": request_id(request), "path": request.url.path}
        error: RequestError | None = None
        try:
            token = self.access.client(bearer.credentials if bearer else None)
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
        return self.record_answer(record, response, error, time.monotonic() - started)

    def record_answer(
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
        # an error raised here may have a cause; a replica's error is the cause of a Ray wrapper of
        # the same class
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
        quota, share = self.upload_quota, token.client_share
        preferred = "respond-async" in request.headers.get("prefer", "").lower()
        if preferred or self._would_be_late(request):
            self._batches()
            self.admission.check_open()
            async with read_score_request(request, self.settings, quota, share) as parsed:
                self._check_can_become_batch(parsed, preferred)
            applied = {"Preference-Applied": "respond-async"} if preferred else {}
            return await self._score_as_batch(parsed, applied)
        accepted: ScoreRequest | None = None
        with self.admission.admitted(share):
            try:
                async with (
                    asyncio.timeout(self.settings.request_timeout_s),
                    read_score_request(request, self.settings, quota, share) as parsed,
                ):
                    accepted = parsed
                    return await self._prediction(parsed, token, record)
            except (TimeoutError, RequestError) as error:
                timed_out = isinstance(error, TimeoutError) or error.error_type == "timeout"
                if accepted is None or not timed_out or not self._can_become_batch(accepted):
                    raise
        return await self._score_as_batch(accepted, {})

    async def _prediction(
        self, parsed: ScoreRequest, token: Token, record: dict[str, Any]
    ) -> Response:
        """Return the prediction; log its parts and count it."""
        record["video_id"] = parsed.video_id
        if parsed.upload is not None:
            record["size_bytes"] = parsed.upload.size_bytes
        self._check_options(parsed)
        started = time.monotonic()
        with self.admission.measured():
            row, version = await self._row(parsed, token)
        record |= {
            name: row[name] for name in ("size_bytes", "decode_ms", "sample_ms", "recognize_ms")
        }
        self.metrics.scored(row, time.monotonic() - started)
        return JSONResponse(row, headers={MODEL_HEADER: version})

    def _would_be_late(self, request: Request) -> bool:
        """Whether the prediction would be late and the request might become a batch instead."""
        is_json = request.headers.get("content-type", "").startswith("application/json")
        return is_json and self.batches is not None and self.admission.late_s > 0

    def _can_become_batch(self, parsed: ScoreRequest) -> bool:
        """Whether a batch of one can answer: the endpoint stores a URI but no upload or options."""
        no_options = not parsed.options.model_fields_set - {"uri"}
        return self.batches is not None and parsed.upload is None and no_options

    def _check_can_become_batch(self, parsed: ScoreRequest, preferred: bool) -> None:
        if self._can_become_batch(parsed):
            return
        if parsed.upload is not None:
            raise RequestError(400, "respond-async needs a uri: uploads are not stored")
        if not preferred:  # the client did not ask for a batch
            why = "the requests in flight take too long; try again later"
            raise RequestError(429, why, retry_after_s=max(1.0, self.admission.late_s))
        raise RequestError(400, "respond-async takes no options but the uri")

    async def _score_as_batch(self, parsed: ScoreRequest, headers: dict[str, str]) -> Response:
        """Create a batch of one and return it, with status 202."""
        line = BatchLine(custom_id=parsed.video_id, uri=parsed.source.uri)
        batch = await self._batches().create.remote(None, [line], None)
        headers = {"Location": f"/v1/batches/{batch.id}"} | headers
        return JSONResponse(batch.model_dump(mode="json"), 202, headers)

    def _check_options(self, parsed: ScoreRequest) -> None:
        card, options = self.card, parsed.options
        for name, value, limit in (
            ("k", options.k, card.num_frames),
            ("top", options.top, len(card.classes)),
        ):
            if value is not None and value > limit and name in options.model_fields_set:
                raise RequestError(400, f"{name}: {value} is above {limit}, the maximum")
        if options.k is not None and options.k % card.clip_frames:
            clip = f"{card.clip_frames}, the recogniser's clip length in frames"
            raise RequestError(400, f"k: {options.k} is not a multiple of {clip}")

    async def _row(self, parsed: ScoreRequest, token: Token) -> tuple[Row, str]:
        options = parsed.options
        answer = await self.graph.score(
            Video(
                parsed.source,
                parsed.video_id,
                parsed.upload,
                options.k,
                options.top,
                options.frames,
                share=token.client_share,
            )
        )
        identity = parsed.identity
        if (file := answer.file) is not None:
            identity |= {
                "size_bytes": file.size_bytes,
                "etag": file.etag,
                "modified": file.modified,
            }
        model = model_of(answer.version)
        if answer.error is not None:
            raise RequestError.of(answer.error, plain_row(identity), model)
        row = plain_row({"model": model} | identity | answer.columns)
        if not options.scores:
            row.pop("scores", None)
        return row, model
