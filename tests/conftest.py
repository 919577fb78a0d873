"""Fixtures and rules that all tests share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import Chains, running_ray
from support.proxy import S3Proxy, running_proxy

from jobs.benchmarks.support.s3 import BUCKETS, S3Server, make_buckets, running_s3

if TYPE_CHECKING:
    from support.served import Served

REPO = Path(__file__).resolve().parent.parent
# a Ray node runs jobs with the first `python` on its PATH: this one, with the package in it
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without a GPU, unless TSQ_REQUIRE_GPU=1 makes them fail instead."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or os.environ.get("TSQ_REQUIRE_GPU") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(
                pytest.mark.skip(reason="no NVIDIA GPU (TSQ_REQUIRE_GPU=1 makes this a failure)")
            )


def pytest_collection_finish() -> None:
    """Keep what the imports made out of every later collection: a run frees its memory by one."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end they are collected as in any process: some extensions report them otherwise."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def repo_dir() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of development data; skips the test if it is absent."""
    folder = Path(os.environ.get("TSQ_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder} (TSQ_DATA names the folder)")
    return folder.resolve()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make("a/1.mp4", ...) -> the folder `videos` with these files, not opened by a listing."""

    def files(*names: str) -> Path:
        for name in names:
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
        return tmp_path / "videos"

    return files


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with the buckets of support.s3.BUCKETS.

    Sets its address and keys in the environment.
    """
    import fsspec

    with running_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        make_buckets(BUCKETS)
        yield server


@pytest.fixture
def s3_proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """A proxy between this process and the S3 server that counts requests and makes them fail."""
    import fsspec

    clear = fsspec.get_filesystem_class("s3").clear_instance_cache
    with running_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        clear()
        yield proxy
    clear()


@pytest.fixture(scope="session")
def ray_cluster(s3: S3Server) -> Iterator[Any]:
    """The Ray instance for every command of this process.

    Started after `s3`, so that its workers have the keys.
    """
    with running_ray() as ray:
        yield ray


@pytest.fixture(scope="session")
def chains(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Chains:
    """chains("local"), chains("s3"): the main path's outputs, made once."""
    return Chains(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def served(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The endpoint that several modules ask, with what it serves."""
    from support.served import Served, running_listener

    with running_listener() as listener:
        found = Served(tmp_path_factory.mktemp("served"), s3, listener)
        yield found
        found.close()
