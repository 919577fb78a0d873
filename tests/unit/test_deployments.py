"""The stages' health checks, in this process: an idle stage processes a made-up video."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.bundle import make_bundle

from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.decode import VideoSource
from tsq_ray.errors import StorageError, UserError, VideoError
from tsq_ray.runtime.nodes import Cluster, Node
from tsq_ray.runtime.placement import layout
from tsq_ray.serving import deployments, warmup
from tsq_ray.serving.graph import Busy, Video
from tsq_ray.serving.requests.shares import Share

NAMES = ("Decoder", "Sampler", "Recognizer")


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """stage(name, setting, ..., bulk=True) -> the class behind that deployment, started."""
    model = make_bundle(tmp_path_factory.mktemp("model") / "bundle")

    def started(name: str, *settings: str, bulk: bool = True) -> Any:
        config = scoring_config(model, None, list(settings))
        placed = layout("score", config, Cluster((Node(2.0),)), 1)
        return getattr(deployments, name).func_or_class(model, config, placed, bulk)

    return started


@pytest.mark.parametrize("name", NAMES)
def test_an_idle_stage_processes_a_video_and_a_busy_one_does_not(
    name: str, stage: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        checked = stage(name)
        await checked.check_health()
        assert checked._answered_at > time.monotonic() - 60
        monkeypatch.setattr(checked, "_self_test", fail)
        await checked.check_health()
        checked._answered_at -= 31
        with pytest.raises(RuntimeError, match="broken"):
            await checked.check_health()

    async def fail() -> None:
        raise RuntimeError("broken")

    asyncio.run(check())


def test_a_decoder_that_cannot_decode_is_unhealthy(
    stage: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "video.mp4"
    broken.write_bytes(b"no video")

    @contextlib.contextmanager
    def video_file() -> Iterator[str]:
        yield str(broken)

    monkeypatch.setattr(warmup, "video_file", video_file)
    with pytest.raises(VideoError, match="not recognised as video"):
        asyncio.run(stage("Decoder").check_health())


def test_an_idle_decoder_needs_no_disk(
    stage: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoder = stage("Decoder")
    asyncio.run(decoder.check_health())  # starts the fork server, whose socket needs a folder
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    warmup._encoded.cache_clear()
    decoder._answered_at = 0.0
    asyncio.run(decoder.check_health())
    assert decoder._answered_at > 0


@pytest.mark.parametrize("name", ["Sampler", "Recognizer"])
def test_a_network_that_fails_is_unhealthy(
    name: str, stage: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        checked = stage(name)

        async def fail(_: object) -> None:
            raise RuntimeError("no memory left on the device")

        owner = checked if name == "Sampler" else checked._backend
        monkeypatch.setattr(owner, "_microbatches", fail)
        with pytest.raises(RuntimeError, match="no memory left"):
            await checked.check_health()

    asyncio.run(check())


def test_a_client_has_its_share_of_the_fetches(
    stage: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments._Stage, "_wait_for_other_stages", lambda *_: None)
    video, half = VideoSource("/nowhere/a.mp4"), Share("a", 0.5)

    async def check() -> None:
        decoder = stage("Decoder", "serve.max_fetches=2", bulk=False)

        async def fetch(share: Share) -> None:
            async with decoder._source(Video(video, "0", share=share)):
                pass

        with decoder._fetch_quota.held(half):
            with pytest.raises(Busy, match="1 videos are being fetched"):
                await fetch(half)
            with pytest.raises((VideoError, StorageError, UserError)):
                await fetch(Share("b", 0.5))

    asyncio.run(check())
