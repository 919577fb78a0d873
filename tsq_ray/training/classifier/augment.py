"""Random augmentation of a video: one crop, flip and colour jitter for all its frames (TSN).

A video's augmentation in an epoch depends only on (seed, epoch, video id), so a resumed run sees
the same frames as an uninterrupted one.

Shapes: S frames (segments), h x w pixels as decoded, size x size pixels as input of the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tsq_ray.config import FinetuneConfig, ModelConfig
from tsq_ray.decode import FrameSpec


@dataclass(frozen=True)
class RandomChoices:
    """The random choices for one video in one epoch."""

    places: tuple[float, ...]
    """Position of the frame in each of the S segments, 0..1."""
    seed: int
    """Seed of crop, flip and colours."""


def random_choices(seed: int, epoch: int, video_id: str, segments: int) -> RandomChoices:
    """Return the choices for a video (id of 16 hex digits) in an epoch (from 0)."""
    rng = np.random.default_rng([seed, epoch, int(video_id, 16)])
    return RandomChoices(tuple(rng.random(segments).tolist()), int(rng.integers(2**62)))


def training_spec(model: ModelConfig) -> FrameSpec:
    """Return the frame format for random crops: 8/7 of the network's size, squashed if it is."""
    return FrameSpec(
        round(model.size * 8 / 7),
        "squash" if model.resize == "squash" else "keep",
        model.interpolation,
    )


class Augment:
    """uint8 [S, h, w, 3] -> uint8 [S, size, size, 3]: random resized crop, flip, colour jitter."""

    def __init__(self, config: FinetuneConfig, model: ModelConfig) -> None:
        # slow to import, and only the decoders of a fine-tuning need it
        from torchvision.transforms import InterpolationMode, v2

        mode = InterpolationMode(model.interpolation)
        size = [model.size, model.size]
        steps: list[torch.nn.Module] = []
        if config.crop_scale == (1, 1):
            steps += [v2.Resize(model.size, mode, antialias=True), v2.CenterCrop(size)]
        else:
            steps.append(
                v2.RandomResizedCrop(
                    size, scale=config.crop_scale, interpolation=mode, antialias=True
                )
            )
        if config.flip:
            steps.append(v2.RandomHorizontalFlip())
        if config.color_jitter:
            share = config.color_jitter
            steps.append(
                v2.ColorJitter(brightness=share, contrast=share, saturation=share, hue=share / 10)
            )
        self.transform = v2.Compose(steps)

    def __call__(self, frames: np.ndarray, seed: int) -> np.ndarray:
        """Augment the frames; depends only on `seed`, and leaves torch's generator unchanged."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            view = self.transform(torch.from_numpy(frames).permute(0, 3, 1, 2))
        return np.ascontiguousarray(view.permute(0, 2, 3, 1).numpy())
