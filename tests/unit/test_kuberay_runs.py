"""cluster/kuberay: the command lines of the jobs, the endpoint's application, and jobs/run.py."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support.manifests import (
    CLUSTER,
    REPO,
    RUNS,
    ray_manifests,
    rendered,
)

from jobs.run import arguments, attempts
from tsq_ray import cli
from tsq_ray.commands.jobs import READ
from tsq_ray.config import ServeConfig


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


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


def page() -> str:
    return (REPO / "docs" / "kubernetes.md").read_text()


def test_the_selectors_of_the_page_split_the_folder() -> None:
    """One applies what the runs share, the others exactly one run each."""
    shared, *runs = re.findall(r"kubectl apply -k cluster/kuberay/jobs -l '?([!=\w]+)'?", page())
    assert (shared, set(runs)) == ("!job", {"job=index"})
    labels = [
        (one["kind"], one["metadata"].get("labels", {}).get("job"))
        for one in rendered("jobs", "gpu")
    ]
    assert sorted(job for _, job in labels if job) == sorted(RUNS)
    assert {kind for kind, job in labels if job} == {"RayJob"}
    assert {kind for kind, job in labels if not job} >= {"ConfigMap", "ServiceAccount"}


def test_the_bucket_is_put_into_every_file(tmp_path: Path) -> None:
    (line,) = re.findall(r"^ +(sed -i s/BUCKET/.*)$", page(), re.MULTILINE)
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    texts = {file.name: file.read_text() for file in (tmp_path / "cluster").rglob("*.yaml")}
    assert [name for name, text in texts.items() if "BUCKET" in text] == []
    for name in (*(f"{run}.yaml" for run in RUNS), "service.yaml"):
        assert "s3://my-videos/" in texts[name]


def test_the_features_hold_the_answers_that_evaluate_measures() -> None:
    extract, train, evaluate = map(parameters, ("extract", "train", "evaluate"))
    assert evaluate["sources"] == [extract["out"]]
    assert extract["recognizer"] == train["recognizer"] == parameters("finetune")["out"]


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
