"""Placement of a stage's actors: one pure function for all stages, without Ray.

A pool grows and shrinks between a minimum and a limit during its run. What one actor asks for
depends only on the nodes, never on the size of the cluster: an actor that asked for more than the
largest node has would wait forever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from tsq_ray.config import Config, label_map
from tsq_ray.errors import ConfigError
from tsq_ray.runtime.nodes import (
    GROWTH_LIMIT,
    PARTS,
    STEP,
    Cluster,
    Layout,
    Node,
    Pool,
    Stage,
    describe_largest,
    num_fitting,
)

_VIDEOS_PER_ACTOR = 8
"""Minimum number of videos per actor: for fewer, starting a node does not pay."""
_MAX_ASKED = 1000
"""Maximum number of a pool's actors that wait for nodes to start."""
_MIN_AHEAD = 8
_WAITING_CPUS = 0.01
"""CPUs of an actor that mostly waits. Above 0, to keep it off a head node without CPUs."""
_NETWORK_CPUS = 0.2
"""CPUs of a sampler or recogniser replica, which uses the cores that decoding leaves."""
_INGRESS_CPUS = 0.1
_GIB = 2**30
_BUSY_BYTES = 2 * _GIB
_WAITING_BYTES = _GIB // 4
_WRITING_BYTES = _GIB // 2
_WAITING_ACTORS = 5
"""Waiting actors of a run on a small cluster: an ingress, two senders and two writers."""
_MIN_WRITERS, _MAX_WRITERS = 2, 64
_MIN_SENDERS, _MAX_SENDERS = 2, 128


