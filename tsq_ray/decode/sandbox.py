"""Decode in child processes that can be killed: a crash, a hang or a memory bomb costs one video.

The children come from a fork server private to this module, for two reasons. It imports the
decoders once, so that a killed child is replaced immediately. And it never runs the parent's main
module, as multiprocessing would in the server and in every child: a script without an `if __name__`
guard would start again, and a Ray worker would import ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.popen_forkserver
import multiprocessing.process
import multiprocessing.spawn
import os
import resource
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace, TracebackType
from typing import Any, Self

import pebble

from tsq_ray import storage
from tsq_ray.config import DecodeConfig
from tsq_ray.decode.types import DecodedVideo, FrameSpec, VideoSource
from tsq_ray.decode.video import decode_video
from tsq_ray.errors import StorageError, VideoError

Outcome = DecodedVideo | VideoError | StorageError
DecodeTask = Callable[[VideoSource, DecodeConfig, Mapping[str, FrameSpec]], DecodedVideo]

_PR_SET_PDEATHSIG = 1
_ATTEMPTS = 3
_SPENT = 75
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a child killed from outside: a failing decoder never sends itself these signals."""
_MAX_SOCKET_PATH = 107


def _listener_address(family: str) -> str:
    """Path of the fork server's Unix socket, short enough whatever TMPDIR is."""
    choose: Any = multiprocessing.connection.arbitrary_address  # type: ignore[attr-defined]
    address: str = choose(family)
    if len(os.fsencode(address)) <= _MAX_SOCKET_PATH:
        return address
    folder, name = os.path.split(address)
    # a short path to the same folder; only this process connects, and it keeps the folder open
    return f"/proc/self/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}/{name}"


def _ensure_running() -> FunctionType:
    # the standard library's ensure_running, but with a different socket path
    module = multiprocessing.forkserver
    standard: Any = module.ForkServer.ensure_running
    over = {"connection": SimpleNamespace(arbitrary_address=_listener_address)}
    return FunctionType(standard.__code__, {**vars(module), **over})


class _Server(multiprocessing.forkserver.ForkServer):
    ensure_running = _ensure_running()


_SERVER = _Server()
_SERVER.set_forkserver_preload([__name__])
_SERVER_LOCK = threading.Lock()


def _preparation_data(name: str) -> dict[str, Any]:
    data = multiprocessing.spawn.get_preparation_data(name)
    return {key: value for key, value in data.items() if not key.startswith("init_main")}


def _connect_to_new_process(fds: Sequence[int]) -> tuple[int, int]:
    with _SERVER_LOCK:
        return _SERVER.connect_to_new_process(fds)


def _launch() -> FunctionType:
    # the standard library's _launch, but with our fork server and without the main module's path
    inherited = multiprocessing.popen_forkserver
    over = {
        "spawn": SimpleNamespace(get_preparation_data=_preparation_data),
        "forkserver": SimpleNamespace(
            connect_to_new_process=_connect_to_new_process,
            read_signed=multiprocessing.forkserver.read_signed,
        ),
    }
    standard: Any = inherited.Popen._launch  # type: ignore[attr-defined]
    return FunctionType(standard.__code__, {**vars(inherited), **over})


class _Popen(multiprocessing.popen_forkserver.Popen):
    _launch = _launch()


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: multiprocessing.process.BaseProcess) -> Any:  # noqa: N802
        return _Popen(process_obj)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def _start_child(max_memory_mb: int) -> None:
    """Initialise a child process."""
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


