"""Exports for other tools: OpenAI's Batch API, Label Studio, ActivityNet."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from PIL import Image
from support.report import (
    CLASSES,
    FPS,
    HOSTILE_NAME,
    Case,
    failed_row,
    make_case,
    make_video,
    ok_row,
    video_id,
    write_run,
)

from tsq_ray import chat, cli
from tsq_ray.errors import RunError, UserError
from tsq_ray.evaluation.annotations import read_annotations
from tsq_ray.manifest import assemble_manifest
from tsq_ray.reporting import export_predictions
from tsq_ray.reporting.batch import BatchQuestion, batch_writer
from tsq_ray.results import ExportSummary

OK, GONE = [1, 2, 3, 4, 5, 6, 7], 5
"""Numbers of the case's videos that were scored; of the one that was deleted since."""
BUNDLE = {"uri": "/models/kitchen", "sha256": "0123456789abcdef" * 4}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("interchange"), task="single", model=BUNDLE)


@pytest.fixture(scope="module")
def exported(case: Case) -> tuple[ExportSummary, Path]:
    out = case.folder.parent / "out"
    formats = ["openai-batch", "label-studio", "activitynet"]
    return export_predictions(str(case.folder), str(out), formats, 48, batch_model="a-vlm"), out


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def csv_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"), newline="")))


def test_summary(exported: tuple[ExportSummary, Path]) -> None:
    summary, out = exported
    assert (summary.videos, summary.failed, summary.frames, summary.requests) == (9, 2, 0, 6)
    assert summary.frames_missing == {"not_found": 1}
    assert sorted(path.name for path in out.iterdir()) == [
        "activitynet_database.json",
        "activitynet_results.json",
        "frames_missing.csv",
        "label_studio_interface.xml",
        "label_studio_tasks.json",
        "openai_batch_0001.jsonl",
        "openai_batch_videos.csv",
    ]
    assert summary.files == 7
    assert not any("X-Amz-Signature" in path.read_text("utf-8") for path in out.iterdir())


# ------------------------------------------------------------------------------------- openai-batch

REQUEST = {
    "type": "object",
    "properties": {
        "custom_id": {"type": "string", "minLength": 1, "maxLength": 64},
        "method": {"const": "POST"},
        "url": {"const": "/v1/chat/completions"},
        "body": {
            "type": "object",
            "properties": {
                "model": {"type": "string", "minLength": 1},
                "messages": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {
                            "role": {"const": "user"},
                            "content": {"type": "array", "items": {"$ref": "#/$defs/part"}},
                        },
                        "required": ["role", "content"],
                        "additionalProperties": False,
                    },
                },
                "response_format": {
                    "type": "object",
                    "properties": {
                        "type": {"const": "json_schema"},
                        "json_schema": {
                            "type": "object",
                            "properties": {
                                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                                "strict": {"type": "boolean"},
                                "schema": {"type": "object"},
                            },
                            "required": ["name", "strict", "schema"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["type", "json_schema"],
                    "additionalProperties": False,
                },
            },
            "required": ["model", "messages", "response_format"],
            "additionalProperties": False,
        },
    },
    "required": ["custom_id", "method", "url", "body"],
    "additionalProperties": False,
    "$defs": {
        "part": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    "required": ["type", "text"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "image_url"},
                        "image_url": {
                            "type": "object",
                            "properties": {"url": {"type": "string", "pattern": "^(data|https):"}},
                            "required": ["url"],
                        },
                    },
                    "required": ["type", "image_url"],
                    "additionalProperties": False,
                },
            ]
        }
    },
}
"""A line of an input file, as OpenAI's reference describes it (batches, chat completions)."""


def images_of(request: dict[str, Any]) -> list[str]:
    (message,) = request["body"]["messages"]
    return [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]


