"""Manifests as folders of shards: of tsq index, and of other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsq_ray import describe, schema, storage
from tsq_ray.cli import main
from tsq_ray.errors import ManifestError, RunError, StorageError
from tsq_ray.manifest import Manifest, VideoRef, find_old, read_manifest, video_id, write_manifest
from tsq_ray.manifest import files as manifest_files

CLASSES = ["cats", "dogs"]


def refs(names: str, **more: Any) -> list[VideoRef]:
    """A row per letter."""
    return [
        VideoRef(video_id(f"/v/{name}.mp4"), f"/v/{name}.mp4", 10, labels=(0,), **more)
        for name in names
    ]


def manifest_of(names: str, classes: list[str] = CLASSES) -> Manifest:
    return Manifest(refs(names), classes, "id of /v", ("/v",))


@pytest.fixture(autouse=True)
def two_rows_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_files, "SHARD_ROWS", 2)
    monkeypatch.setattr(manifest_files, "MAX_FILE_ROWS", 4)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".parquet")


# ---------------------------------------------------------------------------------------- tsq index


@pytest.mark.parametrize(
    ("names", "out", "there", "folder"),
    [
        ("abcd", "m.parquet", None, False),
        ("abcd", "m/", None, True),
        ("abcde", "m.parquet", None, True),
        ("abcde", "m.parquet", "a", False),
        ("a", "m", "abcde", True),
        ("", "m/", None, True),
    ],
    ids=[
        "few rows",
        "a slash",
        "many rows",
        "many rows where a file is",
        "few rows where a folder is",
        "no rows",
    ],
)
def test_a_manifest_is_a_file_or_a_folder(
    tmp_path: Path, names: str, out: str, there: str | None, folder: bool
) -> None:
    place = f"{tmp_path}/{out}"
    for written in ([there] if there else []) + [names]:
        write_manifest(manifest_of(written), place)
    assert Path(place).is_dir() == folder
    read = read_manifest(place)
    assert (read.rows, read.classes, read.id, read.sources) == (
        refs(names),
        CLASSES,
        "id of /v",
        ("/v",),
    )
    assert read.uri == place.rstrip("/")
    assert len(read.sha256) == 64
    write_manifest(manifest_of(names), place)
    assert read_manifest(place).sha256 == read.sha256
    write_manifest(manifest_of(names + "z"), place)
    assert read_manifest(place).sha256 != read.sha256


def test_an_update_leaves_the_shards_of_the_new_version_and_writes_only_these(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "m"
    write_manifest(manifest_of("abcdef"), f"{folder}/")
    before = {name: (folder / name).stat().st_mtime_ns for name in shards(folder)}
    assert [name[:10] for name in before] == ["part-00000", "part-00001", "part-00002"]
    write_manifest(manifest_of("abcx"), str(folder))
    after = shards(folder)
    assert len(after) == 2
    assert after[0] in before
    assert (folder / after[0]).stat().st_mtime_ns == before[after[0]], (
        "the same content was written again"
    )
    assert after[1] not in before
    listed = json.loads((folder / "_manifest.json").read_text())
    assert [shard["name"] for shard in listed["shards"]] == after
    assert (listed["rows"], listed["id"], listed["sources"]) == (4, "id of /v", ["/v"])


def test_index_makes_reads_and_updates_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, out = tmp_path / "videos", f"{tmp_path}/m/"
    for name in "abcde":
        (videos / name).mkdir(parents=True)
        (videos / name / "1.mp4").write_bytes(b"video")
    assert main(["index", str(videos), "--out", out]) == 0
    assert main(["index", str(videos), "--out", out]) == 2
    assert "already exists; add --update" in capsys.readouterr().err
    (videos / "a" / "1.mp4").unlink()
    (videos / "e" / "2.mp4").write_bytes(b"video")
    assert main(["index", str(videos), "--out", out, "--update", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [summary[key] for key in ("videos", "new", "deleted", "unchanged")] == [5, 1, 1, 4]
    assert main(["info", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["videos"], told["videos_by_class"]["e"]) == ("manifest", 5, 2)
    rows = duckdb.sql(f"select uri from '{tmp_path}/m/*.parquet'").fetchall()
    assert sorted(rows) == sorted((row.uri,) for row in read_manifest(out).rows)


@pytest.mark.parametrize("killed_at", ["the first", "an update"])
def test_a_killed_index_leaves_no_half_manifest(
    tmp_path: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    if killed_at == "an update":
        write_manifest(manifest_of("abcd"), f"{folder}/")
    write = storage.write_bytes

    def killed(uri: str, data: bytes) -> None:
        if "part-00001" in uri or uri.endswith("_manifest.json"):
            raise KeyboardInterrupt
        write(uri, data)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            write_manifest(manifest_of("wxyz"), f"{folder}/")
    if killed_at == "an update":
        assert len(shards(folder)) == 3
        assert read_manifest(str(folder)).rows == refs("abcd")
    else:
        assert len(shards(folder)) == 1
        with pytest.raises(
            ManifestError,
            match=(
                r"m: not finished, it has no _manifest\.json yet; run the same tsq index "
                r"command again"
            ),
        ):
            read_manifest(str(folder))
        assert find_old(f"{folder}/", update=False) is None
    write_manifest(manifest_of("wxyz"), f"{folder}/")
    assert read_manifest(str(folder)).rows == refs("wxyz")
    assert len(shards(folder)) == 2


@pytest.mark.parametrize("out", ["m.parquet", "m/"])
def test_of_two_index_runs_at_once_the_last_to_end_wins(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/operations.md says; the second run begins and ends while the first one writes."""
    uri, write = f"{tmp_path}/{out}", manifest_files._write_table

    def write_while_another_runs(*arguments: Any) -> None:
        monkeypatch.setattr(manifest_files, "_write_table", write)
        write(*arguments)
        write_manifest(manifest_of("cd"), uri)
        assert [row.uri for row in read_manifest(uri).rows] == ["/v/c.mp4", "/v/d.mp4"]

    monkeypatch.setattr(manifest_files, "_write_table", write_while_another_runs)
    write_manifest(manifest_of("ab"), uri)
    assert [row.uri for row in read_manifest(uri).rows] == ["/v/a.mp4", "/v/b.mp4"]


