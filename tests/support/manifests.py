"""The Kubernetes objects of cluster/kuberay, as kustomize renders them."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
REPO = CLUSTER.parent
FOLDERS = ("cluster", "jobs", "endpoint")
OVERLAYS = ("gpu", "cpu", "spot")
RUNS = ("index", "finetune", "extract", "train", "score", "evaluate")
"""In the order in which docs/kubernetes.md runs them."""

every_folder = pytest.mark.parametrize("folder", FOLDERS)
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def rendered(folder: str, overlay: str, component: str = "") -> tuple[dict[str, Any], ...]:
    """What `kubectl apply -k` would send for a folder that uses this overlay and component.

    The component is added to the overlay; `kueue`, which changes RayJobs, to the folder.
    """
    if shutil.which("kubectl") is None:
        pytest.skip("no program kubectl")
    with tempfile.TemporaryDirectory() as place:
        copied = shutil.copytree(CLUSTER / "kuberay", Path(place, "kuberay"))
        file = copied / folder / "kustomization.yaml"
        text = file.read_text()
        assert "../overlays/gpu" in text
        file.write_text(text.replace("../overlays/gpu", f"../overlays/{overlay}", 1))
        if component:
            up = "../.."
            if component == "kueue":
                up = ".."
            else:
                file = copied / "overlays" / overlay / "kustomization.yaml"
            file.write_text(f"{file.read_text()}\ncomponents: [{up}/components/{component}]\n")
        command = ["kubectl", "kustomize", str(copied / folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def ray_manifests(folder: str, overlay: str, component: str = "") -> list[dict[str, Any]]:
    return [
        manifest
        for manifest in rendered(folder, overlay, component)
        if manifest["apiVersion"] == "ray.io/v1"
    ]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pod_specs(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the head, of each group, and of the pod that submits a job."""
    cluster = cluster_spec(manifest)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]
    if "submitterPodTemplate" in manifest["spec"]:
        yield manifest["spec"]["submitterPodTemplate"]["spec"]


def gibibytes(text: str) -> float:
    return float(text.removesuffix("Gi"))


def shared_memory(group: dict[str, Any]) -> tuple[float, float]:
    """Size of /dev/shm, and of the object store that Ray puts there if it fits, both in GiB."""
    from ray._private import ray_constants

    pod = group["template"]["spec"]
    container = pod["containers"][0]
    (name,) = (one["name"] for one in container["volumeMounts"] if one["mountPath"] == "/dev/shm")
    (volume,) = (one["emptyDir"] for one in pod["volumes"] if one["name"] == name)
    assert volume["medium"] == "Memory"
    size = gibibytes(volume["sizeLimit"])
    share = ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
    share *= gibibytes(container["resources"]["limits"]["memory"])
    return size, min(share, max(ray_constants.REQUIRE_SHM_SIZE_THRESHOLD / 2**30, 0.95 * size))


def package_version() -> str:
    import tsq_ray

    return tsq_ray.__version__
