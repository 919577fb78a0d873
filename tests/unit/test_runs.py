"""The run folder: what is done, left or removed, what verify finds. No Ray; parts are made here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsq_ray import schema, storage
from tsq_ray.config import Config
from tsq_ray.errors import ERROR_TYPES, RunError, RunFailed
from tsq_ray.manifest import Manifest, VideoRef, read_manifest, write_manifest
from tsq_ray.runs.bulk import BulkRun, Selection, retry_reasons, todo_without_entering
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import FAILED, Done, list_parts, read_done, still_to_do
from tsq_ray.runs.folder import (
    CONFIG_FILE,
    RUN_FILE,
    begin,
    part_name,
    prune,
    read_json,
    read_run,
    reopen,
    write_json,
    write_part,
)
from tsq_ray.runs.identity import Identity
from tsq_ray.runs.lease import LEASE_FILE
from tsq_ray.runs.verify import verify

CLASSES = ["cats", "dogs"]
T, D = 2, 4
IDENTITY = {"decode": {"num_frames": T}, "weights": {"visual": "abc"}}


def ref(number: int, size_bytes: int = 10, split: str | None = "train") -> VideoRef:
    return VideoRef(f"{number:016x}", f"/videos/{number}.mp4", size_bytes, labels=(0,), split=split)


def row(
    video: VideoRef, error_type: str | None = None, warnings: Iterable[str] = ()
) -> dict[str, Any]:
    """A features row: ok, or failed with `error_type`."""
    start = {**vars(video), "labels": [0], "warnings": list(warnings)}
    if error_type is not None:
        return start | {"status": "failed", "error_type": error_type, "error_message": "why"}
    tensors = {"frame_index": np.arange(T), "frame_pts_s": np.arange(T), "visual": np.ones((T, D))}
    return start | {
        "status": "ok",
        **tensors,
        "object_ids": np.ones((T, 10)),
        "object_probs": np.ones((T, 10)),
    }


def features_of(*rows: dict[str, Any]) -> pa.Table:
    return schema.table_from_rows(rows, schema.features_schema(T, D, CLASSES))


class Folder:
    """A features run folder with its manifest next to it."""

    def __init__(self, root: Path, videos: list[VideoRef]) -> None:
        self.uri = str(root / "features")
        self.path = root / "features"
        self.manifest_uri = str(root / "manifest.parquet")
        self.set_manifest(videos)

    def set_manifest(self, videos: list[VideoRef]) -> None:
        write_manifest(Manifest(videos, CLASSES, id="source"), self.manifest_uri)
        self.manifest = read_manifest(self.manifest_uri)

    def begin(self, identity: dict[str, Any] | None = None) -> None:
        begin(self.uri, "features", Identity.of(**(identity or IDENTITY)), self.manifest)

    def run(self, selection: Selection | None = None, **options: Any) -> BulkRun:
        """A run over all videos or a selection of them, not entered yet."""
        selection = selection or Selection.of(self.manifest)
        identity = Identity.of(**IDENTITY)
        return BulkRun(self.uri, "features", identity, selection, Config(), **options)

    def write(self, *rows: dict[str, Any], age: float | None = None) -> str:
        """One part; `age` seconds old."""
        name = write_part(self.uri, features_of(*rows), "zstd")
        if age is not None:
            time = os.path.getmtime(self.path / name) - age
            os.utime(self.path / name, (time, time))
        return name

    def current(self) -> Done:
        return read_done(self.uri, self.manifest)

    def left(self, *retry: str) -> list[str]:
        """URIs of the videos that a run would do."""
        return [video.uri for video in still_to_do(self.manifest.rows, self.current(), retry)]

    def close(self, selection: Selection | None = None) -> dict[str, Any]:
        """Enter a run that finds its rows done, then close it."""
        with self.run(selection) as run:
            return run.close({"decode": 2.0, "encode": 3.0}, lambda: {"weights": {}})

    def rows(self) -> list[tuple[str, str]]:
        """(uri, status) of every row of every part, sorted."""
        tables = [read_part(part.uri, ["uri", "status"]) for part in list_parts(self.uri)]
        return sorted((row["uri"], row["status"]) for table in tables for row in table.to_pylist())

    def problems(self) -> list[str]:
        return list(verify(self.uri).problems)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A run that has begun: three videos, no part yet."""
    made = Folder(tmp_path, [ref(1), ref(2), ref(3)])
    made.begin()
    return made


