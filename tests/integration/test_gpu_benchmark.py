"""jobs/benchmarks/gpu.py at its small size, on whatever device is available."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.archive import CLASSES, write_clip

from jobs.benchmarks import gpu


def test_the_benchmark_prints_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, label in enumerate(CLASSES):
        write_clip(tmp_path / f"{number}.mp4", label, seed=number)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert (
        gpu.main(
            [
                "--small",
                "--rounds",
                "1",
                "--precisions",
                "fp32",
                "--videos",
                str(tmp_path),
                "--decoders",
                "1",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    rows = re.findall(
        r"\| fp32 \| no \| (\w+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)% \|", printed
    )
    assert [row[:2] for row in rows] == [
        ("decoder", "1"),
        ("decoder", "2"),
        ("device", "1"),
        ("device", "2"),
    ]
    assert all(float(row[2]) > 0 for row in rows)
    assert "| 3 of 4 videos, 1 decoding processes (pyav), batches of 2 | videos/s |" in printed
    assert re.search(r"\| together \| [\d.]+ \|", printed)
