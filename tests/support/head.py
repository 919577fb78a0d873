"""A head node that takes jobs, and further nodes, as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jobs.benchmarks.support.s3 import free_ports
from support.cluster import MARK, end_marked, short_folder

RAY = str(Path(sys.executable).with_name("ray"))
_START_S = 120.0
_OBJECT_STORE = f"--object-store-memory={256 * 2**20}"


@dataclass(frozen=True)
class JoinedNode:
    """A node besides the head, with temporary files of its own."""

    mark: str
    folder: Path
    """Its TMPDIR."""
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """Take the node away without notice, with all its processes."""
        self.process.kill()
        self.process.wait()
        end_marked(self.mark, patience_s=0)


@dataclass
class Head:
    """A head node: its dashboard's URL, and the environment of its clients."""

    url: str
    address: str
    environment: dict[str, str]
    folder: Path
    nodes: list[JoinedNode] = field(default_factory=list)

    def add_node(self, cpus: int, host: str = "127.0.0.1") -> JoinedNode:
        """Start a node and wait until it has joined; `host` is its address.

        Ray gives a node 30 s to join, which it may miss on a busy machine.
        """
        for _ in range(3):
            node = self._start_node(cpus, host)
            self.nodes.append(node)
            while node.process.poll() is None:
                if b"Ray runtime started" in (node.folder / "log").read_bytes():
                    return node
                time.sleep(0.1)
            node.kill()
        raise AssertionError((node.folder / "log").read_text()[-2000:])

    def _start_node(self, cpus: int, host: str) -> JoinedNode:
        mark = uuid.uuid4().hex
        folder = self.folder / f"disk{len(self.nodes)}"
        folder.mkdir()
        environment = self.environment | {MARK: mark, "TMPDIR": str(folder)}
        command = [RAY, "start", f"--address={self.address}", "--block", f"--num-cpus={cpus}"]
        command += [f"--node-ip-address={host}", "--disable-usage-stats", _OBJECT_STORE]
        return JoinedNode(mark, folder, _started(command, environment, folder / "log"))


def _started(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )


@contextlib.contextmanager
def running_head(folder: Path, cpus: int, home: Path | None = None) -> Iterator[Head]:
    """Run `ray start --head` in the foreground, with its own ports, folder and token.

    The token is in the environment; with `home`, only in the file there where Ray looks for it.
    """
    names = (
        "port",
        "dashboard-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
        "ray-client-server-port",
    )
    ports = dict(zip(names, free_ports(len(names), below=10000), strict=True))
    mark, token, log = uuid.uuid4().hex, secrets.token_hex(32), folder / "log"
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    if home is not None:
        own = {"HOME": str(home)}
    # a Ray instance that this process started has left its token's mode in the environment
    of_ray = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    rest = {name: value for name, value in os.environ.items() if name not in of_ray}
    environment = rest | own | {MARK: mark}
    if home is not None:
        home.mkdir()
        make = [RAY, "get-auth-token", "--generate"]
        subprocess.run(make, env=environment, check=True, capture_output=True)
        token = (home / ".ray" / "auth_token").read_text()
    with short_folder() as temporary:
        command = [RAY, "start", "--head", "--block", f"--num-cpus={cpus}", _OBJECT_STORE]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--temp-dir={temporary}", "--disable-usage-stats"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        process = _started(command, environment, log)
        url = f"http://127.0.0.1:{ports['dashboard-port']}"
        head = Head(url, f"127.0.0.1:{ports['port']}", environment, folder)
        try:
            headers = {"Authorization": f"Bearer {token}"}
            agent = f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}"  # which starts jobs
            for address in (f"{url}/api/version", f"{agent}/api/local_raylet_healthz"):
                wait_for(urllib.request.Request(address, headers=headers), process, log)
            yield head
        finally:
            for node in head.nodes:
                node.kill()
            process.kill()
            process.wait()
            end_marked(mark, patience_s=0)


def wait_for(request: urllib.request.Request, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the request is answered."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, (
                f"no dashboard after {_START_S:g} s: {log.read_text()[-2000:]}"
            )
            time.sleep(0.5)
