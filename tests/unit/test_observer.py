"""What a run's observer makes of parts, repeated work and waits; Ray is not connected."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tsq_ray.config import Config
from tsq_ray.errors import RunFailed
from tsq_ray.manifest import Manifest, VideoRef, read_manifest, write_manifest
from tsq_ray.results import TrainingSummary, from_record
from tsq_ray.runs.bulk import BulkRun, Selection
from tsq_ray.runs.identity import Identity
from tsq_ray.runs.lease import Holder
from tsq_ray.runtime import progress
from tsq_ray.runtime.bulk import BulkObserver
from tsq_ray.runtime.metrics import PublishedPart
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.waiting import Watch
from tsq_ray.summaries import training_text

IDS = [f"{number:016x}" for number in range(10)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[BulkRun]:
    """A run over ten videos."""
    uri = str(tmp_path / "manifest.parquet")
    videos = [VideoRef(name, f"/videos/{name}.mp4", 10) for name in IDS]
    write_manifest(Manifest(videos, [], id="source"), uri)
    selection = Selection.of(read_manifest(uri))
    out = str(tmp_path / "out")
    with BulkRun(out, "features", Identity.of(a=1), selection, Config()) as entered:
        yield entered


@pytest.fixture(autouse=True)
def _no_start_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for its nodes must not start one."""
    monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", False)


def watch(waited_s: float, waits: bool = False) -> Watch:
    made = Watch(ray, "score")
    made.waited_s = waited_s
    made._waits_since = time.monotonic() if waits else None
    return made


def test_videos_are_left_until_their_part_is_published(run: BulkRun) -> None:
    seen = BulkObserver(ray, run, "extract", None)
    assert (seen.left, seen.queued) == (10, 0)
    seen._done = 7
    assert (seen.left, seen.queued) == (10, 7)
    seen.published(PublishedPart({"": 3, "corrupt": 1}, 40, 40))
    assert (seen.left, seen.queued) == (6, 3)
    seen._done = 12
    seen._note("videos_done_again", 2)
    assert (seen.left, seen.queued) == (6, 6)
    seen.published(PublishedPart({"": 6}, 60, 60))
    assert (seen.left, seen.queued) == (0, 0)


@pytest.mark.parametrize("unsorted", [1, 4, 50_000])
def test_a_video_done_again_is_recognised(unsorted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_UNSORTED", unsorted)
    counts = progress.RowCounts()
    for start in range(0, 10, 3):
        batch = IDS[start : start + 3]
        counts.add_rows(batch, [None] * len(batch))
        assert counts.get_again() == 0
    counts.add_rows(["f" * 16, IDS[9], IDS[0]], [None, "corrupt", None])
    counts.add_rows([IDS[0]], [None])
    assert counts.get_again() == 3
    assert counts.get() == (13, {"corrupt": 1})


def test_waits_add_up_over_the_start_and_each_pass(run: BulkRun) -> None:
    seen = BulkObserver(ray, run, "score", None)
    start = watch(0.0, waits=True)
    start._waits_since = time.monotonic() - 700
    seen.observe(0, start)
    assert seen.happened["waited_s"] == pytest.approx(700, abs=5)
    assert run.happened is seen.happened
    for waited_s in (30.0, 40.0):
        seen.observe(0, watch(waited_s))
    seen.look()
    assert seen.happened["waited_s"] == pytest.approx(770, abs=5)


def test_a_training_is_ended_by_its_check() -> None:
    def check() -> None:
        raise RunFailed("another run took over")

    seen = Observer(ray, Holder.of_this_process(), "train", check)
    with pytest.raises(RunFailed, match="another run"):
        seen.observe(1, watch(0.0))


def test_the_hours_of_the_nodes_add_up(run: BulkRun) -> None:
    node, gpu = {"Resources": {"CPU": 4.0}}, {"Resources": {"CPU": 8.0, "GPU": 1.0}}
    training = Observer(ray, run.lease.holder, "train")
    for seen in (training, BulkObserver(ray, run, "extract", None)):
        seen._record_hours([node, gpu], 0.25)
        seen._record_hours([node], 0.5)
    assert training.hours == {"cpu_hours": 5.0, "gpu_hours": 0.25}
    assert run.used == training.hours | {"video_hours": 0.0}


def test_nothing_happened_is_nothing(run: BulkRun) -> None:
    seen = BulkObserver(ray, run, "extract", None)
    seen.observe(0, watch(0.0))
    assert seen.happened == {}


def test_the_summary_of_a_training_says_what_happened() -> None:
    record = {
        **{"out": "bundle", "videos": 3, "classes": 2, "left_out": {}, "unlabelled": ()},
        **{"warnings": (), "epochs": 1, "losses": {}, "workers": 2},
        **{"train_seconds": 1.0, "videos_per_s": 3.0},
    }
    assert "in this run" not in training_text(from_record(TrainingSummary, record))
    happened = {"nodes_lost": 1, "waited_s": 12.5}
    text = training_text(from_record(TrainingSummary, record, happened=happened))
    line = "in this run: nodes lost: 1; waited for room on the cluster: 12.5 s"
    assert line in text.splitlines()
