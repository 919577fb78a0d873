"""Progress of a run: what its workers count and how it is displayed."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from tsq_ray import log
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.runtime.waiting import Watch

T = TypeVar("T")
Observe = Callable[[int, Watch], None]
"""Called twice a second with the work done and the watch over waits."""
_POLL_S = 0.5
_UNSORTED = 50_000
_PLAIN_EVERY_S = 15.0


@dataclass
class Counts:
    """Shared counters of a run; an instance lives in a Ray actor."""

    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, statuses: Sequence[str | None]) -> None:
        """Count finished videos. One entry per video: None if ok, else the error type."""
        self.ok += sum(status is None for status in statuses)
        self.failed.update(status for status in statuses if status is not None)

    def get(self) -> tuple[int, dict[str, int]]:
        """Return the number of videos that are ok, and of failed ones by error type."""
        return self.ok, dict(self.failed)


class RowCounts(Counts):
    """Counts that also detect videos done again, at 8 bytes per video."""

    def __init__(self) -> None:
        super().__init__()
        self.again = 0
        self._sorted = np.zeros(0, np.uint64)
        self._unsorted: set[int] = set()

    def add_rows(self, ids: Sequence[str], statuses: Sequence[str | None]) -> None:
        """Count finished videos, given their ids and what `add` takes."""
        numbers = np.array([int(name, 16) for name in ids], np.uint64)
        known = np.zeros(len(numbers), bool)
        if len(self._sorted):
            places = np.searchsorted(self._sorted, numbers)
            known = self._sorted.take(places, mode="clip") == numbers
        for number, is_known in zip(numbers.tolist(), known.tolist(), strict=True):
            self.again += is_known or number in self._unsorted
            self._unsorted.add(number)
        if len(self._unsorted) > _UNSORTED:
            more = np.fromiter(self._unsorted, np.uint64)
            self._sorted, self._unsorted = np.union1d(self._sorted, more), set()
        self.add(statuses)

    def get_again(self) -> int:
        """Return how many videos were done again because their rows were lost."""
        return self.again


class VideoCounts:
    """The videos that a training has done; an instance lives in a Ray actor.

    In this module, because its process would import torch with those of `training`.
    """

    def __init__(self) -> None:
        self.done = 0

    def set(self, done: int) -> None:
        """Set the number of videos done in the current step."""
        self.done = done

    def get(self) -> tuple[int, dict[str, int]]:
        """Return the number of videos done; none of them has failed."""
        return self.done, {}


class Begun:
    """The tasks of a run that have begun; an instance lives in a Ray actor."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add(self, name: str) -> None:
        """Record that a task has begun; a task that is retried keeps its name."""
        self._names.add(name)

    def get(self) -> set[str]:
        """Return the names of the tasks that have begun."""
        return self._names


def start_counts(kind: type = Counts) -> Any:
    """Start an actor of this class, such as Counts, that the workers report to.

    It runs on the driver's node, because any other node may be lost during the run.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # a restarted actor counts from 0, which is harmless: the counts are only displayed
    return ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1)(kind).remote()


def run_with_progress(
    work: Callable[[], T],
    counts: Any,
    total: int,
    what: str,
    session: Session = DEFAULT_SESSION,
    ticks: Sequence[Callable[[], None]] = (),
    app: str = "",
    observe: Observe = lambda done, watch: None,
) -> T:
    """Run `work` in a thread and show videos done / failed / left, videos/s and ETA.

    Shows a bar on a terminal and plain lines elsewhere, and reports when the cluster has no room.
    `ticks` are called twice a second, as is `observe`; `app` names the run's Serve application, if
    it has one. Raises what `work`, the ticks and `observe` raise, and RunFailed if the run has
    waited for longer than `session.wait_s`.
    """
    import ray

    watch, done = Watch(ray, what, session.wait_s, app), 0
    with (
        _thread(work) as (is_alive, result),
        progress_display(total, what, session.show_progress) as update,
    ):
        while is_alive(_POLL_S):
            for tick in ticks:
                tick()
            with contextlib.suppress(ray.exceptions.RayError):
                ok, failed = ray.get(counts.get.remote(), timeout=10)
                done = ok + sum(failed.values())
                update(ok, done - ok)
            watch.tick(done)
            observe(done, watch)
    return result()


def run_watched(
    work: Callable[[], T],
    what: str,
    session: Session = DEFAULT_SESSION,
    app: str = "",
    observe: Observe = lambda done, watch: None,
) -> T:
    """Run `work`, which may wait for room on the cluster, in a thread; report what it waits for."""
    import ray

    watch = Watch(ray, what, session.wait_s, app)
    with _thread(work) as (is_alive, result):
        while is_alive(_POLL_S):
            watch.tick(0)
            observe(0, watch)
    return result()


@contextlib.contextmanager
def _thread(work: Callable[[], T]) -> Iterator[tuple[Callable[[float], bool], Callable[[], T]]]:
    """Run `work` in a thread.

    Yields two functions: one waits some seconds and returns whether the thread is still running,
    the other returns the result of `work` or raises its error.
    """
    results: list[T] = []
    raised: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  raised again by `result`
            raised.append(error)

    def is_alive(seconds: float) -> bool:
        thread.join(seconds)
        return thread.is_alive()

    def result() -> T:
        if raised:
            raise raised[0]
        return results[0]

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield is_alive, result


@contextlib.contextmanager
def progress_display(
    total: int, what: str, show: bool = True, unit: str = "videos"
) -> Iterator[Callable[[int, int], None]]:
    """Yield update(ok, failed). Output goes to stderr, because --json needs stdout for itself."""
    # when the first videos were done, and how many: the rate must not include the start-up
    began: list[tuple[float, int]] = []

    def facts(ok: int, failed: int) -> dict[str, Any]:
        now, done = time.monotonic(), ok + failed
        left = max(0, total - done)
        found = {"done": done, "total": total, "failed": failed, "left": left}
        if done and not began:
            began.append((now, done))
        if not began or done <= began[0][1]:
            return found
        rate = (done - began[0][1]) / (now - began[0][0])
        return found | {"per_s": round(rate, 3), "eta_s": round(left / rate)}

    def line(found: dict[str, Any]) -> str:
        text = "{done}/{total} done, {failed} failed, {left} left".format_map(found)
        if "per_s" in found:
            text += f", {found['per_s']:.2f} {unit}/s, ETA {found['eta_s']} s"
        return f"{what}: {text}"

    if not show:
        yield lambda ok, failed: None
        return
    if sys.stderr.isatty() and not log.is_json():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(
            BarColumn(30),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        with bar:
            task = bar.add_task(line(facts(0, 0)), total=total)
            yield lambda ok, failed: bar.update(
                task, completed=ok + failed, description=line(facts(ok, failed))
            )
        return
    last = [0.0]

    def plain(ok: int, failed: int) -> None:
        if time.monotonic() - last[0] >= _PLAIN_EVERY_S and (ok or failed):
            last[0] = time.monotonic()
            found = facts(ok, failed)
            log.say(line(found), **found)

    yield plain
