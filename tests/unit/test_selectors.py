"""The selectors of the table `selectors`, by what each of them promises."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.evaluate import VAL, Case, make_case

from tsq_ray.config import SamplerConfig
from tsq_ray.evaluation import evaluation_config, paper, read_annotations
from tsq_ray.evaluation.bench import Bench
from tsq_ray.evaluation.catalogue import SELECTING, Method
from tsq_ray.evaluation.measures import MeanOverSeeds, gflops
from tsq_ray.evaluation.methods import (
    cost_of,
    fused_saliency,
    learned_sampler,
    samplers_of,
    selecting_sampler,
)
from tsq_ray.evaluation.samplers import Sampler, confidence, true_class_probability
from tsq_ray.evaluation.selectors import (
    BY_FEATURES,
    BY_SCORE,
    SELECTORS,
    Selected,
    aks,
    bolt,
    dpp,
    focus,
    focus_by,
    focus_looks,
    k_center,
    max_volume,
    stratified,
    top,
)
from tsq_ray.evaluation.store import Store
from tsq_ray.evaluation.trainings import Learned
from tsq_ray.evaluation.videos import load_features
from tsq_ray.model import baselines
from tsq_ray.model.choosers import View, chooser_for, salient_for
from tsq_ray.model.selection import distinct_slots, fused

PROPERTY = settings(max_examples=60, deadline=None)
NONE = np.zeros((0, 0))
"""Features for a selector that looks at none."""


@st.composite
def videos(draw: st.DrawFn, most: int = 24) -> tuple[np.ndarray, np.ndarray, int]:
    """(features [n, D], scores [n], K <= n): some frames alike, some scores equal."""
    count = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = rng.normal(size=(count, draw(st.integers(1, 8))))
    if draw(st.booleans()):
        features = features[rng.integers(0, count, count)]
    scores = rng.random(count)
    if draw(st.booleans()):
        scores = np.round(scores, 1)
    return features, scores, draw(st.integers(1, count))


# ------------------------------------------------------------------------------------------ all


@PROPERTY
@given(videos(), st.sampled_from(sorted(SELECTORS)))
def test_each_takes_k_frames_of_the_video(
    video: tuple[np.ndarray, np.ndarray, int], name: str
) -> None:
    features, scores, count = video
    places = SELECTORS[name](features, scores, count)
    assert len(set(places.tolist())) == len(places) == count
    assert set(places.tolist()) <= set(range(len(scores)))
    assert SELECTORS[name](features, scores, count).tolist() == places.tolist()


@PROPERTY
@given(videos(), st.sampled_from(sorted(SELECTORS)), st.integers(1, 30), st.data())
def test_a_chooser_takes_distinct_source_frames_in_order(
    video: tuple[np.ndarray, np.ndarray, int], name: str, budget: int, data: st.DataObject
) -> None:
    features, scores, distinct = video
    frame_index = np.sort(data.draw(st.permutations(range(len(scores)))) % np.int64(distinct))
    view = View(frame_index, scores=scores, features=features)
    candidates = Selected(budget, name).candidates(view)
    slots = candidates.slots
    assert slots.tolist() == sorted(slots.tolist())
    assert len(set(frame_index[slots].tolist())) == len(slots) == min(budget, distinct)
    assert candidates.selected_by == [name] * len(slots)
    assert candidates.first == len(slots)
    assert Selected(budget, name).enough(candidates, np.zeros((1, 1))).tolist() == list(
        range(len(slots))
    )


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_constant_scores_and_black_frames_are_no_error(name: str) -> None:
    for value in (0.0, 0.3):
        places = SELECTORS[name](np.zeros((9, 4)), np.full(9, value), 4)
        assert len(set(places.tolist())) == 4


@PROPERTY
@given(videos(), st.sampled_from(sorted({*BY_SCORE} - {*BY_FEATURES})))
def test_selectors_by_score_ignore_features_and_scale(
    video: tuple[np.ndarray, np.ndarray, int], name: str
) -> None:
    features, scores, count = video
    scores = np.round(scores * 16) / 16  # exact in binary, so that no tie is decided by rounding
    places = SELECTORS[name](features, scores, count)
    assert SELECTORS[name](-features[::-1], scores, count).tolist() == places.tolist()
    assert SELECTORS[name](features, scores * 4, count).tolist() == places.tolist()


@PROPERTY
@given(videos(), st.sampled_from(["k-center", "maxinfo"]))
def test_selectors_by_features_ignore_scores(
    video: tuple[np.ndarray, np.ndarray, int], name: str
) -> None:
    features, scores, count = video
    places = SELECTORS[name](features, scores, count)
    assert SELECTORS[name](features, 1 - scores, count).tolist() == places.tolist()


# ------------------------------------------------------------------------------------- by score


@PROPERTY
@given(videos())
def test_stratified_takes_the_best_of_each_part(video: tuple[np.ndarray, np.ndarray, int]) -> None:
    features, scores, count = video
    places = stratified(features, scores, count)
    edges = [i * len(scores) // count for i in range(count + 1)]
    for place, (start, stop) in zip(places, itertools.pairwise(edges), strict=True):
        assert start <= place < stop
        assert scores[place] == scores[start:stop].max()


@PROPERTY
@given(videos(), st.sampled_from([{"depth": 0}, {"threshold": -1.0}]))
def test_aks_that_never_splits_is_top_k(
    video: tuple[np.ndarray, np.ndarray, int], options: dict[str, float]
) -> None:
    features, scores, count = video
    scores = np.round(scores * 16) / 16
    assert aks(features, scores, count, **options).tolist() == top(features, scores, count).tolist()


@PROPERTY
@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_aks_that_always_splits_is_stratified(levels: int, width: int, seed: int) -> None:
    count = 2**levels
    scores = np.random.default_rng(seed).random(count * width)
    places = aks(NONE, scores, count, threshold=2.0, depth=levels)
    assert places.tolist() == stratified(NONE, scores, count).tolist()


def test_aks_splits_only_where_nothing_stands_out() -> None:
    scores = np.array([0.0, 0, 1, 0, 0, 0.9, 0, 0, *np.tile([0.4, 0.5], 4)])
    # the best four of all have a mean of 0.725, only 0.38 above the mean of all; the best two of
    # the left half are 0.71 above theirs, those of the right half 0.05
    assert sorted(aks(NONE, scores, 4, threshold=0.6)) == [2, 5, 9, 13]
    assert sorted(aks(NONE, scores, 4, threshold=0.38)) == [2, 5, 9, 11]
    # an odd place goes to the half with the higher mean
    assert sorted(aks(NONE, scores, 3, threshold=0.6)) == [2, 9, 13]
    assert sorted(aks(NONE, scores[::-1].copy(), 3, threshold=0.6)) == [0, 4, 13]


@PROPERTY
@given(st.integers(1, 60), st.data(), st.floats(0, 1))
def test_bolt_with_equal_scores_is_uniform(length: int, data: st.DataObject, score: float) -> None:
    count = data.draw(st.integers(1, length))
    places = bolt(NONE, np.full(length, score), count)
    assert places.tolist() == baselines.uniform(np.arange(length), count).slots.astype(int).tolist()


@PROPERTY
@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.data(), st.sampled_from([1.0, 3.0]))
def test_bolt_takes_frames_in_proportion_to_the_scores(
    length: int, seed: int, data: st.DataObject, power: float
) -> None:
    count = data.draw(st.integers(1, length))
    scores = np.random.default_rng(seed).random(length)
    weights = ((scores - scores.min()) / (scores.max() - scores.min())) ** power
    shares = weights / weights.sum()
    assume(count * shares.max() < 1)  # no frame is hit twice
    places = np.sort(bolt(NONE, scores, count, power=power))
    taken = (places[:, None] <= np.arange(length)).sum(axis=0)
    # between any two frames, the number taken is the mass rounded up or down
    assert np.abs(taken - count * np.cumsum(shares)).max() <= 0.5 + 1e-9


def test_bolt_fills_the_places_of_a_frame_hit_twice() -> None:
    scores = np.array([0.0, 0.1, 0.9, 0.0, 0.2, 0.0])
    # the mass ends at 0, 1/12, 10/12, 10/12, 1, 1: steps at 1/6, 1/2 hit frame 2, 5/6 hits frame 4
    assert sorted(bolt(NONE, scores, 3)) == [1, 2, 4]


@PROPERTY
@given(videos(60))
def test_focus_takes_the_best_of_what_it_explores(
    video: tuple[np.ndarray, np.ndarray, int],
) -> None:
    features, scores, count = video
    looked: set[int] = set()

    def look(places: np.ndarray) -> np.ndarray:
        looked.update(places.tolist())
        return scores[places]

    places = focus_by(look, len(scores), count)
    assert places.tolist() == focus(features, scores, count).tolist()
    assert set(places.tolist()) <= looked
    assert len(looked) <= focus_looks(len(scores), count) <= len(scores)
    others = np.where(np.isin(np.arange(len(scores)), list(looked)), scores, 99.0)
    assert focus(features, others, count).tolist() == places.tolist()  # never read


def test_focus_looks_again_where_the_first_look_was_promising() -> None:
    assert focus_looks(50, 5) == 29  # 2 of 5 frames in 10 clips, the other 3 in 3 of the clips
    scores = np.full(50, 0.2)
    scores[31] = 0.5  # seen at once: 1 and 3 of 5; the clip is explored
    scores[32] = 0.9  # found there
    scores[47] = 1.0  # not seen: neither at first, nor in an explored clip
    assert {31, 32} <= set(focus(NONE, scores, 5).tolist())
    assert 47 not in focus(NONE, scores, 5)
    # of two clips with the same mean, the one that varies is explored
    scores = np.zeros(20)
    scores[[1, 3]], scores[[5, 8]] = 0.4, 0.4
    scores[[6, 8]], scores[9] = [0.0, 0.8], 1.0
    assert 9 in focus(NONE, scores, 2)


# ---------------------------------------------------------------------------------- by features


def cover(points: np.ndarray, places: np.ndarray) -> float:
    """The largest distance of a frame from the nearest one taken."""
    return float(np.linalg.norm(points[:, None] - points[places], axis=2).min(axis=1).max())


@PROPERTY
@given(videos(9))
def test_k_center_covers_at_most_twice_as_far_as_the_best(
    video: tuple[np.ndarray, np.ndarray, int],
) -> None:
    features, scores, count = video
    points = features / np.linalg.norm(features, axis=1, keepdims=True)
    best = min(
        cover(points, np.array(places))
        for places in itertools.combinations(range(len(points)), count)
    )
    places = k_center(features, scores, count)
    assert cover(points, places) <= 2 * best + 1e-9
    even = baselines.uniform(np.arange(len(points)), count).slots
    assert cover(points, places) <= 2 * cover(points, even) + 1e-9


def test_k_center_visits_each_scene_and_uniform_does_not() -> None:
    scenes = np.eye(4)[[0] * 17 + [1, 2, 3]]
    features = scenes + np.random.default_rng(0).normal(scale=0.01, size=scenes.shape)
    places = k_center(features, np.ones(20), 4)
    assert set(scenes[places].argmax(1)) == {0, 1, 2, 3}
    assert len(set(scenes[baselines.uniform(np.arange(20), 4).slots].argmax(1))) < 4
    # nearest to the mean comes first, and the length of a feature does not matter
    assert places[0] < 17
    assert k_center(features * np.arange(1, 21)[:, None], np.ones(20), 4).tolist() == list(places)


def kernel_of(features: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The kernel of `dpp`, entry by entry."""
    points = [row / np.linalg.norm(row) for row in features]
    squared = np.array([[((a - b) ** 2).sum() for b in points] for a in points])
    similarity = np.exp(-squared / (2 * squared.mean()))
    return similarity * np.outer(scores, scores) / scores.max() ** 2


