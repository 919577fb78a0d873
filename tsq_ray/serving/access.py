"""Who may reach the endpoint: its address and its token. Imports neither torch nor ray, so that a wrong address is told at once."""

from __future__ import annotations

import ipaddress
import os
import socket

from tsq_ray.errors import ConfigError

TOKEN_VARIABLE = "TSQ_TOKEN"


def read_token() -> str | None:
    """The bearer token of the environment, if there is one."""
    return os.environ.get(TOKEN_VARIABLE, "").strip() or None


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token_rule(host: str, token: str | None) -> None:
    """ConfigError for a binding beyond loopback without a token."""
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host}: beyond loopback a bearer token is needed; set the environment variable {TOKEN_VARIABLE}"
        )


def check_binding(host: str, port: int) -> None:
    """ConfigError for a host that is not this machine's, or a port that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # a port whose last connections are closing is free
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be bound ({error.strerror}); choose another --port or --host"
        ) from None
