"""Evaluation on made-up features: samplers, measures, tables, stored trainings, refusals."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.archive import CLASSES
from support.bundle import NUM_FRAMES, make_bundle
from support.evaluate import FPS, TRAIN, VAL, Case, make_case, rows_of, write_features

from tsq_ray.bundle.weights import load_bundle
from tsq_ray.config import SamplerConfig, TextConfig, TrainConfig
from tsq_ray.decode import DecodedVideo
from tsq_ray.errors import ConfigError, ManifestError, ModelError, RunError
from tsq_ray.evaluation import (
    comparisons,
    evaluate,
    evaluation_config,
    on_evidence,
    paper,
    read_annotations,
)
from tsq_ray.evaluation.ablations import TABLES, ablation
from tsq_ray.evaluation.bench import Bench, InitialValues
from tsq_ray.evaluation.catalogue import METHODS, TEACHING
from tsq_ray.evaluation.measures import (
    Clock,
    MeanOverSeeds,
    answers,
    dense_answers,
    gflops,
    measure_sampler,
)
from tsq_ray.evaluation.methods import (
    learned_sampler,
    measurable,
    measure_at_budgets,
    ranked_sampler,
    samplers_of,
    specs_of,
)
from tsq_ray.evaluation.samplers import (
    Sampler,
    change_scores,
    confidence,
    frame_head_logits,
    oracle_scores,
    true_class_probability,
)
from tsq_ray.evaluation.store import Store
from tsq_ray.evaluation.tables import Table, TableColumn, verdict
from tsq_ray.evaluation.trainings import (
    Learned,
    TrainingSpec,
    arrays_of,
    fit_scsampler,
    learn,
    saliencies,
)
from tsq_ray.evaluation.videos import load_features
from tsq_ray.manifest import VideoRef
from tsq_ray.model import TSQShape, choosers
from tsq_ray.prototypes import prototypes
from tsq_ray.rows import RECOGNIZER, VISUAL
from tsq_ray.runs.lease import Lease
from tsq_ray.stages import Encode, Recognize, Sample, bundle_specs

SALIENT = {2, 5}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("evaluate"))


def bench_of(
    case: Case, out: Path, *sets: str, split: str | None = None, labelled: bool = True
) -> Bench:
    features = load_features(case.features, case.bundle, split, labelled=labelled)
    small = (
        "train.epochs=2",
        "train.dim_visual=16",
        "train.dim_textual=8",
        "evaluate.seeds=[0, 1]",
        "evaluate.budgets=[1, 2]",
    )
    config = evaluation_config(case.model, None, (*small, *sets))
    return Bench(
        case.bundle,
        features,
        config,
        read_annotations(case.annotations),
        Store(str(out), {"test": 1}),
    )


@pytest.fixture
def bench(case: Case, tmp_path: Path) -> Bench:
    return bench_of(case, tmp_path)


def test_without_the_extra_one_line_says_what_to_install(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "tsq_ray.evaluation.run.find_spec",
        lambda name: None if name == "matplotlib" else found(name),
    )
    with pytest.raises(RunError, match=r"^evaluate needs matplotlib: pip install 'tsq-ray\[eval"):
        evaluate([case.features], case.model, str(tmp_path), evaluation_config(case.model))


# ----------------------------------------------------------------------------------------- features


def test_features_by_split_with_labels_in_the_bundles_order(case: Case) -> None:
    features = load_features(case.features, case.bundle, None)
    assert (features.split, len(features.measured)) == ("val", VAL)
    assert features.measured.left_out == {"failed": 1, "unlabelled": 1}
    assert features.training is not None
    assert (len(features.training), features.training.left_out) == (TRAIN, {})
    assert features.measured.targets.argmax(1).tolist() == [
        label for _, split, label in rows_of() if split == "val"
    ]
    assert features.measured.logits.shape == (VAL, NUM_FRAMES, len(CLASSES))
    assert features.measured.fps == (FPS, FPS)


def test_of_many_videos_a_sample_is_measured(case: Case) -> None:
    every = load_features(case.features, case.bundle, "val").measured
    some = load_features(case.features, case.bundle, "val", max_videos=3).measured
    assert some.left_out == every.left_out | {"above evaluate.max_videos": VAL - 3}
    assert some.video_ids == every.video_ids[:3]
    assert np.array_equal(some.targets, every.targets[:3])
    assert np.array_equal(some.logits, every.logits[:3])
    assert load_features(case.features, case.bundle, "val", VAL).measured.left_out == every.left_out


def test_labels_are_mapped_by_name_and_strange_ones_counted(case: Case, tmp_path: Path) -> None:
    names = [CLASSES[1], "juggling", CLASSES[0]]
    features = load_features(
        write_features(tmp_path / "f", case.bundle, classes=names), case.bundle, None
    )
    assert features.unknown_labels == ["juggling"]
    assert features.measured.left_out == {
        "failed": 1,
        "unlabelled": 1,
        "labels that the bundle lacks": VAL // 3,
    }
    assert (
        features.measured.targets[:, 1].sum() == features.measured.targets[:, 0].sum() == VAL // 3
    )


def test_without_splits_all_rows_are_measured_and_nothing_is_fitted(
    case: Case, tmp_path: Path
) -> None:
    features = load_features(
        write_features(tmp_path / "f", case.bundle, splits=False), case.bundle, None
    )
    assert (features.split, len(features.measured), features.training) == (None, TRAIN + VAL, None)
    bench = Bench(
        case.bundle, features, evaluation_config(case.model), None, Store(str(tmp_path), {})
    )
    methods, notes = measurable(bench)
    assert [method.name for method in methods if method.trained] == []
    assert "tsqnet" in notes[0]
    assert paper.specs_for(bench, "table7") == []
    assert paper.make(bench, "table7", str(tmp_path)).rows == []


def test_other_weights_or_missing_logits_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"lack recognizer_logits.*tsq extract MANIFEST --out URI --recognizer RECOGNIZER",
    ):
        load_features(
            write_features(tmp_path / "bare", case.bundle, with_logits=False), case.bundle, None
        )
    hashes = {"visual": case.bundle.encoder.backbone_hash(), "recognizer": "b" * 64}
    with pytest.raises(ModelError, match=r"with a recogniser .* other than the bundle's"):
        load_features(
            write_features(tmp_path / "other", case.bundle, weights=hashes), case.bundle, None
        )
    with pytest.raises(RunError, match=r"no row of split 'test'; splits: train \(12\), val \(11\)"):
        load_features(case.features, case.bundle, "test")


# ----------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("name", [method.name for method in METHODS if not method.trained])
def test_every_sampler_takes_distinct_frames_in_order(bench: Bench, name: str) -> None:
    method = next(method for method in METHODS if method.name == name)
    samplers, diverged = samplers_of(bench, method)
    assert diverged == 0
    assert len(samplers) == (2 if name == "random" else 1)
    for video, index in enumerate(bench.videos.frame_index):
        for budget in (1, 3, NUM_FRAMES):
            slots = samplers[0].choose(video, budget)
            assert list(slots) == sorted(set(slots.tolist()))
            assert len(set(index[slots])) == len(slots)
            assert len(slots) == (
                len(set(index)) if name == "dense" else min(budget, len(set(index)))
            )


def test_the_oracle_finds_the_evidence_by_annotation_or_by_the_recogniser(bench: Bench) -> None:
    videos, known = bench.videos, bench.annotations
    assert known is not None
    for segments in (None, [known.of(uri) for uri in videos.uris]):
        oracle = ranked_sampler(bench, oracle_scores(videos, "single", segments), "oracle")
        assert all(
            set(videos.frame_index[v][oracle.choose(v, 2)]) == SALIENT for v in range(len(videos))
        )
    # an annotated frame comes before any other, however sure the recogniser is of the other
    one = oracle_scores(videos, "single", [[(0.0, 0.04)]] * len(videos))
    assert all(one[v].argmax() == 0 for v in range(len(videos)))


def test_maxconf_finds_the_frames_that_the_recogniser_knows(bench: Bench) -> None:
    sampler = Sampler(bench.videos, "single", choosers.MostConfident)
    assert all(
        set(bench.videos.frame_index[v][sampler.choose(v, 2)]) == SALIENT for v in range(VAL)
    )


def test_stillness_and_motion_by_hand(bench: Bench) -> None:
    still = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1]], np.float16)
    videos = dataclasses.replace(bench.videos, visual=np.repeat(still[None], VAL, 0))
    np.testing.assert_allclose(change_scores(videos)[0], [0, 0, 0.5, 0.5, 0, 0, 0, 0], atol=1e-6)


def test_probability_of_several_labels_is_their_mean(bench: Bench) -> None:
    videos = dataclasses.replace(bench.videos, targets=np.ones_like(bench.videos.targets))
    np.testing.assert_allclose(
        true_class_probability(videos, "single"), 1 / len(CLASSES), atol=1e-6
    )


def test_the_ranker_learns_what_the_recogniser_sees(bench: Bench) -> None:
    training, videos = bench.features.training, bench.videos
    assert training is not None
    teacher = true_class_probability(training, "single")
    ranker = fit_scsampler(training.visual, teacher, seed=0)
    scores = ranker(training.visual)
    right = [scores[v, [2, 5]].mean() > np.delete(scores[v], [2, 5]).mean() for v in range(TRAIN)]
    assert np.mean(right) == 1
    assert np.array_equal(
        ranker(videos.visual), fit_scsampler(training.visual, teacher, seed=0)(videos.visual)
    )


# ----------------------------------------------------------------------------------------- measures


def test_the_mean_of_the_logits_is_what_counts(bench: Bench) -> None:
    videos = bench.videos
    chosen = [np.array([0, 3])] * VAL
    expected = (
        torch.from_numpy(videos.logits[:, [0, 3]].astype(np.float32)).mean(1).softmax(-1).numpy()
    )
    np.testing.assert_allclose(answers(videos, chosen, "single"), expected, atol=1e-6)
    sigmoid = (
        torch.from_numpy(videos.logits[:, [0, 3]].astype(np.float32)).mean(1).sigmoid().numpy()
    )
    np.testing.assert_allclose(answers(videos, chosen, "multi"), sigmoid, atol=1e-6)


def test_a_sampler_on_the_evidence_is_right(bench: Bench) -> None:
    oracle = ranked_sampler(bench, true_class_probability(bench.videos, "single"), "oracle")
    found = measure_sampler(bench.videos, oracle, 2, "single", bench.annotations)
    assert (found.map, found.map_interpolated, found.top1, found.recall, found.frames) == (
        1,
        1,
        1,
        1,
        2,
    )
    every = Sampler(bench.videos, "single", lambda _: choosers.Dense())
    dense = measure_sampler(bench.videos, every, 1, "single", bench.annotations)
    assert dense.frames == pytest.approx(
        np.mean([len(set(index)) for index in bench.videos.frame_index])
    )
    surest = Sampler(bench.videos, "single", choosers.MostConfident)
    taught = measure_sampler(bench.videos, surest, 3, "single", None, surest=3)
    assert (taught.agreement, taught.agreement_map) == (1, 1)
    uniform = Sampler(bench.videos, "single", choosers.Uniform)
    one = measure_sampler(bench.videos, uniform, 1, "single", None)
    chosen = [uniform.choose(video, 1) for video in range(VAL)]
    same = answers(bench.videos, chosen, "single").argmax(1) == dense_answers(
        bench.videos, "single"
    ).argmax(1)
    assert one.agreement == same.mean() < 1
    assert math.isnan(measure_sampler(bench.videos, uniform, 2, "single", None).recall)


def test_intervals_by_hand() -> None:
    figure = MeanOverSeeds((0.5, 0.6, 0.7))
    assert figure.mean == pytest.approx(0.6)
    assert figure.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert MeanOverSeeds((0.5,)).half is None
    assert figure.minus(MeanOverSeeds((0.4, 0.5, 0.6))).half == pytest.approx(0)  # seed by seed
    assert figure.minus(MeanOverSeeds((0.4,))).mean == pytest.approx(0.2)
    assert verdict(figure, MeanOverSeeds((0.4, 0.5, 0.6))) == "held (+10.0 ± 0.0)"
    assert (
        verdict(figure, MeanOverSeeds((0.7, 0.5, 0.59)))
        == "held (+0.3 ± 43.8, within the interval)"
    )
    assert verdict(MeanOverSeeds((0.4,)), MeanOverSeeds((0.5,))) == "not held (-10.0)"
    assert verdict(None, figure) == "not measured"


def test_costs_and_seconds(bench: Bench) -> None:
    bundle = bench.bundle
    assert bundle.recognizer is not None
    shape = bundle.sampler.shape
    uniform, dense = (
        gflops(bundle, cost, NUM_FRAMES, 2, shape, "true") for cost in ("uniform", "maxconf")
    )  # type: ignore[arg-type]
    assert dense == pytest.approx(uniform * NUM_FRAMES / 2)
    light, ranker = (
        gflops(bundle, cost, NUM_FRAMES, 2, shape, "true") for cost in ("maxconf-l", "scsampler")
    )  # type: ignore[arg-type]
    assert ranker - light == pytest.approx(NUM_FRAMES * 256 * (bundle.encoder.dim + 1) / 1e9)
    clock = Clock(bench.features.run, bundle, NUM_FRAMES)
    everything = (
        light
        + gflops(
            bundle,
            "textual",
            NUM_FRAMES,
            NUM_FRAMES,
            dataclasses.replace(shape, dim_textual=8),
            "true",
        )
        - uniform
    )
    assert (
        1.0 < (clock.seconds(uniform) or 0) < (clock.seconds(everything) or 0) <= 3.05
    )  # 1 s of decoding, 2 s of encoding all
    assert Clock({}, bundle, NUM_FRAMES).seconds(1.0) is None


def test_the_offline_answer_is_that_of_the_stages(tmp_path: Path) -> None:
    """Random pictures through the stages of score, and through features with logits.

    The same slots, and the same scores to half precision.
    """
    bundle = load_bundle(make_bundle(tmp_path / "bundle"))
    rng = np.random.default_rng(3)
    frames = {
        name: rng.integers(0, 256, (NUM_FRAMES, 32, 32, 3)).astype(np.uint8)
        for name in bundle_specs(bundle, "both")
    }
    index = np.arange(NUM_FRAMES, dtype=np.int32)
    video = DecodedVideo(
        frames=frames,
        slot_frame=index,
        frame_index=index,
        frame_pts_s=(index / 10).astype(np.float32),
        duration_s=0.8,
        fps=10.0,
        width=32,
        height=32,
        codec="h264",
        source_num_frames=NUM_FRAMES,
        decode_ms=1.0,
        warnings=[],
    )
    ref = VideoRef("0" * 16, "/v.mp4", 1, None, None, None, None)
    features = Encode(bundle.encoder, bundle.objects, bundle.recognizer)([video])[0]
    case = make_case(tmp_path / "case")
    blank = load_features(case.features, case.bundle, None).measured
    arrays: dict[str, Any] = {
        "visual": features.visual,
        "object_ids": features.object_ids,
        "object_probs": features.object_probs,
    }
    one = {
        name: np.asarray(value)[None].astype(getattr(blank, name).dtype)
        for name, value in arrays.items()
    }
    logits = np.asarray(features.recognizer_logits)[None].astype(np.float16)
    videos = dataclasses.replace(
        blank,
        **one,
        logits=logits,
        frame_index=index[None],
        video_ids=[ref.video_id],
        targets=blank.targets[:1],
    )
    visual, textual = saliencies(bundle.sampler, one, bundle.vocabulary, "single", 5)
    head = bundle.encoder.head
    assert head is not None
    margin = 0.05  # of random networks
    surest = confidence(frame_head_logits(head, videos), "single")

    def salient(mode: Any) -> Sampler:
        made = functools.partial(choosers.Salient, lambda_visual=0.6, mode=mode)
        return Sampler(videos, "single", made, visual, textual)

    def until_confident(budget: int) -> choosers.Chooser:
        return choosers.UntilConfident(choosers.Salient(budget, 0.6), margin)

    ranked = functools.partial(choosers.Ranked, name="maxconf-l")
    sides: dict[str, Any] = {
        "uniform": Sampler(videos, "single", choosers.Uniform),
        "maxconf": Sampler(videos, "single", choosers.MostConfident),
        "maxconf-l": Sampler(videos, "single", ranked, scores=surest),
        "adaptive": Sampler(videos, "single", until_confident, visual, textual),
        **{mode: salient(mode) for mode in ("both", "visual", "textual")},
    }
    assert len(sides["adaptive"].choose(0, 3)) < 3
    for mode, sampler in sides.items():
        config = (
            SamplerConfig(mode=mode, budget=3)
            if mode != "adaptive"
            else SamplerConfig(budget="adaptive", max_budget=3, margin=margin)
        )
        row = Recognize(bundle)(Sample(bundle, config)([(ref.video_id, video)]))[0].columns
        slots = sampler.choose(0, 3)
        assert slots.tolist() == row["selected_slot"].tolist(), mode
        np.testing.assert_allclose(answers(videos, [slots], "single")[0], row["scores"], atol=2e-3)
    assert {VISUAL, RECOGNIZER} <= frames.keys()


# ---------------------------------------------------------------------------------------- trainings


def test_a_training_scores_the_measured_videos(bench: Bench) -> None:
    training = bench.features.training
    assert training is not None
    shape = TSQShape(len(CLASSES), bench.videos.visual.shape[-1], 5, 16, 8)
    text = {
        "vocabulary": np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float32),
        "classes": np.eye(3, 5, dtype=np.float32),
    }
    start = {"visual": np.zeros((3, shape.visual_dim), np.float32), "textual": text["classes"]}
    spec = bench.spec({"modules": "both"}, {}, 1)
    arrays, measured = arrays_of(training), arrays_of(bench.videos)
    learned = learn(spec, arrays, measured, shape, text, start, 5)
    assert learned.diverged is None
    assert {"visual", "textual", "loss", "t2v", "v2t"} == set(learned.losses)
    assert (
        learned.arrays["saliency_visual"].shape
        == learned.arrays["saliency_textual"].shape
        == (VAL, NUM_FRAMES)
    )
    assert np.array_equal(learned.arrays["visual_before"], start["visual"])
    assert not np.array_equal(learned.arrays["visual_after"], start["visual"])
    again = learn(spec, arrays, measured, shape, text, start, 5)
    assert all(np.array_equal(value, again.arrays[name]) for name, value in learned.arrays.items())
    assert learned_sampler(bench, learned.arrays, "textual").choose(0, 2).shape == (2,)


def test_a_teacher_replaces_the_labels(bench: Bench) -> None:
    """Its targets and queries are for the classes that it finds, in the videos that it saw."""
    training = bench.features.training
    assert training is not None
    few = {"target": "teacher", "max_videos": 8, "teacher_min_videos": 2, "modules": "visual"}
    spec = bench.spec(few, {}, 0)
    taught = bench.teacher_targets(spec.config)
    assert taught is not None
    assert (taught.classes, taught.targets.shape) == ([0, 1, 2], (8, len(CLASSES)))
    shape, text, start, targets = InitialValues(bench, training).arguments(spec)
    assert shape is not None
    assert text is None
    assert targets is not None
    assert (shape.num_classes, targets.shape) == (3, (8, 3))
    assert targets.astype(np.float32).sum(1) == pytest.approx(1, abs=0.01)
    arrays, measured = arrays_of(training), arrays_of(bench.videos)
    learned = learn(spec, arrays, measured, shape, None, start, 5, targets)
    assert learned.diverged is None
    hidden = {**arrays, "targets": np.zeros_like(arrays["targets"])}
    unseen = {name: np.r_[values[:8], values[8:] * 0] for name, values in hidden.items()}
    again = learn(spec, unseen, measured, shape, None, start, 5, targets)
    assert all(np.array_equal(value, again.arrays[name]) for name, value in learned.arrays.items())
    rare = bench.spec({**few, "teacher_min_videos": 4}, {}, 0)
    with pytest.raises(
        RunError, match=r"finds 0 classes at least train\.teacher_min_videos = 4 times"
    ):
        bench.teacher_targets(rare.config)


def test_queries_start_from_the_teacher_where_the_frame_head_lacks_classes(bench: Bench) -> None:
    """A bundle that was taught has a head for the classes that its sample showed."""
    training, head = bench.features.training, bench.bundle.encoder.head
    assert training is not None
    assert isinstance(head, torch.nn.Linear)
    smaller = dataclasses.replace(bench.bundle, sampler_classes=list(CLASSES[:2]))
    spec = bench.spec({"modules": "visual"}, {}, 0)
    _, _, start, targets = InitialValues(
        dataclasses.replace(bench, bundle=smaller), training
    ).arguments(spec)
    assert targets is None
    labels = [np.flatnonzero(row).tolist() for row in training.targets]
    expected = prototypes(training.visual, training.logits, labels, len(CLASSES), 0, "single")
    np.testing.assert_allclose(start["visual"], expected.numpy())


def test_a_training_that_diverges_is_a_result(bench: Bench) -> None:
    training = bench.features.training
    assert training is not None
    arrays = arrays_of(training) | {"visual": np.full_like(training.visual, np.inf)}
    spec = bench.spec({"modules": "visual"}, {}, 0)
    shape = bench.shape(spec.config, 1)
    learned = learn(
        spec, arrays, arrays_of(bench.videos), shape, None, {"visual": None, "textual": None}, 5
    )
    assert learned.diverged is not None
    assert "the loss is" in learned.diverged
    bench.learned |= dict.fromkeys(
        (
            bench.spec(row.train, row.text, s)
            for row in ablation("tableA4", bench.config, 10).rows
            for s in (0, 1)
        ),
        learned,
    )
    table = paper.make(bench, "tableA4", "")
    assert [row[-1] for row in table.rows] == ["diverged", "diverged"]
    assert any("seed 1: the training diverged" in note for note in table.notes)


def test_the_store_gives_back_what_was_finished_and_nothing_else(
    bench: Bench, tmp_path: Path
) -> None:
    spec = bench.spec({"modules": "visual"}, {}, 0)
    learned = Learned({"saliency_visual": np.ones((2, 3), np.float32)}, {"loss": 0.5}, 1.5)
    store = Store(str(tmp_path), {"bundle": "a"})
    assert store.read(spec) is None
    store.write(spec, learned)
    found = store.read(spec)
    assert found is not None
    assert (found.losses, found.seconds, found.diverged) == ({"loss": 0.5}, 1.5, None)
    assert np.array_equal(found.arrays["saliency_visual"], learned.arrays["saliency_visual"])
    others = [
        bench.spec({"modules": "visual"}, {}, 1),
        bench.spec({"modules": "visual", "lr": 0.5}, {}, 0),
        bench.scsampler(0),
    ]
    assert [store.read(other) for other in others] == [None] * 3
    assert Store(str(tmp_path), {"bundle": "b"}).read(spec) is None
    # killed between the two files: not finished
    (tmp_path / "trainings" / f"{store.key(spec)}.json").rename(tmp_path / "gone")
    assert store.read(spec) is None
    (tmp_path / "gone").rename(tmp_path / "trainings" / f"{store.key(spec)}.json")
    (tmp_path / "trainings" / f"{store.key(spec)}.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="sha256 differs"):
        store.read(spec)


def test_settings_that_do_not_count_make_no_new_training() -> None:
    specs = [TrainingSpec("tsq", TrainConfig(num_workers=n), TextConfig()) for n in (1, 2)]
    assert specs[0].identity() == specs[1].identity()
    visual = [
        TrainingSpec("tsq", TrainConfig(modules="visual"), TextConfig(model=name))
        for name in ("a", "b")
    ]
    assert visual[0].identity() == visual[1].identity()


# ---------------------------------------------------------------------------------------- ablations


def test_the_ablations_share_their_trainings(bench: Bench) -> None:
    specs = {
        name: {bench.store.key(spec) for spec in paper.specs_for(bench, name)}
        for name in paper.names()
    }
    assert {name: len(found) for name, found in specs.items()} == {
        **{"table1": 0, "table2": 8, "figure3": 8, "table7": 6, "table8": 8, "table9": 2},
        **{"table10": 8, "tableA2": 12, "tableA3": 10, "tableA4": 4, "tableA5": 6, "figure4": 1},
        **{"selectors": 2, "teacher": 4},
    }
    assert len(set().union(*specs.values())) == 42  # of 79
    assert specs["table9"] <= specs["table8"]
    assert specs["figure4"] <= specs["table2"]
    assert specs["selectors"] <= specs["table2"]


@pytest.mark.parametrize("name", TABLES)
def test_signs_name_cells_that_exist(bench: Bench, name: str) -> None:
    wanted = ablation(name, bench.config, 10)
    for trend in wanted.trends:
        for row, column in (trend.better, trend.worse):
            assert 0 <= row < len(wanted.rows)
            assert 0 <= column < len(wanted.columns)
    assert all(len(row.cells) == len(wanted.head) for row in wanted.rows)
    assert all(bench.spec(row.train, row.text, 0).config.seed == 0 for row in wanted.rows)


def test_table_9_has_a_row_for_each_text(case: Case, tmp_path: Path) -> None:
    bench = bench_of(
        case, tmp_path, 'evaluate.word_vectors=["/vectors/glove.6B.300d.txt", "/vectors/w2v.txt"]'
    )
    wanted = ablation("table9", bench.config, 1000)
    assert [row.cells[1] for row in wanted.rows] == ["top 10", "top 10", "top 1000", "top 10"]
    assert [row.cells[0] for row in wanted.rows[:2]] == ["glove.6B.300d", "w2v"]
    assert wanted.rows[1].text == {"weights": "/vectors/w2v.txt"}
    assert [(trend.better[0], trend.worse[0]) for trend in wanted.trends] == [
        (3, 2),
        (3, 0),
        (3, 1),
    ]
    assert any(
        "all objects: not measured" in note for note in ablation("table9", bench.config, 10).notes
    )


def test_an_ablation_table_measures_each_seed(bench: Bench) -> None:
    oracle = true_class_probability(bench.videos, "single").astype(np.float32)
    for row, sign in zip(ablation("tableA4", bench.config, 10).rows, (-1, 1), strict=True):
        for seed in bench.seeds:
            bench.learned[bench.spec(row.train, row.text, seed)] = Learned(
                {"saliency_visual": sign * oracle}
            )
    table = paper.make(bench, "tableA4", "")
    worse, better = (row[-1] for row in table.rows)
    assert isinstance(better, MeanOverSeeds)
    assert isinstance(worse, MeanOverSeeds)
    assert better.values == (1.0, 1.0)
    assert worse.mean < 1
    assert any(
        note.startswith(
            "trend in the paper: without self-attention above with self-attention; here held (+"
        )
        for note in table.notes
    )


def test_the_teacher_beside_labels(bench: Bench) -> None:
    oracle = true_class_probability(bench.videos, "single").astype(np.float32)
    for method, sign in (("tsqnet", -1), ("teacher", 1)):
        (found,) = [one for one in TEACHING if one.name == method]
        for spec in specs_of(bench, found):
            learned = {f"saliency_{module}": sign * oracle for module in ("visual", "textual")}
            bench.learned[spec] = Learned(
                {**learned, "textual_after": np.zeros((3, 5), np.float32)}
            )
    table = paper.make(bench, "teacher", "")
    rows = {
        row[0]: dict(zip([column.title for column in table.columns], row, strict=True))
        for row in table.rows
    }
    assert list(rows) == ["uniform", "maxconf", "maxconf-l", "tsqnet", "teacher"]
    for column in ("mAP", "agreement", "agreement mAP"):
        best, worst = rows["teacher"][column], rows["tsqnet"][column]
        assert isinstance(best, MeanOverSeeds)
        assert isinstance(worst, MeanOverSeeds)
        assert best.values == (1.0, 1.0)
        assert worst.mean < 1
    ours, theirs, over = (
        rows[name][column]
        for name, column in (("teacher", "mAP"), ("tsqnet", "mAP"), ("teacher", "over tsqnet"))
    )
    assert isinstance(ours, MeanOverSeeds)
    assert isinstance(theirs, MeanOverSeeds)
    assert isinstance(over, MeanOverSeeds)
    assert over.mean == pytest.approx(ours.mean - theirs.mean)
    assert rows["tsqnet"]["over tsqnet"] is None
    assert any(
        "too few training videos: teacher, 25 videos, teacher, 50" in note for note in table.notes
    )


def test_the_teacher_without_labels(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", labelled=False)
    with pytest.raises(RunError, match=r"no ok video with a label.* only --table teacher needs no"):
        load_features(case.features, case.bundle, None)
    bench = bench_of(case, tmp_path, labelled=False)
    assert (len(bench.videos), len(bench.features.training or ())) == (VAL + 1, TRAIN)
    specs = paper.specs_for(bench, "teacher")
    assert {spec.config.target for spec in specs} == {"teacher"}
    saliency = bench.videos.logits.max(-1).astype(np.float32)
    for spec in specs:
        learned = {f"saliency_{module}": saliency for module in ("visual", "textual")}
        bench.learned[spec] = Learned({**learned, "textual_after": np.zeros((3, 5), np.float32)})
    table = paper.make(bench, "teacher", "")
    titles = [column.title for column in table.columns]
    rows = [dict(zip(titles, row, strict=True)) for row in table.formatted_rows()]
    assert [row["sampler"] for row in rows] == ["uniform", "maxconf", "maxconf-l", "teacher"]
    assert {row[name] for row in rows for name in ("mAP", "top-1", "over tsqnet")} == {"-"}
    assert all(float(row["agreement"].split()[0]) > 0 for row in rows)
    assert any("no labels: no mAP, no top-1, and tsqnet is not" in note for note in table.notes)
    assert not any("too few" in note and "tsqnet" in note for note in table.notes)


def test_a_size_that_is_all_the_training_videos(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = [each for each in TEACHING if each.name == "teacher"]
    sizes = [
        dataclasses.replace(whole, name=name, train={**(whole.train or {}), "max_videos": count})
        for name, count in (("as many", TRAIN), ("more", TRAIN + 1))
    ]
    monkeypatch.setattr(comparisons, "TEACHING", (whole, *sizes))
    for spec in paper.specs_for(bench, "teacher"):
        saliency = bench.videos.logits.max(-1).astype(np.float32)
        learned = {f"saliency_{module}": saliency for module in ("visual", "textual")}
        bench.learned[spec] = Learned({**learned, "textual_after": np.zeros((3, 5), np.float32)})
    notes = paper.make(bench, "teacher", "").notes
    assert "as many: the same as teacher, which learns from all training videos" in notes
    assert "not measured, too few training videos: more" in notes


# ------------------------------------------------------------------------------------------- tables


def test_markdown_and_csv(tmp_path: Path) -> None:
    columns = [TableColumn("a|b"), TableColumn("mAP", "%"), TableColumn("GFLOPs", "G")]
    table = Table(
        "t",
        "Title",
        columns,
        [
            ["x|y", MeanOverSeeds((0.5, 0.7)), None],
            ["z", MeanOverSeeds((0.25,)), MeanOverSeeds((26.089,))],
        ],
        ["a note"],
    )
    assert table.write(str(tmp_path), ["data: d"]) == ["t.md", "t.csv"]
    text = (tmp_path / "t.md").read_text()
    assert "- data: d\n" in text
    assert "| x\\|y | 60.0 ± 127.1 | - |\n| z | 25.0 | 26.09 |" in text
    rows = list(csv.reader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert rows[0] == ["a|b", "mAP", "mAP ±", "mAP values", "GFLOPs", "GFLOPs ±", "GFLOPs values"]
    assert (rows[1][1], rows[1][3], rows[1][4]) == ("0.6", "0.5;0.7", "")
    assert rows[2][1:4] == ["0.25", "", "0.25"]


def test_table_1_adds_up(bench: Bench) -> None:
    table = paper.make(bench, "table1", "")
    assert [row[0] for row in table.rows] == [
        "Vis.Enc.",
        "Obj.Rec.",
        "Rec.Net.",
        "VQM",
        "TQM",
        "Total",
    ]
    for column in (5, 7):
        *parts, total = (row[column].mean for row in table.rows)  # type: ignore[union-attr]
        assert sum(parts) == pytest.approx(total)


def test_dense_is_measured_once(bench: Bench) -> None:
    dense = next(method for method in METHODS if method.name == "dense")
    assert [measured.budget for measured in measure_at_budgets(bench, dense, (1, 2))] == [
        NUM_FRAMES
    ]
    assert specs_of(bench, dense) == []


# -------------------------------------------------------------------------------------- annotations


@pytest.mark.parametrize(
    ("content", "uri", "segments"),
    [
        ({"videos": {"val/a.mp4": {"segments": [[1, 2.5]]}}}, "/x/val/a.mp4", [(1.0, 2.5)]),
        (
            {"videos": {"val/a.mp4": {"segments": [[1, 2.5]]}}},
            "s3://bucket/deep/val/a.mp4",
            [(1.0, 2.5)],
        ),
        ({"videos": {"val/a.mp4": {"segments": [[1, 2.5]]}}}, "/x/other/a.mp4", []),
        (
            {"database": {"abc": {"annotations": [{"segment": [3, 4], "label": "x"}]}}},
            "/x/v_abc.mkv",
            [(3.0, 4.0)],
        ),
        (
            {"database": {"abc": {"annotations": [{"segment": [3, 4], "label": "x"}]}}},
            "s3://b/abc.mp4",
            [(3.0, 4.0)],
        ),
        (
            {
                "videos": [
                    {
                        "path": "a.mp4",
                        "fps": 10,
                        "segments": [
                            {"start_frame": 0, "end_frame": 5, "kind": "bg"},
                            {"start_frame": 5, "end_frame": 8, "kind": "sal"},
                            {"start_frame": 8, "end_frame": 9, "kind": "confuser"},
                        ],
                    }
                ]
            },
            "/x/a.mp4",
            [(0.45, 0.75)],
        ),
    ],
)
def test_annotation_formats(
    tmp_path: Path, content: Any, uri: str, segments: list[tuple[float, float]]
) -> None:
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    known = read_annotations(str(tmp_path / "annotations.json"))
    assert known.of(uri) == segments
    assert math.isnan(on_evidence([("/nowhere.mp4", [1.0])], known))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"videos": {"a.mp4": {}}}', '{"videos": {"a": {"segments": [[1]]}}}']
)
def test_a_file_that_is_no_annotation_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ManifestError, match="not readable as salient segments"):
        read_annotations(str(tmp_path / "a.json"))


@pytest.mark.data
def test_the_surrogates_annotations(data_dir: Path) -> None:
    known = read_annotations(str(data_dir / "surrogate" / "annotations.json"))
    # of this video's 550 frames at 10 fps 357 to 388 are salient
    assert known.of(str(data_dir / "surrogate" / "train/musical_performance/0000.mp4")) == [
        (35.65, 38.85)
    ]


# ----------------------------------------------------------------------------------------- refusals


def test_what_evaluate_refuses(case: Case, tmp_path: Path) -> None:
    config = evaluation_config(case.model, None, ["evaluate.budgets=[1, 2]"])

    def attempt(*sources: str, **more: Any) -> None:
        evaluate(
            list(sources), case.model, str(tmp_path / "out"), more.pop("config", config), **more
        )

    with pytest.raises(
        RunError, match=r"--table table99: no such table; allowed: table1, table2, figure3"
    ):
        attempt(case.features, tables=["table99"])
    with pytest.raises(RunError, match="one features folder at a time, got 2"):
        attempt(case.features, case.features)
    with pytest.raises(ConfigError, match="K = 9 is above T = 8"):
        attempt(
            case.features, config=evaluation_config(case.model, None, ["evaluate.budgets=[1, 9]"])
        )
    with pytest.raises(ConfigError, match="has a duplicate"):
        evaluation_config(case.model, None, ["evaluate.seeds=[1, 1]"])
    bare = make_bundle(tmp_path / "bare", with_recognizer=False)
    with pytest.raises(ModelError, match="the bundle has no recogniser"):
        evaluate([case.features], bare, str(tmp_path / "out"), config)
    assert not (tmp_path / "out").exists()


def test_another_evaluation_in_the_same_folder_is_refused(case: Case, tmp_path: Path) -> None:
    config = evaluation_config(case.model, None, ["evaluate.budgets=[1, 2]"])
    out = str(tmp_path / "out")
    done = evaluate([case.features], case.model, out, config, tables=["table1"])
    assert done.tables["table1"].files == ("table1.md", "table1.csv")
    more_seeds = evaluation_config(
        case.model, None, ["evaluate.budgets=[1, 2]", "evaluate.seeds=[5]"]
    )
    assert (
        evaluate([case.features], case.model, out, more_seeds, tables=["table1"]).trained_now == 0
    )
    with pytest.raises(
        RunError, match=r"holds another evaluation \(train.epochs: 100 there, 3 now\)"
    ):
        evaluate(
            [case.features],
            case.model,
            out,
            evaluation_config(case.model, None, ["evaluate.budgets=[1]", "train.epochs=3"]),
            tables=["table1"],
        )
    header = (tmp_path / "out" / "table1.md").read_text()
    for part in (
        "T = 8, K = 3",
        "fps of the videos: 10",
        "decoder: uniform by pyav (av 15)",
        "seeds: 5",
        "9 videos measured",
        "1 failed",
        "tsq-ray",
    ):
        assert part in header


def test_a_folder_to_which_another_run_writes_is_refused(case: Case, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    config = evaluation_config(case.model, None, ["evaluate.budgets=[1, 2]"])
    with Lease(out) as lease, pytest.raises(RunError) as refused:
        evaluate([case.features], case.model, out, config, tables=["table1"])
    assert str(refused.value).startswith(f"{out}: {lease.holder} writes to this folder; ")
    assert not (tmp_path / "out").exists()
    with Lease(out):
        evaluate([case.features], case.model, out, config, tables=["table1"], take_over=True)
    assert (tmp_path / "out" / "table1.md").exists()