@PROPERTY
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.data())
def test_dpp_adds_the_frame_with_the_largest_determinant(
    length: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    features, scores = rng.normal(size=(length, 6)), rng.uniform(0.1, 1, length)
    count = data.draw(st.integers(1, length))
    kernel, taken = kernel_of(features, scores), list[int]()
    for place in dpp(features, scores, count):
        determinants = {
            other: np.linalg.det(kernel[np.ix_([*taken, other], [*taken, other])])
            for other in range(length)
            if other not in taken
        }
        assert determinants[place] >= max(determinants.values()) * (1 - 1e-6) - 1e-12
        taken.append(int(place))


def test_dpp_takes_no_frame_twice_and_relevant_ones_first() -> None:
    features = np.repeat(np.eye(4), 3, axis=0)
    scores = np.linspace(0.9, 0.8, 12)
    assert sorted(dpp(features, scores, 4)) == [0, 3, 6, 9]  # the best of each three alike
    assert sorted(top(features, scores, 4)) == [0, 1, 2, 3]
    scores[4] = 1.0
    assert dpp(features, scores, 1).tolist() == [4]


@PROPERTY
@given(videos(), st.sampled_from(["both", "visual", "textual"]), st.data())
def test_a_diverse_sampler_is_dpp_on_the_saliency_of_its_modules(
    video: tuple[np.ndarray, np.ndarray, int], mode: str, data: st.DataObject
) -> None:
    features, visual, budget = video
    textual = np.random.default_rng(budget).random(len(visual))
    frame_index = np.sort(data.draw(st.permutations(range(len(visual)))) % np.int64(budget))
    config = SamplerConfig(budget=budget, selection="dpp", mode=mode, lambda_visual=0.3)
    chosen = chooser_for(config).candidates(View(frame_index, "", visual, textual, None, features))
    share = {"both": 0.3, "visual": 1.0, "textual": 0.0}[mode]
    slots = distinct_slots(frame_index)
    scores = fused(visual, textual, share)[slots]
    expected = slots[dpp(features[slots], scores, min(budget, len(slots)))]
    assert chosen.slots.tolist() == sorted(expected.tolist())
    assert chosen.selected_by == ["dpp"] * len(slots)
    alone = View(frame_index, "", visual, features=features)
    if mode != "textual":
        only = chooser_for(config.model_copy(update={"mode": "visual"})).candidates(alone)
        assert chooser_for(config).candidates(alone).slots.tolist() == only.slots.tolist()
    adaptive = salient_for(config, config.mode, budget, adaptive=True)
    order = adaptive.candidates(View(frame_index, "", visual, textual, None, features)).slots
    assert order.tolist() == expected.tolist(), "the recogniser sees the surest first"


@PROPERTY
@given(st.integers(1, 14), st.integers(0, 2**32 - 1), st.data())
def test_max_volume_cannot_be_raised_by_a_swap(length: int, seed: int, data: st.DataObject) -> None:
    features = np.random.default_rng(seed).normal(size=(length, 16)) ** 3
    count = data.draw(st.integers(1, length))
    places = max_volume(features, np.ones(length), count)
    rows = np.linalg.svd(features, full_matrices=False)[0][:, :count]
    volume = abs(np.linalg.det(rows[places]))
    for out, into in itertools.product(range(count), set(range(length)) - set(places.tolist())):
        swapped = places.copy()
        swapped[out] = into
        assert abs(np.linalg.det(rows[swapped])) <= volume * 1.05 + 1e-12


def test_max_volume_of_few_scenes_takes_each_and_fills_up() -> None:
    features = np.eye(6)[[0, 0, 0, 1, 1, 2, 2, 2]] * 3.0
    places = max_volume(features, np.ones(8), 3)
    assert set(features[places].argmax(1)) == {0, 1, 2}
    assert len(set(max_volume(features, np.ones(8), 5).tolist())) == 5


# ------------------------------------------------------------------------------------ the table


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("selectors"))


