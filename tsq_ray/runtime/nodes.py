"""Nodes of a cluster and pools of actors on them: the parts of a layout, without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tsq_ray.config import ResourcesConfig

Stage = Literal["extract", "finetune", "train", "evaluate", "score", "serve"]
Device = Literal["cpu", "cuda"]

_WRITE = {"writer": "write", "sender": "write", "ingress": "write"}
_GRAPH = {"decoder": "decode", "sampler": "networks", "recognizer": "networks"}
PARTS: dict[Stage, dict[str, str]] = {
    "extract": {"worker": "decode", "decoder": "decode", "encoder": "networks"} | _WRITE,
    "finetune": {"worker": "networks", "decoder": "decode", "encoder": "networks"}
    | {"features": "networks"}
    | _WRITE,
    "train": {"worker": "networks", "features": "networks"},
    "evaluate": {},
    "score": _GRAPH | _WRITE,
    "serve": _GRAPH | _WRITE,
}
"""Which of `resources.labels` applies to each pool of a stage."""
GROWTH_LIMIT = 10_000
"""Limit of a pool whose size is bounded only by the cluster."""
STEP = 0.05
"""CPUs are shared out in multiples of this."""
ROOM = 0.1
"""CPUs that busy actors leave free on each node, for actors that mostly wait."""
_GIB = 2**30


@dataclass(frozen=True)
class Node:
    """The resources of a node, or of a node type of which the autoscaler can start `count`."""

    cpus: float
    gpus: float = 0.0
    memory: float = math.inf
    """Bytes."""
    count: int = 1
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cluster:
    """The live nodes, and the nodes that the autoscaler may add."""

    nodes: tuple[Node, ...]
    launchable: tuple[Node, ...] = ()
    grows: bool = False
    """Whether a node manager may add nodes, of types that no setting names."""
    required: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Labels of the nodes on which a pool may be placed, by the pool's name."""

    def labelled(self, pool: Pool) -> Pool:
        """Return the pool with the labels that its nodes must have."""
        return replace(pool, labels=self.required.get(pool.name, {}))

    def every_node(self) -> Iterator[Node]:
        """Yield the live nodes, then the launchable node types."""
        yield from self.nodes
        yield from (node for node in self.launchable if node.count > 0)

    @property
    def cpus(self) -> float:
        """CPUs of the live nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def max_cpus(self) -> float:
        """CPUs of the live nodes and of all launchable ones."""
        return self.cpus + sum(node.cpus * node.count for node in self.launchable)

    @property
    def gpus(self) -> int:
        """GPUs of the live nodes."""
        return int(sum(node.gpus for node in self.nodes))

    @property
    def max_gpus(self) -> int:
        """GPUs of the live nodes and of all launchable ones."""
        return self.gpus + int(sum(node.gpus * node.count for node in self.launchable))

    @property
    def largest_cpus(self) -> float:
        """CPUs of the largest node, live or launchable; 1 if no node has any yet."""
        return max((node.cpus for node in self.every_node()), default=0.0) or 1.0

    @property
    def smallest_cpus(self) -> float:
        """CPUs of the smallest node with CPUs, live or launchable."""
        return min((node.cpus for node in self.every_node() if node.cpus), default=1.0)

    @property
    def unit(self) -> float:
        """One core, or less if no node has a whole one."""
        return min(1.0, self.largest_cpus)

    @property
    def busy_cpus(self) -> float:
        """CPUs of an actor that keeps a core busy: slightly less than `unit`, to leave ROOM."""
        return math.floor(100 * self.unit * (1 - ROOM / max(1.0, self.smallest_cpus)) + 1e-9) / 100

    @property
    def with_gpus(self) -> Cluster:
        """The same cluster, reduced to its nodes with GPUs."""
        return replace(
            self,
            nodes=tuple(node for node in self.nodes if node.gpus),
            launchable=tuple(node for node in self.launchable if node.gpus),
        )

    @property
    def num_workers(self) -> int:
        """Number of nodes with CPUs, live and launchable."""
        alive = sum(1 for node in self.nodes if node.cpus)
        return alive + sum(node.count for node in self.launchable if node.cpus)

    def share(self, actors: int) -> float:
        """Return the largest CPU share per actor at which the nodes hold all `actors`.

        Launchable nodes count like live ones. On a cluster that grows by unknown nodes an actor
        asks for at least a core, because actors that do not fit make it grow.
        """
        nodes = [node for node in self.every_node() if node.cpus] or [Node(self.largest_cpus)]
        free = [(node.cpus - ROOM * min(1.0, node.cpus), node.count) for node in nodes]
        minimum = self.busy_cpus if self.grows else STEP * self.unit
        for steps in range(int(max(cpus for cpus, _ in free) / STEP + 1e-9), 1, -1):
            each = round(steps * STEP, 2)
            if each > minimum and sum(int(c / each + 1e-9) * count for c, count in free) >= actors:
                return each
        return minimum

    def capacity(self, pool: Pool, *, launchable: bool = False) -> int:
        """Return how many of the pool's actors fit on the live nodes at once.

        With `launchable`, the nodes that can still be started count too.
        """
        fit = sum(num_fitting(pool, node) for node in self.nodes)
        if launchable:
            fit += sum(num_fitting(pool, node) * node.count for node in self.launchable)
        return fit


@dataclass(frozen=True)
class Pool:
    """A group of identical actors, and the resources that each of them requests."""

    name: str
    minimum: int
    start: int
    """Initial number of actors."""
    limit: int
    cpus: float
    gpus: float = 0.0
    memory: int = 0
    """Bytes that one actor is expected to use."""
    cores: float = 0.0
    """Physical cores that one actor keeps busy; 0 if it mostly waits."""
    fit: int = 0
    """How many actors the live nodes hold, if the others wait for new nodes; 0: all."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that the actors' nodes must have."""

    @property
    def now(self) -> int:
        """How many actors the live nodes hold."""
        return self.fit or self.start

    def describe(self) -> str:
        """Describe the pool for display: its size, then the resources of one actor."""
        limit = "as the cluster grows" if self.limit >= GROWTH_LIMIT else f"up to {self.limit}"
        return f"{self.now}{f' ({limit})' if self.limit > self.now else ''} of {self.actor}"

    @property
    def actor(self) -> str:
        """The resources of one actor, for display."""
        parts = [f"{self.cpus:g} CPU"]
        parts += [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{self.memory / _GIB:.2g} GiB"] if self.memory else []
        parts += [f"{name}={value}" for name, value in self.labels.items()]
        return ", ".join(parts)


@dataclass(frozen=True)
class Layout:
    """The pools of a stage, and where and how their networks run."""

    stage: Stage
    pools: dict[str, Pool] = field(default_factory=dict)
    device: Device = "cpu"
    threads: int = 1
    """Threads of each network that runs on CPUs."""
    decoder_processes: int = 1
    """Decoding child processes per decoding actor."""

    def __getitem__(self, name: str) -> Pool:
        return self.pools[name]

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def describe(self) -> dict[str, str]:
        """Describe the layout for display: one line per pool."""
        networks = "a GPU each" if self.on_gpu else f"CPU, {self.threads} threads each"
        pools = {name: pool.describe() for name, pool in self.pools.items()}
        return pools | {"networks": networks}


def not_yet_started(types: Sequence[Node], alive: Sequence[Node]) -> tuple[Node, ...]:
    """Return the node types with the number of nodes that are not alive yet.

    A live node counts for one type: of those with its size and its labels, the one with the most
    labels that has any left.
    """
    left = list(types)
    order = sorted(range(len(types)), key=lambda place: -len(types[place].labels))
    for node in alive:
        for place in order:
            kind = left[place]
            same = (node.cpus, node.gpus) == (kind.cpus, kind.gpus)
            if same and kind.count and kind.labels.items() <= node.labels.items():
                left[place] = replace(kind, count=kind.count - 1)
                break
    return tuple(left)


def num_fitting(pool: Pool, node: Node) -> int:
    """Return how many of the pool's actors the node holds at once."""
    if not pool.labels.items() <= node.labels.items():
        return 0
    pairs = ((node.cpus, pool.cpus), (node.gpus, pool.gpus), (node.memory, pool.memory))
    fits = (available / requested for available, requested in pairs if requested)
    return int(min(fits, default=float(GROWTH_LIMIT)) + 1e-9)


def unplaced(placed: Layout, free: Sequence[Node]) -> Pool | None:
    """Return a pool that has no room for the actors it starts with; None if every pool has.

    A pool that grows with the cluster starts with one, the others with their minimum.

    Args:
        placed: the layout.
        free: the live nodes, reduced to their unused resources.
    """
    left = list(free)
    for pool in sorted(placed.pools.values(), key=lambda pool: (-pool.gpus, -pool.cpus)):
        for _ in range(1 if pool.fit else pool.minimum):
            place = next((i for i, node in enumerate(left) if num_fitting(pool, node)), None)
            if place is None:
                return pool
            node = left[place]
            left[place] = replace(
                node,
                cpus=node.cpus - pool.cpus,
                gpus=node.gpus - pool.gpus,
                memory=node.memory - pool.memory,
            )
    return None


def shortfalls(placed: Layout, resources: ResourcesConfig, cluster: Cluster) -> Iterator[str]:
    """Yield what a run starts without: GPUs that no setting names, actors without a node so far."""
    may_use_gpus = placed.stage != "evaluate"
    if may_use_gpus and resources.gpus < 0 and cluster.grows and not placed.on_gpu:
        yield (
            "no node has a GPU now, so the networks run on CPUs; to have the cluster start GPU "
            "nodes, name them in resources.node_types, or set resources.gpus to 0 to run on CPUs"
        )
    counted = {name: ("gpus", resources.gpus) for name in ("encoder", "sampler")}
    counted |= {"worker": ("workers", resources.workers)}
    counted |= {"decoder": ("decoders", resources.decoders)}
    for name, (setting, asked) in counted.items():
        pool = placed.pools.get(name)
        if pool is None or asked < 1 or pool.minimum == pool.limit:
            continue  # the cluster sizes it, or it waits for all of its actors
        available = min(
            pool.limit, cluster.capacity(replace(pool, gpus=float(math.ceil(pool.gpus))))
        )
        if available < pool.limit:
            yield (
                f"resources.{setting} = {asked}: the nodes hold {available} of {pool.limit} "
                f"{name}s now; the others start when nodes join"
            )


def describe_largest(cluster: Cluster) -> str:
    """Describe the CPUs and GPUs of the largest node, live or launchable."""
    nodes = list(cluster.every_node())
    largest = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0.0))
    return f"{largest.cpus:g} CPU" + (f", {largest.gpus:g} GPU" if largest.gpus else "")
