"""Storage on local disks: names, atomic writes, listings, error classes, hidden secrets."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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
        ("//data/a::b.mp4", "/data/a::b.mp4"),
        ("s3://bucket/Why? Because//x#1%20.mp4", "s3://bucket/Why? Because//x#1%20.mp4"),
        ("https://host/v.mp4?sig=1", "https://host/v.mp4?sig=1"),
        ("", ""),
    ],
)
def test_a_place_has_one_spelling(given: str, expected: str) -> None:
    assert storage.normalize(given) == expected
    assert storage.normalize(expected) == expected


def test_relative_paths_become_absolute_and_links_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    assert storage.normalize("a.mp4") == str(tmp_path / "a.mp4")
    assert storage.normalize(Path("link") / "a.mp4") == str(tmp_path / "link" / "a.mp4")
    assert storage.normalize("link/../a.mp4") == str(tmp_path / "a.mp4")
    assert storage.normalize("std::vec.mp4") == str(tmp_path / "std::vec.mp4")
    assert storage.real_path("link/a.mp4") == str(tmp_path / "real" / "a.mp4")
    assert storage.real_path("s3a://bucket/a/") == "s3://bucket/a"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.normalize("~/a.mp4") == str(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("uri", "name", "parent"),
    [
        ("/data/a/b.mp4", "b.mp4", "/data/a"),
        ("/data/a/", "a", "/data"),
        ("s3://bucket/a/b.mp4", "b.mp4", "s3://bucket/a"),
        ("/data/what?.mp4", "what?.mp4", "/data"),
        (
            "s3://bucket/Why? Because/q?versionId=a.mp4",
            "q?versionId=a.mp4",
            "s3://bucket/Why? Because",
        ),
    ],
)
def test_parts_of_a_name(uri: str, name: str, parent: str) -> None:
    assert storage.name_of(uri) == name
    assert storage.parent_of(uri) == parent
    assert storage.join(parent, name) == uri.rstrip("/")


def test_the_query_is_no_part_of_the_name_in_a_url() -> None:
    assert storage.name_of("https://host/a/b.mp4?X-Amz-Signature=0123") == "b.mp4"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "cannot open https://host/v.mp4?X-Amz-Signature=s3cret: no",
            "cannot open https://host/v.mp4?... no",
        ),
        ("'http://h/a?b=s3cret' and https://h/c?d=s3cret", "'http://h/a?...' and https://h/c?..."),
        ("s3://bucket/a", "s3://bucket/a"),
        ("no s3://b/a b.mp4?X-Amz-Signature=s3cret: x", "no s3://b/a b.mp4?... x"),
        ("'gs://b/a?sig=s3cret'", "'gs://b/a?...'"),
        ("s3://bucket/watch?v=1.mp4", "s3://bucket/watch?v=1.mp4"),
        ("what? nothing", "what? nothing"),
    ],
)
def test_queries_are_never_shown(text: str, shown: str) -> None:
    assert storage.redact(text) == shown
    assert "s3cret" not in storage.redact(text)


class RemoteFailure(Exception):
    """Like botocore's: the code is in `response`."""

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
        (type("ParamValidationError", (Exception,), {})("Invalid bucket name"), "not_found"),
        (OSError(errno.ENOTDIR, "x"), "not_found"),
        (OSError(errno.ELOOP, "x"), "not_found"),
        (OSError(errno.ENAMETOOLONG, "x"), "not_found"),
        (IsADirectoryError(errno.EISDIR, "x"), "not_video"),
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
    error = PermissionError("the provided token has expired")  # what s3fs turns it into
    error.__cause__ = RemoteFailure("ExpiredToken")
    assert storage.classify(error) == "unavailable"
    with (
        pytest.raises(
            StorageError, match="cannot read s3://b/k: the keys have expired; renew them"
        ),
        storage.storage_errors("s3://b/k", "read"),
    ):
        raise error


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (FileNotFoundError("x"), "not_found", r"cannot read https://h/v\?\.\.\.: no such file"),
        (
            PermissionError("x"),
            "access_denied",
            r"access denied; check the URL \(a presigned one expires\)",
        ),
        (
            ConnectionError("to https://h/?k=s3cret"),
            "unavailable",
            "storage did not respond as expected",
        ),
        (OSError(errno.ENOSPC, "no space"), "unavailable", "the disk is full"),
    ],
)
def test_failures_become_storage_errors_of_one_line(
    raised: Exception, kind: str, message: str
) -> None:
    with (
        pytest.raises(StorageError, match=message) as caught,
        storage.storage_errors("https://h/v?k=s3cret", "read"),
    ):
        raise raised
    assert caught.value.error_type == kind
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defects_are_not_taken_for_storage_failures() -> None:
    with pytest.raises(ZeroDivisionError, match="division"), storage.storage_errors("x"):
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    "uri", ["gopher://x", "ftp://127.0.0.1/v.mp4", "zip://a.mp4", "simplecache://s3://b/k"]
)
@pytest.mark.parametrize("call", [storage.stat, storage.read_bytes, storage.is_folder])
def test_an_unknown_kind_of_storage_is_reported(uri: str, call: Callable[[str], object]) -> None:
    message = f"{uri}: this kind of storage cannot be opened .* use a local path or an s3:// URI"
    with pytest.raises(StorageError, match=message) as caught:
        call(uri)
    assert caught.value.error_type == "unsupported"


