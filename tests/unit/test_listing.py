"""A listing of a local folder: each entry is a row, or is left out and counted with a reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from tsq_ray import containers, storage
from tsq_ray.errors import ManifestError, StorageError
from tsq_ray.labels import READERS
from tsq_ray.manifest import (
    Findings,
    Manifest,
    VideoRef,
    VideoRows,
    assemble_manifest,
    build_manifest,
    read_manifest,
    video_id,
    write_manifest,
)
from tsq_ray.manifest.listing import _check_ids
from tsq_ray.storage.local_files import VANISHED
from tsq_ray.summaries import index_text

Make = Callable[..., Path]
HIDDEN = "hidden (name begins with .)"
OWN_NAME = "linked folder, listed under its own name"


def index(*sources: Path | str, **options: object) -> tuple[Manifest, Findings]:
    return assemble_manifest([str(source) for source in sources], **options)  # type: ignore[arg-type]


def found(folder: Path, *sources: Path | str) -> tuple[list[str], dict[str, int]]:
    """(videos, paths below `folder`; what was left out) of these sources; default `folder`."""
    manifest, summary = index(*(sources or (folder,)))
    assert len({row.video_id for row in manifest.rows}) == len(manifest.rows)
    return [os.path.relpath(row.uri, folder) for row in manifest.rows], summary.left_out


# -------------------------------------------------------------------------------------------- names


def test_only_a_leading_dot_makes_a_name_hidden(make: Make) -> None:
    folder = make(
        "_1W44j2lpIA_000000_000010.mp4",
        "_other/a.mp4",
        ".x.mp4",
        ".git/1.mp4",
        ".git/2.mp4",
        "-a.mp4",
        "b/2.mp4",
        "b/1.mp4",
    )
    videos, left_out = found(folder)
    assert videos == [
        "-a.mp4",
        "_1W44j2lpIA_000000_000010.mp4",
        "_other/a.mp4",
        "b/1.mp4",
        "b/2.mp4",
    ]
    assert left_out == {HIDDEN: 2}, "a hidden folder counts once"


ODD = (
    *(
        "std::vec.mp4",
        "proj::x/a.mp4",
        "What is it?.mp4",
        "Why? Because/x.mp4",
        "a#1.mp4",
        "50%20 off.mp4",
        "a b'c\"d.mp4",
    ),
    *(
        "two\nlines.mp4",
        "\x1b[31mred.mp4",
        "🎬.mp4",
        "folder.mp4/in.mp4",
        "-rf.mp4",
        "=cmd().mp4",
        "*[x]?.mp4",
        "file:x.mp4",
        "~a.mp4",
    ),
    *("ü" * 125 + ".mp4", "back\\slash.mp4", "a&b+c~d.mp4", " blank .mp4", "UPPER.MP4"),
)


def test_odd_names_are_rows_and_are_found_again(make: Make, tmp_path: Path) -> None:
    folder = make(*ODD)
    manifest, summary = index(folder)
    assert {os.path.relpath(row.uri, folder) for row in manifest.rows} == set(ODD)
    assert summary.left_out == {}
    for row in manifest.rows:
        assert storage.stat(row.uri) == storage.StoredFile(
            row.uri, row.size_bytes, row.etag, row.modified
        )
        assert row.video_id == video_id(row.uri)
        again = index(row.uri)[0].rows
        assert [one.video_id for one in again] == [row.video_id], (
            "named outright it is the same video"
        )
    write_manifest(manifest, str(tmp_path / "m::1 #[x]?.parquet"))
    assert sorted(os.listdir(tmp_path)) == ["m::1 #[x]?.parquet", "videos"]


def test_a_source_with_colons_is_a_folder(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make("proj::x/a.mp4", "file::/b.mp4"))
    assert [os.path.basename(row.uri) for row in index("proj::x", "file::")[0].rows] == [
        "a.mp4",
        "b.mp4",
    ]


def test_folders_may_lie_deeper_than_python_recurses(make: Make) -> None:
    folder = make("z.mp4")
    deep, depth = os.open(folder, os.O_RDONLY), sys.getrecursionlimit() + 100
    for _ in range(depth):  # step by step: the path as a whole may be too long for one call
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(os.open("v.mp4", os.O_CREAT, dir_fd=deep))
    os.close(deep)
    try:
        videos, left_out = found(folder)
    finally:
        subprocess.run(["rm", "-rf", folder / "d"], check=True)  # pytest's own cleanup recurses
    assert videos == ["z.mp4", "d/" * depth + "v.mp4"]
    assert left_out == {}


def test_a_path_too_long_to_open_is_counted(make: Make) -> None:
    folder = make("z.mp4")
    deep, name = os.open(folder, os.O_RDONLY), "d" * 250
    for _ in range(18):
        os.mkdir(name, dir_fd=deep)
        below = os.open(name, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    assert found(folder) == (["z.mp4"], {"path is too long": 1})


def test_names_that_are_not_utf8_are_counted_and_reported(make: Make) -> None:
    folder = make("a.mp4")
    odd = os.fsdecode(bytes(folder) + b"/caf\xe9")
    os.mkdir(odd)
    Path(odd, "x.mp4").write_bytes(b"x")
    Path(f"{odd}.mp4").write_bytes(b"x")
    manifest, summary = index(folder)
    assert ([os.path.basename(row.uri) for row in manifest.rows], summary.left_out) == (
        ["a.mp4"],
        {"name is not UTF-8": 2},
    )
    assert summary.left_out_examples == {
        "name is not UTF-8": [f"{folder}/caf\\udce9", f"{folder}/caf\\udce9.mp4"]
    }
    for source in (odd, f"{odd}.mp4"):
        with pytest.raises(
            ManifestError,
            match=r"caf\\udce9.*: the name is not UTF-8, which a manifest requires; rename it",
        ):
            index(folder, source)
    assert len(video_id(f"{odd}.mp4")) == 16, "a failed row has an id, too"


# -------------------------------------------------------------------------------------------- files


def test_only_regular_files_are_videos(make: Make) -> None:
    folder = make("a.mp4", "b.txt")
    os.mkfifo(folder / "fifo.mp4")
    (folder / "device.mp4").symlink_to(os.devnull)
    (folder / "gone.mp4").symlink_to("nowhere")
    (folder / "below.mp4").symlink_to("b.txt/x.mp4")
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "lost+found").mkdir()
    (folder / "lost+found" / "x.mp4").write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.mp4"))
        videos, left_out = found(folder)
    assert videos == ["a.mp4"]
    assert left_out == {
        ".txt": 1,
        "broken link": 2,
        "not a regular file (character device)": 1,
        "not a regular file (FIFO)": 1,
        "not a regular file (socket)": 1,
        "link loop": 1,
        "lost+found (the file system's own)": 1,
    }


def test_a_fifo_named_outright_is_reported_immediately(make: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "v.mp4")
    message = f"cannot .* {tmp_path}/v.mp4: a FIFO, not a regular file; name a file"
    with pytest.raises(StorageError, match=message):
        index(tmp_path / "v.mp4")
    with pytest.raises(StorageError, match=message):
        index(make("a.mp4"), labels=str(tmp_path / "v.mp4"))
    with pytest.raises(StorageError, match=message):
        index(make("a.mp4"), classes_file=str(tmp_path / "v.mp4"))
    with pytest.raises(StorageError, match=message):
        read_manifest(str(tmp_path / "v.mp4"))


def test_an_impossible_time_does_not_end_the_listing() -> None:
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as folder:
        for name in ("a.mp4", "b.mp4", "c.mp4"):
            Path(folder, name).write_bytes(b"x")
        os.utime(Path(folder, "a.mp4"), (569034205384, 569034205384))
        os.utime(Path(folder, "b.mp4"), (-99999999999, -99999999999))
        if os.stat(Path(folder, "a.mp4")).st_mtime != 569034205384:
            pytest.skip("this file system clips the time")
        manifest, _ = index(folder)
        assert [row.modified is None for row in manifest.rows] == [True, True, False]
        _, summary = index(folder, old=manifest)
        assert (summary.unchanged, summary.changed) == (3, 0)


def test_what_vanishes_while_it_is_listed_is_counted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("a.mp4", "b.mp4", "c/d.mp4", "z/e.mp4")
    listed = storage.entries(str(folder))
    first = next(listed)
    (folder / "b.mp4").unlink()
    (folder / "z" / "e.mp4").unlink()
    (folder / "z").rmdir()
    rest = list(listed)
    assert [entry.uri.removeprefix(f"{folder}/") for entry in (first, *rest)] == [
        "a.mp4",
        "b.mp4",
        "c/d.mp4",
        "z",
    ]
    assert [entry.reason for entry in rest if isinstance(entry, storage.LeftOut)] == [VANISHED] * 2


# ---------------------------------------------------------------------------------------------- ids


def test_a_video_and_a_link_to_it_are_two_rows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("cats/1.mp4", "dogs/2.mp4")
    (folder / "dogs" / "favourite.mp4").symlink_to(folder / "cats" / "1.mp4")
    videos, left_out = found(folder)
    assert (videos, left_out) == (["cats/1.mp4", "dogs/2.mp4", "dogs/favourite.mp4"], {})
    monkeypatch.chdir(folder)
    ids = [row.video_id for row in index(".")[0].rows]
    assert ids == [video_id(f"{folder}/{name}") for name in videos]
    assert [row.video_id for row in index("dogs/favourite.mp4")[0].rows] == ids[2:]


def test_a_place_in_several_spellings_is_one_row(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("a/1.mp4", "a/x.txt")
    monkeypatch.chdir(folder)
    spellings = (
        ".",
        folder,
        f"{folder}/",
        "a/..",
        f"file://{folder}",
        "a",
        "a/1.mp4",
        "./a//1.mp4",
    )
    assert found(folder, *spellings) == (["a/1.mp4"], {".txt": 1})


def test_equal_ids_are_refused_by_name() -> None:
    rows = VideoRows.of(
        [VideoRef("x", "/a.mp4", 1), VideoRef("y", "/b.mp4", 1), VideoRef("x", "/c.mp4", 1)]
    )
    with pytest.raises(
        ManifestError, match=r"/a\.mp4 and /c\.mp4 have the same video_id x; rename one of the two"
    ):
        _check_ids(rows)


# -------------------------------------------------------------------------------------------- links


def test_class_folders_that_are_links_give_labels(make: Make, tmp_path: Path) -> None:
    folder = make("cats/1.mp4")
    (tmp_path / "store" / "d").mkdir(parents=True)
    (tmp_path / "store" / "d" / "2.mp4").write_bytes(b"x")
    (folder / "dogs").symlink_to(tmp_path / "store" / "d")
    manifest, summary = index(folder)
    assert (manifest.classes, summary.labels_from, summary.left_out) == (
        ["cats", "dogs"],
        "class folders",
        {},
    )
    assert [row.uri for row in manifest.rows] == [f"{folder}/cats/1.mp4", f"{folder}/dogs/2.mp4"]


def test_a_linked_folder_is_entered_once_and_loops_are_cut(make: Make, tmp_path: Path) -> None:
    folder = make("a/1.mp4", "c/deep/er/2.mp4", ".store/3.mp4")
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "sub" / "4.mp4").write_bytes(b"x")
    for name, target in {
        "again": folder / "a",  # met under its own name
        "c/up": folder,
        "c/deep/parent": "..",
        "c/all": tmp_path,  # above the source
        "from_store": folder / ".store",  # not met otherwise
        "x1": outside / "sub",
        "x2": outside,  # holds what x1 led to
        "x3": outside,
    }.items():
        (folder / name).symlink_to(target)
    (outside / "back").symlink_to(folder)
    (outside / "self").symlink_to(outside)
    videos, left_out = found(folder)
    assert videos == ["a/1.mp4", "c/deep/er/2.mp4", "from_store/3.mp4", "x1/4.mp4"]
    assert left_out == {
        HIDDEN: 1,
        OWN_NAME: 1,
        "link loop": 5,
        "linked folder, listed under another link": 2,
    }


def test_a_source_may_be_a_link(make: Make, tmp_path: Path) -> None:
    folder = make("a/1.mp4")
    (tmp_path / "link").symlink_to(folder)
    manifest, _ = index(tmp_path / "link")
    assert [row.uri for row in manifest.rows] == [f"{tmp_path}/link/a/1.mp4"]


@pytest.mark.parametrize("name", ["link/a.mp4", "real/a.mp4", "link/../real/./a.mp4"])
@pytest.mark.parametrize("source", ["link", "real"])
def test_labels_find_a_video_through_a_linked_folder_in_either_spelling(
    name: str, source: str, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    for video in ("a.mp4", "b.mp4"):
        (tmp_path / "real" / video).write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "labels.csv").write_text(f"path,label\n{name},x\n")
    manifest, summary = index(tmp_path / source, labels=str(tmp_path / "labels.csv"))
    assert [row.labels for row in manifest.rows] == [(0,), None]
    assert summary.missing == []


# ------------------------------------------------------------------------------------------ summary


def test_the_summary_names_the_first_of_each_reason(make: Make) -> None:
    folder = make("a.mp4", "b.txt", *(f".{number}.mp4" for number in range(5)))
    (folder / "gone.mp4").symlink_to("nowhere")
    text = index_text(build_manifest([str(folder)], str(folder / "m.parquet"))).splitlines()
    names = ", ".join(f"{folder}/.{number}.mp4" for number in range(3))
    assert text[3:] == [
        "left out, no video suffix: .txt 1",
        f"left out, {HIDDEN}: 5: {names}, ...",
        f"left out, broken link: 1: {folder}/gone.mp4",
        f"out: {folder}/m.parquet",
    ]


def test_a_folder_with_nothing_but_odd_entries_says_so(make: Make) -> None:
    folder = make(".a.mp4")
    os.mkfifo(folder / "v.mp4")
    with pytest.raises(
        ManifestError,
        match=(
            r"it holds 2 other files: hidden \(.*\) 1, not a regular file \(FIFO\) 1; name a "
            r"folder"
        ),
    ):
        index(folder)


# ----------------------------------------------------------------------------------------- suffixes

LISTED_BEFORE = (
    "3gp asf avi divx f4v flv gif m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv qt ts vob webm wmv y4m"
)
LACKED = (
    "3g2 m2v m1v mpe m2t ogm rm rmvb dv ivf nut trp tod mod mk3d h264 264 h265 265 hevc obu "
    "mjpg mjpeg apng swf wtv mpv"
)


def test_the_suffixes_are_those_of_the_decoders_own_containers(make: Make) -> None:
    folder = make(
        *(f"v.{suffix}" for suffix in f"{LISTED_BEFORE} {LACKED} m4a mka mp3 jpg".split())
    )
    manifest, summary = index(folder)
    assert {row.uri.rpartition(".")[2] for row in manifest.rows} == set(
        f"{LISTED_BEFORE} {LACKED}".split()
    )
    assert summary.left_out == dict.fromkeys((".jpg", ".m4a", ".mka", ".mp3"), 1), (
        "sound and pictures"
    )


def test_every_container_is_one_that_ffmpeg_reads() -> None:
    names = containers.FORMATS.split(",")
    assert len(names) == len(set(names))
    for name in names:
        assert av.ContainerFormat(name, "r").is_input


def test_readers_know_no_suffixes_of_their_own() -> None:
    assert READERS["video-list"].recognise("clip.rmvb 3")


def test_dots_after_a_link_start_from_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far/sub").mkdir(parents=True)
    (tmp_path / "far/x.mp4").touch()
    (tmp_path / "link").symlink_to(tmp_path / "far/sub")
    monkeypatch.chdir(tmp_path)
    assert storage.normalize("link/../x.mp4") == str(tmp_path / "far/x.mp4")
    assert storage.normalize("link/.") == str(tmp_path / "link")
    assert storage.normalize("far/../link") == str(tmp_path / "link")


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    storage.write_bytes(str(tmp_path / "link"), b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