@pytest.fixture
def done(folder: Folder) -> Folder:
    """A finished run: two ok, one failed, in two parts."""
    folder.write(row(ref(1)), row(ref(2), "corrupt"))
    folder.write(row(ref(3), warnings=["odd"]))
    folder.close()
    return folder


# -------------------------------------------------------------------------------------------- parts


def test_a_part_is_named_after_the_videos_in_it(folder: Folder) -> None:
    first = folder.write(row(ref(1)), row(ref(2)))
    assert (
        folder.write(row(ref(2)), row(ref(1)))
        == first
        == part_name([ref(2).video_id, ref(1).video_id])
    )
    assert folder.write(row(ref(1))) != first
    assert sorted(storage.name_of(part.uri) for part in list_parts(folder.uri)) == sorted(
        {first, part_name([ref(1).video_id])}
    )


def test_only_parts_are_parts(folder: Folder) -> None:
    (folder.path / ".part-1.parquet.tmp").write_bytes(b"half")
    (folder.path / "other.parquet").write_bytes(b"x")
    (folder.path / "part-1.txt").write_bytes(b"x")
    assert list_parts(folder.uri) == []


def test_a_damaged_part_is_named(folder: Folder) -> None:
    name = folder.write(row(ref(1)))
    (folder.path / name).write_bytes((folder.path / name).read_bytes()[:100])
    with pytest.raises(
        RunError, match=f"{name}: not readable as Parquet .*; delete it and run again"
    ):
        read_done(folder.uri, folder.manifest)


# -------------------------------------------------------------------------------------------- begin


def test_the_same_configuration_may_resume(folder: Folder) -> None:
    folder.begin()
    assert (folder.path / CONFIG_FILE).exists()
    assert not (folder.path / RUN_FILE).exists()


def test_another_configuration_is_refused_with_the_keys(folder: Folder) -> None:
    other = {"decode": {"num_frames": 50}, "weights": {"visual": "abc", "objects": "new"}}
    with pytest.raises(
        RunError,
        match=r"decode.num_frames: 2 there, 50 now; weights.objects: None there, 'new' now",
    ):
        folder.begin(other)


def test_a_folder_from_before_a_setting_resumes_with_its_default(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [ref(1)])
    encoders = {"visual": {"size": 188}}
    folder.begin({"encoders": encoders})
    folder.begin({"encoders": encoders | {"num_objects": 10}})
    with pytest.raises(RunError, match=r"encoders.num_objects: None there, 50 now"):
        folder.begin({"encoders": encoders | {"num_objects": 50}})


def test_another_manifest_is_refused(folder: Folder) -> None:
    folder.manifest = dataclasses.replace(folder.manifest, id="another source")
    with pytest.raises(
        RunError, match="made from a manifest of other sources; use that manifest or another --out"
    ):
        folder.begin()


def test_many_differences_are_counted(folder: Folder) -> None:
    with pytest.raises(RunError, match="and 4 more"):
        folder.begin(
            {"decode": {"num_frames": T}, "weights": {f"w{number}": "x" for number in range(8)}}
        )


@pytest.mark.parametrize("name", ["table.parquet", "labels.csv", "cats/1.mp4"])
def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path, [ref(1)])
    (folder.path / name).parent.mkdir(parents=True)
    (folder.path / name).write_bytes(b"x")
    with pytest.raises(
        RunError, match=rf"holds files that are not a run's \(.*{name}\); use an empty folder"
    ):
        folder.begin()
    assert [
        str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()
    ] == [name]


def test_what_a_killed_start_left_behind_is_no_foreign_file(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [ref(1)])
    folder.path.mkdir()
    (folder.path / "._config.json.12345678.tmp").write_bytes(b"{")
    folder.begin()


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [ref(1)])
    folder.path.write_bytes(b"x")
    with pytest.raises(RunError, match="is a file; name a folder"):
        folder.begin()


def test_a_damaged_configuration_is_reported(folder: Folder) -> None:
    (folder.path / CONFIG_FILE).write_text("{")
    with pytest.raises(RunError, match="not JSON; the file is damaged"):
        folder.begin()


# ------------------------------------------------------------------------------- what is left to do


def test_videos_without_a_row_are_left(folder: Folder) -> None:
    assert folder.left() == ["/videos/1.mp4", "/videos/2.mp4", "/videos/3.mp4"]
    folder.write(row(ref(2)))
    assert folder.left() == ["/videos/1.mp4", "/videos/3.mp4"]