def test_a_write_makes_its_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "file.bin"
    storage.write_bytes(str(place), b"one")
    storage.write_bytes(str(place), b"two")
    assert place.read_bytes() == b"two"
    assert os.listdir(place.parent) == ["file.bin"]


def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_file_in_place_of_a_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")
    with pytest.raises(StorageError, match="a part of its path is a file, not a folder") as caught:
        storage.stat(str(tmp_path / "file" / "below"))
    assert caught.value.error_type == "not_found"


def test_stat_gives_size_and_time_in_utc(tmp_path: Path) -> None:
    place = tmp_path / "v.mp4"
    place.write_bytes(b"12345")
    os.utime(place, (1_700_000_000, 1_700_000_000))
    file = storage.stat(str(place))
    assert file == storage.StoredFile(
        str(place), 5, None, datetime.fromtimestamp(1_700_000_000, tz=timezone.utc)
    )


@pytest.mark.parametrize("call", [storage.stat, storage.read_bytes, storage.open_read])
def test_a_missing_file_is_not_found(call: object, tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match="no such file, folder or bucket; check the name"
    ) as caught:
        call(str(tmp_path / "nowhere"))  # type: ignore[operator]
    assert caught.value.error_type == "not_found"


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert [storage.exists(str(tmp_path / name)) for name in (".", "file", "none")] == [
        True,
        True,
        False,
    ]
    assert [storage.is_folder(str(tmp_path / name)) for name in (".", "file", "none")] == [
        True,
        False,
        False,
    ]


def test_walk_reports_a_folder_that_it_may_not_read() -> None:
    code = """
import os, sys
from tsq_ray import storage
from tsq_ray.errors import StorageError
folder = sys.argv[1]
assert len(list(storage.walk(folder))) == 2
os.chmod(f"{folder}/b/closed", 0)
if os.getuid() == 0:
    os.setuid(65534)
try:
    list(storage.walk(folder))
except StorageError as error:
    print(error.error_type, error)
"""
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # pytest's own folders are closed to other users altogether
        os.chmod(folder, 0o755)
        for name in ("a/1.mp4", "b/closed/2.mp4"):
            (Path(folder) / name).parent.mkdir(parents=True)
            (Path(folder) / name).write_bytes(b"x")
        done = subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
        )
        (Path(folder) / "b/closed").chmod(0o755)
    assert done.stdout.startswith(f"access_denied cannot list {folder}/b/closed: access denied"), (
        done.stdout,
        done.stderr,
    )


def test_list_folder_shows_hidden_files_but_no_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("b", ".a", "_c"):
        (tmp_path / name).write_bytes(b"")
    assert [storage.name_of(file.uri) for file in storage.list_folder(str(tmp_path))] == [
        ".a",
        "_c",
        "b",
    ]
    assert storage.list_folder(str(tmp_path / "none")) == []


