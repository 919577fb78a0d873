"""One video through a failing S3: its frames or `unavailable`, never a verdict on the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.archive import CLASSES, write_clip
from support.proxy import (
    CUT,
    EXPIRED_TOKEN,
    EXPIRED_TOKEN_403,
    INTERNAL_ERROR,
    SLOW_DOWN,
    S3Proxy,
    Trouble,
)

from tsq_ray import storage
from tsq_ray.config import DecodeConfig
from tsq_ray.decode import FrameSpec, VideoSource, decode_video
from tsq_ray.errors import StorageError

SPECS = {"wide": FrameSpec(32)}
URI = "s3://tsq-other/trouble/v.mp4"


@pytest.fixture
def proxy(s3_proxy: S3Proxy, tmp_path: Path) -> S3Proxy:
    """A proxy between this process and a bucket with one video, large enough for byte ranges."""
    if not storage.exists(URI):
        storage.write_bytes(
            URI,
            write_clip(
                tmp_path / "v.mp4", CLASSES[0], seed=0, num_frames=48, size=(320, 240)
            ).read_bytes(),
        )
    assert storage.stat(URI).size_bytes > 4 * 128 * 1024
    return s3_proxy


def decode(strategy: str) -> int:
    return decode_video(
        VideoSource(URI),
        DecodeConfig.model_validate({"strategy": strategy, "num_frames": 4}),
        SPECS,
    ).source_num_frames


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize(
    "trouble", [SLOW_DOWN, INTERNAL_ERROR, CUT], ids=lambda trouble: trouble.code
)
def test_brief_trouble_passes(proxy: S3Proxy, trouble: Trouble, strategy: str) -> None:
    proxy.trouble(trouble, 2)
    assert decode(strategy) == 48
    assert len(proxy.given) == 2


@pytest.mark.parametrize("strategy", ["uniform", "keyframe"])
@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        pytest.param(SLOW_DOWN, "unavailable", marks=pytest.mark.slow),
        (INTERNAL_ERROR, "unavailable"),
        pytest.param(CUT, "unavailable", marks=pytest.mark.slow),
        (EXPIRED_TOKEN, "unavailable"),
        (EXPIRED_TOKEN_403, "access_denied"),
    ],
    ids=lambda value: value.code + str(value.status) if isinstance(value, Trouble) else value,
)
@pytest.mark.parametrize("healthy", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_lasting_trouble_is_not_blamed_on_the_video(
    proxy: S3Proxy, trouble: Trouble, kind: str, strategy: str, healthy: int
) -> None:
    proxy.trouble(trouble, after=healthy)
    with pytest.raises(StorageError, match=r"cannot .*v\.mp4") as caught:
        decode(strategy)
    assert caught.value.error_type in {kind, "unavailable"}


@pytest.mark.parametrize(
    "trouble",
    [
        *(pytest.param(trouble, marks=pytest.mark.slow) for trouble in (INTERNAL_ERROR, CUT)),
        EXPIRED_TOKEN,
    ],
    ids=lambda trouble: trouble.code,
)
def test_trouble_between_byte_ranges_is_not_blamed_on_the_video(
    proxy: S3Proxy, trouble: Trouble
) -> None:
    proxy.trouble(trouble, after=3)
    with pytest.raises(StorageError, match=r"cannot .*v\.mp4") as caught:
        decode("keyframe")
    assert caught.value.error_type == "unavailable"
    assert len(proxy.given) > 0
