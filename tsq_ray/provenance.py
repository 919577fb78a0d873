"""What made a result: versions, git revision, time."""

from __future__ import annotations

import importlib.metadata
import subprocess
from datetime import datetime, timezone
from pathlib import Path


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what makes the numbers: the package, torch, ray, timm, the decoders."""
    found = {}
    for name in ("tsq-ray", "torch", "ray", "timm", "transformers", "pyarrow", "decord2", "av"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The revision of the checkout this package runs from, where it is one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
