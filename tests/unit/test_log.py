"""Lines on stderr as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime

import pytest

from tsq_ray import log
from tsq_ray.cli import main
from tsq_ray.runtime.progress import progress_display


@pytest.fixture(autouse=True)
def _text_again() -> Iterator[None]:
    yield
    log.use_format(log.LogFormat.text)
    log.use_run("")


def test_text_is_the_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    log.say("a line", done=3)
    assert capsys.readouterr().err == "a line\n"


def test_json_has_time_run_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    log.use_format(log.LogFormat.json)
    log.use_run("3f2a")
    with progress_display(10, "extract") as update:
        update(2, 1)
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert datetime.fromisoformat(found.pop("time")).tzinfo is not None
    assert found == {
        "run": "3f2a",
        "message": "extract: 3/10 done, 1 failed, 7 left",
        "done": 3,
        "total": 10,
        "failed": 1,
        "left": 7,
    }


def test_an_error_is_a_json_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["extract", "/nowhere/m.parquet", "--out", "o", "--log-format", "json"]
    assert main(argv) == 2
    found = json.loads(capsys.readouterr().err)
    assert found["message"].startswith("error: manifest /nowhere/m.parquet")
    assert found["exit_code"] == 2
