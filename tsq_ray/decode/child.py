"""The child processes of the sandbox: how they start, and what one does with a video.

They come from a fork server private to this module, for two reasons. It imports the decoders once,
so that a killed child is replaced immediately. And it never runs the parent's main module, as
multiprocessing would in the server and in every child: a script without an `if __name__` guard
would start again, and a Ray worker would import ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.popen_forkserver
import multiprocessing.process
import multiprocessing.spawn
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from tsq_ray import storage
from tsq_ray.config import DecodeConfig
from tsq_ray.decode.types import DecodedVideo, FrameSpec, Outcome, VideoSource
from tsq_ray.errors import StorageError, VideoError

DecodeTask = Callable[[VideoSource, DecodeConfig, Mapping[str, FrameSpec]], DecodedVideo]

SPENT = 75
"""Exit code of a child whose earlier videos left too much memory behind."""
_PR_SET_PDEATHSIG = 1


def _with_globals(standard: Any, module: ModuleType, **replaced: Any) -> FunctionType:
    """Copy a function of the standard library, with some of its globals replaced."""
    namespace = {**vars(module), **replaced}
    return FunctionType(standard.__code__, namespace, argdefs=standard.__defaults__)


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


_standard_data = _with_globals(
    multiprocessing.spawn.get_preparation_data,
    multiprocessing.spawn,
    os=SimpleNamespace(getcwd=_current_folder, path=os.path),
)


def _preparation_data(name: str) -> dict[str, Any]:
    # without the main module, and without a current folder that was removed
    data: dict[str, Any] = _standard_data(name)
    return {
        key: value
        for key, value in data.items()
        if not key.startswith("init_main") and (key, value) != ("dir", None)
    }


def _bind_address(family: str) -> str:
    """A path for the fork server's Unix socket, short enough whatever TMPDIR is."""
    folder = os.open(tempfile.mkdtemp(prefix="tsq-fork-"), os.O_PATH | os.O_DIRECTORY)
    return f"/proc/self/fd/{folder}/socket"


class _Server(multiprocessing.forkserver.ForkServer):
    """A fork server whose socket has no name: nothing is left behind if this process is killed."""

    _ensure = _with_globals(
        multiprocessing.forkserver.ForkServer.ensure_running,
        multiprocessing.forkserver,
        connection=SimpleNamespace(arbitrary_address=_bind_address),
        spawn=SimpleNamespace(
            get_preparation_data=_preparation_data,
            get_executable=multiprocessing.spawn.get_executable,
        ),
    )

    def ensure_running(self) -> None:
        self._ensure()
        bound = str(vars(self)["_forkserver_address"])
        folder, _, name = bound.rpartition("/")
        if name != "socket":  # it was already running
            return
        socket = os.open(bound, os.O_PATH)  # still reaches the socket once its name is gone
        path = os.readlink(folder)
        os.unlink(bound)
        os.close(int(folder.rpartition("/")[2]))
        os.rmdir(path)
        self._forkserver_address = f"/proc/self/fd/{socket}"


_SERVER = _Server()
_SERVER.set_forkserver_preload(["tsq_ray.decode.sandbox"])
_SERVER_LOCK = threading.Lock()


def _connect_to_new_process(fds: Sequence[int]) -> tuple[int, int]:
    with _SERVER_LOCK:
        try:
            return _SERVER.connect_to_new_process(fds)
        except ConnectionError:
            # the server was killed and no longer listens, but has not exited yet; once it has, a
            # new one is started
            server = vars(_SERVER)["_forkserver_pid"]
            os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
            return _SERVER.connect_to_new_process(fds)


def _read_status(sentinel: int) -> int:
    """Read a child's exit code from the server.

    If the server was killed, the kernel has killed the child too.
    """
    try:
        return int(multiprocessing.forkserver.read_signed(sentinel))
    except (OSError, EOFError):
        return -signal.SIGKILL


class _Popen(multiprocessing.popen_forkserver.Popen):
    # with our fork server and without the main module's path
    _launch = _with_globals(
        multiprocessing.popen_forkserver.Popen._launch,  # type: ignore[attr-defined]
        multiprocessing.popen_forkserver,
        spawn=SimpleNamespace(get_preparation_data=_preparation_data),
        forkserver=SimpleNamespace(
            connect_to_new_process=_connect_to_new_process,
            read_signed=multiprocessing.forkserver.read_signed,
        ),
    )
    poll = _with_globals(
        multiprocessing.popen_forkserver.Popen.poll,
        multiprocessing.popen_forkserver,
        forkserver=SimpleNamespace(read_signed=_read_status),
    )


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: multiprocessing.process.BaseProcess) -> Any:  # noqa: N802
        return _Popen(process_obj)


class ChildContext(multiprocessing.context.ForkServerContext):
    """Starts children from the fork server of this module."""

    Process = _Process


def start_child(max_memory_mb: int) -> None:
    """Initialise this child process, with its data limited to `max_memory_mb`."""
    # The fork server exits once all copies of its parent's end of a pipe are closed. The child
    # closes the copy it inherits and has the kernel kill it when the server exits, so nothing
    # outlives a killed parent.
    server: Any = multiprocessing.forkserver._forkserver
    with contextlib.suppress(OSError):
        os.close(server._forkserver_alive_fd)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # a decoder that hangs in C never returns to a Python signal handler
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit = max_memory_mb * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # keeps start-up objects out of the collection after every video
    global _at_start
    _at_start = _data_bytes()


_at_start = 0


def _data_bytes() -> int:
    """The size that RLIMIT_DATA limits in this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def run_task(
    task: DecodeTask, source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> Outcome:
    """Run `task` on a video in this child; return its failure instead of raising it."""
    available = settings.max_memory_mb * 1024 * 1024 - _at_start
    if _data_bytes() - _at_start > available / 2:
        # earlier videos left so much behind that this one could fail: use a fresh child
        os._exit(SPENT)
    try:
        return _outcome_of(task, source, settings, specs)
    finally:
        # PyAV's containers and codecs form reference cycles, and eleven objects can keep 200 MB of
        # an 8K video's pictures alive: too few for Python to start a collection by itself
        gc.collect()


def _outcome_of(
    task: DecodeTask, source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> Outcome:
    name = storage.redact(source.uri)
    try:
        return task(source, settings, specs)
    except (VideoError, StorageError) as error:
        # their tracebacks would keep the decoder alive
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None)
    # FFmpeg reports "temporarily unavailable" if it cannot allocate a picture
    except (MemoryError, BlockingIOError):
        return VideoError(
            "out_of_memory",
            f"{name}: decoding needs more than decode.max_memory_mb = {settings.max_memory_mb}",
        )
    except Exception as error:  # noqa: BLE001 the boundary where a failure becomes a row
        return VideoError(
            "internal", f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
