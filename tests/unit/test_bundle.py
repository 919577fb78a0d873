"""The trained artifacts: written ones load unchanged, damaged or foreign ones are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bundle import make_bundle
from torch import nn

from tsq_ray.bundle.settings import (
    BUNDLE_FILE,
    CLASSIFIER_FILE,
    check_class_order,
    is_bundle,
    read_bundle_settings,
    read_curves,
    write_curves,
)
from tsq_ray.bundle.weights import (
    Classifier,
    load_bundle,
    load_classifier,
    save_bundle,
    save_classifier,
)
from tsq_ray.config import ModelConfig
from tsq_ray.describe import describe
from tsq_ray.errors import ModelError
from tsq_ray.model import TSQNet
from tsq_ray.networks.encoder import load_encoder

CLASSES = ["cats", "dogs"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle folder that tests only read."""
    return Path(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle folder that a test may damage."""
    return Path(make_bundle(tmp_path / "bundle"))


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    config = ModelConfig(model="test_resnet", weights="random:3", size=32, mean=(0.5, 0.4, 0.3))
    encoder = load_encoder(config, with_head=False)
    encoder.head = nn.Linear(encoder.dim, len(CLASSES))
    save_classifier(
        Classifier(encoder, CLASSES, "single", "recognizer", {"note": "made by a test"}),
        str(tmp_path / "classifier"),
    )
    return tmp_path / "classifier"


def same_networks(one: nn.Module | None, other: nn.Module | None) -> bool:
    if one is None or other is None:
        return one is other
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_bundle_comes_back_as_it_was(made: Path, tmp_path: Path) -> None:
    first = load_bundle(str(made))
    save_bundle(first, str(tmp_path / "again"))
    second = load_bundle(str(tmp_path / "again"))
    for name in ("classes", "task", "decode", "encoders", "sampler_defaults", "provenance"):
        assert getattr(first, name) == getattr(second, name), name
    for name in ("sampler", "encoder", "objects", "recognizer"):
        assert getattr(first, name) is not None
        assert same_networks(getattr(first, name), getattr(second, name)), name
    assert first.vocabulary is not None
    assert torch.equal(first.vocabulary, second.vocabulary)  # type: ignore[arg-type]
    assert first.sha256 == second.sha256 == read_bundle_settings(str(made))[1]


def test_loaded_networks_are_for_inference(made: Path) -> None:
    bundle = load_bundle(str(made))
    for network in (bundle.sampler, bundle.encoder, bundle.objects, bundle.recognizer):
        assert network is not None
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_bundle_without_a_recogniser_loads(tmp_path: Path) -> None:
    uri = make_bundle(tmp_path / "bundle", with_recognizer=False)
    assert load_bundle(uri).recognizer is None
    assert not (tmp_path / "bundle" / "recognizer.safetensors").exists()


def test_a_visual_bundle_has_no_textual_files(bundle: Path, tmp_path: Path) -> None:
    full = load_bundle(str(bundle))
    network = TSQNet(dataclasses.replace(full.sampler.shape, modules="visual"))
    save_bundle(
        dataclasses.replace(full, sampler=network, objects=None, vocabulary=None),
        str(tmp_path / "visual"),
    )
    loaded = load_bundle(str(tmp_path / "visual"))
    assert loaded.objects is None
    assert loaded.vocabulary is None
    assert loaded.sampler.textual is None
    assert sorted(path.name for path in (tmp_path / "visual").glob("*.safetensors")) == [
        "encoder.safetensors",
        "recognizer.safetensors",
        "sampler.safetensors",
    ]


@pytest.mark.parametrize(
    "variant",
    [
        {"attention": "class-agnostic"},
        {
            "classifier": "shared",
            "num_layers": 2,
            "num_heads": 2,
            "self_attention": True,
            "top_objects": 3,
        },
    ],
    ids=["class-agnostic", "the others"],
)
def test_a_variant_comes_back_as_it_was(
    made: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    first = load_bundle(str(made))
    network = TSQNet(dataclasses.replace(first.sampler.shape, **variant))
    save_bundle(dataclasses.replace(first, sampler=network), str(tmp_path / "variant"))
    second = load_bundle(str(tmp_path / "variant")).sampler
    assert second.shape == network.shape
    assert same_networks(network, second)


def test_a_bundle_from_before_the_variants_is_the_default_one(bundle: Path) -> None:
    now = load_bundle(str(bundle))
    content = json.loads((bundle / BUNDLE_FILE).read_text())
    first = (
        "num_classes",
        "visual_dim",
        "text_dim",
        "dim_visual",
        "dim_textual",
        "dropout",
        "swap_values",
        "modules",
    )
    old_shape = {key: content["sampler_shape"][key] for key in first}
    old_encoders = {
        key: content["config"]["encoders"][key] for key in ("visual", "objects", "text")
    }
    change_settings(
        bundle,
        BUNDLE_FILE,
        sampler_shape=old_shape,
        config=content["config"] | {"encoders": old_encoders},
    )
    old = load_bundle(str(bundle))
    assert old.sampler.shape == now.sampler.shape
    assert old.encoders == now.encoders
    assert same_networks(old.sampler, now.sampler)
    assert describe(str(bundle))["sampler_shape"] == dataclasses.asdict(now.sampler.shape)


def change_settings(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def flip_a_byte(folder: Path) -> None:
    path = folder / "sampler.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            flip_a_byte,
            r"sampler.safetensors: its content is not what was written \(sha256 differs\)",
        ),
        (
            lambda folder: (folder / "text.safetensors").unlink(),
            "text.safetensors: missing; the folder is incomplete",
        ),
        (
            lambda folder: (folder / BUNDLE_FILE).unlink(),
            "has no bundle.json; name what tsq train wrote with --out",
        ),
        (
            lambda folder: (folder / BUNDLE_FILE).write_text("{"),
            "bundle.json: not JSON; the file is damaged",
        ),
        (
            lambda folder: change_settings(folder, BUNDLE_FILE, format=4),
            r"bundle.json: made by a newer version of tsq_ray "
            r"\(format 4; this version reads 3\); upgrade",
        ),
        (
            lambda folder: change_settings(folder, BUNDLE_FILE, classes=["one"]),
            "recognizer.safetensors: weight has shape",
        ),
    ],
    ids=[
        "flipped byte",
        "missing file",
        "missing settings",
        "settings cut",
        "unknown format",
        "other classes",
    ],
)
def test_a_damaged_bundle_is_refused(
    bundle: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(bundle)
    with pytest.raises(ModelError, match=message) as caught:
        load_bundle(str(bundle))
    assert "\n" not in str(caught.value)


def test_what_is_no_bundle_is_none(made: Path, classifier: Path, tmp_path: Path) -> None:
    assert is_bundle(str(made))
    assert not is_bundle(str(classifier))
    assert not is_bundle(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"nowhere: has no bundle\.json"):
        load_bundle(str(tmp_path / "nowhere"))


def test_writing_over_a_bundle_never_mixes_old_and_new(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsq_ray import storage

    whole, write = load_bundle(str(bundle)), storage.write_bytes

    def stop_at_the_second(uri: str, data: bytes) -> None:
        if uri.endswith("encoder.safetensors"):
            raise KeyboardInterrupt
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(whole, str(bundle))
    assert not is_bundle(str(bundle))


def test_a_classifier_comes_back_as_it_was(classifier: Path) -> None:
    loaded = load_classifier(str(classifier))
    assert (loaded.classes, loaded.task, loaded.role, loaded.provenance) == (
        CLASSES,
        "single",
        "recognizer",
        {"note": "made by a test"},
    )
    assert loaded.encoder.config.mean == (0.5, 0.4, 0.3)
    assert same_networks(
        loaded.encoder.backbone, load_encoder(loaded.encoder.config, with_head=False).backbone
    )
    settings = json.loads((classifier / CLASSIFIER_FILE).read_text())
    assert settings["backbone_sha256"] == loaded.encoder.backbone_hash()
    pictures = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    assert loaded.encoder(pictures)[1].shape == (2, len(CLASSES))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / CLASSIFIER_FILE).unlink(),
            "has no finetune.json; name what tsq finetune or import wrote with --out",
        ),
        (
            lambda folder: change_settings(folder, CLASSIFIER_FILE, format="x"),
            "finetune.json: format 'x'; this version reads 3",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "sha256 differs"),
    ],
    ids=["missing settings", "unknown format", "emptied"],
)
def test_a_damaged_classifier_is_refused(
    classifier: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(classifier)
    with pytest.raises(ModelError, match=message):
        load_classifier(str(classifier))


def test_the_same_classes_in_the_same_order_pass() -> None:
    check_class_order(CLASSES, list(CLASSES), "--encoder x")


@pytest.mark.parametrize(
    ("have", "message"),
    [
        (
            ["dogs", "cats"],
            r"--encoder x: its class list differs from the features' \(the same names in "
            r"another order\)",
        ),
        (["cats", "birds"], r"2 classes against 2; unknown 'birds'; missing 'dogs'"),
        (["cats"], r"1 classes against 2; missing 'dogs'"),
    ],
)
def test_other_classes_are_refused(have: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_class_order(have, CLASSES, "--encoder x")


def test_curves_come_back_or_are_none(tmp_path: Path) -> None:
    curve = [{"epoch": 1.0, "loss": 1 / 3}, {"epoch": 2.0, "loss": 0.25, "val_top1": 0.5}]
    write_curves(str(tmp_path), curve)
    assert read_curves(str(tmp_path)) == curve
    assert read_curves(str(tmp_path / "older")) == []
