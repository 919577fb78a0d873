"""Writes that depend on what is there: of several callers one succeeds."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import get_args

import pytest
from botocore.exceptions import ClientError
from support.race import Kind, check_one_writer_wins

from tsq_ray import storage
from tsq_ray.errors import StorageError
from tsq_ray.storage.advice import is_refused_condition

WRITERS = 16


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A path where no file exists."""
    return str(tmp_path / "new" / "file") if request.param == "local" else f"memory://{tmp_path}/f"


def test_a_file_is_created_once(uri: str) -> None:
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_a_file_is_replaced_if_it_is_the_expected_one(uri: str) -> None:
    assert not storage.replace_bytes(uri, b"", b"new")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"old")
    assert not storage.replace_bytes(uri, b"another", b"new")
    assert storage.read_bytes(uri) == b"old"
    assert storage.replace_bytes(uri, b"old", b"new")
    assert storage.read_bytes(uri) == b"new"


@pytest.mark.parametrize("kind", get_args(Kind))
def test_of_many_local_writers_one_succeeds(tmp_path: Path, kind: Kind) -> None:
    for attempt in range(20):
        check_one_writer_wins(kind, str(tmp_path / str(attempt)), WRITERS)
    assert len(list(tmp_path.iterdir())) == 20, "a temporary file is left"


def test_a_file_system_without_hard_links_works(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*paths: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    assert storage.create_bytes(str(path), b"first")
    assert not storage.create_bytes(str(path), b"second")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"first", [path])


def test_other_failures_are_not_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"the file system reports an error.*File exists"):
        storage.create_bytes(str(tmp_path / "file" / "below"), b"")


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("PreconditionFailed", True),
        ("412", True),
        ("ConditionalRequestConflict", True),
        ("AccessDenied", False),
        ("InternalError", False),
    ],
)
def test_how_a_store_refuses_a_condition(code: str, refused: bool) -> None:
    error = OSError(errno.EINVAL, "as s3fs raises it")
    error.__cause__ = ClientError({"Error": {"Code": code}}, "PutObject")
    assert is_refused_condition(error) == refused
