"""Where a command runs and what it shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Session:
    """The cluster that a command uses and what it shows; the same for all commands."""

    address: str | None = None
    """Address of a Ray cluster: "auto", ray://... or host:port. The default is RAY_ADDRESS from the
    environment; without it a cluster is started on this machine."""
    wait_s: float = 0.0
    """Longest wait for room on the cluster, in seconds; 0: no limit."""
    show_progress: bool = True
    """Report progress on stderr."""
    debug: bool = False
    """Show Ray's own output and tracebacks."""


DEFAULT_SESSION = Session()
