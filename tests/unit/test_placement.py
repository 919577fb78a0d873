"""Where the actors of each stage go: tables of clusters and settings, without Ray."""

from __future__ import annotations

from typing import Any

import pytest

from tsq_ray.config import load_config
from tsq_ray.errors import ConfigError
from tsq_ray.runtime.cluster import cluster_of
from tsq_ray.runtime.nodes import (
    Cluster,
    Layout,
    Node,
    Pool,
    Stage,
    not_yet_started,
    shortfalls,
    unplaced,
)
from tsq_ray.runtime.placement import gpu_count, layout, usable_nodes, wanted_nodes

GIB = 2**30
TWO_CORES = Cluster((Node(2, memory=14 * GIB),))
EMPTY_HEAD = Node(0)


def many(count: int, cpus: float, gpus: float = 0) -> tuple[Node, ...]:
    return (Node(cpus, gpus),) * count


def place(stage: Stage, cluster: Cluster, videos: int, *sets: str) -> Layout:
    return layout(stage, load_config(None, sets), cluster, videos)


def sizes(placed: Layout) -> dict[str, tuple[int, int, float]]:
    """For the pools that keep cores or GPUs busy: how many the nodes hold, limit, CPUs of one."""
    pools = placed.pools.items()
    return {
        name: (pool.now, pool.limit, pool.cpus)
        for name, pool in pools
        if name not in ("writer", "sender", "ingress", "features")
    }


@pytest.mark.parametrize(
    ("cluster", "videos", "sets", "expected", "threads"),
    [
        (TWO_CORES, 100, [], {"worker": (2, 13, 0.95)}, 1),
        (TWO_CORES, 1, [], {"worker": (1, 1, 0.95)}, 1),
        (TWO_CORES, 100, ["resources.workers=1"], {"worker": (1, 1, 1.9)}, 2),
        (TWO_CORES, 100, ["resources.workers=4"], {"worker": (4, 4, 0.45)}, 1),
        (TWO_CORES, 100, ["resources.threads=3"], {"worker": (2, 13, 0.95)}, 3),
        (
            TWO_CORES,
            100,
            ["resources.decoders=1"],
            {"decoder": (1, 1, 0.95), "encoder": (1, 1, 0.05)},
            1,
        ),
        (Cluster(many(2, 1)), 1, [], {"worker": (1, 1, 0.9)}, 1),
        (Cluster(many(16, 8)), 15, [], {"worker": (15, 15, 0.98)}, 1),
        (Cluster(many(200, 16)), 1, [], {"worker": (1, 1, 0.99)}, 1),
        (Cluster(many(200, 16)), 10**7, [], {"worker": (3200, 10_000, 0.99)}, 1),
        (Cluster((EMPTY_HEAD, Node(32))), 1000, [], {"worker": (32, 125, 0.99)}, 1),
        (Cluster((Node(0.5),)), 10, [], {"worker": (1, 2, 0.45)}, 1),
        (Cluster(()), 100, [], {"worker": (1, 13, 0.9)}, 1),
        (
            Cluster(many(1, 32, 2)),
            100,
            [],
            {"decoder": (32, 32, 0.99), "encoder": (2, 13, 0.05)},
            31,
        ),
        (
            Cluster(many(1, 32, 2)),
            100,
            ["resources.gpus=1"],
            {"decoder": (32, 32, 0.99), "encoder": (1, 1, 0.05)},
            31,
        ),
        (Cluster(many(1, 32, 2)), 100, ["resources.gpus=0"], {"worker": (32, 32, 0.99)}, 1),
    ],
    ids=[
        *(
            "two cores",
            "one video",
            "one worker",
            "four workers",
            "threads",
            "decoders apart",
            "one video, two nodes",
        ),
        *(
            "fifteen videos",
            "200 nodes",
            "ten million",
            "head without CPUs",
            "half a core",
            "no node yet",
        ),
        *("GPUs", "one of two GPUs", "no GPU wanted"),
    ],
)
def test_extract(
    cluster: Cluster,
    videos: int,
    sets: list[str],
    expected: dict[str, tuple[int, int, float]],
    threads: int,
) -> None:
    placed = place("extract", cluster, videos, *sets)
    assert sizes(placed) == expected
    assert placed.threads == threads
    assert placed.device == (
        "cuda" if placed.pools.get("encoder", Pool("", 0, 0, 0, 0)).gpus else "cpu"
    )
    frozen = place("finetune", cluster, videos, "finetune.backbone=frozen", *sets)
    assert sizes(frozen) == expected, "a frozen backbone is an extraction"


