"""Some columns of many parts on a store that is not local: what is read, and damaged parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsq_ray import schema, storage
from tsq_ray.errors import RunError
from tsq_ray.manifest import Manifest, VideoRef, VideoRows
from tsq_ray.manifest.videos import MAPPED_ROWS
from tsq_ray.runs.columns import read_columns
from tsq_ray.runs.done import OTHER_VERSION, list_parts, read_done

COLUMNS = ["video_id", "labels", "status"]


def part(*numbers: int, classes: int = 2, size_bytes: int = 10) -> pa.Table:
    arrow = schema.features_schema(2, 4, [f"class number {number}" for number in range(classes)])
    refs = [
        VideoRef(f"{number:016x}", f"/v/{number}.mp4", size_bytes, labels=(0,))
        for number in numbers
    ]
    return schema.table_from_rows(
        [vars(ref) | {"status": "ok", "warnings": []} for ref in refs], arrow
    )


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "parts") if request.param == "local" else f"memory://{tmp_path}/parts"


def put(uri: str, table: pa.Table, **options: int) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def test_parts_of_every_shape(folder: str) -> None:
    tables = {
        "part-1.parquet": part(1, 2, 3),
        "part-2.parquet": part(),
        "part-3.parquet": part(*range(500)),
        "part-4.parquet": part(7, classes=2000),  # a footer longer than what is fetched at first
    }
    for name, table in tables.items():
        put(f"{folder}/{name}", table, **({"row_group_size": 50} if len(table) == 500 else {}))
    found = read_columns(list_parts(folder), COLUMNS)
    for table, wanted in zip(found, tables.values(), strict=True):
        assert table.select(COLUMNS).equals(wanted.select(COLUMNS))


DAMAGED = {
    "empty": b"",
    "text": b"<html>404</html>",
    "magic alone": b"PAR1",
    "a footer longer than the file": b"PAR1" + (10**6).to_bytes(4, "little") + b"PAR1",
    "a broken footer": b"PAR1" + bytes(range(200)) + (150).to_bytes(4, "little") + b"PAR1",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_part_is_named(folder: str, kind: str) -> None:
    put(f"{folder}/part-1.parquet", part(1))
    storage.write_bytes(f"{folder}/part-2.parquet", DAMAGED[kind])
    with pytest.raises(
        RunError, match=r"part-2\.parquet: not readable as Parquet .*; delete it and run again"
    ):
        read_columns(list_parts(folder), COLUMNS)


def test_a_part_whose_pages_are_broken_is_named(folder: str) -> None:
    put(f"{folder}/part-1.parquet", part(*range(100)))
    data = storage.read_bytes(f"{folder}/part-1.parquet")
    storage.write_bytes(f"{folder}/part-1.parquet", data[:4] + b"\xff" * 200 + data[204:])
    with pytest.raises(RunError, match=r"part-1\.parquet: not readable as Parquet"):
        read_columns(list_parts(folder), COLUMNS)


def test_a_rewritten_part_is_read_again(folder: str) -> None:
    """Same videos, hence the same name; same size; and a store in memory reports no time."""
    manifest = Manifest(
        VideoRows.of([VideoRef("0" * 15 + "1", "/v/1.mp4", 11, labels=(0,))]),
        ["class number 0", "class number 1"],
    )
    put(f"{folder}/part-1.parquet", part(1, size_bytes=10))
    before = read_done(folder, manifest)
    assert before.has(OTHER_VERSION).tolist() == [True]
    put(f"{folder}/part-1.parquet", part(1, size_bytes=11))
    assert read_done(folder, manifest, before).row.tolist() == [0]


def test_many_chosen_rows_are_kept_on_disk() -> None:
    count = MAPPED_ROWS + 2
    ids = [f"{number:016x}" for number in range(count)]
    table = pa.table(
        {"video_id": ids, "uri": ids, "size_bytes": [1] * count}
        | {name: pa.nulls(count) for name in ("etag", "modified", "labels", "split")}
    )
    rows = VideoRows(
        pa.concat_tables([table.slice(0, 7), table.slice(7)]).cast(schema.manifest_schema(None))
    )
    mask = np.ones(count, bool)
    mask[5] = False
    before = pa.total_allocated_bytes()
    chosen = rows.where(mask)
    assert pa.total_allocated_bytes() - before < 1_000_000
    assert (len(chosen), chosen[4].video_id, chosen[5].video_id) == (count - 1, ids[4], ids[6])
    assert [row.video_id for row in rows.where(~mask)] == [ids[5]]
    places = np.array([count - 1, 0, 7, 6])
    assert [row.video_id for row in chosen.take(np.minimum(places, count - 2))] == [
        ids[count - 1],
        ids[0],
        ids[8],
        ids[7],
    ]
