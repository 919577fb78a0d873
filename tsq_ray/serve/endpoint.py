"""`tsq serve`: the endpoint on this machine or a cluster, until it is interrupted."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading

from tsq_ray import runtime, storage
from tsq_ray.bundle import read_bundle_settings
from tsq_ray.config import Config
from tsq_ray.errors import ConfigError, ModelError


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_binding(host: str, port: int, token: str | None) -> None:
    """ConfigError for a binding beyond loopback without a token, or a port that is taken."""
    if token is None and not is_loopback(host):
        raise ConfigError(f"--host {host}: beyond loopback a bearer token is needed; set the environment variable TSQ_TOKEN")
    try:
        with socket.create_server((host, port), reuse_port=False):
            pass
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be bound ({error.strerror}); choose another --port") from None


def run_endpoint(model: str, config: Config, host: str, port: int, address: str | None = None, debug: bool = False) -> None:
    """Deploy the graph behind HTTP and wait for SIGINT or SIGTERM. ConfigError or ModelError for wrong input, RunFailed else."""
    from tsq_ray.serve.app import TOKEN_VARIABLE

    token = os.environ.get(TOKEN_VARIABLE) or None
    check_binding(host, port, token)
    model = storage.normalize(model)
    if "recognizer" not in read_bundle_settings(model)[0]["files"]:
        raise ModelError(f"{storage.redact(model)}: the bundle has no recogniser; train it again with --recognizer URI")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with runtime.cluster(address, debug):
        deploy(model, config, host, port, token, debug)
        print(f"serving {storage.redact(model)} on http://{host}:{port}/v1/score (stop with Ctrl-C)", file=sys.stderr, flush=True)  # noqa: T201
        stop.wait()
        from ray import serve

        serve.shutdown()


def deploy(model: str, config: Config, host: str, port: int, token: str | None, debug: bool = False) -> None:
    """Start Serve's HTTP server and the application on the connected cluster; returns when it is ready."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from tsq_ray.serve.app import application

    runtime.quiet_data(debug)
    logs = {"log_level": "INFO" if debug else "ERROR", "enable_access_log": debug}
    serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=config.serve.request_timeout_s), logging_config=logs)
    try:
        serve.run(application(model, config, token), name="tsq", route_prefix="/")
    except Exception as error:
        raise runtime.run_failed(error, "serve") from error