@pytest.mark.parametrize("stage", ["extract", "finetune", "train", "evaluate", "score", "serve"])
@pytest.mark.parametrize("cpus", [0.5, 1, 2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("nodes", [1, 2, 7, 200])
@pytest.mark.parametrize("videos", [1, 15, 10**6])
def test_every_actor_fits_on_the_largest_node(
    stage: Stage, cpus: float, nodes: int, videos: int
) -> None:
    cluster = Cluster((EMPTY_HEAD, *many(nodes, cpus)))
    if stage == "serve" and cpus < 1:
        return  # its sizes are settings
    placed = place(stage, cluster, videos, "finetune.backbone=frozen")
    busy = {name: pool for name, pool in placed.pools.items() if pool.cores}
    for pool in placed.pools.values():
        assert pool.minimum <= pool.start <= pool.limit
        assert pool.cpus <= cpus, pool
        assert not pool.cores or pool.start <= videos
    if stage == "extract":
        assert sum(pool.now * pool.cpus for pool in busy.values()) < cpus * nodes, (
            "room for the writer"
        )


@pytest.mark.parametrize(
    ("setting", "cluster", "expected"),
    [
        (-1, Cluster(many(4, 8)), 0),
        (-1, Cluster(many(4, 8, 2)), 8),
        (-1, Cluster((EMPTY_HEAD,), (Node(8, 1, count=64),)), 64),
        (0, Cluster(many(4, 8, 2)), 0),
        (3, Cluster(many(1, 8, 2)), 3),
        (3, Cluster((EMPTY_HEAD,), (Node(8, 1, count=64),)), 3),
        (3, Cluster(many(1, 8), grows=True), 3),
    ],
)
def test_gpus(setting: int, cluster: Cluster, expected: int) -> None:
    assert gpu_count(load_config(None, [f"resources.gpus={setting}"]), cluster) == expected


@pytest.mark.parametrize(
    ("stage", "cluster", "sets", "line"),
    [
        ("extract", Cluster((EMPTY_HEAD,), grows=True), [], "no node has a GPU now, so the netw"),
        ("extract", Cluster((EMPTY_HEAD,), grows=True), ["resources.gpus=0"], None),
        ("extract", Cluster(many(1, 8), grows=True), [], "no node has a GPU now, so the networks"),
        ("extract", Cluster(many(1, 8, 1), grows=True), [], None),
        ("extract", Cluster(many(1, 8)), [], None),
        (
            "extract",
            Cluster(many(1, 8, 2)),
            ["resources.gpus=4"],
            "gpus = 4: the nodes hold 2 of 4",
        ),
        ("score", Cluster(many(1, 8, 2)), ["resources.gpus=4"], "gpus = 4: the nodes hold 2 of 4"),
        ("extract", Cluster(many(1, 8, 2)), ["resources.gpus=2"], None),
        ("extract", Cluster(many(1, 8, 2)), ["resources.gpus=1", "resources.decoders=99"], "of 99"),
        (
            "extract",
            Cluster(many(1, 2), grows=True),
            ["resources.workers=8", "resources.gpus=0"],
            "hold 2 of 8 workers",
        ),
        ("train", Cluster(many(1, 8, 1)), ["resources.gpus=4", "train.num_workers=4"], None),
    ],
)
def test_a_run_says_what_it_starts_without(
    stage: Stage, cluster: Cluster, sets: list[str], line: str | None
) -> None:
    config = load_config(None, sets)
    said = list(shortfalls(layout(stage, config, cluster, 1000), config.resources, cluster))
    assert [line in text for text in said] == [True] if line else said == [], said


def test_gpus_that_no_node_can_have_are_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"resources.gpus = 2: no node of the cluster has a GPU.*set it to 0"
    ):
        place("extract", TWO_CORES, 10, "resources.gpus=2")


def test_an_actor_that_no_node_can_hold_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"serve: a decoder asks for 4 CPU, which no node .* \(largest: 2 CPU\)"
    ):
        place("serve", TWO_CORES, 1, "serve.decoder.num_cpus=4")


