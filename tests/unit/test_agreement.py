"""Agreement with the dense recogniser, the choice that it leads to, and the sample it is measured
on.

No label is read.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundle import NUM_FRAMES, make_recognizer
from support.evaluate import Case, feature_row, make_case
from support.pretrained import save_pretrained

from tsq_ray import schema
from tsq_ray.asking.questions import ServerModel
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import (
    BUNDLE_FILE,
    check_bundle,
    read_agreement,
    read_bundle_settings,
    with_choice,
    write_agreement,
    write_settings,
)
from tsq_ray.bundle.weights import load_bundle, save_bundle
from tsq_ray.config import RecognizerConfig, SamplerConfig, validate_config
from tsq_ray.errors import ConfigError, ModelError, RunError
from tsq_ray.evaluation.agreement import (
    Agreement,
    cheapest,
    interval,
    measure_agreement,
)
from tsq_ray.evaluation.measures import dense_answers
from tsq_ray.evaluation.run import evaluate
from tsq_ray.evaluation.videos import EVERY_SPLIT, load_features
from tsq_ray.importing import import_config, import_network
from tsq_ray.labelling import _label_config, _Steps, draw_sample, label
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, write_manifest
from tsq_ray.model import TSQNet
from tsq_ray.model.choosers import UntilConfident, chooser_for
from tsq_ray.reporting.agreement import agreement_rows, verdict
from tsq_ray.runs.folder import begin, write_part
from tsq_ray.runtime.session import DEFAULT_SESSION
from tsq_ray.score_run import identity_of
from tsq_ray.stages.sample import Sample
from tsq_ray.training.teachable import why_untaught


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
    content, digest = with_choice(read_bundle_settings(case.model)[0], chosen[1])
    write_settings(case.model, BUNDLE_FILE, content)
    assert read_bundle_settings(case.model) == (content, digest)
    steps = _Steps(str(tmp_path), "", validate_config({}), DEFAULT_SESSION)
    config = scoring_config(case.model)
    assert (config.sampler.mode, config.sampler.budget) == ("uniform", 4), "the bundle's own"
    scored = identity_of(content, digest, config, True)
    begin(steps.at("predictions"), "predictions", scored, manifest)
    other = steps.measure(0.95)
    assert other["chosen"]["budget"] == 2
    with pytest.raises(RunError, match=r"sampler\.budget: 4 there, 2 now"):
        steps.score(other, True)
    assert read_agreement(case.model) == found
    assert read_bundle_settings(case.model)[1] == digest


def test_an_adaptive_budget_is_chosen_kept_and_scored_with(tmp_path: Path) -> None:
    """Nothing else that costs less than every frame agrees often enough."""
    case = make_case(tmp_path)
    curve = [
        *(one("both", budget, 0.8, budget / 8) for budget in (1, 2, 3, 4)),
        dataclasses.replace(one("both", 4, 0.95, 0.5), budget="adaptive"),
        *(one("uniform", budget, 0.85, budget / 9) for budget in (2, 4)),
        one("maxconf", 5, 1, 1),
    ]
    write_agreement(case.model, {"videos": 9, "curve": [asdict(each) for each in curve]})
    steps = _Steps(str(tmp_path), "", validate_config({}), DEFAULT_SESSION)
    assert steps.measure(0.96)["chosen"]["mode"] == "maxconf"
    chosen = steps.measure(0.9)["chosen"]
    assert (chosen["mode"], chosen["budget"]) == ("both", "adaptive")
    scored_with = steps._scoring(chosen).sampler
    assert scored_with.budget == "adaptive"
    assert isinstance(chooser_for(scored_with), UntilConfident)
    content, _ = with_choice(read_bundle_settings(case.model)[0], chosen)
    write_settings(case.model, BUNDLE_FILE, content)
    own = scoring_config(case.model).sampler
    assert (own.mode, own.budget) == ("both", "adaptive"), "the bundle's own"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"decode": {"num_frames": 4}, "sampler": {"budget": "adaptive"}},
            ConfigError,
            r"sampler\.max_budget is 5, above decode",
        ),
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


def test_k_is_chosen_so_the_default_may_be_above_t(tmp_path: Path) -> None:
    settings = {"decode": {"num_frames": 4}, "train": {"modules": "visual"}}
    config = _label_config(validate_config(settings))
    assert (config.sampler.budget, config.train.target) == (4, "teacher")
    recognizer = make_recognizer(tmp_path / "recognizer")
    _Steps(str(tmp_path / "out"), recognizer, config, DEFAULT_SESSION).check()


Sampled = tuple[str, int, str]
"""Split, label and status of a video of the sample."""


def sampled_features(case: Case, folder: Path, videos: Sequence[Sampled]) -> str:
    """Features of a sample."""
    rows = []
    for number, (split, shown, status) in enumerate(videos):
        row = feature_row(f"{number}", split, shown, case.bundle.encoder.dim, number)
        if status == "failed":
            row = {name: row[name] for name in ("video_id", "uri", "size_bytes", "split")}
            row |= {"status": status, "error_type": "corrupt", "error_message": "", "warnings": []}
        rows.append(row | {"labels": None})
    dim, count = case.bundle.encoder.dim, len(case.bundle.classes)
    arrow = schema.features_schema(NUM_FRAMES, dim, case.bundle.classes, count)
    write_part(str(folder), schema.table_from_rows(rows, arrow), "zstd")
    shutil.copy(f"{case.features}/_run.json", folder)
    return str(folder)


GOOD = [("train", 0, "ok"), ("train", 1, "ok"), ("val", 0, "ok")]


@pytest.mark.parametrize(
    ("videos", "minimum", "why"),
    [
        (GOOD, 1, None),
        (GOOD, 2, "in 2 videos, the recogniser finds 0 classes at least train.teacher_min_videos"),
        ([*GOOD[:1], *GOOD[:1], *GOOD[2:]], 1, "finds 1 classes at least train.teacher_min_videos"),
        (GOOD[:1], 1, "1 usable videos to learn from and 0 to measure it on"),
        (GOOD[2:], 1, "0 usable videos to learn from and 1 to measure it on"),
        ([*GOOD[:2], ("val", 0, "failed")], 1, "2 usable videos to learn from and 0 to measure"),
    ],
)
def test_whether_a_sample_can_teach(
    videos: list[Sampled], minimum: int, why: str | None, tmp_path: Path
) -> None:
    case = make_case(tmp_path)
    features = sampled_features(case, tmp_path / "sample", videos)
    settings = validate_config({"train": {"teacher_min_videos": minimum}}).train
    found = why_untaught(features, tuple(case.bundle.classes), settings, "val")
    assert (found is None) if why is None else (found is not None and why in found)


def test_a_sample_without_a_usable_video_is_an_error(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    features = sampled_features(case, tmp_path / "sample", [("train", 0, "failed")] * 2)
    with pytest.raises(RunError, match="no video of the sample is ok, so nothing can be learned"):
        why_untaught(features, tuple(case.bundle.classes), validate_config({}).train, "val")


def test_a_sampler_that_was_not_taught(tmp_path: Path) -> None:
    """Only uniform frames and every frame are measured, on every video; nothing else is allowed."""
    case = make_case(tmp_path)
    shape = dataclasses.replace(case.bundle.sampler.shape, num_classes=1)
    encoder = case.bundle.encoder
    encoder.head = None
    changes = {"sampler": TSQNet(shape), "sampler_classes": [], "encoder": encoder}
    save_bundle(dataclasses.replace(case.bundle, **changes), case.model)
    bundle = load_bundle(case.model)
    assert not bundle.is_taught
    videos = load_features(case.features, bundle, EVERY_SPLIT, labelled=False).measured
    assert len(videos) == 22
    curve = measure_agreement(bundle, videos, bundle.sampler_defaults)
    assert {each.mode for each in curve} == {"uniform", "maxconf"}
    for mode in ("both", "visual", "maxconf-l"):
        with pytest.raises(ModelError, match=r"was not taught.* use sampler\.mode = 'unif"):
            check_bundle(case.model, mode)
        with pytest.raises(ModelError, match="sampler was not taught"):
            Sample(bundle, SamplerConfig(mode=mode, budget=2))  # type: ignore[arg-type]
    check_bundle(case.model, "uniform")
    with pytest.raises(ModelError, match="sampler was not taught"):
        evaluate(case.features, case.model, str(tmp_path / "tables"))


def test_a_sampler_that_was_not_taught_in_words() -> None:
    every, few = one("maxconf", 5, 1, 1), dataclasses.replace(one("uniform", 2, 1, 0.25), low=0.2)
    record = {"videos": 1, "asked": 0.9, "untaught": "1 class"}
    curve = {"curve": [asdict(few), asdict(every)]}
    assert verdict(record | curve | {"chosen": asdict(few)}) == (
        "K = 2, uniform: no sampler can be taught (1 class); from uniform frames, the recogniser "
        "gives the same label as from every frame on 100 % of 1 sampled video (20 to 100 %) at "
        "25 % of the cost"
    )
    words = verdict(record | {"curve": [asdict(every)], "chosen": asdict(every)})
    assert words.startswith(
        "no sampler can be taught (1 class); no choice of fewer frames agrees with the recogniser "
        "on 90 % of 1 sampled video, so it sees every frame"
    )


def test_a_video_classifier_cannot_teach(tmp_path: Path) -> None:
    recognizer = str(tmp_path / "recognizer")
    import_network(import_config(save_pretrained("videomae", tmp_path / "model")), recognizer)
    with pytest.raises(ModelError, match="takes clips of 4 frames, and a teacher must answer"):
        label(str(tmp_path), recognizer, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
