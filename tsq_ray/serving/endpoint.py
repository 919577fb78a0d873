"""`tsq serve`: run the endpoint on this machine or a cluster until a signal ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from tsq_ray import log, storage
from tsq_ray.bundle.settings import check_bundle
from tsq_ray.config import Config
from tsq_ray.errors import ConfigError
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.nodes import Cluster, Layout
from tsq_ray.runtime.placement import layout
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.serving import facts
from tsq_ray.serving.access import check_binding, check_token_rule, read_token
from tsq_ray.serving.loopback import LOOPBACK
from tsq_ray.serving.replicas import start_failed

if TYPE_CHECKING:
    from tsq_ray.serving.front import Front

APP = "tsq"
_SERVE_ENVIRONMENT = {
    # Serve's default, ten polls and ten exports a second in every process, costs as much CPU as the
    # requests
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    # saves a hop to another thread for each call
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""For the processes of a Ray cluster that this command starts."""
_SLACK_S = 10.0
"""Extra time before the proxy's timeout, so that the ingress reports a slow request itself."""


def check_room(placed: Layout, nodes: Cluster) -> None:
    """Raise ConfigError if the minimum replicas need more resources than the cluster has.

    Serve would wait forever.
    """
    pools = placed.pools.values()
    for resource, field, available in (
        ("CPU", "num_cpus", nodes.cpus),
        ("GPU", "num_gpus", float(nodes.gpus)),
    ):
        needed = sum(
            pool.minimum * (pool.cpus if resource == "CPU" else pool.gpus) for pool in pools
        )
        if needed > available:
            raise ConfigError(
                f"the replicas need {needed:g} {resource}s, the cluster has {available:g}; "
                f"lower serve.*.min_replicas or serve.*.{field}"
            )


def check_address(config: Config, host: str, port: int, on_cluster: bool) -> str | None:
    """Check host, port and tokens, and return the token from the environment.

    Raises ConfigError if the host needs a token and none is set, or if it cannot be bound.
    """
    from tsq_ray.serving.requests.tokens import read_tokens

    token, path = read_token(), config.serve.tokens_file
    tokens = read_tokens(path) if path else []
    check_token_rule(host, token is not None or bool(tokens))
    if not on_cluster:  # there the port belongs to other machines
        check_binding(host, port)
        check_binding(LOOPBACK, config.serve.metrics_port, "serve.metrics_port")
    return token


def run_endpoint(
    model: str, config: Config, host: str, port: int, session: Session = DEFAULT_SESSION
) -> None:
    """Deploy the graph behind HTTP and wait for SIGINT or SIGTERM.

    After the signal, new requests are refused and those in flight answered for at most
    `serve.drain_s` seconds; a second signal ends the endpoint at once. Raises UserError for wrong
    input and RunFailed for other failures.
    """
    token = check_address(config, host, port, session.joins_cluster)
    model = storage.normalize(model)
    check_bundle(model, config.sampler.mode)
    log.say("starting: Ray")
    for name, value in _SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with (
        contextlib.suppress(KeyboardInterrupt),
        _Signals() as signals,
        cluster.connect(session, metrics_port=config.serve.metrics_port) as ray,
    ):
        nodes = cluster.read_cluster(ray, config)
        if not session.joins_cluster:
            check_room(layout("serve", config, nodes, 1), nodes)
        log.say("starting: loading the model in each replica")
        inner = (host, port) if session.joins_cluster else (LOOPBACK, _free_port())
        with _deployed(ray, model, config, inner, token, session):
            signals.serving = True
            with _http_front(config, host, port, inner, session) as http_front:
                _print_serving(model, config, host, port, session)
                signals.wait(http_front.restart_if_ended if http_front is not None else None)
                left_s = _drain(config.serve.drain_s)
                if http_front is not None:
                    http_front.finish(left_s)
    log.say("stopped")


class _Signals:
    """SIGINT and SIGTERM: the first asks a serving endpoint to end; any other ends it at once."""

    def __init__(self) -> None:
        self._end_requested = threading.Event()
        self.serving = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if not self.serving or self._end_requested.is_set():
            raise KeyboardInterrupt
        self._end_requested.set()

    def wait(self, poll: Callable[[], None] | None) -> None:
        """Wait for the first signal, calling `poll` several times a second."""
        while not self._end_requested.wait(0.2):  # an unlimited wait would not see the signal
            if poll is not None:
                poll()