def test_a_folder_that_two_index_runs_broke_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, publish = f"{tmp_path}/m/", storage.write_bytes

    def publish_after_another_run(name: str, data: bytes) -> None:
        if name.endswith("_manifest.json"):
            monkeypatch.setattr(storage, "write_bytes", publish)
            write_manifest(manifest_of("cd"), uri)
        publish(name, data)

    monkeypatch.setattr(storage, "write_bytes", publish_after_another_run)
    write_manifest(manifest_of("ab"), uri)
    with pytest.raises(StorageError, match=r"part-00000-.*\.parquet: no such file"):
        read_manifest(uri)


def test_a_reader_that_an_update_overtakes_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "m")
    write_manifest(manifest_of("abcd"), f"{folder}/")
    read, updates = manifest_files._read_shard, iter(["wxyz"])

    def overtaken(uri: str, shown: str) -> Any:
        for names in updates:
            write_manifest(manifest_of(names), folder)
        return read(uri, shown)

    monkeypatch.setattr(manifest_files, "_read_shard", overtaken)
    assert read_manifest(folder).rows == refs("wxyz")


def test_a_listed_shard_that_is_gone_or_changed_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_manifest(manifest_of("abcd"), f"{folder}/")
    first, second = (folder / name for name in shards(folder))
    second.write_bytes(first.read_bytes())
    message = (
        f"{second.name} is not the shard that _manifest.json lists; "
        "rebuild the manifest with tsq index --update"
    )
    with pytest.raises(ManifestError, match=re.escape(message)):
        read_manifest(str(folder))
    second.unlink()
    with pytest.raises(StorageError, match=rf"{re.escape(second.name)}: no such file"):
        read_manifest(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "_manifest.json: not JSON; the file is damaged"),
        (
            '{"format": 2}',
            r"_manifest.json: made by a newer version of tsq_ray "
            r"\(format 2; this version reads 1\)",
        ),
    ],
)
def test_an_unreadable_listing_is_reported(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "_manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=message):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("make", "out", "message"),
    [
        (lambda place: place.mkdir(), "m/", None),
        (
            lambda place: place.write_bytes(b""),
            "m/",
            "m/: is a file; drop the trailing / or name another folder",
        ),
        (
            lambda place: write_manifest(manifest_of("a"), f"{place}/"),
            "m",
            "m: already exists; add --update",
        ),
        (
            lambda place: write_plain(place, {"1.parquet": refs("a")}),
            "m/",
            r"m/: holds other files \(.*1\.parquet\); name a new",
        ),
    ],
    ids=["an empty folder", "a file", "a manifest folder", "a folder of another program"],
)
def test_what_out_may_name(
    tmp_path: Path, make: Callable[[Path], Any], out: str, message: str | None
) -> None:
    make(tmp_path / "m")
    if message is None:
        assert find_old(f"{tmp_path}/{out}", update=False) is None
        return
    with pytest.raises(ManifestError, match=message):
        find_old(f"{tmp_path}/{out}", update=False)


