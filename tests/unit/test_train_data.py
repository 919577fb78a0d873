"""Features of a run folder as arrays.

Which rows, in which order, in files that the processes of a machine share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.train import CLASSES, NAMES, VIDEOS, make_arrays, video_id, write_features

from tsq_ray.config import FinetuneConfig, HeadConfig, load_config
from tsq_ray.errors import RunError, RunFailed, StorageError
from tsq_ray.manifest import Manifest, VideoRef, VideoRows
from tsq_ray.prototypes import prototypes
from tsq_ray.runs.identity import Identity
from tsq_ray.training.cache import Create, node_arrays
from tsq_ray.training.classifier.finetune import _Plan, _summary
from tsq_ray.training.classifier.full import Tuned
from tsq_ray.training.features import (
    FeatureSource,
    TrainingRows,
    check_single_labels,
    multi_hot,
    open_training_set,
    source_arrays,
)
from tsq_ray.training.head import fit_head, head_logits, standard_scale
from tsq_ray.training.on_worker import FeatureWorker


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the copies."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def features(tmp_path: Path) -> str:
    write_features(str(tmp_path / "features"), make_arrays(), tmp_path / "words.txt")
    return str(tmp_path / "features")


def test_rows_in_the_order_of_the_ids(features: str, temporary: Path) -> None:
    arrays = make_arrays()
    order = sorted(range(VIDEOS), key=lambda number: video_id(str(number)))
    with open_training_set(FeatureSource.of(features, None, "single")) as data:
        assert data.arrays.keys() == arrays.keys()
        for name, array in data.arrays.items():
            assert array.dtype == arrays[name].dtype
            assert np.array_equal(array, arrays[name][order]), name
        assert list(data.labels) == [[number % CLASSES] for number in order]
        assert (data.classes, len(data)) == (NAMES, VIDEOS)
        assert data.videos.left_out == {"other_split": 1, "failed": 1, "unlabelled": 1}
        assert data.videos.unlabelled_uris == ["/videos/bare.mp4"]
        assert len(list(temporary.glob("tsq-*"))) == 1
    assert list(temporary.glob("tsq-*")) == [], "the last one removes the files"


def test_only_what_the_visual_module_needs(features: str) -> None:
    with source_arrays(FeatureSource.of(features, "val", "single", with_objects=False)) as arrays:
        assert arrays.keys() == {"visual", "targets"}
        assert arrays["visual"].shape[0] == 1


def test_a_sample_of_many_videos(features: str) -> None:
    arrays, done = make_arrays(), list[int]()
    order = sorted(range(VIDEOS), key=lambda number: video_id(str(number)))
    source = FeatureSource.of(features, None, "single", max_videos=5)
    with open_training_set(source, done.append) as data:
        assert np.array_equal(data.visual, arrays["visual"][order[:5]])
        assert list(data.labels) == [[number % CLASSES] for number in order[:5]]
        assert data.videos.left_out["max_videos"] == VIDEOS - 5
        assert source.key != FeatureSource.of(features, None, "single").key
    assert done[-1] == 5


@pytest.mark.parametrize(
    ("split", "message"),
    [("test", "no row of split 'test'"), (None, "3 of 22 videos have several labels")],
)
def test_refused(tmp_path: Path, split: str | None, message: str) -> None:
    arrays = make_arrays()
    arrays["targets"][:3] = True
    write_features(str(tmp_path / "features"), arrays, tmp_path / "words.txt")
    with (
        pytest.raises(RunError, match=message),
        open_training_set(FeatureSource.of(str(tmp_path / "features"), split, "single")),
    ):
        pass


def test_features_that_changed_meanwhile(features: str) -> None:
    source = FeatureSource.of(features, None, "single")
    other = source_arrays(dataclasses.replace(source, key="another"))
    with (
        pytest.raises(RunFailed, match="the features have changed since the training began"),
        other,
    ):
        pass


def test_head_scale_and_prototypes_from_files_are_those_from_memory(features: str) -> None:
    config = FinetuneConfig()
    with open_training_set(FeatureSource.of(features, None, "single")) as data:
        assert not data.visual.flags.owndata
        copy, labels = np.array(data.visual), list(data.labels)
        flat = copy.reshape(-1, copy.shape[-1]).astype(np.float64)
        mean, scale = standard_scale(data.visual)
        assert torch.equal(mean, torch.from_numpy(flat.mean(0)).float())
        assert torch.equal(scale, torch.from_numpy(flat.std(0)).float())
        head = fit_head(data.visual, data.targets, config, "single")
        assert torch.equal(
            head.weight, fit_head(copy, np.array(data.targets), config, "single").weight
        )
        found = prototypes(
            data.visual, head_logits(head, data.visual), data.labels, CLASSES, 0, "single"
        )
    whole = head(torch.from_numpy(copy.astype(np.float32))).numpy()
    assert torch.allclose(found, prototypes(copy, whole, labels, CLASSES, 0, "single"), atol=1e-6)


@pytest.mark.parametrize(
    ("step_s", "reports"), [(2.0, [0, VIDEOS, 2 * VIDEOS]), (0.6, [VIDEOS]), (0.0, [])]
)
def test_progress_of_the_frame_head(
    features: str, monkeypatch: pytest.MonkeyPatch, step_s: float, reports: list[int]
) -> None:
    """The worker reports videos times epochs at most once a second; each look at the clock takes
    `step_s`."""
    clock, done = itertools.count(0.0, step_s), list[int]()
    counts = SimpleNamespace(set=SimpleNamespace(remote=done.append))
    worker = FeatureWorker(FeatureSource.of(features, None, "single"), 1, counts)
    worker.read()
    assert done.pop() == VIDEOS, "reading reports too"
    done.clear()
    monkeypatch.setattr("tsq_ray.training.head.time", SimpleNamespace(monotonic=clock.__next__))
    worker.fit_head(FinetuneConfig(head=HeadConfig(epochs=3)), "single", None)
    assert done == reports
    worker.close()


def _counted(
    key: str, made: list[str], value: int = 7
) -> contextlib.AbstractContextManager[dict[str, np.ndarray]]:
    def write(create: Create) -> None:
        made.append(key)
        create("numbers", np.dtype(np.int16), (3, 2))[:] = value

    return node_arrays(key, write)


def test_copies_are_made_once_and_removed_with_the_last_user(temporary: Path) -> None:
    made: list[str] = []
    with _counted("one", made) as first:
        with _counted("one", made) as second:
            assert made == ["one"]
            second["numbers"][0] = 1
            assert (first["numbers"] == 7).all(), "each process has its own changes"
        assert len(list(temporary.glob("tsq-*"))) == 1, "somebody still uses it"
        with _counted("other", made):
            assert len(list(temporary.glob("tsq-*"))) == 2
    assert list(temporary.glob("tsq-*")) == []
    assert (first["numbers"] == 7).all(), "what is mapped stays"


def test_a_failed_write_is_repeated(temporary: Path) -> None:
    def fail(create: Create) -> None:
        create("numbers", np.dtype(np.int16), (1,))
        raise OSError("storage went away")

    with pytest.raises(OSError, match="storage went away"), node_arrays("one", fail):
        pass
    made: list[str] = []
    with _counted("one", made) as arrays:
        assert (made, arrays["numbers"].shape) == (["one"], (3, 2))
    assert list(temporary.glob("tsq-*")) == []


@pytest.fixture
def killed(temporary: Path) -> Path:
    """The remains of a process that was killed while it used its files."""

    def use() -> None:
        with _counted("one", [], 9):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=use)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = temporary.iterdir()
    return left


@pytest.mark.parametrize(("key", "expected"), [("one", 9), ("other", 7)])
def test_remains_of_a_killed_process_are_used_or_removed(
    killed: Path, temporary: Path, key: str, expected: int
) -> None:
    with _counted(key, []) as arrays:
        assert (arrays["numbers"] == expected).all()
        assert killed.exists() == (key == "one")
    assert list(temporary.glob("tsq-*")) == []


def test_no_room(temporary: Path) -> None:
    def write(create: Create) -> None:
        create("numbers", np.dtype(np.int16), (2**60,))

    with (
        pytest.raises(
            StorageError,
            match=r"no room for the .* GB of numbers .*; set TMPDIR to a larger disk or "
            "lower train.max_videos",
        ),
        node_arrays("one", write),
    ):
        pass
    lock = os.open(temporary, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    assert list(temporary.glob("tsq-*")) == []


def test_two_videos_whose_urls_differ_only_in_the_query(tmp_path: Path) -> None:
    """One fails, the other is used; neither query is shown."""
    rows = VideoRows.of(
        VideoRef(video_id(uri), uri, 1, labels=(number,), split="train")
        for number, uri in enumerate(f"https://host/v.mp4?X-Amz-Signature={key}" for key in "ab")
    )
    chosen = TrainingRows.of(rows, None, None, "manifest")
    failures = {rows[1].video_id: "not_video"}
    tuned = Tuned(torch.nn.Identity(), failures, {}, [], {})  # type: ignore[arg-type]
    tuned.figures["train_accuracy"] = 1.0
    config, manifest = load_config(None), Manifest(rows, NAMES)
    settings, identity = config.encoders.visual, Identity.of()
    input_ = (chosen, rows[:0], settings, tuned.network)
    found = _summary(_Plan(str(tmp_path), "encoder", config, manifest, *input_, identity), tuned, 0)
    assert (found.videos, found.failed, found.failed_videos) == (
        1,
        {"not_video": 1},
        ("https://host/v.mp4?...",),
    )


def test_training_rows_and_the_account_of_the_others() -> None:
    kinds = [
        ("train", (0,)),
        ("val", (1,)),
        ("train", None),
        ("train", ()),
        ("train", (0, 2)),
        (None, (1,)),
    ]
    rows = VideoRows.of(
        VideoRef(f"{number:016x}", f"{number}.mp4", 1, labels=labels, split=split)
        for number, (split, labels) in enumerate(kinds)
    )
    chosen = TrainingRows.of(rows, None, 1, "manifest")
    assert [row.uri for row in chosen.rows] == ["0.mp4"]
    assert (chosen.split, chosen.unlabelled_uris, chosen.warnings) == (
        "train",
        ["2.mp4", "3.mp4"],
        [],
    )
    assert chosen.left_out == {"other_split": 2, "unlabelled": 2, "limit": 1}
    labels = rows.table["labels"]
    assert multi_hot(
        labels.filter(pa.array([True, False, False, False, True, True])), 3
    ).tolist() == [
        [True, False, False],
        [True, False, True],
        [False, True, False],
    ]
    check_single_labels(labels, "multi", "manifest")
    with pytest.raises(RunError, match="1 of 6 videos have several labels"):
        check_single_labels(labels, "single", "manifest")
