"""Ray jobs: submit a command line to a cluster, follow it, list and stop jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsq_ray import log
from tsq_ray.errors import RunError, RunFailed
from tsq_ray.runtime.cluster import one_line, ray_token

_DEFAULT = "http://127.0.0.1:8265"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_RETRY_S, _LOST_S, _AGENT_S = 2.0, 600.0, 60.0
"""Seconds between attempts to reconnect to a cluster, and until giving up."""
_STOP_TIMEOUT_S = 60.0
_HEARTBEAT_S = 20.0
"""A connection whose peer leaves a ping unanswered for half of this time is lost."""


@dataclass(frozen=True)
class Job:
    """A job and how it ended."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    started: float | None
    """Seconds since the epoch; None before the start."""
    ended: float | None
    exit_code: int | None
    """The command's own, 0, 1 or 2; None while it runs."""
    message: str
    """What Ray says about the status."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in _ENDED

    @property
    def says_more(self) -> bool:
        """Whether the message adds to the job's own output."""
        return self.status == "FAILED" and "exit code" not in self.message


class Jobs:
    """The jobs of a cluster."""

    def __init__(self, address: str | None = None) -> None:
        """Connect to a dashboard; `address` defaults to RAY_ADDRESS, then to this machine.

        Raises RunFailed if it does not answer or rejects the token.
        """
        variable = os.environ.get("RAY_ADDRESS")
        self.address = address or variable or _DEFAULT
        self._shown = f" --address {address}" if address else ""
        named_by = "RAY_ADDRESS" if variable and not address else "--address"
        self._client: Any = _client(self.address, named_by)

    def submit(self, name: str, argv: Sequence[str], folder: str) -> tuple[str, bool]:
        """Start `tsq ARGV` in a copy of `folder`, together with this package.

        Return the job's id, `name` with the number of the attempt, and whether it is new: while a
        job of this name has not ended, no other is started.
        """
        earlier = [job for job in self.all() if job.id.rpartition("-")[0] == name]
        for job in earlier:
            if not job.is_over:
                return job.id, False
        attempts = [
            int(number) for job in earlier if (number := job.id.rpartition("-")[2]).isdecimal()
        ]
        job_id = f"{name}-{max(attempts, default=0) + 1}"
        environment = {"working_dir": folder, "py_modules": [str(Path(__file__).parents[1])]}
        try:
            self._start(job_id, shlex.join(["python", "-m", "tsq_ray", *argv]), environment)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            if "already exists" in str(error):  # the same command, a moment ago
                return job_id, False
            raise RunFailed(f"--submit to {self.address}: {one_line(error)}") from error
        return job_id, True

    def _start(self, job_id: str, entrypoint: str, environment: dict[str, Any]) -> None:
        """Submit a job; wait for the agent that starts jobs if the cluster has only just begun."""
        deadline = time.monotonic() + _AGENT_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=entrypoint, submission_id=job_id, runtime_env=environment
                )
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_S)

    def follow(self, job_id: str, write: Callable[[str], object]) -> Job:
        """Pass on a job's output until it ends, reconnecting if the connection is lost.

        Raises RunError for an unknown job; RunFailed if the user interrupts, which does not stop
        the job, or if the cluster stays unreachable.
        """
        attach, stop = (f"tsq jobs {what} {job_id}{self._shown}" for what in ("attach", "stop"))
        try:
            return _Follower(self, job_id, write).follow()
        except KeyboardInterrupt:
            raise RunFailed(
                "stopped following the job, which keeps running: "
                f"follow it with `{attach}`, stop it with `{stop}`"
            ) from None
        except ConnectionError as error:
            raise RunFailed(
                f"{self.address} has not answered for {_LOST_S:g} s ({one_line(error)}); the job "
                f"may still be running: follow it with `{attach}`"
            ) from error

    def all(self) -> list[Job]:
        """Return the jobs, the newest first. Raises RunFailed if the cluster does not say."""
        try:
            listed = self._client.list_jobs()
        except (OSError, RuntimeError) as error:
            raise RunFailed(f"{self.address}: {one_line(error)}") from error
        found = [_job(job) for job in listed if job.submission_id]
        return sorted(found, key=lambda job: job.started or time.time(), reverse=True)

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises RunError if its id is unknown, RunFailed if the cluster does not answer.
        """
        with self._explained(job_id):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """Return what a job has printed. Raises as `get` does."""
        with self._explained(job_id):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> Job:
        """Stop a job and wait for its end.

        Raises as `get` does, and RunFailed if it still runs after a minute.
        """
        with self._explained(job_id):
            self._client.stop_job(job_id)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while not (found := self.get(job_id)).is_over and time.monotonic() < deadline:
            time.sleep(0.5)
        if not found.is_over:
            raise RunFailed(
                f"job {job_id}: still {found.status} {_STOP_TIMEOUT_S:g} s after the request to "
                f"stop; look again with `tsq jobs list{self._shown}`"
            )
        return found

    @contextlib.contextmanager
    def _explained(self, job_id: str) -> Iterator[None]:
        """Turn what Ray's client raises about a job into an error of one line."""
        try:
            yield
        except OSError as error:  # as those of `requests` are
            raise RunFailed(
                f"connection to {self.address} lost, so nothing is known about job {job_id} "
                f"({one_line(error)}); run the same command again"
            ) from error
        except RuntimeError as error:
            if "status code 404" in str(error):
                listing = f"tsq jobs list{self._shown}"
                raise RunError(
                    f"{self.address} has no job {job_id!r}; list them with: {listing}"
                ) from error
            raise RunFailed(f"{self.address}: {one_line(error)}") from error


