"""Warm processes that run rounds of work when asked (jobs/benchmarks/sides.py)."""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SIDES = Path(__file__).resolve().parents[1] / "sides.py"
_CLOSE_TIMEOUT_S = 20.0
_INSTALL = {
    "daft": (
        "not installed: python -m venv DIR && DIR/bin/pip install daft av pillow numpy, "
        "then --daft-python DIR/bin/python"
    ),
    "read_videos": "not installed: pip install 'ray[data]' decord2",
}


class _Warm:
    """A process that answers each line on its input with one line of JSON."""

    def __init__(self, python: str, name: str, job: dict[str, Any], patience_s: float) -> None:
        self.patience_s, self.trouble = patience_s, ""
        self.process = subprocess.Popen(
            [python, str(_SIDES), name, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.first = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], self.patience_s)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.trouble = (
                "ended with an error" if ready else f"hung: no answer in {self.patience_s:g} s"
            )
        return json.loads(line) if line else {}

    def run_round(self) -> dict[str, Any]:
        """Run a round and return its answer; empty if the process is in trouble."""
        if self.trouble:
            return {}
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process by closing its input, or kill it if it hangs."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Side(_Warm):
    """Decodes all videos in a round, by this package or by a peer."""

    def __init__(
        self, name: str, options: argparse.Namespace, paths: Sequence[Path], workers: int
    ) -> None:
        python = options.daft_python if name == "daft" else sys.executable
        job = {
            "paths": [str(path) for path in paths],
            "frames": options.frames,
            "size": options.size,
            "workers": workers,
        }
        super().__init__(python, name, job, options.patience)
        self.name, self.rounds, self.frames = name, list[float](), 0
        self.start = self.first.get("seconds", 0.0)
        if "missing" in self.first:
            self.trouble = f"{_INSTALL.get(name, '')} ({self.first['missing']})"

    def round(self) -> None:
        """Decode all videos once."""
        if answer := self.run_round():
            self.rounds.append(answer["seconds"])
            self.frames = answer["frames"]


class CpuSide(_Warm):
    """Decodes all videos in a round, with one checkout of this package."""

    def __init__(self, job: dict[str, Any], patience_s: float) -> None:
        super().__init__(sys.executable, "cpu", job, patience_s)

    def round(self) -> list[float]:
        """Return the CPU seconds of each video. Raises RuntimeError if the process is in
        trouble."""
        answer = self.run_round()
        if self.trouble:
            raise RuntimeError(f"the process of a checkout {self.trouble}")
        return answer["frames"]
