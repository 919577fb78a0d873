"""Settings: precedence, what is refused and how it is reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from tsq_ray.config import (
    Config,
    ReplicaConfig,
    SamplerConfig,
    check_budget,
    check_top_objects,
    differing,
    flatten,
    load_config,
    validate_config,
)
from tsq_ray.errors import ConfigError


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        '[decode]\nnum_frames = 50\ntimeout_s = 9\n[encoders.visual]\nmodel = "resnet18"\n'
        "model_args = {a = 1}\n"
    )
    return path


def test_set_beats_file_beats_base_beats_default(
    toml: Path,
) -> None:
    base = {
        "decode": {"num_frames": 8, "timeout_s": 8.0, "max_pixels": 8},
        "encoders": {"visual": {"model_args": {"b": 2}}},
    }
    config = load_config(toml, ["decode.timeout_s=10"], base)
    assert (config.decode.timeout_s, config.decode.num_frames, config.decode.max_pixels) == (
        10.0,
        50,
        8,
    )
    assert config.decode.max_memory_mb == Config().decode.max_memory_mb
    assert config.encoders.visual.model == "resnet18"
    assert config.encoders.visual.size == Config().encoders.visual.size
    assert config.encoders.visual.model_args == {"a": 1}, "model_args are taken whole, not merged"


@pytest.mark.parametrize(
    ("item", "key", "value"),
    [
        ("decode.num_frames=12", "decode.num_frames", 12),
        ("sampler.lambda_visual=0.25", "sampler.lambda_visual", 0.25),
        ("sampler.mode=maxconf-l", "sampler.mode", "maxconf-l"),
        ('sampler.mode="uniform"', "sampler.mode", "uniform"),
        ("encoders.visual.mean=[0.5, 0.5, 0.5]", "encoders.visual.mean", [0.5, 0.5, 0.5]),
        (
            'encoders.visual.model_args={pad_type = "same"}',
            "encoders.visual.model_args",
            {"pad_type": "same"},
        ),
        (
            "recognizer.weights=s3://bucket/w.safetensors?a=b",
            "recognizer.weights",
            "s3://bucket/w.safetensors?a=b",
        ),
        (" train.seed =3", "train.seed", 3),
        ("train.num_workers=3", "train.num_workers", 3),
        ("train.num_workers=[1, 4]", "train.num_workers", [1, 4]),
    ],
)
def test_values_of_set_are_toml_or_plain_text(item: str, key: str, value: object) -> None:
    assert flatten(load_config(sets=[item]).model_dump(mode="json"))[key] == value


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("decode.num_frames", "--set 'decode.num_frames': expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("decode..x=3", "expected section.key=value"),
        ("decode.num_frames.x=3", "num_frames is a value, not a section"),
        ("decode.frames=3", r"unknown setting decode.frames; allowed: strategy, .*timeout_s"),
        (
            "encoders.visual.modle=x",
            "unknown setting encoders.visual.modle; allowed: kind, model, model_args",
        ),
        ("nothing.at_all=1", "unknown setting nothing; allowed: decode, encoders"),
        (
            "resources.node_types=[{cpus = 8, count = 16, gpu = 1}]",
            "unknown setting resources.node_types.0.gpu; allowed: cpus, gpus, count, labels",
        ),
        (
            "encoders.visual.weights=https://host/a.pth?signature=x",
            "encoders.visual.weights: weights from a URL with a user or a query",
        ),
        ("encoders.text.weights=https://me:pw@host/a", "encoders.text.weights: weights from a URL"),
        (
            "decode.num_frames=0",
            "setting decode.num_frames = 0: input should be greater than or equal to 1",
        ),
        (
            "decode.num_frames=many",
            "setting decode.num_frames = 'many': input should be a valid integer",
        ),
        (
            "decode.strategy=fast",
            "setting decode.strategy = 'fast': input should be 'uniform' or 'keyframe'",
        ),
        (
            "sampler.lambda_visual=1.5",
            "setting sampler.lambda_visual = 1.5: .*less than or equal to 1",
        ),
        ("decode=5", "setting decode = 5: "),
        (
            "train.num_workers=[3, 1]",
            r"train.num_workers.*\[3, 1\]; expected a number from 1, or \[fewest, most\] with "
            r"1 <= fewest <= most",
        ),
        ("train.num_workers=0", "train.num_workers.* 0; expected a number from 1"),
    ],
)
def test_a_wrong_set_is_one_line_that_names_it(item: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(sets=[item])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--config: no file .*run.toml; name an existing TOML file"),
        (b"[decode\n", "not readable as TOML"),
        (b"\xff\xfe", "not readable as TOML"),
        (b"[decode]\nframes = 3\n", "unknown setting decode.frames"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_several_wrong_values_are_counted() -> None:
    with pytest.raises(ConfigError, match=re.escape("(and 1 more)")):
        validate_config({"decode": {"num_frames": 0, "timeout_s": -1}})


def test_a_folder_as_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not readable as TOML"):
        load_config(tmp_path)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().decode.num_frames = 3  # type: ignore[misc]


def test_resolved_settings_load_again() -> None:
    config = load_config(
        sets=[
            "decode.num_frames=8",
            'encoders.visual.model_args={x = "y"}',
            'serve.allowed_uri_prefixes=["s3://a/"]',
        ]
    )
    assert validate_config(config.model_dump(mode="json")) == config


def test_replicas_have_their_minimum_below_their_maximum() -> None:
    assert ReplicaConfig(min_replicas=2, max_replicas=3).max_replicas == 3
    with pytest.raises(ConfigError, match="min_replicas 3 is above max_replicas 1"):
        load_config(sets=["serve.sampler.min_replicas=3"])


def test_flatten_keeps_model_args_whole() -> None:
    assert flatten({"a": {"b": 1, "model_args": {"c": 2}}, "d": []}) == {
        "a.b": 1,
        "a.model_args": {"c": 2},
        "d": [],
    }


@pytest.mark.parametrize(("budget", "num_frames"), [(1, 1), (5, 16), (16, 16)])
def test_a_budget_up_to_the_number_of_frames_is_taken(budget: int, num_frames: int) -> None:
    check_budget(SamplerConfig(budget=budget), num_frames)
    check_budget(SamplerConfig(budget="adaptive", max_budget=budget), num_frames)


def test_a_budget_above_the_number_of_frames_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"sampler.budget \(K\) is 17, above decode.num_frames \(T\) = 16"
    ):
        check_budget(SamplerConfig(budget=17), 16)


def test_the_defaults_are_the_papers() -> None:
    config = Config()
    assert (
        config.decode.num_frames,
        config.sampler.budget,
        config.sampler.lambda_visual,
        config.sampler.top_classes,
    ) == (16, 5, 0.6, 5)
    assert (
        config.encoders.visual.size,
        config.encoders.objects.size,
        config.recognizer.size,
        config.recognizer.resize,
    ) == (
        188,
        112,
        224,
        "crop",
    )
    train = config.train
    assert (train.epochs, train.lr, train.momentum, train.weight_decay, train.batch_size) == (
        100,
        1e-2,
        0.9,
        0.0,
        64,
    )
    assert (train.alpha, train.beta, train.dim_visual, train.dim_textual) == (0.6, 0.6, 512, 256)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["train.num_heads=3"],
            "settings train: num_heads 3 does not divide dim_visual 512; use a divisor of it",
        ),
        (
            ["train.num_heads=8", "train.dim_textual=20"],
            "num_heads 8 does not divide dim_textual 20",
        ),
        (
            ["train.attention=class-agnostic", "train.classifier=shared"],
            "a 'shared' row makes the same score for every category; leave",
        ),
        (
            ["train.attention=class-agnostic", "train.self_attention=true"],
            "self_attention needs several queries",
        ),
        (
            ["train.classifier=class-agnostic"],
            "setting train.classifier = 'class-agnostic': input should be 'class-specific' or "
            "'shared'",
        ),
        (
            ["encoders.num_objects=1001"],
            "setting encoders.num_objects = 1001: .*less than or equal to 1000",
        ),
    ],
)
def test_impossible_variants_are_refused_in_one_line(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(sets=sets)
    assert "\n" not in str(caught.value)


def test_heads_need_not_divide_the_dims_of_an_absent_module() -> None:
    assert (
        load_config(
            sets=["train.num_heads=8", "train.dim_textual=20", "train.modules=visual"]
        ).train.num_heads
        == 8
    )


def test_more_objects_than_the_features_hold_are_refused() -> None:
    check_top_objects(10, 10)
    with pytest.raises(
        ConfigError,
        match=(
            r"train.top_objects is 20, above encoders.num_objects = 10, the number per frame "
            r"that the features hold"
        ),
    ):
        check_top_objects(20, 10)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"train.lr": 0.1}, {"train.lr": 0.1, "train.num_heads": 1}, []),
        ({"train.lr": 0.1}, {"train.lr": 0.1, "train.num_heads": 8}, ["train.num_heads"]),
        ({"a.train.lr": 0.1, "a.train.num_heads": 8}, {"a.train.lr": 0.1}, ["a.train.num_heads"]),
        ({"recognizer": None}, {"recognizer.size": 224}, ["recognizer.size"]),
        ({"weights.a": "x"}, {"weights.b": "x"}, ["weights.a", "weights.b"]),
        ({"limit": 5}, {}, ["limit"]),
    ],
    ids=[
        "default",
        "another value",
        "older now",
        "a section that was not there",
        "no settings",
        "no section",
    ],
)
def test_a_record_from_before_a_setting_has_its_default(
    before: dict[str, object], after: dict[str, object], expected: list[str]
) -> None:
    assert differing(before, after) == expected
