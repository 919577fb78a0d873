"""cluster/: the KubeRay manifests, the launcher file, the Dockerfile's paths.

KubeRay's own CRDs check the manifests, Ray's own validator the launcher file.
"""

from __future__ import annotations

import copy
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs._command import arguments

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
REPO = CLUSTER.parent
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
ANY_TYPE: dict[str, Any] = {}


def pinned(package: str) -> str:
    found = re.search(
        rf"^{package}==(.+)$", (REPO / "tests" / "constraints.txt").read_text(), re.MULTILINE
    )
    assert found, f"tests/constraints.txt does not pin {package}"
    return found[1]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


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
def crds(data_dir: Path) -> dict[str, dict[str, Any]]:
    """Kind -> strict schema of version v1."""
    folder = data_dir.parent / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"no CRDs at {folder}")
    schemas = {}
    for file in folder.glob("*.yaml"):
        crd = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
        schema = strict_schema(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = ANY_TYPE  # the API server's own type, not the CRD's
        schemas[crd["spec"]["names"]["kind"]] = schema
    return schemas


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pod_specs(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = cluster_spec(manifest)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_the_three_kinds_exist() -> None:
    assert sorted(load(path)["kind"] for path in KUBERAY) == ["RayCluster", "RayJob", "RayService"]


@pytest.mark.data
@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_manifest_fits_the_crd(path: Path, crds: dict[str, dict[str, Any]]) -> None:
    manifest = load(path)
    jsonschema.validate(manifest, crds[manifest["kind"]])


def misspell(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda mapping: mapping.update({key[:-1] + "_": mapping.pop(key)})


@pytest.mark.data
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
@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_a_wrong_field_is_found(
    path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
    crds: dict[str, dict[str, Any]],
) -> None:
    manifest = copy.deepcopy(load(path))
    change(cluster_spec(manifest))
    errors = list(jsonschema.Draft202012Validator(crds[manifest["kind"]]).iter_errors(manifest))
    assert any(message in error.message for error in errors)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_pods_run_the_pinned_ray_unprivileged_with_limits(path: Path) -> None:
    manifest = load(path)
    assert cluster_spec(manifest)["rayVersion"] == pinned("ray")
    assert cluster_spec(manifest)["authOptions"]["mode"] == "token"
    groups = cluster_spec(manifest)["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["cpu", "gpu"]
    assert (
        groups[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        == "1"
    )
    for pod in pod_specs(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container[
                "resources"
            ]["limits"].keys()
            assert container["image"] == f"tsq-ray:{package_version()}"
            assert {"secretRef": {"name": "tsq-s3"}} in container["envFrom"]
            assert "env" not in container  # keys come from the Secret, never from the file


def package_version() -> str:
    import tsq_ray

    return tsq_ray.__version__


def test_the_job_runs_a_script_of_the_image() -> None:
    words = load(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[0] == "python"
    assert (REPO / words[1].removeprefix("/app/")).is_file()
    assert {"--model", "--out"} <= set(words)


@pytest.mark.ray
def test_serve_config_parses() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = load(CLUSTER / "kuberay" / "rayservice.yaml")["spec"]["serveConfigV2"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert application.import_path == "tsq_ray.serving.app:build"
    assert application.args.keys() == {"model"}
    assert {deployment.name for deployment in application.deployments} == {
        "Ingress",
        "Decoder",
        "Sampler",
        "Recognizer",
    }
    for deployment in application.deployments:
        scaling = deployment.autoscaling_config
        assert scaling["min_replicas"] >= 1
        assert scaling["max_replicas"] > scaling["min_replicas"]
        assert scaling["target_ongoing_requests"] < deployment.max_ongoing_requests
    wrong = yaml.safe_load(text.replace("import_path", "import_pth"))
    with pytest.raises(ValueError, match="import_p"):
        ServeDeploySchema.model_validate(wrong)


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

    config["cluster_nam"] = config.pop("cluster_name")
    with pytest.raises(jsonschema.ValidationError, match="cluster_nam"):
        validate_config(prepare_config(config))


def dockerfile() -> list[list[str]]:
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_dockerfile_copies_what_exists_and_is_sent() -> None:
    sources = [source for words in dockerfile() if words[0] == "COPY" for source in words[1:-1]]
    assert {"pyproject.toml", "tsq_ray", "jobs", "tests/constraints.txt"} <= set(sources)
    sent = {
        line[1:]
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert set(sources) == sent
    for source in sources:
        assert (REPO / source).exists(), f"the Dockerfile copies {source}, which does not exist"


def test_dockerfile_ends_unprivileged_on_a_supported_python() -> None:
    steps = dockerfile()
    assert re.fullmatch(r"python:3\.1[123]-slim", steps[0][1])
    users = [words[1] for words in steps if words[0] == "USER"]
    assert users[-1] == "1000"
    pod_users = {
        pod["securityContext"]["runAsUser"] for path in KUBERAY for pod in pod_specs(load(path))
    }
    assert pod_users == {int(users[-1])}
    assert any(
        "-c tests/constraints.txt" in " ".join(words) for words in steps if words[0] == "RUN"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["m.parquet", "--out", "o"], ["extract", "m.parquet", "--out", "o", "--address", "auto"]),
        (
            ["m.parquet", "--address", "ray://h:10001"],
            ["extract", "m.parquet", "--address", "ray://h:10001"],
        ),
        (["m.parquet", "--address=local"], ["extract", "m.parquet", "--address=local"]),
    ],
)
def test_jobs_run_on_the_cluster_they_are_in(given: list[str], expected: list[str]) -> None:
    assert arguments("extract", given) == expected


@pytest.mark.parametrize("command", ["extract", "train", "score"])
def test_jobs_run_the_package_that_was_shipped_with_them(command: str, tmp_path: Path) -> None:
    shutil.copytree(REPO / "jobs", tmp_path / "jobs")
    (tmp_path / "tsq_ray").mkdir()
    (tmp_path / "tsq_ray" / "__init__.py").touch()
    (tmp_path / "tsq_ray" / "cli.py").write_text(
        "def main(argv):\n    print(__file__, *argv)\n    return 3\n"
    )
    script = [sys.executable, f"jobs/{command}.py", "IN", "--out", "OUT"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [
        str(tmp_path / "tsq_ray" / "cli.py"),
        command,
        "IN",
        "--out",
        "OUT",
        "--address",
        "auto",
    ]
    assert done.returncode == 3
