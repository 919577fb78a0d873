"""Linear heads on frozen features, with TSN's segment consensus: frame head and recogniser head.

Shapes: V videos, T frames, D dims, C classes, S segments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tsq_ray.config import FinetuneConfig, Task
from tsq_ray.model.task import classification_loss

_CHUNK = 64
"""Videos converted to float64 at a time."""


def fit_head(
    features: np.ndarray,
    targets: np.ndarray,
    config: FinetuneConfig,
    task: Task,
    progress: Callable[[int], object] = lambda done: None,
) -> nn.Linear:
    """Fit logits = W x + b whose mean over a video's segments predicts its labels.

    This is TSN's average consensus. Features are standardised for the fit; the scale is then folded
    into the weights, so the returned head takes raw features.

    Args:
        features: float [V, T, D], from the frozen backbone.
        targets: multi-hot [V, C].
        config: only its `head` is used; each step takes one random frame from each of `segments`
            equal parts of the T frames.
        task: see `model.task.classification_loss`.
        progress: called at most once a second with the number of videos done; each video counts
            once per epoch.
    """
    settings = config.head
    x, y = torch.from_numpy(features), torch.from_numpy(targets)
    num_videos, num_frames, dim = x.shape
    generator = torch.Generator().manual_seed(settings.seed)
    mean, scale = standard_scale(features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = nn.Linear(dim, y.shape[1])
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * -(-num_videos // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    segments = min(settings.segments, num_frames)
    last_report = time.monotonic()
    for epoch in range(settings.epochs):
        if time.monotonic() - last_report > 1:
            last_report = time.monotonic()
            progress(epoch * num_videos)
        for batch in torch.randperm(num_videos, generator=generator).split(settings.batch_size):
            slots = segment_slots(len(batch), num_frames, segments, generator)
            frames = (x[batch[:, None], slots].float() - mean) / scale
            loss = classification_loss(head(frames).mean(1), y[batch], task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        head.weight.div_(scale)
        head.bias.sub_(head.weight @ mean)
    return head.eval().requires_grad_(False)


def standard_scale(features: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the mean [D] and standard deviation [D] over all frames.

    Constant dimensions get scale 1. Reads [V, T, D] a few videos at a time.
    """
    count = features.size // features.shape[-1]
    chunks = range(0, len(features), _CHUNK)

    def mean_over_frames(transform: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return (
            sum(
                transform(features[start : start + _CHUNK].astype(np.float64)).sum((0, 1))
                for start in chunks
            )
            / count
        )

    mean = mean_over_frames(lambda frames: frames)
    std = np.sqrt(mean_over_frames(lambda frames: np.square(frames - mean)))
    return torch.from_numpy(mean).float(), torch.from_numpy(np.where(std > 1e-6, std, 1.0)).float()


def segment_slots(
    num_videos: int, num_frames: int, segments: int, generator: torch.Generator
) -> Tensor:
    """Draw one random slot from each of S equal segments: int64 [num_videos, S]."""
    edges = torch.arange(segments + 1) * num_frames // segments
    width = (edges[1:] - edges[:-1]).float()
    return edges[:-1] + (torch.rand(num_videos, segments, generator=generator) * width).long()


@torch.inference_mode()
def head_logits(head: nn.Module, features: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the logits, float32 [T, C], of each video of `features`, float [V, T, D]."""
    for video in features:
        yield head(torch.from_numpy(video.astype(np.float32))).numpy()


def accuracy(head: nn.Module, features: np.ndarray, targets: np.ndarray) -> float:
    """Share of videos whose best class, by mean logits over all frames, is one of their labels.

    Args:
        head: the frame classifier.
        features: float [V, T, D].
        targets: multi-hot [V, C].
    """
    best = (int(logits.mean(0).argmax()) for logits in head_logits(head, features))
    right = [bool(row[label]) for row, label in zip(targets, best, strict=True)]
    return round(float(np.mean(right)), 4)
