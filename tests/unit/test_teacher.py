"""What a recogniser teaches: targets from its surest frames, the classes that it finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.train import (
    CLASSES,
    FRAMES,
    SHAPE,
    VIDEOS,
    config_with,
    make_arrays,
    make_start,
    make_vocabulary,
    video_id,
    write_features,
)

from tsq_ray.config import FinetuneConfig, HeadConfig, Task
from tsq_ray.errors import RunError
from tsq_ray.model.choosers import MostConfident, View, choose
from tsq_ray.training.features import (
    FeatureSource,
    Teacher,
    frames_and_logits,
    open_training_set,
    select_videos,
)
from tsq_ray.training.on_worker import FeatureWorker
from tsq_ray.training.sampler.loop import fit_tsqnet
from tsq_ray.training.teacher import shown_classes, soft_targets, taught_classes

TEACHER = Teacher(("a", "b", "c", "d", "e"), num_frames=2)
"""Of more classes than the videos show."""
INDEX = np.arange(FRAMES, dtype=np.int32) % (FRAMES - 1)
"""The last slot repeats the first frame."""


def logits_of(labels: np.ndarray) -> np.ndarray:
    """The frame of its class shows it, the others show nothing: float16 [V, T, 5]."""
    logits = np.random.default_rng(9).normal(scale=0.1, size=(VIDEOS, FRAMES, 5))
    logits[np.arange(VIDEOS), labels, labels] += 4
    return logits.astype(np.float16)


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits.astype(np.float32)).softmax(-1).numpy()


@pytest.fixture
def features(tmp_path: Path) -> str:
    """No video has a label that the recogniser does not give it."""
    return features_in(tmp_path, logits_of(make_arrays()["targets"].argmax(1)))


def features_in(tmp_path: Path, logits: np.ndarray) -> str:
    arrays = make_arrays()
    arrays["recognizer_logits"] = logits
    arrays["frame_index"] = np.tile(INDEX, (VIDEOS, 1))
    write_features(str(tmp_path / "features"), arrays, tmp_path / "words.txt")
    return str(tmp_path / "features")


def test_targets_are_the_mean_of_the_surest_frames() -> None:
    logits = np.array([[[0, 0, 0], [5, 0, 0], [0, 1, 0], [0, 0, 9]]], np.float16)
    index = np.arange(4)[None]
    found = soft_targets(logits, index, 2, "single")
    assert found.dtype == np.float16
    assert found[0] == pytest.approx(softmax(logits)[0, [1, 3]].mean(0), abs=1e-3)
    assert found[0].sum() == pytest.approx(1, abs=2e-3)
    every = soft_targets(logits, index, 9, "single")  # of more frames than there are, all
    assert every[0] == pytest.approx(softmax(logits)[0].mean(0), abs=1e-3)
    two = np.array([[[3, 3, -3], [-9, -9, -9]]], np.float16)
    several = soft_targets(two, index[:, :2], 1, "multi")
    assert several[0] == pytest.approx([0.9526, 0.9526, 0.0474], abs=1e-3)


def test_a_frame_of_a_short_video_counts_once() -> None:
    """Three source frames fill eight slots; the teacher sees what the dense recogniser sees."""
    index = np.array([np.arange(8) % 3, np.arange(8)])
    logits = np.random.default_rng(5).normal(scale=3, size=(2, 8, 4)).astype(np.float16)
    logits[0] = logits[0, index[0]]
    found = soft_targets(logits, index, 2, "single")
    for video in range(2):
        dense = choose(MostConfident(2), View(index[video]), softmax(logits[video]))
        assert found[video] == pytest.approx(softmax(logits[video, dense]).mean(0), abs=1e-3)
    every = soft_targets(logits, index, 5, "single")  # of more frames than there are, all
    assert every[0] == pytest.approx(softmax(logits[0, :3]).mean(0), abs=1e-3)


@pytest.mark.parametrize(
    ("task", "shown"), [("single", [[0], [2], [1]]), ("multi", [[0, 1], [2], [1]])]
)
def test_classes_that_a_video_shows(task: Task, shown: list[list[int]]) -> None:
    targets = np.array([[0.9, 0.6, 0.1], [0, 0, 0.8], [0.1, 0.3, 0.2]], np.float16)
    assert shown_classes(targets, task) == shown


def test_classes_with_too_few_videos_are_not_taught() -> None:
    targets = np.eye(4, dtype=np.float16)[[0, 0, 2, 2, 2, 3]]
    assert taught_classes(targets, 1, "single") == [0, 2, 3]
    assert taught_classes(targets, 2, "single") == [0, 2]
    message = (
        r"in 6 videos, the recogniser finds 1 classes at least train\.teacher_min_videos = 3 times"
    )
    with pytest.raises(RunError, match=message):
        taught_classes(targets, 3, "single")


def test_no_label_is_read(features: str) -> None:
    """The unlabelled video is used as well, in the order of the ids."""
    names = [*map(str, range(VIDEOS)), "bare"]
    order = sorted(names, key=video_id)
    source = FeatureSource.of(features, None, "single", teacher=TEACHER)
    assert source.key != FeatureSource.of(features, None, "single").key
    with open_training_set(source) as data:
        assert (len(data), data.classes) == (VIDEOS + 1, list(TEACHER.classes))
        assert data.videos.left_out == {"other_split": 1, "failed": 1, "unlabelled": 0}
        logits = logits_of(make_arrays()["targets"].argmax(1))
        for number, name in enumerate(order):
            if name != "bare":
                video = logits[[int(name)]]
                wanted = soft_targets(video, INDEX[None], TEACHER.num_frames, "single")[0]
                assert np.array_equal(data.targets[number], wanted)
        found = sorted(number for number, _, _ in frames_and_logits(data.videos))
        assert found == list(range(VIDEOS + 1))


def test_features_without_the_recognisers_answers(tmp_path: Path) -> None:
    write_features(str(tmp_path / "features"), make_arrays(), tmp_path / "words.txt")
    source = FeatureSource.of(str(tmp_path / "features"), None, "single", teacher=TEACHER)
    with pytest.raises(RunError, match=r"lack recognizer_logits, .* extract --recognizer URI"):
        select_videos(source)


def test_another_recogniser(features: str) -> None:
    few = dataclasses.replace(TEACHER, classes=("a", "b"))
    source = FeatureSource.of(features, None, "single", teacher=few)
    with pytest.raises(RunError, match="their recogniser has 5 classes, that of --recognizer 2"):
        select_videos(source)


COUNTS = SimpleNamespace(set=SimpleNamespace(remote=lambda done: None))
"""Stands for the actor that counts progress."""


def test_head_prototypes_and_network_learn_what_the_teacher_shows(features: str) -> None:
    source = FeatureSource.of(features, None, "single", teacher=TEACHER)
    worker = FeatureWorker(source, 1, COUNTS)
    taught = worker.taught_classes(3)
    assert taught == [0, 1, 2]  # nothing shows the others
    _, _, accuracy = worker.fit_head(FinetuneConfig(head=HeadConfig(lr=0.03)), "single", taught)
    assert accuracy > 0.9
    found = worker.taught_prototypes(0, taught)
    assert found.shape == (CLASSES, make_arrays()["visual"].shape[2])
    # the frame that shows class c has feature c raised by 3
    assert found[:, :CLASSES].argmax(1).tolist() == [0, 1, 2]
    arrays = {**worker.data.arrays, "targets": worker.data.targets[:, taught]}
    _, curve = fit_tsqnet(arrays, make_vocabulary(), make_start(), SHAPE, config_with(epochs=12))
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]  # soft targets leave a rest
    worker.close()


def test_a_teacher_of_several_labels_per_video(tmp_path: Path) -> None:
    """A frame that shows class 0 also shows class 3, which no other frame does."""
    first = make_arrays()["targets"].argmax(1)
    logits = 2 * logits_of(first) - 4
    logits[..., 3] = np.where(first == 0, logits[..., 0].T, -4).T
    source = FeatureSource.of(features_in(tmp_path, logits), None, "multi", teacher=TEACHER)
    worker = FeatureWorker(source, 1, COUNTS)
    targets = worker.data.targets
    assert ((targets[:, 0] > 0.4) == (targets[:, 3] > 0.4)).all()
    assert (targets.sum(1) < 1.2).any(), "independent probabilities, no distribution"
    taught = worker.taught_classes(3)
    assert taught == [0, 1, 2, 3]
    assert worker.taught_prototypes(0, taught).shape[0] == 4
    worker.fit_head(FinetuneConfig(head=HeadConfig(lr=0.03)), "multi", taught)
    arrays = {**worker.data.arrays, "targets": targets[:, taught]}
    shape, start = dataclasses.replace(SHAPE, num_classes=4), {"visual": None, "textual": None}
    settings = config_with(epochs=12, task="multi", init_visual="random", init_textual="random")
    _, curve = fit_tsqnet(arrays, make_vocabulary(), start, shape, settings)
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    worker.close()
