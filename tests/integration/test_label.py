"""`tsq label`: an archive without labels, end to end, on local disks and S3, killed and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from support.archive import CLASSES, Archive, make_archive, write_clip
from support.bundle import make_bundle, make_recognizer
from support.cluster import SETTINGS, Driver, read_rows, refused, tsq, upload, visible_parts

from jobs.benchmarks.support.s3 import S3Server
from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import is_bundle, read_agreement, read_bundle_settings
from tsq_ray.bundle.weights import load_bundle
from tsq_ray.config import SamplerConfig
from tsq_ray.evaluation.agreement import measure_agreement
from tsq_ray.evaluation.videos import load_features
from tsq_ray.reporting.agreement import verdict

pytestmark = pytest.mark.ray
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_recognizer(tmp_path_factory.mktemp("recognizer"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("archive") / "videos")


def settings_in(folder: Path) -> str:
    (folder / "settings.toml").write_text(f"{SETTINGS}\n")
    return str(folder / "settings.toml")


def command(source: str, recognizer: str, out: str, folder: Path, *more: str) -> list[str]:
    asked = ["label", source, "--recognizer", recognizer, "--out", out, "--sample", "18"]
    few = ["--set", "train.teacher_min_videos=1"]
    return [*asked, "--agreement", "0.7", "--config", settings_in(folder), *few, *more]


def check_folder(out: str, archive: Archive) -> None:
    """Every video has its row, and what was chosen is what the held-out videos say."""
    for run in ("features", "predictions"):
        assert tsq("verify", f"{out}/{run}", "--json").json["problems"] == []
    rows = read_rows(f"{out}/predictions").to_pylist()
    failed = [row for row in rows if row["status"] == "failed"]
    assert (len(rows), len(failed)) == (len(archive.paths), len(archive.bad))
    found = read_agreement(f"{out}/bundle")
    assert found is not None
    bundle = load_bundle(f"{out}/bundle")
    held_out = load_features(f"{out}/features", bundle, "val", labelled=False).measured
    assert found["videos"] == len(held_out)
    curve = measure_agreement(bundle, held_out, SamplerConfig(budget=3))
    enough = [one for one in curve if one.top1 >= 0.7]
    best = min(enough, key=lambda one: one.cost)
    assert (found["chosen"]["mode"], found["chosen"]["budget"]) == (best.mode, best.budget)
    run = json.loads(storage.read_text(f"{out}/predictions/_run.json"))
    sampler = run["config"]["sampler"]
    assert (sampler["mode"], sampler["budget"]) == (best.mode, best.budget)
    own = scoring_config(f"{out}/bundle").sampler
    assert (own.mode, own.budget) == (best.mode, best.budget), "scoring needs no --set"
    page = storage.read_text(f"{out}/report.html")
    assert "Agreement with the recogniser" in page
    assert "No video has a known label" in page
    assert f"<p>{escape(verdict(found))}.</p>" in page
    assert page.count('<tr class="chosen">') == 1
    assert run["agreement"] == found


@pytest.mark.slow
def test_an_archive_without_labels(
    ray_cluster: Any, archive: Archive, recognizer: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    argv = command(str(archive.root), recognizer, out, tmp_path)
    first = tsq(*argv, "--price", "cpu=2", "--json").json
    assert first["held_out"] <= 7
    assert first["predictions"]["counts"]["inputs"] == len(archive.paths)
    assert "held-out videos" in first["verdict"]
    assert first["chosen"] in first["curve"]
    assert first["training"]["videos"] > 0
    runs = [first[name]["record"]["used"] for name in ("features", "predictions")]
    runs.append(read_bundle_settings(f"{out}/bundle")[0]["provenance"]["summary"]["used"])
    assert first["used"]["cpu_hours"] == pytest.approx(sum(used["cpu_hours"] for used in runs))
    assert first["cost"]["total"] == pytest.approx(2 * first["used"]["cpu_hours"], rel=1e-3)
    check_folder(out, archive)
    few = ("--set", "evaluate.seeds=[0]", "--set", "evaluate.budgets=[1, 2]")
    tables = ("--table", "teacher", *few, "--out", f"{out}/tables")
    found = tsq("evaluate", f"{out}/features", "--model", f"{out}/bundle", *tables, "--json").json
    rows = {row["sampler"]: row for row in found["tables"]["teacher"]["rows"]}
    assert (rows["teacher"]["mAP"], "tsqnet" in rows) == ("-", False)
    assert rows["maxconf"]["agreement"] == "100.0"
    assert 0 <= float(rows["teacher"]["agreement"]) <= 100  # of nine videos it may learn nothing
    again = tsq(*argv)
    assert again.code == 0, again.err
    assert "already done: nothing to do" in again.out
    assert first["verdict"] in again.out
    assert "sample, training and archive together used " in again.out, (
        "by the calls that finished them"
    )
    assert any(line.endswith("  chosen") for line in again.out.splitlines())
    line = refused(tsq(*argv[:-6], "--sample", "17", *argv[-6:]))
    assert "holds another labelling (sample: " in line


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(("blue sea",), id="one video", marks=pytest.mark.slow),
        pytest.param(("blue sea", "green field"), id="two videos", marks=pytest.mark.slow),
        pytest.param(tuple(CLASSES), id="three videos", marks=pytest.mark.slow),
        pytest.param(("blue sea",) * 4, id="one class"),
    ],
)
def test_an_archive_that_cannot_teach(
    labels: tuple[str, ...], ray_cluster: Any, recognizer: str, tmp_path: Path
) -> None:
    for number, label in enumerate(labels):
        write_clip(tmp_path / "videos" / f"{number}.mp4", label, seed=number)
    out = str(tmp_path / "out")
    argv = command(str(tmp_path / "videos"), recognizer, out, tmp_path)
    argv[-1] = "train.teacher_min_videos=2"
    done = tsq(*argv, "--json").json
    assert "no sampler can be taught (" in done["verdict"]
    assert done["chosen"]["mode"] in ("uniform", "maxconf")
    assert (done["held_out"], done["training"]) == (len(labels), None)
    rows = read_rows(f"{out}/predictions").to_pylist()
    order = [row["top_labels"][0] for row in sorted(rows, key=lambda row: row["uri"])]
    assert order == list(labels)
    assert "no sampler can be taught (" in storage.read_text(f"{out}/report.html")
    again = tsq(*argv)
    assert again.code == 0, again.err
    assert "already done: nothing to do" in again.out
    score = ("score", f"{out}/manifest.parquet", "--model", f"{out}/bundle")
    line = refused(tsq(*score, "--out", f"{out}/2", "--set", "sampler.mode=both"))
    assert "the bundle's sampler was not taught" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--agreement", "0"), "--agreement 0: expected a share, above 0 and at most 1"),
        (("--agreement", "1.5"), "--agreement 1.5: expected a share"),
        (("--sample", "3"), "--sample 3: expected at least 10 videos"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    archive: Archive, recognizer: str, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    argv = command(str(archive.root), recognizer, str(tmp_path / "out"), tmp_path, *more)
    assert message in refused(tsq(*argv))
    assert not (tmp_path / "out").exists()


def test_a_bundle_is_no_recogniser(archive: Archive, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    argv = command(str(archive.root), bundle, str(tmp_path / "out"), tmp_path)
    assert "has no finetune.json; name what tsq finetune or import wrote" in refused(tsq(*argv))


@pytest.mark.slow
def test_the_quickstart_without_labels(tmp_path: Path) -> None:
    """In a copy of the checkout whose environment is this one; the folders are cameras."""
    copy = tmp_path / "checkout"
    for name in ("jobs", "tsq_ray"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pinned = [REPO / "pyproject.toml", REPO / "tests" / "constraints.txt"]
    programs = copy / ".venv" / "bin"
    for folder in (programs, copy / "tests"):
        folder.mkdir(parents=True)
    for file in pinned:
        shutil.copy(file, copy / file.relative_to(REPO))
    for name, argv in (("python", ""), ("tsq", "-m tsq_ray ")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {argv}"$@"\n')
        (programs / name).chmod(0o755)
    key = hashlib.sha256(sys.version.encode() + b"".join(map(Path.read_bytes, pinned))).hexdigest()
    (copy / ".venv" / ".installed-weights,evaluate").write_text(key)
    for number, label in enumerate([*CLASSES, *CLASSES]):
        camera = "left" if number < len(CLASSES) else "right"
        write_clip(tmp_path / "videos" / camera / f"{number}.mp4", label, seed=number)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        ["bash", str(copy / "jobs" / "quickstart.sh"), str(tmp_path / "videos")],
        env=environment | {"LABELS": "none", "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "import: a recogniser of the 1,000 classes" in done.stdout
    out = copy / "runs" / "videos-unlabelled"
    assert f"report: {out}/report.html" in done.stdout
    rows = read_rows(str(out / "predictions")).to_pylist()
    assert [(row["status"], row["labels"]) for row in rows] == [("ok", None)] * 6


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "s3"])
def test_killed_in_every_step(
    where: str, s3: S3Server, archive: Archive, recognizer: str, tmp_path: Path
) -> None:
    source, out = str(archive.root), str(tmp_path / "out")
    if where == "s3":
        at = "s3://tsq-chain/label"
        upload(archive.root, f"{at}/videos")
        upload(Path(recognizer), f"{at}/recognizer")
        source, recognizer, out = f"{at}/videos", f"{at}/recognizer", f"{at}/out"
    argv = command(source, recognizer, out, tmp_path, "--set", "train.epochs=40")
    moments = (
        lambda: bool(visible_parts(f"{out}/features")),
        lambda: storage.exists(f"{out}/bundle/_train/identity.json"),
        lambda: is_bundle(f"{out}/bundle"),
        lambda: bool(visible_parts(f"{out}/predictions")),
    )
    for number, moment in enumerate(moments):
        with Driver(argv, tmp_path / f"run{number}") as driver:
            driver.kill_when(moment, timeout_s=400)
    with Driver(argv, tmp_path / "last") as driver:
        ended = driver.ended(timeout_s=400)
    assert ended.code == 0, ended.err
    check_folder(out, archive)
