"""Report every 15 seconds what a stalled run waits for and which jobs hold it."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tsq_ray import log
from tsq_ray.errors import RunFailed

FIRST_LINE_S, EVERY_S = 10.0, 15.0
_GIB = 2**30
_SYSTEM_ACTORS = (
    "ServeController",
    "ProxyActor",
    "_AutoscalingCoordinatorActor",
    "ActorLocationTracker",
    "_StatsActor",
)
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
        kinds, status = self._lacking(), _cluster_status(self._ray)
        if not kinds or (status is not None and _num_demanded(status) < kinds.total()):
            self._end_wait(now)
            if kinds:
                log.say(
                    f"{self._what}: still starting after {now - self._since:.0f} s: "
                    f"{', '.join(kinds)} (loading what they need)"
                )
            return
        self._waits_since = self._waits_since or self._since
        waited, facts = now - self._waits_since, "; ".join(_facts(self._ray, status))
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
            return lacking(_actors(), self._ray.util.placement_group_table(), job, self._app)
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


def _facts(ray: Any, status: Any) -> Iterator[str]:
    """Yield demands, free resources, the largest node, the holders of the rest, and launches."""
    if status is not None:
        yield f"asked for {_demands(status)}"
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kinds = [kind for kind in ("CPU", "GPU") if total.get(kind) or kind == "CPU"]
    rooms = ", ".join(
        f"{free.get(kind, 0.0):.3g} of {total.get(kind, 0.0):g} {kind}" for kind in kinds
    )
    yield f"free {rooms} on {len(nodes)} node{'s' * (len(nodes) != 1)}"
    largest: Mapping[str, float] = max(
        nodes, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)), default={}
    )
    yield f"largest node {_bundle({kind: largest.get(kind, 0.0) for kind in kinds})}"
    holders = _holders(ray)
    if holders:
        yield f"held by {holders}"
    if status is not None:
        yield f"autoscaler: {_autoscaler(status)}"


def _actors() -> list[dict[str, Any]]:
    from ray._private.state import actors

    return list(actors().values())


def _cluster_status(ray: Any) -> Any:
    from ray.autoscaler.v2.sdk import get_cluster_status

    # a client driver (ray://) may get an address that is not reachable from its network
    with contextlib.suppress(Exception):
        return get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)
    return None


def _demands(status: Any) -> str:
    summary = status.resource_demands
    demands = [*summary.ray_task_actor_demand, *summary.placement_group_demand]
    bundles = [item for demand in demands for item in demand.bundles_by_count]
    return ", ".join(f"{item.count} x {_bundle(item.bundle)}" for item in bundles)


def _num_demanded(status: Any) -> int:
    """Return the number of actors and placement groups that have no place yet.

    Those that have a place and are starting do not count.
    """
    summary = status.resource_demands
    actors = sum(
        item.count for demand in summary.ray_task_actor_demand for item in demand.bundles_by_count
    )
    return actors + len(summary.placement_group_demand)


def _bundle(resources: Mapping[str, float]) -> str:
    """Format resources in a fixed order, because Ray's mapping has none."""
    parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if name in resources]
    parts += [f"{resources['memory'] / _GIB:.2g} GiB"] if "memory" in resources else []
    return "(" + ", ".join(parts) + ")"


def _holders(ray: Any) -> str:
    """Describe the jobs that have running actors, with the names of the actors."""
    jobs: dict[str, Counter[str]] = {}
    for actor in _actors():
        name = actor["ActorClassName"]
        if actor["State"] == "ALIVE" and not name.startswith(_SYSTEM_ACTORS):
            jobs.setdefault(actor["JobID"], Counter())[name] += 1
    mine = ray.get_runtime_context().get_job_id()
    named = []
    for job, names in jobs.items():
        who = "this job" if job == mine else f"job {job}"
        shown = ", ".join(f"{count} x {name}" for name, count in names.most_common(2))
        named.append(f"{who} ({shown}{', ...' if len(names) > 2 else ''})")
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more jobs" if len(named) > 3 else "")


def _autoscaler(status: Any) -> str:
    starting = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    parts = [f"{count} x {name} starting" for name, count in starting.items()]
    for launch in status.failed_launches[:2]:
        parts.append(
            f"{launch.ray_node_type_name} failed to start ({launch.details or 'no reason given'})"
        )
    return ", ".join(parts) or "no node is starting"
