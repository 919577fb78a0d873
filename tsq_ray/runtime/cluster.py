"""Start or join a Ray cluster: its settings, its nodes, where its files go, its error messages."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import socket
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from tsq_ray.config import Config
from tsq_ray.errors import RunFailed, StorageError, TsqError
from tsq_ray.runtime.nodes import Cluster, Layout, Node
from tsq_ray.runtime.placement import wanted_nodes
from tsq_ray.runtime.session import DEFAULT_SESSION, Session

_MAX_CHATTER = 200
_ASK_EVERY_S = 3.0
_MAX_INIT_DEATHS = 3
_MAX_SOCKET_PATH = 107
_LONGEST_SOCKET = "/ray/session_2026-12-31_23-59-59_999999_{pid}/sockets/plasma_store"
_GROUP_LABEL = "ray.io/node-group"
_SHORT_FOLDERS = ("/tmp", "/dev/shm", "/var/tmp")


@contextlib.contextmanager
def connect(session: Session = DEFAULT_SESSION) -> Iterator[Any]:
    """Connect to the session's Ray cluster, or start one here, for the time of the `with`.

    A cluster that is already connected is used and left as it is. RunFailed if none can be started
    or joined.
    """
    address, debug = session.address, session.debug
    _set_environment(debug)
    import ray

    if ray.is_initialized():
        with _stdout_to_stderr(debug):
            yield ray
        return
    # without an address Ray would join whatever head node runs on this machine
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    level = logging.INFO if debug else logging.ERROR
    options: dict[str, Any] = {"address": place, "log_to_driver": debug, "logging_level": level}
    if place == "local":
        options |= {"include_dashboard": False, "_temp_dir": _temp_dir()}
    try:
        _check_reachable(place)
        with contextlib.nullcontext() if debug else _silent_stderr():
            ray.init(**options)
    except Exception as error:  # Ray raises the bare class, too
        if place == "local":
            raise RunFailed(_why_start_failed(error)) from error
        raise RunFailed(_why_joining_failed(error, place, bool(address))) from error
    with _stdout_to_stderr(debug):
        try:
            yield ray
        finally:
            ray.shutdown()


def read_cluster(ray: Any, config: Config) -> Cluster:
    """The alive nodes of the connected cluster, and what `resources.node_types` says can be started."""
    nodes, groups = [], []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        found = node["Resources"]
        memory = found.get("memory", math.inf)
        groups.append((node.get("Labels") or {}).get(_GROUP_LABEL, ""))
        nodes.append(
            Node(found.get("CPU", 0.0), found.get("GPU", 0.0), memory, name=node["NodeName"])
        )
    types = []
    for kind in config.resources.node_types:
        alive = sum(1 for node in nodes if (node.cpus, node.gpus) == (kind.cpus, kind.gpus))
        types.append(Node(kind.cpus, kind.gpus, count=max(0, kind.count - alive)))
    return Cluster(tuple(nodes), tuple(types), any(groups))


@contextlib.contextmanager
def asking_for_nodes(ray: Any, placed: Layout, config: Config) -> Iterator[None]:
    """Ask the autoscaler for the nodes that the layout can use, for the time of the `with`.

    For actors that are started only when their nodes are there. The autoscaler knows one request,
    the last, and Ray Data sends its own: so this one is repeated.
    """
    found = read_cluster(ray, config)
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
    """Ray Data's context with its own bars and chatter off: our progress is shown instead."""
    import ray

    # RETRIES have no named parameters; Ray Data's source names these very arguments as the way
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = debug
    context.execution_options.preserve_order = False
    # the run itself says what it waits for, and --wait-s ends it
    context.execution_no_progress_timeout_s = 365 * 24 * 3600
    context.max_consecutive_actor_init_deaths = _MAX_INIT_DEATHS
    if not debug:
        for name in ("ray.data", "ray.train", "ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # a failed run ends with one line of ours, not with Ray Data's traceback before it
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return context


def root_cause(error: BaseException) -> BaseException:
    """What a Ray error is about: the exception the user's code raised, under Ray's wrappers."""
    seen = error
    while True:
        inner = getattr(seen, "cause", None) or seen.__cause__
        # Ray Data names an empty exception as the cause of one that is not the user's
        if inner is None or inner is seen or not (str(inner) or inner.__cause__):
            return seen
        seen = inner


def run_failed(error: BaseException, doing: str) -> TsqError:
    """A one-line error for what came out of Ray; an error of this package keeps its kind, but storage that fails in mid-run is a failed run."""
    cause = root_cause(error)
    if isinstance(cause, StorageError):
        return RunFailed(str(cause))
    if isinstance(cause, TsqError):
        return cause
    last = str(cause).strip().splitlines()
    return RunFailed(
        f"{doing} failed: {type(cause).__name__}: {last[-1] if last else ''}; give the same command again to go on (--debug shows more)"
    )


def _set_environment(debug: bool) -> None:
    """What Ray and the processes that it starts read from the environment."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # a worker's report waits until it is fetched: with Ray's 2 s a checkpoint would cost more than
    # a short epoch
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # usage statistics would be a request to the outside that nobody asked for
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # after an interrupt a thread that still runs must not start another Ray
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if not debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def _temp_dir() -> str:
    """The folder for Ray's files: below RAY_TMPDIR or TMPDIR, as Ray would choose it, where its
    sockets fit there; else a short folder of this user's own.
    """
    asked = os.environ.get("RAY_TMPDIR")
    # Ray itself starts nothing, and says so after 30 s, where the path is relative
    folder = os.path.abspath(asked or os.environ.get("TMPDIR") or "/tmp")
    allowed = _MAX_SOCKET_PATH - len(_LONGEST_SOCKET.format(pid=os.getpid()))
    length = len(os.fsencode(folder))
    if length <= allowed:
        return os.path.join(folder, "ray")
    name = "RAY_TMPDIR" if asked else "TMPDIR"
    what = f"{name} is too long for Ray's Unix sockets ({length} bytes, at most {allowed})"
    if asked:
        raise RunFailed(f"{what}: {folder}; set RAY_TMPDIR to a shorter path")
    for base in _SHORT_FOLDERS:
        own = os.path.join(base, f"tsq-ray-{os.getuid()}")
        if _is_private_folder(own):
            note = f"{what}: Ray's files go to {own}; RAY_TMPDIR names another folder"
            print(note, file=sys.stderr)  # noqa: T201
            return os.path.join(own, "ray")
    places = ", ".join(_SHORT_FOLDERS)
    raise RunFailed(f"{what}, and none of {places} is writable; set RAY_TMPDIR to a shorter path")


def _is_private_folder(path: str) -> bool:
    """Make the folder where it is missing; False where others could put something there."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError:
        return False
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not found.st_mode & 0o077 and os.access(path, os.W_OK | os.X_OK)


def _check_reachable(address: str) -> None:
    """OSError where nobody listens at `[ray://]host:port`; Ray itself would try for five minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


def _why_joining_failed(error: Exception, place: str, is_argument: bool) -> str:
    """What is wrong with the address, and what to do about it."""
    named = f"--address {place}" if is_argument else f"RAY_ADDRESS={place}"
    otherwise = "leave --address out" if is_argument else "unset RAY_ADDRESS"
    if isinstance(error, OSError):
        what, remedy = "no Ray cluster answers there", "start one with: ray start --head"
    else:
        what = "that Ray cluster cannot be joined"
        remedy = "check the address, and that the cluster has this Python and this Ray"
    return f"{named}: {what} ({one_line(error)}); {remedy}, or {otherwise} to start Ray here"


def _why_start_failed(error: Exception) -> str:
    said = one_line(error)
    if "timed out" in said:
        advice = (
            "the machine is too busy: give the same command again when less runs here, or let Ray "
            "wait longer than its 30 s with RAY_raylet_start_wait_time_s=120"
        )
    elif isinstance(error, OSError) and error.filename is not None:
        advice = "set RAY_TMPDIR to a folder of yours that has some room"
    else:
        advice = "--debug shows what Ray says"
    return f"Ray could not be started here ({said}); {advice}"


def one_line(error: BaseException) -> str:
    """The beginning of an error's text."""
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def _stdout_to_stderr(debug: bool) -> Iterator[None]:
    """Move what Ray prints about its nodes and workers from stdout to stderr.

    stdout is for the summary alone.
    """
    with contextlib.redirect_stdout(sys.stderr if debug else _FirstLines(sys.stderr)):
        yield


class _FirstLines(io.TextIOBase):
    """The first line of each text: the news of a lost node comes with twenty more of its log."""

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink

    def write(self, text: str) -> int:
        lines = text.strip().splitlines()
        if lines:
            self._sink.write(f"{lines[0][:_MAX_CHATTER]}\n")
        return len(text)

    def flush(self) -> None:
        self._sink.flush()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's C++ core announces its log level on stderr; errors of ray.init come as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
