"""The training loop of a worker: its batch shares, the learning rate and checkpoints.

The order of samples and the dropout depend only on (seed, epoch, step), so a run that was killed
and resumed from a checkpoint continues as if it had never stopped.

Shapes: V videos, B videos of a batch, b of them this worker's, T frames, C classes, D dims, n
objects per frame.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsq_ray.config import TrainConfig
from tsq_ray.errors import RunFailed
from tsq_ray.model import TSQNet, TSQShape, object_embeddings, tsq_loss
from tsq_ray.networks.inference import takes_bf16
from tsq_ray.training.features import FeatureSource, source_arrays
from tsq_ray.training.resumable import STATE_FILE, distribute, worker_device

_SAMPLE = 64
"""Videos that set the initial scale of the convolutions."""
_GPU_SHARE = 0.25
"""Share of a GPU's free memory that the features may use; larger ones stay in host memory."""
_CPU = torch.device("cpu")


def fit_tsqnet(
    arrays: Mapping[str, np.ndarray],
    vocabulary: Tensor | None,
    start: Mapping[str, Tensor | None],
    shape: TSQShape,
    config: TrainConfig,
    *,
    device: torch.device | None = None,
    threads: int | None = None,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train in this process without Ray, with the same result as a single Ray Train worker.

    Args:
        arrays: "visual" float16 [V, T, D], "object_ids" int16 [V, T, n], "object_probs" float16
            [V, T, n], "targets" bool or, if soft, float16 [V, C].
        vocabulary: float [1000, Dt], embeddings of the object names; None for a VQM-only network.
        start: initial queries, "visual" [C, D] and "textual" [C, Dt]; None for a random start.
        shape: shape of the network.
        config: the settings; `num_workers` and `checkpoint_every` have no effect here.
        device: default: the CPU.
        threads: threads of torch; default: unchanged.

    Returns:
        The state dict, on the CPU, and for each epoch its number, "epoch", and its losses.

    Raises:
        RunFailed: the loss is not finite.
    """
    before, device = torch.get_num_threads(), device or _CPU
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            training = Training.begin(arrays, vocabulary, start, shape, config, device=device)
            for _ in training.epochs(training.network):
                pass
    finally:
        torch.set_num_threads(before)
    return training.state(), training.curve


@dataclass(frozen=True)
class SamplerJob:
    """What a run trains, and from what; see `fit_tsqnet`."""

    config: TrainConfig
    shape: TSQShape
    start: Mapping[str, np.ndarray | None]
    vocabulary: np.ndarray | None
    source: FeatureSource
    taught: Sequence[int] | None = None
    """The teacher's classes that have a query; None: the classes of the labels."""


def train_loop(inputs: dict[str, Any]) -> None:
    """Run one Ray Train worker on its share of every batch; gradients are averaged over workers.

    `inputs` holds the job, threads, device, and the actor that counts videos.
    """
    import ray.train

    job: SamplerJob = inputs["job"]
    config = job.config
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(inputs["threads"])
    device = worker_device(inputs["device"])
    with source_arrays(job.source) as arrays:
        if job.taught is not None:
            arrays = {**arrays, "targets": arrays["targets"][:, list(job.taught)]}
        training = Training.begin(
            arrays, job.vocabulary, job.start, job.shape, config, rank, world, device
        )
        _resume(training)
        progress = _Progress(inputs["counts"]) if rank == 0 else None
        for epoch in training.epochs(distribute(training.network, device, world), progress):
            if epoch == config.epochs or epoch % config.checkpoint_every == 0:
                _report(training, rank)


@dataclass
class Training:
    """The state of a training in one worker."""

    network: TSQNet
    optimizer: torch.optim.Optimizer
    batches: BatchShares
    config: TrainConfig
    curve: list[dict[str, float]] = field(default_factory=list)
    """The losses of each epoch so far."""
    seconds: list[float] = field(default_factory=list)
    """Duration of each epoch, including the checkpoint before it."""
    resumed_at: int = 0
    """Epochs already done when this worker started."""

    @classmethod
    def begin(
        cls,
        arrays: Mapping[str, np.ndarray],
        vocabulary: Any,
        start: Mapping[str, Any],
        shape: TSQShape,
        config: TrainConfig,
        rank: int = 0,
        world: int = 1,
        device: torch.device = _CPU,
    ) -> Training:
        """Create the same initial state on every worker.

        `vocabulary` and `start` hold tensors or arrays.
        """
        torch.manual_seed(config.seed)
        network = TSQNet(shape)
        starts = (start[name] for name in ("visual", "textual"))
        network.set_embeddings(*(None if value is None else _tensor(value) for value in starts))
        batches = BatchShares(arrays, vocabulary, config, rank, world, device)
        network.balance(*batches.sample())
        network.to(device)
        options = {name: getattr(config, name) for name in ("lr", "momentum", "weight_decay")}
        optimizer = torch.optim.SGD(network.parameters(), **options)
        return cls(network, optimizer, batches, config)

    def epochs(
        self, network: torch.nn.Module, progress: Callable[[int], None] | None = None
    ) -> Iterator[int]:
        """Train the remaining epochs and yield the number of each when it ends.

        `network` is `self.network` or a wrapper around it. `progress` is called after each step
        with the number of videos done, including those of earlier epochs.
        """
        before = time.perf_counter()
        for epoch in range(len(self.curve), self.config.epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, epoch)
            losses = train_epoch(
                network, self.optimizer, self.batches, self.config, epoch, progress
            )
            self.curve.append({"epoch": epoch + 1, **losses})
            now = time.perf_counter()
            self.seconds.append(now - before)
            before = now
            yield epoch + 1

    def state(self) -> dict[str, Tensor]:
        """Copy the network's state dict to the CPU; later steps do not change the copy."""
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.network.state_dict().items()
        }


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate, x0.1 at 1/4, 1/2 and 3/4 of the epochs (appendix A: 25, 50 and 75 of 100)."""
    return config.lr * 0.1 ** sum(epoch >= config.epochs * quarter // 4 for quarter in (1, 2, 3))


def _tensor(value: Any) -> Tensor:
    """Copy an array or tensor, which may be read-only."""
    return torch.from_numpy(np.array(value))


class BatchShares:
    """This worker's share of each global batch; the order depends only on (seed, epoch)."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        vocabulary: np.ndarray | Tensor | None,
        config: TrainConfig,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.tensors = {
            name: torch.from_numpy(value if value.flags.writeable else value.copy())
            for name, value in arrays.items()
        }
        size = sum(value.nbytes for value in self.tensors.values())
        if device.type == "cuda" and size < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            self.tensors = {name: value.to(device) for name, value in self.tensors.items()}
        self.vocabulary = _tensor(vocabulary).to(device) if vocabulary is not None else None
        self.config, self.rank, self.world, self.device = config, rank, world, device

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.tensors["targets"])

    def order(self, epoch: int) -> list[Tensor]:
        """Return the global batches of an epoch, int64 [<= B] each."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return list(torch.randperm(len(self), generator=generator).split(self.config.batch_size))

    def share(self, batch: Tensor) -> tuple[Tensor, Tensor | None, Tensor, float]:
        """Return visual [b, T, D], text [b, T, Dt], targets [b, C] and the weight of this share.

        The weight turns the mean over workers into the mean over the batch.
        """
        share = batch[self.rank :: self.world]
        weight = len(share) * self.world / len(batch)
        if not len(share):
            # fewer videos than workers: the all-reduce still needs gradients, with weight 0
            share = batch[:1]
        return *self._frames(share), self._rows("targets", share).float(), weight

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """Return visual [N, T, D] and text [N, T, Dt] of a few videos, on the CPU.

        Every worker returns the same videos.
        """
        visual, text = self._frames(
            torch.arange(min(_SAMPLE, len(self))) * len(self) // min(_SAMPLE, len(self))
        )
        return visual.cpu(), text.cpu() if text is not None else None

    def _frames(self, videos: Tensor) -> tuple[Tensor, Tensor | None]:
        visual = self._rows("visual", videos).float()
        if self.vocabulary is None:
            return visual, None
        # objects are stored most probable first
        ids, probs = (
            self._rows(name, videos)[..., : self.config.top_objects]
            for name in ("object_ids", "object_probs")
        )
        return visual, object_embeddings(ids.long(), probs.float(), self.vocabulary)

    def _rows(self, name: str, videos: Tensor) -> Tensor:
        rows = self.tensors[name]
        return rows[videos.to(rows.device)].to(self.device)


def train_epoch(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: BatchShares,
    config: TrainConfig,
    epoch: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train one epoch; return the mean of each loss over its steps and all workers."""
    network.train()
    order = batches.order(epoch)
    bf16 = takes_bf16(config.precision, batches.device)
    totals: dict[str, Tensor] = {}
    for step, batch in enumerate(order):
        # dropout is the same in a resumed run, but differs with the number of workers
        torch.manual_seed(((config.seed * 1_000_003 + epoch) * 10_007 + step) * 101 + batches.rank)
        visual, text, targets, weight = batches.share(batch)
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=bf16):
            parts = tsq_loss(network(visual, text), targets, config.task, config.alpha, config.beta)
        optimizer.zero_grad()
        (parts["loss"] * weight).backward()
        optimizer.step()
        for name, value in parts.items():
            # kept on the device, because reading a loss at every step would wait for the GPU
            totals[name] = totals.get(name, 0.0) + value.detach().double() * (
                weight / batches.world / len(order)
            )
        if progress is not None:
            progress(epoch * len(batches) + step * config.batch_size + len(batch))
    means = torch.stack(list(totals.values()))
    if batches.world > 1:
        torch.distributed.all_reduce(means)
    losses = dict(zip(totals, means.tolist(), strict=True))
    if not np.isfinite(losses["loss"]):
        raise RunFailed(
            f"train: the loss is {losses['loss']} in epoch {epoch + 1}; "
            f"lower train.lr ({config.lr})"
        )
    return losses