@pytest.mark.parametrize(
    ("retry", "left"),
    [
        (None, ["2"]),
        ("corrupt", ["1", "2"]),
        ("unavailable", ["2"]),
        ("timeout", ["2", "3"]),
        ("all", ["1", "2", "3"]),
        ("", ["1", "2", "3"]),
    ],
)
def test_failed_videos_are_retried_when_asked_or_when_storage_was_unavailable(
    folder: Folder, retry: str | None, left: list[str]
) -> None:
    folder.write(row(ref(1), "corrupt"), row(ref(2), "unavailable"), row(ref(3), "timeout"))
    assert folder.left(*retry_reasons(retry)) == [f"/videos/{number}.mp4" for number in left]


def test_retry_reasons_are_a_closed_list() -> None:
    assert retry_reasons("all") == ERROR_TYPES
    with pytest.raises(
        RunError, match="--retry-failed bored: no such reason; allowed: not_found, access_denied"
    ):
        retry_reasons("bored")


def test_a_changed_video_is_processed_again(folder: Folder) -> None:
    folder.write(row(ref(1, size_bytes=9)), row(ref(2)))
    assert folder.left() == ["/videos/1.mp4", "/videos/3.mp4"]


def test_of_several_rows_the_ok_one_counts_then_the_newest(folder: Folder) -> None:
    ok = folder.write(row(ref(1)), age=100)
    folder.write(row(ref(1), "timeout"), row(ref(2), "timeout"), age=50)
    newest = folder.write(row(ref(2), "corrupt"), row(ref(3)), age=1)
    current = folder.current()
    names = [part.name for part in current.parts]
    found = [
        (names[row["part"]], ERROR_TYPES[row["error"]] if row["flags"] & FAILED else None)
        for row in current.counting
    ]
    assert found == [(ok, None), (newest, "corrupt"), (newest, None)]


def test_rows_of_deleted_videos_do_not_count(folder: Folder) -> None:
    folder.write(row(ref(9)), row(ref(1)))
    assert folder.current().row.tolist() == [1, -1, -1]


# ---------------------------------------------------------------------------------- prune and close


def test_pruning_leaves_one_row_per_video(folder: Folder) -> None:
    folder.write(row(ref(1), "timeout"), row(ref(2)), age=60)
    folder.write(row(ref(1)), row(ref(9)), age=40)
    folder.write(row(ref(2, size_bytes=9)), row(ref(3)), age=20)
    assert prune(folder.uri, folder.current(), "zstd") == 3
    assert folder.rows() == [
        ("/videos/1.mp4", "ok"),
        ("/videos/2.mp4", "ok"),
        ("/videos/3.mp4", "ok"),
    ]
    assert all(
        name == part_name(pq.read_table(folder.path / name)["video_id"].to_pylist())
        for name in parts_of(folder)
    )


def parts_of(folder: Folder) -> list[str]:
    return sorted(path.name for path in folder.path.glob("part-*"))


def test_a_part_without_a_row_that_counts_goes(folder: Folder) -> None:
    old = folder.write(row(ref(9)))
    kept = folder.write(row(ref(1)))
    prune(folder.uri, folder.current(), "zstd")
    assert parts_of(folder) == [kept]
    assert old != kept


def test_a_part_that_is_rewritten_under_the_name_of_another_part_survives(folder: Folder) -> None:
    folder.write(row(ref(1)), age=50)
    folder.write(row(ref(1), "timeout"), row(ref(2)), age=40)
    folder.write(row(ref(2), "timeout"), age=30)
    prune(folder.uri, folder.current(), "zstd")
    assert folder.rows() == [("/videos/1.mp4", "ok"), ("/videos/2.mp4", "ok")]


def test_a_video_twice_in_one_part_keeps_a_row(folder: Folder) -> None:
    folder.write(row(ref(1), "timeout"), row(ref(1)), row(ref(2)), row(ref(2)), row(ref(3)))
    assert folder.close()["counts"]["ok"] == 3
    assert folder.rows() == [
        ("/videos/1.mp4", "ok"),
        ("/videos/2.mp4", "ok"),
        ("/videos/3.mp4", "ok"),
    ]
    assert folder.problems() == []


