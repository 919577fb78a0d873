"""The rows of a finished run as one Arrow table."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from tsq_ray import storage
from tsq_ray.errors import RunError
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.folder import Kind, read_run


def read_features(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows that `extract` wrote, one per video, all columns or the named ones.

    The rows must fit in memory; query a larger run with DuckDB, or read its parts one by one.
    A run without rows gives a table without columns. Raises RunError if `uri` holds no finished
    extraction or no such column.
    """
    return _read(uri, "features", columns)


def read_predictions(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows that `score` wrote, one per video, all columns or the named ones.

    The rows must fit in memory; query a larger run with DuckDB, or read its parts one by one.
    A run without rows gives a table without columns. Raises RunError if `uri` holds no finished
    scoring or no such column.
    """
    return _read(uri, "predictions", columns)


def _read(uri: str, kind: Kind, columns: Sequence[str] | None) -> pa.Table:
    place = storage.normalize(uri)
    names = [part["name"] for part in read_run(place, kind)["parts"]]
    tables = [read_part(storage.join(place, name), columns) for name in names]
    if not tables:
        return pa.table({})
    missing = [name for name in columns or () if name not in tables[0].column_names]
    if missing:
        known = read_part(storage.join(place, names[0])).column_names
        raise RunError(
            f"{storage.redact(uri)}: these {kind} have no column {missing[0]!r}; "
            f"allowed: {', '.join(known)}"
        )
    return pa.concat_tables(tables)
