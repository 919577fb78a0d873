"""Storage on local disks: names, atomic writes, listings, what an exception means, what is never shown."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import pytest

from tsq_ray import storage
from tsq_ray.errors import StorageError, UserError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://bucket/a", "s3://bucket/a"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("file:///data/a/../b.mp4", "/data/b.mp4"),
        ("/data//a/./b.mp4", "/data/a/b.mp4"),
        ("https://host/v.mp4?sig=1", "https://host/v.mp4?sig=1"),
        ("", ""),
    ],
)
def test_a_place_has_one_spelling(given: str, expected: str) -> None:
    assert storage.normalize(given) == expected
    assert storage.normalize(expected) == expected


def test_relative_paths_become_absolute_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    assert storage.normalize("a.mp4") == str(tmp_path / "a.mp4")
    assert storage.normalize(Path("link") / "a.mp4") == str(tmp_path / "real" / "a.mp4")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.normalize("~/a.mp4") == str(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("uri", "name", "parent"),
    [
        ("/data/a/b.mp4", "b.mp4", "/data/a"),
        ("/data/a/", "a", "/data"),
        ("s3://bucket/a/b.mp4", "b.mp4", "s3://bucket/a"),
        ("/data/what?.mp4", "what?.mp4", "/data"),
    ],
)
def test_parts_of_a_name(uri: str, name: str, parent: str) -> None:
    assert storage.name_of(uri) == name
    assert storage.parent_of(uri) == parent
    assert storage.join(parent, name) == uri.rstrip("/")


def test_the_query_is_no_part_of_a_remote_name() -> None:
    assert storage.name_of("https://host/a/b.mp4?X-Amz-Signature=0123") == "b.mp4"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open https://host/v.mp4?X-Amz-Signature=s3cret: no", "cannot open https://host/v.mp4?... no"),
        ("'http://h/a?b=s3cret' and https://h/c?d=s3cret", "'http://h/a?...' and https://h/c?..."),
        ("s3://bucket/a", "s3://bucket/a"),
        ("what? nothing", "what? nothing"),
    ],
)
def test_queries_are_never_shown(text: str, shown: str) -> None:
    assert storage.redact(text) == shown
    assert "s3cret" not in storage.redact(text)


class RemoteFailure(Exception):
    """As botocore's: the code is in `response`."""

    def __init__(self, code: str = "", status: int | None = None) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}
        self.status = status


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("x"), "not_found"),
        (PermissionError("x"), "access_denied"),
        (RemoteFailure("NoSuchBucket"), "not_found"),
        (RemoteFailure("404"), "not_found"),
        (RemoteFailure("SignatureDoesNotMatch"), "access_denied"),
        (RemoteFailure("403"), "access_denied"),
        (RemoteFailure(status=404), "not_found"),
        (RemoteFailure(status=401), "access_denied"),
        (RemoteFailure("SlowDown"), "unavailable"),
        (ConnectionResetError("x"), "unavailable"),
        (TimeoutError("x"), "unavailable"),
        (OSError(errno.EIO, "x"), "unavailable"),
    ],
)
def test_what_an_exception_means(error: Exception, kind: str) -> None:
    assert storage.classify(error) == kind


def test_the_cause_of_an_exception_counts() -> None:
    error = OSError("wrapped")
    error.__cause__ = RemoteFailure("AccessDenied")
    assert storage.classify(error) == "access_denied"


def test_keys_that_expired_are_renewed_sooner_or_later() -> None:
    error = PermissionError("the provided token has expired")  # what s3fs makes of it
    error.__cause__ = RemoteFailure("ExpiredToken")
    assert storage.classify(error) == "unavailable"


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (FileNotFoundError("x"), "not_found", r"cannot read https://h/v\?\.\.\.: no such file"),
        (PermissionError("x"), "access_denied", "access denied; check the keys"),
        (ConnectionError("to https://h/?k=s3cret"), "unavailable", "storage does not answer as it should"),
        (OSError(errno.ENOSPC, "no space"), "unavailable", "the disk is full"),
    ],
)
def test_failures_become_storage_errors_of_one_line(raised: Exception, kind: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught, storage.storage_errors("https://h/v?k=s3cret", "read"):
        raise raised
    assert caught.value.error_type == kind
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defects_are_not_taken_for_storage_failures() -> None:
    with pytest.raises(ZeroDivisionError, match="division"), storage.storage_errors("x"):
        1 / 0  # noqa: B018


def test_an_unknown_kind_of_storage_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"gopher://x: storage of this kind cannot be opened .* use a local path or an s3:// URI"):
        storage.read_bytes("gopher://x")


