"""Several labels per video, from the CSV to the report: sigmoid scores, metrics over all labels."""

from __future__ import annotations

import csv
import io
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from support.archive import CLASSES, Archive, make_archive
from support.cluster import Chain, Chains, read_rows, refused, tsq

from tsq_ray import schema, storage

pytestmark = pytest.mark.ray

LABELS = {
    "amber light": ["amber light"],
    "blue sea": ["blue sea", "outdoors"],
    "green field": ["green field", "outdoors"],
}
NAMES = [*CLASSES, "outdoors"]


class MultiChain(Chain):
    """The main path with `train.task=multi`.

    The recogniser comes first, so that the features carry its logits.
    """

    @property
    def options(self) -> list[str]:
        """The settings of each step."""
        return ["--config", str(self.settings), "--set", "train.task=multi"]

    @cached_property
    def recognizer(self) -> str:
        self.run(
            "recognizer",
            "finetune",
            self.manifest,
            "--role",
            "recognizer",
            "--out",
            self.at("recognizer"),
            *self.options,
        )
        return self.at("recognizer")

    @property
    def extract_options(self) -> list[str]:
        return ["--recognizer", self.recognizer, *self.options]

    @cached_property
    def bundle(self) -> str:
        self.run(
            "train",
            "train",
            self.features,
            "--out",
            self.at("bundle"),
            "--recognizer",
            self.recognizer,
            *self.options,
        )
        return self.at("bundle")


def write_labels(archive: Archive) -> None:
    """labels.csv with `|` between the labels of a video."""
    lines = [
        f"{path},{'|'.join(LABELS[label])},{archive.splits[path]}"
        for path, label in archive.labels.items()
    ]
    (archive.root / "labels.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")


@pytest.fixture(scope="module")
def chain(chains: Chains, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    base = tmp_path_factory.mktemp("multi")
    archive = make_archive(base / "videos", train=2, val=1, odd=False)
    write_labels(archive)
    return MultiChain(archive, str(base), chains.settings)


def wanted(chain: Chain, row: dict[str, Any]) -> list[str]:
    """A video's labels according to the archive."""
    return LABELS[chain.archive.labels[row["uri"].removeprefix(f"{chain.base}/videos/")]]


def test_index_keeps_all_labels(chain: Chain) -> None:
    assert tsq("info", chain.manifest, "--json").json["videos_by_class"] == dict(
        zip(NAMES, [3, 3, 3, 6], strict=True)
    )


@pytest.mark.slow
def test_the_single_task_refuses_several_labels(chain: Chain, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", ["--config", chain.settings]
    several = "4 of 6 videos have several labels; set train.task=multi"
    assert several in refused(
        tsq("finetune", chain.manifest, "--role", "encoder", "--out", out, *settings)
    )
    assert several in refused(tsq("train", chain.features, "--out", out, *settings))


@pytest.mark.slow
def test_the_task_goes_with_the_models(chain: Chain) -> None:
    for place in (f"{chain.recognizer}/finetune.json", f"{chain.bundle}/bundle.json"):
        content = json.loads(storage.read_bytes(place))
        assert (content["task"], content["classes"]) == ("multi", NAMES)


@pytest.mark.slow
def test_the_recogniser_learns_all_labels(chain: Chain) -> None:
    features = read_rows(chain.features)
    targets = np.array(
        [[name in wanted(chain, row) for name in NAMES] for row in features.to_pylist()]
    )
    logits = (
        schema.tensor_to_numpy(features["recognizer_logits"]).astype(np.float32).mean(1)
    )  # the consensus it is trained with
    assert ((logits > 0) == targets).all(), (
        "each label by itself is likelier than not exactly where it holds"
    )


@pytest.mark.slow
def test_scores_are_sigmoids_of_the_chosen_frames(chain: Chain) -> None:
    predictions, features = read_rows(chain.predictions), read_rows(chain.features)
    logits = schema.tensor_to_numpy(features["recognizer_logits"]).astype(np.float64)
    for row, frames in zip(predictions.to_pylist(), logits, strict=True):
        expected = 1 / (1 + np.exp(-frames[row["selected_slot"]].mean(0)))
        assert row["scores"] == pytest.approx(expected, abs=5e-3)
        assert row["top_labels"] == [
            NAMES[number] for number in np.argsort(-np.array(row["scores"]), kind="stable")
        ]
        assert row["label_names"] == wanted(chain, row)


@pytest.mark.slow
def test_metrics_take_all_labels(chain: Chain) -> None:
    rows = read_rows(chain.predictions).to_pylist()
    targets = np.array([[name in wanted(chain, row) for name in NAMES] for row in rows])
    scores = np.array([row["scores"] for row in rows])
    found = chain.outputs["score"]["metrics"]
    assert found["labelled"] == len(rows) == 9
    assert found["mAP"] == pytest.approx(
        average_precision_score(targets, scores, average="macro"), abs=1e-3
    )
    assert found["top1"] == pytest.approx(
        targets[np.arange(len(rows)), scores.argmax(1)].mean(), abs=1e-3
    )


@pytest.mark.slow
def test_report_and_export_show_all_labels(chain: Chain, tmp_path: Path) -> None:
    report = tsq("report", chain.predictions, "--out", tmp_path / "report.html", "--json").json
    assert report["map"] == pytest.approx(chain.outputs["score"]["metrics"]["mAP"], abs=1e-3)
    page = (tmp_path / "report.html").read_text()
    assert page.count('<span class="quiet">Labels</span>') == 6
    assert page.count('<span class="quiet">Label</span>') == 3
    assert tsq("export", chain.predictions, "--out", tmp_path, "--no-frames").code == 0
    lines = csv.DictReader(io.StringIO((tmp_path / "labels.csv").read_text()))
    assert all(line["label_names"] == "|".join(wanted(chain, line)) for line in lines)
