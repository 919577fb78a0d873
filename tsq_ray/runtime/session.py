"""The session settings that all commands share."""

from __future__ import annotations

import os
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
    shared_fs: bool = False
    """Every node of the cluster has this machine's paths."""

    @property
    def place(self) -> str:
        """The address of the cluster to join; "local": one is started here."""
        variable = os.environ.get("RAY_ADDRESS")
        # Ray, too, reads "auto" as RAY_ADDRESS if that is set
        address = None if self.address == "auto" and variable else self.address
        # without an address Ray would join any head node that runs on this machine
        return address or variable or "local"

    @property
    def joins_cluster(self) -> bool:
        """Whether a cluster is joined, named here or by RAY_ADDRESS, instead of started."""
        return self.place != "local"


DEFAULT_SESSION = Session()
