"""Label files: every format, how it is recognised, what is refused, what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tsq_ray.errors import ManifestError, UserError
from tsq_ray.labels import READERS
from tsq_ray.manifest import Findings, Manifest, assemble_manifest

Make = Callable[..., Path]
Found = dict[str, tuple[list[str], str | None]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """write("labels.csv", text) -> the path of a file next to the folder `videos`."""

    def text(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return text


def index(folder: Path, *labels: str, **options: str) -> tuple[Manifest, Findings]:
    return assemble_manifest([str(folder)], labels, **options)  # type: ignore[arg-type]


def labels_of(manifest: Manifest) -> Found:
    """Path below `videos` -> (class names, split)."""
    root = manifest.sources[0]
    return {
        os.path.relpath(row.uri, root): (
            [manifest.classes[label] for label in row.labels or ()],
            row.split,
        )
        for row in manifest.rows
    }


# ---------------------------------------------------------------------------------------------- csv


def test_a_csv_gives_labels_and_splits_by_relative_and_absolute_paths(make: Make) -> None:
    folder = make("a.mp4", "sub/b.mp4", "c.mp4", "d.mp4", "e.mp4")
    labels = folder / "labels.csv"
    labels.write_text(
        "\ufeffpath, label ,split\r\n"
        "a.mp4,cats,train\r\n"
        "sub/../sub/b.mp4,dogs|cats|dogs,val\r\n"
        f'{folder}/c.mp4," big, dogs ",\r\n'
        "d.mp4,,train\r\n"
        "gone.mp4,cats,train\r\n"
        ",,\r\n"
    )
    manifest, summary = index(folder, str(labels))
    assert manifest.classes == ["big, dogs", "cats", "dogs"]
    assert labels_of(manifest) == {
        "a.mp4": (["cats"], "train"),
        "sub/b.mp4": (["cats", "dogs"], "val"),
        "c.mp4": (["big, dogs"], None),
        "d.mp4": ([], "train"),
        "e.mp4": ([], None),
    }
    assert (summary.missing, summary.labels_from) == (["gone.mp4"], f"{labels} (csv)")
    assert (summary.labelled, summary.unlabelled, summary.splits) == (
        3,
        2,
        {"train": 2, "(none)": 2, "val": 1},
    )
    assert {row.labels for row in manifest.rows if row.uri.endswith("d.mp4")} == {None}


def test_a_csv_finds_videos_that_are_links(
    make: Make, write: Callable[[str, str], str], tmp_path: Path
) -> None:
    folder = make("a.mp4")
    (tmp_path / "store").write_bytes(b"elsewhere")
    (folder / "link.mp4").symlink_to(tmp_path / "store")
    found = labels_of(
        index(folder, write("labels.csv", "path,label\nvideos/a.mp4,x\nvideos/link.mp4,y\n"))[0]
    )
    assert found == {"a.mp4": (["x"], None), "link.mp4": (["y"], None)}


def test_paths_of_a_csv_are_relative_to_it_and_to_nothing_else(
    make: Make, write: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("a.mp4", "sub/b.mp4")
    monkeypatch.chdir("/")
    _, summary = index(
        folder, write("labels.csv", "path,label\nvideos/a.mp4,cats\nsub/b.mp4,cats\nb.mp4,cats\n")
    )
    assert (summary.labelled, summary.missing) == (1, ["sub/b.mp4", "b.mp4"])


def test_odd_paths_of_a_csv_are_plain_names(
    make: Make, write: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "~a.mp4",
        "std::vec.mp4",
        "what?.mp4",
        "50%20.mp4",
        "#1.mp4",
        "-b.mp4",
        "_c.mp4",
        "a b.mp4",
    )
    folder = make(*names)
    lines = "".join(
        f"{name},x\n" for name in (*names, "gone\0.mp4", "n" * 5000, "https://h/v.mp4?s=1")
    )
    (folder / "labels.csv").write_text(f"path,label\n{lines}~/videos/~a.mp4,x\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    _, summary = index(folder, str(folder / "labels.csv"))
    assert (summary.labelled, len(summary.missing)) == (len(names), 3)


def test_labels_in_another_encoding_are_reported(make: Make, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("path,label\na.mp4,Äpfel\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text; save it as UTF-8"):
        index(make("a.mp4"), str(tmp_path / "labels.csv"))


@pytest.mark.parametrize(
    ("line", "label"),
    [
        ('a.mp4, "dog"', "dog"),
        ('  "a.mp4",  "dog"', "dog"),
        ("a.mp4,dog", "dog"),
        ("./a.mp4,dog", "dog"),
        ('a.mp4,"dog, big"', "dog, big"),
        ('a.mp4,"say ""dog"" twice"', 'say "dog" twice'),
        ('a.mp4,5" dog', '5" dog'),
        ('a.mp4,"""dog"""', '"dog"'),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_quotes_and_line_ends_of_a_csv(make: Make, line: str, label: str, end: str) -> None:
    labels = make("a.mp4") / "labels.csv"
    labels.write_bytes(f"path, label{end}{line}{end}".encode())
    assert labels_of(index(labels.parent, str(labels))[0]) == {"a.mp4": ([label], None)}


@pytest.mark.parametrize("line", ['a.mp4,\t"dog"', '\t"a.mp4",dog'])
def test_quotes_that_would_become_part_of_a_name_are_refused(
    make: Make, write: Callable[[str, str], str], line: str
) -> None:
    message = (
        r"""labels\.csv line 3: '\\t"(dog|a\.mp4)"' keeps its quotes; """
        r"expected the first one right after a comma"
    )
    with pytest.raises(ManifestError, match=message):
        index(make("a.mp4", "b.mp4"), write("labels.csv", f"path,label\nvideos/b.mp4,x\n{line}\n"))


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("Train", "train"),
        ("training", "train"),
        ("VALIDATION", "val"),
        ("valid", "val"),
        ("Test", "test"),
        ("holdout B", "holdout B"),
    ],
)
def test_a_split_word_means_the_same_in_every_format(
    make: Make, write: Callable[[str, str], str], word: str, split: str
) -> None:
    files = {
        "a.csv": f"path,label,split\nvideos/v.mp4,x,{word}\n",
        "k.csv": f"youtube_id,time_start,time_end,label,split\nv,0,10,x,{word}\n",
        "a.json": json.dumps(
            {"database": {"v": {"subset": word, "annotations": [{"label": "x"}]}}}
        ),
    }
    for name, content in files.items():
        assert labels_of(index(make("v.mp4"), write(name, content))[0])["v.mp4"] == (
            ["x"],
            split,
        ), name


def test_folders_for_splits_are_named_as_in_files(make: Make) -> None:
    found = labels_of(index(make("Train/cats/1.mp4", "validation/dogs/2.mp4"))[0])
    assert found == {
        "Train/cats/1.mp4": (["cats"], "train"),
        "validation/dogs/2.mp4": (["dogs"], "val"),
    }


# ------------------------------------------------------------------------------------------ unicode

NFC, NFD = "Caf\u00e9 Z\u00fcrich", "Cafe\u0301 Zu\u0308rich"


@pytest.mark.parametrize(("on_disk", "in_file"), [(NFC, NFD), (NFD, NFC), (NFC, NFC), (NFD, NFD)])
def test_composed_and_decomposed_names_are_the_same(
    make: Make, write: Callable[[str, str], str], on_disk: str, in_file: str
) -> None:
    folder, classes = make(f"{on_disk}/{on_disk}.mp4"), write("classes.txt", f"{on_disk}\nother\n")
    files = {
        "labels.csv": f"path,label\nvideos/{in_file}/{in_file}.mp4,{in_file}\n",
        "anet.json": json.dumps(
            {"database": {in_file: {"subset": "training", "annotations": [{"label": in_file}]}}}
        ),
        "list.txt": f"{in_file}/{in_file}.mp4 0\n",
        "frames.txt": f"{in_file}/{in_file} 90 0\n",
    }
    for name, content in files.items():
        manifest, summary = index(folder, write(name, content), classes_file=classes)
        assert [row.labels for row in manifest.rows] == [(0,)], name
        assert (manifest.classes, summary.missing) == ([NFC, "other"], [])
        assert manifest.rows[0].uri == f"{folder}/{on_disk}/{on_disk}.mp4", (
            "a path keeps its spelling"
        )


def test_class_folders_that_look_the_same_are_one_class(make: Make) -> None:
    manifest, _ = index(make(f"{NFC}/1.mp4", f"{NFD}/2.mp4", "other/3.mp4"))
    assert (manifest.classes, [row.labels for row in manifest.rows]) == (
        [NFC, "other"],
        [(0,), (0,), (1,)],
    )


def test_the_exact_spelling_goes_first(make: Make, write: Callable[[str, str], str]) -> None:
    folder = make(f"{NFC}.mp4", f"{NFD}.mp4")
    found = labels_of(
        index(folder, write("labels.csv", f"path,label\nvideos/{NFC}.mp4,x\nvideos/{NFD}.mp4,y\n"))[
            0
        ]
    )
    assert found == {f"{NFC}.mp4": (["x"], None), f"{NFD}.mp4": (["y"], None)}
    half = "Caf\u00e9 Zu\u0308rich"
    with pytest.raises(ManifestError, match="matches 2 videos"):
        index(folder, write("labels.csv", f"path,label\nvideos/{half}.mp4,x\n"))


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_end_a_line(make: Make, write: Callable[[str, str], str], odd: str) -> None:
    classes = write("classes.txt", f"one\rline{odd}feed\r\nthree\n")
    manifest, _ = index(
        make("a.mp4", f"b{odd}c.mp4"),
        write("list.txt", f"a.mp4 2\nb{odd}c.mp4 1\n"),
        classes_file=classes,
    )
    assert manifest.classes == ["one", f"line{odd}feed", "three"]
    assert [row.labels for row in manifest.rows] == [(2,), (1,)]


# ---------------------------------------------------------------------------------------- data sets


def test_activitynet_json_matches_by_name_with_or_without_v(
    make: Make, write: Callable[[str, str], str]
) -> None:
    def entry(subset: str, *labels: str) -> dict[str, object]:
        return {
            "subset": subset,
            "annotations": [{"label": label, "segment": [0, 1]} for label in labels],
        }

    database = {
        "aaa": entry("training", "Running", "Running", "Archery"),
        "v_bbb": entry("validation", "Archery"),
        "ccc": entry("testing"),
        "ddd": entry("training", "Gone"),
    }
    content = json.dumps(
        {"version": "1.3", "taxonomy": [{"nodeName": "Archery"}], "database": database}
    )
    manifest, summary = index(
        make("v_aaa.mp4", "copy/aaa.mkv", "bbb.webm", "x/ccc.mkv", "other.mp4"),
        write("anet.json", content),
    )
    assert labels_of(manifest) == {
        "v_aaa.mp4": (["Archery", "Running"], "train"),
        "copy/aaa.mkv": (["Archery", "Running"], "train"),
        "bbb.webm": (["Archery"], "val"),
        "x/ccc.mkv": ([], "test"),
        "other.mp4": ([], None),
    }
    assert (summary.missing, summary.labelled, summary.unlabelled) == (["ddd"], 3, 2)


def test_kinetics_finds_clips_flat_in_class_folders_and_by_the_id_alone(
    make: Make, write: Callable[[str, str], str]
) -> None:
    content = (
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "abseiling,--aaaaaaaaa,10,20,train,0\n"
        '"bartending",v_bbbbbbbbb,119,129.0,validate,0\n'
        "zumba,ccccccccccc,0,10,train,1\n"
        "zumba,ccccccccccc,30,40,train,1\n"
        "zumba,ddddddddddd,0,10,train,1\n"
    )
    names = (
        "abseiling/--aaaaaaaaa_000010_000020.mp4",
        "v_bbbbbbbbb_000119_000129.mkv",
        "ccccccccccc.mp4",
        "ddddddddddd_000005_000015.mp4",
    )
    manifest, summary = index(make(*names), write("train.csv", content))
    found = [(["abseiling"], "train"), (["bartending"], "val"), (["zumba"], "train"), ([], None)]
    assert labels_of(manifest) == dict(zip(names, found, strict=True))
    assert (summary.missing, summary.unlabelled) == (["ddddddddddd_000000_000010"], 1)


def test_kinetics_without_labels_gives_the_split(
    make: Make, write: Callable[[str, str], str]
) -> None:
    manifest, _ = index(
        make("aaa_000001_000011.mp4"),
        write("k.csv", "youtube_id,time_start,time_end,split\naaa,1,11,test\n"),
    )
    assert labels_of(manifest) == {"aaa_000001_000011.mp4": ([], "test")}


FCVID_LIST = "sport/a.mp4 train\nsport/b.mp4\ttest\n./news/c d.mp4 test\nnews/gone.mp4 train\n"


def test_fcvid_joins_its_list_with_the_matrix_next_to_it(
    make: Make, write: Callable[[str, str], str]
) -> None:
    write("FCVID_Label.txt", "1\t0\t0\n0\t1\t1\n0\t0\t0\n1\t0\t0\n\n")
    labels, classes = (
        write("FCVID_VideoName_TrainTestSplit.txt", FCVID_LIST),
        write("classes.txt", "swimming\nparade\nconcert\n"),
    )
    manifest, summary = index(
        make("all/sport/a.mp4", "all/sport/b.flv", "all/news/c d.mp4"), labels, classes_file=classes
    )
    assert manifest.classes == ["swimming", "parade", "concert"]
    assert labels_of(manifest) == {
        "all/sport/a.mp4": (["swimming"], "train"),
        "all/sport/b.flv": (["parade", "concert"], "test"),
        "all/news/c d.mp4": ([], "test"),
    }
    assert summary.missing == ["news/gone.mp4"]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (
            None,
            r"list\.txt: a list of FCVID's videos needs FCVID_Label\.txt in the same folder: "
            r"cannot read .*no such file",
        ),
        ("1 0\n", r"FCVID_Label\.txt: 1 lines; expected 4, one per video of .*list\.txt"),
        (
            "1 0\n1 0\n2 0\n1 0\n",
            r"FCVID_Label\.txt line 3: 2 values, '2 0'; expected 2 values, each 0 or 1",
        ),
        (
            "1 0\n1 0 0\n1 0\n1 0\n",
            r"FCVID_Label\.txt line 2: 3 values, '1 0 0'; expected 2 values, each 0 or 1",
        ),
    ],
    ids=["none", "too short", "no 0 or 1", "another number of classes"],
)
def test_fcvids_matrix_must_fit(
    make: Make, write: Callable[[str, str], str], matrix: str | None, message: str
) -> None:
    if matrix is not None:
        write("FCVID_Label.txt", matrix)
    with pytest.raises(ManifestError, match=message):
        index(
            make("sport/a.mp4"),
            write("list.txt", FCVID_LIST),
            classes_file=write("classes.txt", "x\ny\n"),
        )


# -------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        ("video-list", "sub/a b.mp4 2 0\nv_c.mp4 1\ngone.mp4 1\n"),
        ("video-list", "sub/a b.mp4 2,0\nv_c.mp4 1\ngone.mp4 1\n"),
        ("video-list", "sub/a b 2,0\nv_c 1\ngone.mp4 1\n"),
        ("frame-list", "sub/a b 300 2 0\n\nv_c 20 1\ngone.mp4 80 1\n"),
        ("frame-list", "sub/a b,300,2,0\nc,20,1\ngone.mp4,80,1\n"),
    ],
    ids=[
        "mmaction2 videos",
        "ids joined by commas",
        "without a suffix",
        "mmaction2 frames",
        "with commas",
    ],
)
def test_lists_with_class_ids(
    make: Make, write: Callable[[str, str], str], layout: str, content: str
) -> None:
    folder, classes = (
        make("sub/a b.mp4", "v_c.mkv", "other.mp4"),
        write("classes.txt", "zebra\nant\nbear\n"),
    )
    manifest, summary = index(folder, write("data_val_list.txt", content), classes_file=classes)
    assert manifest.classes == ["zebra", "ant", "bear"], "the ids' order, not the alphabet's"
    assert labels_of(manifest) == {
        "sub/a b.mp4": (["zebra", "bear"], "val"),
        "v_c.mkv": (["ant"], "val"),
        "other.mp4": ([], None),
    }
    assert (summary.missing, summary.unlabelled, summary.labels_from.rpartition(" ")[2]) == (
        ["gone.mp4"],
        1,
        f"({layout})",
    )


def test_a_list_for_each_split(make: Make, write: Callable[[str, str], str]) -> None:
    lists = [
        write("anet_train_video.txt", "a.mp4 0\nx.mp4 0\n"),
        write("anet_val_video.txt", "b.mp4 1\n"),
    ]
    manifest, summary = index(
        make("a.mp4", "b.mp4"), *lists, classes_file=write("classes.txt", "x\ny\n")
    )
    assert labels_of(manifest) == {"a.mp4": (["x"], "train"), "b.mp4": (["y"], "val")}
    assert (summary.missing, summary.labels_from) == (
        ["x.mp4"],
        f"{lists[0]} (video-list), {lists[1]} (video-list)",
    )


def test_a_list_beside_the_videos_folder(make: Make, tmp_path: Path) -> None:
    folder, lists = make("a/1.mp4", "b/1.mp4"), tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("../videos/b/1.mp4 0\n")
    (lists / "classes.txt").write_text("x\n")
    manifest, _ = index(folder, str(lists / "train.txt"), classes_file=str(lists / "classes.txt"))
    assert labels_of(manifest) == {"a/1.mp4": ([], None), "b/1.mp4": (["x"], "train")}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("list.txt", None),
        ("train_val.txt", None),
        ("kinetics400_train_list.txt", "train"),
        ("testlist.txt", None),
    ],
)
def test_a_lists_split_is_a_word_of_its_name(
    make: Make, write: Callable[[str, str], str], name: str, split: str | None
) -> None:
    manifest, _ = index(
        make("a.mp4"), write(name, "a.mp4 0\n"), classes_file=write("classes", "x\n")
    )
    assert manifest.rows[0].split == split


def test_a_path_of_a_list_is_found_next_to_it_below_a_source_or_by_its_end(
    make: Make, write: Callable[[str, str], str]
) -> None:
    folder = make("a.mp4", "deep/a.mp4", "deep/er/b.mp4", "c.mp4", "c.webm", "v_d.mp4", "d.mp4")
    content = (
        "a.mp4 0\nvideos/deep/a.mp4 1\ner/b.mp4 1\nc.webm 1\nc.mp4 0\nd 1,1\nv_d 0,0\n"
        "other/a.mp4 0\n"
    )
    manifest, summary = index(
        folder, write("list.txt", content), classes_file=write("classes.txt", "x\ny\n")
    )
    assert {path: labels[0] for path, (labels, _) in labels_of(manifest).items()} == {
        **{"a.mp4": "x", "deep/a.mp4": "y", "deep/er/b.mp4": "y"},
        **{"c.mp4": "x", "c.webm": "y", "v_d.mp4": "x", "d.mp4": "y"},
    }
    assert summary.missing == ["other/a.mp4"], "the right name in another folder is another video"


def test_a_list_that_means_several_videos_is_refused(
    make: Make, write: Callable[[str, str], str]
) -> None:
    with pytest.raises(
        ManifestError,
        match=r"list.txt line 1: 1.mp4 matches 2 videos, .*a/1.mp4 and .*b/1.mp4; add its folder",
    ):
        index(
            make("a/1.mp4", "b/1.mp4"),
            write("list.txt", "1.mp4 0\n"),
            classes_file=write("classes.txt", "x\n"),
        )


@pytest.mark.parametrize(
    ("classes", "number", "name"),
    [
        ("x\ny\n", 1, "y"),
        ("0 x\n1 y\n", 1, "y"),
        ("1 x\n2 y\n", 1, "x"),
        ("0,x\n1,y\n", 0, "x"),
        ("1 x\n3 y\n", 0, "1 x"),
    ],
    ids=["names", "from 0", "from 1", "commas", "names that begin with numbers"],
)
def test_a_class_file_may_number_its_lines(
    make: Make, write: Callable[[str, str], str], classes: str, number: int, name: str
) -> None:
    manifest, _ = index(
        make("a.mp4"),
        write("list.txt", f"a.mp4 {number}\n"),
        classes_file=write("classes.txt", classes),
    )
    assert labels_of(manifest)["a.mp4"][0] == [name]


@pytest.mark.parametrize(("classes", "allowed"), [("x\ny\n", "0 to 1"), ("1 x\n2 y\n", "1 to 2")])
def test_a_class_id_out_of_range_is_reported(
    make: Make, write: Callable[[str, str], str], classes: str, allowed: str
) -> None:
    message = (
        rf"list\.txt line 2: class id 3 is out of range; .*classes\.txt has 2 classes, {allowed}$"
    )
    with pytest.raises(ManifestError, match=message):
        index(
            make("a.mp4"),
            write("list.txt", "a.mp4 1\nb.mp4 1 3\n"),
            classes_file=write("classes.txt", classes),
        )


@pytest.mark.parametrize(
    "content", ["a.mp4 1\n", "a 90 1\n", "a.mp4 train\n"], ids=["video-list", "frame-list", "fcvid"]
)
def test_class_ids_need_a_class_file(
    make: Make, write: Callable[[str, str], str], content: str
) -> None:
    write("FCVID_Label.txt", "1 0\n")
    with pytest.raises(
        ManifestError,
        match="its labels are class ids; give their names with --classes FILE, one per line",
    ):
        index(make("a.mp4"), write("list.txt", content))


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "path,label\nb.mp4,cats\n",
            r"none of its 1 videos is among the 1 videos found \(first: \['b.mp4'\]\)",
        ),
        (
            '{"database": {"x": {"subset": "training", "annotations": []}}}',
            r"none of its 1 videos is among the 1 videos found \(first: \['x",
        ),
        (
            "path,label\na.mp4,cats\n\na.mp4,cats,x\n",
            "line 4: got 'a.mp4,cats,x'; expected path,label",
        ),
        ("path,label\na.mp4\n", "line 2: got 'a.mp4'; expected path,label"),
        ("path,label\n,cats\n", "line 2: got ',cats'; expected path,label"),
        (
            'path,label\n"a.mp4,cats\n',
            r"line 2: not CSV \(unexpected end of data\); expected path,label\[,split\]",
        ),
        (
            "path,label\nvideos/a.mp4,cats\nvideos/a.mp4,dogs\n",
            "line 3: videos/a.mp4 has other labels or another split than in .* line 2; keep one",
        ),
        ("{not json", "not ActivityNet JSON: no usable 'database'"),
        ('{"videos": {}}', "not ActivityNet JSON: no usable 'database'"),
        (
            '{"database": {"x": 3}}',
            "not ActivityNet JSON: 'x' is '3'; expected 'subset' and 'annotations', each with "
            "a 'label'",
        ),
        (
            '{"database": {"x": {"annotations": [{}]}}}',
            "not ActivityNet JSON: 'x' is .*; expected 'subset' and 'annotations'",
        ),
        (
            "label,youtube_id\nx,a\n",
            r"columns are \['label', 'youtube_id'\]; expected "
            r"youtube_id,time_start,time_end\[,label\]\[,split\]",
        ),
        (
            "label,youtube_id,time_start,time_end\nx,a,soon,2\n",
            "line 2: got time_start 'soon' and time_end '2'; expected seconds",
        ),
        (
            "label,youtube_id,time_start,time_end\nx,a,1\n",
            "line 2: got 'x,a,1'; expected label,youtube_id,time_start,time_end",
        ),
        ("a.mp4 1\na.mp4\n", r"line 2: got 'a.mp4'; expected path class_id \[class_id ...\]"),
        ("a.mp4 1\na.mp4 x\n", r"line 2: got 'a.mp4 x'; expected path class_id"),
        (
            "a 90 1\n\na 90\n",
            r"line 3: got 'a 90'; expected name num_frames class_id \[class_id ...\]",
        ),
        ("a.mp4 train\n", r"FCVID_Label.txt in the same folder"),
        (
            "file,class\na.mp4,cats\n",
            "unknown label format; it begins with 'file,class'; known: activitynet",
        ),
        (
            "a 3\n",
            "unknown label format; it begins with 'a 3'; known: .*video-list .*frame-list .*; "
            "--labels-format NAME",
        ),
        ("", "unknown label format; it begins with ''"),
        (
            "path;label\na.mp4;cats\n",
            r"/labels: unknown label format; it begins with 'path;label'; known: .* csv "
            r"\(path,label\[,split\]\)",
        ),
        (
            '"path"\t"label"\na.mp4\tcats\n',
            r"/labels: unknown label format; it begins with .*path.*label.*; known: .* csv "
            r"\(path,label\[,split\]\)",
        ),
        (
            "label\tyoutube_id\ttime_start\ttime_end\ncats\ta\t1\t2\n",
            r"/labels: unknown label format; .* kinetics \(CSV with youtube_id,time_start,time_end",
        ),
        ("path,label\na.mp4;cats\n", "/labels line 2: got 'a.mp4;cats'; expected path,label"),
        (
            '{"path": "a.mp4", "label": "cats"}\n{"path": "b.mp4", "label": "dogs"}\n',
            "/labels: not ActivityNet JSON: no usable 'database' .*Extra data: line 2 column 1",
        ),
        ('{"path": "a.mp4", "label": "cats"}\n', "/labels: not ActivityNet JSON: no usable 'dat"),
    ],
)
def test_unusable_labels_are_reported(
    make: Make, write: Callable[[str, str], str], content: str, message: str
) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        index(
            make("a.mp4"), write("labels", content), classes_file=write("classes", "cats\ndogs\n")
        )
    assert "\n" not in str(caught.value)


def test_a_broken_line_of_fcvids_list_is_reported(
    make: Make, write: Callable[[str, str], str]
) -> None:
    write("FCVID_Label.txt", "1\n1\n")
    with pytest.raises(
        ManifestError,
        match=r"list.txt line 2: got 'b.mp4'; expected a path and test or testing or train or ",
    ):
        index(
            make("a.mp4"),
            write("list.txt", "a.mp4 train\nb.mp4\n"),
            classes_file=write("classes.txt", "x\n"),
        )


def test_a_format_can_be_named(make: Make, write: Callable[[str, str], str]) -> None:
    labels, classes = write("list", "a 1\n"), write("classes", "x\ny\n")
    manifest, _ = index(make("a.mp4"), labels, classes_file=classes, labels_format="video-list")
    assert labels_of(manifest) == {"a.mp4": (["y"], None)}
    with pytest.raises(
        ManifestError,
        match="--labels-format lists: no such format; allowed: " + ", ".join(READERS),
    ):
        index(make("a.mp4"), labels, classes_file=classes, labels_format="lists")
    with pytest.raises(
        ManifestError,
        match="--labels-format csv: no label file to read; name one with --labels FILE",
    ):
        index(make("a.mp4"), labels_format="csv")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_has_commas_even_if_its_format_is_named(
    make: Make, write: Callable[[str, str], str], separator: str
) -> None:
    labels = write("labels.csv", f"path{separator}label\na.mp4{separator}cats\n")
    with pytest.raises(ManifestError, match=r"columns are \[.*\]; expected path,label\[,split\]$"):
        index(make("a.mp4"), labels, labels_format="csv")


def test_several_label_files_may_not_contradict_each_other(
    make: Make, write: Callable[[str, str], str]
) -> None:
    one, same, other = (
        write(f"{name}.csv", f"path,label\nvideos/a.mp4,{label}\n")
        for name, label in (("1", "x"), ("2", "x"), ("3", "y"))
    )
    assert labels_of(index(make("a.mp4"), one, same)[0]) == {"a.mp4": (["x"], None)}
    with pytest.raises(
        ManifestError,
        match=(
            r"3\.csv line 2: videos/a\.mp4 has other labels or another split than in .*1\.csv "
            r"line 2"
        ),
    ):
        index(make("a.mp4"), one, other)


# --------------------------------------------------------------------------------------- real files


@pytest.mark.data
def test_mmactions_list_of_activitynet(make: Make, data_dir: Path) -> None:
    """Names listed with the ids.

    v_JDg--pjY5gg has class 7 of mmaction2's order, and one video has two labels.
    """
    place, classes = (
        data_dir / "labels" / "anet_val_video_multi_label.txt",
        data_dir / "labels" / "activitynet_label_map.txt",
    )
    lines = [line.split() for line in place.read_text().splitlines()]
    names = classes.read_text().splitlines()
    several = next(line for line in lines if len(line) == 4)
    manifest, summary = index(
        make("v_JDg--pjY5gg.mp4", f"{several[0][2:]}.webm", "extra.mp4"),
        str(place),
        classes_file=str(classes),
    )
    assert manifest.classes == names
    found = labels_of(manifest)
    assert found["v_JDg--pjY5gg.mp4"] == ([names[7]], "val")
    assert set(found[f"{several[0][2:]}.webm"][0]) == {names[int(number)] for number in several[2:]}
    assert (len(summary.missing), summary.missing[0], summary.unlabelled) == (
        len(lines) - 2,
        lines[1][0],
        1,
    )
    with pytest.raises(ManifestError, match="its labels are class ids"):
        index(make(), str(place))


@pytest.mark.data
def test_the_surrogates_csv(data_dir: Path) -> None:
    manifest, summary = index(data_dir / "surrogate", str(data_dir / "surrogate" / "labels.csv"))
    assert (summary.videos, summary.labelled, summary.classes, summary.missing) == (
        420,
        420,
        20,
        [],
    )
    assert (summary.splits, summary.labels_from.rpartition(" ")[2]) == (
        {"train": 320, "val": 100},
        "(csv)",
    )
    assert manifest.classes == sorted(manifest.classes)
