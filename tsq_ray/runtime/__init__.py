"""Ray for the stages that use it: a cluster, quiet logs, shared progress, parts, jobs. Imports ray only when called."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import runs, schema, storage
from tsq_ray.config import Config, OutputConfig
from tsq_ray.errors import RunFailed, StorageError, TsqError
from tsq_ray.manifest import VideoRef, VideoRows
from tsq_ray.runtime.ray_start import cluster as cluster
from tsq_ray.runtime.ray_start import one_line

T = TypeVar("T")
_POLL_S = 0.5
_PLAIN_EVERY_S = 15.0


def quiet_data(debug: bool = False) -> Any:
    """Ray Data's context with its own bars and chatter off: our progress is shown instead."""
    import ray

    # RETRIES have no named parameters; Ray Data's source names these very arguments as the way
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = debug
    context.execution_options.preserve_order = False
    # a cluster may wait long for GPUs to be free
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = 24 * 3600
    if not debug:
        for name in ("ray.data", "ray.train", "ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # a failed run ends with one line of ours, not with Ray Data's traceback before it
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return context


def root_cause(error: BaseException) -> BaseException:
    """What a Ray error is about: the exception the user's code raised, under Ray's wrappers."""
    seen = error
    while True:
        inner = getattr(seen, "cause", None) or seen.__cause__
        if inner is None or inner is seen:
            return seen
        seen = inner


def run_failed(error: BaseException, doing: str) -> TsqError:
    """A one-line error for what came out of Ray; an error of this package keeps its kind, but storage that fails in mid-run is a failed run."""
    cause = root_cause(error)
    if isinstance(cause, StorageError):
        return RunFailed(str(cause))
    if isinstance(cause, TsqError):
        return cause
    last = str(cause).strip().splitlines()
    return RunFailed(
        f"{doing} failed: {type(cause).__name__}: {last[-1] if last else ''}; give the same command again to go on (--debug shows more)"
    )


@dataclass
class Counts:
    """Shared counters of a run; an instance lives in a Ray actor."""

    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, statuses: Sequence[str | None]) -> None:
        """One entry a video: None for ok, else the error type."""
        self.ok += sum(status is None for status in statuses)
        self.failed.update(status for status in statuses if status is not None)

    def get(self) -> tuple[int, dict[str, int]]:
        """Videos ok, failed ones by type."""
        return self.ok, dict(self.failed)


def start_counts() -> Any:
    """A Counts actor for `run_with_progress` and the workers."""
    import ray

    return ray.remote(num_cpus=0)(Counts).remote()


def run_with_progress(work: Callable[[], T], counts: Any, total: int, what: str, show: bool = True, unit: str = "videos") -> T:
    """Run `work` in a thread and show videos done / failed / left, videos/s and ETA: a bar on a terminal, plain lines elsewhere."""
    import ray

    result: list[T] = []
    raised: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001  handed to the caller below
            raised.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    with progress_display(total, what, show, unit) as update:
        while thread.is_alive():
            thread.join(_POLL_S)
            with contextlib.suppress(ray.exceptions.RayError):
                ok, failed = ray.get(counts.get.remote(), timeout=10)
                update(ok, sum(failed.values()))
    if raised:
        raise raised[0]
    return result[0]


@contextlib.contextmanager
def progress_display(total: int, what: str, show: bool = True, unit: str = "videos") -> Iterator[Callable[[int, int], None]]:
    """Yields update(ok, failed). Output goes to stderr, so that --json keeps stdout to itself."""
    began: list[
        tuple[float, int]
    ] = []  # when the first ones were done, and how many: before that is start-up, which says nothing of the rate

    def line(ok: int, failed: int) -> str:
        now, done = time.monotonic(), ok + failed
        left = max(0, total - done)
        text = f"{what}: {done}/{total} done, {failed} failed, {left} left"
        if done and not began:
            began.append((now, done))
        if not began or done <= began[0][1]:
            return text
        rate = (done - began[0][1]) / (now - began[0][0])
        return f"{text}, {rate:.2f} {unit}/s, ETA {left / rate:.0f} s"

    if not show:
        yield lambda ok, failed: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(BarColumn(30), TextColumn("{task.description}"), console=Console(stderr=True), transient=True)
        with bar:
            task = bar.add_task(line(0, 0), total=total)
            yield lambda ok, failed: bar.update(task, completed=ok + failed, description=line(ok, failed))
        return
    last = [0.0]

    def plain(ok: int, failed: int) -> None:
        if time.monotonic() - last[0] >= _PLAIN_EVERY_S and (ok or failed):
            last[0] = time.monotonic()
            print(line(ok, failed), file=sys.stderr, flush=True)  # noqa: T201

    yield plain


_MOST_BLOCKS = 5000  # each costs the driver some milliseconds
RETRIES: dict[str, int] = {"max_restarts": 100, "max_task_retries": 60}
"""Of a stage's workers. Ray Data's own are endless: a batch that kills its worker each time would never end the run.

A lost node takes many: until Ray believes that it is gone, 10 to 30 s, every task sent to it is tried again about once a second.
"""


