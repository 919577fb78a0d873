"""From settings to a training.

What features pass on, what old ones leave out, how the ablations' settings reach the network.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tsq_ray.bundle.weights import Classifier, save_classifier
from tsq_ray.config import Config, ModelConfig, load_config
from tsq_ray.errors import ConfigError, ModelError, RunError
from tsq_ray.model import TSQShape
from tsq_ray.networks.encoder import load_encoder
from tsq_ray.runs.folder import RUN_FILE, write_json
from tsq_ray.training import finetune, train, training_config
from tsq_ray.training.sampler.components import _classifier, _shape


def features(folder: Path, *sets: str, leave_out: str = "") -> str:
    """The `_run.json` of features made with these settings.

    By a version that did not know `encoders.<leave_out>`.
    """
    config = load_config(None, sets).model_dump(mode="json")
    config["encoders"].pop(leave_out, None)
    write_json(str(folder / RUN_FILE), {"format": 1, "kind": "features", "config": config})
    return str(folder)


def test_features_carry_their_number_of_objects(tmp_path: Path) -> None:
    uri = features(tmp_path, "encoders.num_objects=50")
    assert training_config(uri).encoders.num_objects == 50
    with pytest.raises(RunError, match=r"encoders.num_objects: 50 in the features, 10 asked for"):
        training_config(uri, None, ("encoders.num_objects=10",))


def test_features_from_before_the_setting_hold_ten_objects(tmp_path: Path) -> None:
    uri = features(tmp_path, leave_out="num_objects")
    assert training_config(uri).encoders.num_objects == 10
    assert training_config(uri, None, ("encoders.num_objects=10",)) == training_config(uri)
    with pytest.raises(RunError, match=r"encoders.num_objects: None in the features, 50 asked for"):
        training_config(uri, None, ("encoders.num_objects=50",))


def test_more_objects_than_the_features_hold_are_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    config = load_config(None, ["train.top_objects=20"])
    with pytest.raises(
        ConfigError, match=r"train.top_objects is 20, above encoders.num_objects = 10"
    ):
        train(str(tmp_path / "nowhere"), str(tmp_path / "out"), config)


def test_another_picture_than_that_of_the_features_is_refused(tmp_path: Path) -> None:
    """The bundle would score pictures of a size that its sampler never saw."""
    uri = features(tmp_path)
    config = training_config(uri, None, ("encoders.visual.size=112", "encoders.visual.weights=x"))
    with pytest.raises(
        RunError, match=r"\(encoders.visual.size: 188 in the features, 112 asked for\); give the"
    ):
        train(uri, str(tmp_path / "out"), config)
    assert not (tmp_path / "out").exists()


def test_an_unknown_role_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="role 'recogniser': allowed are encoder, recognizer"):
        finetune(str(tmp_path / "m.parquet"), "recogniser", str(tmp_path / "out"))  # type: ignore[arg-type]


def test_every_setting_of_a_variant_reaches_the_network() -> None:
    variant: dict[str, Any] = {
        "attention": "class-agnostic",
        "classifier": "class-specific",
        "num_layers": 2,
        "num_heads": 4,
        "self_attention": False,
        "top_objects": 7,
        "dim_visual": 32,
        "dim_textual": 16,
        "dropout": 0.25,
        "swap_values": "projected",
    }
    config = load_config(None, base={"train": variant})
    words = SimpleNamespace(vocabulary=np.zeros((1000, 12)))
    shape = _shape(config, 2, 24, words)  # type: ignore[arg-type]
    assert (
        dataclasses.asdict(shape).items()
        >= {
            **variant,
            "num_classes": 2,
            "visual_dim": 24,
            "text_dim": 12,
            "modules": "both",
        }.items()
    )


def test_the_default_settings_are_the_default_network() -> None:
    words = SimpleNamespace(vocabulary=np.zeros((1000, 768)))
    shape = _shape(Config(), 2, 1280, words)  # type: ignore[arg-type]
    assert shape == TSQShape(2)


@pytest.mark.parametrize("option", ["--encoder", "--recognizer"])
def test_a_classifier_of_another_task_is_refused(tmp_path: Path, option: str) -> None:
    encoder = load_encoder(
        ModelConfig(model="test_resnet", weights="random:0", size=32), with_head=False
    )
    encoder.head = torch.nn.Linear(encoder.dim, 2)
    uri = str(tmp_path / "classifier")
    save_classifier(Classifier(encoder, ["a", "b"], "multi", "encoder", {}), uri)
    assert _classifier(uri, option, ["a", "b"], "multi").task == "multi"
    with pytest.raises(
        ModelError, match=rf"{option} .*: was finetuned for task 'multi', train.task is 'single'"
    ):
        _classifier(uri, option, ["a", "b"], "single")
