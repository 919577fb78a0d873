"""Keep a replica's own server on loopback if its node is on loopback."""

from __future__ import annotations

import functools
from typing import Any

LOOPBACK = "127.0.0.1"


def bind_to_loopback() -> None:
    """Have the server that Serve starts in this replica listen on loopback, if the node does.

    By default it accepts pickled calls on every interface, without authentication.
    """
    import ray
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() != LOOPBACK:
        return
    add_port: Any = replica.add_port_to_grpc_server
    if not isinstance(add_port, functools.partial):
        replica.add_port_to_grpc_server = functools.partial(_add_port, add_port)


def _add_port(add_port: Any, server: Any, address: str) -> int:
    return int(add_port(server, address.replace("[::]", LOOPBACK)))
