"""A bulk run on the cluster: videos pass through Ray Data stages, rows are written as parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tsq_ray.manifest import VideoRows
from tsq_ray.runs.bulk import BulkRun
from tsq_ray.runtime import cluster, parts, progress
from tsq_ray.runtime.nodes import Pool
from tsq_ray.runtime.session import Session

_PASSES = 3


@dataclass(frozen=True)
class Work:
    """What a run does with its videos, and the pools that do it."""

    workers: Pool
    """The pool that the videos are sent to."""
    writers: Pool
    stage: Callable[[Any], Any]
    """Dataset of manifest rows -> dataset of transport tables."""
    schema: pa.Schema
    """Schema of the rows."""
    counts: Any
    """The Counts actor that the workers report to."""


def run_bulk(
    what: str,
    run: BulkRun,
    work: Work,
    session: Session,
    *,
    ticks: Sequence[Callable[[], None]] = (),
    app: str = "",
) -> dict[str, float]:
    """Process the videos of `run.todo`, publish their rows and return the seconds by stage.

    The seconds are summed over the rows. Rows lost in transit, with a node for example, are
    computed again. `ticks` are called twice a second; `app` names the run's Serve application, if
    it has one. Raises RunFailed if the cluster or storage fails, if the run has waited for room on
    the cluster for longer than `session.wait_s`, or if another run has taken over the folder.
    """
    import ray

    seconds: Counter[str] = Counter()
    todo = run.todo
    options: dict[str, Any] = {"session": session, "ticks": (run.stop_if_lost, *ticks), "app": app}
    for _ in range(_PASSES):
        try:
            written, spent = progress.run_with_progress(
                _publishing(run, work, todo), work.counts, len(run.todo), what, **options
            )
        except ray.exceptions.RayError as error:
            raise cluster.run_failed(error, what) from error
        seconds.update(spent)
        if written >= len(todo) or not (todo := run.find_todo()):
            break
    return dict(seconds)


def _publishing(
    run: BulkRun, work: Work, todo: VideoRows
) -> Callable[[], tuple[int, dict[str, float]]]:
    def publish() -> tuple[int, dict[str, float]]:
        totals: Counter[str] = Counter()
        rows = parts.part_rows(work.schema, run.config.output, len(todo))
        for data in parts.executions(todo, work.workers.start):
            totals.update(
                parts.write_parts(
                    work.stage(data), work.writers, run.out, work.schema, run.config.output, rows
                )
            )
        written = int(totals.pop(parts.ROWS, 0))
        return written, {name: value for name, value in totals.items() if value > 0}

    return publish
