"""Lines on stderr as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tsq_ray import log
from tsq_ray.cli import main
from tsq_ray.runs.lease import LEASE_FILE, Lease, LeaseTimes
from tsq_ray.runtime import driver
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


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["index", "/nowhere"], "error: /nowhere"),
        (["extract", "/nowhere/m.parquet"], "error: manifest /nowhere/m.parquet"),
    ],
    ids=["index", "extract"],
)
def test_an_error_is_a_json_line_too(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--out", "o", "--log-format", "json"]) == 2
    found = json.loads(capsys.readouterr().err)
    assert found["message"].startswith(line)
    assert found["exit_code"] == 2


def test_whoever_takes_a_lease_names_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LEASE_FILE).write_text("of another version")
    log.use_format(log.LogFormat.json)
    with Lease(str(tmp_path), times=LeaseTimes(expire_s=0.2, poll_s=0.05)) as lease:
        log.say("a line")
    waiting, line = map(json.loads, capsys.readouterr().err.splitlines())
    assert waiting["message"].startswith("waiting up to 0.2 s for another run")
    assert waiting["run"] == line["run"] == lease.holder.run


def test_what_ray_prints_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.use_format(log.LogFormat.json)
    with driver.stdout_to_stderr(debug=False):
        print("a node is lost\nand 20 lines of its log")
    found = capsys.readouterr()
    assert found.out == ""
    assert json.loads(found.err)["message"] == "a node is lost"