def test_a_request_holds_the_chosen_frames_of_a_video(
    exported: tuple[ExportSummary, Path], case: Case
) -> None:
    requests = {
        request["custom_id"]: request
        for request in json_lines(exported[1] / "openai_batch_0001.jsonl")
    }
    assert requests.keys() == {video_id(number) for number in OK if number != GONE}
    for request in requests.values():
        jsonschema.validate(request, REQUEST)
        schema = request["body"]["response_format"]["json_schema"]["schema"]
        jsonschema.validate({"label": CLASSES[2]}, schema)
    first, row = requests[video_id(1)], case.rows[0]
    assert first["body"]["model"] == "a-vlm"
    text = json.dumps(first["body"]["messages"])
    assert all(f"{time:.2f} s:" in text for time in row["selected_pts_s"])
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        for url in images_of(first)
    ]
    assert [(picture.format, picture.size) for picture in pictures] == [("JPEG", (64, 48))] * 3


def test_the_videos_of_the_requests_are_listed(
    exported: tuple[ExportSummary, Path], case: Case
) -> None:
    rows = csv_rows(exported[1] / "openai_batch_videos.csv")
    assert [row["custom_id"] for row in rows] == [
        request["custom_id"] for request in json_lines(exported[1] / "openai_batch_0001.jsonl")
    ]
    first = next(row for row in rows if row["custom_id"] == video_id(1))
    assert first["file"] == "openai_batch_0001.jsonl"
    assert first["uri"] == case.rows[0]["uri"]
    assert first["selected_slot"] == "|".join(map(str, case.rows[0]["selected_slot"]))
    assert first["selected_pts_s"] == "|".join(
        f"{time:.3f}" for time in case.rows[0]["selected_pts_s"]
    )


def test_the_service_may_fetch_the_frames(case: Case, tmp_path: Path) -> None:
    summary = export_predictions(
        str(case.folder),
        str(tmp_path),
        ["openai-batch"],
        48,
        batch_model="m",
        frame_urls="https://host/out/",
        prompt="Which of {classes}?",
    )
    requests = json_lines(tmp_path / "openai_batch_0001.jsonl")
    urls = [url for request in requests for url in images_of(request)]
    assert len(urls) == summary.frames == 17
    assert all((tmp_path / url.removeprefix("https://host/out/")).is_file() for url in urls)
    jsonschema.validate(requests[0], REQUEST)
    content = requests[0]["body"]["messages"][0]["content"]
    assert content[0]["text"] == f"Which of {'; '.join(CLASSES)}?"


def test_a_multi_label_bundle_is_asked_for_a_list(tmp_path: Path) -> None:
    row = ok_row(1, make_video(tmp_path / "a.mp4", 10), [0.7, 0.6, 0.1, 0.1])
    run = write_run(tmp_path / "run", [row], task="multi")
    export_predictions(
        str(run), str(tmp_path / "out"), ["openai-batch", "label-studio"], 48, batch_model="m"
    )
    (request,) = json_lines(tmp_path / "out" / "openai_batch_0001.jsonl")
    schema = request["body"]["response_format"]["json_schema"]["schema"]
    jsonschema.validate({"labels": ["cook", "swim"]}, schema)
    (task,) = json.loads((tmp_path / "out" / "label_studio_tasks.json").read_text())
    assert task["predictions"][0]["result"][0]["value"] == {"choices": ["cook", "swim"]}
    view = ElementTree.parse(tmp_path / "out" / "label_studio_interface.xml").getroot()
    assert view.find("Choices").get("choice") == "multiple"  # type: ignore[union-attr]


def write_batch(out: Path, videos: int, **limits: int) -> list[str]:
    """Write requests with a frame of 600 bytes each; return the names of the files."""
    with batch_writer(str(out), BatchQuestion("m", chat.PROMPT, CLASSES, False), **limits) as batch:
        for number in range(videos):
            row = {"video_id": video_id(number), "uri": f"/{number}.mp4", "frame_pts_s": [0.5]}
            batch.add(row, [0], [bytes(600)])
    return sorted(path.name for path in out.glob("*.jsonl"))


@pytest.mark.parametrize("limits", [{"max_requests": 2}, {"max_bytes": 3700}])
def test_a_full_file_is_followed_by_another(tmp_path: Path, limits: dict[str, int]) -> None:
    files = write_batch(tmp_path, 5, **limits)
    assert files == [f"openai_batch_{number:04d}.jsonl" for number in (1, 2, 3)]
    lines = [json_lines(tmp_path / name) for name in files]
    assert [len(found) for found in lines] == [2, 2, 1]
    listed = csv_rows(tmp_path / "openai_batch_videos.csv")
    assert [(row["custom_id"], row["file"]) for row in listed] == [
        (request["custom_id"], name)
        for name, found in zip(files, lines, strict=True)
        for request in found
    ]
    assert all(path.stat().st_size <= 3700 for path in tmp_path.glob("*.jsonl"))
    assert write_batch(tmp_path, 2, **limits) == files[:1], "no request is sent twice"


