"""Where the actors of a stage go: one pure function, without Ray, for every stage.

A pool grows and shrinks between a minimum and a limit while its run goes on. What one actor asks
for depends on the nodes alone, never on the size of the cluster: an actor that asks for more than
the largest node has would wait forever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from tsq_ray.config import Config
from tsq_ray.errors import ConfigError

Stage = Literal["extract", "finetune", "train", "score", "serve"]
Device = Literal["cpu", "cuda"]

GROWTH_LIMIT = 10_000
"""Actors of a pool whose size only the cluster limits."""
_VIDEOS_PER_ACTOR = 8
"""With fewer to do an actor is not worth a node that has to be started for it."""
_MAX_ASKED = 1000
"""Actors of a pool that wait for nodes to come, at most."""
_MIN_AHEAD = 8
_ROOM = 0.1
"""CPUs that busy actors leave free on each node for actors that mostly wait."""
_WAITING_CPUS = 0.01
"""Of an actor that mostly waits. Not 0, so that a head node without CPUs takes none of them."""
_NETWORK_CPUS = 0.2
"""Of a replica of the sampler or the recogniser: it uses the cores that decoding leaves."""
_INGRESS_CPUS = 0.1
_STEP = 0.05
_GIB = 2**30
_BUSY_BYTES = 2 * _GIB
_WAITING_BYTES = _GIB // 4
_WRITING_BYTES = _GIB // 2
_MIN_WRITERS, _MAX_WRITERS = 2, 64
_MIN_SENDERS, _MAX_SENDERS = 2, 128


@dataclass(frozen=True)
class Node:
    """What a node has, or a type of node of which the autoscaler can start `count`."""

    cpus: float
    gpus: float = 0.0
    memory: float = math.inf
    """Bytes."""
    count: int = 1
    name: str = ""


@dataclass(frozen=True)
class Cluster:
    """The nodes that are alive, and those that the autoscaler may start beside them."""

    nodes: tuple[Node, ...]
    launchable: tuple[Node, ...] = ()
    grows: bool = False
    """Whether something manages the nodes that may start more, of kinds that are not known here."""

    def every_node(self) -> Iterator[Node]:
        """The alive nodes, then the types that can be started."""
        yield from self.nodes
        yield from (node for node in self.launchable if node.count > 0)

    @property
    def cpus(self) -> float:
        """Of the alive nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Of the alive nodes."""
        return int(sum(node.gpus for node in self.nodes))

    @property
    def max_gpus(self) -> int:
        """Of the alive nodes and of all that can be started."""
        return self.gpus + int(sum(node.gpus * node.count for node in self.launchable))

    @property
    def largest_cpus(self) -> float:
        """CPUs of the largest node, alive or launchable; 1 where none has any yet."""
        return max((node.cpus for node in self.every_node()), default=0.0) or 1.0

    @property
    def smallest_cpus(self) -> float:
        """CPUs of the smallest node that has some, alive or launchable."""
        return min((node.cpus for node in self.every_node() if node.cpus), default=1.0)

    @property
    def unit(self) -> float:
        """One core, or less where no node has a whole one."""
        return min(1.0, self.largest_cpus)

    @property
    def busy_cpus(self) -> float:
        """CPUs of an actor that keeps a core busy: a little less, so that each node has room."""
        return math.floor(100 * self.unit * (1 - _ROOM / max(1.0, self.smallest_cpus)) + 1e-9) / 100

    @property
    def num_workers(self) -> int:
        """Nodes that can work, alive and launchable."""
        alive = sum(1 for node in self.nodes if node.cpus)
        return alive + sum(node.count for node in self.launchable if node.cpus)

    def capacity(self, pool: Pool, *, launchable: bool = False) -> int:
        """Number of the pool's actors that fit side by side on the nodes."""
        fit = sum(_fit(pool, node) for node in self.nodes)
        if launchable:
            fit += sum(_fit(pool, node) * node.count for node in self.launchable)
        return fit