def test_remove_and_remove_folder_ignore_what_is_gone(tmp_path: Path) -> None:
    place = tmp_path / "folder" / "file"
    storage.write_bytes(str(place), b"")
    for _ in range(2):
        storage.remove(str(place))
        assert not place.exists()
    for _ in range(2):
        storage.remove_folder(str(place.parent))
        assert not place.parent.exists()


@pytest.mark.parametrize(
    ("content", "text"), [("\ufeffpath\n".encode(), "path\n"), ("é".encode(), "é")]
)
def test_text_is_utf8_with_or_without_a_mark(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "t").write_bytes(content)
    assert storage.read_text(str(tmp_path / "t")) == text


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", "t: not UTF-8 text; save it as UTF-8"),
        ("utf-16", "t: UTF-16, not UTF-8 text; save it as UTF-8"),
    ],
)
def test_other_text_is_refused(tmp_path: Path, encoding: str, message: str) -> None:
    (tmp_path / "t").write_bytes("é".encode(encoding))
    with pytest.raises(UserError, match=message):
        storage.read_text(str(tmp_path / "t"))


def test_a_local_download_is_the_file_itself(tmp_path: Path) -> None:
    assert storage.download(str(tmp_path / "v"), tmp_path) == str(tmp_path / "v")


# ---------------------------------------------------------------------------------------- odd names


def test_a_name_is_never_read_as_a_chain_or_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "run::1",
        "run::2",
        "a::b.parquet",
        "file:x",
        "50%20? [x]*",
        "-v",
        "~no such user",
    ):
        storage.write_bytes(name, name.encode())
        assert (tmp_path / name).read_bytes() == name.encode() == storage.read_bytes(name)
        with storage.open_read(name) as file:
            assert file.read() == name.encode()
        assert storage.stat(name).uri == str(tmp_path / name)
        assert storage.is_file(name)
    assert len(os.listdir(tmp_path)) == 7
    for folder in ("work*", "work1", "work[1]", "work?"):
        storage.write_bytes(f"{folder}/x", b"")
    storage.remove_folder("work*")
    assert not (tmp_path / "work*").exists()
    storage.remove_folder("work?")
    storage.remove_folder("work[1]")
    assert (tmp_path / "work1" / "x").exists()


def test_the_file_system_of_a_path_is_the_local_one(tmp_path: Path) -> None:
    fs, path = storage.filesystem(f"file://{tmp_path}/a::b")
    assert (fs.protocol, path) == (("file", "local"), f"{tmp_path}/a::b")


def test_a_name_may_have_255_bytes(tmp_path: Path) -> None:
    place = tmp_path / ("ü" * 125 + ".mp4")
    storage.write_bytes(str(place), b"x")
    assert storage.stat(str(place)).size_bytes == 1


def test_a_link_to_a_folder_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "real" / "x"), b"")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage.remove_folder(str(tmp_path / "link"))
    assert os.listdir(tmp_path) == ["real"]
    assert (tmp_path / "real" / "x").exists()


READERS = [storage.stat, storage.read_bytes, storage.open_read]


@pytest.mark.parametrize("call", READERS)
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("", "not_found", "'': not a path: it is empty or contains NUL"),
        ("a\0b", "not_found", r"'a\\x00b': not a path: it is empty or contains NUL"),
        ("a" * 300, "not_found", "the name is too long"),
        ("loop", "not_found", "its links form a loop"),
        ("s3://", "not_found", "s3://: no bucket name; expected s3://BUCKET/KEY"),
        ("s3:///key", "not_found", "s3:///key: no bucket name"),
        ("s3://b/a\0b", "not_found", "a URI must be UTF-8 without NUL"),
        ("s3://b/\udce9", "(not_found|unsupported)", "UTF-8"),
    ],
    ids=[
        "empty",
        "NUL",
        "long",
        "loop",
        "no bucket",
        "no bucket but a key",
        "NUL in a key",
        "bytes in a key",
    ],
)
def test_a_name_that_no_file_can_have(
    call: Callable[[str], object],
    name: str,
    kind: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match=message) as caught:
        call(name)
    assert re.fullmatch(kind, caught.value.error_type)
    assert "AWS" not in str(caught.value)