def test_closing_accounts_for_every_video(done: Folder) -> None:
    run = read_run(done.uri, "features")
    assert run["status"] == "complete"
    assert run["counts"] == {
        "inputs": 3,
        "ok": 2,
        "failed": 1,
        "skipped": 0,
        "skipped_by": {"split": 0, "limit": 0},
        "failed_by_type": {"corrupt": 1},
        "with_warnings": 1,
    }
    assert sorted(part["name"] for part in run["parts"]) == parts_of(done)
    assert run["identity"] == IDENTITY
    assert run["slowest_stage"] == "encode"
    assert run["manifest"]["sha256"] == done.manifest.sha256
    assert run["config"] == Config().record()
    assert run["versions"]["torch"]
    assert done.problems() == []


def test_what_split_and_limit_leave_out_is_skipped(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [ref(1), ref(2), ref(3, split="val"), ref(4, split=None)])
    folder.begin()
    folder.write(row(ref(1)))
    counts = folder.close(Selection.of(folder.manifest, "train", 1))["counts"]
    assert (counts["inputs"], counts["ok"], counts["skipped"]) == (4, 1, 3)
    assert counts["skipped_by"] == {"split": 2, "limit": 1}
    assert folder.problems() == []


def test_a_wanted_video_without_a_row_fails_the_run(folder: Folder) -> None:
    folder.write(row(ref(1)), row(ref(3)))
    with pytest.raises(
        RunFailed,
        match=r"1 of 3 videos have no row \(first: /videos/2.mp4\); run the same command again",
    ):
        folder.close()
    assert read_run(folder.uri)["status"] == "failed"
    assert "the run's status is 'failed'" in folder.problems()


def test_closing_again_changes_nothing(done: Folder) -> None:
    before = (done.path / RUN_FILE).read_bytes()
    done.close()
    assert (done.path / RUN_FILE).read_bytes() == before


def test_closing_takes_out_changed_and_deleted_videos(done: Folder) -> None:
    done.set_manifest([ref(1, size_bytes=11), ref(2)])
    assert done.left() == ["/videos/1.mp4"]
    done.write(row(ref(1, size_bytes=11)))
    run = done.close()
    assert run["happened"] == {"rows_removed": 2}
    assert done.rows() == [("/videos/1.mp4", "ok"), ("/videos/2.mp4", "failed")]
    assert (run["counts"]["inputs"], run["counts"]["ok"], run["counts"]["failed"]) == (2, 1, 1)
    assert done.problems() == []


def test_a_manifest_that_lost_videos_is_enough_to_close_again(done: Folder) -> None:
    done.set_manifest([ref(1), ref(3)])
    assert done.close()["counts"]["inputs"] == 2
    assert done.problems() == []


# -------------------------------------------------------------------------------------- a whole run


def test_a_run_does_what_is_left_and_closes(folder: Folder) -> None:
    folder.write(row(ref(2)))
    with folder.run(started=0.0) as run:
        assert [video.uri for video in run.todo] == ["/videos/1.mp4", "/videos/3.mp4"]
        assert (folder.path / LEASE_FILE).exists()
        for video in run.todo:
            run.publish(features_of(row(video)))
        content = run.close({"decode": 1.25}, lambda: {"weights": {"visual": "abc"}})
    assert content == read_run(folder.uri)
    assert (content["videos_done_now"], content["counts"]["ok"]) == (2, 3)
    assert content["started"] == "1970-01-01T00:00:00+00:00"
    assert (content["stage_seconds"], content["weights"]) == ({"decode": 1.25}, {"visual": "abc"})
    assert not (folder.path / LEASE_FILE).exists()
    assert folder.problems() == []


def test_a_run_with_work_to_do_reopens_the_folder(done: Folder) -> None:
    with done.run(Selection.of(done.manifest, retry_failed="corrupt")) as run:
        assert [video.uri for video in run.todo] == ["/videos/2.mp4"]
        assert (done.path / RUN_FILE).exists()
        run.begin()
        assert not (done.path / RUN_FILE).exists()


def test_a_run_that_is_refused_after_it_took_the_lease_changes_nothing(
    done: Folder, tmp_path: Path
) -> None:
    """By the cluster, for example, before any work."""

    def refused(run: BulkRun) -> None:
        with pytest.raises(RunError, match="no such GPU"), run:
            raise RunError("no such GPU")

    before = {path.name: path.read_bytes() for path in done.path.iterdir()}
    refused(done.run(Selection.of(done.manifest, retry_failed="corrupt")))
    assert {path.name: path.read_bytes() for path in done.path.iterdir()} == before
    (tmp_path / "other").mkdir()
    new = Folder(tmp_path / "other", [ref(1)])
    refused(new.run())
    assert not new.path.exists()