@dataclass(frozen=True)
class Pool:
    """Actors that are alike, and what one of them asks for."""

    name: str
    minimum: int
    start: int
    """With which the pool begins."""
    limit: int
    cpus: float
    gpus: float = 0.0
    memory: int = 0
    """Bytes that one actor is expected to take."""
    cores: float = 0.0
    """Real cores that one actor keeps busy; 0 for one that mostly waits."""
    fit: int = 0
    """How many of them the alive nodes hold, where the others wait for nodes to come; 0: all."""

    @property
    def now(self) -> int:
        """How many of them the alive nodes hold."""
        return self.fit or self.start

    def describe(self) -> str:
        """For people: number, then what one asks for."""
        limit = "as the cluster grows" if self.limit >= GROWTH_LIMIT else f"up to {self.limit}"
        parts = [f"{self.cpus:g} CPU"]
        parts += [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{self.memory / _GIB:.2g} GiB"] if self.memory else []
        return f"{self.now}{f' ({limit})' if self.limit > self.now else ''} of {', '.join(parts)}"


@dataclass(frozen=True)
class Layout:
    """The pools of a stage, and how the networks in them run."""

    stage: Stage
    pools: dict[str, Pool] = field(default_factory=dict)
    device: Device = "cpu"
    threads: int = 1
    """Of each network on a CPU."""
    decoder_processes: int = 1
    """Decoding children of each actor that decodes."""

    def __getitem__(self, name: str) -> Pool:
        return self.pools[name]

    @property
    def on_gpu(self) -> bool:
        """Whether the networks run on GPUs."""
        return self.device == "cuda"

    def describe(self) -> dict[str, str]:
        """For people: a line a pool."""
        networks = "a GPU each" if self.on_gpu else f"CPU, {self.threads} threads each"
        pools = {name: pool.describe() for name, pool in self.pools.items()}
        return pools | {"networks": networks}


def layout(stage: Stage, config: Config, cluster: Cluster, videos: int) -> Layout:
    """Lay out a stage over `videos` on the cluster.

    Raises ConfigError where no node, alive or launchable, can ever hold one of its actors.
    """
    placed = _STAGES[stage](config, cluster, max(1, videos))
    _check_fits(placed, cluster)
    return placed


def gpu_count(config: Config, cluster: Cluster) -> int:
    """GPUs that a stage asks for: `resources.gpus`, or all there are or can be.

    Raises ConfigError where `resources.gpus` asks for some and no node can ever have one.
    """
    wanted = config.resources.gpus
    if wanted < 0:
        return cluster.max_gpus
    if wanted and not cluster.max_gpus and not cluster.grows:
        raise ConfigError(
            f"resources.gpus = {wanted}: no node of the cluster has a GPU, nor can one be started; "
            "set it to 0 to run on CPUs, or add GPU nodes"
        )
    return wanted


def wanted_nodes(placed: Layout, cluster: Cluster) -> list[dict[str, float]]:
    """Resources of each node that the layout can use: the alive ones, then launchable ones.

    As many of these as bring the cores and the GPUs of the pools at their limits. Where the
    cluster grows by nodes of unknown kinds: what each missing actor asks for.
    """
    pools = placed.pools.values()
    gpus = max(pool.limit * pool.gpus for pool in pools) - cluster.gpus
    cores = sum(pool.limit * pool.cores for pool in pools if not pool.gpus) - cluster.cpus
    bundles = [_resources(node) for node in cluster.nodes if node.cpus or node.gpus]
    plain = [node for node in cluster.launchable if not node.gpus]
    for node in sorted((node for node in cluster.launchable if node.gpus), key=lambda node: node.gpus):
        missing = max(gpus / node.gpus, 0.0 if plain else cores / max(node.cpus, 1.0))
        count = min(node.count, max(0, math.ceil(missing)))
        bundles += [_resources(node)] * count
        gpus, cores = gpus - count * node.gpus, cores - count * node.cpus
    for node in sorted((node for node in plain if node.cpus), key=lambda node: -node.cpus):
        count = min(node.count, max(0, math.ceil(cores / node.cpus)))
        bundles += [_resources(node)] * count
        cores -= count * node.cpus
    if cluster.grows and not cluster.launchable:
        for pool in (pool for pool in pools if pool.gpus or pool.cores):
            missing = min(pool.limit, _MAX_ASKED) - cluster.capacity(pool)
            bundles += [{"CPU": pool.cpus} | ({"GPU": pool.gpus} if pool.gpus else {})] * max(0, missing)
    return bundles


def _check_fits(placed: Layout, cluster: Cluster) -> None:
    nodes = [node for node in cluster.every_node() if node.cpus or node.gpus]
    for pool in placed.pools.values():
        if nodes and not cluster.grows and not any(_fit(pool, node) for node in nodes):
            asked = [f"{pool.cpus:g} CPU", *([f"{pool.gpus:g} GPU"] if pool.gpus else [])]
            raise ConfigError(
                f"{placed.stage}: a {pool.name} asks for {' and '.join(asked)}, which no node of the "
                f"cluster can ever hold (largest: {describe_largest(cluster)}); "
                "ask for less, or add such a node"
            )


def describe_largest(cluster: Cluster) -> str:
    """CPUs and GPUs of the largest node, alive or launchable."""
    nodes = list(cluster.every_node())
    largest = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0.0))
    return f"{largest.cpus:g} CPU" + (f", {largest.gpus:g} GPU" if largest.gpus else "")


