"""Decoding in child processes that can be killed: a crash, a hang or a memory bomb costs one video.

The children come from a fork server of this module's own, for two reasons: it imports the decoders once, so that a child
that was killed is replaced at once, and it never runs the parent's main module (multiprocessing would, in the server and
in every child: a script without an `if __name__` guard would start again, a Ray worker would import ray).
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
from typing import Any, Self, cast

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
"""Exit codes of a child that somebody else ended: no failing decoder sends itself these."""
_MAX_SOCKET_PATH = 107


def _listener_address(family: str) -> str:
    """Path of the fork server's Unix socket, short enough whatever TMPDIR is."""
    choose: Any = multiprocessing.connection.arbitrary_address  # type: ignore[attr-defined]
    address: str = choose(family)
    if len(os.fsencode(address)) <= _MAX_SOCKET_PATH:
        return address
    folder, name = os.path.split(address)
    # the same folder by a short path; only this process connects, and it keeps the folder open
    return f"/proc/self/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}/{name}"


def _ensure_running() -> FunctionType:
    # the standard library's own ensure_running, with another choice of the socket's path
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
    # the standard library's own _launch, over another fork server and without the main module's path
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
    """Runs first in every child."""
    # the fork server ends when its parent's end of a pipe closes; a child holds that end too, and the kernel kills the
    # child with the server: so nothing outlives a parent that was killed
    with contextlib.suppress(OSError):
        os.close(cast(int, multiprocessing.forkserver._forkserver._forkserver_alive_fd))  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # a decoder that hangs in C never returns to a handler written in Python
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit = max_memory_mb * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # what is there from the start need not be looked through after every video
    global _at_start
    _at_start = _data_bytes()


_at_start = 0


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def _run(
    task: DecodeTask, source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> Outcome:
    left = settings.max_memory_mb * 1024 * 1024 - _at_start
    if _data_bytes() - _at_start > left / 2:
        os._exit(
            _SPENT
        )  # earlier videos left so much behind that this one would pay for it: it gets a fresh child
    try:
        return _outcome_of(task, source, settings, specs)
    finally:
        # PyAV's containers and codecs stand in reference cycles, and 200 MB of pictures of an 8K video hang on eleven objects:
        # too few for Python to collect them by itself
        gc.collect()


def _outcome_of(
    task: DecodeTask, source: VideoSource, settings: DecodeConfig, specs: Mapping[str, FrameSpec]
) -> Outcome:
    name = storage.redact(source.uri)
    try:
        return task(source, settings, specs)
    except (VideoError, StorageError) as error:
        error.__context__ = error.__cause__ = (
            None  # with their tracebacks they would keep the decoder alive
        )
        return error.with_traceback(None)
    except (
        MemoryError,
        BlockingIOError,
    ):  # FFmpeg says "temporarily unavailable" where it got no memory for a picture
        return VideoError(
            "out_of_memory",
            f"{name}: decoding takes more than decode.max_memory_mb = {settings.max_memory_mb}",
        )
    except Exception as error:  # noqa: BLE001 the border at which a failure becomes a row
        return VideoError(
            "internal", f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )


@dataclass(eq=False)
class _Video:
    """A video that was submitted and has no outcome yet."""

    source: VideoSource
    outcome: Future[Outcome]
    attempts: int = _ATTEMPTS
    was_killed: bool = False


class DecodePool:
    """Children that decode, each under a time and a memory limit; a context manager.

    `task` stands in for decode_video: a function that the children can import by its name.
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
        """One outcome a source, in the same order; a video's failure is its outcome, never raised."""
        return list(self.outcomes(sources, len(sources)))

    def outcomes(self, sources: Sequence[VideoSource], ahead: int) -> Iterator[Outcome]:
        """As `decode`, one after another; at most `ahead` of them are decoded before they are asked for."""
        left = iter(sources)
        submitted = deque(self.submit(source) for source in itertools.islice(left, max(1, ahead)))
        while submitted:
            outcome = submitted.popleft().result()
            submitted.extend(self.submit(source) for source in itertools.islice(left, 1))
            yield outcome

    def submit(self, source: VideoSource) -> Future[Outcome]:
        """`result()` gives the DecodedVideo, or the VideoError or StorageError of this video, and does not raise it.

        The time limit runs from the moment a child takes the video, not while it waits.
        """
        outcome: Future[Outcome] = Future()
        outcome.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise ValueError("this DecodePool is closed; make a new one")
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
        """Start what may start now: second tries first, each of them alone.

        RuntimeError or OSError where no child can be started.
        """
        if self._second_tries and not self._running and self._second_pool is None:
            # a pool of its own: a fresh child, whatever the other pool's children did before
            self._second_pool = self._new_pool(1)
            self._schedule(self._second_tries.popleft(), self._second_pool)
        # each child has its next video at hand; the rest waits here, so that a second try need
        # not wait for it
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
        if not pool.active:  # the question starts the children
            raise BrokenProcessPool("the decoder's processes ended as soon as they were started")
        return pool

    def _schedule(self, video: _Video, pool: pebble.ProcessPool) -> None:
        arguments = [self._task, video.source, self.settings, self.specs]
        running: Future[Outcome]
        try:
            running = pool.schedule(_run, args=arguments, timeout=self.settings.timeout_s)
        except RuntimeError as error:  # it broke a moment ago
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
            except Exception as error:  # noqa: BLE001  this is a thread of pebble's: nobody would see it
                message = f"no decoder process can be started: {error.__cause__ or error}"
                queued = [*self._held, *self._second_tries]
                answers += [(other, VideoError("internal", message)) for other in queued]
                self._held.clear()
                self._second_tries.clear()
            self._waiting.difference_update(answered.outcome for answered, _ in answers)
        for answered, outcome in answers:
            answered.outcome.set_result(outcome)

    def _again(self, video: _Video, error: BaseException | None) -> bool:
        """Queue the video once more if it was not the video that ended its child."""
        video.attempts -= 1
        if video.attempts and _is_not_the_videos_fault(error):
            # a child that dies between two videos breaks pebble's whole pool: all its videos return
            (self._second_tries if video.was_killed else self._held).appendleft(video)
            return True
        if not video.was_killed and _was_killed(error):
            # by the out-of-memory killer or by somebody; if it happens again with nothing beside
            # it, then it is the video that takes so much
            video.was_killed, video.attempts = True, _ATTEMPTS
            self._second_tries.append(video)
            return True
        return False

    def _outcome(self, video: _Video, finished: Future[Outcome]) -> Outcome:
        name = storage.redact(video.source.uri)
        if finished.cancelled():
            return VideoError("internal", f"{name}: its decoding was cancelled")
        error = finished.exception()
        if error is None:
            return finished.result()
        if isinstance(error, FutureTimeoutError):
            return VideoError(
                "timeout",
                f"{name}: not done after decode.timeout_s = {self.settings.timeout_s:g} s",
            )
        if isinstance(error, (pebble.ProcessExpired, BrokenProcessPool)):
            how = _how(getattr(error, "exitcode", None))
            alone = " twice, the second time with no other video beside it in this worker"
            twice = alone if video.was_killed else ""
            return VideoError("decoder_crash", f"{name}: the decoder process died{twice} ({how})")
        return VideoError(
            "internal", f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )

    def close(self) -> None:
        """Kill what still runs and end the children; videos not done get the outcome `internal`."""
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
    # not here: a pool's own thread calls this, and it cannot wait for itself
    threading.Thread(target=_stop, args=[pool], daemon=True).start()


def _how(code: int | None) -> str:
    if code is None:
        return "cause unknown"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps the system's out-of-memory killer" if code == -signal.SIGKILL else name