def test_a_write_makes_its_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "file.bin"
    storage.write_bytes(str(place), b"one")
    storage.write_bytes(str(place), b"two")
    assert place.read_bytes() == b"two"
    assert os.listdir(place.parent) == ["file.bin"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "file.bin"
    storage.write_bytes(str(place), b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        storage.write_bytes(str(place), b"new and longer")
    assert place.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_readers_never_see_a_part_of_a_file(tmp_path: Path) -> None:
    place = tmp_path / "file.bin"
    storage.write_bytes(str(place), b"old")
    with open(place, "rb") as reader:
        storage.write_bytes(str(place), b"new")
        assert reader.read() == b"old"
    assert storage.read_bytes(str(place)) == b"new"


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")


def test_stat_tells_size_and_time_in_utc(tmp_path: Path) -> None:
    place = tmp_path / "v.mp4"
    place.write_bytes(b"12345")
    os.utime(place, (1_700_000_000, 1_700_000_000))
    file = storage.stat(str(place))
    assert file == storage.StoredFile(str(place), 5, None, datetime.fromtimestamp(1_700_000_000, tz=timezone.utc))


@pytest.mark.parametrize("call", [storage.stat, storage.read_bytes, storage.open_read])
def test_a_missing_file_is_not_found(call: object, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file, folder or bucket; check the name") as caught:
        call(str(tmp_path / "nowhere"))  # type: ignore[operator]
    assert caught.value.error_type == "not_found"


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert [storage.exists(str(tmp_path / name)) for name in (".", "file", "none")] == [True, True, False]
    assert [storage.is_folder(str(tmp_path / name)) for name in (".", "file", "none")] == [True, False, False]


def test_walk_tells_of_a_folder_that_it_may_not_read() -> None:
    code = """
import os, sys
from tsq_ray import storage
folder = sys.argv[1]
assert len(list(storage.walk(folder))) == 2
os.chmod(f"{folder}/b/closed", 0)
if os.getuid() == 0:
    os.setuid(65534)
try:
    list(storage.walk(folder))
except storage.StorageError as error:
    print(error.error_type, error)
"""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users as a whole
        os.chmod(folder, 0o755)
        for name in ("a/1.mp4", "b/closed/2.mp4"):
            (Path(folder) / name).parent.mkdir(parents=True)
            (Path(folder) / name).write_bytes(b"x")
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
        (Path(folder) / "b/closed").chmod(0o755)
    assert done.stdout.startswith(f"access_denied cannot list {folder}/b/closed: access denied"), (done.stdout, done.stderr)


def test_walk_is_sorted_and_passes_over_hidden_names(tmp_path: Path) -> None:
    for name in ("b/2.mp4", "b/1.mp4", "a.mp4", ".hidden/x.mp4", "_work/x.mp4", ".x.mp4", "_x.mp4", "b/c/3.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [file.uri.removeprefix(f"{tmp_path}/") for file in storage.walk(str(tmp_path))]
    assert found == ["a.mp4", "b/1.mp4", "b/2.mp4", "b/c/3.mp4"]


def test_list_folder_shows_hidden_files_but_no_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("b", ".a", "_c"):
        (tmp_path / name).write_bytes(b"")
    assert [storage.name_of(file.uri) for file in storage.list_folder(str(tmp_path))] == [".a", "_c", "b"]
    assert storage.list_folder(str(tmp_path / "none")) == []


def test_remove_and_remove_folder_do_not_mind_what_is_gone(tmp_path: Path) -> None:
    place = tmp_path / "folder" / "file"
    storage.write_bytes(str(place), b"")
    for _ in range(2):
        storage.remove(str(place))
        assert not place.exists()
    for _ in range(2):
        storage.remove_folder(str(place.parent))
        assert not place.parent.exists()


@pytest.mark.parametrize(("content", "text"), [("\ufeffpath\n".encode(), "path\n"), ("é".encode(), "é")])
def test_text_is_utf8_with_or_without_a_mark(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "t").write_bytes(content)
    assert storage.read_text(str(tmp_path / "t")) == text


def test_other_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        storage.read_text(str(tmp_path / "t"))


def test_a_local_download_is_the_file_itself(tmp_path: Path) -> None:
    assert storage.download(str(tmp_path / "v"), tmp_path) == str(tmp_path / "v")