def test_a_request_that_no_file_holds(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"/0.mp4: its request has \d+ bytes; a batch file may have"):
        write_batch(tmp_path, 1, max_bytes=1000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "openai-batch needs a model; .* --batch-model NAME"),
        ({"batch_model": "m", "prompt": "{class}"}, r"unknown field \{class\}; allowed: \{classes"),
    ],
)
def test_wrong_requests_are_refused(
    case: Case, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export_predictions(str(case.folder), str(tmp_path), ["openai-batch"], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["openai-batch", "label-studio"])
def test_a_run_that_names_no_classes(tmp_path: Path, what: str) -> None:
    row = failed_row(1, "/a/b.mp4", "truncated", "too short")
    run = write_run(tmp_path / "run", [row], bundle_classes=None)
    with pytest.raises(RunError, match=f"names no classes, which {what} needs; score again"):
        export_predictions(str(run), str(tmp_path / "out"), [what], batch_model="m")


# ------------------------------------------------------------------------------------- label-studio

REGION = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "from_name": {"type": "string"},
        "to_name": {"const": "video"},
        "type": {"enum": ["choices", "timelinelabels"]},
        "value": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {
                        "choices": {"type": "array", "minItems": 1, "items": {"enum": CLASSES}}
                    },
                    "required": ["choices"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {
                        "ranges": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "type": "object",
                                "properties": {
                                    "start": {"type": "integer", "minimum": 1},
                                    "end": {"type": "integer", "minimum": 1},
                                },
                                "required": ["start", "end"],
                            },
                        },
                        "timelinelabels": {"const": ["chosen frame"]},
                    },
                    "required": ["ranges", "timelinelabels"],
                    "additionalProperties": False,
                },
            ]
        },
    },
    "required": ["id", "from_name", "to_name", "type", "value"],
    "additionalProperties": False,
}
TASKS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "data": {
                "type": "object",
                "properties": {
                    "video": {"type": "string"},
                    "fps": {"type": "number", "exclusiveMinimum": 0},
                },
                "required": ["video", "fps", "uri", "video_id"],
            },
            "predictions": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": {
                    "type": "object",
                    "properties": {
                        "model_version": {"type": "string", "minLength": 1},
                        "score": {"type": "number", "minimum": 0, "maximum": 1},
                        "result": {"type": "array", "items": REGION},
                    },
                    "required": ["model_version", "score", "result"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["data", "predictions"],
        "additionalProperties": False,
    },
}
"""Tasks with predictions as Label Studio imports them."""


@pytest.fixture(scope="module")
def tasks(exported: tuple[ExportSummary, Path]) -> list[dict[str, Any]]:
    return json.loads((exported[1] / "label_studio_tasks.json").read_text("utf-8"))


def test_a_task_holds_the_predicted_class_and_the_moments(
    tasks: list[dict[str, Any]], case: Case
) -> None:
    jsonschema.validate(tasks, TASKS)
    assert [task["data"]["video_id"] for task in tasks] == [video_id(number) for number in OK]
    first, row = tasks[0], case.rows[0]
    assert first["data"]["uri"] == row["uri"]
    assert first["data"]["video"] == f"/data/local-files/?d={row['uri'].lstrip('/')}"
    assert first["data"]["fps"] == pytest.approx(FPS)
    (prediction,) = first["predictions"]
    assert prediction["model_version"] == "kitchen 0123456789ab"
    assert prediction["score"] == 0.7
    choice, *moments = prediction["result"]
    assert (choice["from_name"], choice["value"]) == ("label", {"choices": ["swim"]})
    # Label Studio counts frames from 1, and the first is at 0 s
    expected = [round(time * FPS) + 1 for time in row["selected_pts_s"]]
    assert [moment["value"]["ranges"] for moment in moments] == [
        [{"start": frame, "end": frame}] for frame in expected
    ]