KUBERAY = {"ray.io/node-group": "workers"}


def record(cpus: float, gpus: float = 0, alive: bool = True, **labels: str) -> dict[str, Any]:
    """A record of `ray.nodes()`."""
    found = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    return {"Alive": alive, "Resources": found, "NodeName": "pod", "Labels": KUBERAY | labels}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["resources.gpus=2"], "resources.gpus = 2: no node .* resources.node_types$"),
        (["resources.labels.decode=zone=a"], "zone = a, which no node .* resources.node_types$"),
    ],
)
def test_on_a_managed_cluster_of_known_types_the_impossible_is_an_error(
    sets: list[str], message: str
) -> None:
    types = "resources.node_types=[{cpus = 8, count = 16}]"
    known = load_config(None, [types, *sets])
    with pytest.raises(ConfigError, match=message):
        layout("extract", known, cluster_of([record(0)], known), 100)
    unknown = load_config(None, sets)
    assert layout("extract", unknown, cluster_of([record(0)], unknown), 100), "nobody can tell"
    serve = load_config(None, [types, "serve.decoder.num_cpus=64"])
    with pytest.raises(ConfigError, match=r"a decoder asks for 64 CPU, .* \(largest: 8 CPU\)"):
        layout("serve", serve, cluster_of([record(0)], serve), 1)


@pytest.mark.parametrize(
    ("alive", "left"),
    [
        ([], (4, 4, 2)),
        ([record(8)] * 3, (1, 4, 2)),
        ([record(8, zone="b")] * 4, (4, 0, 2)),
        ([record(8, zone="b")] * 5, (3, 0, 2)),
        ([record(8)] * 9, (0, 4, 2)),
        ([record(8, 1), record(8, 1, alive=False), record(16)], (4, 4, 1)),
    ],
)
def test_a_live_node_counts_for_one_type(
    alive: list[dict[str, Any]], left: tuple[int, int, int]
) -> None:
    types = '[{cpus=8, count=4}, {cpus=8, count=4, labels="zone=b"}, {cpus=8, gpus=1, count=2}]'
    found = cluster_of(alive, load_config(None, [f"resources.node_types={types}"]))
    assert tuple(node.count for node in found.launchable) == left
    assert not found.grows


@pytest.mark.parametrize(
    ("cluster", "videos", "sets", "expected"),
    [
        (TWO_CORES, 10**6, [], [{"CPU": 2}]),
        (
            Cluster((EMPTY_HEAD,), (Node(16, count=200), Node(8, 1, count=64))),
            10**7,
            [],
            [{"CPU": 8, "GPU": 1}] * 64 + [{"CPU": 16}] * 200,
        ),
        (
            Cluster((EMPTY_HEAD,), (Node(16, count=200), Node(8, 1, count=64))),
            10**7,
            ["resources.gpus=0"],
            [{"CPU": 16}] * 200,
        ),
        (Cluster((EMPTY_HEAD,), (Node(16, count=200),)), 15, [], [{"CPU": 16}]),
        (Cluster((EMPTY_HEAD, Node(16)), (Node(16, count=3),)), 400, [], [{"CPU": 16}] * 4),
        (Cluster((EMPTY_HEAD,), grows=True), 80, [], [{"CPU": 0.9}] * 10),
    ],
    ids=["fixed", "all", "CPU only", "few videos", "one is there", "unknown kinds"],
)
def test_nodes_to_ask_for(
    cluster: Cluster, videos: int, sets: list[str], expected: list[dict[str, float]]
) -> None:
    assert wanted_nodes(place("extract", cluster, videos, *sets), cluster) == expected


