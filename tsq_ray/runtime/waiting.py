"""Report every 15 seconds what a stalled run waits for, which jobs hold it, or what it does."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tsq_ray import log
from tsq_ray.errors import RunFailed
from tsq_ray.runtime import usage

FIRST_LINE_S, EVERY_S = 10.0, 15.0
_SLOW, _SLOW_S = 2.0, 60.0
"""A working run is reported after this many times its longest pause so far, at the latest after
that many seconds: a pause may have been a stall itself."""
_COUNTERS = ("Counts", "RowCounts", "FlowCounts", "VideoCounts", "Begun")
_PENDING = ("PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING")


@dataclass(frozen=True)
class Seen:
    """What the cluster says about a run."""

    lacking: Counter[str]
    """Classes without a running actor, as returned by `lacking`."""
    running: Counter[str]
    """The actors that run, by class."""
    loading: bool = False
    """Whether some of the run's actors have a place and are starting there."""
    facts: Callable[[], str] = str
    """Describes what is asked for, what is free and who holds the rest."""


class Watch:
    """Reports when a run makes no progress, above all if the cluster has no room for it."""

    def __init__(
        self,
        ray: Any,
        what: str,
        wait_s: float = 0.0,
        app: str = "",
        look: Callable[[], Seen] | None = None,
    ) -> None:
        """Start watching the run `what`.

        `wait_s` is the longest wait, 0 for no limit; `app` names the run's Serve application, if it
        has one; `look` asks the cluster; by default the connected one.
        """
        self._what, self._wait_s = what, wait_s
        self._look = look or partial(look_at, ray, app)
        self._done = -1
        self._gap = 0.0  # the longest time between two changes of `done`
        self._since = self._looked = time.monotonic()
        self._waits_since: float | None = None
        self.waited_s = 0.0
        """Seconds of all past waits for room."""

    def tick(self, done: int) -> None:
        """Report a stall, given the number of videos done. Call it about every second.

        Raises RunFailed if the run has waited for longer than `wait_s`.
        """
        now = time.monotonic()
        if done != self._done:
            self._end_wait(now)
            if self._done > 0:
                self._gap = max(self._gap, now - self._since)
            self._done, self._since, self._looked = done, now, now
            return
        first = self._looked == self._since
        if now < min(self._looked + (FIRST_LINE_S if first else EVERY_S), self._deadline()):
            return
        self._looked, seen = now, self._look()
        kinds = seen.lacking
        if not kinds or seen.loading:
            self._end_wait(now)
            at_work = ", ".join(f"{count} x {name}" for name, count in seen.running.most_common(4))
            doing = (
                f"{', '.join(kinds)} (loading what they need)" if kinds else f"at work: {at_work}"
            )
            state = "still starting" if kinds else "no progress"
            slow = now - self._since >= min(_SLOW * self._gap, _SLOW_S)
            if kinds or (at_work and slow):
                log.say(f"{self._what}: {state} after {now - self._since:.0f} s: {doing}")
            return
        self._waits_since = self._waits_since or self._since
        waited = now - self._waits_since
        line = f"{self._what}: waiting for {waited:.0f} s: {seen.facts()}"
        if now >= self._deadline():
            raise RunFailed(
                f"{line}; gave up after --wait-s {self._wait_s:g}; "
                "run the same command again to resume"
            )
        log.say(line, waiting_s=round(waited))

    @property
    def waiting_s(self) -> float:
        """Seconds that the run has been waiting for room; 0 if it is not waiting."""
        return time.monotonic() - self._waits_since if self._waits_since is not None else 0.0

    def _end_wait(self, now: float) -> None:
        if self._waits_since is not None:
            self.waited_s += now - self._waits_since
        self._waits_since = None

    def _deadline(self) -> float:
        """Return when the wait limit is reached: never while nothing is known to wait."""
        if not self._wait_s or (self._waits_since is None and self._looked > self._since):
            return math.inf
        return (self._waits_since or self._since) + self._wait_s


def look_at(ray: Any, app: str = "") -> Seen:
    """Ask the connected cluster about this job, and its Serve application `app` if it has one."""
    with contextlib.suppress(ray.exceptions.RayError):
        job = ray.get_runtime_context().get_job_id()
        actors, groups = usage.actors(), ray.util.placement_group_table()
        status = usage.read_status(ray)
        pending = num_pending(actors, groups, job, app)
        return Seen(
            lacking(actors, groups, job, app),
            running(actors, job, app),
            status is not None and usage.num_demanded(status) < pending,
            lambda: "; ".join(usage.facts(ray, status)),
        )
    return Seen(Counter(), Counter())


def look_at_tasks(ray: Any, kind: str, waiting: int, running: int) -> Seen:
    """Ask the connected cluster about a run whose work is tasks of one `kind`, not actors.

    Ray's records do not say which tasks run: `waiting` and `running` are the run's own counts of
    tasks that have not begun and of those that have begun and not ended.
    """
    status = usage.read_status(ray)
    return Seen(
        Counter({kind: waiting} if waiting and not running else {}),
        Counter({kind: running} if running else {}),
        status is not None and usage.num_demanded(status) < waiting,
        lambda: "; ".join(usage.facts(ray, status)),
    )


def running(actors: Iterable[Mapping[str, Any]], job: str, app: str = "") -> Counter[str]:
    """Return the number of running actors of a run by class, except those that only count."""
    names = (actor["ActorClassName"] for actor in _of_run(actors, job, app, ("ALIVE",)))
    return Counter(
        name for name in names if not name.startswith((*usage.SYSTEM_ACTORS, *_COUNTERS))
    )


def lacking(
    actors: Iterable[Mapping[str, Any]],
    groups: Mapping[str, Mapping[str, Any]],
    job: str,
    app: str = "",
) -> Counter[str]:
    """Return the classes of a run's actors of which none runs yet, each with the number pending.

    Placement groups that have no place yet count as one more class. A run's actors are those of its
    job and the replicas of its Serve application, which Serve's own job starts. A placement group's
    id ends with the id of its job.
    """
    actors = list(actors)
    alive = {actor["ActorClassName"] for actor in _of_run(actors, job, app, ("ALIVE",))}
    pending = (actor["ActorClassName"] for actor in _of_run(actors, job, app, _PENDING))
    found = Counter(name for name in pending if name not in alive)
    found["placement group"] = _pending_groups(groups, job)
    return +found


def num_pending(
    actors: Iterable[Mapping[str, Any]],
    groups: Mapping[str, Mapping[str, Any]],
    job: str,
    app: str = "",
) -> int:
    """Return the number of a run's actors and placement groups that do not run yet.

    Those created for nodes that may still join count too.
    """
    return sum(1 for _ in _of_run(actors, job, app, _PENDING)) + _pending_groups(groups, job)


def _pending_groups(groups: Mapping[str, Mapping[str, Any]], job: str) -> int:
    return sum(group["state"] == "PENDING" for name, group in groups.items() if name.endswith(job))


def _of_run(
    actors: Iterable[Mapping[str, Any]], job: str, app: str, states: tuple[str, ...]
) -> Iterator[Mapping[str, Any]]:
    replica = f"ServeReplica:{app}:"
    for actor in actors:
        belongs = actor["JobID"] == job or (app and actor["ActorClassName"].startswith(replica))
        if belongs and actor["State"] in states:
            yield actor
