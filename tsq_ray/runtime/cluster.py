"""Start or join a Ray cluster: settings, nodes, temporary files and error messages."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tsq_ray import log
from tsq_ray.config import Config, label_map
from tsq_ray.errors import RunFailed, StorageError, TsqError
from tsq_ray.runtime.driver import signal_handlers_kept, silent_stderr, stdout_to_stderr
from tsq_ray.runtime.nodes import Cluster, Layout, Node, Stage, not_yet_started, shortfalls
from tsq_ray.runtime.placement import layout, wanted_nodes
from tsq_ray.runtime.reach import check_out
from tsq_ray.runtime.session import DEFAULT_SESSION, Session

_ASK_EVERY_S = 3.0
_MAX_INIT_DEATHS = 3
_MAX_SOCKET_PATH = 107
_LONGEST_SOCKET = "/ray/session_2026-12-31_23-59-59_999999_{pid}/sockets/plasma_store"
_GROUP_LABEL = "ray.io/node-group"
_SHORT_FOLDERS = ("/tmp", "/dev/shm", "/var/tmp")
_RETRY_ADVICE = re.compile(r"\nFailed to .* after \d+/\d+ attempts .*", re.DOTALL)
"""What Ray Data appends to the message of an error in a worker."""


@contextlib.contextmanager
def connect(
    session: Session = DEFAULT_SESSION, metrics_port: int | None = None, out: str = ""
) -> Iterator[Any]:
    """Connect to the session's Ray cluster, or start one here, for the duration of the `with`.

    A started cluster listens on loopback only, with its metrics on `metrics_port` or a free port.
    A cluster that is already connected is used and stays connected. Raises RunFailed if no cluster
    can be started or joined, RunError if a node of it cannot see the run's folder `out`.
    """
    debug, place = session.debug, session.place
    _set_environment(debug)
    with _for_loopback(place):
        import ray

    if ray.is_initialized():
        with stdout_to_stderr(debug):
            check_out(ray, out, session)
            yield ray
        return
    level = logging.INFO if debug else logging.ERROR
    options: dict[str, Any] = {"address": place, "log_to_driver": debug, "logging_level": level}
    if not session.joins_cluster:
        options |= {"include_dashboard": False, "_temp_dir": _temp_dir()}
        options |= {"_metrics_export_port": metrics_port}
    try:
        _check_reachable(place)
        quiet = contextlib.nullcontext() if debug else silent_stderr()
        with _for_loopback(place), quiet, signal_handlers_kept():
            ray.init(**options)
    except Exception as error:  # Ray also raises plain Exception
        if not session.joins_cluster:
            raise RunFailed(_explain_start_failure(error)) from error
        raise RunFailed(_explain_join_failure(error, place, place == session.address)) from error
    with stdout_to_stderr(debug):
        try:
            check_out(ray, out, session)
            yield ray
        finally:
            ray.shutdown()


def ray_token() -> str | None:
    """Return this user's token for Ray clusters, from the places where Ray looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip() or None
    return None


def read_cluster(ray: Any, config: Config) -> Cluster:
    """Return the connected cluster."""
    return cluster_of(ray.nodes(), config)


def cluster_of(records: Iterable[Mapping[str, Any]], config: Config) -> Cluster:
    """Return the live nodes among Ray's records, and the nodes that the cluster can still start.

    The latter come from `resources.node_types`. Without that setting nothing is known about the
    nodes of a node manager, which Ray shows by a label.
    """
    nodes = []
    for node in records:
        if node["Alive"]:
            found, labels = node["Resources"], node.get("Labels") or {}
            cpus, gpus = found.get("CPU", 0.0), found.get("GPU", 0.0)
            memory = found.get("memory", math.inf)
            nodes.append(Node(cpus, gpus, memory, name=node["NodeName"], labels=labels))
    types = tuple(
        Node(kind.cpus, kind.gpus, count=kind.count, labels=label_map(kind.labels))
        for kind in config.resources.node_types
    )
    managed = any(node.labels.get(_GROUP_LABEL) for node in nodes)
    return Cluster(tuple(nodes), not_yet_started(types, nodes), managed and not types)


