"""The main path, command by command, on local folders and on a real S3 server.

index, extract, finetune, train, score, report.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score
from support.archive import CLASSES, Archive, make_archive, write_clip
from support.bundle import make_bundle
from support.cluster import (
    BUDGET,
    NUM_FRAMES,
    Chain,
    Chains,
    read_rows,
    refused,
    tsq,
    upload,
    visible_parts,
)
from support.features import same_features
from support.scrape import counters_of, scraped, wait_for_counters

from tsq_ray import schema, storage
from tsq_ray.model.baselines import uniform
from tsq_ray.runtime.metrics import PublishedPart, RunMetrics

pytestmark = pytest.mark.ray

INPUTS, OK, FAILED = 18, 15, 3
BY_TYPE = {"not_video": 2, "truncated": 1}
TIMES = ["decode_ms", "sample_ms", "recognize_ms"]


@pytest.fixture(scope="module", params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def chain(request: pytest.FixtureRequest, chains: Chains) -> Chain:
    return chains(request.param)


@pytest.fixture(scope="module")
def local(chains: Chains) -> Chain:
    return chains("local")


def relative(chain: Chain, uri: str) -> str:
    """A video's path in the archive."""
    return uri.removeprefix(f"{chain.base}/videos/")


def state_of(uri: str) -> dict[str, Any]:
    """What shows that a folder's files were not written again."""
    return {file.uri: (file.size_bytes, file.modified) for file in storage.walk(uri)} | {
        file.uri: (file.size_bytes, file.modified) for file in storage.list_folder(uri)
    }


def test_index(chain: Chain) -> None:
    table = pq.read_table(pa.BufferReader(storage.read_bytes(chain.manifest)))
    found = chain.outputs["index"]
    assert (found["videos"], found["labelled"], found["unlabelled"], found["new"]) == (
        INPUTS,
        INPUTS - 1,
        1,
        INPUTS,
    )
    assert (found["splits"], found["left_out"], found["missing"]) == (
        {"train": 12, "val": 5, "(none)": 1},
        {".csv": 1},
        [],
    )
    assert table.schema.equals(schema.manifest_schema(CLASSES))
    assert json.loads(table.schema.metadata[b"tsq.classes"]) == CLASSES
    rows = table.to_pylist()
    assert sorted(relative(chain, row["uri"]) for row in rows) == chain.archive.paths
    for row in rows:
        path = relative(chain, row["uri"])
        assert row["video_id"] == hashlib.sha256(row["uri"].encode()).hexdigest()[:16]
        assert row["size_bytes"] == (chain.archive.root / path).stat().st_size
        assert (row["etag"] is None) == storage.is_local(chain.base)
        assert row["modified"].tzinfo is not None
        assert row["labels"] == (
            [CLASSES.index(chain.archive.labels[path])] if path in chain.archive.labels else None
        )
        assert row["split"] == chain.archive.splits.get(path)


def test_finetune(chain: Chain) -> None:
    check_finetuned(chain.encoder, chain.outputs["encoder"], "encoder")


@pytest.mark.slow
def test_finetune_of_a_recognizer(chain: Chain) -> None:
    place = chain.at("finetuned")
    options = ["--role", "recognizer", "--config", str(chain.settings), "--json"]
    found = tsq("finetune", chain.manifest, "--out", place, *options).json
    check_finetuned(place, found, "recognizer")


def check_finetuned(place: str, found: dict[str, Any], role: str) -> None:
    assert (found["videos"], found["classes"], found["failed"]) == (
        10,
        3,
        {"truncated": 1, "not_video": 1},
    )
    assert found["left_out"] == {"other_split": 6}
    assert found["train_accuracy"] >= 0.9
    settings = json.loads(storage.read_bytes(f"{place}/finetune.json"))
    assert (settings["role"], settings["classes"], settings["task"]) == (role, CLASSES, "single")
    assert [storage.name_of(file.uri) for file in storage.list_folder(place)] == [
        "finetune.json",
        "model.safetensors",
    ]


