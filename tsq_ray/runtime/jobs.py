"""Ray jobs: submit a command line to a cluster and follow it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tsq_ray.errors import RunFailed
from tsq_ray.runtime.cluster import one_line


def submit_job(
    argv: Sequence[str], address: str | None, env: Mapping[str, str] | None = None
) -> str:
    """Submit `tsq ARGV` as a Ray job, together with this package, and return the job's id.

    Raises RunFailed if the cluster does not answer.
    """
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    named_by = (
        "RAY_ADDRESS" if where == os.environ.get("RAY_ADDRESS") and not address else "--address"
    )
    package = str(Path(__file__).parents[1])
    try:
        client = JobSubmissionClient(where)
        return client.submit_job(
            entrypoint=shlex.join(["python", "-m", "tsq_ray", *argv, "--address", "auto"]),
            runtime_env={"py_modules": [package], "env_vars": dict(env or {})},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunFailed(
            f"--submit to {where}: {one_line(error)}; "
            f"check {named_by} and that the cluster's dashboard is up"
        ) from error


def follow_job(job_id: str, address: str | None) -> str:
    """Print a job's log until it ends and return its final status.

    Raises RunFailed if the user interrupts; the job keeps running.
    """
    try:
        return _follow(job_id, address)
    except KeyboardInterrupt:
        see, end = f"ray job logs --follow {job_id}", f"ray job stop {job_id}"
        raise RunFailed(
            "stopped following the job, which keeps running: "
            f"follow it with `{see}`, stop it with `{end}`"
        ) from None


def _follow(job_id: str, address: str | None) -> str:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(
        address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    )
    shown = 0
    while True:
        status = client.get_job_status(job_id)
        logs = client.get_job_logs(job_id)
        sys.stdout.write(logs[shown:])
        sys.stdout.flush()
        shown = len(logs)
        if status.is_terminal():
            return str(status.value)
        time.sleep(1)
