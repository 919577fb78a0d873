"""Encode, Sample and Recognize on made-up frames with tiny random networks: no files, no Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.bundle import BUDGET, NUM_FRAMES, make_bundle

from tsq_ray import schema
from tsq_ray.bundle.weights import Bundle, load_bundle
from tsq_ray.config import SamplerConfig
from tsq_ray.decode import WHOLE, DecodedVideo, FrameSpec
from tsq_ray.decode.frames import resize_picture
from tsq_ray.errors import ConfigError, ModelError, StorageError, VideoError
from tsq_ray.manifest import VideoRef
from tsq_ray.model import TSQNet, object_embeddings, saliency
from tsq_ray.model.diversity import dpp
from tsq_ray.model.selection import fused
from tsq_ray.rows import (
    OBJECTS,
    RECOGNIZER,
    VISUAL,
    failed_row,
    identity_row,
    plain_row,
    prediction_row,
    source_columns,
)
from tsq_ray.stages import Encode, Recognize, Sample, bundle_specs

CPU = torch.device("cpu")
MODES = ("both", "visual", "textual", "uniform", "random", "maxconf-l", "maxconf")
FAILURES = (
    VideoError("corrupt", "v: no frame\ncan be decoded"),
    StorageError("unavailable", "https://h/v?key=s3cret: no answer"),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(uri: str) -> Bundle:
    return load_bundle(uri)


def ref(number: int) -> VideoRef:
    return VideoRef(f"{number:016x}", f"/videos/{number}.mp4", 10, labels=(1,), split="val")


def video(bundle: Bundle, seed: int, num_distinct: int = NUM_FRAMES) -> DecodedVideo:
    """`num_distinct` source frames, every third of its file, as random pictures in all sizes."""
    rng = np.random.default_rng(seed)
    slot_frame = np.arange(NUM_FRAMES, dtype=np.int32) % num_distinct
    frame_index = slot_frame * 3
    specs = bundle_specs(bundle, "both")
    return DecodedVideo(
        frames={
            name: rng.integers(0, 255, (num_distinct, spec.size, spec.size, 3), np.uint8)
            for name, spec in specs.items()
        },
        slot_frame=slot_frame,
        frame_index=frame_index,
        frame_pts_s=(frame_index / 8).astype(np.float32),
        duration_s=num_distinct * 3 / 8,
        fps=8.0,
        width=96,
        height=64,
        codec="h264",
        source_num_frames=num_distinct * 3,
        warnings=[],
        decode_ms=1.5,
    )


def score(bundle: Bundle, items: list[Any], **settings: Any) -> list[dict[str, Any]]:
    config = SamplerConfig(**({"budget": BUDGET} | settings))
    answers = Recognize(bundle, CPU)(
        Sample(bundle, config, CPU)([(one.video_id, seen) for one, seen in items])
    )
    return [prediction_row(one, answer) for (one, _), answer in zip(items, answers, strict=True)]


# ------------------------------------------------------------------------------------------- encode


def test_stages_use_no_gpu_that_nobody_gave_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As workers with resources.gpus = 0 on a machine whose GPU Ray does not hide."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stages = (
        Encode(bundle.encoder, bundle.objects),
        Sample(bundle, SamplerConfig(budget=BUDGET)),
        Recognize(bundle),
    )
    assert {stage.device for stage in stages} == {CPU}


def test_encode_gives_each_slot_its_features(bundle: Bundle) -> None:
    encode = Encode(bundle.encoder, bundle.objects, bundle.recognizer, CPU)
    features = encode([video(bundle, 0), video(bundle, 1, num_distinct=3)])
    for feature in features:
        assert feature.visual.shape == (NUM_FRAMES, bundle.encoder.dim)
        assert feature.object_ids is not None
        assert feature.object_probs is not None
        assert feature.object_ids.shape == feature.object_probs.shape == (NUM_FRAMES, 10)
        assert (np.diff(feature.object_probs, axis=1) <= 0).all(), "best first"
        assert (feature.object_probs.sum(axis=1) < 1).all(), "not renormalised"
        assert feature.visual_logits is not None
        assert feature.recognizer_logits is not None
        assert (
            feature.visual_logits.shape
            == feature.recognizer_logits.shape
            == (NUM_FRAMES, len(bundle.classes))
        )
    short = features[1].visual
    assert np.array_equal(short[:3], short[3:6])
    assert not np.array_equal(short[0], short[1])


def test_encode_gives_as_many_objects_as_requested(bundle: Bundle) -> None:
    few, every = (
        Encode(bundle.encoder, bundle.objects, device=CPU, num_objects=count)([video(bundle, 0)])[0]
        for count in (3, 1000)
    )
    assert few.object_ids is not None
    assert every.object_ids is not None
    assert every.object_probs is not None
    assert np.array_equal(few.object_ids, every.object_ids[:, :3])
    assert np.array_equal(
        np.sort(every.object_ids, axis=1), np.tile(np.arange(1000), (NUM_FRAMES, 1))
    )
    np.testing.assert_allclose(every.object_probs.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("top_objects", [1, 10])
def test_scoring_sees_the_objects_that_training_saw(bundle: Bundle, top_objects: int) -> None:
    shape = dataclasses.replace(bundle.sampler.shape, top_objects=top_objects)
    network = TSQNet(shape).eval().requires_grad_(False)
    network.load_state_dict(bundle.sampler.state_dict())
    one = video(bundle, 0)
    sampled = Sample(
        dataclasses.replace(bundle, sampler=network), SamplerConfig(budget=BUDGET), CPU
    )([(ref(0).video_id, one)])[0]
    feature = Encode(bundle.encoder, bundle.objects, device=CPU)([one])[0]
    ids, probs = (
        torch.from_numpy(array[None, :, :top_objects])
        for array in (feature.object_ids, feature.object_probs)
    )
    output = network(
        torch.from_numpy(feature.visual)[None], object_embeddings(ids, probs, bundle.vocabulary)
    )
    expected = saliency(output.attention_textual, output.logits_textual, "single")[0]
    np.testing.assert_allclose(
        sampled.row["saliency_textual"], expected.numpy(), rtol=1e-4, atol=1e-6
    )


def test_encode_gives_a_video_the_same_alone_and_in_company(bundle: Bundle) -> None:
    encode = Encode(bundle.encoder, bundle.objects, device=CPU)
    alone = encode([video(bundle, 1)])[0]
    together = encode([video(bundle, 0, 3), video(bundle, 1)])[1]
    assert alone.object_ids is not None
    assert together.object_ids is not None
    np.testing.assert_allclose(alone.visual, together.visual, rtol=1e-4, atol=1e-5)
    assert np.array_equal(alone.object_ids, together.object_ids)


def test_encode_without_the_textual_side_and_without_videos(bundle: Bundle) -> None:
    encode = Encode(bundle.encoder, None, device=CPU)
    assert encode([]) == []
    feature = encode([video(bundle, 0)])[0]
    assert feature.object_ids is None
    assert feature.recognizer_logits is None


# ----------------------------------------------------------------------------- sample and recognize


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_with_a_row_of_the_schema(bundle: Bundle, mode: str) -> None:
    videos = [video(bundle, seed) for seed in range(3)]
    rows = score(bundle, [(ref(number), item) for number, item in enumerate(videos)], mode=mode)
    arrow = schema.predictions_schema(NUM_FRAMES, len(bundle.classes), bundle.classes)
    table = schema.table_from_rows(rows, arrow)
    assert table["video_id"].to_pylist() == [ref(number).video_id for number in range(3)]
    assert table["status"].to_pylist() == ["ok"] * 3
    learned = mode in ("both", "visual", "textual")
    assert table["saliency_visual"].null_count == (0 if learned else 3)
    assert table["saliency_textual"].null_count == (0 if mode in ("both", "textual") else 3)
    for row in rows:
        slots = row["selected_slot"].tolist()
        assert len(slots) == len(set(slots)) == BUDGET
        assert slots == sorted(slots)
        assert row["selected_index"].tolist() == [3 * slot for slot in slots]
        assert row["selected_pts_s"].tolist() == [3 * slot / 8 for slot in slots]
        assert set(row["selected_by"]) <= ({"visual", "textual"} if mode == "both" else {mode})
        assert abs(float(row["scores"].sum()) - 1) < 1e-5
        best = [bundle.classes[number] for number in np.argsort(-row["scores"])]
        assert row["top_labels"] == best
        assert row["top_scores"].tolist() == sorted(row["scores"].tolist(), reverse=True)
        assert row["decode_ms"] == 1.5


def test_salient_frames_that_differ(bundle: Bundle) -> None:
    """`sampler.selection = "dpp"` looks at the features of the light encoder."""
    seen = video(bundle, 0)
    (row,) = score(bundle, [(ref(0), seen)], selection="dpp", lambda_visual=0.25)
    (features,) = Encode(bundle.encoder, None, device=CPU)([seen])
    saliency = fused(row["saliency_visual"], row["saliency_textual"], 0.25)
    expected = dpp(features.visual, saliency, BUDGET)
    assert row["selected_slot"].tolist() == sorted(expected.tolist())
    assert row["selected_by"] == ["dpp"] * BUDGET
    (baseline,) = score(bundle, [(ref(0), seen)], selection="dpp", mode="uniform")
    assert baseline["selected_by"] == ["uniform"] * BUDGET


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_distinct", [1, 2])
def test_a_short_video_gives_all_its_frames(bundle: Bundle, mode: str, num_distinct: int) -> None:
    (row,) = score(bundle, [(ref(0), video(bundle, 0, num_distinct))], mode=mode)
    assert row["selected_slot"].tolist() == list(range(num_distinct))
    assert len(row["top_labels"]) == len(bundle.classes)


@pytest.mark.parametrize("mode", MODES)
def test_failed_videos_pass_through_in_their_places(bundle: Bundle, mode: str) -> None:
    items = [(ref(0), FAILURES[0]), (ref(1), video(bundle, 1)), (ref(2), FAILURES[1])]
    rows = score(bundle, items, mode=mode)
    assert [row["status"] for row in rows] == ["failed", "ok", "failed"]
    assert [row["video_id"] for row in rows] == [ref(number).video_id for number in range(3)]
    assert [row.get("error_type") for row in rows] == ["corrupt", None, "unavailable"]
    assert rows[0]["error_message"] == "v: no frame can be decoded"
    assert "s3cret" not in rows[2]["error_message"]
    alone = score(bundle, [items[1]], mode=mode)[0]
    np.testing.assert_allclose(rows[1]["scores"], alone["scores"], atol=1e-5)
    assert rows[1]["selected_slot"].tolist() == alone["selected_slot"].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_failures_needs_no_network(bundle: Bundle, mode: str) -> None:
    rows = score(bundle, [(ref(0), FAILURES[0])], mode=mode)
    assert rows == [failed_row(ref(0), FAILURES[0])]
    assert score(bundle, [], mode=mode) == []


def test_the_answer_is_that_of_the_chosen_frames_alone(bundle: Bundle) -> None:
    item = video(bundle, 5)
    (row,) = score(bundle, [(ref(0), item)])
    assert bundle.recognizer is not None
    logits = bundle.recognizer(torch.from_numpy(item.slots(RECOGNIZER)[row["selected_slot"]]))[1]
    np.testing.assert_allclose(row["scores"], logits.mean(0).softmax(0).detach().numpy(), atol=1e-5)


def test_maxconf_takes_the_surest_frames_of_the_recogniser(bundle: Bundle) -> None:
    item = video(bundle, 6)
    (row,) = score(bundle, [(ref(0), item)], mode="maxconf")
    assert bundle.recognizer is not None
    surest = bundle.recognizer(torch.from_numpy(item.slots(RECOGNIZER)))[1].softmax(1).max(1).values
    assert set(row["selected_slot"].tolist()) == set(surest.topk(BUDGET).indices.tolist())


def test_maxconf_l_takes_the_surest_frames_of_the_light_encoder(bundle: Bundle) -> None:
    item = video(bundle, 6)
    (row,) = score(bundle, [(ref(0), item)], mode="maxconf-l")
    surest = bundle.encoder(torch.from_numpy(item.slots(VISUAL)))[1].softmax(1).max(1).values
    assert set(row["selected_slot"].tolist()) == set(surest.topk(BUDGET).indices.tolist())


def test_uniform_takes_the_middles_and_random_depends_on_seed_and_video(bundle: Bundle) -> None:
    items = [(ref(number), video(bundle, 0)) for number in range(6)]
    assert {
        tuple(row["selected_slot"].tolist()) for row in score(bundle, items, mode="uniform")
    } == {(1, 4, 6)}
    first, again, other = (
        [
            tuple(row["selected_slot"].tolist())
            for row in score(bundle, items, mode="random", seed=seed)
        ]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) > 1


def test_an_adaptive_budget_stops_when_the_recogniser_is_sure(bundle: Bundle) -> None:
    """Fixed K is an adaptive budget that is never sure.

    Each video stops for itself, in a batch as alone.
    """
    items: list[Any] = [(ref(number), video(bundle, number)) for number in range(6)] + [
        (ref(9), FAILURES[0])
    ]
    whole = score(bundle, items, budget=6)
    never = score(bundle, items, budget="adaptive", max_budget=6, margin=7.0)
    for one, other in zip(never[:-1], whole[:-1], strict=True):
        assert one["selected_slot"].tolist() == other["selected_slot"].tolist()
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-6)
    assert bundle.recognizer is not None
    margins = []
    for _, item in items[:-1]:
        summed = (
            bundle.recognizer(torch.from_numpy(item.slots(RECOGNIZER)))[1]
            .softmax(1)
            .sum(0)
            .sort()
            .values
        )
        margins.append(float(summed[-1] - summed[-2]))
    margin = (
        sorted(margins)[3] / NUM_FRAMES * 3
    )  # what the middling video needs three of its eight frames for
    rows = score(bundle, items, budget="adaptive", max_budget=6, margin=margin)
    taken = [len(row["selected_slot"]) for row in rows[:-1]]
    assert len(set(taken)) > 1, taken
    for row, full, (_, item) in zip(rows[:-1], whole[:-1], items[:-1], strict=True):
        slots = row["selected_slot"]
        assert set(slots) <= set(full["selected_slot"])
        assert list(slots) == sorted(slots)
        assert (
            len(slots)
            == len(row["selected_by"])
            == len(row["selected_index"])
            == len(row["selected_pts_s"])
        )
        logits = bundle.recognizer(torch.from_numpy(item.slots(RECOGNIZER)[slots]))[1]
        np.testing.assert_allclose(
            row["scores"], logits.mean(0).softmax(0).detach().numpy(), atol=1e-5
        )
        summed = logits.softmax(1).sum(0).sort().values
        assert (float(summed[-1] - summed[-2]) >= margin) or len(slots) == 6
    assert rows[-1]["status"] == "failed"


def test_multi_label_scores_are_independent(bundle: Bundle) -> None:
    import dataclasses

    multi = dataclasses.replace(bundle, task="multi")
    item = video(bundle, 5)
    (row,) = score(multi, [(ref(0), item)])
    assert bundle.recognizer is not None
    logits = bundle.recognizer(torch.from_numpy(item.slots(RECOGNIZER)[row["selected_slot"]]))[1]
    np.testing.assert_allclose(row["scores"], logits.mean(0).sigmoid().detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("both", {VISUAL, OBJECTS, RECOGNIZER}),
        ("visual", {VISUAL, RECOGNIZER}),
        ("textual", {VISUAL, OBJECTS, RECOGNIZER}),
        ("maxconf-l", {VISUAL, RECOGNIZER}),
        ("uniform", {RECOGNIZER}),
        ("maxconf", {RECOGNIZER}),
    ],
)
def test_only_the_pictures_that_a_mode_needs_are_made(
    bundle: Bundle, mode: str, expected: set[str]
) -> None:
    assert set(bundle_specs(bundle, mode)) == expected


@pytest.mark.parametrize("mode", ["visual", "uniform"])
def test_a_mode_works_on_the_pictures_it_requested(bundle: Bundle, mode: str) -> None:
    item = video(bundle, 0)
    item.frames = {name: item.frames[name] for name in bundle_specs(bundle, mode)}
    assert score(bundle, [(ref(0), item)], mode=mode)[0]["status"] == "ok"


@pytest.mark.parametrize("mode", MODES)
def test_whole_frames_are_resized_for_each_network(bundle: Bundle, mode: str) -> None:
    config, specs = SamplerConfig(budget=BUDGET, mode=mode), bundle_specs(bundle, mode)
    made, whole = video(bundle, 3), video(bundle, 3)
    rng = np.random.default_rng(4)
    # smooth pictures, as from a camera: a rounding changes those of noise completely
    frames = np.stack(
        [
            resize_picture(rng.integers(0, 256, (4, 6, 3), np.uint8), FrameSpec(64), (96, 64))
            for _ in range(NUM_FRAMES)
        ]
    )
    made.frames = {
        name: np.stack([resize_picture(frame, spec) for frame in frames])
        for name, spec in specs.items()
    }
    whole.frames = {WHOLE: frames}
    expected, row = (
        Recognize(bundle, CPU)(Sample(bundle, config, CPU)([(ref(0).video_id, one)]))[0].columns
        for one in (made, whole)
    )
    assert row["scores"] == pytest.approx(expected["scores"], abs=0.02)
    assert row["top_labels"] == expected["top_labels"]
    assert len(row["selected_slot"]) == BUDGET


# ----------------------------------------------------------------------------------------- refusals


def test_a_budget_above_t_is_refused(bundle: Bundle) -> None:
    with pytest.raises(
        ConfigError, match=r"sampler.budget \(K\) is 9, above decode.num_frames \(T\) = 8"
    ):
        Sample(bundle, SamplerConfig(budget=9), CPU)


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        (
            {"mode": "uniform"},
            "single",
            r"'adaptive' needs frames ranked by saliency, which sampler\.mode 'uniform' does "
            r"not give",
        ),
        (
            {"max_budget": 9},
            "single",
            r"sampler\.max_budget is 9, above decode\.num_frames \(T\) = 8",
        ),
        (
            {},
            "multi",
            "waits for one class to lead, but with train.task 'multi' several may be true; use "
            "a number",
        ),
    ],
)
def test_an_impossible_adaptive_budget(
    bundle: Bundle, settings: dict[str, Any], task: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Sample(
            dataclasses.replace(bundle, task=task),
            SamplerConfig(budget="adaptive", **settings),
            CPU,
        )


def test_a_bundle_without_a_recogniser_is_refused(tmp_path: Path) -> None:
    bundle = load_bundle(make_bundle(tmp_path, with_recognizer=False))
    with pytest.raises(
        ModelError, match="the bundle has no recogniser; train it again with --recognizer URI"
    ):
        Sample(bundle, SamplerConfig(budget=BUDGET), CPU)


def test_textual_of_a_visual_bundle_is_refused(bundle: Bundle) -> None:
    import dataclasses

    visual = dataclasses.replace(bundle, objects=None, vocabulary=None)
    with pytest.raises(
        ModelError,
        match=r"sampler\.mode 'textual': the bundle was trained with train.modules = 'visual'",
    ):
        Sample(visual, SamplerConfig(budget=BUDGET, mode="textual"), CPU)
    (row,) = score(visual, [(ref(0), video(bundle, 0))], mode="both")
    assert set(row["selected_by"]) == {"visual"}
    assert row["saliency_textual"] is None


# --------------------------------------------------------------------------------------------- rows


def test_a_plain_row_is_json_without_the_manifests_labels(bundle: Bundle) -> None:
    (row,) = score(bundle, [(ref(0), video(bundle, 0))])
    plain = plain_row(row | {"uri": "https://h/v.mp4?key=s3cret"})
    assert not {"labels", "label_names", "split"} & set(plain)
    assert plain["uri"] == "https://h/v.mp4?..."
    assert plain["selected_slot"] == row["selected_slot"].tolist()
    assert isinstance(plain["scores"], list)


def test_a_source_row_keeps_what_the_manifest_says(bundle: Bundle) -> None:
    row = identity_row(ref(7)) | source_columns(video(bundle, 0))
    assert (row["labels"], row["split"], row["status"], row["codec"]) == ([1], "val", "ok", "h264")
