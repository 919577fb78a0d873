"""`--submit`: run a command as a Ray job."""

from __future__ import annotations

import sys

import typer

from tsq_ray.console import without_options


def submit_command(address: str | None) -> None:
    """Submit this command line to a cluster as a job and follow it.

    Exits with code 1 if the job fails.
    """
    from tsq_ray.runtime.jobs import follow_job, submit_job

    argv = without_options(sys.argv[1:], flags=("--submit",), options=("--address",))
    job = submit_job(argv, address)
    print(f"job: {job}", file=sys.stderr)  # noqa: T201
    status = follow_job(job, address)
    print(f"job {job}: {status}", file=sys.stderr)  # noqa: T201
    if status != "SUCCEEDED":
        raise typer.Exit(1)
