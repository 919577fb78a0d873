"""The cores of a node, taken in turn by the networks of all replicas on it.

Without turns, sampler and recogniser would each run a pass per core, and passes that compete for a
core evict each other's data from its caches.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_LOOK_EVERY_S = 0.002


class Cores:
    """At most `count` holders at a time, in all processes that share `folder`.

    A core is a locked file, so that the kernel frees it with its process, however that ends.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.count = count
        folder.mkdir(parents=True, exist_ok=True)
        self._line = folder / "line"
        self._cores = [folder / f"core{number}" for number in range(count)]

    @classmethod
    def of_this_node(cls) -> Cores:
        """Return the cores of the Ray node that this process is on."""
        from ray._private.worker import _global_node

        assert _global_node is not None, "a process that Ray started has a node"
        return cls(Path(_global_node.get_session_dir_path(), "tsq-cores"), _node_cpus())

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Wait for a core and hold it for the duration of the `with`."""
        with contextlib.ExitStack() as held:
            with _opened(self._line) as line:
                fcntl.flock(line, fcntl.LOCK_EX)  # only the first in line looks for a free core
                while not any(self._takes(core, held) for core in self._cores):
                    time.sleep(_LOOK_EVERY_S)
            yield

    @staticmethod
    def _takes(core: Path, held: contextlib.ExitStack) -> bool:
        with contextlib.ExitStack() as trying:
            file = trying.enter_context(_opened(core))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            held.push(trying.pop_all())
            return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    # opened for each turn: a lock belongs to an open file, which threads would share
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def _node_cpus() -> int:
    import ray

    # in a container os.cpu_count() may be too high; Ray knows the actual number
    here, there = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here]
    return max(1, min([there, *(count for count in cpus if count)]))