def test_only_nodes_that_are_known_are_counted_on() -> None:
    """A prediction is for these; the actors that are asked for beside them are no machines."""
    unknown = Cluster((EMPTY_HEAD, Node(8)), grows=True)
    placed = place("extract", unknown, 800)
    assert len(wanted_nodes(placed, unknown)) > 1
    assert usable_nodes(placed, unknown) == [Node(8)]
    known = Cluster((EMPTY_HEAD, Node(8)), (Node(8, count=3),), grows=True)
    assert usable_nodes(place("extract", known, 800), known) == [Node(8)] * 4


@pytest.mark.parametrize(
    ("stage", "types", "videos", "sets", "expected"),
    [
        (
            "score",
            (Node(8, 1, count=64),),
            100,
            ["resources.decoders=1"],
            [{"CPU": 8, "GPU": 1}] * 13,
        ),
        (
            "extract",
            (Node(64, count=9), Node(8, count=9, labels={"kind": "cheap"})),
            200,
            ["resources.labels.decode=kind=cheap"],
            [{"CPU": 8}] * 4,
        ),
        (
            "extract",
            (Node(8, 4, count=9), Node(8, 1, count=9, labels={"kind": "gpu"}), Node(4, count=5)),
            100,
            ["resources.labels.networks=kind=gpu", "resources.gpus=3", "resources.decoders=30"],
            [{"CPU": 8, "GPU": 1}] * 3 + [{"CPU": 4}] * 2,
        ),
    ],
    ids=["half a GPU for each of two networks", "labels of decoders", "labels of networks"],
)
def test_nodes_to_ask_for_can_hold_the_actors(
    stage: Stage,
    types: tuple[Node, ...],
    videos: int,
    sets: list[str],
    expected: list[dict[str, float]],
) -> None:
    cluster = Cluster((EMPTY_HEAD,), types)
    assert wanted_nodes(place(stage, cluster, videos, *sets), cluster) == expected


@pytest.mark.parametrize(
    ("cluster", "sets", "expected"),
    [
        (
            Cluster((EMPTY_HEAD,), (Node(1, count=3), Node(1, 1, count=2))),
            [],
            {"decoder": 5, "encoder": 2},
        ),
        (
            Cluster((EMPTY_HEAD,), (Node(1, count=3), Node(1, 1, count=2))),
            ["resources.gpus=0"],
            {"worker": 5},
        ),
        (TWO_CORES, [], {"worker": 10}),
        (Cluster(many(16, 8)), [], {"worker": 256}),
        (Cluster((EMPTY_HEAD,), grows=True), [], {"worker": 9}),
        (TWO_CORES, ["resources.workers=2"], {"worker": 2}),
    ],
    ids=["known kinds", "CPU only", "one node", "many nodes", "unknown kinds", "asked for"],
)
def test_actors_exist_before_their_nodes(
    cluster: Cluster, sets: list[str], expected: dict[str, int]
) -> None:
    """They are what asks the autoscaler, and a node that joins takes one immediately."""
    placed = place("extract", cluster, 10_000, *sets)
    assert {name: placed[name].start for name in expected} == expected


FROM_ZERO = Cluster((EMPTY_HEAD,), (Node(8, count=16), Node(8, 1, count=4)))
UNKNOWN = Cluster((EMPTY_HEAD,), grows=True)


@pytest.mark.parametrize(
    ("stage", "cluster", "sets", "cpus"),
    [
        ("extract", FROM_ZERO, ["resources.gpus=0", "resources.workers=64"], 1.95),
        ("extract", Cluster((EMPTY_HEAD, Node(8))), ["resources.workers=64"], 0.1),
        ("extract", UNKNOWN, ["resources.workers=64"], 0.9),
        ("extract", Cluster((Node(8),), grows=True), ["resources.workers=64"], 0.98),
        ("extract", Cluster((Node(8),), grows=True), ["resources.workers=2"], 3.95),
        ("train", FROM_ZERO, ["resources.gpus=0", "train.num_workers=16"], 7.9),
        ("train", FROM_ZERO, ["train.num_workers=4"], 7.9),
        ("train", UNKNOWN, ["train.num_workers=16"], 0.9),
    ],
)
def test_what_a_counted_actor_asks_for_leaves_the_nodes_to_come_their_share(
    stage: Stage, cluster: Cluster, sets: list[str], cpus: float
) -> None:
    assert place(stage, cluster, 10**6, *sets)["worker"].cpus == cpus