def test_extract(chain: Chain) -> None:
    table = read_rows(chain.features)
    counts = chain.outputs["extract"]["counts"]
    assert (counts["inputs"], counts["ok"], counts["failed"], counts["skipped"]) == (
        INPUTS,
        OK,
        FAILED,
        0,
    )
    assert counts["failed_by_type"] == BY_TYPE
    dim = table.schema.field("visual").type.shape[1]
    assert table.schema.equals(schema.features_schema(NUM_FRAMES, dim, CLASSES, len(CLASSES)))
    shapes = json.loads(table.schema.metadata[b"tsq.shapes"])
    assert shapes["visual"] == [NUM_FRAMES, dim]
    assert shapes["object_ids"] == [NUM_FRAMES, 10]
    assert shapes["recognizer_logits"] == [NUM_FRAMES, len(CLASSES)]
    for row in table.to_pylist():
        path = relative(chain, row["uri"])
        assert (row["status"], row["error_type"]) == (
            ("failed", chain.archive.bad[path]) if path in chain.archive.bad else ("ok", None)
        )
        tensors = [name for name in shapes if row[name] is None]
        assert tensors == (list(shapes) if path in chain.archive.bad else [])
        assert bool(row["error_message"]) == (path in chain.archive.bad)


def test_features_hold_what_they_should(chain: Chain) -> None:
    table = read_rows(chain.features)
    ok = table.filter(pa.compute.equal(table["status"], "ok"))
    index, pts = (schema.tensor_to_numpy(ok[name]) for name in ("frame_index", "frame_pts_s"))
    for row, numbers, times in zip(ok.to_pylist(), index, pts, strict=True):
        if row["source_num_frames"] == 1:
            assert numbers.tolist() == [0] * NUM_FRAMES
            continue
        assert (row["source_num_frames"], row["fps"], row["codec"]) == (24, 8.0, "h264")
        assert row["duration_s"] == pytest.approx(3.0)
        assert numbers.tolist() == [1, 4, 7, 10, 13, 16, 19, 22]  # (i + 0.5) / 8 of 24 frames
        assert times == pytest.approx(numbers / 8)
    shape = {relative(chain, row["uri"]): (row["width"], row["height"]) for row in ok.to_pylist()}
    assert shape.pop("val/portrait.mp4") == (48, 128)
    assert set(shape.values()) == {(96, 64)}
    probs, ids = (
        schema.tensor_to_numpy(ok["object_probs"]),
        schema.tensor_to_numpy(ok["object_ids"]),
    )
    assert (np.diff(probs.astype(np.float32), axis=2) <= 0).all()
    assert ids.min() >= 0
    assert ids.max() < 1000
    assert np.isfinite(schema.tensor_to_numpy(ok["visual"])).all()


@pytest.mark.parametrize("kind", ["features", "predictions"])
def test_read_without_this_package(chain: Chain, kind: str, tmp_path: Path) -> None:
    uri = getattr(chain, kind)
    for name in visible_parts(uri):
        (tmp_path / name).write_bytes(storage.read_bytes(f"{uri}/{name}"))
    table = read_rows(uri)
    tensor = "visual" if kind == "features" else "scores"
    frame = pd.concat([pd.read_parquet(path) for path in tmp_path.iterdir()]).sort_values(
        "video_id"
    )
    assert frame["video_id"].tolist() == table["video_id"].to_pylist()
    assert frame[tensor].isna().sum() == FAILED
    query = (
        f"select video_id, status, error_type, size_bytes, warnings, {tensor} from "
        f"read_parquet('{tmp_path}/part-*.parquet') order by 1"
    )
    rows = duckdb.sql(query).fetchall()
    wanted = table.select(
        ["video_id", "status", "error_type", "size_bytes", "warnings", tensor]
    ).to_pylist()
    assert len(rows) == INPUTS
    for found, row, again in zip(rows, wanted, frame[tensor].tolist(), strict=True):
        *plain, values = row.values()
        assert list(found[:5]) == plain
        if values is None:
            assert found[5] is None
        else:
            assert np.allclose(np.asarray(found[5], np.float32), np.asarray(values, np.float32))
            assert np.allclose(np.asarray(again, np.float32), np.asarray(values, np.float32))


