"""Shared by the Ray job entry points: find the package and the cluster, run one `tsq` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def arguments(command: str, given: Sequence[str]) -> list[str]:
    """Return the arguments of `tsq`; the job's own cluster is the default address."""
    named = any(item == "--address" or item.startswith("--address=") for item in given)
    return [command, *given, *([] if named else ["--address", "auto"])]


def run(command: str) -> int:
    """Run `tsq <command>` with this process's arguments and return its exit code."""
    # `ray job submit --working-dir .` ships the folder but does not install the package
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tsq_ray.cli import main

    return main(arguments(command, sys.argv[1:]))