@pytest.mark.parametrize(
    ("cluster", "sets", "decoders", "cpus"),
    [
        (FROM_ZERO, ["finetune.num_workers=4"], 39, 0.95),
        (Cluster((*many(16, 8), *many(4, 8, 1))), ["finetune.num_workers=4"], 39, 0.95),
        (Cluster(many(4, 8, 1)), ["finetune.num_workers=4"], 7, 0.95),
        (UNKNOWN, ["finetune.num_workers=4", "resources.decoders=8"], 2, 0.9),
    ],
    ids=["from zero", "alive", "GPU nodes only", "unknown types"],
)
def test_decoders_of_a_full_finetune_use_the_nodes_to_come(
    cluster: Cluster, sets: list[str], decoders: int, cpus: float
) -> None:
    placed = place("finetune", cluster, 10**4, "finetune.backbone=trained", *sets)
    assert (placed["decoder"].start, placed["decoder"].cpus) == (decoders, cpus)
    assert placed.threads <= 8, "no more than a node has"


@pytest.mark.parametrize(
    ("cluster", "videos", "sets", "decoders", "networks", "num_gpus", "senders"),
    [
        (TWO_CORES, 100, [], 1, 1, 0, 2),
        (Cluster(many(4, 16)), 1000, [], 31, 4, 0, 8),
        (Cluster((EMPTY_HEAD, Node(8))), 1000, [], 3, 1, 0, 2),
        (Cluster(many(4, 16)), 3, [], 3, 3, 0, 3),
        (TWO_CORES, 1, [], 1, 1, 0, 1),
        (Cluster(many(2, 1)), 100, [], 1, 2, 0, 4),
        (Cluster(many(1, 32, 2)), 1000, [], 15, 2, 0.5, 2),
        (Cluster(many(1, 32, 2)), 1000, ["resources.gpus=1"], 15, 1, 0.5, 2),
        (Cluster(many(1, 32, 2)), 1000, ["resources.gpus=0"], 15, 1, 0, 2),
        (Cluster(many(1, 32, 2)), 1000, ["resources.decoders=4"], 4, 2, 0.5, 2),
    ],
    ids=[
        "two cores",
        "four nodes",
        "head without",
        "few videos",
        "one video",
        "tiny nodes",
        "GPUs",
        "one of two",
        "no GPU wanted",
        "decoders",
    ],
)
def test_score(
    cluster: Cluster,
    videos: int,
    sets: list[str],
    decoders: int,
    networks: int,
    num_gpus: float,
    senders: int,
) -> None:
    placed = place("score", cluster, videos, *sets)
    assert placed["decoder"].start == decoders
    for name in ("sampler", "recognizer"):
        assert (placed[name].start, placed[name].gpus) == (networks, num_gpus)
    assert placed["sender"].start == senders


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_a_node_on_its_own_holds_the_whole_graph_and_more(cpus: int) -> None:
    """One of each stage, and still room for two senders and two writers."""
    placed = place("score", Cluster(many(1, cpus)), 1000)
    graph = sum(placed[name].cpus for name in ("decoder", "sampler", "recognizer", "ingress"))
    assert graph + 2 * placed["sender"].cpus + 2 * placed["writer"].cpus <= cpus


@pytest.mark.parametrize("stage", ["train", "finetune", "extract"])
@pytest.mark.parametrize("alive", [True, False])
def test_what_needs_a_gpu_fits_on_a_node_that_has_one(stage: Stage, alive: bool) -> None:
    """The GPU node has fewer CPUs than the largest node."""
    kinds = (Node(16, memory=64 * GIB), Node(8, 1, memory=64 * GIB))
    cluster = Cluster(kinds) if alive else Cluster((EMPTY_HEAD,), kinds)
    placed = place(stage, cluster, 1000, "finetune.backbone=trained")
    wanting = [pool for pool in placed.pools.values() if pool.gpus]
    assert wanting
    for pool in wanting:
        assert cluster.capacity(pool, launchable=True) >= pool.now, pool


