"""The process of a command while Ray runs in it: its output and its signals."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator

from tsq_ray import log

_MAX_LINE_CHARS = 200


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM, by which Kubernetes and batch systems end a process, act like Ctrl-C.

    For the duration of the `with`, and only in the main thread, where Python handles signals.
    """
    with signal_handlers_kept():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Restore the handlers that ray.init replaces: with its own, SIGTERM aborts the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # else it was not set from Python
                signal.signal(number, handler)


@contextlib.contextmanager
def stdout_to_stderr(debug: bool) -> Iterator[None]:
    """Send what Ray prints about its nodes and workers to stderr: stdout is for the summary."""
    with contextlib.redirect_stdout(sys.stderr if debug else _FirstLines()):
        yield


class _FirstLines(io.TextIOBase):
    """Log the first line of each text: Ray adds 20 log lines to a report of a lost node."""

    def write(self, text: str) -> int:
        lines = text.strip().splitlines()
        if lines:
            log.say(lines[0][:_MAX_LINE_CHARS])
        return len(text)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Silence stderr during ray.init, where Ray's C++ core announces its log level.

    No error is lost: ray.init raises exceptions.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(devnull)
        os.close(kept)
