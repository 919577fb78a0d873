"""Whether all nodes of a cluster see the folder that a run writes to."""

from __future__ import annotations

from typing import Any

from tsq_ray import storage
from tsq_ray.errors import RunError
from tsq_ray.runtime.session import Session

_NAMED = 3


def check_out(ray: Any, out: str, session: Session) -> None:
    """Raise RunError if `out` is a local path and a node of the cluster is another machine.

    Nodes with the address of the driver's node are this machine. With `session.shared_fs` every
    path is accepted. `out` is empty if nothing is written.
    """
    if session.shared_fs or not out or not storage.is_local(out):
        return
    own = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    others = sorted(set(nodes.values()) - {nodes.get(own)})
    if others:
        named = ", ".join([*others[:_NAMED], *["..."] * (len(others) > _NAMED)])
        raise RunError(
            f"--out {out}: a path of this machine, which the cluster's other machines ({named}) "
            "cannot see; use a URI such as s3://..., or --shared-fs if they have this path too"
        )
