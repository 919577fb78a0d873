"""Manifests: listing, labels from everywhere, stable ids, updates, the file itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsq_ray import schema
from tsq_ray.errors import ManifestError
from tsq_ray.manifest import (
    Findings,
    Manifest,
    VideoRef,
    VideoRows,
    assemble_manifest,
    choose_split,
    read_manifest,
    same_contents,
    video_id,
    write_manifest,
)

Make = Callable[..., Path]


def index(folder: Path, **options: object) -> tuple[Manifest, Findings]:
    return assemble_manifest([str(folder)], **options)  # type: ignore[arg-type]


def labels_of(manifest: Manifest) -> dict[str, tuple[list[str], str | None]]:
    """File name -> (class names, split)."""
    return {
        os.path.basename(row.uri): (
            [manifest.classes[label] for label in row.labels or ()],
            row.split,
        )
        for row in manifest.rows
    }


# ------------------------------------------------------------------------------------------ listing


def test_videos_are_taken_by_their_names_and_the_rest_is_counted(make: Make) -> None:
    manifest, summary = index(make("a.mp4", "b/c.MKV", "b/notes.txt", "b/readme", ".hidden.mp4"))
    assert [os.path.basename(row.uri) for row in manifest.rows] == ["a.mp4", "c.MKV"]
    assert summary.left_out == {"hidden (name begins with .)": 1, ".txt": 1, "(no suffix)": 1}
    assert [
        name.rpartition("/")[2] for names in summary.left_out_examples.values() for name in names
    ] == [
        ".hidden.mp4",
        "notes.txt",
        "readme",
    ]
    assert (summary.videos, summary.new, summary.labelled, summary.unlabelled) == (2, 2, 0, 2)


def test_a_file_named_outright_is_taken_whatever_its_name_and_each_file_once(make: Make) -> None:
    folder = make("a.mp4", "odd.bin")
    manifest, _ = assemble_manifest([str(folder), str(folder / "a.mp4"), str(folder / "odd.bin")])
    assert [os.path.basename(row.uri) for row in manifest.rows] == ["a.mp4", "odd.bin"]


def test_ids_depend_only_on_the_place(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("a.mp4")
    before = index(folder)[0].rows[0]
    (folder / "a.mp4").write_bytes(b"other content")
    monkeypatch.chdir(folder.parent)
    after = assemble_manifest(["videos"])[0].rows[0]
    assert before.video_id == after.video_id == video_id("videos/a.mp4")
    assert before.size_bytes != after.size_bytes
    assert len(before.video_id) == 16
    assert video_id("s3://bucket/a.mp4") == "fd373ff61094d28c"


@pytest.mark.parametrize(
    ("names", "source", "message"),
    [
        ((), "nowhere", "nowhere: no such file, folder, bucket or prefix; check the name"),
        (
            ("notes.txt", "data.csv"),
            "",
            r"no video found; it holds 2 other files: \.csv 1, \.txt 1; name a folder, an "
            r"s3:// prefix",
        ),
        (
            ("empty/.keep",),
            "empty",
            r"empty: no video found; it holds 1 other files: hidden \(name begins with \.\) 1; "
            r"name a folder",
        ),
        (("bare/",), "bare", "bare: no video found; name a folder"),
    ],
)
def test_a_source_that_matches_nothing_is_an_error(
    make: Make, names: tuple[str, ...], source: str, message: str
) -> None:
    make("x.mp4", *(name for name in names if not name.endswith("/")))
    folder = make()
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir()
    if source == "":
        (folder / "x.mp4").unlink()
    with pytest.raises(ManifestError, match=message):
        assemble_manifest([str(folder / source)])


def test_one_of_several_sources_that_matches_nothing_is_an_error(make: Make) -> None:
    folder = make("a/1.mp4", "b/notes.txt")
    with pytest.raises(ManifestError, match="b: no video found"):
        assemble_manifest([str(folder / "a"), str(folder / "b")])


def test_no_source_is_an_error() -> None:
    with pytest.raises(ManifestError, match="no source given"):
        assemble_manifest([])


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ("cats/1.mp4", "big_dogs/2.mp4"),
            {"1.mp4": (["cats"], None), "2.mp4": (["big dogs"], None)},
        ),
        (
            ("train/cats/1.mp4", "val/dogs/2.mp4"),
            {"1.mp4": (["cats"], "train"), "2.mp4": (["dogs"], "val")},
        ),
        (
            ("_other/1.mp4", "other/2.mp4", "__a_b__/3.mp4", "_/4.mp4", "x__y/5.mp4"),
            {
                "1.mp4": (["_other"], None),
                "2.mp4": (["other"], None),
                "3.mp4": (["__a b__"], None),
                "4.mp4": (["_"], None),
                "5.mp4": (["x  y"], None),
            },
        ),
        (("cats/1.mp4", "2.mp4"), {"1.mp4": ([], None), "2.mp4": ([], None)}),
        (("cats/1.mp4", "cats/2.mp4"), {"1.mp4": ([], None), "2.mp4": ([], None)}),
        (("2019/cats/1.mp4", "2020/dogs/2.mp4"), {"1.mp4": ([], None), "2.mp4": ([], None)}),
    ],
    ids=[
        "classes",
        "splits and classes",
        "underscores at the ends",
        "a video beside the folders",
        "one folder only",
        "folders that are no splits",
    ],
)
def test_class_folders_are_seen_where_all_videos_lie_in_one(
    make: Make, names: tuple[str, ...], expected: dict[str, tuple[list[str], str | None]]
) -> None:
    manifest, summary = index(make(*names))
    assert labels_of(manifest) == expected
    assert summary.labels_from == (
        "class folders" if any(labels for labels, _ in expected.values()) else "none"
    )


def test_class_folders_asked_for_must_be_there(make: Make) -> None:
    with pytest.raises(
        ManifestError, match="--labels folders: some videos are not in a class folder"
    ):
        index(make("1.mp4"), labels="folders")
    with pytest.raises(
        ManifestError,
        match=r"--labels none: cannot be combined with other labels, got none, a\.csv",
    ):
        index(make("1.mp4"), labels=["none", "a.csv"])


def test_labels_none_leaves_class_folders_alone(make: Make) -> None:
    manifest, summary = index(make("cats/1.mp4", "dogs/2.mp4"), labels="none")
    assert manifest.classes == []
    assert summary.labelled == 0


def test_a_classes_file_fixes_the_order_and_may_name_more(make: Make, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dogs\n\n birds \ncats\n")
    manifest, _ = index(
        make("cats/1.mp4", "dogs/2.mp4"), classes_file=str(tmp_path / "classes.txt")
    )
    assert manifest.classes == ["dogs", "birds", "cats"]
    assert [row.labels for row in manifest.rows] == [(2,), (0,)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cats\ndogs\ncats\n", "class name 'cats' appears 2 times"),
        ("cats\n", "lacks 1 classes of the labels, first 'dogs'; add them"),
    ],
)
def test_a_classes_file_that_does_not_fit_is_refused(
    make: Make, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(ManifestError, match=message):
        index(make("cats/1.mp4", "dogs/2.mp4"), classes_file=str(tmp_path / "classes.txt"))


def test_a_split_name_is_every_rows(make: Make) -> None:
    manifest, summary = index(make("train/cats/1.mp4", "val/dogs/2.mp4"), split_name="all of it")
    assert {row.split for row in manifest.rows} == {"all of it"}
    assert summary.splits == {"all of it": 2}


# ------------------------------------------------------------------------------------------- update


def test_an_update_counts_new_changed_deleted_and_unchanged(make: Make) -> None:
    folder = make("same.mp4", "touched.mp4", "grown.mp4", "gone.mp4")
    old, _ = index(folder)
    make("new.mp4")
    (folder / "grown.mp4").write_bytes(b"much longer than before")
    os.utime(folder / "touched.mp4", (1, 1))
    (folder / "gone.mp4").unlink()
    _, summary = index(folder, old=old)
    assert (summary.new, summary.changed, summary.deleted, summary.unchanged) == (1, 2, 1, 1)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"modified": None}, True),
        ({"etag": "b"}, False),
        ({"size_bytes": 2}, False),
        ({"labels": (1,), "split": "x"}, True),
    ],
)
def test_an_etag_outweighs_the_time(change: dict[str, object], same: bool) -> None:
    row = VideoRef("i", "s3://b/k", 1, "a")
    changed = VideoRef(**(vars(row) | change))  # type: ignore[arg-type]
    now, was = (VideoRows.of([ref]).table for ref in (changed, row))
    assert same_contents(now, was).tolist() == [same]


# ----------------------------------------------------------------------------------------- the file


def test_a_manifest_comes_back_as_it_was(make: Make, tmp_path: Path) -> None:
    manifest, _ = index(make("train/cats/1.mp4", "val/dogs/2.mp4"))
    place = str(tmp_path / "out" / "manifest.parquet")
    write_manifest(manifest, place)
    read = read_manifest(place)
    assert (read.rows, read.classes, read.id, read.sources) == (
        manifest.rows,
        manifest.classes,
        manifest.id,
        manifest.sources,
    )
    assert len(read.sha256) == 64
    assert read.uri == place


def formatted(path: Path, number: int) -> None:
    """Give a manifest of one file this format, and a column that no format has yet."""
    table = pq.read_table(path)
    identity = json.loads(table.schema.metadata[schema.MANIFEST_KEY])
    assert identity["format"] == 1
    found = {schema.MANIFEST_KEY: json.dumps(identity | {"format": number}).encode()}
    later = table.rename_columns({"uri": "place"}) if number > 1 else table
    pq.write_table(later.replace_schema_metadata(found), path)


@pytest.mark.parametrize("within", ["", "folder"])
def test_a_newer_format_is_refused(make: Make, within: str, tmp_path: Path) -> None:
    manifest, _ = index(make("a.mp4"))
    place = tmp_path / "out" / "m.parquet"
    write_manifest(manifest, str(place))
    formatted(place, 1)
    assert len(read_manifest(str(place)).rows) == 1
    formatted(place, 2)
    newer = r"made by a newer version of tsq_ray \(format 2; this version reads 1\); upgrade"
    with pytest.raises(ManifestError, match=newer):
        read_manifest(str(place.parent if within else place))


def test_the_identity_of_a_manifest_is_its_sources(make: Make) -> None:
    folder = make("a/1.mp4", "b/2.mp4")
    first, second = ([str(folder / "a"), str(folder / "b")], [str(folder / "b"), str(folder / "a")])
    assert assemble_manifest(first)[0].id == assemble_manifest(second)[0].id
    assert assemble_manifest(first)[0].id != index(folder)[0].id


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "other columns", "no metadata"])
def test_something_other_than_a_manifest_is_reported(make: Make, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "manifest.parquet"
    messages = {
        "missing": "no such file; make one with tsq index SOURCE --out",
        "folder": (
            r"is a folder without \*\.parquet; name the file or the folder that tsq index wrote"
        ),
        "text": "not a Parquet file; make one with tsq index",
        "other columns": r"lacks the columns \['video_id', ",
        "no metadata": "lacks the manifest's metadata",
    }
    if kind == "folder":
        place.mkdir()
    elif kind == "text":
        place.write_text("path,label\n")
    elif kind == "other columns":
        pq.write_table(pa.table({"uri": ["a"]}), place)
    elif kind == "no metadata":
        write_manifest(index(make("a.mp4"))[0], str(place))
        pq.write_table(pq.read_table(place).replace_schema_metadata({}), place)
    with pytest.raises(ManifestError, match=messages[kind]):
        read_manifest(str(place))


def test_a_split_is_chosen_or_named() -> None:
    rows = [
        VideoRef("a", "/a", 1, split="train"),
        VideoRef("b", "/b", 1),
        VideoRef("c", "/c", 1, split="train"),
    ]
    manifest = Manifest(rows, [])
    assert choose_split(manifest, None) == rows
    assert choose_split(manifest, "train") == [rows[0], rows[2]]
    with pytest.raises(
        ManifestError, match=r"--split val: no video has it; splits: \(none\) \(1\), train \(2\)"
    ):
        choose_split(manifest, "val")
