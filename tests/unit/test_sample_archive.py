"""The quickstart's archive: equal seeds give equal files, the evidence is where annotated."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from jobs.sample_archive import (
    CLASSES,
    FPS,
    HEIGHT,
    WIDTH,
    frames,
    plan_archive,
    plan_video,
    render_archive,
    write_video,
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_archive(
        tmp_path_factory.mktemp("archive"), videos_per_class=1, val_per_class=1, seed=3
    )


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_labels_name_every_file(archive: Path) -> None:
    rows = list(csv.DictReader((archive / "labels.csv").open(newline="")))
    assert sorted(row["path"] for row in rows) == sorted(
        str(file.relative_to(archive)) for file in archive.rglob("*.mp4")
    )
    for row in rows:
        split, folder, _ = row["path"].split("/")
        assert (split, folder.replace("_", " ")) == (row["split"], row["label"])
    assert {(row["split"], row["label"]) for row in rows} == {
        (split, name) for split in ("train", "val") for name in CLASSES
    }


def test_annotations_agree_with_the_labels(archive: Path) -> None:
    videos = json.loads((archive / "annotations.json").read_text())["videos"]
    labels = {
        row["path"]: row["label"]
        for row in csv.DictReader((archive / "labels.csv").open(newline=""))
    }
    assert {path: video["label"] for path, video in videos.items()} == labels
    assert all(len(video["segments"]) in (1, 2) for video in videos.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_evidence_is_a_tenth_to_a_fifth_of_the_time(seed: int) -> None:
    plans = plan_archive(20, 5, seed)
    assert len(plans) == 25 * len(CLASSES)
    for plan in plans.values():
        shots = sorted((*plan.evidence, *plan.glimpse), key=lambda shot: shot.first)
        assert all(before.stop + FPS <= after.first for before, after in itertools.pairwise(shots))
        assert shots[0].first >= 0
        assert shots[-1].stop <= plan.num_frames
        assert all(15 <= shot.stop - shot.first <= 30 for shot in plan.evidence)
        assert 0.1 <= sum(shot.stop - shot.first for shot in plan.evidence) / plan.num_frames <= 0.2
        assert all(
            shot.stop - shot.first < FPS and shot.class_name != plan.label for shot in plan.glimpse
        )
    assert any(plan.glimpse for plan in plans.values())
    assert any(len(plan.evidence) == 2 for plan in plans.values())


@pytest.mark.parametrize("label", CLASSES)
def test_segments_show_the_evidence_and_nothing_else_does(label: str) -> None:
    plan = plan_video(label, [], np.random.default_rng(5))
    without = replace(plan, evidence=())
    changed = [
        not np.array_equal(shown, plain)
        for shown, plain in zip(frames(plan), frames(without), strict=True)
    ]
    inside = [
        any(start <= index / FPS < end for start, end in plan.segments)
        for index in range(plan.num_frames)
    ]
    assert changed == inside


def test_files_hold_the_planned_pictures(archive: Path) -> None:
    path, plan = next(iter(plan_archive(1, 1, seed=3).items()))
    pictures = decoded(archive / path)
    assert len(pictures) == plan.num_frames
    for picture, drawn in zip(pictures[::20], list(frames(plan))[::20], strict=True):
        assert picture.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(picture.astype(int) - drawn).mean() < 12


def test_keyframes_lie_two_to_five_seconds_apart(archive: Path) -> None:
    for path in sorted(archive.rglob("*.mp4"))[:3]:
        with av.open(str(path)) as container:
            keys = [
                packet.pts * packet.time_base
                for packet in container.demux(video=0)
                if packet.pts is not None and packet.is_keyframe
            ]
        assert keys[0] == 0
        assert all(2 <= after - before <= 5 for before, after in itertools.pairwise(keys))


def test_same_seed_same_bytes_other_seed_others(archive: Path, tmp_path: Path) -> None:
    path, plan = next(iter(plan_archive(1, 1, seed=3).items()))
    other = plan_archive(1, 1, seed=4)[path]
    write_video(tmp_path / "same.mp4", plan)
    write_video(tmp_path / "other.mp4", other)
    assert (tmp_path / "same.mp4").read_bytes() == (archive / path).read_bytes()
    assert (tmp_path / "other.mp4").read_bytes() != (archive / path).read_bytes()


def test_run_again_keeps_whole_videos_and_renders_missing_ones(archive: Path) -> None:
    first, second = sorted(archive.rglob("*.mp4"))[:2]
    kept, bytes_of_second = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    render_archive(archive, videos_per_class=1, val_per_class=1, seed=3)
    assert first.stat().st_mtime_ns == kept
    assert second.read_bytes() == bytes_of_second


def test_another_seed_in_the_same_folder_is_refused(archive: Path) -> None:
    with pytest.raises(ValueError, match="holds an archive of seed 3, not 4"):
        render_archive(archive, videos_per_class=1, val_per_class=1, seed=4)


def test_no_training_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="videos_per_class is 0; it must be at least 1"):
        render_archive(tmp_path, videos_per_class=0)