_NUMBERS = (signal.SIGINT, signal.SIGTERM)


def _print_serving(model: str, config: Config, host: str, port: int, session: Session) -> None:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    if not session.joins_cluster:
        log.say(f"metrics on http://{LOOPBACK}:{config.serve.metrics_port}/metrics")
    log.say(f"serving {storage.redact(model)} on {url} (stop with Ctrl-C)")


def _drain(limit_s: float) -> float:
    """Refuse new requests, wait until those in flight are answered, return the seconds left."""
    deadline = time.monotonic() + limit_s
    log.say(f"ending: answering the requests in flight, for at most {limit_s:g} s")
    facts.request_end(APP)
    if not facts.wait_until_done(APP, _num_ingresses, limit_s):
        log.say(f"ending: requests still in flight after {limit_s:g} s are dropped")
    return max(0.0, deadline - time.monotonic())


def _num_ingresses() -> int:
    from ray import serve
    from ray.serve._private.common import ReplicaState

    app = serve.status().applications.get(APP)
    ingress = app.deployments.get("Ingress") if app is not None else None
    return ingress.replica_states.get(ReplicaState.RUNNING, 0) if ingress is not None else 0


@contextlib.contextmanager
def _deployed(
    ray: Any,
    model: str,
    config: Config,
    inner: tuple[str, int],
    token: str | None,
    session: Session,
) -> Iterator[None]:
    """Run Serve and the application on the connected cluster for the duration of the `with`.

    `inner`: host and port of Serve's HTTP server. Raises ConfigError if Serve already runs there.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    from tsq_ray.serving.app import application

    cluster.quiet_data(session.debug)
    actors = ray.util.list_named_actors(all_namespaces=True)
    if any(actor["namespace"] == "serve" for actor in actors):
        if serve.status().applications:
            raise ConfigError(
                "--address: Serve already runs on this cluster, with its own host and port; stop "
                "it with: serve shutdown, or deploy tsq_ray.serving.app:build with: serve deploy"
            )
        serve.shutdown()  # left by a scoring run, without HTTP
    # one JSON line per request, in the log files of the ingress replicas
    logs = {"encoding": "JSON", "log_level": "INFO", "enable_access_log": session.debug}
    limit_s = config.serve.request_timeout_s + _SLACK_S
    http = HTTPOptions(host=inner[0], port=inner[1], request_timeout_s=limit_s)
    facts.forget(APP)
    try:
        try:
            serve.start(http_options=http, logging_config=logs)
            placed = layout("serve", config, cluster.read_cluster(ray, config), 1)
            app = application(model, config, placed, token)
            start = partial(serve.run, app, name=APP, route_prefix="/", logging_config=logs)
            progress.run_watched(start, "serve", session, APP, _loading_reporter())
        except Exception as error:
            raise start_failed(error, APP, "serve") from error
        yield
    finally:
        if session.joins_cluster:
            _take_down()
        # a Ray started by this command ends with it, even if a second signal interrupts this


def _loading_reporter() -> progress.Observe:
    """Return an observer that reports each stage once it has loaded."""
    reported: set[str] = set()

    def observe(*_: object) -> None:
        new = facts.loaded(APP) - reported
        for name in sorted(new):
            log.say(f"starting: the {name.lower()} has loaded")
        reported.update(new)

    return observe


@contextlib.contextmanager
def _http_front(
    config: Config, host: str, port: int, inner: tuple[str, int], session: Session
) -> Iterator[Front | None]:
    """Put HAProxy in front of Serve's HTTP server, if that is on this machine's loopback."""
    from tsq_ray.serving.front import front

    if session.joins_cluster:
        yield None
        return
    with front(host, port, inner[1], config.serve) as http_front:
        yield http_front


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _take_down() -> None:
    """Take the application down, and Serve too unless other applications run on it."""
    from ray import serve

    facts.forget(APP)
    if set(serve.status().applications) - {APP}:
        serve.delete(APP)
    else:
        serve.shutdown()