def _resources(node: Node) -> dict[str, float]:
    return {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})


def _fit(pool: Pool, node: Node) -> int:
    asked = ((node.cpus, pool.cpus), (node.gpus, pool.gpus), (node.memory, pool.memory))
    fits = (available / wanted for available, wanted in asked if wanted)
    return int(min(fits, default=float(GROWTH_LIMIT)) + 1e-9)


def _share(cluster: Cluster, actors: int) -> float:
    """CPUs of one of `actors` alike: as many as let the alive nodes hold all of them."""
    cpus = [node.cpus for node in cluster.nodes if node.cpus] or [cluster.largest_cpus]
    free = [count - _ROOM * min(1.0, count) for count in cpus]
    for steps in range(int(max(free) / _STEP + 1e-9), 1, -1):
        each = round(steps * _STEP, 2)
        if sum(int(count / each + 1e-9) for count in free) >= actors:
            return each
    return _STEP * cluster.unit


def _memory(cluster: Cluster, wanted: int) -> int:
    """Bytes to declare: `wanted`, or a core's share of the node with the least for each core."""
    shares = [node.memory / (math.ceil(node.cpus) + 1) for node in cluster.every_node() if node.cpus]
    return int(min([wanted, *shares]))


def _busy(cluster: Cluster, name: str, asked: int, most: int, cpus: float = 0.0) -> Pool:
    """Actors that keep a core busy each: `asked` of them, or as many as the nodes hold."""
    cpus = cpus or cluster.busy_cpus
    memory = _memory(cluster, _BUSY_BYTES)
    pool = Pool(name, 1, 1, 1, cpus, memory=memory, cores=_cores(cpus))
    return _sized(cluster, pool, asked, most)


def _sized(cluster: Cluster, pool: Pool, asked: int, most: int) -> Pool:
    """The pool with `asked` actors, or (0) with as many as there is room for, at most `most`.

    More than that, up to the limit, are there before their nodes: it is they that ask the
    autoscaler for nodes, and on one that joins they start at once.
    """
    if asked:
        return replace(pool, start=min(asked, most), limit=min(asked, most))
    alive = min(most, max(1, cluster.capacity(pool)))
    limit = _growth(alive, most)
    ahead = cluster.capacity(pool, launchable=True) - alive if cluster.launchable else max(alive, _MIN_AHEAD)
    start = min(limit, alive + min(max(0, ahead), _MAX_ASKED))
    return replace(pool, minimum=start, start=start, limit=limit, fit=min(alive, start))