def test_train(chain: Chain) -> None:
    place, found = chain.bundle, chain.outputs["train"]
    assert (found["videos"], found["classes"], found["epochs"]) == (10, 3, 4)
    assert found["workers"] == 2
    assert found["left_out"] == {"other_split": 6, "failed": 2}
    assert found["losses"].keys() == {"loss", "visual", "textual", "t2v", "v2t"}
    settings = json.loads(storage.read_bytes(f"{place}/bundle.json"))
    assert (settings["format"], settings["task"], settings["classes"]) == (1, "single", CLASSES)
    assert settings["config"]["decode"]["num_frames"] == NUM_FRAMES
    assert settings["files"].keys() == {"sampler", "encoder", "objects", "text", "recognizer"}
    for name, digest in settings["files"].items():
        assert (
            hashlib.sha256(storage.read_bytes(f"{place}/{name}.safetensors")).hexdigest() == digest
        )
    assert len(storage.read_text(f"{place}/curves.csv").splitlines()) == 1 + 4
    fs, path = storage.filesystem(place)
    assert not [name for name in fs.find(path) if "_train" in name], (
        "checkpoints are of no use beside the finished bundle"
    )


def test_score(chain: Chain) -> None:
    table = read_rows(chain.predictions)
    run = chain.outputs["score"]
    counts = run["counts"]
    assert (counts["inputs"], counts["ok"], counts["failed"], counts["skipped"]) == (
        INPUTS,
        OK,
        FAILED,
        0,
    )
    assert counts["failed_by_type"] == BY_TYPE
    assert table.schema.equals(schema.predictions_schema(NUM_FRAMES, len(CLASSES), CLASSES))
    assert (
        run["bundle_classes"],
        run["metrics"]["labelled"],
        run["metrics"]["unknown_labels"],
    ) == (CLASSES, OK - 1, [])
    assert [losses["epoch"] for losses in run["training_curve"]] == [1, 2, 3, 4], (
        "the report shows how the bundle was trained"
    )
    labelled = [row for row in table.to_pylist() if row["label_names"] and row["status"] == "ok"]
    right = [row["top_labels"][0] in row["label_names"] for row in labelled]
    assert run["metrics"]["top1"] == pytest.approx(np.mean(right), abs=1e-4)
    targets = np.array([[name in row["label_names"] for name in CLASSES] for row in labelled])
    expected = average_precision_score(
        targets, np.array([row["scores"] for row in labelled]), average="macro"
    )
    assert run["metrics"]["mAP"] == pytest.approx(expected, abs=1e-4)
    for row in table.to_pylist():
        path = relative(chain, row["uri"])
        label = chain.archive.labels.get(path)
        assert row["label_names"] == ([label] if label else None)
        if path in chain.archive.bad:
            assert (row["error_type"], row["top_labels"], row["scores"]) == (
                chain.archive.bad[path],
                None,
                None,
            )
        else:
            check_prediction(row)


def check_prediction(row: dict[str, Any]) -> None:
    """What holds for every ok row of the sampler."""
    scores = np.array(row["scores"])
    assert scores.sum() == pytest.approx(1, abs=1e-5)
    assert row["top_labels"] == [CLASSES[number] for number in np.argsort(-scores, kind="stable")]
    assert row["top_scores"] == pytest.approx(sorted(scores, reverse=True))
    slots = row["selected_slot"]
    assert len(slots) == min(BUDGET, row["source_num_frames"])
    assert slots == sorted(set(slots))
    assert 0 <= slots[0] <= slots[-1] < NUM_FRAMES
    assert row["selected_pts_s"] == pytest.approx([row["frame_pts_s"][slot] for slot in slots])
    assert len(set(row["selected_index"])) == len(slots)
    assert set(row["selected_by"]) <= {"visual", "textual"}
    assert len(row["selected_by"]) == len(slots)
    for name in ("saliency_visual", "saliency_textual"):
        assert len(row[name]) == NUM_FRAMES
        assert min(row[name]) >= 0
    assert all(row[name] > 0 for name in TIMES)


@pytest.mark.parametrize("kind", ["features", "predictions"])
def test_verify(chain: Chain, kind: str) -> None:
    found = tsq("verify", getattr(chain, kind), "--json").json
    assert (found["kind"], found["problems"], found["counts"]["inputs"]) == (kind, [], INPUTS)
    assert "manifest" in found["checks"]


