"""Memory of readers of whole predictions folders: it depends on the part size, not the rows."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from support.report import write_large_run

from tsq_ray.evaluation.compare import compare

MEASURE = """
import json, re, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from tsq_ray.evaluation import Annotations
from tsq_ray.evaluation.compare import compare
from tsq_ray.reporting import build_report, export_predictions
from tsq_ray.score_run import measure_predictions

def anonymous_mib():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def watch():
    while True:
        peak[0] = max(peak[0], anonymous_mib())
        time.sleep(0.01)

work = {
    "report": lambda run: build_report(run, f"{run}.html", max_videos=0),
    "export": lambda run: export_predictions(run, f"{run}-labels", ["labels"]),
    "measure": lambda run: measure_predictions(
        run, json.loads(Path(run, "_run.json").read_text())["bundle_classes"]
    ),
    "compare": lambda run: compare(
        [run], SimpleNamespace(sha256="0" * 64, recognizer=None), Annotations({}, "")
    ),
}[sys.argv[1]]
peak, (small, large) = [0.0], sys.argv[2:]
work(small)  # imports, and what allocators keep
before = anonymous_mib()
threading.Thread(target=watch, daemon=True).start()
work(large)
print("MiB:", max(peak[0], anonymous_mib()) - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two predictions folders with parts of equal size: 4,000 rows and 40,000 rows."""
    folder = tmp_path_factory.mktemp("large")
    return [str(write_large_run(folder / str(parts), parts, 1000, 100)) for parts in (4, 40)]


@pytest.mark.parametrize(
    "work",
    [
        "report",
        *(pytest.param(work, marks=pytest.mark.slow) for work in ("measure", "export", "compare")),
    ],
)
def test_memory_does_not_grow_with_the_rows(folders: list[str], work: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, work, *folders], capture_output=True, text=True, check=True
    )
    # with all rows in memory: report 117, export 128, measure_predictions 30
    assert float(done.stdout.rpartition("MiB:")[2]) < 20, done.stdout


def test_runs_over_other_videos_are_distinguished(folders: list[str]) -> None:
    model: Any = SimpleNamespace(sha256="0" * 64, recognizer=None)
    warning = "warning: the runs hold different videos, so their results are not comparable"
    assert warning in compare(folders, model, None).notes
    assert warning not in compare([folders[0]] * 2, model, None).notes
