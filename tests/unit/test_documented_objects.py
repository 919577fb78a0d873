"""README and docs/: every object of a `kubectl` command is one that cluster/kuberay/ makes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from support.manifests import CLUSTER, FOLDERS, REPO, ray_manifests, rendered

VERBS = {"create", "delete", "get", "logs", "port-forward"}


def commands() -> Iterator[list[str]]:
    """The plain words of every `kubectl` command, in a block or in the text."""
    for page in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))):
        parts = page.read_text().replace("\\\n", " ").split("```")
        code = [line for block in parts[1::2] for line in block.splitlines()]
        inline = re.findall(r"`([^`]+)`", "".join(parts[::2]))
        code += [" ".join(piece.split()) for piece in inline]
        for line in code:
            for words in re.findall(r"\bkubectl ([\w./:=' -]+)", line):
                yield words.split()


def named() -> Iterator[tuple[str, str]]:
    """Kind and name of each object that a command names."""
    for verb, *words in commands():
        if verb not in VERBS:
            continue
        plain = [word for word in words if not word.startswith("-")]
        if verb == "create":
            plain.remove("generic")
        kind, _, name = plain[0].partition("/")
        yield kind, name or plain[1]


def values(node: Any, key: str) -> Iterator[Any]:
    """Every value under this key, at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for item in node:
            yield from values(item, key)


def objects() -> set[tuple[str, str]]:
    """What the folders make, what KubeRay makes for it, and the Secrets that it refers to."""
    made = {
        (one["kind"].lower(), one["metadata"]["name"])
        for folder in FOLDERS
        for one in rendered(folder, "gpu", "gcs-redis")
    }
    for folder in FOLDERS:
        for manifest in ray_manifests(folder, "gpu", "gcs-redis"):
            kind, name = manifest["kind"], manifest["metadata"]["name"]
            if kind == "RayCluster":  # its token, and the Service of its head
                made |= {("secret", name), ("service", f"{name}-head-svc")}
            made |= {("job", name)} if kind == "RayJob" else {("service", f"{name}-serve-svc")}
        for key in ("secretRef", "secretKeyRef"):
            for reference in values(list(rendered(folder, "gpu", "gcs-redis")), key):
                made.add(("secret", reference["name"]))
    return made


def test_commands_name_objects_that_exist() -> None:
    found = set(named())
    assert {
        ("raycluster", "tsq"),
        ("rayjob", "tsq-index"),
        ("rayservice", "tsq"),
        ("secret", "tsq-s3"),
        ("service", "tsq-head-svc"),
    } <= found
    assert found - objects() - {("rayjob", "NAME")} == set()


def test_a_deleted_cluster_leaves_what_others_use() -> None:
    """The objects of cluster/ are those of jobs/ and endpoint/ too, except for the RayCluster."""
    assert [words for words in commands() if words[0] == "delete" and "-k" in words] == []
    shared = {
        (one["kind"], one["metadata"]["name"])
        for one in rendered("cluster", "gpu")
        if one["kind"] != "RayCluster"
    }
    for folder in ("jobs", "endpoint"):
        own = {(one["kind"], one["metadata"]["name"]) for one in rendered(folder, "gpu")}
        assert shared <= own


def test_a_repeated_run_is_deleted_first() -> None:
    """A RayJob that has ended stays, so that applying it again does nothing."""
    spec = yaml.safe_load((CLUSTER / "kuberay" / "jobs" / "run.yaml").read_text())["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] <= 60, "the cluster costs money for as long"
    block = re.compile(
        r"```bash\nkubectl delete rayjob tsq-(\w+)\n"
        r"kubectl apply -k cluster/kuberay/jobs -l job=(\w+)\n```"
    )
    (deleted, applied) = block.findall((REPO / "docs" / "kubernetes.md").read_text())[0]
    assert deleted == applied
