"""Who uses a cluster and who waits for it: its free resources, demands, holders and launches."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_GIB = 2**30
SYSTEM_ACTORS = (
    "ServeController",
    "ProxyActor",
    "_AutoscalingCoordinatorActor",
    "ActorLocationTracker",
    "_StatsActor",
)


def facts(ray: Any, status: Any) -> Iterator[str]:
    """Yield demands, free resources, the largest node, the holders of the rest, and launches."""
    if status is not None:
        yield f"asked for {demands(status)}"
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kinds = [kind for kind in ("CPU", "GPU") if total.get(kind) or kind == "CPU"]
    amounts = ", ".join(
        f"{free.get(kind, 0.0):.3g} of {total.get(kind, 0.0):g} {kind}" for kind in kinds
    )
    yield f"free {amounts} on {len(nodes)} node{'s' * (len(nodes) != 1)}"
    largest: Mapping[str, float] = max(
        nodes, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)), default={}
    )
    yield f"largest node {_bundle({kind: largest.get(kind, 0.0) for kind in kinds})}"
    if held := holders(ray):
        yield f"held by {held}"
    if status is not None:
        yield f"autoscaler: {launches(status)}"


def actors() -> list[dict[str, Any]]:
    """Return Ray's records of all actors."""
    from ray._private import state

    return list(state.actors().values())


def read_status(ray: Any) -> Any:
    """Return the autoscaler's view of the cluster; None if it is unavailable."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    # a client driver (ray://) may get an address that is not reachable from its network
    with contextlib.suppress(Exception):
        return get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)
    return None


def demands(status: Any) -> str:
    """Describe the actors and placement groups that have no place yet."""
    summary = status.resource_demands
    waiting = [*summary.ray_task_actor_demand, *summary.placement_group_demand]
    bundles = [item for demand in waiting for item in demand.bundles_by_count]
    return ", ".join(f"{item.count} x {_bundle(item.bundle)}" for item in bundles)


def num_demanded(status: Any) -> int:
    """Return the number of actors and placement groups that have no place yet.

    Those that have a place and are starting do not count.
    """
    summary = status.resource_demands
    waiting = sum(
        item.count for demand in summary.ray_task_actor_demand for item in demand.bundles_by_count
    )
    return waiting + len(summary.placement_group_demand)


def _bundle(resources: Mapping[str, float]) -> str:
    """Format resources in a fixed order, because Ray's mapping has none."""
    parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if name in resources]
    parts += [f"{resources['memory'] / _GIB:.2g} GiB"] if "memory" in resources else []
    return "(" + ", ".join(parts) + ")"


def holders(ray: Any) -> str:
    """Describe the jobs that have running actors, with the names of the actors."""
    jobs: dict[str, Counter[str]] = {}
    for actor in actors():
        name = actor["ActorClassName"]
        if actor["State"] == "ALIVE" and not name.startswith(SYSTEM_ACTORS):
            jobs.setdefault(actor["JobID"], Counter())[name] += 1
    mine = ray.get_runtime_context().get_job_id()
    named = []
    for job, names in jobs.items():
        who = "this job" if job == mine else f"job {job}"
        shown = ", ".join(f"{count} x {name}" for name, count in names.most_common(2))
        named.append(f"{who} ({shown}{', ...' if len(names) > 2 else ''})")
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more jobs" if len(named) > 3 else "")


def launches(status: Any) -> str:
    """Describe the nodes that are starting and those that failed to start."""
    starting = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    parts = [f"{count} x {name} starting" for name, count in starting.items()]
    for launch in status.failed_launches[:2]:
        parts.append(
            f"{launch.ray_node_type_name} failed to start ({launch.details or 'no reason given'})"
        )
    return ", ".join(parts) or "no node is starting"
