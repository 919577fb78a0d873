"""An extraction without decoding and networks, to measure what the rest costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tsq_ray import feature_pipeline
from tsq_ray.config import Config
from tsq_ray.decode import DecodedVideo, VideoSource
from tsq_ray.runtime import progress
from tsq_ray.stages import FrameFeatures


class Stub:
    """Stub of the decoder's children and the networks: the same frames and features everywhere."""

    def __init__(self, config: Config, dim: int) -> None:
        count, objects = config.decode.num_frames, config.encoders.num_objects
        index = np.arange(count, dtype=np.int32)
        self.video = DecodedVideo(
            {}, index, index, index.astype(np.float32), 4.0, 1.0, 320, 240, "none", count, [], 0.0
        )
        ids = np.zeros((count, objects), np.int16)
        self.features = FrameFeatures(
            np.zeros((count, dim), np.float32), ids, ids.astype(np.float32)
        )

    def outcomes(self, sources: Sequence[VideoSource], ahead: int) -> Iterator[DecodedVideo]:
        return (self.video for _ in sources)

    def __call__(self, videos: Sequence[DecodedVideo]) -> list[FrameFeatures]:
        return [self.features for _ in videos]


class StubWorker(feature_pipeline.ExtractWorker):
    """The worker of `tsq extract`, with stubs."""

    def __init__(self, plan: feature_pipeline.FeaturePlan) -> None:
        self.plan = plan
        stub: Any = Stub(plan.config, plan.schema.field("visual").type.shape[1])
        self.pool = self.encode = stub


class SpanCounts(progress.RowCounts):
    """Counts that record when the first and the last row were finished."""

    first = last = 0.0

    def add(self, statuses: Sequence[str | None]) -> None:
        self.last = time.time()
        self.first = self.first or self.last
        super().add(statuses)

    def seconds(self) -> float:
        """Return the seconds from the first row to the last."""
        return self.last - self.first
