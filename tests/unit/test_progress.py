"""The progress lines of a run without a terminal."""

from __future__ import annotations

import pytest

from tsq_ray.runtime import progress


def test_the_rate_counts_from_the_first_video_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_display(100, "extract") as update:
        for seconds, ok, failed in (
            (0, 0, 0),
            (30, 2, 0),
            (5, 4, 0),
            (15, 10, 2),
            (20, 20, 2),
            (1, 21, 2),
        ):
            now[0] += seconds
            update(ok, failed)
    assert capsys.readouterr().err.splitlines() == [
        "extract: 2/100 done, 0 failed, 98 left",
        "extract: 12/100 done, 2 failed, 88 left, 0.50 videos/s, ETA 176 s",
        "extract: 22/100 done, 2 failed, 78 left, 0.50 videos/s, ETA 156 s",
    ]


def test_no_progress_if_none_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_display(100, "extract", show=False) as update:
        update(50, 0)
    assert capsys.readouterr().err == ""
