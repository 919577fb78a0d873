"""A bulk run on the cluster: videos pass through Ray Data stages, rows are written as parts."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tsq_ray import log
from tsq_ray.manifest import VideoRows
from tsq_ray.runs.bulk import BulkRun
from tsq_ray.runtime import blocks, cluster, parts, progress
from tsq_ray.runtime.metrics import RunMetrics
from tsq_ray.runtime.nodes import Pool
from tsq_ray.runtime.session import Session
from tsq_ray.runtime.waiting import Watch

_PASSES = 3
_LOOK_EVERY_S = 3.0


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
    batch_rows: int
    """Rows that a worker makes at a time."""


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
    seen = _Observer(ray, run, what)
    seen.look()
    options: dict[str, Any] = {"session": session, "ticks": (run.stop_if_lost, *ticks), "app": app}
    for _ in range(_PASSES):
        try:
            written, spent = progress.run_with_progress(
                _publishing(run, work, todo, seen, session.debug),
                work.counts,
                len(run.todo),
                what,
                observe=seen.observe,
                **options,
            )
        except ray.exceptions.RayError as error:
            raise cluster.run_failed(error, what) from error
        finally:
            seen.look()
        seconds.update(spent)
        if written >= len(todo) or not (todo := run.find_todo()):
            break
    return dict(seconds)


class _Observer:
    """Follows what happens to a run, for its metrics, its summary and `_run.json`."""

    def __init__(self, ray: Any, run: BulkRun, what: str) -> None:
        self.metrics = RunMetrics(run.id, what, str(run.lease.holder))
        self._ray, self._run, self._total = ray, run, len(run.todo)
        self._nodes: set[str] = set()
        self._looked = -math.inf
        self._done, self._waiting_s = 0, 0.0
        self._waited = [0.0, 0.0]
        """In earlier passes, and in this one."""
        self._used: Counter[str] = Counter()

    def observe(self, done: int, watch: Watch) -> None:
        """Note the videos done and the waits; look at the nodes every few seconds."""
        if watch.waited_s < self._waited[1]:  # another pass, with a watch of its own
            self._waited = [sum(self._waited), 0.0]
        self._waited[1], self._waiting_s, self._done = watch.waited_s, watch.waiting_s, done
        if time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self.look()

    def used(self, amounts: Mapping[str, float]) -> None:
        """Add to what the run worked on: AMOUNTS of published parts."""
        self._used.update(amounts)

    def _count_hours(self, nodes: Sequence[Mapping[str, Any]], hours: float) -> None:
        """Add these hours for each CPU and GPU of the live nodes."""
        for kind, name in (("CPU", "cpu_hours"), ("GPU", "gpu_hours")):
            self._used[name] += hours * sum(node["Resources"].get(kind, 0.0) for node in nodes)
        self._run.used |= {
            "cpu_hours": round(self._used["cpu_hours"], 6),
            "gpu_hours": round(self._used["gpu_hours"], 6),
            "video_hours": round(self._used[parts.VIDEO_S] / 3600, 6),
        }
        if self._used[parts.RECOGNIZED]:
            self._run.used["sampled_frames"] = int(self._used[parts.SAMPLED])
            self._run.used["recognized_frames"] = int(self._used[parts.RECOGNIZED])
        self._run.used |= {name: int(self._used[name]) for name in parts.TOKENS if self._used[name]}

    def look(self) -> None:
        """Compare the nodes with those of before, and export what is known."""
        now = time.monotonic()
        hours = (now - self._looked) / 3600 if self._nodes else 0.0
        self._looked = now
        happened = self._run.happened
        with contextlib.suppress(self._ray.exceptions.RayError):
            alive = [node for node in self._ray.nodes() if node["Alive"]]
            self._count_hours(alive, hours)
            nodes = {node["NodeID"] for node in alive}
            if lost := len(self._nodes - nodes):
                happened["nodes_lost"] = happened.get("nodes_lost", 0) + lost
                log.say(
                    f"{self.metrics.stage}: {lost} node{'s' * (lost > 1)} lost", nodes_lost=lost
                )
            self._nodes = nodes
        happened["videos_done_again"] = max(0, self._done - self._total)
        happened["waited_s"] = round(sum(self._waited) + self._waiting_s, 1)
        self.metrics.update(max(0, self._total - self._done), self._waiting_s, happened)


def _publishing(
    run: BulkRun, work: Work, todo: VideoRows, seen: _Observer, debug: bool
) -> Callable[[], tuple[int, dict[str, float]]]:
    def publish() -> tuple[int, dict[str, float]]:
        totals: Counter[str] = Counter()
        rows = parts.part_rows(work.schema, run.config.output, len(todo))
        parts.hand_on_after(cluster.quiet_data(debug), work.schema, work.batch_rows)
        for data in blocks.executions(todo, work.workers.start):
            totals.update(
                parts.write_parts(
                    work.stage(data),
                    work.writers,
                    run.out,
                    work.schema,
                    run.config.output,
                    rows,
                    seen.metrics.published,
                )
            )
        written, *amounts = (totals.pop(name, 0.0) for name in parts.AMOUNTS)
        seen.used(dict(zip(parts.AMOUNTS[1:], amounts, strict=True)))
        return int(written), {name: value for name, value in totals.items() if value > 0}

    return publish