def test_verify_finds_a_lost_and_a_duplicate_part(local: Chain, tmp_path: Path) -> None:
    names = sorted(visible_parts(local.features))
    for name in [*names, "_run.json", "_config.json"]:
        (tmp_path / name).write_bytes(Path(local.features, name).read_bytes())
    (tmp_path / names[0]).unlink()
    lost = tsq("verify", tmp_path)
    assert lost.code == 1
    assert f"{names[0]}: listed in _run.json but missing" in lost.out
    (tmp_path / names[0]).write_bytes((tmp_path / names[1]).read_bytes())
    double = tsq("verify", tmp_path)
    assert double.code == 1
    assert "its name does not match the videos in it" in double.out


def test_predict_agrees_with_score(chain: Chain) -> None:
    rows = {relative(chain, row["uri"]): row for row in read_rows(chain.predictions).to_pylist()}
    paths = ["train/1_0.mp4", "val/portrait.mp4", "train/one_frame.mp4", "train/cut.mp4"]
    found = tsq(
        "predict",
        *(f"{chain.base}/videos/{path}" for path in paths),
        "--model",
        chain.bundle,
        "--json",
    ).json["videos"]
    for path, answer in zip(paths, found, strict=True):
        row = rows[path]
        for name in (
            "video_id",
            "uri",
            "status",
            "error_type",
            "error_message",
            "selected_slot",
            "selected_by",
            "top_labels",
            "codec",
        ):
            assert answer.get(name) == row[name], name
        if row["status"] == "ok":
            for name in ("scores", "top_scores", "saliency_visual", "saliency_textual"):
                assert answer[name] == pytest.approx(row[name], abs=1e-4), name


def test_report(chain: Chain) -> None:
    out = chain.at("report.html")
    found = tsq("report", chain.predictions, "--out", out, "--json").json
    assert (found["inputs"], found["ok"], found["failed"], found["skipped"], found["adds_up"]) == (
        INPUTS,
        OK,
        FAILED,
        0,
        True,
    )
    assert found["failures"] == BY_TYPE
    assert (found["judged"], found["shown"], found["without_pictures"]) == (OK - 1, INPUTS, 0)
    measured = chain.outputs["score"]["metrics"]
    assert (found["map"], found["top1"]) == (
        pytest.approx(measured["mAP"], abs=1e-3),
        pytest.approx(measured["top1"], abs=1e-3),
    )
    page = storage.read_text(out)
    assert page.count('<article class="card') == INPUTS
    assert page.count("data:image/") > OK
    assert page.count('<polyline class="line t2v"') == 1
    assert 'src="http' not in page


