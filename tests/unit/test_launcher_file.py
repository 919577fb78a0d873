"""cluster/ray-cluster.yaml: Ray's own validator accepts both variants of the launcher file."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import jsonschema
import pytest
import yaml
from support.manifests import (
    CLUSTER,
    REPO,
    package_version,
)

from tsq_ray.config import load_config


def launcher_configs() -> dict[str, dict[str, Any]]:
    """The launcher file's two variants.

    The document itself, and the AWS one in the comments at its end.
    """
    lines = (CLUSTER / "ray-cluster.yaml").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("# --- AWS"))
    variant = list(
        itertools.dropwhile(lambda line: not line.startswith("# cluster_name:"), lines[start:])
    )
    return {
        "local": yaml.safe_load("\n".join(lines)),
        "aws": yaml.safe_load(
            "\n".join(line.removeprefix("#").removeprefix(" ") for line in variant)
        ),
    }


def sends_a_token(config: dict[str, Any]) -> bool:
    """Whether every machine gets the cluster's token: from its own file, or with the launcher."""
    words = [word for option in config["docker"]["run_options"] for word in option.split()]
    if "/etc/tsq/cluster.env" in words:
        page = (REPO / "docs" / "cluster.md").read_text()
        return "\nRAY_AUTH_MODE=token\nRAY_AUTH_TOKEN=...\n" in page
    given = dict(word.split("=", 1) for word in words if word.startswith("RAY_AUTH"))
    token = given.pop("RAY_AUTH_TOKEN_PATH")
    return given == {"RAY_AUTH_MODE": "token"} and token in config["file_mounts"]


@pytest.mark.parametrize("variant", ["local", "aws"])
def test_ray_accepts_the_launcher_file(variant: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = launcher_configs()[variant]
    assert config["provider"]["type"] == variant
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    workers = prepared["available_node_types"]
    if variant == "local":
        assert workers["local.cluster.node"]["max_workers"] == len(config["provider"]["worker_ips"])
    else:
        assert workers.keys() == {"head", "cpu", "gpu"}
        assert workers["head"]["max_workers"] == 0
    assert config["docker"]["image"] == f"tsq-ray:{package_version()}"
    assert sends_a_token(config)

    config["cluster_nam"] = config.pop("cluster_name")
    with pytest.raises(jsonschema.ValidationError, match="cluster_nam"):
        validate_config(prepare_config(config))


SIZES = {"r7i.4xlarge": (16, 128), "gr6.4xlarge": (16, 128)}
"""CPUs and GiB of AWS's instance types."""


def test_machines_of_the_launcher_hold_the_documented_memory_bound() -> None:
    types = launcher_configs()["aws"]["available_node_types"]
    for name in ("cpu", "gpu"):
        cpus, gib = SIZES[types[name]["node_config"]["InstanceType"]]
        assert gib >= 2.5 + cpus * (1 + load_config().decode.max_memory_mb / 1024)
