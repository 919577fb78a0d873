"""Compare the features of two extractions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tsq_ray import schema

_ROUNDED = ("visual", "object_probs", "recognizer_logits")
"""Other batches round these differently."""


def same_features(found: pa.Table, wanted: pa.Table, tolerance: float) -> None:
    """Assert that all columns are equal, those that networks compute within a tolerance."""
    assert found.schema.equals(wanted.schema)
    exact = [name for name in wanted.column_names if name not in (*_ROUNDED, "object_ids")]
    assert found.select(exact).to_pylist() == wanted.select(exact).to_pylist()
    ok = pa.compute.equal(wanted["status"], "ok")
    found, wanted = found.filter(ok), wanted.filter(ok)
    for name in _ROUNDED:
        one, other = (
            schema.tensor_to_numpy(table[name]).astype(np.float32) for table in (found, wanted)
        )
        assert one == pytest.approx(other, abs=tolerance, rel=tolerance), name
    same = schema.tensor_to_numpy(found["object_ids"]) == schema.tensor_to_numpy(
        wanted["object_ids"]
    )
    assert same.mean() > 1 - 10 * tolerance
