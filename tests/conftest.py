"""Fixtures and rules that all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # jobs/ is not installed, and tests import from it
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU, unless TSQ_REQUIRE_GPU=1 wants them to fail there."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or os.environ.get("TSQ_REQUIRE_GPU") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU (TSQ_REQUIRE_GPU=1 makes this a failure)"))


@pytest.fixture(scope="session")
def repo_dir() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of development data; the test is skipped where it is absent."""
    folder = Path(os.environ.get("TSQ_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder} (TSQ_DATA names the folder)")
    return folder.resolve()
