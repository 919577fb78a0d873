"""Agreement with the dense recogniser, the choice that it leads to, and the sample it is measured
on.

No label is read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundle import make_recognizer
from support.evaluate import make_case
from support.pretrained import save_pretrained

from tsq_ray.asking.questions import ServerModel
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import read_agreement, read_bundle_settings, write_agreement
from tsq_ray.config import RecognizerConfig, validate_config
from tsq_ray.errors import ConfigError, ModelError, RunError
from tsq_ray.evaluation.agreement import (
    Agreement,
    cheapest,
    interval,
    measure_agreement,
)
from tsq_ray.evaluation.measures import dense_answers
from tsq_ray.evaluation.videos import load_features
from tsq_ray.importing import import_config, import_network
from tsq_ray.labelling import _Steps, draw_sample, label
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, write_manifest
from tsq_ray.reporting.agreement import agreement_rows, verdict
from tsq_ray.runs.folder import begin
from tsq_ray.runtime.session import DEFAULT_SESSION
from tsq_ray.score_run import identity_of


def one(mode: str, budget: int, top1: float, cost: float) -> Agreement:
    return Agreement(mode, budget, budget, top1, top1, top1, top1, cost)  # type: ignore[arg-type]


def test_agreement_on_features(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    videos = load_features(case.features, case.bundle, "val", labelled=False).measured
    assert len(videos) == 10, "the unlabelled one too"
    assert videos.left_out == {"failed": 1}
    found = measure_agreement(case.bundle, videos, case.bundle.sampler_defaults)
    slots = videos.num_frames
    assert [(each.mode, each.budget) for each in found] == [
        *(("both", budget) for budget in range(1, slots)),
        ("both", "adaptive"),
        *(("uniform", budget) for budget in range(1, slots + 1)),
        ("maxconf", 5),
    ]
    every = found[-1]
    assert (every.top1, every.map, every.cost) == (1, 1, 1)
    assert every.low < 1, "of ten videos, nobody knows"
    uniform = {each.budget: each for each in found if each.mode == "uniform"}
    # slot 4 of 8 alone does not show the class, which slots 2 and 5 do
    assert uniform[1].top1 < 1
    assert uniform[4].cost == pytest.approx(0.5, rel=1e-3)
    for each in found:
        assert each.low <= each.top1 <= each.high
    tsqnet = {each.budget: each for each in found if each.mode == "both"}
    assert tsqnet[2].cost > uniform[2].cost, "it looks at every frame with its light encoder"
    assert tsqnet["adaptive"].frames <= case.bundle.sampler_defaults.max_budget


def test_of_a_server_the_frames_are_the_cost(tmp_path: Path) -> None:
    """Its multiply-adds are unknown, and it decides by itself whether to look again."""
    case = make_case(tmp_path)
    videos = load_features(case.features, case.bundle, "val", labelled=False).measured
    settings = RecognizerConfig(kind="openai", model="any", url="http://localhost:1/v1")
    server = ServerModel(settings, tuple(case.bundle.classes), "single")
    bundle = dataclasses.replace(case.bundle, recognizer=server)
    found = measure_agreement(bundle, videos, case.bundle.sampler_defaults)
    assert {each.cost for each in found} == {
        budget / videos.num_frames for budget in range(1, videos.num_frames + 1)
    }
    assert all(each.budget != "adaptive" for each in found)


def test_the_dense_answer_is_that_of_the_surest_frames(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    videos = load_features(case.features, case.bundle, "val", labelled=False).measured
    dense = dense_answers(videos, "single", 2)
    for row, (index, logits) in enumerate(zip(videos.frame_index, videos.logits, strict=True)):
        first = np.unique(index, return_index=True)[1]  # each source frame counts once
        logits = logits[first].astype(np.float32)
        odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        surest = np.argsort(-odds.max(1), kind="stable")[:2]
        assert dense[row].argmax() == logits[surest].mean(0).argmax()


def test_labelled_videos_alone_are_measured_elsewhere(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    videos = load_features(case.features, case.bundle, "val").measured
    assert (len(videos), videos.left_out) == (9, {"failed": 1, "unlabelled": 1})


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [
        (0.5, 100, 0.4038, 0.5962),
        (1, 10, 0.7225, 1),
        (0, 10, 0, 0.2775),
        (0.93, 200, 0.8859, 0.9578),
    ],
)
def test_wilsons_interval(share: float, count: int, low: float, high: float) -> None:
    assert interval(share, count) == pytest.approx((low, high), abs=1e-4)


def test_the_cheapest_choice_that_agrees() -> None:
    dense = one("maxconf", 5, 1, 1)
    found = [
        one("both", 1, 0.8, 0.3),
        one("both", 2, 0.96, 0.4),
        one("uniform", 4, 0.95, 0.5),
        dense,
    ]
    assert cheapest(found, 0.95).budget == 2
    assert cheapest(found, 0.5).budget == 1
    assert cheapest(found, 0.97) == dense
    even = [one("both", 2, 0.96, 0.6), one("uniform", 4, 0.95, 0.5), dense]
    assert cheapest(even, 0.95).mode == "uniform", "the sampler does not pay"
    assert cheapest(even[:2], 0.99).budget == 2, "the best there is"


def words(chosen: Agreement, asked: float, *others: Agreement) -> str:
    curve = [asdict(each) for each in (*others, chosen)]
    return verdict({"videos": 200, "asked": asked, "curve": curve, "chosen": curve[-1]})


def test_the_choice_in_words() -> None:
    chosen = dataclasses.replace(one("both", 5, 0.93, 0.14), low=0.89, high=0.96)
    figures = (
        "from TSQNet's frames, the recogniser gives the same label as from every frame on 93 % of "
        "200 held-out videos (89 to 96 %) at 14 % of the cost"
    )
    assert words(chosen, 0.9) == f"K = 5: {figures}"
    adaptive = dataclasses.replace(chosen, budget="adaptive", frames=3.25)
    assert words(adaptive, 0.9) == f"adaptive K, 3.2 on average: {figures}"
    assert "does not pay here" in words(one("uniform", 4, 0.96, 0.5), 0.9)
    assert "K = 8, uniform: 99 % is not reached; " in words(one("uniform", 8, 0.9, 1), 0.99)


def test_every_frame_in_words() -> None:
    """Either nothing else agrees, or it does at a higher cost: with a recogniser that costs
    little."""
    every = one("maxconf", 5, 1, 1)
    few = [one("both", 2, 0.8, 1.2), one("uniform", 8, 0.9, 1)]
    every_frame = (
        "so it sees every frame and answers from the 5 of which it is surest; lower --agreement to "
        "show it fewer"
    )
    assert words(every, 0.95, *few) == (
        "no choice of fewer frames agrees with the recogniser on 95 % of 200 held-out videos, "
        f"{every_frame}"
    )
    dear = [*few, one("both", 8, 0.96, 1.6), one("both", 9, 0.97, 1.7)]
    assert cheapest([*dear, every], 0.95) == every
    assert words(every, 0.95, *dear) == (
        "a sampler does not pay here: K = 8, both, is the cheapest choice that agrees with the "
        "recogniser on 95 % of 200 held-out videos, at 160 % of the cost of every frame, "
        f"{every_frame}"
    )


def test_the_choice_is_in_the_table_whatever_its_k() -> None:
    found = [
        *(one("both", budget, 0.9, budget / 16) for budget in (1, 2, 11, 12)),
        dataclasses.replace(one("both", 5, 0.8, 0.3), budget="adaptive"),
        *(one("uniform", budget, 0.8, budget / 20) for budget in (1, 12)),
        one("maxconf", 15, 1, 1),
    ]
    curve = [asdict(each) for each in found]

    def names(chosen: int) -> list[tuple[Any, bool]]:
        rows = agreement_rows({"curve": curve, "chosen": curve[chosen]})
        return [(row["name"], row["chosen"]) for row in rows]

    ends = [("adaptive", False), ("every frame", False)]
    assert names(0) == [(1, True), (2, False), *ends]
    assert names(3) == [(1, False), (2, False), (12, True), *ends]
    assert names(4) == [(1, False), (2, False), ("adaptive", True), ends[1]]
    assert names(7) == [(1, False), (2, False), ends[0], ("every frame", True)]
    row = agreement_rows({"curve": curve, "chosen": curve[3]})[2]
    assert (row["sampler"], row["uniform"]) == (curve[3], curve[6])


def test_a_sample_is_random_and_always_the_same() -> None:
    ids = [f"{number * 7919 % 1000:016x}" for number in range(1000)]
    rows = VideoRows.of(VideoRef(id_, f"/v/{n:04d}.mp4", 1) for n, id_ in enumerate(ids))
    drawn = draw_sample(Manifest(rows, [], "m", ("/v",)), 50)
    assert sorted(row.video_id for row in drawn.rows) == sorted(ids)[:50]
    splits = [row.split for row in drawn.rows]
    assert (splits.count("train"), splits.count("val")) == (30, 20)
    few = draw_sample(Manifest(rows[:5], [], "m", ("/v",)), 50)
    assert [row.split for row in few.rows].count("val") == 2


def test_another_choice_does_not_replace_that_of_the_predictions(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    manifest = Manifest(VideoRows.of([VideoRef("0" * 16, "/v/a.mp4", 1)]), [], "m", ("/v",))
    write_manifest(manifest, str(tmp_path / "manifest.parquet"))
    chosen = [asdict(one("uniform", budget, 1, budget / 8)) for budget in (2, 4)]
    found = {"videos": 9, "curve": chosen, "asked": 0.9, "chosen": chosen[1]}
    write_agreement(case.model, found)
    steps = _Steps(str(tmp_path), "", validate_config({}), DEFAULT_SESSION)
    config = scoring_config(case.model, sets=["sampler.mode=uniform", "sampler.budget=4"])
    scored = identity_of(*read_bundle_settings(case.model), config, True)
    begin(steps.at("predictions"), "predictions", scored, manifest)
    other = steps.measure(0.95)
    assert other["chosen"]["budget"] == 2
    with pytest.raises(RunError, match=r"sampler\.budget: 4 there, 2 now"):
        steps.score(other, True)
    assert read_agreement(case.model) == found


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"decode": {"num_frames": 4}}, ConfigError, r"sampler\.budget \(K\) is 5, above decode"),
        (
            {"train": {"task": "multi"}},
            ModelError,
            "answers for task 'single', train.task is 'multi'; add --set train.task=single",
        ),
        ({"train": {"top_objects": 11}}, ConfigError, "train.top_objects is 11, above encoders"),
        (
            {"encoders": {"text": {"weights": "/nowhere.txt"}}},
            ModelError,
            r"encoders\.text\.weights '/nowhere\.txt': ",
        ),
    ],
)
def test_settings_that_only_the_training_would_refuse_are_refused_first(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    out, recognizer = tmp_path / "out", make_recognizer(tmp_path / "recognizer")
    with pytest.raises(error, match=message):
        label(str(tmp_path), recognizer, str(out), validate_config(settings))
    assert not out.exists()


def test_a_video_classifier_cannot_teach(tmp_path: Path) -> None:
    recognizer = str(tmp_path / "recognizer")
    import_network(import_config(save_pretrained("videomae", tmp_path / "model")), recognizer)
    with pytest.raises(ModelError, match="takes clips of 4 frames, and a teacher must answer"):
        label(str(tmp_path), recognizer, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
