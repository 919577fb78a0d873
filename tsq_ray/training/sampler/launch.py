"""Run the training workers on a Ray cluster: their number, resources and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tsq_ray.config import Config
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.session import Session
from tsq_ray.training.resumable import run_workers, scaling
from tsq_ray.training.sampler.loop import SamplerJob, train_loop


@dataclass
class Fitted:
    """The result of a training, from its last checkpoint."""

    state: dict[str, Tensor]
    curve: list[dict[str, float]]
    """The losses of each epoch."""
    epoch_seconds: list[float]
    """Duration of each epoch."""
    workers: int
    """Number of workers at the end."""
    resumed_at: int
    """Epochs already done when the workers last started; 0 for an uninterrupted run."""
    seconds: float
    """Time from the start of the workers to the end."""
    happened: Mapping[str, float]
    """Lost nodes, repeated work and waits, if any."""
    hours: Mapping[str, float]
    """`cpu_hours` and `gpu_hours` of all live nodes, from reading the features on."""


def fit_on_cluster(
    ray: Any,
    job: SamplerJob,
    config: Config,
    num_videos: int,
    work: str,
    session: Session,
    observer: Observer,
) -> Fitted:
    """Run `loop.train_loop` on Ray Train workers, resuming from the last checkpoint in `work`.

    `observer` watches the workers. Raises RunFailed if the training fails.
    """
    counts = progress.start_counts(progress.VideoCounts)
    placed = cluster.lay_out(ray, "train", config, num_videos)
    inputs = {"job": job, "counts": counts, "threads": placed.threads, "device": placed.device}
    total = config.train.epochs * num_videos
    started = time.monotonic()
    options: dict[str, Any] = {"counts": counts, "total": total, "observe": observer.observe}
    content = run_workers(train_loop, inputs, scaling(placed), work, "train", session, **options)
    seconds = time.monotonic() - started
    model, curve, epoch_seconds = (content[name] for name in ("model", "curve", "seconds"))
    workers, resumed_at = content["workers"], content["resumed_at"]
    about = (workers, resumed_at, seconds, observer.happened, observer.hours)
    return Fitted(model, curve, epoch_seconds, *about)
