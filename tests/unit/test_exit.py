"""How a command ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsq_ray import schema
from tsq_ray.config import Config
from tsq_ray.manifest import Manifest, VideoRef, read_manifest, write_manifest
from tsq_ray.runs.bulk import BulkRun, Selection
from tsq_ray.runs.identity import Identity

THREADS = """
    import os, sys
    import tsq_ray.describe, tsq_ray.runs.verify
    from tsq_ray.cli import main

    before = set(os.listdir("/proc/self/task"))
    code = main(sys.argv[1:])
    started = set(os.listdir("/proc/self/task")) - before
    sys.exit(code or (f"{len(started)} threads are left" if started else 0))
"""


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """The command lines that read Parquet and end."""
    video = VideoRef("0" * 16, "/videos/0.mp4", 10, labels=(0,), split="train")
    manifest, features = str(tmp_path / "manifest.parquet"), str(tmp_path / "features")
    write_manifest(Manifest([video], ["cats"], id="source"), manifest)
    read = read_manifest(manifest)
    row: dict[str, Any] = {**vars(video), "labels": [0], "warnings": [], "status": "ok"}
    row |= {"frame_index": np.arange(2), "frame_pts_s": np.arange(2), "visual": np.ones((2, 4))}
    row |= {"object_ids": np.ones((2, 10)), "object_probs": np.ones((2, 10))}
    table = schema.table_from_rows([row], schema.features_schema(2, 4, ["cats"]))
    selection = Selection.of(read)
    with BulkRun(features, "features", Identity.of(), selection, Config()) as run:
        run.publish(table)
        run.close({}, lambda: {"weights": {}})
    return {"info": ["info", manifest], "verify": ["verify", features]}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads by /proc")
@pytest.mark.parametrize("name", ["info", "verify"])
def test_reading_leaves_no_thread_of_arrows(commands: dict[str, list[str]], name: str) -> None:
    """A thread that drops Python's bytes as the interpreter ends aborts the process."""
    ended = run(THREADS, *commands[name])
    assert (ended.returncode, ended.stderr) == (0, "")


BUSY_END = """
    import atexit, sys, time
    from tsq_ray.cli import main

    def burn():
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass

    atexit.register(burn)
    sys.setswitchinterval(1)  # a thread that waits for the interpreter keeps waiting until its end
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["info", "verify"])
def test_the_exit_code_is_right_next_to_busy_processes(
    commands: dict[str, list[str]], name: str
) -> None:
    """Guards against exit code 134 after the right output."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        ended = [run(BUSY_END, *commands[name]) for _ in range(4)]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [(one.returncode, one.stderr) for one in ended] == [(0, "")] * 4
