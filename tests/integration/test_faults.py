"""Faults of a run on one machine, one per row of the fault table in docs/operations.md.

The same command ends with every video accounted for.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.bundle import make_bundle
from support.cluster import Driver, descendants, read_rows, tsq
from support.fault import BAD, Started, adds_up, index, make_site, mounted, one_line, readers_of
from support.video import write_video

from jobs.benchmarks.support.s3 import S3Process, make_buckets
from tsq_ray.errors import ModelError, StorageError, TsqError
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.session import Session

pytestmark = pytest.mark.ray

WORKER, WRITER, SENDER = (
    rf"ray::MapWorker\(MapBatches\({name}" for name in ("ExtractWorker", "WritePart", "ScoreWorker")
)


def kill_the_decode_of(path: Path, started: Started, times: int = 1) -> None:
    """SIGKILL a decode child in the middle of this video, then the next child."""
    killed: set[int] = set()  # a dying child still has the file open

    def caught() -> bool:
        for pid in set(readers_of(path)) - killed:
            os.kill(pid, signal.SIGSTOP)
            if pid in readers_of(path):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                return True
            os.kill(pid, signal.SIGCONT)
        return False

    for _ in range(times):
        started.wait_until(caught)


@pytest.mark.slow
def test_a_decode_child_and_a_worker_are_killed(ray_cluster: Any, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    big = write_video(
        tmp_path / "videos/unlabelled.mp4", 400, size=(640, 384), gop=400
    )  # takes long enough to be caught
    index(site, str(tmp_path), "--update")
    started = Started(site.argv)
    kill_the_decode_of(big, started)
    started.wait_until(lambda: site.parts)
    os.kill(descendants(WORKER)[0], signal.SIGKILL)
    assert started.ended().code == 0, "the run goes on by itself"
    assert site.rows()["unlabelled.mp4"]["status"] == "ok", (
        "whoever kills a child does not say anything of its video"
    )
    adds_up(site)


_BUG = "extract failed: KeyError: 'frames'; run the same command again to resume .*"


@pytest.mark.parametrize(
    ("streams", "error", "kind", "expected"),
    [
        (False, KeyError("frames"), "RunFailed", _BUG),
        (True, KeyError("frames"), "RunFailed", _BUG),
        (True, ModelError("m: no such network"), "ModelError", "m: no such network"),
        (False, StorageError("not_found", "b: not found"), "RunFailed", "b: not found"),
    ],
    ids=["a bug", "a bug in a stream", "our own", "storage"],
)
def test_an_error_in_a_worker_keeps_its_cause(
    ray_cluster: Any, streams: bool, error: Exception, kind: str, expected: str
) -> None:
    class Returns:  # of this function, because workers cannot import the tests
        def __call__(self, batch: Any) -> Any:
            raise error

    class Yields:
        def __call__(self, batch: Any) -> Any:
            yield batch
            raise error

    cluster.quiet_data()
    data = ray_cluster.data.range(1).map_batches(
        Yields if streams else Returns, concurrency=1, num_cpus=0.1
    )
    with pytest.raises(ray_cluster.exceptions.RayError) as raised:
        list(data.iter_batches(batch_size=None))
    found = cluster.run_failed(raised.value, "extract")
    assert isinstance(found, TsqError)
    assert type(found).__name__ == kind
    assert re.fullmatch(expected, str(found)), found


def test_the_counter_of_a_run_is_killed(ray_cluster: Any) -> None:
    counts = progress.start_counts()

    def work() -> tuple[int, dict[str, int]]:
        ray_cluster.get(counts.add.remote([None, "timeout"]))
        ray_cluster.kill(counts, no_restart=False)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(ray_cluster.exceptions.RayError):  # it dies, then restarts
                ray_cluster.get(counts.add.remote([None]))
                if (done := ray_cluster.get(counts.get.remote())) == (1, {}):
                    return done  # type: ignore[no-any-return]
        raise AssertionError("it never counted from 0 again")

    session = Session(show_progress=False)
    assert progress.run_with_progress(work, counts, 3, "extract", session) == (1, {})


@pytest.mark.slow
def test_a_decode_child_is_killed_twice(ray_cluster: Any, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    big = write_video(tmp_path / "videos/unlabelled.mp4", 400, size=(640, 384), gop=400)
    index(site, str(tmp_path), "--update")
    started = Started(site.argv)
    kill_the_decode_of(big, started, times=2)
    assert started.ended().code == 0, "the run goes on by itself"
    row = site.rows()["unlabelled.mp4"]
    assert (row["error_type"], "SIGKILL" in row["error_message"]) == ("decoder_crash", True)
    adds_up(site, BAD | {"decoder_crash": 1})
    assert tsq(*site.argv, "--retry-failed", "decoder_crash").code == 0
    adds_up(site)


@pytest.mark.slow
def test_videos_that_timed_out_are_retried_on_request(ray_cluster: Any, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    write_video(
        tmp_path / "videos/unlabelled.mp4", 600, size=(1280, 768), gop=600
    )  # half a second and more
    index(site, str(tmp_path), "--update")
    assert tsq(*site.argv, "--set", "decode.timeout_s=0.05").code == 0
    late = {name for name, row in site.rows().items() if row["error_type"] == "timeout"}
    assert "unlabelled.mp4" in late
    assert tsq(*site.argv, "--retry-failed", "corrupt").code == 0
    assert {name for name, row in site.rows().items() if row["error_type"] == "timeout"} == late
    assert tsq(*site.argv, "--retry-failed", "timeout").code == 0
    adds_up(site)


@pytest.mark.slow
def test_every_worker_of_an_extraction_is_killed(ray_cluster: Any, tmp_path: Path) -> None:
    """A worker first: it may have finished its videos by the time that a new writer goes on."""
    site = make_site(tmp_path)
    started = Started(site.argv)
    for number, title in enumerate((WORKER, WRITER, WRITER)):
        started.wait_until(lambda number=number: len(site.parts) > number)  # type: ignore[misc]
        started.wait_until(lambda title=title: descendants(title))  # type: ignore[misc]
        os.kill(descendants(title)[0], signal.SIGKILL)
    assert started.ended().code == 0
    adds_up(site)


@pytest.mark.slow
def test_replicas_and_workers_of_a_scoring_run_are_killed(ray_cluster: Any, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    argv = [
        "score",
        site.manifest,
        "--model",
        make_bundle(tmp_path / "bundle"),
        "--out",
        site.out,
        *site.options,
    ]
    replicas = [
        f"ray::ServeReplica:tsq-score-[0-9a-f]+:{name}"
        for name in ("Decoder", "Sampler", "Recognizer")
    ]
    started = Started(argv)
    for number, title in enumerate([*replicas, SENDER]):
        started.wait_until(lambda number=number: len(site.parts) > number)  # type: ignore[misc]
        started.wait_until(lambda title=title: descendants(title))  # type: ignore[misc]
        os.kill(descendants(title)[0], signal.SIGKILL)
    assert started.ended().code == 0, "the run goes on by itself"
    adds_up(site)


@pytest.mark.slow
def test_a_video_is_replaced_during_the_run(ray_cluster: Any, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    started = Started(site.argv)
    started.wait_until(lambda: site.parts)
    early = next(name for name, row in site.rows().items() if row["status"] == "ok")
    late = next(
        path
        for path in reversed(site.archive.paths)
        if path not in site.rows() and path not in site.archive.bad
    )
    for name in (early, late):
        write_video(tmp_path / "videos" / name, 30)
    assert started.ended().code == 0
    rows = site.rows()
    assert (rows[early]["status"], rows[late]["error_type"]) == ("ok", "source_changed")
    adds_up(site, BAD | {"source_changed": 1})
    assert tsq(*site.argv).code == 0
    adds_up(site, BAD | {"source_changed": 1})
    index(site, str(tmp_path), "--update")
    assert tsq(*site.argv).code == 0
    adds_up(site)
    assert [site.rows()[name]["source_num_frames"] for name in (early, late)] == [30, 30]


def fill(ballast: Path) -> None:
    """Fill the remaining space of its disk."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_the_disk_is_full(ray_cluster: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if (why := mounted(disk, "4m")) is not None:
        pytest.skip(f"no small disk can be mounted here: {why}")
    try:
        site = make_site(tmp_path, out=str(disk / "features"))
        started = Started(site.argv)
        started.wait_until(lambda: site.parts)
        ballast = disk / "ballast"
        fill(ballast)
        assert "the disk is full; free some space and run again" in one_line(started.ended())
        before = site.parts
        assert 0 < len(before) < 9
        assert read_rows(site.out).num_rows == 2 * len(before), "what is to be seen is whole"
        ballast.unlink()
        assert tsq(*site.argv).code == 0
        assert before <= site.parts
        adds_up(site)
    finally:
        os.system(f"umount -l {disk}")


@pytest.mark.slow
def test_the_s3_server_is_stopped_and_started(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s3").mkdir()
    process = S3Process(tmp_path / "s3")
    try:
        process.start()
        for name, value in process.server.environment.items():
            monkeypatch.setenv(name, value)
        run_over_a_server_that_goes_away(process, tmp_path)
    finally:
        process.stop()


def run_over_a_server_that_goes_away(process: S3Process, folder: Path) -> None:
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        make_buckets(["tsq-fault"])
        site = make_site(folder, "s3://tsq-fault/away")
        with Driver(
            site.argv, folder / "first"
        ) as driver:  # a Ray of its own, whose workers know this server
            driver.wait_until(lambda: site.parts, 600)
            process.stop()
            process.start()
            ended = driver.ended(600)
        assert ended.code == 0, "the run goes on by itself"
        with Driver(site.argv, folder / "second") as driver:
            assert driver.ended(600).code == 0
        adds_up(site)
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
