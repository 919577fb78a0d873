"""Nodes of a cluster, and pools of actors on them: what a layout is made of, without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Stage = Literal["extract", "finetune", "train", "score", "serve"]
Device = Literal["cpu", "cuda"]

GROWTH_LIMIT = 10_000
"""Actors of a pool whose size only the cluster limits."""
ROOM = 0.1
"""CPUs that busy actors leave free on each node for actors that mostly wait."""
_GIB = 2**30


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
        return math.floor(100 * self.unit * (1 - ROOM / max(1.0, self.smallest_cpus)) + 1e-9) / 100

    @property
    def with_gpus(self) -> Cluster:
        """Its nodes that have a GPU, alone."""
        return replace(
            self,
            nodes=tuple(node for node in self.nodes if node.gpus),
            launchable=tuple(node for node in self.launchable if node.gpus),
        )

    @property
    def num_workers(self) -> int:
        """Nodes that can work, alive and launchable."""
        alive = sum(1 for node in self.nodes if node.cpus)
        return alive + sum(node.count for node in self.launchable if node.cpus)

    def capacity(self, pool: Pool, *, launchable: bool = False) -> int:
        """Number of the pool's actors that fit side by side on the nodes."""
        fit = sum(num_fitting(pool, node) for node in self.nodes)
        if launchable:
            fit += sum(num_fitting(pool, node) * node.count for node in self.launchable)
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


def num_fitting(pool: Pool, node: Node) -> int:
    """How many of the pool's actors the node holds side by side."""
    asked = ((node.cpus, pool.cpus), (node.gpus, pool.gpus), (node.memory, pool.memory))
    fits = (available / wanted for available, wanted in asked if wanted)
    return int(min(fits, default=float(GROWTH_LIMIT)) + 1e-9)


def describe_largest(cluster: Cluster) -> str:
    """CPUs and GPUs of the largest node, alive or launchable."""
    nodes = list(cluster.every_node())
    largest = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0.0))
    return f"{largest.cpus:g} CPU" + (f", {largest.gpus:g} GPU" if largest.gpus else "")