@pytest.fixture
def bench(case: Case, tmp_path: Path) -> Bench:
    """A bench whose trainings are done: seed 0 finds the evidence, seed 1 finds the rest."""
    config = evaluation_config(case.model, None, ["evaluate.seeds=[0, 1]", "sampler.budget=2"])
    features = load_features(case.features, case.bundle, None)
    known = read_annotations(case.annotations)
    made = Bench(case.bundle, features, config, known, Store(str(tmp_path), {}))
    evidence = true_class_probability(made.videos, "single").astype(np.float32)
    for seed, saliency in ((0, evidence), (1, 1 - evidence)):
        made.learned[made.spec({"modules": "both"}, {}, seed)] = Learned(
            {"saliency_visual": saliency, "saliency_textual": saliency}
        )
    return made


def method(name: str) -> Method:
    return next(one for one in SELECTING if one.name == name)


def test_the_table_has_every_selector_by_every_score(bench: Bench) -> None:
    table = paper.make(bench, "selectors", "")
    rows = {(row[0], row[1]): dict(zip(table.titles, row, strict=True)) for row in table.rows}
    assert len(rows) == len(table.rows) == 4 + 1 + 2 + 3 * 5
    assert set(rows) == {
        *((name, "-") for name in ("uniform", "maxconf", "maxconf-l", "tsqnet")),
        *((name, "-") for name in ("k-center", "maxinfo")),
        ("top-k", "tsqnet"),
        *itertools.product(BY_SCORE, ("maxconf-l", "maxconf", "tsqnet")),
    }
    for (_, score), row in rows.items():
        figure = row["mAP"]
        assert isinstance(figure, MeanOverSeeds)
        trained = score == "tsqnet" or row["selector"] == "tsqnet"
        assert len(figure.values) == (2 if trained else 1)
        assert isinstance(row["frames"], MeanOverSeeds)
        assert row["frames"].mean == 2
    plain, fused = rows["tsqnet", "-"], rows["top-k", "tsqnet"]
    assert isinstance(plain["mAP"], MeanOverSeeds)
    assert plain["mAP"].values[0] == 1
    assert plain["mAP"].values[1] < 0.9
    assert fused["mAP"] == plain["mAP"]  # both modules agree here
    assert plain["over tsqnet"] is None
    over = rows["uniform", "-"]["over tsqnet"]
    assert isinstance(over, MeanOverSeeds)
    assert over.values == tuple(
        rows["uniform", "-"]["mAP"].mean - value  # type: ignore[union-attr]
        for value in plain["mAP"].values
    )


