"""Whether two runs do the same work, and how differences are reported."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tsq_ray import provenance
from tsq_ray.config import (
    Config,
    DecodeConfig,
    EncodersConfig,
    RecognizerConfig,
    SamplerConfig,
    TrainConfig,
)
from tsq_ray.errors import RunError
from tsq_ray.runs.identity import Identity

OLD = Path(__file__).parents[1] / "data" / "0.1.0"
IDENTITY = Identity.of(decode={"num_frames": 16}, weights={"visual": "abc"}, split=None)


def test_an_identity_is_what_json_gives_back() -> None:
    assert Identity.of(sizes=(1, 2), by={1: "a"}).parts == {"sizes": [1, 2], "by": {"1": "a"}}


@pytest.mark.parametrize(
    ("before", "differences"),
    [
        ({"decode": {"num_frames": 16}, "weights": {"visual": "abc"}, "split": None}, ""),
        ({"decode": {"num_frames": 16}, "weights": {"visual": "abc"}}, ""),
        (
            {"decode": {"num_frames": 50}, "weights": {"visual": "x"}},
            "decode.num_frames: 50 there, 16 now; weights.visual: 'x' there, 'abc' now",
        ),
        ({"weights": {"visual": "abc"}}, "decode.num_frames: None there, 16 now"),
    ],
    ids=["the same", "a key without a value", "others", "a section that is missing"],
)
def test_differences_name_the_keys(before: dict[str, Any], differences: str) -> None:
    assert IDENTITY.differences(before) == differences


def test_a_record_from_before_a_setting_counts_with_its_default() -> None:
    later = Identity.of(encoders={"visual": {"size": 188}, "num_objects": 10})
    assert later.differences({"encoders": {"visual": {"size": 188}}}) == ""


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("decode", DecodeConfig),
        ("encoders", EncodersConfig),
        ("recognizer", RecognizerConfig),
        ("sampler", SamplerConfig),
    ],
)
def test_a_record_can_be_read_by_the_first_version(name: str, section: Any) -> None:
    """It has the settings that tests/data/0.1.0 has, unless a newer one is used."""
    known = json.loads((OLD / "bundle" / "bundle.json").read_text())["config"][name]
    assert section.model_validate(known).record() == known


def test_the_record_of_a_training_can_be_read_by_the_first_version() -> None:
    known = json.loads((OLD / "bundle" / "bundle.json").read_text())["provenance"]["train"]
    assert TrainConfig.model_validate(known).record() == known


def test_a_record_has_the_newer_settings_that_are_used() -> None:
    config = SamplerConfig(selection="dpp")
    assert config.record(exclude={"seed"})["selection"] == "dpp"
    assert SamplerConfig.model_validate(config.record()) == config
    assert "selection" in Config().model_dump()["sampler"]
    assert "selection" not in Config().record()["sampler"]
    assert TrainConfig(seed=3).record(include={"seed", "target"}) == {"seed": 3}


def test_at_most_five_differences_are_shown() -> None:
    many = Identity.of(**{f"key{number}": number for number in range(8)})
    shown = many.differences({})
    assert shown.startswith("key0: None there, 0 now; key1: ")
    assert shown.endswith("key4: None there, 4 now and 3 more")
    assert "key5" not in shown


def test_words_and_free_keys() -> None:
    before = {"decode": {"num_frames": 50, "timeout_s": 1}, "weights": {"visual": "abc"}}
    differences = IDENTITY.differences(
        before,
        words=("in the bundle", "asked for"),
        free=lambda key: key == "decode.timeout_s",
    )
    assert differences == "decode.num_frames: 50 in the bundle, 16 asked for"


def test_other_work_is_refused_with_what_to_do() -> None:
    before = {**IDENTITY.parts, "split": "val"}
    IDENTITY.refuse_other(IDENTITY.parts, "s3://bucket/out", "holds another training")
    with pytest.raises(
        RunError,
        match=r"^s3://bucket/out: holds another training \(split: 'val' there, None now\); "
        "use the same settings or another --out$",
    ):
        IDENTITY.refuse_other(before, "s3://bucket/out", "holds another training")


def test_the_revision_is_that_of_the_packages_own_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *own, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    (tmp_path / "provenance.py").touch()
    assert provenance.git_revision() is None
    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    assert provenance.git_revision() is None, "installed inside another project's checkout"
    git("add", "provenance.py")
    git("commit", "-m", "this one")
    assert provenance.git_revision() == git("rev-parse", "HEAD")