def test_export(chain: Chain) -> None:
    out = chain.at("export")
    found = tsq("export", chain.predictions, "--out", out, "--json").json
    rows = {row["video_id"]: row for row in read_rows(chain.predictions).to_pylist()}
    chosen = sum(len(row["selected_slot"] or ()) for row in rows.values())
    assert (found["videos"], found["failed"], found["frames"], found["frames_missing"]) == (
        INPUTS,
        FAILED,
        chosen,
        {},
    )
    lines = list(csv.DictReader(io.StringIO(storage.read_text(f"{out}/labels.csv"))))
    assert {line["video_id"] for line in lines} == rows.keys()
    assert all(
        line["label_1"] == (rows[line["video_id"]]["top_labels"] or [""])[0] for line in lines
    )
    some = next(row for row in rows.values() if row["status"] == "ok" and row["width"] == 48)
    pictures = [file.uri for file in storage.list_folder(f"{out}/frames/{some['video_id']}")]
    assert len(pictures) == BUDGET
    with Image.open(io.BytesIO(storage.read_bytes(pictures[0]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (48, 128))


def test_export_for_other_tools_and_labels_that_come_back(chain: Chain) -> None:
    out = chain.at("tools")
    formats = ("openai-batch", "label-studio", "activitynet")
    options = [word for name in formats for word in ("--format", name)]
    found = tsq(
        *("export", chain.predictions, "--out", out, "--batch-model", "m", "--json", *options)
    ).json
    assert (found["videos"], found["failed"], found["requests"], found["frames"]) == (
        INPUTS,
        FAILED,
        OK,
        0,
    )
    rows = {row["video_id"]: row for row in read_rows(chain.predictions).to_pylist()}
    lines = storage.read_text(f"{out}/openai_batch_0001.jsonl").splitlines()
    assert {json.loads(line)["custom_id"] for line in lines} == {
        video for video, row in rows.items() if row["status"] == "ok"
    }
    results = json.loads(storage.read_text(f"{out}/activitynet_results.json"))["results"]
    assert len(results) == OK
    tasks = json.loads(storage.read_text(f"{out}/label_studio_tasks.json"))
    corrected = []
    for number, task in enumerate(tasks):
        (prediction,) = task["predictions"]
        choice = prediction["result"][0] | {"value": {"choices": [CLASSES[number % 3]]}}
        annotation = {
            "result": [choice],
            "was_cancelled": number == 3,
            "updated_at": "2026-03-01T10:00:05.123456Z",
        }
        corrected.append({"id": number, "data": task["data"], "annotations": [annotation]})
    export = f"{out}/project.json"
    storage.write_bytes(export, json.dumps(corrected).encode())
    manifest = f"{out}/manifest.parquet"
    indexed = tsq(
        *("index", f"{chain.base}/videos", "--out", manifest, "--labels", export, "--json")
    ).json
    assert (indexed["labelled"], indexed["unlabelled"], indexed["missing"]) == (
        OK - 1,
        FAILED + 1,
        [],
    )
    labels = {
        row["uri"]: row["labels"]
        for row in pq.read_table(pa.BufferReader(storage.read_bytes(manifest))).to_pylist()
    }
    for number, task in enumerate(tasks):
        wanted = None if number == 3 else [number % 3]
        assert labels[task["data"]["uri"]] == wanted


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("manifest", "manifest"),
        ("recognizer", "classifier (finetune)"),
        ("features", "features"),
        ("bundle", "bundle"),
        ("predictions", "predictions"),
    ],
)
def test_info(chain: Chain, name: str, kind: str) -> None:
    found = tsq("info", getattr(chain, name), "--json").json
    assert (found["kind"], found["uri"]) == (kind, getattr(chain, name))
    if kind == "manifest":
        assert found["videos_by_class"] == {CLASSES[0]: 5, CLASSES[1]: 5, CLASSES[2]: 7}
    if kind == "bundle":
        field = found["gflops"]["field"]
        assert field["total"] == pytest.approx(
            sum(value for row, value in field.items() if row != "total"), abs=1e-3
        )


def test_running_again_does_nothing(chain: Chain) -> None:
    folders = [chain.encoder, chain.features, chain.bundle, chain.predictions]
    before = [state_of(folder) for folder in folders]
    settings = str(chain.settings)
    encoder = tsq(
        "finetune",
        chain.manifest,
        "--role",
        "encoder",
        "--out",
        chain.encoder,
        "--config",
        settings,
        "--json",
    ).json
    extract = tsq(
        "extract", chain.manifest, "--out", chain.features, *chain.extract_options, "--json"
    ).json
    train = ["train", chain.features, "--out", chain.bundle, *chain.train_options]
    bundle = tsq(*train, "--json").json
    score = tsq(
        "score", chain.manifest, "--model", chain.bundle, "--out", chain.predictions, "--json"
    ).json
    assert encoder == chain.outputs["encoder"] | {
        "already_done": True,
        "seconds": encoder["seconds"],
    }
    assert bundle["already_done"]
    assert (extract, score) == tuple(
        chain.outputs[name] | {"videos_done_now": 0, "already_done": True}
        for name in ("extract", "score")
    )
    dry_extract = tsq(
        "extract", chain.manifest, "--out", chain.features, *chain.extract_options, "--dry-run"
    )
    dry_score = tsq(
        "score", chain.manifest, "--model", chain.bundle, "--out", chain.predictions, "--dry-run"
    )
    assert [run.out for run in (dry_extract, dry_score)] == [
        "to do: 0 of 18 videos, 0.0 MB to read\n"
    ] * 2
    assert [state_of(folder) for folder in folders] == before


def test_index_does_not_overwrite(chain: Chain) -> None:
    again = tsq("index", chain.at("videos"), "--out", chain.manifest)
    assert "already exists; add --update" in refused(again)