def test_without_a_training_split_the_others_are_measured(bench: Bench) -> None:
    bench.features = dataclasses.replace(bench.features, training=None)
    table = paper.make(bench, "selectors", "")
    assert len(table.rows) == 3 + 2 + 2 * 5
    assert all(row[-1] is None for row in table.rows)
    assert "tsqnet" in table.notes[0]
    assert paper.specs_for(bench, "selectors") == []


@pytest.mark.parametrize("counting", ["field", "true"])
def test_a_row_costs_its_score_and_no_more(bench: Bench, counting: str) -> None:
    def cost(name: str) -> float:
        found = cost_of(bench, method(name), 1, counting)  # type: ignore[arg-type]
        assert found is not None
        return found

    for score in ("maxconf-l", "maxconf", "tsqnet"):
        for selector in ("stratified", "aks", "bolt"):
            assert cost(f"{selector} by {score}") == cost(score)
    assert cost("k-center") == cost("maxinfo") == cost("dpp by maxconf-l") == cost("maxconf-l")
    assert cost("dpp by tsqnet") == cost("focus by tsqnet") == cost("tsqnet")
    # the recogniser sees all T, and the light encoder too
    assert cost("dpp by maxconf") == pytest.approx(
        cost("maxconf") + cost("maxconf-l") - cost("uniform")
    )
    num_frames = bench.videos.num_frames
    looks = focus_looks(num_frames, 1)
    assert looks < num_frames
    assert cost("focus by maxconf") == pytest.approx(cost("maxconf") * looks / num_frames)
    light = cost("maxconf-l") - cost("uniform")
    assert cost("focus by maxconf-l") == pytest.approx(cost("uniform") + light * looks / num_frames)
    shape = bench.bundle.sampler.shape
    assert cost("uniform") == gflops(bench.bundle, "uniform", num_frames, 1, shape, counting)  # type: ignore[arg-type]


