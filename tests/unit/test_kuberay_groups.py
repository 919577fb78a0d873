"""cluster/kuberay: the groups of pods, and the settings that place the parts of a run on them."""

from __future__ import annotations

import tomllib
from collections import Counter
from typing import Any

import pytest
from support.manifests import (
    CLUSTER,
    every_overlay,
    gibibytes,
    pod_specs,
    ray_manifests,
    rendered,
    shared_memory,
)

from tsq_ray.config import Config, label_map, load_config, validate_config
from tsq_ray.runtime.nodes import Cluster, Node, Stage
from tsq_ray.runtime.placement import layout

GROUPS = {"gpu": ["cpu", "gpu"], "cpu": ["cpu"], "spot": ["cpu", "gpu", "kept"]}


@every_overlay
def test_groups_match_the_settings_of_their_overlay(overlay: str) -> None:
    """`resources.node_types` describes the pods; workers fit into the documented memory bound."""
    (cluster,) = ray_manifests("cluster", overlay)
    (settings,) = (one for one in rendered("cluster", overlay) if one["kind"] == "ConfigMap")
    config = validate_config(tomllib.loads(settings["data"]["settings.toml"]))
    kinds: Counter[tuple[Any, ...]] = Counter()
    groups = cluster["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == GROUPS[overlay]
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        cpus, gpus = int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0))
        kinds[cpus, gpus, *group["labels"].items()] += group["maxReplicas"]
        bound_gib = 2.5 + cpus * (1 + config.decode.max_memory_mb / 1024)
        _, store = shared_memory(group)
        assert gibibytes(limits["memory"]) >= bound_gib + store
    assert {
        (kind.cpus, kind.gpus, *label_map(kind.labels).items()): kind.count
        for kind in config.resources.node_types
    } == kinds


def settings_of(overlay: str, *sets: str) -> Config:
    return load_config(CLUSTER / "kuberay" / "overlays" / overlay / "settings.toml", sets)


def pods(config: Config) -> tuple[Node, ...]:
    return tuple(
        Node(kind.cpus, kind.gpus, count=kind.count, labels=label_map(kind.labels))
        for kind in config.resources.node_types
    )


@every_overlay
def test_labelled_pools_grow_from_nothing_on_every_overlay(overlay: str) -> None:
    """Each pool may start actors before there is a node with its label."""
    parts = ("decode", "networks") if overlay == "cpu" else ()
    config = settings_of(overlay, *(f"resources.labels.{part}=tsq/part=decode" for part in parts))
    placed = layout("extract", config, Cluster((), pods(config), grows=True), 10**6)
    started = {name: pool.start for name, pool in placed.pools.items() if name != "writer"}
    assert started == ({"worker": 128} if overlay == "cpu" else {"decoder": 128, "encoder": 4})


@pytest.mark.parametrize("stage", ["extract", "finetune", "train", "score"])
def test_gpu_pods_run_the_networks_and_nothing_else(stage: Stage) -> None:
    config = settings_of("gpu")
    labels = {part: label_map(getattr(config.resources.labels, part)) for part in PARTS}
    (cluster,) = ray_manifests("cluster", "gpu")
    groups = {one["groupName"]: one["labels"] for one in cluster["spec"]["workerGroupSpecs"]}
    assert labels == {part: groups["gpu" if part == "networks" else "cpu"] for part in PARTS}
    nodes = tuple(
        Node(kind.cpus, kind.gpus, labels=label_map(kind.labels))
        for kind in config.resources.node_types
        for _ in range(kind.count)
    )
    for cluster_now in (Cluster(nodes), Cluster((), pods(config))):
        assert layout(stage, config, cluster_now, 10**6).pools


PARTS = ("decode", "networks", "write")


def test_only_writers_are_on_the_pod_that_spot_keeps() -> None:
    (cluster,) = ray_manifests("cluster", "spot")
    groups = {one["groupName"]: one["labels"] for one in cluster["spec"]["workerGroupSpecs"]}
    labels = settings_of("spot").resources.labels
    asked = {part: label_map(getattr(labels, part)) for part in PARTS}
    assert asked == {
        "decode": groups["cpu"],
        "networks": groups["gpu"],
        "write": groups["kept"],
    }
    assert groups["kept"] not in (groups["cpu"], groups["gpu"])


def test_spot_machines_hold_neither_the_head_nor_the_kept_pod() -> None:
    (cluster,) = ray_manifests("cluster", "spot")
    pods = dict(zip(("head", *GROUPS["spot"]), pod_specs(cluster), strict=True))
    kept, spot = ({"karpenter.sh/capacity-type": kind} for kind in ("on-demand", "spot"))
    assert {name: pod["nodeSelector"] for name, pod in pods.items()} == {
        "head": kept,
        "cpu": spot,
        "gpu": spot,
        "kept": kept,
    }
    taint = {"key": "karpenter.sh/capacity-type", "value": "spot", "effect": "NoSchedule"}
    tolerated = {name: pod.get("tolerations", []) for name, pod in pods.items()}
    assert {name for name, found in tolerated.items() if taint in found} == {"cpu", "gpu"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in tolerated[
        "gpu"
    ]
    assert "tolerations" not in pods["kept"]