@pytest.mark.parametrize(
    ("command", "change", "key"),
    [
        ("extract", "decode.num_frames=9", r"decode\.num_frames: 8 there, 9 now"),
        ("extract", "encoders.objects.weights=random:7", r"weights\.objects: "),
        ("extract", "encoders.objects.size=64", r"encoders\.objects\.size: 32 there, 64 now"),
        ("train", "train.epochs=5", r"train\.epochs: 4 there, 5 now"),
        ("train", "decode.num_frames=9", r"decode\.num_frames: 8 in the features, 9 asked for"),
        ("score", "sampler.budget=2", r"sampler\.budget: 3 there, 2 now"),
        ("score", "decode.num_frames=9", r"decode\.num_frames: 8 in the bundle, 9 asked for"),
        ("finetune", "finetune.head.epochs=7", "holds another finetune"),
    ],
)
def test_another_configuration_is_refused(
    local: Chain, command: str, change: str, key: str
) -> None:
    argv = {
        "extract": ["extract", local.manifest, "--out", local.features, *local.extract_options],
        "train": ["train", local.features, "--out", local.bundle, *local.train_options],
        "score": ["score", local.manifest, "--model", local.bundle, "--out", local.predictions],
        "finetune": [
            "finetune",
            local.manifest,
            "--role",
            "encoder",
            "--out",
            local.encoder,
            "--config",
            str(local.settings),
        ],
    }[command]
    if command == "score":
        assert local.predictions
    if command == "train":
        assert local.bundle
    assert re.search(key, refused(tsq(*argv, "--set", change)))


def test_another_model_over_the_same_archive_takes_another_folder(
    local: Chain, tmp_path: Path
) -> None:
    before = state_of(local.predictions)
    other = make_bundle(tmp_path / "bundle")
    said = refused(tsq("score", local.manifest, "--model", other, "--out", local.predictions))
    assert re.search(r"made with another configuration \(model_sha256: .* there, .* now", said)
    assert state_of(local.predictions) == before


# no sampler, and a choice by the recogniser: the other two paths through the graph
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["uniform", "maxconf"])
def test_baselines_score(local: Chain, mode: str) -> None:
    out = local.at(f"predictions-{mode}")
    scores = "top" if mode == "uniform" else "all"
    argv = [
        "score",
        local.manifest,
        "--model",
        local.bundle,
        "--out",
        out,
        "--split",
        "val",
        "--scores",
        scores,
    ]
    run = tsq(*argv, "--set", f"sampler.mode={mode}", "--json").json
    assert (run["counts"]["ok"], run["counts"]["failed"], run["counts"]["skipped_by"]) == (
        4,
        1,
        {"split": 13, "limit": 0},
    )
    table = read_rows(out)
    assert ("scores" in table.column_names, "mAP" in run["metrics"]) == (
        (False, False) if scores == "top" else (True, True)
    )
    assert tsq("verify", out, "--json").json["problems"] == []
    ok = [row for row in table.to_pylist() if row["status"] == "ok"]
    for row in ok:
        check_choice(row, mode)
        if mode == "uniform":
            assert (
                row["selected_slot"]
                == uniform(np.arange(NUM_FRAMES), BUDGET).slots.tolist()
                == [1, 4, 6]
            )
    if mode == "maxconf":  # the middle third shows the class: a sure recogniser looks there
        assert np.mean([2 < slot < 6 for row in ok for slot in row["selected_slot"]]) > 0.5
        # the colours are easy: a lower score means that labels or frames are mixed up. What a
        # sampler finds after learning from ten videos depends on their order
        assert run["metrics"]["top1"] >= 0.75
        assert run["metrics"]["mAP"] >= 0.75


@pytest.mark.parametrize("mode", ["random", "maxconf-l", "visual", "textual"])
def test_every_sampler_predicts(local: Chain, mode: str) -> None:
    videos = [f"{local.base}/videos/train/{name}" for name in ("0_0.mp4", "1_0.mp4")]
    found = tsq(
        "predict", *videos, "--model", local.bundle, "--set", f"sampler.mode={mode}", "--json"
    ).json["videos"]
    assert len(found) == len(videos)
    for row in found:
        check_choice(row, mode)


def check_choice(row: dict[str, Any], mode: str) -> None:
    assert (len(row["selected_slot"]), len(row["top_labels"])) == (BUDGET, len(CLASSES))
    assert row["selected_by"] == [mode] * BUDGET
    assert (row.get("saliency_visual") is None) == (mode not in ("visual", "textual"))
    assert (row.get("saliency_textual") is None) == (mode != "textual")


