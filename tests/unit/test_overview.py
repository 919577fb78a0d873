"""`tsq info --cluster`: the nodes that the cluster can still start."""

from __future__ import annotations

from typing import Any

import pytest

from tsq_ray.config import load_config
from tsq_ray.runtime.cluster import cluster_of
from tsq_ray.runtime.overview import _can_start

TYPES = (
    'resources.node_types=[{cpus=8, count=3, labels="tsq/part=decode"}, '
    '{cpus=8, gpus=1, count=2, labels="tsq/part=networks"}]'
)


def record(**labels: str) -> dict[str, Any]:
    """What Ray says about a live node of eight CPUs."""
    found = {"CPU": 8.0, "memory": 2.0**30}
    return {"Alive": True, "NodeName": "a", "Resources": found, "Labels": labels}


@pytest.mark.parametrize(
    ("node", "sets", "expected"),
    [
        (record(), [], "nothing: no resources.node_types"),
        (record(), [TYPES], ["3 x 8 CPU, 0 GPU", "2 x 8 CPU, 1 GPU"]),
        (record(**{"tsq/part": "decode"}), [TYPES], ["2 x 8 CPU, 0 GPU", "2 x 8 CPU, 1 GPU"]),
        (
            record(**{"ray.io/node-group": "cpu"}),
            [],
            "unknown, because Ray does not say; name the nodes in resources.node_types",
        ),
    ],
    ids=["fixed", "node types", "one of them runs", "a node manager"],
)
def test_the_nodes_that_can_start_are_named(
    node: dict[str, Any], sets: list[str], expected: list[str] | str
) -> None:
    assert _can_start(cluster_of([node], load_config(None, sets))) == expected
