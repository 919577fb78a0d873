"""What extraction hands from its decoders to its encoders; tests/integration runs the whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from tsq_ray.config import Config
from tsq_ray.decode import WHOLE, DecodedVideo, FrameSpec, with_whole_frames
from tsq_ray.errors import VideoError
from tsq_ray.feature_pipeline import FeaturePlan, Networks
from tsq_ray.runtime.nodes import Layout
from tsq_ray.runtime.packing import pack_video, packed_fields, unpack_video

SPECS = with_whole_frames({"visual": FrameSpec(8), "objects": FrameSpec(6)})


def video(frames: dict[str, np.ndarray]) -> DecodedVideo:
    index = np.array([0, 2, 2, 5], np.int32)
    slots = np.array([0, 1, 1, 2], np.int32)
    return DecodedVideo(
        frames,
        slots,
        index,
        index.astype(np.float32) / 8,
        1.0,
        8.0,
        12,
        10,
        "h264",
        8,
        ["one frame is damaged"],
        3.5,
    )


@pytest.mark.parametrize(
    "shapes", [{"visual": (3, 8, 8, 3), "objects": (3, 6, 6, 3)}, {WHOLE: (3, 10, 12, 3)}]
)
def test_a_packed_video_comes_out_as_it_went_in(shapes: dict[str, tuple[int, ...]]) -> None:
    before = video(
        {
            name: np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            for name, shape in shapes.items()
        }
    )
    packed = pack_video(before, list(SPECS))
    table = pa.table(
        {
            name: pa.array([packed.get(name)], column_type)
            for name, column_type in packed_fields(list(SPECS)).items()
        }
    )
    after = unpack_video(table.to_pylist()[0], SPECS)
    assert isinstance(after, DecodedVideo)
    for field in dataclasses.fields(DecodedVideo):
        one, other = (getattr(each, field.name) for each in (before, after))
        if field.name == "frames":
            assert one.keys() == other.keys()
            assert all((one[name] == other[name]).all() for name in one)
        else:
            assert np.array_equal(one, other), field.name


def test_pictures_in_the_shape_of_the_video_come_out_in_it() -> None:
    """The video has 12 x 10 pixels, and a server is sent a shorter side of 5."""
    specs = {"recognizer": FrameSpec(5, "keep")}
    before = np.random.default_rng(1).integers(0, 256, (3, 5, 6, 3), np.uint8)
    packed = pack_video(video({"recognizer": before}), list(specs))
    after = unpack_video(dict.fromkeys(packed_fields(list(specs))) | packed, specs)
    assert isinstance(after, DecodedVideo)
    assert np.array_equal(after.frames["recognizer"], before)


def test_a_packed_failure_comes_out_as_a_failure() -> None:
    packed = pack_video(VideoError("corrupt", "no frame can be decoded"), list(SPECS))
    table = pa.table(
        {
            name: pa.array([packed.get(name)], column_type)
            for name, column_type in packed_fields(list(SPECS)).items()
        }
    )
    failure = unpack_video(table.to_pylist()[0], SPECS)
    assert isinstance(failure, VideoError)
    assert (failure.error_type, str(failure)) == ("corrupt", "no frame can be decoded")


@pytest.mark.parametrize(
    ("resize", "on_gpu", "whole"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("decoder", True, False),
        ("device", False, True),
    ],
)
def test_decoders_hand_on_whole_frames_where_the_device_resizes(
    resize: str, on_gpu: bool, whole: bool
) -> None:
    config = Config.model_validate({"resources": {"resize": resize}})
    networks = Networks(config.encoders.visual, config.encoders.objects)
    plan = FeaturePlan(
        config, networks, pa.schema([]), None, Layout("extract", device="cuda" if on_gpu else "cpu")
    )
    assert list(plan.specs()) == ["visual", "objects", *([WHOLE] if whole else [])]