def test_remaining_work_is_known_without_entering(folder: Folder, tmp_path: Path) -> None:
    selection = Selection.of(folder.manifest, limit=2)
    folder.write(row(ref(1)))
    with folder.run():  # another run holds the lease
        todo = todo_without_entering(folder.uri, "features", selection)
    assert [video.uri for video in todo] == ["/videos/2.mp4"]
    assert len(todo_without_entering(str(tmp_path / "new"), "features", selection)) == 2
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match="holds features, not predictions"):
        todo_without_entering(folder.uri, "predictions", selection)


def test_a_second_run_is_refused_and_changes_nothing(folder: Folder) -> None:
    with folder.run() as run:
        with pytest.raises(RunError, match=r"writes to this folder; .* with --take-over"):
            folder.run().__enter__()
        run.publish(features_of(row(ref(1))))


def test_a_run_that_was_taken_over_writes_nothing_more(folder: Folder) -> None:
    with folder.run() as first:
        first.publish(features_of(row(ref(1))))
        with folder.run(take_over=True) as second:
            with pytest.raises(RunFailed, match="another run took over this folder"):
                first.publish(features_of(row(ref(2))))
            with pytest.raises(RunFailed, match="another run took over this folder"):
                first.close({}, dict)
            assert not (folder.path / RUN_FILE).exists()
            assert folder.rows() == [("/videos/1.mp4", "ok")]
            assert [video.uri for video in second.todo] == ["/videos/2.mp4", "/videos/3.mp4"]


def test_a_run_that_is_taken_over_while_it_closes_writes_no_run_file(folder: Folder) -> None:
    folder.write(row(ref(1)), row(ref(2)), row(ref(3)))
    with contextlib.ExitStack() as stack, folder.run() as first:

        def measure() -> dict[str, Any]:
            stack.enter_context(folder.run(take_over=True))
            return {}

        with pytest.raises(RunFailed, match="another run took over this folder"):
            first.close({}, measure)
    assert not (folder.path / RUN_FILE).exists()


def test_a_folder_of_other_work_gets_no_lease(folder: Folder, tmp_path: Path) -> None:
    other = Identity.of(decode={"num_frames": 50})
    with pytest.raises(RunError, match="made with another configuration"):
        BulkRun(folder.uri, "features", other, Selection.of(folder.manifest), Config()).__enter__()
    assert sorted(path.name for path in folder.path.iterdir()) == [CONFIG_FILE]


def test_the_lease_of_a_killed_start_is_no_foreign_file(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [ref(1)])
    folder.path.mkdir()
    (folder.path / LEASE_FILE).write_bytes(b"{}")
    folder.begin()


# ------------------------------------------------------------------------------------------- verify


def test_an_unfinished_run_is_distinguished_from_no_run(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="this run is not finished; run its command again"):
        verify(folder.uri)
    with pytest.raises(RunError, match=r"no run folder \(no _run.json\)"):
        verify(str(tmp_path))


def test_reopening_makes_a_run_unfinished(done: Folder) -> None:
    reopen(done.uri)
    with pytest.raises(RunError, match="this run is not finished"):
        read_run(done.uri)


def test_another_kind_and_another_format_are_refused(done: Folder) -> None:
    with pytest.raises(RunError, match="holds features, expected predictions"):
        read_run(done.uri, "predictions")
    change_run(done, format="one")
    with pytest.raises(RunError, match="format 'one'; this version reads 1"):
        read_run(done.uri)


def test_a_folder_of_a_newer_version_asks_for_an_upgrade(done: Folder) -> None:
    newer = r"made by a newer version of tsq_ray \(format 2; this version reads 1\); upgrade"
    change_run(done, format=2)
    with pytest.raises(RunError, match=newer):
        read_run(done.uri)
    config = read_json(str(done.path / CONFIG_FILE))
    assert config is not None
    write_json(str(done.path / CONFIG_FILE), config | {"format": 2})
    with pytest.raises(RunError, match=newer):
        done.begin()


def change_run(folder: Folder, **changes: Any) -> None:
    run = read_json(str(folder.path / RUN_FILE))
    assert run is not None
    write_json(str(folder.path / RUN_FILE), run | changes)


def remove_part(folder: Folder) -> None:
    (folder.path / parts_of(folder)[0]).unlink()


def add_part(folder: Folder) -> None:
    folder.write(row(ref(1)))


