"""`tsq info --cluster`: the nodes, what is free, who holds the rest, and the layouts of runs."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from tsq_ray.config import Config
from tsq_ray.errors import ConfigError
from tsq_ray.runtime import cluster, usage
from tsq_ray.runtime.blocks import MAX_BLOCK_ROWS
from tsq_ray.runtime.nodes import GROWTH_LIMIT, Cluster, Node, Stage, describe_largest, unplaced
from tsq_ray.runtime.placement import layout
from tsq_ray.runtime.session import Session

_GIB = 2**30
_PROBE_TIMEOUT_S = 30.0
_MAX_SHOWN = 50
"""Maximum number of nodes to list individually."""


def describe_cluster(
    session: Session,
    config: Config,
    videos: int = 0,
    stages: Sequence[Stage] = get_args(Stage),
) -> dict[str, Any]:
    """Describe a Ray cluster: its nodes, what is free, who holds the rest, and what waits.

    For each stage, also describe its layout for this number of videos (0: very many) and whether
    it would have to wait. Raises RunFailed if the cluster cannot be joined.
    """
    with cluster.connect(session) as ray:
        records = ray.nodes()
        connected = cluster.cluster_of(records, config)
        free = _free_nodes(connected, records)
        status, disks = usage.read_status(ray), _free_disks(ray)
        states = Counter("alive" if node["Alive"] else "dead" for node in records)
        described: dict[str, Any] = {
            "kind": "cluster",
            "nodes": dict(states),
            "largest_node": describe_largest(connected),
            "free": _free(connected, free),
            "each_node": _each_node(connected, free, disks),
            "held_by": usage.holders(ray) or "nobody",
        }
        if status is not None:
            described["waiting"] = usage.demands(status) or "nothing"
            described["autoscaler"] = usage.launches(status)
    described["can_start"] = _can_start(connected)
    count = videos or GROWTH_LIMIT * MAX_BLOCK_ROWS
    layouts = {stage: _describe_layout(stage, config, connected, free, count) for stage in stages}
    return described | layouts


def _free_nodes(connected: Cluster, records: Sequence[Mapping[str, Any]]) -> tuple[Node, ...]:
    """Return the nodes of a cluster made from Ray's records, reduced to their unused resources."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    alive = [node["NodeID"] for node in records if node["Alive"]]
    return tuple(
        replace(
            node,
            cpus=free.get(name, {}).get("CPU", 0.0),
            gpus=free.get(name, {}).get("GPU", 0.0),
            memory=free.get(name, {}).get("memory", 0.0),
        )
        for name, node in zip(alive, connected.nodes, strict=True)
    )


def _free_disks(ray: Any) -> dict[str, str]:
    """Return the free space for temporary files by node name, for the nodes that answer."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pending: dict[Any, str] = {}
    for node in [node for node in ray.nodes() if node["Alive"]][:_MAX_SHOWN]:
        here: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_free_disk)
        pending[task.remote()] = node["NodeName"]
    done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_PROBE_TIMEOUT_S)
    disks = {}
    for answer in done:
        with contextlib.suppress(ray.exceptions.RayError):
            disks[pending[answer]] = ray.get(answer)
    return disks


def _free_disk() -> str:
    import shutil
    import tempfile

    usage = shutil.disk_usage(tempfile.gettempdir())
    return f"{usage.free / 1e9:.0f} of {usage.total / 1e9:.0f} GB"


def _free(connected: Cluster, free: Sequence[Node]) -> dict[str, str]:
    amounts = {
        "CPU": f"{sum(node.cpus for node in free):.4g} of {connected.cpus:g}",
        "GPU": f"{sum(node.gpus for node in free):.4g} of {connected.gpus:g}",
    }
    memory = sum(node.memory for node in connected.nodes)
    if not math.isinf(memory):
        left = sum(node.memory for node in free)
        amounts["memory"] = f"{left / _GIB:.1f} of {memory / _GIB:.1f} GiB"
    return amounts


def _each_node(
    connected: Cluster, free: Sequence[Node], disks: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Describe the live nodes; nodes that share a name are numbered."""
    described: dict[str, dict[str, str]] = {}
    for whole, left in list(zip(connected.nodes, free, strict=False))[:_MAX_SHOWN]:
        amounts = _free(Cluster((whole,)), [left])
        if not whole.gpus:
            amounts.pop("GPU")
        if whole.name in disks:
            amounts["disk"] = disks[whole.name]
        if labels := {k: v for k, v in whole.labels.items() if not k.startswith("ray.io/node-id")}:
            amounts["labels"] = ", ".join(f"{name}={value}" for name, value in labels.items())
        name, number = whole.name, 2
        while name in described:
            name, number = f"{whole.name} ({number})", number + 1
        described[name] = amounts
    return described


def _can_start(connected: Cluster) -> list[str] | str:
    if connected.launchable:
        return [
            f"{node.count} x {node.cpus:g} CPU, {node.gpus:g} GPU" for node in connected.launchable
        ]
    if connected.grows:
        return "unknown, because Ray does not say; name the nodes in resources.node_types"
    return "nothing: no resources.node_types"


def _describe_layout(
    stage: Stage, config: Config, connected: Cluster, free: Sequence[Node], videos: int
) -> dict[str, Any] | str:
    try:
        placed = layout(stage, config, connected, videos)
    except ConfigError as error:
        return str(error)
    pool = unplaced(placed, free)
    waits = "no"
    if pool is not None:
        count = f"{pool.minimum} of a" if pool.minimum > 1 and not pool.fit else "a"
        waits = f"yes: no room for {count} {pool.name} of {pool.actor}"
    return placed.describe() | {"would_wait": waits}
