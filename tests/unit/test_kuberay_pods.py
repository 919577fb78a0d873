"""cluster/kuberay: the pods: security, shared memory, network, roles, queues, disruption."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from support.manifests import (
    OVERLAYS,
    REPO,
    cluster_spec,
    every_folder,
    every_overlay,
    gibibytes,
    package_version,
    pod_specs,
    ray_manifests,
    rendered,
    shared_memory,
)

from tsq_ray.config import DecodeConfig, ServeConfig


def pinned(package: str) -> str:
    found = re.search(
        rf"^{package}==(.+)$", (REPO / "tests" / "constraints.txt").read_text(), re.MULTILINE
    )
    assert found, f"tests/constraints.txt does not pin {package}"
    return found[1]


@every_overlay
@every_folder
def test_pods_are_restricted_with_limits_and_the_pinned_ray(folder: str, overlay: str) -> None:
    """Pod Security level "restricted", for every container that the files or KubeRay start."""
    image = f"tsq-ray:{package_version()}{'-cpu' if overlay == 'cpu' else ''}"
    for manifest in ray_manifests(folder, overlay):
        cluster = cluster_spec(manifest)
        assert cluster["rayVersion"] == pinned("ray")
        assert cluster["authOptions"]["mode"] == "token"
        containers = [cluster["autoscalerOptions"]]
        for pod in pod_specs(manifest):
            check_pod(pod)
            is_head = pod["containers"][0]["name"] == "ray-head"
            assert pod.get("automountServiceAccountToken", True) is is_head
            written = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
            assert {"/tmp", "/ray"} <= written
            mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert container["image"] == image
                assert "env" not in container, "keys come from the Secret, never from the file"
            containers += pod["containers"]
        for container in containers:
            check_container(container)


def check_pod(pod: dict[str, Any]) -> None:
    """It satisfies the Pod Security level "restricted", apart from its containers."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}


def check_container(container: dict[str, Any]) -> None:
    """It satisfies the level "restricted", cannot write to its image, and has limits."""
    context = container["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    for kind in ("requests", "limits"):
        assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"][kind].keys()


@every_overlay
def test_redis_is_restricted_with_limits_and_a_pinned_image(overlay: str) -> None:
    objects = rendered("endpoint", overlay, "gcs-redis")
    (redis,) = (one["spec"] for one in objects if one["kind"] == "StatefulSet")
    pod = redis["template"]["spec"]
    check_pod(pod)
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    check_container(container)
    assert re.fullmatch(r"redis:[\d.]+@sha256:[0-9a-f]{64}", container["image"])
    (password,) = container["env"]
    assert password["valueFrom"] == {"secretKeyRef": {"name": "tsq-redis", "key": "password"}}
    claims = {claim["metadata"]["name"] for claim in redis["volumeClaimTemplates"]}
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        name: "/data" for name in claims
    }


@every_overlay
def test_the_endpoint_survives_a_lost_head_and_a_changed_cluster(overlay: str) -> None:
    (service,) = ray_manifests("endpoint", overlay)
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert "gcsFaultToleranceOptions" not in cluster_spec(service)
    (kept,) = ray_manifests("endpoint", overlay, "gcs-redis")
    (redis,) = (
        one
        for one in rendered("endpoint", overlay, "gcs-redis")
        if one["kind"] == "Service" and one["metadata"]["name"] == "tsq-redis"
    )
    assert cluster_spec(kept)["gcsFaultToleranceOptions"] == {
        "redisAddress": f"tsq-redis:{redis['spec']['ports'][0]['port']}",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "tsq-redis", "key": "password"}}},
    }


@every_overlay
def test_disk_of_a_pod_holds_a_copy_of_a_video_per_cpu(overlay: str) -> None:
    """For videos up to the documented size; the page also names what `decode.max_bytes` needs."""
    text = (REPO / "docs" / "kubernetes.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| disk of a pod |"))
    found = re.search(
        r"\| (\d+) GiB for Ray's own files.*\| (\d+) GiB for (\d+) CPUs and videos of up to "
        r"(\d+) GiB; for the (\d+) GiB that `decode.max_bytes` allows by default, (\d+) GiB:",
        row,
    )
    assert found, row
    spare, limit, cpus, video, allowed, needed = map(int, found.groups())
    assert DecodeConfig().max_bytes == allowed * 2**30
    assert needed == spare + cpus * allowed
    (cluster,) = ray_manifests("cluster", overlay)
    for group in cluster_spec(cluster)["workerGroupSpecs"]:
        for amounts in group["template"]["spec"]["containers"][0]["resources"].values():
            assert (int(amounts["cpu"]), gibibytes(amounts["ephemeral-storage"])) == (cpus, limit)
    assert spare + cpus * video <= limit < spare + cpus * (video + 1)


@every_overlay
@every_folder
def test_the_object_store_fits_into_shared_memory(folder: str, overlay: str) -> None:
    """Ray would put it on disk otherwise."""
    for manifest in ray_manifests(folder, overlay):
        cluster = cluster_spec(manifest)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            size, store = shared_memory(group)
            assert size >= store