@pytest.mark.parametrize(
    ("cluster", "sets", "workers", "cpus", "device", "threads"),
    [
        (Cluster(many(2, 8)), ["train.num_workers=2"], 2, 7.9, "cpu", 8),
        (Cluster(many(1, 8)), ["train.num_workers=2"], 2, 3.95, "cpu", 4),
        (Cluster(many(1, 8, 4)), ["train.num_workers=2"], 2, 3.95, "cuda", 4),
        (Cluster(many(1, 8, 4)), ["train.num_workers=2", "resources.gpus=0"], 2, 3.95, "cpu", 4),
        (Cluster(many(1, 8, 1)), ["train.num_workers=2"], 2, 3.95, "cpu", 4),
    ],
    ids=["two nodes", "one node", "GPUs", "GPUs not wanted", "too few GPUs"],
)
def test_train(
    cluster: Cluster, sets: list[str], workers: int, cpus: float, device: str, threads: int
) -> None:
    placed = place("train", cluster, 100, *sets)
    assert (placed["worker"].limit, placed["worker"].cpus, placed.device, placed.threads) == (
        workers,
        cpus,
        device,
        threads,
    )
    assert placed["worker"].gpus == (1.0 if device == "cuda" else 0.0)


@pytest.mark.parametrize(
    ("cluster", "trainings", "now", "limit", "cpus"),
    [
        (Cluster(many(2, 8)), 5, 5, 5, 1.0),
        (Cluster(many(2, 8)), 100, 16, 100, 1.0),
        (Cluster(many(1, 8, 1)), 100, 8, 100, 1.0),
        (Cluster(many(3, 0.5)), 100, 3, 100, 0.5),
    ],
    ids=["few", "many", "a GPU", "half a core"],
)
def test_evaluate_trains_on_each_core(
    cluster: Cluster, trainings: int, now: int, limit: int, cpus: float
) -> None:
    placed = place("evaluate", cluster, trainings)
    pool = placed["training"]
    assert (pool.now, pool.limit, pool.cpus, pool.gpus) == (now, limit, cpus, 0)
    assert (placed.device, placed.threads) == ("cpu", 1)


@pytest.mark.parametrize(
    "node", [Node(2, memory=14 * GIB), Node(16, memory=20 * GIB), Node(1, memory=3 * GIB)], ids=str
)
@pytest.mark.parametrize(
    ("stage", "sets"),
    [
        ("extract", ["resources.workers=15"]),
        ("extract", []),
        ("finetune", ["finetune.num_workers=9"]),
        ("finetune", ["finetune.backbone=frozen"]),
        ("train", ["train.num_workers=8"]),
        ("evaluate", []),
        (
            "serve",
            [
                "serve.sampler.num_cpus=0.1",
                "serve.decoder.num_cpus=0.1",
                "serve.recognizer.num_cpus=0.1",
            ],
        ),
        ("score", []),
    ],
)
def test_every_holder_of_cpus_has_memory(stage: Stage, sets: list[str], node: Node) -> None:
    placed = place(stage, Cluster((node,)), 1000, *sets)
    for name in ("memory", "cpus"):
        assert (
            0
            < sum(getattr(pool, name) * pool.now for pool in placed.pools.values())
            <= getattr(node, name)
        ), name
    assert all(pool.memory > 0 for pool in placed.pools.values())


def test_a_training_with_fewer_gpus_than_workers_is_an_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"train.num_workers = 2 takes a GPU for each worker, resources.gpus allows 1",
    ):
        place("train", Cluster(many(1, 8, 4)), 100, "train.num_workers=2", "resources.gpus=1")


def test_a_training_that_is_too_large_for_the_cluster_is_an_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"finetune.num_workers = 50 with 1 decoders each: too many for the 2 CPUs",
    ):
        place("finetune", TWO_CORES, 100, "finetune.num_workers=50")