def test_the_interface_has_the_classes_as_they_are(exported: tuple[ExportSummary, Path]) -> None:
    view = ElementTree.parse(exported[1] / "label_studio_interface.xml").getroot()
    assert [(part.tag, part.get("name"), part.get("toName")) for part in view] == [
        ("Video", "video", None),
        ("Choices", "label", "video"),
        ("TimelineLabels", "moments", "video"),
    ]
    video, choices, moments = view
    assert (video.get("value"), video.get("frameRate")) == ("$video", "$fps")
    assert choices.get("choice") == "single"
    assert [choice.get("value") for choice in choices] == CLASSES
    assert [label.get("value") for label in moments] == ["chosen frame"]


SDK = [
    *("label-studio-sdk==2.1.2", "lxml==6.1.3", "defusedxml==0.7.1", "jsf==0.11.2", "rstr==3.2.2"),
    *("xmljson==0.2.1", "ujson==6.1.0", "ijson==3.6.0", "nltk==3.10.4", "appdirs==1.4.4"),
    *("inflect==7.6.0", "typeguard==4.6.1", "more-itertools==11.2.1", "Faker==40.63.0"),
    *("PyJWT==2.15.1", "requests-mock==1.12.1"),
]
VALIDATE = """
import json, sys
from label_studio_sdk.label_interface.interface import LabelInterface
interface = LabelInterface(open(sys.argv[1], encoding="utf-8").read())
interface.validate()
for task in json.load(open(sys.argv[2], encoding="utf-8")):
    assert interface.validate_task({"data": task["data"]}), task
    assert interface.validate_prediction(task["predictions"][0], return_errors=True) == [], task
"""


