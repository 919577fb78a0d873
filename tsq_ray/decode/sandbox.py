"""Decode in child processes that can be killed: a crash, hang or memory bomb costs one video."""

from __future__ import annotations

import itertools
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import pebble

from tsq_ray import storage
from tsq_ray.config import DecodeConfig
from tsq_ray.decode.child import SPENT, ChildContext, DecodeTask, run_task, start_child
from tsq_ray.decode.types import FrameSpec, Outcome, VideoSource
from tsq_ray.decode.video import decode_video
from tsq_ray.errors import DecoderKilled, VideoError

_ATTEMPTS = 3
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a child killed from outside: a failing decoder never sends itself these signals."""


@dataclass(eq=False)
class _Video:
    """A submitted video that has no outcome yet."""

    source: VideoSource
    outcome: Future[Outcome]
    attempts: int = _ATTEMPTS
    was_killed: bool = False
    running: Future[Outcome] | None = None
    """The decode in a child; None while the video waits for one."""


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
        self._waiting: dict[Future[Outcome], _Video] = {}
        self._second_tries: deque[_Video] = deque()
        self._second_pool: pebble.ProcessPool | None = None
        self._queued: deque[_Video] = deque()
        self._closed = False
        self.children_lost = 0
        """Children that died or were killed while they decoded."""

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
            self._waiting[outcome] = video
            self._queued.append(video)
            try:
                self._start_next()
            except BaseException:
                self._waiting.pop(outcome, None)
                if video in self._queued:
                    self._queued.remove(video)
                raise
        return outcome

    def cancel(self, outcome: Future[Outcome]) -> None:
        """Make a submitted video fail, and kill the child that decodes it."""
        with self._lock:
            video = self._waiting.get(outcome)
            if video is None:
                return
            for queue in (self._queued, self._second_tries):
                if video in queue:
                    queue.remove(video)
                    del self._waiting[outcome]
                    outcome.set_result(_cancelled(video))
                    return
            running = video.running
        if running is not None:
            running.cancel()

    def _start_next(self) -> None:
        """Start every video that may start: second tries first, each of them alone.

        Raises RuntimeError or OSError if no child can be started.
        """
        if self._second_tries and not self._running and self._second_pool is None:
            # its own pool guarantees a fresh child, whatever the other pool's children did before
            self._second_pool = self._new_pool(1)
            self._schedule(self._second_tries.popleft(), self._second_pool)
        # each child has one video queued; the others wait here, so that a second try does not have
        # to wait for them
        while self._queued and self._running < 2 * self._num_processes:
            if self._second_tries or self._second_pool is not None:
                return
            pool = self._shared_pool()
            self._running += 1
            self._schedule(self._queued.popleft(), pool)

    def _shared_pool(self) -> pebble.ProcessPool:
        if self._pool is not None and not self._pool.active:
            _stop_later(self._pool)
            self._pool = None
        if self._pool is None:
            self._pool = self._new_pool(self._num_processes)
        return self._pool

    def _new_pool(self, num_processes: int) -> pebble.ProcessPool:
        limit = self.settings.max_memory_mb
        pool = pebble.ProcessPool(num_processes, 0, start_child, [limit], ChildContext())
        if not pool.active:  # reading `active` starts the children
            raise BrokenProcessPool("the decoder processes exited as soon as they were started")
        return pool

    def _schedule(self, video: _Video, pool: pebble.ProcessPool) -> None:
        arguments = [self._task, video.source, self.settings, self.specs]
        running: Future[Outcome]
        try:
            running = pool.schedule(run_task, args=arguments, timeout=self.settings.timeout_s)
        except RuntimeError as error:  # the pool has just broken
            running = Future()
            running.set_exception(BrokenProcessPool(str(error)))
        video.running = running
        running.add_done_callback(lambda finished: self._on_done(video, finished))

    def _on_done(self, video: _Video, finished: Future[Outcome]) -> None:
        answers: list[tuple[_Video, Outcome]] = []
        with self._lock:
            if self._closed:
                return
            self.children_lost += finished.cancelled() or finished.exception() is not None
            if self._second_pool is None:
                self._running -= 1
            else:
                _stop_later(self._second_pool)
                self._second_pool = None
            if finished.cancelled() or not self._retry(video, finished.exception()):
                answers.append((video, self._outcome(video, finished)))
            try:
                self._start_next()
            except Exception as error:  # noqa: BLE001  raised in pebble's thread, it would be lost
                message = f"cannot start a decoder process: {error.__cause__ or error}"
                queued = [*self._queued, *self._second_tries]
                answers += [(other, VideoError("internal", message)) for other in queued]
                self._queued.clear()
                self._second_tries.clear()
            for answered, _ in answers:
                self._waiting.pop(answered.outcome, None)
        for answered, outcome in answers:
            answered.outcome.set_result(outcome)

    def _retry(self, video: _Video, error: BaseException | None) -> bool:
        """Queue the video again if something else ended its child; return whether it was queued."""
        video.attempts -= 1
        if video.attempts and _is_not_the_videos_fault(error):
            # a child that dies between two videos breaks pebble's whole pool, with all its videos
            (self._second_tries if video.was_killed else self._queued).appendleft(video)
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
            return _cancelled(video)
        error = finished.exception()
        if error is None:
            return finished.result()
        if isinstance(error, FutureTimeoutError):
            return VideoError(
                "timeout",
                f"{name}: not decoded within decode.timeout_s = {self.settings.timeout_s:g} s",
            )
        if isinstance(error, (pebble.ProcessExpired, BrokenProcessPool)):
            cause = _describe_exit(getattr(error, "exitcode", None))
            alone = " twice, the second time as the only video in this worker"
            twice = alone if video.was_killed else ""
            outside = _was_killed(error) or _is_not_the_videos_fault(error)
            kind = DecoderKilled if outside else VideoError
            return kind("decoder_crash", f"{name}: the decoder process died{twice} ({cause})")
        return VideoError(
            "internal", f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )

    def close(self) -> None:
        """Kill running decodes and end the children; unfinished videos fail with `internal`."""
        with self._lock:
            self._closed = True
            pools = [pool for pool in (self._pool, self._second_pool) if pool is not None]
            self._pool = self._second_pool = None
            waiting, self._waiting = self._waiting, {}
            self._second_tries.clear()
            self._queued.clear()
        for outcome in waiting:
            outcome.set_result(
                VideoError("internal", "the decoder pool was closed before this video was done")
            )
        for pool in pools:
            _stop(pool)


def _cancelled(video: _Video) -> VideoError:
    return VideoError("internal", f"{storage.redact(video.source.uri)}: decoding was cancelled")


def _was_killed(error: BaseException | None) -> bool:
    return isinstance(error, pebble.ProcessExpired) and error.exitcode in _KILLED


def _is_not_the_videos_fault(error: BaseException | None) -> bool:
    return isinstance(error, BrokenProcessPool) or (
        isinstance(error, pebble.ProcessExpired) and error.exitcode == SPENT
    )


def _stop(pool: pebble.ProcessPool) -> None:
    pool.stop()
    pool.join()


def _stop_later(pool: pebble.ProcessPool) -> None:
    # in another thread: the pool's own thread calls this, and it cannot wait for itself
    threading.Thread(target=_stop, args=[pool], daemon=True).start()


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "cause unknown"
    if code >= 0:
        return f"exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-code, f"signal {-code}")
    return f"{name}, perhaps the system's out-of-memory killer" if code == -signal.SIGKILL else name