def test_scores_are_those_of_the_plain_rows(bench: Bench) -> None:
    """By the recogniser's confidence, the K best are MaxConf's frames."""
    scores = confidence(bench.videos.logits, "single")
    ranked = Sampler(
        bench.videos, "single", lambda budget: Selected(budget, "top-k"), scores=scores,
        features=bench.videos.visual,
    )  # fmt: skip
    (plain,), _ = samplers_of(bench, method("maxconf"))
    for video in range(VAL):
        assert ranked.choose(video, 3).tolist() == plain.choose(video, 3).tolist()


def test_a_diverse_bench_measures_the_row_dpp(bench: Bench) -> None:
    """`sampler.selection` is what `dpp` by `tsqnet` measures; the table's own row stays plain."""
    arrays = {
        "saliency_visual": np.random.default_rng(0).random(bench.videos.frame_index.shape),
        "saliency_textual": np.random.default_rng(1).random(bench.videos.frame_index.shape),
    }
    sampler = bench.config.sampler.model_copy(update={"selection": "dpp"})
    diverse = dataclasses.replace(
        bench, config=bench.config.model_copy(update={"sampler": sampler})
    )
    setting = learned_sampler(diverse, arrays, "both")
    row = selecting_sampler(bench, method("dpp by tsqnet"), fused_saliency(bench, arrays))
    plain = learned_sampler(bench, arrays, "both")
    found = [
        [one.choose(video, 2).tolist() for video in range(VAL)] for one in (setting, row, plain)
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_the_saliencies_are_fused_by_lambda(bench: Bench) -> None:
    visual, textual = np.ones((2, 3)), np.zeros((2, 3))
    fused = fused_saliency(bench, {"saliency_visual": visual, "saliency_textual": textual})
    np.testing.assert_allclose(fused, bench.config.sampler.lambda_visual)
    np.testing.assert_allclose(fused_saliency(bench, {"saliency_visual": visual}), 1)
