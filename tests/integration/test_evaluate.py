"""`tsq evaluate` on a finished main path.

It reports for the bundle what `tsq score` does, and a second run resumes from the first.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.archive import CLASSES
from support.cluster import BUDGET, NUM_FRAMES, Chain, Chains, read_rows, refused, tsq

from tsq_ray.bundle.weights import load_bundle
from tsq_ray.evaluation.measures import answers
from tsq_ray.evaluation.samplers import Sampler
from tsq_ray.evaluation.trainings import arrays_of, saliencies
from tsq_ray.evaluation.videos import load_features
from tsq_ray.model.choosers import Salient

pytestmark = pytest.mark.ray

OK_VAL = 4
TABLES = ("table2", "figure3", "tableA4", "figure4")


@pytest.fixture(scope="module")
def chain(chains: Chains) -> Chain:
    return chains("local")


def command(chain: Chain, out: Path, *more: str) -> list[str]:
    small = ["--set", "evaluate.seeds=[0, 1]", "--set", f"evaluate.budgets=[1, {BUDGET}]"]
    tables = [item for name in TABLES for item in ("--table", name)]
    return [
        "evaluate",
        chain.features,
        "--model",
        chain.bundle,
        "--out",
        str(out),
        *small,
        *tables,
        *more,
    ]


@pytest.fixture(scope="module")
def evaluated(
    chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluate") / "out"
    return out, tsq(*command(chain, out), "--json").json


def test_the_files_of_each_table(evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, summary = evaluated
    assert summary["measured"] == {"videos": OK_VAL, "left_out": {"failed": 1}, "split": "val"}
    for name in TABLES:
        assert (out / f"{name}.md").read_text().startswith(f"# {summary['tables'][name]['title']}")
    for name in ("figure3", "figure4"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (out / f"{name}.svg").read_bytes()
    rows = list(csv.DictReader((out / "figure3.csv").open()))
    assert {row["K"] for row in rows if row["sampler"] == "tsqnet"} == {"1", str(BUDGET)}
    assert all(
        len(row["mAP values"].split(";")) == (2 if row["sampler"] == "random" else 1)
        for row in rows
        if row["sampler"] in ("random", "uniform")
    )
    assert len(list(csv.DictReader((out / "figure4.csv").open()))) == 4 * len(CLASSES)


def test_a_training_here_equals_that_of_tsq_train(evaluated: tuple[Path, dict[str, Any]]) -> None:
    """The bundle was trained on these features with seed 0."""
    rows = {row["sampler"]: row for row in csv.DictReader((evaluated[0] / "table2.csv").open())}
    for column in ("mAP", "mAP interpolated", "top-1"):
        assert float(rows["tsqnet"][f"{column} values"].split(";")[0]) == pytest.approx(
            float(rows["bundle"][column]), abs=1e-9
        )


def test_the_bundle_offline_is_what_score_does(chain: Chain) -> None:
    bundle = load_bundle(chain.bundle)
    videos = load_features(chain.features, bundle, "val").measured
    visual, textual = saliencies(
        bundle.sampler, arrays_of(videos), bundle.vocabulary, bundle.task, 5
    )
    chooser = functools.partial(Salient, lambda_visual=0.6)
    sampler = Sampler(videos, bundle.task, chooser, visual, textual)
    scored = {row["video_id"]: row for row in read_rows(chain.predictions).to_pylist()}
    chosen = [sampler.choose(video, BUDGET) for video in range(len(videos))]
    found = answers(videos, chosen, bundle.task)
    for number, video in enumerate(videos.video_ids):
        assert chosen[number].tolist() == scored[video]["selected_slot"]
        np.testing.assert_allclose(found[number], scored[video]["scores"], atol=5e-3)


def test_it_resumes_where_it_stopped(chain: Chain, evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, summary = evaluated
    assert summary["trained_now"] == len(list((out / "trainings").glob("*.json"))) == 10
    before = (out / "table2.csv").read_bytes()
    next((out / "trainings").glob("*.json")).unlink()
    again = tsq(*command(chain, out), "--json").json
    assert again["trained_now"] == 1
    assert (out / "table2.csv").read_bytes() == before
    assert "holds another evaluation (train.lr: 0.01 there, 0.5 now)" in refused(
        tsq(*command(chain, out, "--set", "train.lr=0.5"))
    )


def test_finished_runs_are_compared_as_they_are(chain: Chain, tmp_path: Path) -> None:
    done = tsq(
        "evaluate",
        chain.predictions,
        chain.predictions,
        "--model",
        chain.bundle,
        "--out",
        str(tmp_path / "out"),
        "--json",
    ).json
    scored = chain.outputs["score"]["metrics"]
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert done["measured"] == {"runs": 2}
    assert [row["run"] for row in rows] == ["predictions", "predictions", "mean of 2 runs"]
    for row in rows:
        assert (float(row["mAP"]), float(row["top-1"])) == (scored["mAP"], scored["top1"])
        assert (row["sampler"], row["T"], row["K"]) == ("both", str(NUM_FRAMES), str(BUDGET))
        assert float(row["GFLOPs"]) > 0
        assert float(row["s/video"]) > 0
    mixed = [
        "evaluate",
        chain.predictions,
        chain.features,
        "--model",
        chain.bundle,
        "--out",
        str(tmp_path / "out"),
    ]
    assert "features or predictions, not both" in refused(tsq(*mixed))
    assert "--table and --split are for features" in refused(
        tsq(
            "evaluate",
            chain.predictions,
            "--model",
            chain.bundle,
            "--out",
            str(tmp_path / "out"),
            "--table",
            "table2",
        )
    )