def layout(stage: Stage, config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out a stage that processes `videos` videos on the cluster.

    Raises ConfigError if one of its actors fits on no node, live or launchable.
    """
    labels = config.resources.labels
    required = {name: label_map(getattr(labels, part)) for name, part in PARTS[stage].items()}
    cluster = replace(cluster, required=required)
    placed = _STAGES[stage](config, cluster, max(1, videos))
    pools = {name: cluster.labelled(pool) for name, pool in placed.pools.items()}
    placed = replace(placed, pools=pools)
    _check_fits(placed, cluster)
    return placed


def gpu_count(config: Config, cluster: Cluster) -> int:
    """Return the number of GPUs that a stage asks for.

    This is `resources.gpus`, or if negative all GPUs of the live and launchable nodes. Raises
    ConfigError if `resources.gpus` is positive and no node can ever have a GPU.
    """
    requested = config.resources.gpus
    if requested < 0:
        return cluster.max_gpus
    if requested and not cluster.max_gpus and not cluster.grows:
        raise ConfigError(
            f"resources.gpus = {requested}: no node of the cluster has a GPU, "
            "and no node with a GPU can be started; set it to 0 to run on CPUs, add GPU nodes, "
            "or name those that can be started in resources.node_types"
        )
    return requested


def usable_nodes(placed: Layout, cluster: Cluster) -> list[Node]:
    """Return each node that the layout can use: live nodes, then launchable ones.

    Of the launchable nodes that can hold its actors, each pool at its limit takes those that it
    needs for GPUs, or else for cores.
    """
    pools = [pool for pool in placed.pools.values() if pool.gpus or pool.cores]
    nodes = [node for node in cluster.nodes if node.cpus or node.gpus]
    waiting = list(cluster.launchable)
    for unit in ("gpus", "cpus"):
        group = [pool for pool in pools if bool(pool.gpus) == (unit == "gpus")]
        missing = sum(pool.limit * (pool.gpus or pool.cores) for pool in group)
        missing -= sum(getattr(node, unit) for node in nodes if _holds_any(node, group))
        for place in _preferred(waiting, group):
            node = waiting[place]
            count = min(node.count, max(0, math.ceil(missing / getattr(node, unit))))
            missing -= count * getattr(node, unit)
            nodes += [replace(node, count=1)] * count
            waiting[place] = replace(node, count=node.count - count)
    return nodes


def wanted_nodes(placed: Layout, cluster: Cluster) -> list[dict[str, float]]:
    """Return the resources of each node to request from the autoscaler: the usable ones.

    If the cluster grows by nodes of unknown types, the resources of each missing actor are added.
    """
    bundles = [_resources(node) for node in usable_nodes(placed, cluster)]
    pools = [pool for pool in placed.pools.values() if pool.gpus or pool.cores]
    for pool in pools if cluster.grows else ():
        missing = min(pool.limit, _MAX_ASKED) - cluster.capacity(pool)
        bundles += [_resources(Node(pool.cpus, pool.gpus))] * max(0, missing)
    return bundles


def _holds_any(node: Node, pools: list[Pool]) -> bool:
    return any(num_fitting(pool, node) for pool in pools)


def _preferred(types: list[Node], pools: list[Pool]) -> list[int]:
    """Return the places of the types that can hold one of the pools, the best first.

    For GPUs: those with the fewest. For cores: the largest; those with GPUs only if no other can.
    """
    able = [place for place, node in enumerate(types) if _holds_any(node, pools)]
    plain = [place for place in able if not types[place].gpus]
    return sorted(plain or able, key=lambda place: (types[place].gpus, -types[place].cpus))


def _check_fits(placed: Layout, cluster: Cluster) -> None:
    nodes = [node for node in cluster.every_node() if node.cpus or node.gpus]
    for pool in placed.pools.values():
        if nodes and not cluster.grows and not any(num_fitting(pool, node) for node in nodes):
            needs = [f"{pool.cpus:g} CPU", *([f"{pool.gpus:g} GPU"] if pool.gpus else [])]
            needs += [f"the label {name} = {value}" for name, value in pool.labels.items()]
            raise ConfigError(
                f"{placed.stage}: a {pool.name} asks for {' and '.join(needs)}, "
                "which no node of the cluster can ever hold "
                f"(largest: {describe_largest(cluster)}); ask for less, add a node that can, "
                "or name one that can be started, with its labels, in resources.node_types"
            )


def _resources(node: Node) -> dict[str, float]:
    return {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})


def _memory(cluster: Cluster, desired: int, cpus: float = 1.0) -> int:
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


def _waiting_memory(cluster: Cluster, desired: int, cpus: float = 1.0) -> int:
    """Return the bytes of an actor that mostly waits: at most its part of the share left free."""
    return int(min(desired, _memory(cluster, desired * _WAITING_ACTORS, cpus) / _WAITING_ACTORS))


def _busy(cluster: Cluster, name: str, size: int, limit: int, cpus: float = 0.0) -> Pool:
    """Return a pool of actors that each keep a core busy, sized as in `_sized`."""
    cpus = cpus or cluster.busy_cpus
    memory = _memory(cluster, _BUSY_BYTES, cpus)
    pool = Pool(name, 1, 1, 1, cpus, memory=memory, cores=_cores(cpus))
    return _sized(cluster, pool, size, limit)


def _sized(cluster: Cluster, pool: Pool, size: int, maximum: int) -> Pool:
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
    limit = _growth(alive, maximum)
    ahead = (
        cluster.capacity(pool, launchable=True) - alive
        if cluster.launchable
        else max(alive, _MIN_AHEAD)
    )
    start = min(limit, alive + min(max(0, ahead), _MAX_ASKED))
    return replace(pool, minimum=start, start=start, limit=limit, fit=min(alive, start))


def _growth(start: int, videos: int) -> int:
    """Return the limit of a pool that grows with the cluster."""
    return max(start, min(GROWTH_LIMIT, -(-videos // _VIDEOS_PER_ACTOR)))


def _cores(cpus: float) -> float:
    """Return the number of cores that an actor with these logical CPUs keeps busy."""
    return float(max(1, round(cpus)))


def _writers(cluster: Cluster, cpus: float = 1.0) -> Pool:
    known = max(_MIN_WRITERS, min(_MAX_WRITERS, cluster.num_workers))
    limit = _MAX_WRITERS if cluster.grows else known
    memory = _waiting_memory(cluster, _WRITING_BYTES, cpus)
    return Pool("writer", 1, 1, limit, _WAITING_CPUS, memory=memory)


def _features(cluster: Cluster, cpus: float = 1.0) -> Pool:
    """Return the actor that holds a training's features; it is busy only before the workers are."""
    return Pool("features", 1, 1, 1, _WAITING_CPUS, memory=_memory(cluster, _BUSY_BYTES, cpus) // 2)


def _on_gpus(cluster: Cluster, name: str, size: int, limit: int, share: float, cpus: float) -> Pool:
    """Return a pool of actors with `share` of a GPU each, sized by whole GPUs.

    The pool waits for `size` GPUs; -1 takes as many as the cluster has.
    """
    pool = Pool(name, 1, 1, 1, cpus, 1.0, _memory(cluster, _BUSY_BYTES))
    return replace(_sized(cluster, pool, max(0, size), limit), gpus=share)


def _extract(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out extraction.

    On CPUs, workers decode and encode. With GPUs, each GPU has one encoder, and decoders run on the
    CPUs.
    """
    resources = config.resources
    gpus = gpu_count(config, cluster)
    writers = {"writer": _writers(cluster)}
    if not gpus and not resources.decoders:
        cpus = cluster.share(resources.workers) if resources.workers else 0.0
        workers = _busy(cluster, "worker", resources.workers, videos, cpus)
        threads = resources.threads or int(workers.cores)
        return Layout("extract", {"worker": workers} | writers, "cpu", threads)
    decoders = _busy(cluster, "decoder", resources.decoders, videos)
    cpus = STEP * cluster.unit
    if gpus:
        encoders = _on_gpus(cluster, "encoder", resources.gpus, videos, 1.0, cpus)
    else:
        encoders = Pool("encoder", 1, 1, 1, cpus, memory=_memory(cluster, _BUSY_BYTES))
    threads = resources.threads or max(1, int(cluster.largest_cpus) - 1)
    pools = {"decoder": decoders, "encoder": encoders} | writers
    return Layout("extract", pools, "cuda" if gpus else "cpu", threads)


def _finetune(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out fine-tuning.

    A frozen backbone is laid out like extraction. A trained one has workers, each with decoders.
    """
    if config.finetune.backbone == "frozen":
        placed = _extract(config, cluster, videos)
        pools = placed.pools | {"features": _features(cluster)}
        return replace(placed, stage="finetune", pools=pools)
    workers = config.finetune.num_workers
    gpus = _training_gpus("finetune.num_workers", workers, config, cluster)
    cores = max(1, int(cluster.max_cpus or cluster.largest_cpus))
    # a CPU trains much slower than it decodes; a GPU needs as many decoders as fit
    total = config.resources.decoders or (cores - workers if gpus else cores // 4)
    decoders = max(1, total // workers)
    cpus = cluster.share(workers * (1 + decoders))
    own = min(cpus, cluster.with_gpus.share(workers)) if gpus else cpus
    memory = _memory(cluster, _BUSY_BYTES, cpus)
    pool = Pool("worker", workers, workers, workers, own, 1.0 if gpus else 0.0, memory)
    if not cluster.grows and workers * (1 + decoders) * cpus > cluster.max_cpus > 0:
        raise ConfigError(
            f"finetune.num_workers = {workers} with {decoders} decoders each: too many for the "
            f"{cluster.max_cpus:g} CPUs of the cluster; "
            "lower finetune.num_workers or resources.decoders"
        )
    pools = {
        "worker": pool,
        "decoder": Pool("decoder", decoders, decoders, decoders, cpus, memory=memory),
    }
    threads = config.resources.threads or max(1, min(cores // workers, int(cluster.largest_cpus)))
    return Layout("finetune", pools, "cuda" if gpus else "cpu", threads)


def _train(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out training: `train.num_workers` workers of Ray Train, a number or a range."""
    workers = config.train.num_workers
    minimum, maximum = (workers, workers) if isinstance(workers, int) else workers
    gpus = _training_gpus("train.num_workers", minimum, config, cluster)
    cpus = (cluster.with_gpus if gpus else cluster).share(maximum)
    if maximum > minimum and config.resources.threads and not gpus:
        cpus = float(
            config.resources.threads
        )  # not a share: the cluster may grow to hold more workers
    threads = config.resources.threads or int(_cores(cpus))
    memory = _memory(cluster, _BUSY_BYTES, cpus)
    pool = Pool("worker", minimum, maximum, maximum, cpus, 1.0 if gpus else 0.0, memory)
    pools = {"worker": pool, "features": _features(cluster, cpus)}
    return Layout("train", pools, "cuda" if gpus else "cpu", threads)


def _training_gpus(setting: str, workers: int, config: Config, cluster: Cluster) -> int:
    """Return the GPUs of a training: one per worker, or 0 if the cluster has fewer.

    Raises ConfigError if `resources.gpus` asks for GPUs, but fewer than one per worker.
    """
    gpus = gpu_count(config, cluster)
    if config.resources.gpus > 0 and gpus < workers:
        raise ConfigError(
            f"{setting} = {workers} takes a GPU for each worker, resources.gpus allows {gpus}; "
            "make the two equal, or set resources.gpus to 0 to train on CPUs"
        )
    return workers if gpus >= workers else 0


def _score(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out scoring: replicas of the Serve graph, and the actors that send videos to them.

    The replicas fill the live nodes. Each network has half a GPU; without GPUs each node has one
    replica of each network, which uses all of its cores. One replica asks a server.
    """
    resources = config.resources
    gpus = gpu_count(config, cluster)
    nodes = [node for node in cluster.nodes if node.cpus] or [Node(cluster.largest_cpus)]
    cores, smallest = sum(node.cpus for node in nodes), min(node.cpus for node in nodes)
    unit = min(1.0, smallest)
    # a node holds one decoder per two cores, a sampler and a recogniser
    each_cpus = smallest / (max(1, int(smallest / 2)) + 2)
    memory = _memory(cluster, _BUSY_BYTES, each_cpus)
    waiting = _waiting_memory(cluster, _WAITING_BYTES, each_cpus)
    if gpus:
        # no more than the live nodes hold: `score` computes a new layout whenever they change
        each = _on_gpus(cluster, "sampler", resources.gpus, videos, 0.5, _NETWORK_CPUS * unit)
        networks = {
            name: replace(each, name=name, minimum=1, start=each.now)
            for name in ("sampler", "recognizer")
        }
    else:
        count = min(len(nodes), videos)
        limit = _growth(count, videos)
        networks = {
            name: Pool(name, 1, count, limit, _NETWORK_CPUS * unit, memory=memory)
            for name in ("sampler", "recognizer")
        }
    if config.recognizer.kind == "openai":  # it waits for its server, whose limits hold per run
        networks["recognizer"] = Pool("recognizer", 1, 1, 1, _NETWORK_CPUS * unit, memory=waiting)
    children = max(1, int(min(config.serve.decoder_processes, cores)))
    count = min(resources.decoders or max(1, int((cores - unit) / 2)), videos)
    limit = count if resources.decoders else _growth(count, videos)
    # leaves room for a sampler and a recogniser on the same node
    cpus = round(min(1.0, 0.35 * smallest), 2)
    decoder = Pool("decoder", 1, count, limit, cpus, memory=memory, cores=float(children))
    count = min(_MIN_SENDERS * max(1, len(nodes)), _MAX_SENDERS, videos)
    limit = max(count, min(_MIN_SENDERS * cluster.num_workers, _MAX_SENDERS, videos))
    sender = Pool("sender", 1, count, limit, _WAITING_CPUS, memory=waiting)
    ingress = Pool("ingress", 1, 1, 1, _INGRESS_CPUS * unit, memory=waiting)
    pools = {"decoder": decoder} | networks
    pools |= {"ingress": ingress, "sender": sender, "writer": _writers(cluster, each_cpus)}
    threads = resources.threads or max(1, int(max(node.cpus for node in nodes)))
    return Layout("score", pools, "cuda" if gpus else "cpu", threads, children)


def _serve(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out the endpoint's replicas as `serve.*` says.

    If no share of a GPU is set and the cluster has GPUs, the networks take half a GPU each.
    """
    settings = config.serve
    gpus = gpu_count(config, cluster)
    gpus_set = settings.sampler.num_gpus + settings.recognizer.num_gpus
    scales = {
        name: getattr(settings, name) for name in ("ingress", "decoder", "sampler", "recognizer")
    }
    networks = ["sampler"] + ["recognizer"] * (config.recognizer.kind != "openai")
    # replicas are sized by CPUs: memory must not prevent the minimum number from starting
    room = sum(node.memory for node in cluster.nodes) / (
        sum(scale.min_replicas for scale in scales.values()) + 1
    )
    pools = {}
    for name, scale in scales.items():
        share = 0.5 if name in networks and not gpus_set and gpus else scale.num_gpus
        memory = _memory(cluster, _WAITING_BYTES if name == "ingress" else _BUSY_BYTES)
        memory = int(min(memory, room)) if cluster.nodes else memory
        minimum, maximum = scale.min_replicas, scale.max_replicas
        pools[name] = Pool(name, minimum, minimum, maximum, scale.num_cpus, share, memory)
    on_gpu = any(pools[name].gpus for name in ("sampler", "recognizer"))
    threads = config.resources.threads or max(1, int(cluster.largest_cpus))
    return Layout("serve", pools, "cuda" if on_gpu else "cpu", threads, settings.decoder_processes)


_STAGES: dict[Stage, Callable[[Config, Cluster, int], Layout]] = {
    "extract": _extract,
    "finetune": _finetune,
    "train": _train,
    "score": _score,
    "serve": _serve,
}