def test_the_current_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker's may be on a cluster: only relative paths need it."""
    (tmp_path / "v.mp4").write_bytes(b"video")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert storage.read_bytes(str(tmp_path / "v.mp4")) == b"video"
    storage.write_bytes(str(tmp_path / "w.mp4"), b"other")
    with pytest.raises(StorageError, match=r"^v.mp4: is relative to the current folder, which has"):
        storage.normalize("v.mp4")


@pytest.mark.parametrize("call", READERS)
@pytest.mark.parametrize("kind", ["FIFO", "socket", "character device"])
def test_what_is_no_file_is_never_opened(
    call: Callable[[str], object], kind: str, tmp_path: Path
) -> None:
    place = str(tmp_path / "v.mp4")
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "FIFO":
            os.mkfifo(place)
        elif kind == "socket":
            listening.bind(place)
        else:
            place = os.devnull
        with pytest.raises(
            StorageError, match=f"cannot .* {place}: a {kind}, not a regular file; name a file$"
        ) as caught:
            call(place)
    assert caught.value.error_type == "not_video"
    assert storage.is_file(place)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=f"cannot read {tmp_path}: a folder; name a file"
    ) as caught:
        storage.read_bytes(str(tmp_path))
    assert caught.value.error_type == "not_video"


def test_a_name_that_is_not_utf8_is_reported_in_printable_text(tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp4")
    storage.write_bytes(name, b"x")
    with pytest.raises(
        StorageError, match=r"caf\\udce9\.mp4: its name is not UTF-8; rename it"
    ) as caught:
        storage.stat(name)
    assert caught.value.error_type == "unsupported"
    str(caught.value).encode()


@pytest.mark.parametrize("seconds", [569034205384, -99999999999], ids=["year 20001", "year -1199"])
def test_an_impossible_time_is_no_time(seconds: int) -> None:
    with odd_time(seconds) as place:
        assert storage.stat(place) == storage.StoredFile(place, 1, None, None)
        assert [file.uri for file in storage.walk(os.path.dirname(place))] == [place]
        assert storage.list_folder(os.path.dirname(place))[0].modified is None


@contextlib.contextmanager
def odd_time(seconds: int) -> Iterator[str]:
    """A file with that time, on a file system that takes it."""
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as folder:
        place = os.path.join(folder, "v.mp4")
        Path(place).write_bytes(b"x")
        os.utime(place, (seconds, seconds))
        if os.stat(place).st_mtime != seconds:
            pytest.skip("this file system clips the time")
        yield place


# ------------------------------------------------------------------------------------------- advice


def test_advice_on_a_local_path_speaks_of_the_path() -> None:
    for raised, message in (
        (
            PermissionError(errno.EACCES, "x"),
            "access denied; check the permissions of the path and of its parent folders$",
        ),
        (PermissionError(errno.EPERM, "x"), "access denied; check the permissions of the path"),
        (
            OSError(errno.EIO, "Input/output error"),
            r"the file system reports an error; check the disk .*Input/output error",
        ),
    ):
        with (
            pytest.raises(StorageError, match=f"cannot list /data: {message}") as caught,
            storage.storage_errors("/data", "list"),
        ):
            raise raised
        assert "AWS" not in str(caught.value)


def test_a_dead_address_is_no_missing_file() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    for call in (storage.stat, storage.read_bytes, storage.exists):
        with pytest.raises(
            StorageError, match=r"no connection \(refused\): check the host and the network"
        ) as caught:
            call(f"http://127.0.0.1:{port}/x.mp4?sig=s3cret")
        assert caught.value.error_type == "unavailable"
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://h/it's a.mp4?sig=SECRET",
        "HTTPS://h/a?sig=SECRET",
        "https://user:SECRET@h/a",
        "https://h/a?b=it's&sig=SECRET",
    ],
)
def test_no_spelling_of_a_url_shows_its_secret(url: str) -> None:
    assert "SECRET" not in storage.redact(f"cannot open {url}: refused")
