"""Clusters of several nodes on this machine, and an archive whose every video takes its time, whatever the machine does."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster_case import SETTINGS, short_folder
from video_case import write_video

from tsq_ray.manifest import Manifest, VideoRef, VideoRows, video_id, write_manifest

SLOW_SETTINGS = f"{SETTINGS}\n".replace("workers = 1\n", "")


@dataclass
class SlowStore:
    """An HTTP server that thinks for `seconds` before it gives a video for the first time."""

    seconds: float
    content: bytes
    begun: dict[str, float] = field(default_factory=dict)
    """Path -> when it was first asked for."""
    endpoint: str = ""

    def rate(self, first: float, last: float) -> float:
        """Videos a second that were begun in this time."""
        return sum(first <= moment < last for moment in self.begun.values()) / (last - first)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: SlowStore

    def log_message(self, *_: Any) -> None:
        """Quiet."""

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
        self._head(206, len(piece), [("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(content)}")])
        self.wfile.write(piece)

    def _head(self, status: int, size: int, more: Any) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(size)), ("Accept-Ranges", "bytes"), *more):
            self.send_header(name, value)
        self.end_headers()


@contextlib.contextmanager
def running_store(folder: Path, seconds: float) -> Iterator[SlowStore]:
    """The server for the time of the `with`."""
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
def nodes(*cpus: float) -> Iterator[Any]:
    """A Ray cluster whose head and further nodes have these CPUs."""
    from ray.cluster_utils import Cluster

    with short_folder() as folder:
        options = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        cluster = Cluster(initialize_head=True, connect=False, head_node_args={**options, "num_cpus": cpus[0], "temp_dir": str(folder)})
        try:
            for count in cpus[1:]:
                cluster.add_node(num_cpus=count, object_store_memory=100 * 2**20)
            yield cluster
        finally:
            cluster.shutdown()
