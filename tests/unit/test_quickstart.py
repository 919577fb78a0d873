"""The quickstart's parts that need no run: settings, syntax and usage of scripts, final table."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tsq_ray import schema, storage
from tsq_ray.config import check_budget, load_config
from tsq_ray.runs.folder import FORMAT, RUN_FILE, write_json, write_part

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = ("jobs/quickstart.sh", "jobs/setup_venv.sh", "tests/run.sh")


def test_settings_load_and_their_weights_are_packages_of_the_extra() -> None:
    config = load_config(REPO / "jobs" / "quickstart.toml")
    check_budget(config.sampler, config.decode.num_frames, config.train.task)
    extra = tomllib.loads((REPO / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["weights"]
    packages = {requirement.partition("==")[0] for requirement in extra}
    for part in (
        config.encoders.visual,
        config.encoders.objects,
        config.encoders.text,
        config.recognizer,
    ):
        assert part.weights.removeprefix("package:") in packages


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script: str) -> None:
    assert (
        subprocess.run(
            ["bash", "-n", str(REPO / script)], capture_output=True, text=True, check=False
        ).stderr
        == ""
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "b"], "usage:"),
        (["--help"], "usage:"),
        (["/no/such/videos"], "which is not a folder"),
    ],
)
def test_quickstart_refuses_a_wrong_command_line_at_once(given: list[str], message: str) -> None:
    done = subprocess.run(
        ["bash", str(REPO / "jobs/quickstart.sh"), *given],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(("labels", "given"), [("folders", ["/videos"]), ("none", [])])
def test_quickstart_refuses_other_values_of_labels(labels: str, given: list[str]) -> None:
    done = subprocess.run(
        ["bash", str(REPO / "jobs/quickstart.sh"), *given],
        env={"PATH": "/usr/bin:/bin", "LABELS": labels},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"LABELS is {labels}; allowed is LABELS=none, with VIDEOS" in done.stderr


@pytest.mark.parametrize(
    ("python", "message"), [("/no/python", "PYTHON=/no/python is not a Python 3.11, 3.12 or 3.13")]
)
def test_a_wrong_python_is_named(python: str, message: str) -> None:
    command = f"PYTHON={python}; source jobs/setup_venv.sh; find_python"
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """Three videos of two classes.

    One right with 1 of 2 frames on the evidence, one wrong with 2 of 2, one failed.
    """
    classes = ["cats", "dogs"]
    videos = [
        {"name": "a.mp4", "label": 0, "scores": [0.9, 0.1], "top": "cats", "pts": [1.0, 5.0]},
        {"name": "b.mp4", "label": 1, "scores": [0.8, 0.2], "top": "cats", "pts": [1.0, 2.0]},
        {"name": "c.mp4", "label": 1},
    ]
    rows = []
    for video in videos:
        uri = str(tmp_path / "videos" / str(video["name"]))
        row = {
            "video_id": video["name"],
            "uri": uri,
            "size_bytes": 1,
            "labels": [video["label"]],
            "warnings": [],
        }
        row["label_names"] = [classes[int(str(video["label"]))]]
        if "scores" in video:
            row |= {
                "status": "ok",
                "scores": np.array(video["scores"], np.float32),
                "top_labels": [video["top"]],
                "top_scores": [0.9],
            }
            row |= {
                "selected_pts_s": video["pts"],
                "selected_slot": [0, 1],
                "frame_pts_s": np.array([1, 5], np.float32),
            }
        else:
            row |= {"status": "failed", "error_type": "corrupt", "error_message": "bad"}
        rows.append(row)
    folder = tmp_path / "predictions"
    table = schema.table_from_rows(rows, schema.predictions_schema(2, 2, classes))
    write_part(str(folder), table, "zstd")
    counts = {"inputs": 3, "ok": 2, "failed": 1, "skipped": 0}
    run = {
        "format": FORMAT,
        "kind": "predictions",
        "status": "complete",
        "counts": counts,
        "bundle_classes": classes,
    }
    write_json(storage.join(str(folder), RUN_FILE), run)
    return folder


def test_table_row_counts_measures_and_finds_the_evidence(predictions: Path) -> None:
    from jobs.quickstart_table import table_row
    from tsq_ray.evaluation import read_annotations

    annotations = predictions.parent / "videos" / "annotations.json"
    annotations.parent.mkdir()
    videos = {
        "a.mp4": {"label": "cats", "segments": [[0.5, 1.5]]},
        "b.mp4": {"label": "dogs", "segments": [[0, 3]]},
    }
    annotations.write_text(json.dumps({"videos": videos}))
    assert table_row("x", str(predictions), None) == ["x", "2", "1", "1.000", "0.500"]
    assert table_row("x", str(predictions), read_annotations(str(annotations))) == [
        "x",
        "2",
        "1",
        "1.000",
        "0.500",
        "0.750",
    ]
