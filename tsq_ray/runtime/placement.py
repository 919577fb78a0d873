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
from tsq_ray.runtime.pools import (
    BUSY_BYTES,
    MAX_ASKED,
    WAITING_BYTES,
    WAITING_CPUS,
    busy_cores,
    busy_pool,
    features_pool,
    gpu_pool,
    growth,
    memory_share,
    sized,
    waiting_memory,
    writer_pool,
)

_NETWORK_CPUS = 0.2
"""CPUs of a sampler or recogniser replica, which uses the cores that decoding leaves."""
_INGRESS_CPUS = 0.1
_MIN_SENDERS, _MAX_SENDERS = 2, 128


def layout(stage: Stage, config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out a stage that processes `videos` videos (evaluate: trainings) on the cluster.

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
        missing = min(pool.limit, MAX_ASKED) - cluster.capacity(pool)
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


def _extract(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out extraction.

    On CPUs, workers decode and encode. With GPUs, each GPU has one encoder, and decoders run on the
    CPUs.
    """
    resources = config.resources
    gpus = gpu_count(config, cluster)
    writers = {"writer": writer_pool(cluster)}
    if not gpus and not resources.decoders:
        cpus = cluster.share(resources.workers) if resources.workers else 0.0
        workers = busy_pool(cluster, "worker", resources.workers, videos, cpus)
        threads = resources.threads or int(workers.cores)
        return Layout("extract", {"worker": workers} | writers, "cpu", threads)
    decoders = busy_pool(cluster, "decoder", resources.decoders, videos)
    cpus = STEP * cluster.unit
    if gpus:
        encoders = gpu_pool(cluster, "encoder", resources.gpus, videos, 1.0, cpus)
    else:
        encoders = Pool("encoder", 1, 1, 1, cpus, memory=memory_share(cluster, BUSY_BYTES))
    threads = resources.threads or max(1, int(cluster.largest_cpus) - 1)
    pools = {"decoder": decoders, "encoder": encoders} | writers
    return Layout("extract", pools, "cuda" if gpus else "cpu", threads)


def _finetune(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out fine-tuning.

    A frozen backbone is laid out like extraction. A trained one has workers, each with decoders.
    """
    if config.finetune.backbone == "frozen":
        placed = _extract(config, cluster, videos)
        pools = placed.pools | {"features": features_pool(cluster)}
        return replace(placed, stage="finetune", pools=pools)
    workers = config.finetune.num_workers
    gpus = _training_gpus("finetune.num_workers", workers, config, cluster)
    cores = max(1, int(cluster.max_cpus or cluster.largest_cpus))
    # a CPU trains much slower than it decodes; a GPU needs as many decoders as fit
    total = config.resources.decoders or (cores - workers if gpus else cores // 4)
    decoders = max(1, total // workers)
    cpus = cluster.share(workers * (1 + decoders))
    own = min(cpus, cluster.with_gpus.share(workers)) if gpus else cpus
    memory = memory_share(cluster, BUSY_BYTES, cpus)
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
    threads = config.resources.threads or int(busy_cores(cpus))
    memory = memory_share(cluster, BUSY_BYTES, cpus)
    pool = Pool("worker", minimum, maximum, maximum, cpus, 1.0 if gpus else 0.0, memory)
    pools = {"worker": pool, "features": features_pool(cluster, cpus)}
    return Layout("train", pools, "cuda" if gpus else "cpu", threads)


def _evaluate(config: Config, cluster: Cluster, trainings: int) -> Layout:
    """Lay out the trainings of an evaluation: tasks of one thread each."""
    memory = memory_share(cluster, BUSY_BYTES, cluster.unit)
    pool = Pool("training", 1, 1, 1, cluster.unit, memory=memory, cores=1.0)
    count = min(trainings, GROWTH_LIMIT)
    return Layout("evaluate", {"training": sized(cluster, pool, count, count)}, "cpu", 1)


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
    memory = memory_share(cluster, BUSY_BYTES, each_cpus)
    waiting = waiting_memory(cluster, WAITING_BYTES, each_cpus)
    if gpus:
        # no more than the live nodes hold: `score` computes a new layout whenever they change
        each = gpu_pool(cluster, "sampler", resources.gpus, videos, 0.5, _NETWORK_CPUS * unit)
        networks = {
            name: replace(each, name=name, minimum=1, start=each.now)
            for name in ("sampler", "recognizer")
        }
    else:
        count = min(len(nodes), videos)
        limit = growth(count, videos)
        networks = {
            name: Pool(name, 1, count, limit, _NETWORK_CPUS * unit, memory=memory)
            for name in ("sampler", "recognizer")
        }
    if config.recognizer.kind == "openai":  # it waits for its server, whose limits hold per run
        networks["recognizer"] = Pool("recognizer", 1, 1, 1, _NETWORK_CPUS * unit, memory=waiting)
    children = max(1, int(min(config.serve.decoder_processes, cores)))
    count = min(resources.decoders or max(1, int((cores - unit) / 2)), videos)
    limit = count if resources.decoders else growth(count, videos)
    # leaves room for a sampler and a recogniser on the same node
    cpus = round(min(1.0, 0.35 * smallest), 2)
    decoder = Pool("decoder", 1, count, limit, cpus, memory=memory, cores=float(children))
    count = min(_MIN_SENDERS * max(1, len(nodes)), _MAX_SENDERS, videos)
    limit = max(count, min(_MIN_SENDERS * cluster.num_workers, _MAX_SENDERS, videos))
    sender = Pool("sender", 1, count, limit, WAITING_CPUS, memory=waiting)
    ingress = Pool("ingress", 1, 1, 1, _INGRESS_CPUS * unit, memory=waiting)
    pools = {"decoder": decoder} | networks
    pools |= {"ingress": ingress, "sender": sender, "writer": writer_pool(cluster, each_cpus)}
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
        memory = memory_share(cluster, WAITING_BYTES if name == "ingress" else BUSY_BYTES)
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
    "evaluate": _evaluate,
    "score": _score,
    "serve": _serve,
}
