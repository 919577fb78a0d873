"""The metrics of a run, as Prometheus would read them from a node."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.compute as pc

_LABELS = {"videos": "error_type", "seconds": "step", "ended": "status"}


def scraped(url: str, **labels: str) -> list[str]:
    """The lines with these labels."""
    text = httpx.get(url, trust_env=False).text
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    return [line for line in text.splitlines() if all(one in line for one in wanted)]


def counters(url: str, run: str) -> dict[str, float]:
    """The counters of a run: "parts", "videos corrupt", "seconds decode", ..."""
    found: Counter[str] = Counter()
    for line in scraped(url, run=run):
        if match := re.match(r"ray_tsq_run_(\w+)_total{", line):
            name, value = match[1], float(line.rpartition(" ")[2])
            label = re.search(rf'{_LABELS[name]}="(\w*)"', line) if name in _LABELS else None
            found[f"{name} {label[1]}".strip() if label else name] += value
    return dict(found)


def counters_of(rows: pa.Table, parts: int) -> dict[str, Any]:
    """What the counters of a run that has ended say if they count these rows, in these parts."""
    videos = Counter(error_type or "" for error_type in rows["error_type"].to_pylist())
    expected: dict[str, Any] = {f"videos {name}".strip(): n for name, n in videos.items()}
    size = pc.sum(rows["size_bytes"]).as_py()
    return expected | {"parts": parts, "video_bytes": size, "ended complete": 1}


def wait_for_counters(url: str, run: str, expected: Mapping[str, Any]) -> None:
    """Wait until the counters that are expected are exported, which takes some seconds."""
    deadline = time.monotonic() + 60
    while True:
        found = counters(url, run)
        if {name: found.get(name) for name in expected} == expected:
            videos = {name for name in found if name.startswith("videos")}
            assert videos <= expected.keys(), "rows of an error type that no row has"
            return
        assert time.monotonic() < deadline, (found, expected)
        time.sleep(1)
