"""The session settings that all commands share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Session:
    """The cluster that a command uses and the output it shows."""

    address: str | None = None
    """Address of a Ray cluster: "auto", ray://... or host:port. None: RAY_ADDRESS from the
    environment; if that is not set, a cluster is started on this machine."""
    wait_s: float = 0.0
    """Longest wait for room on the cluster, in seconds; 0: no limit."""
    show_progress: bool = True
    """Report progress on stderr."""
    debug: bool = False
    """Show Ray's own output and tracebacks."""


DEFAULT_SESSION = Session()
