"""What the Ray job entry points share: find the package, find the cluster, run one `tsq` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def arguments(command: str, given: Sequence[str]) -> list[str]:
    """The command line of `tsq`: `given`, on the cluster that the job runs in unless it names another."""
    named = any(item == "--address" or item.startswith("--address=") for item in given)
    return [command, *given, *([] if named else ["--address", "auto"])]


def run(command: str) -> int:
    """Run `tsq <command>` with this process's arguments; returns its exit code."""
    # `ray job submit --working-dir .` ships the folder and installs nothing: the package lies beside jobs/.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tsq_ray.cli import main

    return main(arguments(command, sys.argv[1:]))
