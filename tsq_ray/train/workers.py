"""The training's workers on a Ray cluster: how many, what each takes, where their checkpoints go."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tsq_ray import runtime
from tsq_ray.config import Config
from tsq_ray.train.loop import train_loop
from tsq_ray.train.resumable import run_workers


@dataclass
class Fitted:
    """What a training left in its last checkpoint."""

    state: dict[str, Tensor]
    curve: list[dict[str, float]]
    """The losses of each epoch."""
    epoch_seconds: list[float]
    """How long each of them took."""
    workers: int
    """At the end."""
    resumed_at: int
    """Epochs that were done already when the workers started for the last time; 0 for an undisturbed run."""
    seconds: float
    """From the start of the workers to the end."""


def fit_on_cluster(ray: Any, job: dict[str, Any], config: Config, num_videos: int, work: str, show: bool, debug: bool) -> Fitted:
    """Run `loop.train_loop` on Ray Train workers, or go on from the last checkpoint in the folder `work`.

    `job`: "config" (of TrainConfig), "shape", "start", "vocabulary" (see `loop.fit`), "threads" (of each worker; 0: a share of the
    CPUs) and "source". Raises RunFailed where the training fails.
    """
    counts = ray.remote(num_cpus=0)(_Videos).remote()
    job = job | {"counts": counts, "cpus": int(ray.cluster_resources().get("CPU", 1))}
    total = config.train.epochs * num_videos
    started = time.monotonic()
    content = run_workers(train_loop, job, _scaling(ray, config), work, "train", counts=counts, total=total, show=show, debug=debug)
    seconds = time.monotonic() - started
    return Fitted(content["model"], content["curve"], content["seconds"], content["workers"], content["resumed_at"], seconds)


def _scaling(ray: Any, config: Config) -> Any:
    """How many workers, and what each of them takes.

    CPU workers share what the cluster has; elastic ones with `resources.threads` take so many CPUs each, so that a cluster that
    grows or shrinks holds more or fewer of them.
    """
    from ray.train import ScalingConfig

    workers: Any = config.train.num_workers
    resources = ray.cluster_resources()
    few, most = (workers, workers) if isinstance(workers, int) else workers
    gpu = resources.get("GPU", 0) >= few
    largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    cpus = min(runtime.share_cpus(resources.get("CPU", 1), most), runtime.share_cpus(largest, 1))
    if most > few and config.resources.threads and not gpu:
        cpus = config.resources.threads
    return ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpu else {}))


class _Videos:
    """Progress of a training: videos, each once an epoch; lives in a Ray actor."""

    def __init__(self) -> None:
        self.done = 0

    def set(self, done: int) -> None:
        self.done = done

    def get(self) -> tuple[int, dict[str, int]]:
        return self.done, {}
