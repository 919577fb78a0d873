"""A run that the cluster refuses leaves nothing in `--out`, so that another may use the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.archive import CLASSES
from support.bundle import make_bundle, make_recognizer
from support.evaluate import make_case

from tsq_ray.config import Config, load_config
from tsq_ray.errors import RunError
from tsq_ray.evaluation import evaluate, evaluation_config
from tsq_ray.extraction import extract
from tsq_ray.labelling import label
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, video_id, write_manifest
from tsq_ray.runtime import cluster
from tsq_ray.runtime.session import Session
from tsq_ray.scoring import score
from tsq_ray.training import finetune, train, training_config

JOINED = Session("auto")
SMALL = (
    *("train.modules=visual", "encoders.visual.model=test_efficientnet"),
    *("encoders.visual.weights=random:0", "encoders.visual.size=32"),
    *("recognizer.model=test_resnet", "recognizer.weights=random:2", "recognizer.size=32"),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a manifest of labelled videos; every cluster refuses the run."""

    def refuse(*arguments: object, **options: object) -> None:
        raise RunError("a path of this machine")

    monkeypatch.setattr(cluster, "connect", refuse)
    uris = [f"/videos/{number}.mp4" for number in range(6)]
    rows = VideoRows.of(
        VideoRef(video_id(uri), uri, 9, labels=(number % len(CLASSES),), split="train")
        for number, uri in enumerate(uris)
    )
    write_manifest(Manifest(rows, CLASSES, "m", ("/videos",)), str(tmp_path / "m.parquet"))
    return tmp_path


def _config(*sets: str) -> Config:
    return load_config(None, [*SMALL, *sets])


def _extract(place: Path, out: str) -> None:
    config = _config("encoders.objects.weights=random:1", "encoders.objects.size=32")
    extract(f"{place}/m.parquet", out, config, session=JOINED)


def _finetune(place: Path, out: str, *sets: str) -> None:
    finetune(f"{place}/m.parquet", "encoder", out, _config(*sets), session=JOINED)


def _finetune_whole(place: Path, out: str) -> None:
    _finetune(place, out, "finetune.backbone=trained")


def _train(place: Path, out: str) -> None:
    features = make_case(place).features
    train(features, out, training_config(features, None, ["train.modules=visual"]), session=JOINED)


def _score(place: Path, out: str) -> None:
    score(f"{place}/m.parquet", make_bundle(place / "bundle"), out, session=JOINED)


def _evaluate(place: Path, out: str) -> None:
    case = make_case(place)
    config = evaluation_config(case.model, None, ["train.modules=visual", "evaluate.budgets=[1]"])
    evaluate(case.features, case.model, out, config, tables=["figure4"], session=JOINED)


def _label(place: Path, out: str) -> None:
    label(str(place), make_recognizer(place / "recognizer"), out, _config(), session=JOINED)


@pytest.mark.parametrize(
    "run", [_extract, _finetune, _finetune_whole, _train, _score, _evaluate, _label]
)
def test_nothing_is_left(run: Callable[[Path, str], None], place: Path) -> None:
    with pytest.raises(RunError, match="a path of this machine"):
        run(place, f"{place}/out")
    assert not (place / "out").exists()
    (place / "out").mkdir()
    with pytest.raises(RunError, match="a path of this machine"):
        run(place, f"{place}/out")
    assert list((place / "out").iterdir()) == []