@pytest.mark.parametrize(
    ("cluster", "sets", "num_gpus"),
    [
        (TWO_CORES, [], 0),
        (Cluster(many(1, 8, 1)), [], 0.5),
        (Cluster(many(1, 8, 1)), ["resources.gpus=0"], 0),
        (
            Cluster(many(1, 8, 1)),
            ["serve.sampler.num_gpus=0.25", "serve.recognizer.num_gpus=0.25"],
            0.25,
        ),
    ],
)
def test_serve_takes_a_gpu_if_one_exists(
    cluster: Cluster, sets: list[str], num_gpus: float
) -> None:
    placed = place("serve", cluster, 1, *sets)
    assert {placed[name].gpus for name in ("sampler", "recognizer")} == {num_gpus}
    assert placed.on_gpu == bool(num_gpus)


LABELS = (
    "resources.labels.decode=kind=cheap",
    "resources.labels.networks=kind=gpu",
    "resources.labels.write=kind=cheap",
)


def test_labels_keep_each_part_on_its_nodes() -> None:
    cheap, dear = {"kind": "cheap"}, {"kind": "gpu"}
    cluster = Cluster((Node(8, labels=cheap), Node(4), Node(8, gpus=2, labels=dear)))
    placed = place("extract", cluster, 1000, *LABELS)
    assert (placed["decoder"].labels, placed["encoder"].labels) == (cheap, dear)
    assert placed["writer"].labels == cheap
    assert placed["decoder"].now == 8, "only the node with the label counts"
    assert placed["encoder"].now == 2
    scored = place("score", cluster, 1000, *LABELS)
    assert (scored["sampler"].labels, scored["sender"].labels) == (dear, cheap)
    training = place("train", cluster, 1000, *LABELS)
    assert (training["worker"].labels, training["features"].labels) == (dear, dear)
    frozen = place("finetune", cluster, 9, "finetune.backbone=frozen", *LABELS)
    assert frozen["features"].labels == dear
    assert "kind=gpu" in scored["sampler"].describe()
    assert place("extract", cluster, 1000)["decoder"].labels == {}


def test_a_label_that_no_node_has_is_refused() -> None:
    asked = "resources.labels.decode=kind=other,zone=a"
    with pytest.raises(ConfigError, match="the label kind = other and the label zone = a, which"):
        place("extract", TWO_CORES, 10, asked)
    launchable = Node(4, count=2, labels={"kind": "other", "zone": "a"})
    placed = place("extract", Cluster((EMPTY_HEAD,), (launchable,)), 9, asked)
    assert placed["worker"].labels == {"kind": "other", "zone": "a"}
    with pytest.raises(ConfigError, match=r"resources\.labels\.decode"):
        load_config(None, ["resources.labels.decode=no label"])


def test_labelled_groups_grow_from_nothing() -> None:
    cheap, dear = {"kind": "cheap"}, {"kind": "gpu"}
    kinds = (Node(8, count=16, labels=cheap), Node(8, 1, count=4, labels=dear))
    placed = place("extract", Cluster((EMPTY_HEAD,), kinds, grows=True), 10**6, *LABELS)
    assert (placed["decoder"].start, placed["encoder"].start) == (16 * 8, 4)


def test_node_types_of_one_size_are_counted_by_their_labels() -> None:
    kept, decoding = {"kind": "kept"}, {"kind": "decode"}
    alive = (Node(8, labels={**kept, "zone": "a"}), Node(8, 1, labels=decoding))
    types = [Node(8, count=2, labels=one) for one in (kept, decoding, {})]
    assert [kind.count for kind in not_yet_started(types, alive)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("stage", "free", "waits_for"),
    [
        ("extract", many(1, 2), None),
        ("extract", many(2, 0.5), "worker"),
        ("extract", (), "worker"),
        ("extract", (Node(2, memory=GIB // 8),), "worker"),
        ("score", many(1, 2), None),
        ("score", many(1, 0.3), "decoder"),
        ("train", many(1, 1), "worker"),
    ],
)
def test_what_finds_no_room_on_what_is_free(
    stage: Stage, free: tuple[Node, ...], waits_for: str | None
) -> None:
    pool = unplaced(place(stage, TWO_CORES, 100), free)
    assert (pool.name if pool else None) == waits_for
