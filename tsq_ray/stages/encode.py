"""Decode videos and encode their frames, for the sampler and for `tsq extract`.

Shapes: T frames (slots) per video, N distinct source frames, C classes, D dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tsq_ray.asking.questions import Asking
from tsq_ray.bundle.weights import Bundle
from tsq_ray.config import DecodeConfig, ResourcesConfig
from tsq_ray.decode import WHOLE, DecodedVideo, DecodePool, FrameSpec, Outcome, VideoSource
from tsq_ray.errors import VideoError
from tsq_ray.networks.encoder import CPU, FrameEncoder, top_objects
from tsq_ray.networks.inference import (
    DEFAULT_RESOURCES,
    Pictures,
    encode_pictures,
    num_inputs,
    prepare_for_inference,
)
from tsq_ray.rows import OBJECTS, RECOGNIZER, VISUAL, picture_specs
from tsq_ray.schema import TOP_OBJECTS


def bundle_specs(bundle: Bundle, mode: str, native_size: bool = False) -> dict[str, FrameSpec]:
    """Return the specs of exactly the pictures that scoring with `mode` needs.

    `native_size`: as in `picture_specs`.
    """
    recognizer = bundle.recognizer.config if bundle.recognizer is not None else None
    return picture_specs(bundle.encoders, bundle.objects is not None, recognizer, mode, native_size)


def pictures_of(video: DecodedVideo, name: str) -> Pictures:
    """Return a video's pictures for network `name`, one per distinct source frame.

    If the video has whole frames, return those; the network's device resizes them.
    """
    return (
        Pictures(video.frames[WHOLE], True)
        if WHOLE in video.frames
        else Pictures(video.frames[name])
    )


class Decode:
    """Decode videos in killable child processes; return failures instead of raising them."""

    def __init__(
        self, config: DecodeConfig, specs: Mapping[str, FrameSpec], num_processes: int = 1
    ) -> None:
        self.pool = DecodePool(config, specs, num_processes)

    def __call__(self, sources: Sequence[VideoSource]) -> list[Outcome]:
        """Return frames or failures in the order of `sources`."""
        return self.pool.decode(sources)

    def close(self) -> None:
        """End the child processes."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class FrameFeatures:
    """Outputs of the light encoders for a video's T frames.

    `object_*` are None without a textual module.
    """

    visual: np.ndarray
    """float32 [T, D]."""
    object_ids: np.ndarray | None
    """int16 [T, n]."""
    object_probs: np.ndarray | None
    """float32 [T, n]."""
    visual_logits: np.ndarray | None = None
    """float32 [T, C] of the frame head, if the visual encoder has one."""
    recognizer_logits: np.ndarray | None = None
    """float32 [T, C], if a recogniser was given; the frames of a clip share its logits."""
    error: VideoError | None = None
    """Why the recogniser's server did not answer."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that the server counted."""
    requests_s: float = 0.0
    """For which the requests to the server were in flight; `waited_s`: until all were answered."""
    waited_s: float = 0.0


class Encode:
    """Encode frames, keeping the `num_objects` most probable objects per frame.

    Each distinct source frame is encoded once.
    """

    def __init__(
        self,
        visual: FrameEncoder,
        objects: FrameEncoder | None,
        recognizer: FrameEncoder | Asking | None = None,
        device: torch.device = CPU,
        num_objects: int = TOP_OBJECTS,
        resources: ResourcesConfig = DEFAULT_RESOURCES,
    ) -> None:
        self.device, self.num_objects = device, num_objects
        self.visual = prepare_for_inference(visual, self.device, resources)
        self.objects = (
            prepare_for_inference(objects, self.device, resources) if objects is not None else None
        )
        self.recognizer = (
            prepare_for_inference(recognizer, self.device, resources)
            if isinstance(recognizer, FrameEncoder)
            else recognizer
        )

    def __call__(self, videos: Sequence[DecodedVideo]) -> list[FrameFeatures]:
        """Return features in the order of `videos`; each network encodes all frames together."""
        if not videos:
            return []
        visual, visual_logits = self._run(self.visual, videos, VISUAL)
        ids: list[Any] = [None] * len(videos)
        probs: list[Any] = [None] * len(videos)
        logits: list[Any] = [None] * len(videos)
        if self.objects is not None:
            _, object_logits = self._run(self.objects, videos, OBJECTS)
            assert object_logits is not None
            for number, scores in enumerate(object_logits):
                top_ids, top_probs = top_objects(scores, self.num_objects)
                ids[number], probs[number] = top_ids.numpy().astype(np.int16), top_probs.numpy()
        if isinstance(self.recognizer, FrameEncoder):
            _, found = self._run(self.recognizer, videos, RECOGNIZER)
            assert found is not None
            logits = [scores.numpy() for scores in found]
        frame_logits = (
            [scores.numpy() for scores in visual_logits]
            if visual_logits is not None
            else [None] * len(videos)
        )
        features = [
            FrameFeatures(feature.numpy(), *rest)
            for feature, *rest in zip(visual, ids, probs, frame_logits, logits, strict=True)
        ]
        return self._add_answers(videos, features)

    def _add_answers(
        self, videos: Sequence[DecodedVideo], features: list[FrameFeatures]
    ) -> list[FrameFeatures]:
        """Add the answers of the recogniser's server, if it is behind one, to the features."""
        if isinstance(self.recognizer, Asking):
            for video, feature in zip(videos, features, strict=True):
                _ask(self.recognizer, video, feature)
        return features

    def _run(
        self, encoder: FrameEncoder, videos: Sequence[DecodedVideo], name: str
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        pictures = [pictures_of(video, name) for video in videos]
        features, logits = encode_pictures(encoder, pictures)
        clip = encoder.config.clip_frames
        counts = [num_inputs(encoder.config, len(part.frames)) for part in pictures]
        slots = [torch.from_numpy(video.slot_frame.astype(np.int64)) for video in videos]

        def per_slot(values: Tensor) -> list[Tensor]:
            parts = values.split(counts)
            # the frames of a clip share its values
            return [part[slot // clip] for part, slot in zip(parts, slots, strict=True)]

        return per_slot(features), per_slot(logits) if logits is not None else None


def _ask(server: Asking, video: DecodedVideo, features: FrameFeatures) -> None:
    """Ask a server about each distinct frame; add its logits, its tokens or its error."""
    _, places = np.unique(video.slot_frame, return_index=True)
    found = server.frame_logits(
        pictures_of(video, RECOGNIZER).frames, video.frame_pts_s[places], video.width, video.height
    )
    features.tokens = found.tokens
    features.requests_s, features.waited_s = found.requests_s, found.waited_s
    if isinstance(found.logits, VideoError):
        features.error = found.logits
    else:
        features.recognizer_logits = found.logits[video.slot_frame]
