"""What 0.1.0 wrote is read, resumed and served by this version: docs/upgrade.md.

tests/data/0.1.0 was made by 0.1.0 from its `videos`, with its `settings.toml`: manifest, encoder,
recognizer, features, bundle, predictions. The manifest's videos are not where they were.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.cluster import read_rows, refused, tsq

from tsq_ray.runs.folder import write_part

OLD = Path(__file__).parents[1] / "data" / "0.1.0"
VIDEOS, FAILED = 10, 1


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy, to write to."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("manifest.parquet", "manifest"),
        ("encoder", "classifier (finetune)"),
        ("recognizer", "classifier (finetune)"),
        ("features", "features"),
        ("bundle", "bundle"),
        ("predictions", "predictions"),
    ],
)
def test_everything_is_described(name: str, kind: str) -> None:
    assert tsq("info", OLD / name, "--json").json["kind"] == kind


@pytest.mark.parametrize("run", ["features", "predictions"])
def test_finished_runs_add_up(run: str) -> None:
    found = tsq("verify", OLD / run, "--json").json
    assert (found["problems"], found["counts"]["inputs"]) == ([], VIDEOS)
    assert found["counts"]["failed"] == FAILED


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {Path(row["uri"]).name: row for row in rows}


def test_a_bundle_gives_the_answers_that_it_gave() -> None:
    videos = sorted((OLD / "videos").glob("*.mp4"))
    now = by_name(tsq("predict", *videos, "--model", OLD / "bundle", "--json").json["videos"])
    before = by_name(read_rows(str(OLD / "predictions")).to_pylist())
    assert now.keys() == before.keys()
    for name, row in before.items():
        assert now[name].get("error_type") == row["error_type"], name
        if row["status"] == "ok":
            assert now[name]["top_labels"] == row["top_labels"], name
            assert now[name]["selected_index"] == row["selected_index"], name
            assert now[name]["scores"] == pytest.approx(row["scores"], abs=1e-3), name


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("run", ["features", "predictions"])
def test_a_stopped_run_is_resumed(ray_cluster: Any, old: Path, run: str) -> None:
    """The videos without a row are gone from their place, and become rows that say so."""
    folder = old / run
    (folder / "_run.json").unlink()
    rows = read_rows(str(folder))
    for part in folder.glob("part-*.parquet"):
        part.unlink()
    before, gone = rows.slice(3), 3
    write_part(str(folder), before, "zstd")
    commands = {
        "features": ("extract", old / "manifest.parquet", *networks(old), *settings(old)),
        "predictions": ("score", old / "manifest.parquet", "--model", old / "bundle"),
    }
    found = tsq(*commands[run], "--out", folder, "--json").json
    assert (found["videos_done_now"], found["counts"]["inputs"]) == (gone, VIDEOS)
    assert found["counts"]["failed_by_type"]["not_found"] == gone
    after = {row["video_id"]: row for row in read_rows(str(folder)).to_pylist()}
    assert all(after[row["video_id"]] == row for row in before.to_pylist())
    assert tsq("verify", folder, "--json").json["problems"] == []


def settings(old: Path) -> tuple[str, ...]:
    return ("--config", str(old / "settings.toml"))


def networks(old: Path) -> tuple[str, ...]:
    return ("--encoder", str(old / "encoder"), "--recognizer", str(old / "recognizer"))


@pytest.mark.ray
@pytest.mark.slow
def test_a_sampler_is_trained_on_features(
    ray_cluster: Any, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old)  # the settings name `words.txt`
    out = old / "new"
    command = ("train", old / "features", "--out", out, *networks(old), *settings(old))
    kept = set(Path(tempfile.gettempdir()).glob("tsq-features-*"))
    assert tsq(*command, "--json").json["videos"] == 6
    left = set(Path(tempfile.gettempdir()).glob("tsq-features-*"))
    assert left <= kept, "the last process that uses the features removes them"
    again = tsq("train", old / "features", "--out", old / "bundle", *networks(old), *settings(old))
    assert "already done" in again.out
    report = tsq("report", old / "predictions", "--out", old / "report.html", "--json").json
    assert (report["inputs"], report["adds_up"]) == (VIDEOS, True)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("features", "_run.json"),
        ("predictions", "_run.json"),
        ("encoder", "finetune.json"),
        ("bundle", "bundle.json"),
    ],
)
def test_a_newer_format_is_refused_in_the_right_words(old: Path, name: str, file: str) -> None:
    path = old / name / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 4}))
    message = refused(tsq("info", old / name))
    assert "made by a newer version of tsq_ray (format 4; " in message
    assert message.endswith("upgrade")