def _growth(start: int, videos: int) -> int:
    """The limit of a pool that grows with the cluster."""
    return max(start, min(GROWTH_LIMIT, -(-videos // _VIDEOS_PER_ACTOR)))


def _cores(cpus: float) -> float:
    """Cores that an actor with these logical CPUs keeps busy."""
    return float(max(1, round(cpus)))


def _writers(cluster: Cluster) -> Pool:
    limit = max(_MIN_WRITERS, min(_MAX_WRITERS, cluster.num_workers))
    return Pool("writer", 1, 1, limit, _WAITING_CPUS, memory=_memory(cluster, _WRITING_BYTES))


def _on_gpus(cluster: Cluster, name: str, asked: int, most: int, share: float, cpus: float) -> Pool:
    """Actors with `share` of a GPU each. `asked` GPUs are waited for; -1: what there is."""
    pool = Pool(name, 1, 1, 1, cpus, 1.0, _memory(cluster, _BUSY_BYTES))
    return replace(_sized(cluster, pool, max(0, asked), most), gpus=share)


def _extract(config: Config, cluster: Cluster, videos: int) -> Layout:
    """CPUs: workers that decode and encode. GPUs: one encoder each, decoders beside them."""
    resources = config.resources
    gpus = gpu_count(config, cluster)
    writers = {"writer": _writers(cluster)}
    if not gpus and not resources.decoders:
        cpus = _share(cluster, resources.workers) if resources.workers else 0.0
        workers = _busy(cluster, "worker", resources.workers, videos, cpus)
        threads = resources.threads or int(workers.cores)
        return Layout("extract", {"worker": workers} | writers, "cpu", threads)
    decoders = _busy(cluster, "decoder", resources.decoders, videos)
    cpus = _STEP * cluster.unit
    if gpus:
        encoders = _on_gpus(cluster, "encoder", resources.gpus, videos, 1.0, cpus)
    else:
        encoders = Pool("encoder", 1, 1, 1, cpus, memory=_memory(cluster, _BUSY_BYTES))
    threads = resources.threads or max(1, int(cluster.largest_cpus) - 1)
    pools = {"decoder": decoders, "encoder": encoders} | writers
    return Layout("extract", pools, "cuda" if gpus else "cpu", threads)


def _finetune(config: Config, cluster: Cluster, videos: int) -> Layout:
    """A frozen backbone: as an extraction. A trained one: workers, and decoders for each."""
    if config.finetune.backbone == "frozen":
        return replace(_extract(config, cluster, videos), stage="finetune")
    workers = config.finetune.num_workers
    gpus = _training_gpus("finetune.num_workers", workers, config, cluster)
    cores = max(1, int(cluster.cpus or cluster.largest_cpus))
    # a CPU trains much slower than it decodes; a GPU needs all decoders there is room for
    wanted = config.resources.decoders or (cores - workers if gpus else cores // 4)
    decoders = max(1, wanted // workers)
    cpus = _share(cluster, workers * (1 + decoders))
    pool = Pool("worker", workers, workers, workers, cpus, 1.0 if gpus else 0.0)
    if cluster.nodes and cluster.cpus and workers * (1 + decoders) * cpus > cluster.cpus:
        raise ConfigError(
            f"finetune.num_workers = {workers} with {decoders} decoders each: too many for the "
            f"{cluster.cpus:g} CPUs of the cluster; lower it or resources.decoders"
        )
    pools = {"worker": pool, "decoder": Pool("decoder", decoders, decoders, decoders, cpus)}
    threads = config.resources.threads or max(1, cores // workers)
    return Layout("finetune", pools, "cuda" if gpus else "cpu", threads)


def _train(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Workers of Ray Train: `train.num_workers`, or between the two numbers that it gives."""
    workers = config.train.num_workers
    fewest, most = (workers, workers) if isinstance(workers, int) else workers
    gpus = _training_gpus("train.num_workers", fewest, config, cluster)
    cpus = _share(cluster, most)
    if most > fewest and config.resources.threads and not gpus:
        cpus = float(config.resources.threads)  # a cluster that grows holds more of them
    threads = config.resources.threads or int(_cores(cpus))
    pool = Pool("worker", fewest, most, most, cpus, 1.0 if gpus else 0.0)
    return Layout("train", {"worker": pool}, "cuda" if gpus else "cpu", threads)


def _training_gpus(setting: str, workers: int, config: Config, cluster: Cluster) -> int:
    """GPUs for a training: one a worker, or none where fewer are to be had unasked."""
    gpus = gpu_count(config, cluster)
    if config.resources.gpus > 0 and gpus < workers:
        raise ConfigError(
            f"{setting} = {workers} takes a GPU for each worker, resources.gpus allows {gpus}; "
            "make the two equal, or set resources.gpus to 0 to train on CPUs"
        )
    return workers if gpus >= workers else 0


def _score(config: Config, cluster: Cluster, videos: int) -> Layout:
    """Replicas of the Serve graph on the alive nodes, and the actors that send videos to it.

    Networks: half a GPU each; without GPUs one of each a node, which uses all of its cores.
    """
    resources = config.resources
    gpus = gpu_count(config, cluster)
    nodes = [node for node in cluster.nodes if node.cpus] or [Node(cluster.largest_cpus)]
    cores, smallest = sum(node.cpus for node in nodes), min(node.cpus for node in nodes)
    unit = min(1.0, smallest)
    if gpus:
        # replicas follow the nodes: `score` lays itself out again when these change
        each = _on_gpus(cluster, "", resources.gpus, videos, 0.5, _NETWORK_CPUS * unit)
        networks = {name: replace(each, name=name, minimum=1, start=each.now) for name in ("sampler", "recognizer")}
    else:
        count = min(len(nodes), videos)
        limit, memory = _growth(count, videos), _memory(cluster, _BUSY_BYTES)
        networks = {name: Pool(name, 1, count, limit, _NETWORK_CPUS * unit, memory=memory) for name in ("sampler", "recognizer")}
    children = max(1, int(min(config.serve.decoder_processes, cores)))
    count = min(resources.decoders or max(1, int((cores - unit) / 2)), videos)
    limit = count if resources.decoders else _growth(count, videos)
    # room beside it for a sampler and a recogniser
    cpus, memory = round(min(1.0, 0.35 * smallest), 2), _memory(cluster, _BUSY_BYTES)
    decoder = Pool("decoder", 1, count, limit, cpus, memory=memory, cores=float(children))
    count = min(_MIN_SENDERS * max(1, len(nodes)), _MAX_SENDERS, videos)
    limit = max(count, min(_MIN_SENDERS * cluster.num_workers, _MAX_SENDERS, videos))
    sender = Pool("sender", 1, count, limit, _WAITING_CPUS, memory=_memory(cluster, _WAITING_BYTES))
    ingress = Pool("ingress", 1, 1, 1, _INGRESS_CPUS * unit)
    pools = {"decoder": decoder} | networks
    pools |= {"ingress": ingress, "sender": sender, "writer": _writers(cluster)}
    threads = resources.threads or max(1, int(max(node.cpus for node in nodes)))
    return Layout("score", pools, "cuda" if gpus else "cpu", threads, children)


def _serve(config: Config, cluster: Cluster, videos: int) -> Layout:
    """The endpoint's replicas, as `serve.*` says; the networks take a GPU where there is one."""
    settings = config.serve
    gpus = gpu_count(config, cluster)
    asked = settings.sampler.num_gpus + settings.recognizer.num_gpus
    pools = {}
    for name in ("ingress", "decoder", "sampler", "recognizer"):
        scale = getattr(settings, name)
        share = scale.num_gpus
        if name in ("sampler", "recognizer") and not asked and gpus:
            share = 0.5
        pools[name] = Pool(name, scale.min_replicas, scale.min_replicas, scale.max_replicas, scale.num_cpus, share)
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
