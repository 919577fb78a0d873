"""Full fine-tuning on the sample archive.

One worker or two learn, later commands use the result, and a run is killed twice.
"""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.archive import CLASSES
from support.cluster import Chain, Chains, Driver, Ended, descendants, read_rows, tsq
from support.train import registered_checkpoints, wait_for

from tsq_ray import storage
from tsq_ray.bundle.settings import read_curves
from tsq_ray.bundle.weights import load_bundle, load_classifier, load_network

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 6
SETS = (
    "backbone=trained",
    f"epochs={EPOCHS}",
    "lr=0.03",
    "batch_size=12",
    "crop_scale=[1,1]",
    "precision=fp32",
)
NETWORK = ["--set", "encoders.visual.model=test_resnet"]
PATIENCE_S = 200.0


def command(chain: Chain, out: str | Path, *more: str, workers: int = 2) -> list[str]:
    sets = [
        word for item in (*SETS, f"num_workers={workers}") for word in ("--set", f"finetune.{item}")
    ]
    return [
        "finetune",
        chain.manifest,
        "--role",
        "encoder",
        "--out",
        str(out),
        "--config",
        str(chain.settings),
        "--json",
        *sets,
        *NETWORK,
        *more,
    ]


@dataclass
class Undisturbed:
    """An encoder trained without interruption, and the command that did it."""

    chain: Chain
    out: str
    argv: list[str]
    summary: dict[str, Any]


def train_encoder(chain: Chain, folder: Path, workers: int) -> Undisturbed:
    argv = command(chain, folder / "encoder", workers=workers)
    return Undisturbed(chain, str(folder / "encoder"), argv, tsq(*argv).json)


@pytest.fixture(scope="module")
def undisturbed(chains: Chains, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return train_encoder(chains("local"), tmp_path_factory.mktemp("finetune"), workers=1)


def test_a_worker_learns(undisturbed: Undisturbed) -> None:
    check_learnt(undisturbed)


def test_two_workers_learn(chains: Chains, tmp_path: Path) -> None:
    check_learnt(train_encoder(chains("local"), tmp_path, workers=2))


def check_learnt(undisturbed: Undisturbed) -> None:
    found, curve = undisturbed.summary, read_curves(undisturbed.out)
    assert (found["backbone"], found["videos"], found["classes"]) == ("trained", 10, 3)
    assert found["failed"] == {"truncated": 1, "not_video": 2}  # one of them is a validation video
    assert (found["left_out"], found["resumed_after_epoch"]) == ({"other_split": 6}, 0)
    assert [row["epoch"] for row in curve] == list(range(1, EPOCHS + 1))
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert found["train_accuracy"] == pytest.approx(curve[-1]["accuracy"], abs=1e-4)
    assert found["train_accuracy"] >= 0.6
    assert found["val_top1"] == pytest.approx(curve[-1]["val_top1"], abs=1e-4)
    assert curve[-1]["val_loss"] < curve[0]["val_loss"]
    names = [storage.name_of(file.uri) for file in storage.list_folder(undisturbed.out)]
    assert names == ["curves.csv", "finetune.json", "model.safetensors"]
    assert not Path(undisturbed.out, "_finetune").exists()
    assert tsq(*undisturbed.argv).json["already_done"] is True


def test_backbone_and_head_have_changed(undisturbed: Undisturbed) -> None:
    classifier = load_classifier(undisturbed.out)
    start = load_network(classifier.encoder.config, with_head=False)
    assert classifier.classes == CLASSES
    moved = [
        name
        for (name, one), other in zip(
            classifier.encoder.backbone.named_parameters(), start.backbone.parameters(), strict=True
        )
        if not torch.equal(one, other)
    ]
    assert len(moved) == len(list(start.backbone.parameters()))
    assert not classifier.encoder.training


def test_extract_and_train_take_the_encoder(undisturbed: Undisturbed, tmp_path: Path) -> None:
    chain, encoder = undisturbed.chain, ["--encoder", undisturbed.out]
    features, bundle = str(tmp_path / "features"), str(tmp_path / "bundle")
    config = ["--config", str(chain.settings)]
    extract = ["extract", chain.manifest, "--out", features, *encoder, *config, "--limit", "8"]
    assert tsq(*extract).code == 0
    rows = read_rows(features)
    assert rows["status"].to_pylist().count("ok") >= 6
    sets = ["--set", "train.modules=visual", "--set", "train.epochs=1"]
    assert tsq("train", features, "--out", bundle, *encoder, *sets, *config).code == 0
    assert (
        load_bundle(bundle).encoder.state_hash()
        == load_classifier(undisturbed.out).encoder.state_hash()
    )


def test_a_run_whose_driver_and_worker_were_killed(
    undisturbed: Undisturbed, ray_cluster: Any, tmp_path: Path
) -> None:
    longer = ("--set", f"finetune.epochs={3 * EPOCHS}")  # an epoch takes less than a second
    whole = str(tmp_path / "whole")
    summary = tsq(*command(undisturbed.chain, whole, *longer)).json
    out = tmp_path / "encoder"
    argv = command(undisturbed.chain, out, *longer)
    address = ray_cluster.get_runtime_context().gcs_address

    def checkpoints() -> set[str]:
        return registered_checkpoints(f"{out}/_finetune")

    with Driver([*argv, "--address", address], tmp_path / "driver") as driver:
        driver.kill_when(lambda: bool(checkpoints()), PATIENCE_S)
    wait_for(lambda: not descendants("ray::RayTrainWorker"))
    assert not (out / "finetune.json").exists()
    other = tsq(*argv, "--set", "finetune.lr=1e-4")
    assert (other.code, "finetune.lr: 0.03 there, 0.0001 now" in other.err) == (2, True)
    before = checkpoints()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(tsq, *argv)
        wait_for(lambda: running.done() or bool(checkpoints() - before))
        workers = descendants("ray::RayTrainWorker")
        assert len(workers) == 2, running.result() if running.done() else workers
        os.kill(workers[0], signal.SIGKILL)
        ended: Ended = running.result(PATIENCE_S)
    assert 1 <= ended.json["resumed_after_epoch"] < 3 * EPOCHS
    wanted, curve = read_curves(whole), read_curves(str(out))
    assert [row.keys() for row in curve] == [row.keys() for row in wanted]
    for one, other_row in zip(curve, wanted, strict=True):
        assert one == pytest.approx(other_row, abs=1e-4)
    settings = json.loads((out / "finetune.json").read_text())
    assert settings["provenance"]["summary"]["failed"] == summary["failed"]
