"""A race of many writers for one file, which conditional writes let exactly one win."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from tsq_ray import storage

Kind = Literal["create", "replace"]


def check_one_writer_wins(kind: Kind, uri: str, writers: int) -> None:
    """Check that one of `writers` threads that create or replace the file succeeds.

    The file then holds what that thread wrote.
    """
    if kind == "replace":
        storage.write_bytes(uri, b"old")

    def write(number: int) -> bool:
        mine = b"%d" % number
        return (
            storage.create_bytes(uri, mine)
            if kind == "create"
            else storage.replace_bytes(uri, b"old", mine)
        )

    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(write, range(writers)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)
