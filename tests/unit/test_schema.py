"""The Arrow schemas: rows to tables and back, null tensors, reading by pandas and DuckDB."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsq_ray import schema

T, D, C = 3, 4, 2
CLASSES = ["cats", "dögs"]
MODIFIED = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=timezone.utc)


def features_row(number: int) -> dict[str, Any]:
    return {
        "video_id": f"{number:016x}",
        "uri": f"/videos/{number}.mp4",
        "size_bytes": 2**40 + number,
        "modified": MODIFIED,
        "labels": [0, 1],
        "split": "train",
        "status": "ok",
        "warnings": ["header says 5 frames, 3 can be decoded"],
        "duration_s": 1.5,
        "fps": 25.0,
        "width": 320,
        "height": 240,
        "codec": "h264",
        "source_num_frames": 3,
        "frame_index": np.array([0, 1, 2], np.int32),
        "frame_pts_s": np.array([0.0, 0.5, 1.0], np.float32),
        "visual": np.arange(T * D, dtype=np.float32).reshape(T, D) + number,
        "object_ids": np.arange(T * 10).reshape(T, 10),
        "object_probs": np.full((T, 10), 0.1),
    }


def failed_row(number: int) -> dict[str, Any]:
    return {
        "video_id": f"{number:016x}",
        "uri": f"/videos/{number}.mp4",
        "size_bytes": 0,
        "status": "failed",
        "error_type": "not_video",
        "error_message": "no",
        "warnings": [],
    }


@pytest.fixture
def features() -> pa.Table:
    """Three rows, the second one failed."""
    rows = [features_row(1), failed_row(2), features_row(3)]
    return schema.table_from_rows(rows, schema.features_schema(T, D, CLASSES))


@pytest.fixture
def part(features: pa.Table, tmp_path: Path) -> Path:
    pq.write_table(features, tmp_path / "part.parquet", compression="zstd")
    return tmp_path / "part.parquet"


def test_rows_come_back_from_parquet_as_they_were(features: pa.Table, part: Path) -> None:
    read = pq.read_table(part)
    assert read.schema.equals(features.schema, check_metadata=False)
    assert read.equals(features)
    first = read.slice(0, 1).to_pylist()[0]
    expected = features_row(1)
    assert first["modified"] == MODIFIED
    assert {name: first[name] for name in ("size_bytes", "labels", "warnings", "fps")} == {
        name: expected[name] for name in ("size_bytes", "labels", "warnings", "fps")
    }
    assert (
        schema.tensor_to_numpy(read.slice(0, 1)["visual"])[0].tolist()
        == expected["visual"].tolist()
    )


def test_a_failed_row_has_null_tensors(features: pa.Table, part: Path) -> None:
    read = pq.read_table(part)
    for column in ("visual", "object_ids", "object_probs", "frame_index", "frame_pts_s"):
        assert read[column].is_null().to_pylist() == [False, True, False], column
    ok = read.filter(pa.array([True, False, True]))
    visual = schema.tensor_to_numpy(ok["visual"])
    assert visual.dtype == np.float16
    assert visual.shape == (2, T, D)
    assert visual[1].tolist() == features_row(3)["visual"].tolist()


def test_tensors_are_of_the_standard_type_and_their_shapes_are_in_the_metadata(part: Path) -> None:
    arrow = pq.read_schema(part)
    assert isinstance(arrow.field("visual").type, pa.FixedShapeTensorType)
    assert json.loads(arrow.metadata[schema.SHAPES_KEY]) == {
        "frame_index": [T],
        "frame_pts_s": [T],
        "visual": [T, D],
        "object_ids": [T, 10],
        "object_probs": [T, 10],
    }
    assert schema.classes_of(arrow) == CLASSES


def test_pandas_reads_it(part: Path) -> None:
    frame = pd.read_parquet(part)
    assert frame["status"].tolist() == ["ok", "failed", "ok"]
    assert (
        np.asarray(frame["visual"][0], np.float32).reshape(T, D).tolist()
        == features_row(1)["visual"].tolist()
    )
    assert frame["visual"][1] is None


def test_duckdb_reads_it(part: Path) -> None:
    query = (
        f"select video_id, status, frame_pts_s[2], labels[1], object_ids[11] from '{part}' "
        "order by video_id"
    )
    assert duckdb.sql(query).fetchall() == [
        (f"{1:016x}", "ok", 0.5, 0, 10),
        (f"{2:016x}", "failed", None, None, None),
        (f"{3:016x}", "ok", 0.5, 0, 10),
    ]


@pytest.mark.parametrize(
    ("arrow", "present", "absent"),
    [
        (schema.features_schema(T, D, None), {"visual"}, {"recognizer_logits"}),
        (schema.features_schema(T, D, None, C), {"visual", "recognizer_logits"}, set()),
        (schema.predictions_schema(T, C, None), {"scores", "saliency_visual"}, {"visual"}),
        (schema.predictions_schema(T, C, None, with_scores=False), {"top_scores"}, {"scores"}),
        (schema.manifest_schema(None), {"labels", "split"}, {"status"}),
    ],
    ids=["features", "features with logits", "predictions", "top predictions", "manifest"],
)
def test_optional_columns(arrow: pa.Schema, present: set[str], absent: set[str]) -> None:
    assert present <= set(arrow.names)
    assert not absent & set(arrow.names)
    assert schema.classes_of(arrow) == []


def test_features_may_hold_another_number_of_objects() -> None:
    arrow = schema.features_schema(T, D, None, num_objects=3)
    assert json.loads(arrow.metadata[schema.SHAPES_KEY])["object_probs"] == [T, 3]
    assert arrow.field("object_ids").type.shape == [T, 3]


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"visual: shape \(3, 3\), the schema says \(3, 4\)"):
        schema.table_from_rows(
            [features_row(1) | {"visual": np.zeros((3, 3))}], schema.features_schema(T, D, None)
        )


def test_no_rows_make_an_empty_table() -> None:
    table = schema.table_from_rows([], schema.features_schema(T, D, CLASSES))
    assert table.num_rows == 0
    assert schema.tensor_to_numpy(table["visual"]).shape == (0, T, D)


def test_null_tensors_are_not_taken_for_numbers(features: pa.Table) -> None:
    with pytest.raises(AssertionError, match="drop the failed rows first"):
        schema.tensor_to_numpy(features["visual"])


def test_chunks_are_put_together(features: pa.Table) -> None:
    ok = features.slice(0, 1)
    both = pa.concat_tables([ok, features.slice(2, 1)])
    assert both["visual"].num_chunks == 2
    assert schema.tensor_to_numpy(both["visual"]).shape == (2, T, D)


def test_storage_tables_carry_plain_lists_and_come_back(features: pa.Table) -> None:
    plain = schema.to_storage(features)
    assert plain.schema.field("visual").type == pa.list_(pa.float16(), T * D)
    assert schema.from_storage(
        plain.append_column("extra", pa.array([1, 2, 3])), features.schema
    ).equals(features)


def test_storage_tables_come_back_from_variable_lists(features: pa.Table) -> None:
    plain = schema.to_storage(features)
    number = plain.column_names.index("frame_index")
    loose = plain.set_column(
        number, "frame_index", plain["frame_index"].combine_chunks().cast(pa.list_(pa.int32()))
    )
    assert schema.from_storage(loose, features.schema).equals(features)


@pytest.mark.parametrize(
    "columns",
    [schema.MANIFEST, schema.FEATURES, schema.PREDICTIONS],
    ids=["manifest", "features", "predictions"],
)
def test_every_column_is_described_once(columns: tuple[schema.Column, ...]) -> None:
    assert all(column.doc for column in columns)
    assert len({column.name for column in columns}) == len(columns)


def test_features_and_predictions_begin_alike() -> None:
    shared = [column.name for column in (*schema.IDENTITY, *schema.STATUS, *schema.SOURCE)]
    assert [column.name for column in schema.FEATURES][: len(shared)] == shared
    assert [column.name for column in schema.PREDICTIONS][: len(shared)] == shared
