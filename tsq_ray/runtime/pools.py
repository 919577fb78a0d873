"""Sizes of the pools of a layout: CPUs and memory of one actor, numbers of actors; without Ray."""

from __future__ import annotations

import math
from dataclasses import replace

from tsq_ray.runtime.nodes import GROWTH_LIMIT, Cluster, Pool

WAITING_CPUS = 0.01
"""CPUs of an actor that mostly waits. Above 0, to keep it off a head node without CPUs."""
_GIB = 2**30
BUSY_BYTES = 2 * _GIB
WAITING_BYTES = _GIB // 4
MAX_ASKED = 1000
"""Maximum number of a pool's actors that wait for nodes to start."""
_WRITING_BYTES = _GIB // 2
_WAITING_ACTORS = 5
"""Waiting actors of a run on a small cluster: an ingress, two senders and two writers."""
_MIN_WRITERS, _MAX_WRITERS = 2, 64
_VIDEOS_PER_ACTOR = 8
"""Minimum number of videos per actor: for fewer, starting a node does not pay."""
_MIN_AHEAD = 8


def memory_share(cluster: Cluster, desired: int, cpus: float = 1.0) -> int:
    """Return the bytes to request for an actor with these CPUs.

    This is `desired`, but at most the actor's share of a node that is full of such actors and has
    one share left over.
    """
    shares = [
        node.memory / (math.ceil(node.cpus / min(1.0, cpus)) + 1)
        for node in cluster.every_node()
        if node.cpus
    ]
    return int(min([desired, *shares]))


def waiting_memory(cluster: Cluster, desired: int, cpus: float = 1.0) -> int:
    """Return the bytes of an actor that mostly waits: at most its part of the share left free."""
    return int(
        min(desired, memory_share(cluster, desired * _WAITING_ACTORS, cpus) / _WAITING_ACTORS)
    )


def busy_pool(cluster: Cluster, name: str, size: int, limit: int, cpus: float = 0.0) -> Pool:
    """Return a pool of actors that each keep a core busy, sized as in `sized`."""
    cpus = cpus or cluster.busy_cpus
    memory = memory_share(cluster, BUSY_BYTES, cpus)
    pool = Pool(name, 1, 1, 1, cpus, memory=memory, cores=busy_cores(cpus))
    return sized(cluster, pool, size, limit)


def sized(cluster: Cluster, pool: Pool, size: int, maximum: int) -> Pool:
    """Return the pool with `size` actors, or (0) as many as the nodes hold, up to `maximum`.

    Further actors, up to the limit, are created before their nodes: waiting actors make the
    autoscaler start nodes, and start at once on a node that joins.
    """
    pool = cluster.labelled(pool)
    if size:
        start = min(size, maximum)
        fit = max(1, cluster.capacity(pool))
        return replace(pool, start=start, limit=start, fit=fit if fit < start else 0)
    alive = min(maximum, max(1, cluster.capacity(pool)))
    limit = growth(alive, maximum)
    ahead = (
        cluster.capacity(pool, launchable=True) - alive
        if cluster.launchable
        else max(alive, _MIN_AHEAD)
    )
    start = min(limit, alive + min(max(0, ahead), MAX_ASKED))
    return replace(pool, minimum=start, start=start, limit=limit, fit=min(alive, start))


def growth(start: int, videos: int) -> int:
    """Return the limit of a pool that grows with the cluster."""
    return max(start, min(GROWTH_LIMIT, -(-videos // _VIDEOS_PER_ACTOR)))


def busy_cores(cpus: float) -> float:
    """Return the number of cores that an actor with these logical CPUs keeps busy."""
    return float(max(1, round(cpus)))


def writer_pool(cluster: Cluster, cpus: float = 1.0) -> Pool:
    known = max(_MIN_WRITERS, min(_MAX_WRITERS, cluster.num_workers))
    limit = _MAX_WRITERS if cluster.grows else known
    memory = waiting_memory(cluster, _WRITING_BYTES, cpus)
    return Pool("writer", 1, 1, limit, WAITING_CPUS, memory=memory)


def features_pool(cluster: Cluster, cpus: float = 1.0) -> Pool:
    """Return the actor that holds a training's features; it is busy only before the workers are."""
    return Pool(
        "features", 1, 1, 1, WAITING_CPUS, memory=memory_share(cluster, BUSY_BYTES, cpus) // 2
    )


def gpu_pool(cluster: Cluster, name: str, size: int, limit: int, share: float, cpus: float) -> Pool:
    """Return a pool of actors with `share` of a GPU each, sized by whole GPUs.

    The pool waits for `size` GPUs; -1 takes as many as the cluster has.
    """
    pool = Pool(name, 1, 1, 1, cpus, 1.0, memory_share(cluster, BUSY_BYTES))
    return replace(sized(cluster, pool, max(0, size), limit), gpus=share)