def cut_part(folder: Folder) -> None:
    path = folder.path / parts_of(folder)[0]
    path.write_bytes(path.read_bytes()[:-20])


def rename_part(folder: Folder) -> None:
    first, second = parts_of(folder)
    (folder.path / first).write_bytes((folder.path / second).read_bytes())


def wrong_counts(folder: Folder) -> None:
    counts = read_run(folder.uri)["counts"]
    change_run(folder, counts=counts | {"ok": 3, "failed": 1})


def ok_without_features(folder: Folder) -> None:
    bare = row(ref(3)) | {"visual": None}
    folder.write(bare)


def unknown_error_type(folder: Folder) -> None:
    folder.write(row(ref(3), "bored"))


def unknown_status(folder: Folder) -> None:
    folder.write(row(ref(3)) | {"status": "fine"})


def missing_column(folder: Folder) -> None:
    name = folder.write(row(ref(3)))
    pq.write_table(pq.read_table(folder.path / name).drop_columns(["visual"]), folder.path / name)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (remove_part, "listed in _run.json but missing"),
        (add_part, "not listed in _run.json"),
        (cut_part, "not readable as Parquet"),
        (rename_part, "its name does not match the videos in it"),
        (wrong_counts, "inputs 3 != ok 3 + failed 1 + skipped 0"),
        (wrong_counts, "2 rows are ok, _run.json says 3"),
        (ok_without_features, "1 rows are ok without visual"),
        (unknown_error_type, "unknown error types ['bored']"),
        (unknown_status, "statuses ['fine']"),
        (missing_column, "lacks the columns ['visual']"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_verify_finds_what_is_wrong(done: Folder, damage: Any, problem: str) -> None:
    damage(done)
    assert problem in " / ".join(done.problems())


def test_verify_finds_two_rows_of_one_video(done: Folder) -> None:
    add_part(done)
    parts = [
        {"name": part.uri.rpartition("/")[2], "bytes": part.size_bytes}
        for part in list_parts(done.uri)
    ]
    change_run(done, parts=parts)
    assert f"video {ref(1).video_id}: 2 rows" in done.problems()


@pytest.mark.parametrize(
    ("videos", "problem"),
    [
        ([ref(1), ref(2)], f"video {ref(3).video_id} is not in the manifest"),
        (
            [ref(1, size_bytes=11), ref(2), ref(3)],
            "(/videos/1.mp4): the row is from another version of the file",
        ),
        ([ref(1), ref(2), ref(3), ref(4)], "the manifest has 4 videos, _run.json says 3"),
        (
            [ref(1), ref(2), ref(3), ref(4)],
            "1 videos of the manifest have no row, _run.json says 0 were skipped",
        ),
    ],
)
def test_verify_compares_with_the_manifest(
    done: Folder, videos: list[VideoRef], problem: str
) -> None:
    done.set_manifest(videos)
    change_run(done, manifest=read_run(done.uri)["manifest"] | {"sha256": done.manifest.sha256})
    assert any(problem in found for found in done.problems())


@pytest.mark.parametrize(
    ("change", "told"), [("newer", "it changed since this run"), ("gone", "no such file")]
)
def test_verify_says_when_the_manifest_cannot_be_compared(
    done: Folder, change: str, told: str
) -> None:
    if change == "gone":
        os.unlink(done.manifest_uri)
    else:
        done.set_manifest([ref(1)])
    result = verify(done.uri)
    assert result.problems == ()
    assert "manifest not checked" in result.checks[-1]
    assert told in result.checks[-1]


def test_labels_and_splits_that_changed_reach_the_rows(done: Folder) -> None:
    before = done.close()
    classes = ["another", *CLASSES]
    moved = [dataclasses.replace(video, labels=(2,), split="val") for video in done.manifest.rows]
    write_manifest(Manifest(moved, classes, id="source"), done.manifest_uri)
    done.manifest = read_manifest(done.manifest_uri)
    done.begin()
    assert done.left() == []
    run = done.close()
    table = pa.concat_tables([read_part(part.uri) for part in list_parts(done.uri)])
    assert table["labels"].to_pylist() == [[2]] * table.num_rows
    assert set(table["split"].to_pylist()) == {"val"}
    assert schema.classes_of(table.schema) == classes == run["classes"]
    assert run["counts"] == before["counts"]
    assert done.problems() == []
    assert done.close() == run | {"videos_done_now": 0, "already_done": True}