@pytest.mark.slow
def test_limit_split_retry_and_max_failed(local: Chain, tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "videos", train=1, val=1, odd=False)
    (archive.root / "train/zero.mp4").write_bytes(b"")
    manifest, out = tmp_path / "m.parquet", tmp_path / "features"
    assert (
        tsq("index", archive.root, "--labels", archive.root / "labels.csv", "--out", manifest).code
        == 0
    )
    away = (archive.root / "val/0_1.mp4").rename(tmp_path / "away.mp4")

    def extract(*more: str) -> dict[str, Any]:
        return tsq(
            "extract", manifest, "--out", out, "--config", local.settings, *more, "--json"
        ).json

    part = ("--split", "val", "--limit", "2")
    run = extract(*part)
    assert run["counts"]["skipped_by"] == {"split": 4, "limit": 1}
    assert (run["counts"]["ok"], run["counts"]["failed_by_type"], run["videos_done_now"]) == (
        1,
        {"not_found": 1},
        2,
    )
    away.rename(archive.root / "val/0_1.mp4")
    again = run | {"videos_done_now": 0, "already_done": True}
    assert extract(*part) == again, "a failed video is left alone until it is asked for"
    run = extract("--retry-failed", "not_found")
    assert (run["counts"]["ok"], run["counts"]["skipped"], run["videos_done_now"]) == (6, 0, 6)
    assert run["counts"]["failed_by_type"] == {"not_video": 1}
    assert tsq("verify", out, "--json").json["problems"] == []
    too_many = tsq(
        "extract", manifest, "--out", out, "--config", local.settings, "--max-failed", "0.1"
    )
    assert (too_many.code, too_many.err) == (
        1,
        "error: 1 of 7 videos failed, above --max-failed 0.1\n",
    )
    assert (
        tsq(
            "extract", manifest, "--out", out, "--config", local.settings, "--max-failed", "0.2"
        ).code
        == 0
    )
    wrong = tsq(
        "extract", manifest, "--out", out, "--config", local.settings, "--retry-failed=bad_luck"
    )
    assert "--retry-failed bad_luck: no such reason; allowed: not_found, " in refused(wrong)
    assert "--split tset: no video has it; splits: (none) (1), train (3), val (3)" in refused(
        tsq("extract", manifest, "--out", out, "--config", local.settings, "--split", "tset")
    )


def changed_archive(archive: Archive, put: Callable[[str, bytes | None], None]) -> None:
    """One video changed, one deleted, one added."""
    put(
        "train/0_0.mp4",
        write_clip(archive.root / "train/0_0.mp4", CLASSES[0], seed=70, num_frames=30).read_bytes(),
    )
    put("train/1_0.mp4", None)
    archive.add("train/new.mp4", CLASSES[2], "train", seed=71)
    put("train/new.mp4", (archive.root / "train/new.mp4").read_bytes())
    del archive.labels["train/1_0.mp4"]
    put("labels.csv", archive.write_labels().read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "s3"])
def test_update_replaces_removes_and_adds_rows(chains: Chains, where: str, tmp_path: Path) -> None:
    update_archive(chains, where, tmp_path)


@pytest.mark.slow
def test_an_updated_archive_is_scored(chains: Chains, tmp_path: Path) -> None:
    base, videos = update_archive(chains, "s3", tmp_path)
    manifest, out = f"{base}/m.parquet", f"{base}/predictions"
    score = ["score", manifest, "--model", chains("local").bundle, "--out", out, "--json"]
    assert tsq(*score).json["counts"]["ok"] == 6
    assert {row["uri"] for row in read_rows(out).to_pylist()} == videos
    assert tsq("verify", out, "--json").json["problems"] == []


