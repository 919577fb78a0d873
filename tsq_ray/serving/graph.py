"""The Serve graph as its callers see it: decoder -> sampler -> recogniser.

Frames pass from replica to replica through the object store, not through the caller: each stage
returns a reference, which the next stage fetches. If a replica is lost, the fetch fails and the
caller sees the error. If a response were passed as an argument instead, Serve's router would take
the lost replica for one of the next stage and retry forever.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tsq_ray.config import Config
from tsq_ray.decode import VideoSource
from tsq_ray.errors import TsqError, VideoError
from tsq_ray.rows import Answer
from tsq_ray.schema import TOP_LABELS
from tsq_ray.serving.requests.shares import WHOLE, Share
from tsq_ray.storage import StoredFile, sha256_of

if TYPE_CHECKING:
    from tsq_ray.serving.requests.uploads import Upload

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0
STAGES = ("decoder", "sampler", "recognizer")


class WrongVersion(TsqError):
    """A stage was called for a version other than its own.

    Stages of different versions never contribute to one answer.
    """


class InputLost(TsqError):
    """The input of a stage is gone, with the replica or node that held it."""


class UploadOutOfReach(TsqError):
    """The decoder is on another node, and the upload's node accepts no task that would read it."""


class NoAnswer(TsqError):
    """A stage did not answer within the time limit of its hop."""


class Busy(TsqError):
    """The decoder is already fetching as many videos as it may.

    Further ones wait with the caller, not in the decoder, where they would keep uploads out.
    """


@dataclass(frozen=True)
class Video:
    """A video to score, and what to return about it."""

    source: VideoSource
    video_id: str
    """Seeds the random baseline."""
    upload: Upload | None = None
    """The file, if it was uploaded; `source.uri` is then its name."""
    budget: int | None = None
    """Most frames to choose; None for the number in the settings."""
    top: int = TOP_LABELS
    """Number of best classes."""
    with_frames: bool = False
    """Whether to return the chosen frames as JPEG."""
    in_batch: bool = False
    """Whether it belongs to a batch, whose files may take longer to fetch."""
    share: Share = WHOLE
    """The client, and its share of a decoder's fetches."""


@dataclass(frozen=True)
class StageResult:
    """What a stage passes on: a reference to its result, or the failure."""

    result: Any
    version: str
    file: StoredFile | None = None
    """What storage reports about a video that was fetched."""


@dataclass(frozen=True)
class TimeLimits:
    """Limits in seconds: per hop, including waiting, and for all attempts at a video."""

    decode: float
    network: float
    total: float
    recognize: float
    """Limit of the last hop, which for a server includes `recognizer.patience_s`."""

    @classmethod
    def of(cls, config: Config, total: float | None = None) -> TimeLimits:
        """Return the limits of these settings; `total` defaults to `serve.request_timeout_s`."""
        network, server = config.serve.request_timeout_s, config.recognizer
        asking = 2 * server.patience_s + server.timeout_s if server.kind == "openai" else 0.0
        return cls(config.decode.timeout_s + network, network, total or network, network + asking)


_SHORT_WAITS_S = {WrongVersion: 0.05, Busy: 0.2}
"""Waits in seconds after a replica has answered that it cannot take this video now."""


def graph_version(digest: str, config: Config) -> str:
    """Return what identifies an answer: the bundle's sha256 and a hash of the settings."""
    parts: Any = {
        "decode": True,
        "encoders": True,
        "sampler": True,
        "resources": {"precision", "resize"},
        "recognizer": {"url"},
    }
    settings = config.model_dump(mode="json", include=parts)
    return f"{digest}+{sha256_of(json.dumps(settings, sort_keys=True).encode())[:16]}"


def model_of(version: str) -> str:
    """Return the bundle's sha256 of a version."""
    return version.partition("+")[0]