def lay_out(ray: Any, stage: Stage, config: Config, videos: int) -> Layout:
    """Lay out a stage on the connected cluster, and log what it starts without."""
    found = read_cluster(ray, config)
    placed = layout(stage, config, found, videos)
    _say_shortfalls(placed, config, found)
    return placed


def _say_shortfalls(placed: Layout, config: Config, found: Cluster) -> None:
    for line in shortfalls(placed, config.resources, found):
        log.say(f"{placed.stage}: {line}")


@contextlib.contextmanager
def asking_for_nodes(ray: Any, placed: Layout, config: Config) -> Iterator[None]:
    """Ask the autoscaler for the nodes that the layout can use, for the duration of the `with`.

    Needed for actors that are started only once their nodes exist. The autoscaler remembers only
    the last request, and Ray Data sends its own, so this one is repeated.
    """
    found = read_cluster(ray, config)
    _say_shortfalls(placed, config, found)
    if not (found.grows or found.launchable):
        yield
        return
    from ray.autoscaler.sdk import request_resources

    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(_ASK_EVERY_S):
            with contextlib.suppress(ray.exceptions.RayError):
                request_resources(bundles=wanted_nodes(placed, read_cluster(ray, config)))

    request_resources(bundles=wanted_nodes(placed, found))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        request_resources(bundles=[])


def quiet_data(debug: bool = False) -> Any:
    """Turn off Ray Data's progress bars and log output, which ours replace; return its context."""
    import ray

    # map_batches has no named parameters for RETRIES; Ray Data's source says to pass them this way
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = debug
    context.execution_options.preserve_order = False
    # otherwise an error in a worker loses its cause on its way here
    context.raise_original_map_exception = True
    # the run itself reports what it waits for, and --wait-s ends the wait
    context.execution_no_progress_timeout_s = 365 * 24 * 3600
    context.max_consecutive_actor_init_deaths = _MAX_INIT_DEATHS
    if not debug:
        for name in ("ray.data", "ray.train", "ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # a failed run ends with our one line, without Ray Data's traceback before it
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return context


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that the user's code raised, without Ray's wrappers."""
    seen = error
    while True:
        inner = getattr(seen, "cause", None) or seen.__cause__
        # Ray Data sets an empty exception as the cause of errors that are not the user's
        if inner is None or inner is seen or not (str(inner) or inner.__cause__):
            return seen
        seen = inner


def run_failed(error: BaseException, doing: str) -> TsqError:
    """Turn an error raised by Ray into a one-line error of this package.

    An error of this package keeps its class, except that a storage error in mid-run is RunFailed.
    """
    cause = root_cause(error)
    if cause.args and isinstance(cause.args[0], str):
        cause.args = (_RETRY_ADVICE.sub("", cause.args[0]), *cause.args[1:])
    if isinstance(cause, StorageError):
        return RunFailed(str(cause))
    if isinstance(cause, TsqError):
        return cause
    last = str(cause).strip().splitlines()
    return RunFailed(
        f"{doing} failed: {type(cause).__name__}: {last[-1] if last else ''}; "
        "run the same command again to resume (--debug shows more)"
    )


@contextlib.contextmanager
def _for_loopback(place: str) -> Iterator[None]:
    """Make a Ray that is imported and started inside the `with` listen on loopback only.

    A cluster to join is not affected. The variable is removed again, because it would make a
    multi-node Ray started later from this environment fail.
    """
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    if place != "local" or name in os.environ:
        yield
        return
    # Ray's own switch for machines that form no cluster: this node's address is then 127.0.0.1
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def _set_environment(debug: bool) -> None:
    """Set the environment variables that Ray and its processes read."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # a worker's report blocks until it is fetched: at Ray's default of 2 s a checkpoint would take
    # longer than a short epoch
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # usage statistics would be sent over the network without the user's consent
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # after an interrupt, a thread that is still running must not start Ray again
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if not debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def _temp_dir() -> str:
    """Return the folder for Ray's files.

    It is below RAY_TMPDIR or TMPDIR, as Ray itself would choose, if the paths of Ray's sockets fit
    there, else a private folder with a short path. Raises RunFailed if RAY_TMPDIR is too long or no
    private folder can be made.
    """
    requested = os.environ.get("RAY_TMPDIR")
    # given a relative path, Ray fails to start and reports it only after 30 s
    folder = os.path.abspath(requested or os.environ.get("TMPDIR") or "/tmp")
    allowed = _MAX_SOCKET_PATH - len(_LONGEST_SOCKET.format(pid=os.getpid()))
    length = len(os.fsencode(folder))
    if length <= allowed:
        return os.path.join(folder, "ray")
    name = "RAY_TMPDIR" if requested else "TMPDIR"
    what = f"{name} is too long for Ray's Unix sockets ({length} bytes, at most {allowed})"
    if requested:
        raise RunFailed(f"{what}: {folder}; set RAY_TMPDIR to a shorter path")
    for base in _SHORT_FOLDERS:
        own = os.path.join(base, f"tsq-ray-{os.getuid()}")
        if _is_private_folder(own):
            log.say(f"{what}: Ray's files go to {own}; set RAY_TMPDIR to choose another folder")
            return os.path.join(own, "ray")
    places = ", ".join(_SHORT_FOLDERS)
    raise RunFailed(f"{what}, and none of {places} is writable; set RAY_TMPDIR to a shorter path")


def _is_private_folder(path: str) -> bool:
    """Create the folder if it is missing; return whether only this user can write to it."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError:
        return False
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not found.st_mode & 0o077 and os.access(path, os.W_OK | os.X_OK)


def _check_reachable(place: str) -> None:
    """Raise _Unreachable if nothing listens at `[ray://]host:port` or the address behind `auto`.

    Ray itself would retry for five minutes.
    """
    address = _resolve_auto() if place == "auto" else place
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            prefix = "" if address == place else f"{address}: "
            raise _Unreachable(f"{prefix}{error}") from error


def _resolve_auto() -> str:
    """Return the address behind `auto`: that of this machine's cluster, which may have died since.

    Raises _Unreachable if there was none.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address("auto"))
    except ConnectionError as error:
        raise _Unreachable("none runs on this machine") from error


