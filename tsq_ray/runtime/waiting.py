"""Report every 15 seconds what a stalled run waits for and which jobs hold it."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tsq_ray import log
from tsq_ray.errors import RunFailed
from tsq_ray.runtime import usage

FIRST_LINE_S, EVERY_S = 10.0, 15.0
_PENDING = ("PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING")


class Watch:
    """Reports when a run makes no progress because the cluster has no room for it."""

    def __init__(self, ray: Any, what: str, wait_s: float = 0.0, app: str = "") -> None:
        """Start watching the run `what`.

        `wait_s` is the longest wait, 0 for no limit; `app` names the run's Serve application, if it
        has one.
        """
        self._ray, self._what, self._wait_s, self._app = ray, what, wait_s, app
        self._done = -1
        self._since = self._looked = time.monotonic()
        self._waits_since: float | None = None
        self.waited_s = 0.0
        """Seconds that the run has waited for room, in all."""

    def tick(self, done: int) -> None:
        """Report a stall, given the number of videos done; to be called about every second.

        Raises RunFailed if the run has waited for longer than `wait_s`.
        """
        now = time.monotonic()
        if done != self._done:
            self._end_wait(now)
            self._done, self._since, self._looked = done, now, now
            return
        first = self._looked == self._since
        if now < min(self._looked + (FIRST_LINE_S if first else EVERY_S), self._ends()):
            return
        self._looked = now
        kinds, status = self._lacking(), usage.read_status(self._ray)
        if not kinds or (status is not None and usage.num_demanded(status) < kinds.total()):
            self._end_wait(now)
            if kinds:
                log.say(
                    f"{self._what}: still starting after {now - self._since:.0f} s: "
                    f"{', '.join(kinds)} (loading what they need)"
                )
            return
        self._waits_since = self._waits_since or self._since
        waited, facts = now - self._waits_since, "; ".join(usage.facts(self._ray, status))
        line = f"{self._what}: waiting for {waited:.0f} s: {facts}"
        if now >= self._ends():
            raise RunFailed(
                f"{line}; gave up after --wait-s {self._wait_s:g}; "
                "run the same command again to resume"
            )
        log.say(line, waiting_s=round(waited))

    @property
    def waiting_s(self) -> float:
        """Seconds that the run waits for room by now; 0 if it does not."""
        return time.monotonic() - self._waits_since if self._waits_since is not None else 0.0

    def _end_wait(self, now: float) -> None:
        if self._waits_since is not None:
            self.waited_s += now - self._waits_since
        self._waits_since = None

    def _lacking(self) -> Counter[str]:
        with contextlib.suppress(self._ray.exceptions.RayError):
            job = self._ray.get_runtime_context().get_job_id()
            return lacking(usage.actors(), self._ray.util.placement_group_table(), job, self._app)
        return Counter()

    def _ends(self) -> float:
        """Return when the wait limit is reached: never, as long as nothing is known to wait."""
        if not self._wait_s or (self._waits_since is None and self._looked > self._since):
            return math.inf
        return (self._waits_since or self._since) + self._wait_s


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
    mine = [
        actor
        for actor in actors
        if actor["JobID"] == job
        or (app and actor["ActorClassName"].startswith(f"ServeReplica:{app}:"))
    ]
    alive = {actor["ActorClassName"] for actor in mine if actor["State"] == "ALIVE"}
    found = Counter(
        actor["ActorClassName"]
        for actor in mine
        if actor["State"] in _PENDING and actor["ActorClassName"] not in alive
    )
    found["placement group"] = sum(
        group["state"] == "PENDING" for name, group in groups.items() if name.endswith(job)
    )
    return +found
