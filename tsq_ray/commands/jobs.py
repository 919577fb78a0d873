"""`--submit`: run a command as a Ray job; and `tsq jobs`: list, attach, stop, logs."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsq_ray import log
from tsq_ray.console import show
from tsq_ray.errors import RunError
from tsq_ray.options import AsJson, Debug

if TYPE_CHECKING:
    from tsq_ray.config import Config
    from tsq_ray.runtime.jobs import Job, Jobs

SHIPPED = ("config", "labels", "classes", "annotations")
"""Parameters that name small files of this machine, which are shipped with the job."""
READ = ("manifest", "features", "sources", "encoder", "recognizer", "model", "uri")
WRITTEN = ("out",)
_MANIFESTS = ("manifest", "uri")
"""Those of READ that are shipped too, if they name a small file."""
_NOT_FOR_THE_JOB = ("submit", "address")
_NO_FILE = ("folders", "none")
"""Values of --labels that name no file."""
_NO_PATH = ("package:", "random:")
"""Prefixes of weights that are not a path; nor is `hub`."""
_SHIPPED_BYTES = 64 * 2**20
_INPUTS = "inputs"
"""Folder of the shipped files in the job's working directory."""

jobs = typer.Typer(help="Manage jobs started with --submit.", no_args_is_help=True)
Dashboard = Annotated[
    str | None,
    typer.Option("--address", help="The cluster's dashboard; default RAY_ADDRESS or this machine."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Its id, as --submit prints it.")]


def submit_command(context: typer.Context, settings: Config | None = None) -> None:
    """Run the command of this context as a job on the cluster and follow it.

    The same command attaches to its job if that is still running. Exits with the job's own exit
    code. `settings`: those that name weights which the command reads. Raises RunError if the job
    would need a file of this machine that is not shipped.
    """
    from tsq_ray.runtime.jobs import Jobs

    params = context.params
    with tempfile.TemporaryDirectory(prefix="tsq-job-") as folder:
        rewrite = _Rewrite(Path(folder), bool(params["shared_fs"]))
        argv = [str(context.info_name), *rewrite.arguments(context)]
        if settings is not None:
            _check_paths(settings, bool(params["shared_fs"]))
        name = f"tsq-{context.info_name}-{rewrite.digest(argv)}"
        client = Jobs(params["address"])
        job, is_new = client.submit(name, [*argv, "--address", "auto"], folder)
        log.say(f"job: {job}" if is_new else f"job: {job}, already running; following it")
        _follow(client, job, bool(params.get("as_json")))


class _Rewrite:
    """Rewrites a command line for the job: shipped files by their new names, paths absolute."""

    def __init__(self, folder: Path, shared_fs: bool) -> None:
        self.folder, self.shared_fs = folder / _INPUTS, shared_fs
        self.shipped: list[Path] = []

    def arguments(self, context: typer.Context) -> Iterator[str]:
        """Yield the arguments, in the order in which the command declares its parameters."""
        for param in context.command.params:
            name, value = str(param.name), context.params.get(str(param.name))
            # 0 is a value, although it equals False
            unset = value is None or value is False or value in ((), [], param.default)
            if name in _NOT_FOR_THE_JOB or unset:
                continue
            option = [param.opts[0]] if param.param_type_name == "option" else []
            if value is True:
                yield from option
                continue
            for item in value if isinstance(value, list | tuple) else [value]:
                yield from (*option, self._value(name, str(getattr(item, "value", item))))

    def _value(self, name: str, value: str) -> str:
        from tsq_ray import storage

        if name not in (*SHIPPED, *READ, *WRITTEN) or not storage.is_local(value):
            return value
        if name == "labels" and value in _NO_FILE:
            return value
        path = Path(storage.normalize(value))
        is_small = path.is_file() and path.stat().st_size <= _SHIPPED_BYTES
        if name in SHIPPED:
            return self._ship(path, name)
        if name in _MANIFESTS and is_small and not self.shared_fs:
            _check_videos(path)
            return self._ship(path, name)
        if self.shared_fs:
            return str(path)
        raise RunError(
            f"--submit: {name} {value!r} is on this machine, where the cluster cannot see it; "
            "use a URI such as s3://..., or --shared-fs if every node has this path too"
        )

    def _ship(self, path: Path, name: str) -> str:
        if not path.is_file():
            raise RunError(f"--{name}: no file {path}")
        if path.stat().st_size > _SHIPPED_BYTES:
            raise RunError(
                f"--{name}: {path} is too large to travel with a job "
                f"(at most {_SHIPPED_BYTES >> 20} MiB); put it where the cluster can read it"
            )
        self.folder.mkdir(exist_ok=True)
        shipped = self.folder / f"{len(self.shipped)}-{path.name}"
        shipped.write_bytes(path.read_bytes())
        self.shipped.append(shipped)
        return f"{_INPUTS}/{shipped.name}"

    def digest(self, argv: list[str]) -> str:
        """Return what identifies the command: its arguments and the content of shipped files."""
        digest = hashlib.sha256(json.dumps(argv).encode())
        for path in self.shipped:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:12]


def _check_videos(manifest: Path) -> None:
    """Raise RunError if a manifest to be shipped lists videos on this machine."""
    from tsq_ray.manifest import read_manifest
    from tsq_ray.storage import is_local

    uris = read_manifest(str(manifest)).rows.table["uri"].to_pylist()
    if local := [uri for uri in uris if is_local(uri)]:
        raise RunError(
            f"--submit: {len(local)} of the {len(uris)} videos of {manifest} are on this machine, "
            f"where the cluster cannot see them, for example {local[0]}; index URIs such as "
            "s3://..., or use --shared-fs if every node has these paths too"
        )


def _check_paths(settings: Config, shared_fs: bool) -> None:
    """Raise RunError for a path of this machine in the settings that the job could not read."""
    from tsq_ray.storage import is_local

    encoders = settings.encoders
    paths = [
        ("encoders.visual.weights", encoders.visual.weights),
        ("encoders.objects.weights", encoders.objects.weights),
        ("encoders.text.weights", encoders.text.weights),
        ("recognizer.weights", settings.recognizer.weights),
        *(("evaluate.word_vectors", path) for path in settings.evaluate.word_vectors),
    ]
    for name, path in paths:
        if path == "hub" or path.startswith(_NO_PATH) or not is_local(path):
            continue
        if not shared_fs:
            raise RunError(
                f"--submit: {name} = {path!r} is on this machine, where the cluster cannot see "
                "it; use a URI, or --shared-fs if every node has this path too"
            )
        if not Path(path).is_absolute():
            raise RunError(
                f"--submit: {name} = {path!r} is relative to this folder, and the job runs in "
                "another; give the absolute path"
            )


def _follow(client: Jobs, job: str, as_json: bool) -> None:
    """Show a job's output until it ends, then exit with its exit code unless that is 0.

    With `as_json` the output goes to stderr and the summary in it to stdout.
    """
    output = _Output(as_json)
    ended = client.follow(job, output.write)
    output.end()
    log.say(f"job {job}: {ended.status}" + (f": {ended.message}" if ended.says_more else ""))
    if ended.exit_code:
        raise typer.Exit(ended.exit_code)


class _Output:
    def __init__(self, as_json: bool) -> None:
        self.as_json, self.texts = as_json, list[str]()

    def write(self, text: str) -> None:
        stream = sys.stderr if self.as_json else sys.stdout
        stream.write(text)
        stream.flush()
        if self.as_json:
            self.texts.append(text)

    def end(self) -> None:
        """Print the summary, the last JSON object of the output."""
        lines = "".join(self.texts).splitlines()
        if "{" in lines and "}" in lines:
            last = len(lines) - 1 - lines[::-1].index("{")
            document = "\n".join(lines[last : lines.index("}", last) + 1])
            print(document)  # noqa: T201


@jobs.command("list")
def list_jobs(address: Dashboard = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the jobs, newest first."""
    from tsq_ray.runtime.jobs import Jobs

    found = Jobs(address).all()
    shown: dict[str, Any] = {"jobs": [asdict(job) for job in found]}
    show(shown, as_json, "\n".join(map(_job_line, found)) or "no jobs")


def _job_line(job: Job) -> str:
    from tsq_ray.storage import redact

    begun = time.strftime("%F %T", time.localtime(job.started)) if job.started else "-"
    took = f"{(job.ended or time.time()) - job.started:.0f} s" if job.started else ""
    return f"{job.id}  {job.status}  {begun}  {took}  {redact(job.command)}"


@jobs.command("attach")
def attach(job: JobId, address: Dashboard = None, debug: Debug = False) -> None:
    """Show a job's output until it ends; exit with its exit code."""
    from tsq_ray.runtime.jobs import Jobs

    _follow(Jobs(address), job, as_json=False)


@jobs.command("stop")
def stop(job: JobId, address: Dashboard = None, debug: Debug = False) -> None:
    """Stop a job; its finished rows are kept, and the same command resumes."""
    from tsq_ray.runtime.jobs import Jobs

    ended = Jobs(address).stop(job)
    log.say(f"job {job}: {ended.status}")


@jobs.command("logs")
def logs(job: JobId, address: Dashboard = None, debug: Debug = False) -> None:
    """Print what a job has printed so far."""
    from tsq_ray.runtime.jobs import Jobs

    sys.stdout.write(Jobs(address).logs(job))