@pytest.mark.slow
def test_label_studios_own_sdk_accepts_interface_and_tasks(
    exported: tuple[ExportSummary, Path], tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In a folder of its own: the SDK wants an older numpy than the project."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(tmp_path), *SDK], check=True)
    files = [exported[1] / f"label_studio_{name}" for name in ("interface.xml", "tasks.json")]
    assert tasks
    subprocess.run(
        [sys.executable, "-c", VALIDATE, *map(str, files)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )


@pytest.mark.parametrize("root", ["{videos}", "{videos}/"])
def test_paths_are_relative_to_the_document_root(case: Case, tmp_path: Path, root: str) -> None:
    videos = Path(case.rows[0]["uri"]).parent
    export_predictions(
        str(case.folder),
        str(tmp_path),
        ["label-studio"],
        document_root=root.format(videos=videos),
    )
    found = json.loads((tmp_path / "label_studio_tasks.json").read_text("utf-8"))
    assert found[0]["data"]["video"] == "/data/local-files/?d=right.mp4"
    hostile = "%3Cscript%3Ealert%281%29%3Cscript%3E%26%22%27.mp4"
    assert found[1]["data"]["video"] == f"/data/local-files/?d={hostile}"


def test_a_video_outside_the_document_root_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is outside the document root /elsewhere/; name a folder"):
        export_predictions(
            str(case.folder), str(tmp_path), ["label-studio"], document_root="/elsewhere"
        )
    assert list(tmp_path.iterdir()) == []


def test_other_storage_is_named_as_it_is(tmp_path: Path) -> None:
    row = ok_row(1, make_video(tmp_path / "a.mp4", 10), [0.7, 0.1, 0.1, 0.1], split="val")
    run = write_run(tmp_path / "run", [row | {"uri": "s3://bucket/a b.mp4", "fps": None}])
    export_predictions(str(run), str(tmp_path / "out"), ["label-studio"])
    (task,) = json.loads((tmp_path / "out" / "label_studio_tasks.json").read_text())
    assert (task["data"]["video"], task["data"]["split"]) == ("s3://bucket/a b.mp4", "val")
    assert task["predictions"][0]["model_version"] == "kitchen"
    assert len(task["predictions"][0]["result"]) == 1, "no moments without a frame rate"


def test_a_class_that_xml_cannot_hold_is_refused(tmp_path: Path) -> None:
    row = failed_row(1, "/a/b.mp4", "truncated", "too short")
    run = write_run(tmp_path / "run", [row], with_scores=False, bundle_classes=["a", "b\x01"])
    with pytest.raises(RunError, match=r"class 'b\\x01' has a control character"):
        export_predictions(str(run), str(tmp_path / "out"), ["label-studio"])


# -------------------------------------------------------------------------- corrected and read back


def as_exported(task: dict[str, Any], *labels: str, **annotation: Any) -> dict[str, Any]:
    """The task as Label Studio's JSON export has it after a person chose `labels`."""
    result = [
        {
            "id": "label",
            "type": "choices",
            "value": {"choices": list(labels)},
            "origin": "prediction-changed",
            "to_name": "video",
            "from_name": "label",
        },
        *task["predictions"][0]["result"][1:],
    ]
    answer = {
        "id": 5,
        "completed_by": 1,
        "result": result,
        "was_cancelled": False,
        "created_at": "2026-03-01T10:00:00.000000Z",
        "updated_at": "2026-03-01T10:00:05.123456Z",
        "prediction": {"id": 3, **task["predictions"][0]},
    }
    return {
        "id": 31,
        "annotations": [answer | annotation],
        "drafts": [],
        "predictions": [3],
        "data": task["data"],
        "meta": {},
    }


def as_minimal(task: dict[str, Any], *labels: str) -> dict[str, Any]:
    """The same as JSON-MIN has it."""
    choices = labels[0] if len(labels) == 1 else {"choices": list(labels)}
    return task["data"] | {
        "id": task["data"]["video_id"],
        "label": choices,
        "annotator": 1,
        "updated_at": "2026-03-01T10:00:05.123456Z",
    }


@pytest.mark.parametrize("form", [as_exported, as_minimal])
def test_corrections_become_labels_of_the_manifest(
    tasks: list[dict[str, Any]],
    case: Case,
    tmp_path: Path,
    form: Callable[..., dict[str, Any]],
) -> None:
    corrected = [
        form(tasks[0], "cook"),
        form(tasks[1], CLASSES[2], "cook"),
        form(tasks[2], "swim"),
    ]
    if form is as_exported:
        corrected += [
            as_exported(tasks[3], "cook", was_cancelled=True),
            as_exported(tasks[5]) | {"annotations": []},
        ]
    export = tmp_path / "project-1.json"
    export.write_text(json.dumps(corrected, indent=2, ensure_ascii=False))
    source, manifest_file = str(Path(case.rows[0]["uri"]).parent), tmp_path / "manifest.parquet"
    assert cli.main(["index", source, "--labels", str(export), "--out", str(manifest_file)]) == 0
    manifest, found = assemble_manifest([source], [str(export)])
    assert {
        Path(row.uri).name: {manifest.classes[label] for label in row.labels}
        for row in manifest.rows
        if row.labels
    } == {"right.mp4": {"cook"}, HOSTILE_NAME: {CLASSES[2], "cook"}, "multi.mp4": {"swim"}}
    assert (found.labelled, found.unlabelled) == (3, 3), "skipped and untouched: unlabelled"


# -------------------------------------------------------------------------------------- activitynet

RESULTS = {
    "type": "object",
    "properties": {
        "version": {"const": "VERSION 1.3"},
        "external_data": {
            "type": "object",
            "properties": {"used": {"type": "boolean"}, "details": {"type": "string"}},
            "required": ["used", "details"],
        },
        "results": {
            "type": "object",
            "additionalProperties": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "label": {"type": "string"},
                        "score": {"type": "number"},
                        "segment": {
                            "type": "array",
                            "items": {"type": "number"},
                            "minItems": 2,
                            "maxItems": 2,
                        },
                    },
                    "required": ["label", "score", "segment"],
                },
            },
        },
    },
    "required": ["version", "external_data", "results"],
}
"""A results file as the evaluation code of ActivityNet 1.3 reads it."""