class _Progress:
    """Reports the number of videos done to the driver's counter, about once a second."""

    def __init__(self, counts: Any) -> None:
        self.counts, self.last_report = counts, 0.0

    def __call__(self, done: int) -> None:
        if time.monotonic() - self.last_report > 1:
            self.last_report = time.monotonic()
            self.counts.set.remote(done)


def _resume(training: Training) -> None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        content = torch.load(Path(folder, STATE_FILE), weights_only=True, map_location="cpu")
    training.network.load_state_dict(content["model"])
    training.optimizer.load_state_dict(content["optimizer"])  # to each parameter's device
    training.curve, training.seconds = content["curve"], content["seconds"]
    training.resumed_at = len(training.curve)


def _report(training: Training, rank: int) -> None:
    import ray.train

    losses = dict(training.curve[-1])
    if rank != 0:
        ray.train.report(losses)
        return
    with tempfile.TemporaryDirectory() as folder:
        content = {
            "model": training.state(),
            "optimizer": training.optimizer.state_dict(),
            "curve": training.curve,
            "seconds": training.seconds,
            "workers": training.batches.world,
            "resumed_at": training.resumed_at,
        }
        torch.save(content, Path(folder, STATE_FILE))
        ray.train.report(losses, checkpoint=ray.train.Checkpoint.from_directory(folder))
