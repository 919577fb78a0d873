"""Prepare a training on a node of the cluster: copy the features, fit heads, make prototypes.

The driver, which may run on a small head node, never reads the features.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tsq_ray.config import Config, FinetuneConfig, Task
from tsq_ray.prototypes import prototypes
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.placement import layout
from tsq_ray.runtime.session import Session
from tsq_ray.training.features import (
    FeatureSource,
    TrainingSet,
    frames_and_logits,
    open_training_set,
)
from tsq_ray.training.head import accuracy, fit_head, head_logits
from tsq_ray.training.teacher import shown_classes, taught_classes

_RETRIES = 3
_CLOSE_S = 60.0


def _cpus_of_this_node() -> int:
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    cpus = (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == node_id)
    return max(1, int(next(cpus, 1)))


class FeatureWorker:
    """Keeps the features on its node's disk for as long as it lives; runs as a Ray actor.

    Training workers on that node share them. `threads`: threads for its computations; 0 uses all
    CPUs of the node, because no other part of the run is busy until the training workers start.
    """

    def __init__(self, source: FeatureSource, threads: int, counts: Any) -> None:
        torch.set_num_threads(threads or _cpus_of_this_node())
        self.source, self.counts = source, counts
        self._stack = contextlib.ExitStack()
        self._data: TrainingSet | None = None

    def read(self) -> None:
        """Copy the features to this node, unless they are already there."""
        if self._data is None:
            training_set = open_training_set(self.source, self.counts.set.remote)
            self._data = self._stack.enter_context(training_set)

    @property
    def data(self) -> TrainingSet:
        """The features; copied again if this actor was lost and restarted."""
        self.read()
        assert self._data is not None
        return self._data

    def close(self) -> None:
        """Remove the features from this node, unless another process uses them."""
        self._stack.close()

    def taught_classes(self, min_videos: int) -> list[int]:
        """Return the classes that the teacher finds in at least `min_videos` videos."""
        return taught_classes(self.data.targets, min_videos, self.source.task)

    def fit_head(
        self, config: FinetuneConfig, task: Task, taught: list[int] | None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the weight and bias of a head, and its accuracy on the training videos.

        `taught`: with a teacher, the classes of the head.
        """
        data = self.data
        targets = data.targets if taught is None else data.targets[:, taught]
        head = fit_head(data.visual, targets, config, task, self.counts.set.remote)
        if taught is not None:
            targets = targets == targets.max(1, keepdims=True)
        return head.weight.numpy(), head.bias.numpy(), accuracy(head, data.visual, targets)

    def taught_prototypes(self, seed: int, taught: list[int]) -> np.ndarray:
        """Return one prototype per taught class, from the teacher's logits of each frame."""
        data, position = self.data, {label: number for number, label in enumerate(taught)}
        shown = shown_classes(data.targets, self.source.task)
        labels: list[list[int]] = []

        def logits_of_videos() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for video, visual, logits in frames_and_logits(data.videos):
                labels.append([position[label] for label in shown[video] if label in position])
                yield visual, logits[:, taught]

        visual, logits = itertools.tee(logits_of_videos())
        result = prototypes(
            (frames for frames, _ in visual),
            (scores for _, scores in logits),
            (labels[number] for number in range(len(data))),
            len(taught),
            seed,
            self.source.task,
        )
        return result.numpy()

    def prototypes(self, weight: np.ndarray, bias: np.ndarray, seed: int, task: Task) -> np.ndarray:
        """Return one prototype per class, from the logits of this head."""
        data = self.data
        logits = head_logits(_linear(weight, bias), data.visual)
        result = prototypes(data.visual, logits, data.labels, len(data.classes), seed, task)
        return result.numpy()


def _linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.weight.data, head.bias.data = (
        torch.from_numpy(weight.copy()),
        torch.from_numpy(bias.copy()),
    )
    return head.eval().requires_grad_(False)


class RemoteFeatures:
    """The features of a training, on a node of the cluster."""

    def __init__(
        self,
        actor: Any,
        counts: Any,
        num_videos: int,
        what: str,
        session: Session,
        observe: progress.Observe,
    ) -> None:
        self._actor, self._counts, self._num_videos = actor, counts, num_videos
        self._what, self._session, self._observe = what, session, observe

    def taught_classes(self, min_videos: int) -> list[int]:
        """Return the classes that the teacher finds in at least `min_videos` videos."""
        classes: list[int] = self._call("classes", 0, self._actor.taught_classes, min_videos)
        return classes

    def fit_head(
        self, config: FinetuneConfig, task: Task, taught: list[int] | None = None
    ) -> tuple[nn.Linear, float]:
        """Fit a linear head on that node; return it and its accuracy on the training videos.

        `taught`: with a teacher, the classes of the head.
        """
        total = config.head.epochs * self._num_videos
        arguments = (config, task, taught)
        weight, bias, share = self._call("frame head", total, self._actor.fit_head, *arguments)
        return _linear(weight, bias), share

    def taught_prototypes(self, seed: int, taught: list[int]) -> Tensor:
        """Return one prototype per taught class, float32 [C, D]."""
        result = self._call("prototypes", 0, self._actor.taught_prototypes, seed, taught)
        return torch.from_numpy(result.copy())

    def prototypes(self, head: nn.Module, seed: int, task: Task) -> Tensor:
        """Return one prototype per class, float32 [C, D]."""
        state = {name: value.numpy() for name, value in head.state_dict().items()}
        arguments = (state["weight"], state["bias"], seed, task)
        result = self._call("prototypes", 0, self._actor.prototypes, *arguments)
        return torch.from_numpy(result.copy())

    def read(self) -> None:
        """Copy the features to that node."""
        self._call("reading features", self._num_videos, self._actor.read)

    def _call(self, step: str, total: int, method: Any, *arguments: Any) -> Any:
        import ray

        what = f"{self._what}: {step}"
        try:
            ray.get(self._counts.set.remote(0))
            return progress.run_with_progress(
                lambda: ray.get(method.remote(*arguments)),
                self._counts,
                total,
                what,
                self._session,
                observe=self._observe,
            )
        except ray.exceptions.RayError as error:
            raise cluster.run_failed(error, what) from error


@contextlib.contextmanager
def features_on_worker(
    source: FeatureSource,
    num_videos: int,
    stage: Literal["train", "finetune"],
    config: Config,
    session: Session,
    observe: progress.Observe,
) -> Iterator[RemoteFeatures]:
    """Read the features on a node of the connected cluster and keep them for the `with` block.

    `stage` selects the layout and names the run in messages; `observe` is called twice a second
    while the driver waits. Raises RunFailed if the node's disk has no room or the features cannot
    be read.
    """
    import ray

    nodes = cluster.read_cluster(ray, config)
    pool = layout(stage, config, nodes, num_videos)["features"]
    counts = progress.start_counts(progress.VideoCounts)
    options: dict[str, Any] = {"num_cpus": pool.cpus, "memory": pool.memory}
    options |= {"max_restarts": _RETRIES, "max_task_retries": _RETRIES}
    options |= {"label_selector": dict(pool.labels)} if pool.labels else {}
    worker = ray.remote(**options)(FeatureWorker)
    actor: Any = worker.remote(source, config.resources.threads, counts)
    try:
        features = RemoteFeatures(actor, counts, num_videos, stage, session, observe)
        features.read()
        yield features
        with contextlib.suppress(ray.exceptions.RayError):  # a lost node has no files to remove
            ray.get(actor.close.remote(), timeout=_CLOSE_S)
    finally:
        ray.kill(actor)