def test_activitynets_results_hold_labels_with_scores(
    exported: tuple[ExportSummary, Path], case: Case
) -> None:
    content = json.loads((exported[1] / "activitynet_results.json").read_text("utf-8"))
    jsonschema.validate(content, RESULTS)
    assert content["external_data"]["details"] == "kitchen 0123456789ab"
    assert len(content["results"]) == len(OK)
    right = content["results"]["right"]
    duration = round(case.rows[0]["duration_s"], 3)
    assert right[0] == {"label": "swim", "score": 0.7, "segment": [0.0, duration]}
    assert [part["label"] for part in right] == case.rows[0]["top_labels"]


def test_known_labels_are_ground_truth_that_index_and_evaluate_read(
    exported: tuple[ExportSummary, Path], case: Case
) -> None:
    place = exported[1] / "activitynet_database.json"
    content = json.loads(place.read_text("utf-8"))
    assert set(content) == {"version", "taxonomy", "database"}
    assert content["database"]["multi"]["annotations"] == [
        {"label": label, "segment": [0.0, round(case.rows[2]["duration_s"], 3)]}
        for label in ("cook", "swim")
    ]
    assert content["database"]["right"]["resolution"] == "96x72"
    assert "plain" not in content["database"], "a prediction is not ground truth"
    manifest, found = assemble_manifest([str(Path(case.rows[0]["uri"]).parent)], [str(place)])
    assert found.labels_from == f"{place} (activitynet)"
    labels = {
        Path(row.uri).name: {manifest.classes[label] for label in row.labels}
        for row in manifest.rows
        if row.labels
    }
    assert labels == {
        Path(row["uri"]).name: set(row["label_names"])
        for row in case.rows
        if row.get("label_names") and Path(row["uri"]).exists()
    }
    duration = round(case.rows[0]["duration_s"], 3)
    assert read_annotations(str(place)).of("right.mp4") == [(0.0, duration)]


def test_subsets_and_names_that_several_videos_have(tmp_path: Path) -> None:
    rows = []
    for number, (name, split) in enumerate(
        [("x/v_one.mp4", "train"), ("y/one.mkv", "val"), ("v_two.mp4", "odd")], 1
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        row = ok_row(number, make_video(path, 10), [0.7, 0.1, 0.1, 0.1], ["cook"])
        rows.append(row | {"split": split})
    rows.append(failed_row(4, "/a/three.mp4", "truncated", "too short") | {"label_names": ["swim"]})
    export_predictions(
        str(write_run(tmp_path / "run", rows)), str(tmp_path / "out"), ["activitynet"]
    )
    results = json.loads((tmp_path / "out" / "activitynet_results.json").read_text())["results"]
    assert set(results) == {video_id(1), video_id(2), "two"}
    known = json.loads((tmp_path / "out" / "activitynet_database.json").read_text())["database"]
    assert {key: video["subset"] for key, video in known.items()} == {
        video_id(1): "training",
        video_id(2): "validation",
        "two": "odd",
        "three": "",
    }


def test_without_known_labels_there_is_no_ground_truth(tmp_path: Path) -> None:
    row = failed_row(1, "/a/b.mp4", "truncated", "too short")
    summary = export_predictions(
        str(write_run(tmp_path / "run", [row])), str(tmp_path / "out"), ["activitynet"]
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["activitynet_results.json"]
    assert summary.files == 1
    assert json.loads((tmp_path / "out" / "activitynet_results.json").read_text())["results"] == {}


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ([], {"frames", "labels.csv", "labels.jsonl"}),
        (["--no-frames"], {"labels.csv", "labels.jsonl"}),
        (["--format", "activitynet"], {"activitynet_results.json"}),
        (["--format", "activitynet", "--frames"], {"activitynet_results.json", "frames"}),
        (
            ["--format", "openai-batch", "--format", "labels", "--batch-model", "m"],
            {"labels.csv", "labels.jsonl", "openai_batch_0001.jsonl", "openai_batch_videos.csv"},
        ),
    ],
)
def test_formats_of_the_command(tmp_path: Path, options: list[str], files: set[str]) -> None:
    row = ok_row(1, make_video(tmp_path / "a.mp4", 10), [0.7, 0.1, 0.1, 0.1])
    run = write_run(tmp_path / "run", [row])
    out = tmp_path / "out"
    assert cli.main(["export", str(run), "--out", str(out), "--size", "48", *options]) == 0
    assert {path.name for path in out.iterdir()} == files
