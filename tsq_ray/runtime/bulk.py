"""A bulk run on the cluster: videos pass through Ray Data stages, rows are written as parts."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tsq_ray.manifest import VideoRows
from tsq_ray.runs.bulk import BulkRun
from tsq_ray.runtime import blocks, cluster, parts, progress
from tsq_ray.runtime.metrics import PublishedPart
from tsq_ray.runtime.nodes import Pool
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.session import Session

_PASSES = 3


@dataclass(frozen=True)
class Work:
    """What a run does with its videos, and the pools that it uses."""

    workers: Pool
    """The pool that the videos are sent to."""
    writers: Pool
    stage: Callable[[Any], Any]
    """Dataset of manifest rows -> dataset of transport tables."""
    schema: pa.Schema
    """Schema of the rows."""
    batch_rows: int
    """Rows that a worker yields at a time."""


class BulkObserver(Observer):
    """Follows a run that writes rows: its parts, what it used, and where its videos are."""

    def __init__(self, ray: Any, run: BulkRun, stage: str, counts: Any) -> None:
        """`counts`: the RowCounts actor that the workers report to."""
        super().__init__(ray, run.lease.holder, stage)
        self.run, self.counts = run, counts
        self.left = len(run.todo)
        """Videos without a published row."""
        run.happened = self.happened
        self._used: Counter[str] = Counter()

    @property
    def queued(self) -> int:
        """Videos done whose rows are not published, or were lost."""
        again = int(self.happened.get("videos_done_again", 0))
        return max(0, self._done - again - (len(self.run.todo) - self.left))

    def published(self, part: PublishedPart) -> None:
        """Count a part."""
        self.left = max(0, self.left - sum(part.videos.values()))
        self.metrics.published(part)

    def used(self, amounts: Mapping[str, float]) -> None:
        """Add the AMOUNTS of published parts to those of the run."""
        self._used.update(amounts)

    def _record_hours(self, nodes: Sequence[Mapping[str, Any]], hours: float) -> None:
        super()._record_hours(nodes, hours)
        used, total = self.run.used, self._used
        used |= self.hours
        used["video_hours"] = round(total[parts.VIDEO_S] / 3600, 6)
        if total[parts.RECOGNIZED]:
            used["sampled_frames"] = int(total[parts.SAMPLED])
            used["recognized_frames"] = int(total[parts.RECOGNIZED])
        used |= {name: int(total[name]) for name in parts.TOKENS if total[name]}

    def _export(self) -> None:
        if self._done:  # else the actor may still be starting
            with contextlib.suppress(self._ray.exceptions.RayError):
                again = self._ray.get(self.counts.get_again.remote(), timeout=10)
                self._note("videos_done_again", again)
        super()._export()
        again = int(self.happened.get("videos_done_again", 0))
        self.metrics.update_rows(self.left, self.queued, again)


def run_bulk(
    observer: BulkObserver,
    work: Work,
    session: Session,
    *,
    ticks: Sequence[Callable[[], None]] = (),
    app: str = "",
) -> dict[str, float]:
    """Process the remaining videos of the observed run and publish their rows.

    Returns the seconds by stage, summed over the rows. Rows lost in transit, for example
    with a node, are computed again. `ticks` are called twice a second; `app` names the run's Serve
    application, if it has one. Raises RunFailed if the cluster or storage fails, if the run has
    waited for room on the cluster for longer than `session.wait_s`, or if another run has taken
    over the folder.
    """
    import ray

    seconds: Counter[str] = Counter()
    run, what = observer.run, observer.stage
    todo = run.todo
    run.begin()
    options: dict[str, Any] = {"session": session, "ticks": (run.stop_if_lost, *ticks), "app": app}
    for _ in range(_PASSES):
        observer.left = len(todo)
        try:
            written, spent = progress.run_with_progress(
                _publisher(work, todo, observer, session.debug),
                observer.counts,
                len(run.todo),
                what,
                observe=observer.observe,
                **options,
            )
        except ray.exceptions.RayError as error:
            raise cluster.run_failed(error, what) from error
        seconds.update(spent)
        if written >= len(todo) or not (todo := run.find_todo()):
            break
    return dict(seconds)


def _publisher(
    work: Work, todo: VideoRows, observer: BulkObserver, debug: bool
) -> Callable[[], tuple[int, dict[str, float]]]:
    run = observer.run

    def publish() -> tuple[int, dict[str, float]]:
        totals: Counter[str] = Counter()
        rows = parts.part_rows(work.schema, run.config.output, len(todo))
        parts.limit_output_blocks(cluster.quiet_data(debug), work.schema, work.batch_rows)
        for data in blocks.executions(todo, work.workers.start):
            totals.update(
                parts.write_parts(
                    work.stage(data),
                    work.writers,
                    run.out,
                    work.schema,
                    run.config.output,
                    rows,
                    observer.published,
                )
            )
        written, *amounts = (totals.pop(name, 0.0) for name in parts.AMOUNTS)
        observer.used(dict(zip(parts.AMOUNTS[1:], amounts, strict=True)))
        return int(written), {name: value for name, value in totals.items() if value > 0}

    return publish
