"""Labels as CSV and JSON lines, chosen frames as JPEG."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from support.report import (
    CLASSES,
    HOSTILE_NAME,
    Case,
    failed_row,
    make_case,
    make_video,
    ok_row,
    video_id,
    write_run,
)

from tsq_ray.errors import RunError, UserError
from tsq_ray.reporting import export_predictions
from tsq_ray.reporting.tables import csv_writer
from tsq_ray.results import ExportSummary


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def exported(case: Case) -> tuple[ExportSummary, Path]:
    out = case.folder.parent / "export"
    return export_predictions(str(case.folder), str(out), size=48), out


def test_summary(exported: tuple[ExportSummary, Path]) -> None:
    summary, out = exported
    files = [path for path in out.rglob("*") if path.is_file()]
    assert vars(summary) == {
        "out": str(out),
        "videos": 9,
        "failed": 2,
        "frames": 17,
        "frames_missing": {"not_found": 1},
        "requests": 0,
        "files": len(files),
    }
    assert len(files) == 17 + 3


def test_csv_has_one_row_per_video(exported: tuple[ExportSummary, Path], case: Case) -> None:
    rows = list(csv.DictReader(io.StringIO((exported[1] / "labels.csv").read_text("utf-8"))))
    assert [row["video_id"] for row in rows] == [video_id(number) for number in range(1, 10)]
    first, few, failed = rows[0], rows[3], rows[7]
    assert (first["status"], first["label_names"], first["label_1"], first["score_1"]) == (
        "ok",
        "swim",
        "swim",
        "0.7",
    )
    assert first["selected_pts_s"].split("|") == [
        f"{time:.3f}" for time in case.rows[0]["selected_pts_s"]
    ]
    assert first["selected_by"] == "visual|visual|textual"
    assert (first["label_5"], first["score_5"]) == ("", "")
    assert few["warnings"] == "3 of 8 frames missing"
    assert (failed["status"], failed["error_type"], failed["label_1"]) == (
        "failed",
        "not_video",
        "",
    )
    assert rows[1]["uri"].endswith(HOSTILE_NAME)
    assert rows[2]["label_names"] == "cook|swim"


def test_csv_cells_are_no_formulas(exported: tuple[ExportSummary, Path]) -> None:
    rows = list(csv.DictReader(io.StringIO((exported[1] / "labels.csv").read_text("utf-8"))))
    assert rows[2]["label_1"] == "'=1+1"


def cells_of(fields: list[str], row: dict[str, object]) -> list[list[str]]:
    """What a CSV reader finds in a file with one row."""
    file = io.BytesIO()
    csv_writer(file, fields)(row)
    return list(csv.reader(io.StringIO(file.getvalue().decode("utf-8"), newline="")))


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]
)
def test_formulas_get_an_apostrophe(text: str) -> None:
    assert cells_of(["a"], {"a": text}) == [["a"], ["'" + text]]


@pytest.mark.parametrize("value", ["a=b", "'quoted", "1.5", 'ä, "b"', ""])
def test_other_text_stays(value: str) -> None:
    assert cells_of(["a", "b"], {"a": value, "b": -0.5})[1] == [value, "-0.5"]


def test_json_lines_hold_the_values_as_they_are(
    exported: tuple[ExportSummary, Path], case: Case
) -> None:
    rows = [
        json.loads(line) for line in (exported[1] / "labels.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(rows) == 9
    assert rows[2]["top_labels"] == [CLASSES[c] for c in (3, 0, 1, 2)]
    assert rows[2]["top_scores"] == [0.4, 0.3, 0.2, 0.1]
    assert rows[0]["selected_slot"] == case.rows[0]["selected_slot"]
    assert rows[7]["top_labels"] is None
    assert rows[7]["error_message"] == "no video stream in notes.txt"


def test_what_a_server_said_is_exported(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "v.mp4", 8)
    more = {"tokens_in": 900, "tokens_out": 12, "caption": '=A "bar"\nmoves'}
    rows = [
        ok_row(1, clip, [0.1, 0.7, 0.1, 0.1], **more),
        failed_row(2, "/gone.mp4", "unavailable", "no answer") | {"tokens_in": 900},
    ]
    folder = write_run(tmp_path / "predictions", rows, from_server=True)
    out = tmp_path / "export"
    export_predictions(str(folder), str(out), ["labels"])
    found = list(csv.DictReader(io.StringIO((out / "labels.csv").read_text("utf-8"), newline="")))
    assert [(row["tokens_in"], row["tokens_out"], row["caption"]) for row in found] == [
        ("900", "12", '\'=A "bar"\nmoves'),
        ("900", "", ""),
    ]
    first, failed = map(json.loads, (out / "labels.jsonl").read_text("utf-8").splitlines())
    assert {name: first[name] for name in more} == more
    assert (failed["tokens_in"], failed["caption"]) == (900, None)


def test_no_secret_of_a_presigned_url(exported: tuple[ExportSummary, Path]) -> None:
    for path in exported[1].glob("*.*"):
        assert "X-Amz-Signature" not in path.read_text("utf-8")


def test_frames_are_those_chosen_in_the_aspect_of_the_video(
    exported: tuple[ExportSummary, Path], case: Case
) -> None:
    row = case.rows[0]
    files = sorted((exported[1] / "frames" / video_id(1)).iterdir())
    expected = [
        f"{slot:04d}_{time:.3f}.jpg"
        for slot, time in zip(row["selected_slot"], row["selected_pts_s"], strict=True)
    ]
    assert [file.name for file in files] == expected
    with Image.open(files[0]) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))
    with Image.open(next((exported[1] / "frames" / video_id(2)).iterdir())) as image:
        assert image.size == (48, 72)


def test_a_video_that_is_gone_is_listed(exported: tuple[ExportSummary, Path]) -> None:
    rows = list(
        csv.DictReader(io.StringIO((exported[1] / "frames_missing.csv").read_text("utf-8")))
    )
    assert [(row["video_id"], row["error_type"]) for row in rows] == [(video_id(5), "not_found")]
    assert not (exported[1] / "frames" / video_id(5)).exists()


def test_small_videos_are_not_enlarged(tmp_path: Path) -> None:
    rows = [
        ok_row(1, make_video(tmp_path / "small.mp4", 10, 96, 72), [0.7, 0.1, 0.1, 0.1]),
        ok_row(2, make_video(tmp_path / "large.mp4", 10, 256, 192), [0.7, 0.1, 0.1, 0.1]),
    ]
    calls: list[tuple[int, int]] = []
    folder = write_run(tmp_path / "run", rows)
    export_predictions(
        str(folder),
        str(tmp_path / "out"),
        ["frames"],
        128,
        num_processes=1,
        progress=lambda done, total: calls.append((done, total)),
    )
    sizes = {path.parent.name: Image.open(path).size for path in (tmp_path / "out").rglob("*.jpg")}
    assert sizes == {video_id(1): (96, 72), video_id(2): (171, 128)}
    assert calls == [(1, 2), (2, 2)]


def test_labels_alone_open_no_video(tmp_path: Path) -> None:
    rows = [failed_row(1, "/a/b.mp4", "truncated", "too short")]
    summary = export_predictions(
        str(write_run(tmp_path / "run", rows)), str(tmp_path / "out"), ["labels"]
    )
    assert summary.files == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "labels.csv",
        "labels.jsonl",
    ]


@pytest.mark.parametrize(
    ("what", "size", "message"),
    [
        (["labels", "sound"], 480, "sound cannot be exported; allowed: labels, frames"),
        ([], 480, "nothing cannot"),
        (["frames"], 2, "size 2 is too small"),
    ],
)
def test_wrong_requests_are_refused(
    tmp_path: Path, what: list[str], size: int, message: str
) -> None:
    folder = write_run(tmp_path / "run", [failed_row(1, "/a/b.mp4", "truncated", "too short")])
    with pytest.raises(UserError, match=message):
        export_predictions(str(folder), str(tmp_path / "out"), what, size)


def test_a_video_id_that_is_a_path_is_refused(tmp_path: Path) -> None:
    row = failed_row(1, "/a/b.mp4", "truncated", "too short") | {"video_id": "../../elsewhere"}
    with pytest.raises(RunError, match=r"video_id '\.\./\.\./elsewhere'; allowed: 16 hex digits"):
        export_predictions(str(write_run(tmp_path / "run", [row])), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
