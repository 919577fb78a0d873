"""`tsq serve`: run the endpoint on this machine or a cluster until interrupted."""

from __future__ import annotations

import signal
import sys
import threading
from functools import partial
from typing import Any

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import ConfigError
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.nodes import Cluster, Layout
from tsq_ray.runtime.placement import layout
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.serving.access import check_binding, check_token_rule, read_token

APP = "tsq"
_SLACK_S = 10.0
"""Extra time before the proxy's timeout, so that the ingress reports a slow request itself."""


def check_room(placed: Layout, found: Cluster) -> None:
    """Raise ConfigError if the minimum replicas need more than the cluster has.

    Serve would wait forever.
    """
    pools = placed.pools.values()
    for resource, field, there in (
        ("CPU", "num_cpus", found.cpus),
        ("GPU", "num_gpus", float(found.gpus)),
    ):
        wanted = sum(
            pool.minimum * (pool.cpus if resource == "CPU" else pool.gpus) for pool in pools
        )
        if wanted > there:
            raise ConfigError(
                f"the replicas need {wanted:g} {resource}s, the cluster has {there:g}; "
                f"lower serve.*.min_replicas or serve.*.{field}"
            )


def check_address(host: str, port: int, address: str | None) -> str | None:
    """Check host, port and token, and return the token that requests must carry.

    Raises ConfigError if the host needs a token and none is set, or cannot be bound.
    """
    token = read_token()
    check_token_rule(host, token)
    if address is None:  # on a cluster the port belongs to other machines
        check_binding(host, port)
    return token


def run_endpoint(
    model: str, config: Config, host: str, port: int, session: Session = DEFAULT_SESSION
) -> None:
    """Deploy the graph behind HTTP and wait for SIGINT or SIGTERM.

    Raises UserError for wrong input and RunFailed for other failures.
    """
    from tsq_ray.bundle.weights import load_bundle
    from tsq_ray.stages import check_sampler

    token = check_address(host, port, session.address)
    model = storage.normalize(model)
    # report a faulty bundle here rather than from a replica
    check_sampler(load_bundle(model), config.sampler)
    _print_status("starting: ready in about 20 s")
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with cluster.connect(session) as ray:
            # ray.init has installed its own handler
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            if session.address is None:
                found = cluster.read_cluster(ray, config)
                check_room(layout("serve", config, found, 1), found)
            deploy(ray, model, config, host, port, token, session)
            try:
                _wait_for_the_end(model, host, port)
            finally:
                end()
    except KeyboardInterrupt:
        _print_status("stopped")


def _print_status(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _wait_for_the_end(model: str, host: str, port: int) -> None:
    """Say where the endpoint is, and wait for a KeyboardInterrupt."""
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}/v1/score"
    _print_status(f"serving {storage.redact(model)} on {url} (stop with Ctrl-C)")
    threading.Event().wait()


def deploy(
    ray: Any, model: str, config: Config, host: str, port: int, token: str | None, session: Session
) -> None:
    """Start Serve's HTTP server and the application on the connected cluster.

    Returns when the application is ready. Raises ConfigError if Serve already runs there.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    from tsq_ray.serving.app import application

    cluster.quiet_data(session.debug)
    named = ray.util.list_named_actors(all_namespaces=True)
    if any(actor["namespace"] == "serve" for actor in named):
        raise ConfigError(
            "--address: Serve already runs on this cluster, with its own host and port; stop it "
            "with: serve shutdown, or deploy tsq_ray.serving.app:build with: serve deploy"
        )
    logs = {"log_level": "INFO" if session.debug else "ERROR", "enable_access_log": session.debug}
    limit_s = config.serve.request_timeout_s + _SLACK_S
    http = HTTPOptions(host=host, port=port, request_timeout_s=limit_s)
    try:
        serve.start(http_options=http, logging_config=logs)
        placed = layout("serve", config, cluster.read_cluster(ray, config), 1)
        app = application(model, config, placed, token)
        start = partial(serve.run, app, name=APP, route_prefix="/")
        progress.run_watched(start, "serve", session, APP)
    except Exception as error:
        serve.shutdown()
        raise cluster.run_failed(error, "serve") from error


def end() -> None:
    """Take the application down, and Serve too unless other applications run on it."""
    from ray import serve

    if set(serve.status().applications) - {APP}:
        serve.delete(APP)
    else:
        serve.shutdown()
