"""Peak memory of a process."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path


class Memory:
    """Peak of this process's anonymous memory in MiB, sampled twenty times a second.

    Excludes mapped library files and Ray's shared object store.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.now()
            time.sleep(0.05)

    def now(self) -> float:
        """Return the current value."""
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        size = int(found.group(1)) / 1024
        self.peak = max(self.peak, size)
        return size