# ----------------------------------------------------------------------------------- other programs


def write_plain(
    folder: Path, files: dict[str, list[VideoRef]], classes: list[str] | None = None
) -> str:
    """A folder of Parquet files with nothing from tsq except the class names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        table = Manifest(rows, []).rows.table
        metadata = {} if classes is None else {schema.CLASSES_KEY: json.dumps(classes).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), folder / name)
    return str(folder)


def test_a_folder_of_another_program_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    files = {
        "b.parquet": refs("cd"),
        "a.parquet": refs("ab"),
        "_SUCCESS": [],
        ".a.parquet.crc": [],
        "_metadata.parquet": refs("x"),
    }
    folder = write_plain(tmp_path / "m", files, CLASSES)
    manifest = read_manifest(f"{folder}/")
    assert (manifest.rows, manifest.classes, manifest.sources) == (refs("abcd"), CLASSES, (folder,))
    write_plain(tmp_path / "m", {"c.parquet": refs("e")}, CLASSES)
    more = read_manifest(folder)
    assert more.id == manifest.id
    assert more.sha256 != manifest.sha256


def test_a_folder_written_by_duckdb(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for part in (1, 2):
        duckdb.sql(
            f"""copy (select substr(sha256('/v/{part}.mp4'), 1, 16) as video_id,
            '/v/{part}.mp4' as uri,
            10 as size_bytes,
            timestamp '2026-01-02 03:04:05' as modified, [1] as labels, 'train' as split)
            to '{tmp_path}/m/{part}.parquet'
            (format parquet, kv_metadata {{'tsq.classes': '["cats", "dogs"]'}})"""
        )
    rows = list(read_manifest(str(tmp_path / "m")).rows)
    assert [(row.video_id, row.labels, row.split, row.etag) for row in rows] == [
        (video_id(f"/v/{part}.mp4"), (1,), "train", None) for part in (1, 2)
    ]
    assert rows[0].modified is not None
    assert rows[0].modified.isoformat() == "2026-01-02T03:04:05+00:00"


def with_column(folder: Path, name: str, values: pa.Array | None) -> None:
    """Replace or remove a column of a.parquet."""
    table = pq.read_table(folder / "a.parquet")
    place = (
        table.column_names.index(name) if name in table.column_names else len(table.column_names)
    )
    if place < len(table.column_names):
        table = table.remove_column(place)
    pq.write_table(
        table if values is None else table.add_column(place, name, values), folder / "a.parquet"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: with_column(folder, "uri", None),
            r"a\.parquet: lacks the columns \['uri'\]",
        ),
        (
            lambda folder: with_column(folder, "size_bytes", pa.array(["big"])),
            r"size_bytes is string, which cannot be cast to int64",
        ),
        (
            lambda folder: with_column(folder, "size_bytes", pa.array([None], pa.int64())),
            "size_bytes is null in 1 rows",
        ),
        (
            lambda folder: with_column(folder, "video_id", pa.array(["1"])),
            "a.parquet: video_id '1'; expected 16 hex digits",
        ),
        (
            lambda folder: with_column(folder, "status", pa.array(["ok"])),
            "a.parquet: holds features or predictions; name the manifest",
        ),
        (
            lambda folder: with_column(folder, "labels", pa.array([[2]])),
            "a.parquet: labels from 2 to 2, but 2 class names; write the",
        ),
        (lambda folder: (folder / "a.parquet").write_text("x"), "a.parquet: not a Parquet file"),
        (
            lambda folder: write_plain(folder, {"b.parquet": refs("b")}, ["dogs", "cats"]),
            r"b\.parquet and a\.parquet have different class names \(2 and 2\); write the same "
            r"ones",
        ),
        (
            lambda folder: write_plain(folder, {"b.parquet": refs("bca")}, CLASSES),
            r"/v/a\.mp4 in a\.parquet and /v/a\.mp4 in b\.parquet have the same video_id "
            rf"{video_id('/v/a.mp4')}; remove one",
        ),
    ],
    ids=[
        "no uri",
        "text for a number",
        "null",
        "strange id",
        "features",
        "labels without a name",
        "text",
        "class names",
        "twice",
    ],
)
def test_a_folder_that_is_no_manifest_is_reported(
    tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    write_plain(tmp_path, {"a.parquet": refs("a")}, CLASSES)
    change(tmp_path)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=f"not a bundle, manifest or run folder .*{message}"):
        describe.describe(str(tmp_path))