class _Unreachable(Exception):
    """Nothing listens at an address."""


def _explain_join_failure(error: Exception, place: str, is_argument: bool) -> str:
    """Say what is wrong with the address and what to do about it."""
    setting = f"--address {place}" if is_argument else f"RAY_ADDRESS={place}"
    alternative = "leave --address out" if is_argument else "unset RAY_ADDRESS"
    if place.startswith(("http://", "https://")):
        remedy = "without it name the cluster as auto, HOST:PORT or ray://HOST:PORT"
        return (
            f"{setting}: a dashboard's URL, which --submit takes; {remedy}, "
            f"or {alternative} to start Ray here"
        )
    if isinstance(error, _Unreachable):
        what, remedy = "no Ray cluster answers there", "start one with: ray start --head"
    elif isinstance(error, OSError):  # this is how Ray reports a wrong token and a missing one
        problem, needed = _token_problem()
        what = f"what listens there {problem}, or is not a Ray cluster"
        remedy = f"check the address; for a token, set {needed}"
    else:
        what = "that Ray cluster cannot be joined"
        remedy = "check the address, and that the cluster has the same Python and Ray versions"
    return f"{setting}: {what} ({one_line(error)}); {remedy}, or {alternative} to start Ray here"


def _token_problem() -> tuple[str, str]:
    """Return what a refused client may lack, and the variables to set for it."""
    mode, token = "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's"
    if ray_token() is None:
        return "may want a token but got none", f"{mode}, and {token}"
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return "does not accept the token", token
    return f"may want this user's token, which is sent only with {mode}", mode


def _explain_start_failure(error: Exception) -> str:
    reason = one_line(error)
    if "timed out" in reason:
        advice = (
            "the machine is too busy: run the same command again when it is less loaded, "
            "or let Ray wait longer than its 30 s with RAY_raylet_start_wait_time_s=120"
        )
    elif isinstance(error, OSError) and error.filename is not None:
        advice = "set RAY_TMPDIR to a folder that you can write to and that has free space"
    else:
        advice = "--debug shows Ray's own output"
    return f"Ray could not be started here ({reason}); {advice}"


def one_line(error: BaseException) -> str:
    """Return the first 200 characters of an error's text, on one line."""
    return " ".join(str(error).split())[:200]
