"""What a training worker does: its share of every batch, the schedule, checkpoints.

The order of samples and the dropout hang on (seed, epoch, step) alone, so a run that was killed and resumed from a checkpoint goes on as
if it had not been. Legend: B batch, b this worker's share of it, T frames, C classes, D dims.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsq_ray.config import TrainConfig
from tsq_ray.errors import RunFailed
from tsq_ray.model import TSQNet, TSQShape, object_embeddings, tsq_loss

STATE_FILE = "state.pt"
"""In a checkpoint: the model, the optimiser, the losses of each epoch so far."""
_SAMPLE = 64
"""Videos that set the scale of the convolutions."""


def train_loop(job: dict[str, Any]) -> None:
    """One worker: its share of every batch, gradients averaged over the workers."""
    import ray
    import ray.train
    from ray.train.torch import get_device, prepare_model

    torch.set_num_threads(job["threads"])
    config = TrainConfig.model_validate(job["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    arrays = ray.get(job["data"])
    device = get_device()
    torch.manual_seed(config.seed)
    bare = TSQNet(TSQShape(**job["shape"]))
    bare.set_embeddings(*(torch.from_numpy(value.copy()) if value is not None else None for value in job["start"].values()))
    batches = Batches(arrays, job["vocabulary"], config, rank, world, device)
    bare.balance(*batches.sample())
    optimizer = torch.optim.SGD(bare.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    first, curve = _resume(bare, optimizer)
    network = prepare_model(bare.to(device))
    _to_device(optimizer, device)
    for epoch in range(first, config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch)
        losses = train_epoch(network, optimizer, batches, config, epoch)
        curve.append({"epoch": epoch + 1, **losses})
        last = epoch + 1 == config.epochs
        if rank == 0:
            job["counts"].set.remote(epoch + 1)
        if last or (epoch + 1) % config.checkpoint_every == 0:
            _report(bare, optimizer, curve, rank)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """x0.1 at 1/4, 1/2 and 3/4 of the epochs (appendix A: 25, 50 and 75 of 100)."""
    return config.lr * 0.1 ** sum(epoch >= config.epochs * quarter // 4 for quarter in (1, 2, 3))


class Batches:
    """This worker's share of each global batch, in an order that hangs on (seed, epoch) alone."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        vocabulary: np.ndarray | None,
        config: TrainConfig,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        self.vocabulary = torch.from_numpy(np.array(vocabulary)).to(device) if vocabulary is not None else None
        self.config, self.rank, self.world, self.device = config, rank, world, device

    def order(self, epoch: int) -> list[Tensor]:
        """The global batches of an epoch: int64 [<= B] each."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return list(torch.randperm(len(self.tensors["targets"]), generator=generator).split(self.config.batch_size))

    def share(self, batch: Tensor) -> tuple[Tensor, Tensor | None, Tensor, float]:
        """(visual [b, T, D], text [b, T, Dt], targets [b, C], weight): weight makes the mean over workers the mean over the batch."""
        mine = batch[self.rank :: self.world]
        weight = len(mine) * self.world / len(batch)
        if not len(mine):  # fewer videos than workers: compute one for the sake of the collective, count none
            mine = batch[:1]
        return *self._frames(mine), self.tensors["targets"][mine].to(self.device).float(), weight

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """The same few videos on every worker, on the CPU: (visual [n, T, D], text [n, T, Dt])."""
        num_videos = len(self.tensors["targets"])
        visual, text = self._frames(torch.arange(min(_SAMPLE, num_videos)) * num_videos // min(_SAMPLE, num_videos))
        return visual.cpu(), text.cpu() if text is not None else None

    def _frames(self, videos: Tensor) -> tuple[Tensor, Tensor | None]:
        visual = self.tensors["visual"][videos].to(self.device, non_blocking=True).float()
        if self.vocabulary is None:
            return visual, None
        ids, probs = (self.tensors[name][videos].to(self.device, non_blocking=True) for name in ("object_ids", "object_probs"))
        return visual, object_embeddings(ids.long(), probs.float(), self.vocabulary)


def train_epoch(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, config: TrainConfig, epoch: int
) -> dict[str, float]:
    """One pass: mean of each loss over the steps, as this worker saw them."""
    network.train()
    totals: dict[str, float] = {}
    order = batches.order(epoch)
    for step, batch in enumerate(order):
        # dropout is the same in an undisturbed and in a resumed run
        torch.manual_seed(((config.seed * 1_000_003 + epoch) * 10_007 + step) * 101 + batches.rank)
        visual, text, targets, weight = batches.share(batch)
        parts = tsq_loss(network(visual, text), targets, config.task, config.alpha, config.beta)
        optimizer.zero_grad()
        (parts["loss"] * weight).backward()
        optimizer.step()
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach()) / len(order)
    if not np.isfinite(totals["loss"]):
        raise RunFailed(f"train: the loss is {totals['loss']} in epoch {epoch + 1}; lower train.lr ({config.lr})")
    return totals


def _resume(network: TSQNet, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, float]]]:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, []
    with checkpoint.as_directory() as folder:
        content = torch.load(Path(folder, STATE_FILE), weights_only=True, map_location="cpu")
    network.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return len(content["curve"]), content["curve"]


def _to_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(device)


def _report(network: TSQNet, optimizer: torch.optim.Optimizer, curve: list[dict[str, float]], rank: int) -> None:
    import ray.train

    if rank != 0:
        ray.train.report(dict(curve[-1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = {name: value.detach().cpu() for name, value in network.state_dict().items()}
        torch.save({"model": model, "optimizer": optimizer.state_dict(), "curve": curve}, Path(folder, STATE_FILE))
        ray.train.report(dict(curve[-1]), checkpoint=ray.train.Checkpoint.from_directory(folder))