@dataclass
class Graph:
    """The caller's view of the three deployments in sequence."""

    decoder: Any
    """A Serve handle, like the next two."""
    sampler: Any
    recognizer: Any
    limits: TimeLimits
    version: str | None = None
    """The only version whose answers are accepted; None: any."""
    answered: dict[str, float] = field(default_factory=dict)
    """When each stage last answered, by the monotonic clock."""

    async def score(self, video: Video) -> Answer:
        """Score one video; a video that cannot be used is an answer too.

        Retries only if a replica is dead or unavailable, or does not answer within a hop's limit;
        after `limits.total` seconds the answer is a failure `unavailable`. Raises any other error
        of a stage.
        """
        deadline, wait_s = time.monotonic() + self.limits.total, _FIRST_WAIT_S
        while True:
            try:
                return await self._try(video)
            except Exception as error:
                if not is_retryable(error):
                    raise
                upload = video.upload
                if upload and not upload.chunks and _has_cause(error, (UploadOutOfReach,)):
                    video = replace(video, upload=await upload.in_object_store())
                    continue
                if time.monotonic() + wait_s >= deadline:
                    why = (
                        f"no replica answered for {self.limits.total:g} s "
                        f"({type(error).__name__}); run again"
                    )
                    return Answer(error=VideoError("unavailable", why))
                short_s = next(
                    (_SHORT_WAITS_S[kind] for kind in _SHORT_WAITS_S if _has_cause(error, (kind,))),
                    0,
                )
            await asyncio.sleep(short_s or wait_s)
            if not short_s:
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def _try(self, video: Video) -> Answer:
        previous = await self._hop("decoder", self.limits.decode, video)
        if self.version not in (None, previous.version):
            raise WrongVersion(f"asked for version {self.version}, got {previous.version}")
        previous = await self._hop("sampler", self.limits.network, video, previous)
        answer: Answer = await self._hop("recognizer", self.limits.recognize, video, previous)
        return answer

    async def _hop(self, stage: str, limit_s: float, *arguments: Any) -> Any:
        """Call a stage; cancel the call at the time limit or if the caller gives up."""
        response = getattr(self, stage).remote(*arguments)
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                answer = await response
        except (TimeoutError, asyncio.CancelledError) as error:
            response.cancel()
            if limit.expired():  # a stage may raise a TimeoutError of its own
                raise NoAnswer(f"the {stage} did not answer for {limit_s:g} s") from error
            raise
        self.answered[stage] = time.monotonic()
        return answer

    async def ping(self, limit_s: float) -> None:
        """Ping every stage that has not answered for `limit_s` seconds."""

        async def ask(stage: str) -> None:
            handle = getattr(self, stage)
            response = handle.version.remote()
            try:
                async with asyncio.timeout(limit_s):
                    await response
                self.answered[stage] = time.monotonic()
            except Exception:  # noqa: BLE001  the stage has not answered, whatever the reason
                response.cancel()

        silent = [stage for stage in STAGES if self.silent_s(stage) > limit_s]
        await asyncio.gather(*map(ask, silent))

    def silent_s(self, stage: str) -> float:
        """Return the seconds since a stage last answered; infinite if it never did."""
        return time.monotonic() - self.answered.get(stage, -float("inf"))


def is_retryable(error: BaseException) -> bool:
    """Return whether a replica, its node or its data is lost or not available yet."""
    from ray import exceptions
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    return _has_cause(
        error,
        (
            exceptions.RayActorError,
            exceptions.ObjectLostError,
            exceptions.NodeDiedError,
            exceptions.WorkerCrashedError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
            InputLost,
            UploadOutOfReach,
            *_SHORT_WAITS_S,
            NoAnswer,
        ),
    )


def _has_cause(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kinds):
            return True
        seen = getattr(seen, "cause", None) or seen.__cause__
    return False


def handles(app: str) -> dict[str, Any]:
    """Return the handles of the three stages of a running application."""
    from ray import serve

    return {name: serve.get_deployment_handle(name.capitalize(), app) for name in STAGES}


Ongoing = Mapping[str, int]
"""Limit on the requests that a replica of each stage processes at a time."""
