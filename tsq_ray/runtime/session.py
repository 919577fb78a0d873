"""How a command runs on Ray, and what it says meanwhile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Session:
    """The cluster that a command uses and what it shows; the same for every command."""

    address: str | None = None
    """Address of a Ray cluster: "auto", ray://... or host:port. Without one the environment's
    RAY_ADDRESS counts, and without that a cluster is started on this machine."""
    wait_s: float = 0.0
    """Longest wait for room on the cluster, in seconds; 0: no limit."""
    show_progress: bool = True
    """Report progress on stderr."""
    debug: bool = False
    """Show Ray's own output, and tracebacks."""


DEFAULT_SESSION = Session()
