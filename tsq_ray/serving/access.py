"""Access to the endpoint: its address and its token.

Imports neither torch nor ray, so that a wrong address is reported immediately.
"""

from __future__ import annotations

import ipaddress
import os
import socket

from tsq_ray.errors import ConfigError

TOKEN_VARIABLE = "TSQ_TOKEN"


def read_token() -> str | None:
    """Return the bearer token from the environment, if it is set."""
    return os.environ.get(TOKEN_VARIABLE, "").strip() or None


def is_loopback(host: str) -> bool:
    """Return whether `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token_rule(host: str, has_token: bool) -> None:
    """Raise ConfigError if the host is not loopback and no token is set."""
    if not has_token and not is_loopback(host):
        raise ConfigError(
            f"--host {host}: a host beyond loopback needs a bearer token; "
            f"set the environment variable {TOKEN_VARIABLE}, or serve.tokens_file"
        )


def check_binding(host: str, port: int, setting: str = "") -> None:
    """Raise ConfigError if the host is not this machine's or the port is in use.

    `setting` names the port's setting; without it, host and port are command-line options.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            # a port whose last connections are still closing counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        subject = f"{setting} {port}" if setting else f"--host {host} --port {port}"
        other = f"another {setting}" if setting else "another --port or --host"
        raise ConfigError(
            f"{subject}: cannot be bound ({error.strerror}); choose {other}"
        ) from None