def update_archive(chains: Chains, where: str, folder: Path) -> tuple[str, set[str]]:
    """Extract an archive, change it and extract again; return its place and its videos."""
    archive = make_archive(folder / "videos", train=1, val=1, odd=False)
    base = str(folder) if where == "local" else f"s3://tsq-other/{folder.name}"
    if where == "s3":
        upload(archive.root, f"{base}/videos")
    manifest, out = f"{base}/m.parquet", f"{base}/features"
    index = [
        "index",
        f"{base}/videos",
        "--labels",
        f"{base}/videos/labels.csv",
        "--out",
        manifest,
        "--json",
    ]
    extract = ["extract", manifest, "--out", out, "--config", str(chains.settings), "--json"]
    assert tsq(*index).json["new"] == 6
    assert tsq(*extract).json["counts"]["ok"] == 6
    before = {row["uri"]: row for row in read_rows(out).to_pylist()}

    def put(path: str, content: bytes | None) -> None:
        uri = f"{base}/videos/{path}"
        storage.write_bytes(uri, content) if content is not None else storage.remove(uri)

    changed_archive(archive, put)
    found = tsq(*index, "--update").json
    assert {name: found[name] for name in ("new", "changed", "deleted", "unchanged")} == {
        "new": 1,
        "changed": 1,
        "deleted": 1,
        "unchanged": 4,
    }
    run = tsq(*extract).json
    assert (run["counts"]["inputs"], run["counts"]["ok"], run["videos_done_now"]) == (6, 6, 2)
    after = {row["uri"]: row for row in read_rows(out).to_pylist()}
    gone, new, other = (f"{base}/videos/train/{name}.mp4" for name in ("1_0", "new", "0_0"))
    assert after.keys() - before.keys() == {new}
    assert before.keys() - after.keys() == {gone}
    assert (before[other]["source_num_frames"], after[other]["source_num_frames"]) == (24, 30)
    assert {uri for uri in before.keys() & after.keys() if before[uri] != after[uri]} == {other}
    assert tsq("verify", out, "--json").json["problems"] == []
    return base, set(after)


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["decoder", "device"])
def test_separate_decoding_gives_the_same_features(local: Chain, resize: str) -> None:
    out = local.at(f"features-apart-{resize}")
    sets = ("--set", "resources.decoders=1", "--set", f"resources.resize={resize}")
    run = tsq("extract", local.manifest, "--out", out, *local.extract_options, *sets, "--json").json
    assert run["counts"] == local.outputs["extract"]["counts"]
    tolerance = 2e-3 if resize == "decoder" else 2e-2
    same_features(read_rows(out), read_rows(local.features), tolerance)


def metrics_url(ray: Any) -> str:
    (node,) = ray.nodes()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


@pytest.mark.parametrize("run", ["features", "predictions"])
def test_the_counters_of_a_run_equal_its_rows(ray_cluster: Any, chain: Chain, run: str) -> None:
    out = getattr(chain, run)
    record = json.loads(storage.read_bytes(f"{out}/_run.json"))
    expected = counters_of(read_rows(out), len(record["parts"]))
    expected |= {
        f"seconds {step}": pytest.approx(seconds, abs=0.01)
        for step, seconds in record["stage_seconds"].items()
    }
    if chain.base.startswith("s3:"):  # whole files, by decode.strategy = uniform
        rows = read_rows(out)
        ok = rows.filter(pa.compute.equal(rows["status"], "ok"))
        expected["fetched_bytes"] = pa.compute.sum(ok["size_bytes"]).as_py()
    wait_for_counters(metrics_url(ray_cluster), record["run_id"], expected)


@pytest.mark.parametrize("stage", ["finetune", "train"])
def test_a_training_exports_how_it_ended(ray_cluster: Any, chain: Chain, stage: str) -> None:
    assert chain.bundle
    deadline = time.monotonic() + 60
    while not any(
        line.startswith("ray_tsq_run_ended_total{")
        for line in scraped(metrics_url(ray_cluster), stage=stage, status="complete")
    ):
        assert time.monotonic() < deadline
        time.sleep(1)


def test_dashboard_and_alerts_use_metrics_of_runs_that_exist(ray_cluster: Any) -> None:
    monitoring = Path(__file__).parents[2] / "cluster" / "monitoring"
    texts = [file.read_text() for file in monitoring.iterdir()]
    used = {name for text in texts for name in re.findall(r"ray_tsq_run_[a-z_]+", text)}
    assert len(used) >= 9
    metrics = RunMetrics("a-run", "extract", "a process")
    metrics.published(PublishedPart({"": 3, "corrupt": 1}, 1000, 900, {"decode": 2.0}))
    metrics.end("complete")
    deadline = time.monotonic() + 60
    while missing := used - {
        line.partition("{")[0] for line in scraped(metrics_url(ray_cluster), run="a-run")
    }:
        assert time.monotonic() < deadline, missing
        metrics.update(0.0, time.time(), {"nodes_lost": 1})
        metrics.update_rows(5, 2, 1)
        time.sleep(1)
