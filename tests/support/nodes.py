"""Clusters of several nodes on this machine, and an archive with a fixed time per video."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jobs.benchmarks.support.s3 import free_ports
from support.cluster import MARK, SETTINGS, end_marked, short_folder
from support.video import write_video
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, video_id, write_manifest

SLOW_SETTINGS = f"{SETTINGS}\n".replace("workers = 1\n", "")


@dataclass
class SlowStore:
    """An HTTP server that waits `seconds` before it first returns a video."""

    seconds: float
    content: bytes
    begun: dict[str, float] = field(default_factory=dict)
    """Path -> time of its first request."""
    endpoint: str = ""

    def rate(self, first: float, last: float) -> float:
        """Videos per second that were begun in this time."""
        return sum(first <= moment < last for moment in self.begun.values()) / (last - first)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: SlowStore

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._head(200, len(self.store.content), ())

    def do_GET(self) -> None:
        if self.path not in self.store.begun:
            self.store.begun[self.path] = time.monotonic()
            time.sleep(self.store.seconds)
        content = self.store.content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._head(200, len(content), ())
            self.wfile.write(content)
            return
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        piece = content[start:stop]
        self._head(
            206,
            len(piece),
            [("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(content)}")],
        )
        self.wfile.write(piece)

    def _head(self, status: int, size: int, more: Any) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(size)), ("Accept-Ranges", "bytes"), *more):
            self.send_header(name, value)
        self.end_headers()


@contextlib.contextmanager
def running_store(folder: Path, seconds: float) -> Iterator[SlowStore]:
    """Run the server for the `with` block."""
    path = folder / "slow.mp4"
    write_video(path, num_frames=12)
    store = SlowStore(seconds, path.read_bytes())
    handler = type("Handler", (_Handler,), {"store": store})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        store.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield store
        server.shutdown()


def slow_manifest(store: SlowStore, folder: Path, count: int, name: str = "slow") -> str:
    """A manifest of `count` videos of the store."""
    uris = [f"{store.endpoint}/{name}/{number:05d}.mp4" for number in range(count)]
    rows = VideoRows.of(VideoRef(video_id(uri), uri, len(store.content)) for uri in uris)
    uri = str(folder / f"{name}.parquet")
    write_manifest(Manifest(rows, [], name, (store.endpoint,)), uri)
    return uri


@contextlib.contextmanager
def nodes(*cpus: float, labels: Sequence[Mapping[str, str]] = ()) -> Iterator[Any]:
    """A Ray cluster whose head and further nodes have these CPUs, and the latter these labels."""
    from ray.cluster_utils import Cluster

    with short_folder() as folder:
        options = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        cluster = Cluster(
            initialize_head=True,
            connect=False,
            head_node_args={**options, "num_cpus": cpus[0], "temp_dir": str(folder)},
        )
        try:
            for number, count in enumerate(cpus[1:]):
                more = {"labels": dict(labels[number])} if labels else {}
                cluster.add_node(num_cpus=count, object_store_memory=100 * 2**20, **more)
            yield cluster
        finally:
            cluster.shutdown()


_EMPTY_LISTS = (
    *(
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
        "initialization_commands",
        "setup_commands",
    ),
    *(
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ),
)
"""What Ray's autoscaler expects in its configuration."""


@contextlib.contextmanager
def autoscaling(
    types: dict[str, tuple[dict[str, float], int]], labels: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """A head without CPUs and Ray's fake autoscaler, which starts nodes as processes.

    Node types: name -> (resources, maximum count); `labels`: name -> labels of its nodes. Yields
    the address.
    """
    (port,) = free_ports(1, below=10000)
    address = f"127.0.0.1:{port}"
    with short_folder() as folder:
        kinds: dict[str, Any] = {
            name: {
                "resources": {"memory": 4 * 2**30, "object_store_memory": 100 * 2**20, **resources},
                "node_config": {},
                "labels": dict(labels.get(name, {})),
                "min_workers": 0,
                "max_workers": most,
            }
            for name, (resources, most) in types.items()
        }
        kinds["ray.head.default"] = {"resources": {}, "node_config": {}, "max_workers": 0}
        provider = {
            "type": "external",
            "module": "support.fake_nodes.NodesWithMemory",
            "gcs_address": address,
            "launch_multiple": True,
        }
        flags = (
            "use_node_id_as_ip",
            "disable_node_updaters",
            "disable_launch_config_check",
            "foreground_node_launch",
        )
        config = {
            "cluster_name": "fake",
            "max_workers": sum(most for _, most in types.values()),
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": 5,
            "provider": provider | dict.fromkeys(flags, True),
            "available_node_types": kinds,
            "head_node_type": "ray.head.default",
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in _EMPTY_LISTS},
            "file_mounts_sync_continuously": False,
        }
        file = folder / "autoscaling.json"
        file.write_text(json.dumps(config))
        mark = os.urandom(8).hex()
        environment = {
            **os.environ,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            # the other version needs a file that Ray's wheels leave out
            "RAY_enable_autoscaler_v2": "0",
            "RAY_AUTH_MODE": "disabled",
            MARK: mark,
        }
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            f"--port={port}",
            f"--autoscaling-config={file}",
        ]
        command += [
            "--node-ip-address=127.0.0.1",
            "--num-cpus=0",
            "--num-gpus=0",
            "--object-store-memory=104857600",
        ]
        command += ["--include-dashboard=false", f"--temp-dir={folder}"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        try:
            yield address
        finally:
            end_marked(mark, 0.0)
