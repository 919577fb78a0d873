"""Provenance of a result: package versions, git revision, time, and the format of its record."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tsq_ray.errors import TsqError


def check_format(record: Mapping[str, Any], newest: int, place: str, error: type[TsqError]) -> None:
    """Raise `error` if the format of a record, read from `place`, is not one of 1 to `newest`."""
    found = record.get("format")
    if isinstance(found, int) and 1 <= found <= newest:
        return
    formats = f"format {found!r}; this version reads {newest}"
    if isinstance(found, int) and found > newest:
        raise error(f"{place}: made by a newer version of tsq_ray ({formats}); upgrade")
    raise error(f"{place}: {formats}")


def of_this_run() -> dict[str, Any]:
    """Return versions, git revision and time for a record that is about to be written."""
    return {"versions": versions(), "git_revision": git_revision(), "ended": now()}


def now() -> str:
    """Return the current time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of packages that affect results, such as torch and the decoders."""
    found = {}
    for name in ("tsq-ray", "torch", "ray", "timm", "transformers", "pyarrow", "decord2", "av"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the git revision that this package runs from, None outside a checkout."""
    file = Path(__file__)
    # an installed package may lie inside the checkout of another project
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file.parent, "rev-parse", "HEAD")


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None if it fails."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