def block_rows(num_videos: int, workers: int, batch_size: int, rows_per_file: int) -> int:
    """Rows of a block: what a worker takes at a time.

    A batch, less where few videos are to be shared out. More where there are so many that blocks would swamp the driver: then so many that
    blocks fill a part, or parts a block, without a rest.
    """
    share = -(-num_videos // (4 * max(1, workers)))
    few, least = max(1, min(batch_size, share)), -(-num_videos // _MOST_BLOCKS)
    if least <= few:
        return few
    return rows_per_file // (rows_per_file // least) if least <= rows_per_file else -(-least // rows_per_file) * rows_per_file


def todo_dataset(ray: Any, todo: Sequence[VideoRef], rows: int) -> Any:
    """The videos to do as a Ray dataset of manifest rows, in blocks of `rows`."""
    return blocks_dataset(ray, VideoRows.of(todo).table.replace_schema_metadata(None), rows)


def blocks_dataset(ray: Any, table: pa.Table, rows: int) -> Any:
    """A table as a Ray dataset in blocks of `rows`.

    Not read from a file: reading asks for a whole free CPU, which a small cluster full of workers never has. And not by
    `from_arrow`: that sends each block to a task of its own to count its rows, three times the time and 50 kB a block kept in the driver.
    """
    return ray.data.from_blocks([table.slice(start, rows) for start in range(0, len(table), rows)])


def refs_of(table: pa.Table) -> list[VideoRef]:
    """Manifest rows of a batch."""
    return list(VideoRows(table))


STAGE_SECONDS = (DECODE_S, ENCODE_S, SAMPLE_S, RECOGNIZE_S) = ("_decode_s", "_encode_s", "_sample_s", "_recognize_s")
"""Columns that carry a row's seconds in each stage up to `write_parts`; they are not written."""


def transport_table(rows: Sequence[Mapping[str, Any]], arrow: pa.Schema) -> pa.Table:
    """Rows of a run as a table that Ray Data leaves alone: tensors as plain lists, and the seconds that each row took."""
    table = schema.to_storage(schema.table_from_rows(rows, arrow))
    for name in STAGE_SECONDS:
        table = table.append_column(pa.field(name, pa.float64()), pa.array([row.get(name) or 0.0 for row in rows], pa.float64()))
    return table


def write_parts(data: Any, out: str, arrow: pa.Schema, output: OutputConfig, block: int = 1) -> dict[str, float]:
    """Run a dataset of transport tables and publish its rows as parts of the run folder; seconds by stage, summed over the rows.

    `block`: rows of its blocks. Ray Data gathers whole blocks up to what a part holds and would make a part of its own of the rest.
    RunFailed where a part cannot be written.
    """
    import ray

    data = data.map_batches(
        WritePart,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.1,
        **RETRIES,
        batch_size=max(1, output.rows_per_file // block) * min(block, output.rows_per_file),
        batch_format="pyarrow",
        fn_constructor_args=(out, arrow, output.compression),
    )
    totals: dict[str, float] = {}
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        for message in table[_ERROR].drop_null().to_pylist():
            raise RunFailed(message)
        for name in table.drop_columns(_ERROR).column_names:
            totals[name] = totals.get(name, 0.0) + pc.sum(table[name]).as_py()
    return {name: value for name, value in totals.items() if value > 0}


_WRITE_WAITS_S = (5, 10, 20, 40)
_ERROR = "error"


class WritePart:
    """Rows -> one part of the run folder, whole or not at all."""

    def __init__(self, out: str, arrow: pa.Schema, compression: str) -> None:
        self.out, self.arrow, self.compression = out, arrow, compression

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Transport table -> one row of seconds by stage, with what storage said where it failed: an exception would lose its cause on the way."""
        started = time.perf_counter()
        error = None
        try:
            self._publish(schema.from_storage(batch, self.arrow))
        except StorageError as failure:
            error = str(failure)
        seconds = {name.strip("_").removesuffix("_s"): pc.sum(batch[name]).as_py() for name in STAGE_SECONDS}
        columns = {name: pa.array([value]) for name, value in (seconds | {"write": time.perf_counter() - started}).items()}
        return pa.table(columns | {_ERROR: pa.array([error], pa.string())})

    def _publish(self, rows: pa.Table) -> None:
        """A bucket that is away for a moment must not cost the rows that are made, and with them the run."""
        for wait_s in () if storage.is_local(self.out) else _WRITE_WAITS_S:
            try:
                runs.write_part(self.out, rows, self.compression)
                return
            except StorageError as error:
                if error.error_type != "unavailable":
                    raise
            time.sleep(wait_s)
        runs.write_part(self.out, rows, self.compression)


def num_gpus(ray: Any, config: Config) -> int:
    """GPU workers: one a GPU of the cluster, at most as many as `resources.gpus` says."""
    there, most = int(ray.cluster_resources().get("GPU", 0)), config.resources.gpus
    return min(there, most) if most >= 0 else there


def share_cpus(total: float, workers: int, reserve: float = 0.5) -> float:
    """Logical CPUs for each of `workers`, so that `reserve` is left for reading and writing tasks on a small cluster."""
    return max(0.1, int((total - reserve) / max(1, workers) * 20) / 20)


def submit_job(argv: Sequence[str], address: str | None, env: Mapping[str, str] | None = None) -> str:
    """Submit `tsq ARGV` as a Ray job; its id. The package travels with it. RunFailed where the cluster does not answer."""
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    named_by = "RAY_ADDRESS" if where == os.environ.get("RAY_ADDRESS") and not address else "--address"
    package = str(Path(__file__).parents[1])
    try:
        client = JobSubmissionClient(where)
        return client.submit_job(
            entrypoint=_quote(["python", "-m", "tsq_ray", *argv, "--address", "auto"]),
            runtime_env={"py_modules": [package], "env_vars": dict(env or {})},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunFailed(f"--submit to {where}: {one_line(error)}; check {named_by} and that the cluster's dashboard is up") from error


def follow_job(job_id: str, address: str | None) -> str:
    """Print a job's log until it ends; its final status."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265")
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


def _quote(argv: Sequence[str]) -> str:
    import shlex

    return shlex.join(argv)
