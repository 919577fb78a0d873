"""`import tsq_ray`: what it offers, and that the result types describe the data."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import tsq_ray
from tsq_ray import results, schema

SOURCE = Path(tsq_ray.__file__)


def typed_names() -> set[str]:
    """The names that a type checker sees."""
    (block,) = (
        node
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        for alias in node.names:
            home = "tsq_ray." + tsq_ray._HOMES.get(alias.name, "results")
            assert node.module == home, f"{alias.name}: loaded from {home}"
    return {alias.name for node in imports for alias in node.names}


def test_a_type_checker_sees_what_is_loaded() -> None:
    assert typed_names() == set(tsq_ray.__all__)
    assert SOURCE.with_name("py.typed").exists()


@pytest.mark.parametrize("name", tsq_ray.__all__)
def test_every_name_loads_and_is_described(name: str) -> None:
    value = getattr(tsq_ray, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(tsq_ray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tsq_ray' has no attribute 'nothing'"):
        tsq_ray.nothing  # noqa: B018


def test_results_are_frozen() -> None:
    kinds = [kind for kind in vars(results).values() if dataclasses.is_dataclass(kind)]
    public = {name for name in tsq_ray.__all__ if name not in tsq_ray._HOMES}
    assert public == {kind.__name__ for kind in kinds} - {"Estimate", "_Trained"}
    assert all(kind.__dataclass_params__.frozen for kind in kinds)


def test_a_prediction_has_the_columns_of_the_rows() -> None:
    """The manifest's labels and split are not part of an answer."""
    columns = [column.name for column in (*schema.PREDICTIONS, *schema.SERVER)]
    fields = {field.name for field in dataclasses.fields(results.Prediction)}
    assert fields == set(columns) - {"labels", "label_names", "split"}


def test_one_source_may_be_a_plain_string(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"a")
    found = tsq_ray.build_manifest(str(tmp_path / "videos"), str(tmp_path / "m.parquet"))
    assert found.videos == 1


def test_a_stored_summary_of_another_version_is_read() -> None:
    stored = {"out": "b", "videos": 3, "of_a_later_version": 1}
    rest = {
        field.name: 0
        for field in dataclasses.fields(results.TrainingSummary)
        if field.name not in stored
    }
    found = results.from_record(results.TrainingSummary, stored | rest, already_done=True)
    assert (found.out, found.videos, found.already_done) == ("b", 3, True)
