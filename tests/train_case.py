"""Made-up features that can be learned, for tests of the training: arrays, and the run folder that holds the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tsq_ray.config import TrainConfig
from tsq_ray.model import TSQShape

VIDEOS, FRAMES, DIM, CLASSES, TEXT_DIM = 22, 4, 6, 3, 5
SHAPE = TSQShape(CLASSES, visual_dim=DIM, text_dim=TEXT_DIM, dim_visual=8, dim_textual=8, dropout=0.1)


def config_with(**settings: Any) -> TrainConfig:
    """Six steps an epoch, the last one of two videos."""
    return TrainConfig(**({"epochs": 4, "batch_size": 4, "dim_visual": 8, "dim_textual": 8, "checkpoint_every": 1} | settings))


def make_arrays(videos: int = VIDEOS) -> dict[str, np.ndarray]:
    """What `fit` takes; one frame of a video carries its class."""
    random = np.random.default_rng(5)
    labels = np.arange(videos) % CLASSES
    visual = random.normal(size=(videos, FRAMES, DIM))
    visual[np.arange(videos), labels, labels] += 3
    return {
        "visual": visual.astype(np.float16),
        "object_ids": random.integers(0, 1000, (videos, FRAMES, 10)).astype(np.int16),
        "object_probs": random.dirichlet(np.ones(10), (videos, FRAMES)).astype(np.float16),
        "targets": np.eye(CLASSES, dtype=bool)[labels],
    }


def make_vocabulary() -> torch.Tensor:
    """[1000, Dt]."""
    return torch.randn(1000, TEXT_DIM, generator=torch.Generator().manual_seed(3))


def make_start() -> dict[str, torch.Tensor | None]:
    """Where the queries start."""
    return {"visual": torch.eye(CLASSES, DIM), "textual": None}