def _run(
    task: DecodeTask, source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> Outcome:
    left = settings.max_memory_mb * 1024 * 1024 - _at_start
    if _data_bytes() - _at_start > left / 2:
        # earlier videos left so much behind that this one could fail: use a fresh child
        os._exit(_SPENT)
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
    # FFmpeg reports "temporarily unavailable" if it gets no memory for a picture
    except (MemoryError, BlockingIOError):
        return VideoError(
            "out_of_memory",
            f"{name}: decoding needs more than decode.max_memory_mb = {settings.max_memory_mb}",
        )
    except Exception as error:  # noqa: BLE001 the boundary where a failure becomes a row
        return VideoError(
            "internal", f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )


@dataclass(eq=False)
class _Video:
    """A submitted video without an outcome."""

    source: VideoSource
    outcome: Future[Outcome]
    attempts: int = _ATTEMPTS
    was_killed: bool = False


class DecodePool:
    """Child processes that decode, each with a time and a memory limit; a context manager.

    `task` replaces decode_video; the children must be able to import it by name.
    """

    def __init__(
        self,
        settings: DecodeConfig,
        specs: Mapping[str, FrameSpec],
        num_processes: int = 1,
        task: DecodeTask = decode_video,
    ) -> None:
        self.settings = settings
        self.specs = dict(specs)
        self._num_processes = num_processes
        self._task = task
        self._lock = threading.RLock()
        self._pool: pebble.ProcessPool | None = None
        self._running = 0
        self._waiting: set[Future[Outcome]] = set()
        self._second_tries: deque[_Video] = deque()
        self._second_pool: pebble.ProcessPool | None = None
        self._held: deque[_Video] = deque()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def decode(self, sources: Sequence[VideoSource]) -> list[Outcome]:
        """Return one outcome per source, in order; failures are returned, never raised."""
        return list(self.outcomes(sources, len(sources)))

    def outcomes(self, sources: Sequence[VideoSource], ahead: int) -> Iterator[Outcome]:
        """Yield the outcomes of `decode` in order, decoding at most `ahead` of them in advance."""
        left = iter(sources)
        submitted = deque(self.submit(source) for source in itertools.islice(left, max(1, ahead)))
        while submitted:
            outcome = submitted.popleft().result()
            submitted.extend(self.submit(source) for source in itertools.islice(left, 1))
            yield outcome

    def submit(self, source: VideoSource) -> Future[Outcome]:
        """Queue a video for decoding.

        The future's `result()` returns the DecodedVideo, or this video's VideoError or StorageError
        without raising it. The time limit starts when a child takes the video, not while it waits.
        """
        outcome: Future[Outcome] = Future()
        outcome.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise ValueError("this DecodePool is closed; create a new one")
            video = _Video(source, outcome)
            self._waiting.add(outcome)
            self._held.append(video)
            try:
                self._start_next()
            except BaseException:
                self._waiting.discard(outcome)
                if video in self._held:
                    self._held.remove(video)
                raise
        return outcome

    def _start_next(self) -> None:
        """Start every video that may start: second tries first, each of them alone.

        Raises RuntimeError or OSError if no child can be started.
        """
        if self._second_tries and not self._running and self._second_pool is None:
            # its own pool guarantees a fresh child, whatever the other pool's children did before
            self._second_pool = self._new_pool(1)
            self._schedule(self._second_tries.popleft(), self._second_pool)
        # each child has one video queued; the rest waits here, so that a second try does not have
        # to wait for it
        while self._held and self._running < 2 * self._num_processes:
            if self._second_tries or self._second_pool is not None:
                return
            pool = self._shared_pool()
            self._running += 1
            self._schedule(self._held.popleft(), pool)

    def _shared_pool(self) -> pebble.ProcessPool:
        if self._pool is not None and not self._pool.active:
            _stop_later(self._pool)
            self._pool = None
        if self._pool is None:
            self._pool = self._new_pool(self._num_processes)
        return self._pool

    def _new_pool(self, num_processes: int) -> pebble.ProcessPool:
        limit = self.settings.max_memory_mb
        pool = pebble.ProcessPool(num_processes, 0, _start_child, [limit], _Context())
        if not pool.active:  # reading `active` starts the children
            raise BrokenProcessPool("the decoder processes ended as soon as they were started")
        return pool

    def _schedule(self, video: _Video, pool: pebble.ProcessPool) -> None:
        arguments = [self._task, video.source, self.settings, self.specs]
        running: Future[Outcome]
        try:
            running = pool.schedule(_run, args=arguments, timeout=self.settings.timeout_s)
        except RuntimeError as error:  # the pool has just broken
            running = Future()
            running.set_exception(BrokenProcessPool(str(error)))
        running.add_done_callback(lambda finished: self._done(video, finished))

    def _done(self, video: _Video, finished: Future[Outcome]) -> None:
        answers: list[tuple[_Video, Outcome]] = []
        with self._lock:
            if self._closed:
                return
            if self._second_pool is None:
                self._running -= 1
            else:
                _stop_later(self._second_pool)
                self._second_pool = None
            if finished.cancelled() or not self._again(video, finished.exception()):
                answers.append((video, self._outcome(video, finished)))
            try:
                self._start_next()
            except Exception as error:  # noqa: BLE001  raised in pebble's thread, it would be lost
                message = f"cannot start a decoder process: {error.__cause__ or error}"
                queued = [*self._held, *self._second_tries]
                answers += [(other, VideoError("internal", message)) for other in queued]
                self._held.clear()
                self._second_tries.clear()
            self._waiting.difference_update(answered.outcome for answered, _ in answers)
        for answered, outcome in answers:
            answered.outcome.set_result(outcome)

    def _again(self, video: _Video, error: BaseException | None) -> bool:
        """Queue the video again if something else ended its child; return whether it was queued."""
        video.attempts -= 1
        if video.attempts and _is_not_the_videos_fault(error):
            # a child that dies between two videos breaks pebble's whole pool, with all its videos
            (self._second_tries if video.was_killed else self._held).appendleft(video)
            return True
        if not video.was_killed and _was_killed(error):
            # by the out-of-memory killer or by a user; if it happens again while the video runs
            # alone, the video itself needs too much memory
            video.was_killed, video.attempts = True, _ATTEMPTS
            self._second_tries.append(video)
            return True
        return False

    def _outcome(self, video: _Video, finished: Future[Outcome]) -> Outcome:
        name = storage.redact(video.source.uri)
        if finished.cancelled():
            return VideoError("internal", f"{name}: decoding was cancelled")
        error = finished.exception()
        if error is None:
            return finished.result()
        if isinstance(error, FutureTimeoutError):
            return VideoError(
                "timeout",
                f"{name}: not decoded within decode.timeout_s = {self.settings.timeout_s:g} s",
            )
        if isinstance(error, (pebble.ProcessExpired, BrokenProcessPool)):
            how = _how(getattr(error, "exitcode", None))
            alone = " twice, the second time as the only video in this worker"
            twice = alone if video.was_killed else ""
            return VideoError("decoder_crash", f"{name}: the decoder process died{twice} ({how})")
        return VideoError(
            "internal", f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )

    def close(self) -> None:
        """Kill running decodes and end the children; unfinished videos fail with `internal`."""
        with self._lock:
            self._closed = True
            pools = [pool for pool in (self._pool, self._second_pool) if pool is not None]
            self._pool = self._second_pool = None
            waiting, self._waiting = self._waiting, set()
            self._second_tries.clear()
            self._held.clear()
        for outcome in waiting:
            outcome.set_result(
                VideoError("internal", "the decoder pool was closed before this video was done")
            )
        for pool in pools:
            _stop(pool)


def _was_killed(error: BaseException | None) -> bool:
    return isinstance(error, pebble.ProcessExpired) and error.exitcode in _KILLED


def _is_not_the_videos_fault(error: BaseException | None) -> bool:
    return isinstance(error, BrokenProcessPool) or (
        isinstance(error, pebble.ProcessExpired) and error.exitcode == _SPENT
    )


def _stop(pool: pebble.ProcessPool) -> None:
    pool.stop()
    pool.join()


def _stop_later(pool: pebble.ProcessPool) -> None:
    # in another thread: the pool's own thread calls this, and it cannot wait for itself
    threading.Thread(target=_stop, args=[pool], daemon=True).start()


def _how(code: int | None) -> str:
    if code is None:
        return "cause unknown"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps the system's out-of-memory killer" if code == -signal.SIGKILL else name
