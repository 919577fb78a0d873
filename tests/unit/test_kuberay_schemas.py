"""cluster/kuberay: every object, as kustomize renders it, fits its schema.

KubeRay's own CRDs and the models of Kubernetes' own client check the objects, strictly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest
import yaml
from support.manifests import (
    FOLDERS,
    RUNS,
    cluster_spec,
    every_folder,
    every_overlay,
    ray_manifests,
    rendered,
)

ANY_TYPE: dict[str, Any] = {}


def strict_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A Kubernetes structural schema as plain JSON schema.

    A field that Kubernetes would prune is an error.
    """
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {
        key: value
        for key, value in schema.items()
        if key in ("type", "enum", "required", "minimum", "maximum", "pattern", "nullable")
    }
    if schema.get("nullable"):
        strict["type"] = [schema["type"], "null"]
    if "properties" in schema:
        strict["properties"] = {
            name: strict_schema(value) for name, value in schema["properties"].items()
        }
    if "items" in schema:
        strict["items"] = strict_schema(schema["items"])
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        strict["additionalProperties"] = strict_schema(extra)
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict["additionalProperties"] = False
    return strict


@pytest.fixture(scope="module")
def crds(data_dir: Path) -> dict[str, jsonschema.Draft202012Validator]:
    """Kind -> validator by the strict schema of version v1."""
    folder = data_dir.parent / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"no CRDs at {folder}")
    schemas = {}
    for file in folder.glob("*.yaml"):
        crd = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
        schema = strict_schema(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = ANY_TYPE  # the API server's own type, not the CRD's
        schemas[crd["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    assert schemas.keys() == {"RayCluster", "RayJob", "RayService"}
    return schemas


def components(folder: str, overlay: str) -> tuple[str, ...]:
    """What can be added; as it is, `kueue` is for overlays with both groups."""
    queue = ["kueue"] * (folder == "jobs" and overlay != "cpu")
    return ("", "workload-identity", "gcs-redis", *queue)


def test_what_each_folder_makes() -> None:
    names = {
        folder: sorted(
            (one["kind"], one["metadata"]["name"]) for one in ray_manifests(folder, "gpu")
        )
        for folder in FOLDERS
    }
    assert names == {
        "cluster": [("RayCluster", "tsq")],
        "jobs": [("RayJob", f"tsq-{run}") for run in sorted(RUNS)],
        "endpoint": [("RayService", "tsq")],
    }


@every_overlay
@every_folder
def test_manifests_fit_the_crds(
    folder: str, overlay: str, crds: dict[str, jsonschema.Draft202012Validator]
) -> None:
    for component in components(folder, overlay):
        for manifest in ray_manifests(folder, overlay, component):
            crds[manifest["kind"]].validate(manifest)


def misspell(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda mapping: mapping.update({key[:-1] + "_": mapping.pop(key)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: misspell("rayVersion")(spec), "rayVersio_"),
        (lambda spec: misspell("maxReplicas")(spec["workerGroupSpecs"][0]), "maxReplica_"),
        (
            lambda spec: misspell("image")(
                spec["headGroupSpec"]["template"]["spec"]["containers"][0]
            ),
            "imag_",
        ),
        (
            lambda spec: misspell("tolerations")(spec["workerGroupSpecs"][1]["template"]["spec"]),
            "toleration_",
        ),
        (lambda spec: spec["authOptions"].update(mode="tokens"), "'tokens' is not one of"),
        (
            lambda spec: spec["workerGroupSpecs"][0].update(replicas="1"),
            "'1' is not of type 'integer'",
        ),
    ],
    ids=["rayVersion", "maxReplicas", "image", "tolerations", "mode", "replicas"],
)
@every_folder
def test_a_wrong_field_is_found(
    folder: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
    crds: dict[str, jsonschema.Draft202012Validator],
) -> None:
    manifest = copy.deepcopy(ray_manifests(folder, "gpu")[0])
    change(cluster_spec(manifest))
    errors = list(crds[manifest["kind"]].iter_errors(manifest))
    assert any(message in error.message for error in errors)


# ------------------------------------------------------------------ Kubernetes' own kinds of object


def misfits(manifest: dict[str, Any]) -> list[str]:
    """Where an object has a field that Kubernetes does not know, or a value of a wrong type."""
    from kubernetes.client import models

    try:
        getattr(models, f"V1{manifest['kind']}").model_validate(manifest)
    except pydantic.ValidationError as error:
        return [".".join(map(str, one["loc"])) for one in error.errors()]
    return []


@every_overlay
@every_folder
def test_the_other_objects_fit_kubernetes(folder: str, overlay: str) -> None:
    found = set()
    for component in components(folder, overlay):
        for manifest in rendered(folder, overlay, component):
            if manifest["apiVersion"] != "ray.io/v1":
                found.add(manifest["kind"])
                assert misfits(manifest) == []
    assert found == {
        "ServiceAccount",
        "ConfigMap",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
        "StatefulSet",
    }


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda policy: policy["spec"].update(ingres=[]), "spec.ingres"),
        (lambda policy: policy["spec"]["ingress"][0].update(frm=[]), "spec.ingress.0.frm"),
        (lambda policy: policy["metadata"].update(name=3), "metadata.name"),
    ],
)
def test_a_field_that_kubernetes_does_not_know_is_found(
    change: Callable[[dict[str, Any]], None], place: str
) -> None:
    (policy,) = (one for one in rendered("cluster", "gpu") if one["kind"] == "NetworkPolicy")
    policy = copy.deepcopy(policy)
    change(policy)
    assert misfits(policy) == [place]
