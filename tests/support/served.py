"""The endpoint that the tests of requests, of batches and of its end share."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from jobs.benchmarks.support.s3 import S3Server
from support.archive import make_archive
from support.bundle import make_bundle
from support.endpoint import TOKEN, Endpoint, serving

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MAX_UPLOAD_BYTES = 2**20
DRAIN_S = 60
SLOW_S = 8


class Listener(http.server.BaseHTTPRequestHandler):
    """Records the calls, of which it refuses the first; sends a video slowly."""

    calls: ClassVar[list[tuple[dict[str, str], bytes]]] = []
    video = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.video)))
        self.end_headers()
        size = len(self.video) // SLOW_S + 1
        with contextlib.suppress(OSError):  # the client has gone away
            for start in range(0, len(self.video), size):
                self.wfile.write(self.video[start : start + size])
                time.sleep(1)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.calls.append((dict(self.headers), body))
        self.send_response(204 if len(self.calls) > 1 else 500)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class Served:
    """An endpoint with a token and small uploads, started when a test first asks for it.

    It may read one archive in part, for single requests, and another one whole, for batches; it
    may call and fetch from a Listener on loopback. Its sampler may scale.
    """

    def __init__(self, folder: Path, s3: S3Server, listener: str) -> None:
        self.folder, self.s3, self.listener = folder, s3, listener
        self.archive = make_archive(folder / "served" / "videos")
        self.batched = make_archive(folder / "batched" / "videos")
        self.bundle = make_bundle(folder / "bundle")
        self.slow_video = f"{listener}/slow"
        """The folder of a video that takes SLOW_S seconds to fetch."""
        self.manifests = folder / "manifests"
        self._stack = contextlib.ExitStack()
        self._endpoint: Endpoint | None = None
        self._started = 0

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint, started again if a test has ended it."""
        if self._endpoint is None:
            self._started += 1
            run = self.folder / f"run{self._started}"
            made = serving(
                self.bundle, run, *self._settings(run), token=TOKEN, **self._environment()
            )
            self._endpoint = self._stack.enter_context(made)
        return self._endpoint

    def _settings(self, run: Path) -> tuple[str, ...]:
        prefixes = [str(self.archive.root / "train"), "s3://tsq-other/open"]
        prefixes += [str(self.batched.root), str(self.manifests), self.slow_video]
        return (
            f"serve.allowed_uri_prefixes={json.dumps(prefixes)}",
            f"serve.max_upload_mb={MAX_UPLOAD_BYTES / 2**20}",
            f"serve.batches_uri={run}/batches",
            "serve.sampler.max_replicas=2",
            "serve.recognizer.max_replicas=3",
            "serve.fetch_timeout_s=3",
            f'serve.webhook_prefixes=["{self.listener}"]',
            f"serve.drain_s={DRAIN_S}",
            "output.rows_per_file=4",
        )

    def _environment(self) -> dict[str, str]:
        return {**self.s3.environment, "TSQ_WEBHOOK_SECRET": SECRET}

    def close(self) -> None:
        """Leave no process of the endpoint behind; the next test starts another one."""
        self._endpoint = None
        self._stack.close()


@contextlib.contextmanager
def running_listener() -> Iterator[str]:
    """Run a Listener for the `with` block, at this URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
