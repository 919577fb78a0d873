"""Training on Ray Train workers.

Any number of workers, killed or not, gives the result of one undisturbed process.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cluster import Driver, Ended, descendants, tsq
from support.train import (
    CLASSES,
    ENCODER,
    TEXT_DIM,
    VIDEOS,
    make_arrays,
    registered_checkpoints,
    wait_for,
    write_features,
)
from torch import Tensor

from tsq_ray import storage
from tsq_ray.bundle.settings import read_curves
from tsq_ray.bundle.weights import load_bundle, load_network
from tsq_ray.config import ModelConfig, load_config
from tsq_ray.model import TSQShape
from tsq_ray.networks.encoder import object_names
from tsq_ray.networks.text import text_encoder
from tsq_ray.training.features import FeatureSource, open_training_set
from tsq_ray.training.sampler.loop import fit_tsqnet

pytestmark = pytest.mark.ray

SMALL = (
    "batch_size=4",
    "dim_visual=16",
    "dim_textual=8",
    "init_visual=random",
    "init_textual=random",
    "checkpoint_every=1",
    "sampler.budget=2",
)
PATIENCE_S = 900.0


@dataclass
class Case:
    """The same features on both storages, and the results of training on them."""

    local: str
    s3: str
    base: dict[str, Any]

    def undisturbed(self, *sets: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """The parameters and losses that this process reaches without Ray."""
        config = load_config(None, _sets(*sets), self.base)
        vocabulary = text_encoder(config.encoders.text).embed(object_names())
        train = config.train
        with open_training_set(FeatureSource.of(self.local, None, "single")) as data:
            shape = TSQShape(
                CLASSES,
                data.visual.shape[2],
                TEXT_DIM,
                train.dim_visual,
                train.dim_textual,
                train.dropout,
            )
            return fit_tsqnet(
                data.arrays, vocabulary, {"visual": None, "textual": None}, shape, train, threads=1
            )


@pytest.fixture(scope="module")
def case(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("train")
    dim = load_network(ModelConfig(**ENCODER, weights="random:0"), with_head=False).dim
    config = write_features(str(folder / "features"), make_arrays(dim), folder / "words.txt")
    for path in (folder / "features").iterdir():
        storage.write_bytes(f"s3://tsq-other/train/features/{path.name}", path.read_bytes())
    return Case(
        str(folder / "features"), "s3://tsq-other/train/features", config.model_dump(mode="json")
    )


def _sets(*sets: str) -> list[str]:
    """Settings of the section train; those that name another section stay as they are."""
    return [item if "." in item.partition("=")[0] else f"train.{item}" for item in (*SMALL, *sets)]


def _command(features: str, out: str, *sets: str) -> list[str]:
    return [
        "train",
        features,
        "--out",
        out,
        "--json",
        *(word for item in _sets(*sets) for word in ("--set", item)),
    ]


def check(out: str, wanted: tuple[dict[str, Tensor], list[dict[str, float]]], near: float) -> None:
    """The bundle's sampler and its curve equal these."""
    state, curve = wanted
    found = read_curves(out)
    assert [losses.keys() for losses in found] == [losses.keys() for losses in curve]
    for one, other in zip(found, curve, strict=True):
        assert one == pytest.approx(other, abs=near)
    trained = load_bundle(out).sampler.state_dict()
    assert trained.keys() == state.keys()
    for name, value in trained.items():
        assert torch.allclose(value, state[name], rtol=0, atol=near), name


def has_checkpoint(out: str) -> bool:
    return bool(registered_checkpoints(f"{out}/_train"))


# 22 videos in batches of 4: six steps per epoch, the last of two videos; five epochs pass the drops
# of the learning rate in the paper
@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "more", "expected"),
    [
        pytest.param("2", (), 2, id="two workers"),
        pytest.param("[1, 2]", ("resources.threads=3",), 1, id="elastic, where one fits"),
    ],
)
def test_any_number_of_workers_gives_the_same(
    case: Case, tmp_path: Path, workers: str, more: tuple[str, ...], expected: int
) -> None:
    sets = ("epochs=5", "dropout=0.0", *more)
    out = str(tmp_path / "bundle")
    summary = tsq(*_command(case.local, out, f"num_workers={workers}", *sets)).json
    assert (summary["workers"], summary["videos"], summary["resumed_after_epoch"]) == (
        expected,
        VIDEOS,
        0,
    )
    assert summary["left_out"] == {"other_split": 1, "failed": 1, "unlabelled": 1}
    assert summary["videos_per_s"] > 0
    check(out, case.undisturbed(*sets), 1e-5)


@pytest.mark.slow
def test_a_killed_worker_is_replaced(case: Case, tmp_path: Path) -> None:
    sets, out = ("epochs=16", "dropout=0.0"), "s3://tsq-other/train/bundle"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(tsq, *_command(case.s3, out, "num_workers=[1, 2]", *sets))
        wait_for(lambda: running.done() or has_checkpoint(out))
        workers = descendants("ray::RayTrainWorker")
        assert len(workers) == 2, running.result() if running.done() else workers
        os.kill(workers[0], signal.SIGKILL)
        ended: Ended = running.result(PATIENCE_S)
    summary = ended.json
    assert (summary["workers"], summary["epochs"]) == (2, 16)
    assert 1 <= summary["resumed_after_epoch"] < 16
    check(out, case.undisturbed(*sets), 1e-4)


@pytest.mark.slow
def test_training_resumes_after_its_driver_is_killed(
    case: Case, ray_cluster: Any, tmp_path: Path
) -> None:
    sets, out = ("epochs=16",), str(tmp_path / "bundle")
    command = _command(case.local, out, *sets)
    address = ray_cluster.get_runtime_context().gcs_address
    with Driver([*command, "--address", address], tmp_path / "driver") as driver:
        driver.kill_when(lambda: has_checkpoint(out), PATIENCE_S)
    wait_for(lambda: not descendants("ray::RayTrainWorker"))
    assert not Path(out, "bundle.json").exists()
    summary = tsq(*command).json
    assert 1 <= summary["resumed_after_epoch"] < 16
    check(out, case.undisturbed(*sets), 1e-4)
    assert tsq(*command).json["already_done"] is True
    assert not Path(out, "_train").exists()


@pytest.mark.slow
def test_the_benchmark_prints_its_table(
    ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.benchmarks import train as benchmark

    sizes = {
        "videos": 20,
        "frames": 2,
        "dim": 8,
        "classes": 3,
        "text-dim": 4,
        "dim-visual": 8,
        "dim-textual": 8,
        "batch-size": 8,
    }
    argv = [
        word
        for name, value in (sizes | {"epochs": 2, "rounds": 1, "threads": 1}).items()
        for word in (f"--{name}", str(value))
    ]
    assert benchmark.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[:5]] == [
        "steps/s",
        "---",
        "tsq train",
        "plain loop",
        "ratio",
    ]
    ours, plain, ratio = (float(line.split("|")[2]) for line in lines[2:5])
    assert ratio == pytest.approx(ours / plain, rel=0.05, abs=0.002)
    assert "20 videos, T=2, 8 dims, C=3, batch 8, 1 worker(s) with 1 thread(s)" in lines[-1]