class _Follower:
    """Follows one job's output over connections that may be lost."""

    def __init__(self, jobs: Jobs, job_id: str, write: Callable[[str], object]) -> None:
        self.jobs, self.job_id, self.write = jobs, job_id, write
        self.shown = 0
        """Characters passed on so far."""

    def follow(self) -> Job:
        """Follow until the job ends. Raises ConnectionError if the cluster stays unreachable."""
        lost_at: float | None = None
        while True:
            try:
                found = self.jobs.get(self.job_id)
                if lost_at is not None:
                    log.say("connected again")
                    lost_at = None
                if found.is_over:
                    self._pass_on(self.jobs.logs(self.job_id), 0)
                    return found
                asyncio.run(self.tail())
            except (RunFailed, OSError, RuntimeError, _client_error()) as error:
                now = time.monotonic()
                if lost_at is None:
                    log.say(f"connection to {self.jobs.address} lost; trying again")
                    lost_at = now
                if now - lost_at > _LOST_S:
                    raise ConnectionError(one_line(error.__cause__ or error)) from error
            time.sleep(_RETRY_S)

    async def tail(self, heartbeat_s: float = _HEARTBEAT_S) -> None:
        """Pass on the output until the connection ends. Raises ConnectionError if it breaks.

        Ray's own client sends no heartbeat, and waits forever for a peer that is silently gone.
        """
        import aiohttp

        client, position = self.jobs._client, 0  # each connection replays all output
        url = f"{client._address}/api/jobs/{self.job_id}/logs/tail"
        async with (
            aiohttp.ClientSession(cookies=client._cookies, headers=client._headers) as session,
            session.ws_connect(url, ssl=client._ssl_context, heartbeat=heartbeat_s) as socket,
        ):
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    break
                position = self._pass_on(message.data, position)
            if socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                raise ConnectionError(f"no answer from {self.jobs.address}")

    def _pass_on(self, text: str, position: int) -> int:
        """Write what is new of the text at `position` in the output; return the end of the text."""
        end = position + len(text)
        if end > self.shown:
            self.write(text[max(0, self.shown - position) :])
            self.shown = end
        return end


def _client(address: str, named_by: str) -> Any:
    """Connect to a dashboard, with a token if it wants one."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    token = ray_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        try:
            return JobSubmissionClient(address)
        except AuthenticationError:
            if not headers:
                raise
            return JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        what = "does not accept the token" if token else "wants a token but got none"
        raise RunFailed(
            f"{address}: this cluster {what}; set RAY_AUTH_TOKEN to the cluster's token, or write "
            "it to ~/.ray/auth_token"
        ) from error
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise RunFailed(
            f"{address}: {one_line(error)}; check {named_by} and that the cluster's dashboard is up"
        ) from error


def _client_error() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError


def _job(found: Any) -> Job:
    status = str(getattr(found.status, "value", found.status))
    started, ended = (at / 1000 if at else None for at in (found.start_time, found.end_time))
    code = None
    if status in _ENDED:
        own = found.driver_exit_code
        code = 0 if status == "SUCCEEDED" else own if own in (1, 2) else 1
    message = " ".join(str(found.message or "").split())
    return Job(found.submission_id, status, found.entrypoint, started, ended, code, message)