def test_the_network_policy_and_the_budget_select_the_pods() -> None:
    """The labels that they select by are on the pods; KubeRay adds those that begin with
    ray.io/."""
    objects = [*rendered("jobs", "gpu"), *rendered("endpoint", "gpu")]
    labels = []
    for manifest in objects:
        if manifest["apiVersion"] == "ray.io/v1":
            cluster = cluster_spec(manifest)
            templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            labels += [group["template"]["metadata"]["labels"] for group in templates]
            if "submitterPodTemplate" in manifest["spec"]:
                labels.append(manifest["spec"]["submitterPodTemplate"]["metadata"]["labels"])
    assert labels
    for manifest in objects:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if manifest["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            own = {
                name: value
                for name, value in selector["matchLabels"].items()
                if not name.startswith("ray.io/")
            }
            assert all(own.items() <= one.items() for one in labels)


def test_a_role_takes_the_place_of_the_keys() -> None:
    objects = rendered("jobs", "gpu", "workload-identity")
    accounts = {
        one["metadata"]["name"]: one["metadata"]["annotations"]
        for one in objects
        if one["kind"] == "ServiceAccount"
    }
    assert accounts.keys() == {"tsq", "tsq-head"}
    assert all("eks.amazonaws.com/role-arn" in found for found in accounts.values())
    for manifest in ray_manifests("jobs", "gpu", "workload-identity"):
        for pod in pod_specs(manifest):
            assert pod["serviceAccountName"] in accounts
    assert ("169.254.170.23/32", 80) in reachable(objects)
    assert ("169.254.170.23/32", 80) not in reachable(rendered("jobs", "gpu"))


SECRETS = {"tsq-s3": False, "tsq-recognizer": True}
"""Secrets that the pods of every cluster read, and whether a pod starts without them."""


@pytest.mark.parametrize("component", ["", "workload-identity"])
@every_overlay
@every_folder
def test_head_and_workers_read_the_keys_of_storage_and_recogniser(
    folder: str, overlay: str, component: str
) -> None:
    wanted = dict(SECRETS)
    if component:
        wanted.pop("tsq-s3")
    for manifest in ray_manifests(folder, overlay, component):
        for pod in pod_specs(manifest):
            (container,) = pod["containers"]
            references = [one["secretRef"] for one in container.get("envFrom", ())]
            found = {one["name"]: one.get("optional", False) for one in references}
            if container["name"] == "ray-job-submitter":
                assert found == {}, "the driver runs on the head"
            elif folder == "endpoint":
                assert wanted.items() <= found.items()
                assert found.keys() - wanted.keys() <= {"tsq-endpoint"}
            else:
                assert found == wanted


def reachable(objects: tuple[dict[str, Any], ...]) -> set[tuple[str, int]]:
    """Addresses outside the cluster that the pods reach, with the port."""
    policies = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    return {
        (target.get("ipBlock", {}).get("cidr", "pods"), port["port"])
        for policy in policies
        for rule in policy.get("egress", ())
        for target in rule.get("to", ({"ipBlock": {"cidr": "0.0.0.0/0"}},))
        for port in rule.get("ports", ())
    }


def test_a_queued_run_has_its_final_size_from_the_start() -> None:
    """Kueue refuses a cluster that scales itself."""
    for overlay in ("gpu", "spot"):
        for manifest in ray_manifests("jobs", overlay, "kueue"):
            assert manifest["spec"]["suspend"] is True
            assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
            cluster = cluster_spec(manifest)
            assert not cluster.keys() & {"enableInTreeAutoscaling", "autoscalerOptions"}
            for group in cluster["workerGroupSpecs"]:
                assert group["replicas"] == group["maxReplicas"]


def test_a_drained_node_leaves_the_endpoint_a_pod_of_each_group() -> None:
    for overlay in OVERLAYS:
        objects = rendered("endpoint", overlay)
        kept = {
            one["spec"]["selector"]["matchLabels"].get("ray.io/group"): one["spec"]
            for one in objects
            if one["kind"] == "PodDisruptionBudget"
        }
        assert all(kept[group]["minAvailable"] == 1 for group in ("cpu", "gpu"))
        (service,) = ray_manifests("endpoint", overlay)
        groups = {group["groupName"] for group in cluster_spec(service)["workerGroupSpecs"]}
        assert groups - {"kept"} <= kept.keys()


def test_a_pod_that_must_end_drains_within_its_grace_period() -> None:
    for folder, overlay in itertools.product(("cluster", "endpoint"), OVERLAYS):
        for manifest in ray_manifests(folder, overlay):
            for group in cluster_spec(manifest)["workerGroupSpecs"]:
                pod = group["template"]["spec"]
                command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
                found = re.search(r"--deadline-remaining-seconds (\d+); ?sleep (\d+)$", command)
                assert found, command
                deadline_s, sleep_s = map(int, found.groups())
                assert sleep_s < deadline_s < pod["terminationGracePeriodSeconds"]
                if folder == "endpoint":
                    assert sleep_s > ServeConfig().request_timeout_s
