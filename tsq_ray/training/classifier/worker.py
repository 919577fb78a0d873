"""The training loop of a full fine-tuning worker: its batch shares, validation and checkpoints.

The order of videos, the frames, the augmentation and the dropout depend only on (seed, epoch,
step), so a run that was killed and resumed from a checkpoint continues as if it had never stopped.

Shapes: B clips of this worker's share, S segments, C classes, V videos.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tsq_ray import quality
from tsq_ray.bundle.weights import linear_head
from tsq_ray.config import FinetuneConfig, Task
from tsq_ray.model.task import classification_loss, probabilities
from tsq_ray.networks.batch_norm import folded_norms, unfold_norms
from tsq_ray.networks.encoder import FrameEncoder, create_network, split_network
from tsq_ray.networks.inference import keep_freed_memory
from tsq_ray.training.classifier.clips import Clip, ClipBatch, ClipPlan, ClipStream, epoch_batches
from tsq_ray.training.classifier.optim import clip_gradients, make_optimizer, set_lr, use_bf16
from tsq_ray.training.resumable import STATE_FILE, distribute, worker_device

_HEAD_STD = 0.01
_SAMPLE = 64
"""Videos for estimating the statistics of folded batch norms."""


@dataclass(frozen=True)
class TunePlan:
    """The settings and references that every training worker receives."""

    clips: ClipPlan
    task: Task
    num_classes: int
    num_train: int
    """Number of training videos, which come first in the table; `num_val` for validation follow."""
    num_val: int
    labels: Any
    """Ray reference to bool [V, C]."""
    backbone: Any
    """Ray reference to the state dict of the backbone."""
    threads: int
    device: str = "cpu"

    def checkpoint_due(self, epoch: int) -> bool:
        """Whether an epoch (from 0) ends with a validation and a checkpoint."""
        config = self.clips.config
        return epoch + 1 == config.epochs or (epoch + 1) % config.checkpoint_every == 0

    def num_clips(self, epochs: int) -> int:
        """Return the number of clips of the first `epochs` epochs and their validations."""
        validations = sum(self.checkpoint_due(epoch) for epoch in range(epochs))
        return epochs * self.num_train + validations * self.num_val


def start_network(job: TunePlan, backbone: dict[str, Tensor]) -> FrameEncoder:
    """Create the pretrained backbone with a new head.

    The head has small random weights, the same on every worker.
    """
    config = job.clips.config
    network = split_network(
        job.clips.model, create_network(job.clips.model, job.num_classes), with_head=False
    )
    network.backbone.load_state_dict(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network.head = linear_head(network.dim, job.num_classes)
        torch.nn.init.normal_(network.head.weight, std=_HEAD_STD)
        torch.nn.init.zeros_(network.head.bias)
    return network.requires_grad_(True)


def clip_logits(network: torch.nn.Module, pictures: Tensor, bf16: bool) -> Tensor:
    """Return the mean of the frames' logits (TSN's consensus), float32 [B, C].

    `pictures` is uint8 [B, S, H, W, 3].
    """
    frames = pictures.flatten(0, 1)
    if len(frames) == 1 and network.training:  # batch norm rejects a single value per channel
        frames = frames.repeat(2, 1, 1, 1)
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=bf16):
        _, logits = network(frames)
    logits = logits.float()
    return logits[: pictures.shape[0] * pictures.shape[1]].unflatten(0, pictures.shape[:2]).mean(1)


def smoothed(targets: Tensor, config: FinetuneConfig, task: str) -> Tensor:
    """Smooth multi-hot bool [B, C] into distributions ("single") or probabilities ("multi")."""
    values = targets.float()
    share = config.label_smoothing
    if task == "single":
        return values / values.sum(1, keepdim=True) * (1 - share) + share / values.shape[1]
    return values * (1 - share) + share / 2


def tune_loop(worker: dict[str, Any]) -> None:
    """Run one Ray Train worker."""
    import ray.train

    job: TunePlan = worker["job"]
    torch.set_num_threads(job.threads)
    if job.device == "cpu":
        keep_freed_memory()
    context = ray.train.get_context()
    tuner = _Tuner(
        job, context.get_world_rank(), context.get_world_size(), worker_device(job.device)
    )
    for epoch in range(tuner.start_epoch, job.clips.config.epochs):
        row = {"epoch": epoch + 1, **tuner.train_epoch(epoch)}
        diverged = not math.isfinite(row["loss"])
        if job.checkpoint_due(epoch) and not diverged:
            row |= tuner.validate()
        tuner.curve.append(row)
        if job.checkpoint_due(epoch) or diverged:
            tuner.report()
        if diverged:  # raises no error, because Ray Train would retry and diverge again
            return


class _Tuner:
    """The state of a training worker."""

    def __init__(self, job: TunePlan, rank: int, world: int, device: torch.device) -> None:
        import ray

        self.job, self.config = job, job.clips.config
        self.rank, self.world, self.device = rank, world, device
        self.bf16 = use_bf16(self.config.precision, device)
        self.labels = torch.from_numpy(np.array(ray.get(job.labels)))
        self.failed: dict[str, str] = {}
        """Error type by video id."""
        self.unwrapped = start_network(job, ray.get(job.backbone)).to(device)
        self.optimizer = make_optimizer(self.unwrapped, self.config)
        self.start_epoch, self.curve = self._resume()
        rows = np.arange(job.num_train)
        # only rank 0 estimates statistics: the other ranks receive its weights at the first step
        sample = (
            rows[:: -(-len(rows) // _SAMPLE)]
            if rank == 0 and not self.start_epoch and folded_norms(self.unwrapped)
            else rows[:0]
        )
        self.clips = ClipStream(job.clips, [ClipBatch(sample), *self._clip_batches()])
        if len(sample):
            self._unfold(sample)
        self.network = distribute(self.unwrapped, device, world)

    def _clip_batches(self) -> Iterator[ClipBatch]:
        for epoch in range(self.start_epoch, self.config.epochs):
            for batch in self._batches(epoch):
                yield ClipBatch(batch[self.rank :: self.world], epoch)
            if self.job.checkpoint_due(epoch):
                yield ClipBatch(self._val_rows())

    def _batches(self, epoch: int) -> list[np.ndarray]:
        return epoch_batches(self.config.seed, epoch, self.job.num_train, self.config.batch_size)

    def _val_rows(self) -> np.ndarray:
        """Return this worker's share of the validation videos."""
        return np.arange(self.job.num_train, len(self.labels))[self.rank :: self.world]

    def _resume(self) -> tuple[int, list[dict[str, float]]]:
        import ray
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0, []
        with checkpoint.as_directory() as folder:
            content = torch.load(Path(folder, STATE_FILE), weights_only=True, map_location="cpu")
        self.unwrapped.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.failed = content["failed"]
        if self.rank == 0:
            # progress includes the clips of earlier epochs
            self.job.clips.counts.add.remote([None] * self.job.num_clips(len(content["curve"])))
        return len(content["curve"]), content["curve"]

    def _take(self, rows: np.ndarray) -> tuple[Tensor | None, Tensor]:
        """Return the ok clips of `rows`, uint8 [B, S, H, W, 3], and their rows, int64 [B].

        Without an ok clip, the first is None. Failed clips are recorded in `failed`.
        """
        clips = self.clips.take(rows)
        for clip in clips:
            if clip.error_type is not None:
                self.failed[clip.video_id] = clip.error_type
        ok = [clip for clip in clips if clip.pictures is not None]
        return self._stack(ok), torch.tensor([clip.row for clip in ok], dtype=torch.int64)

    def _stack(self, clips: Sequence[Clip]) -> Tensor | None:
        if not clips:
            return None
        return torch.from_numpy(
            np.stack([clip.pictures for clip in clips if clip.pictures is not None])
        ).to(self.device, non_blocking=True)

    def _unfold(self, sample: np.ndarray) -> None:
        size = self.config.batch_size
        parts = (
            self._take(sample[start : start + size])[0] for start in range(0, len(sample), size)
        )
        unfold_norms(
            self.unwrapped, (pictures.flatten(0, 1) for pictures in parts if pictures is not None)
        )

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch; return the learning rate, and the mean training loss and accuracy.

        The means cover the videos that could be decoded; nan if none could.
        """
        self.network.train()
        sums = torch.zeros(3, dtype=torch.float64)  # loss, correct predictions, videos
        batches = self._batches(epoch)
        lr = 0.0
        for step, batch in enumerate(batches):
            lr = set_lr(self.optimizer, self.config, epoch, step, len(batches))
            # dropout is the same in a resumed run
            torch.manual_seed(
                ((self.config.seed * 1_000_003 + epoch) * 10_007 + step) * 101 + self.rank
            )
            sums += self._step(batch)
        self._sum_over_workers(sums)
        loss, accuracy = (float(value / sums[2]) for value in sums[:2])
        return {"loss": loss, "accuracy": accuracy, "lr": lr}

    def _step(self, batch: np.ndarray) -> Tensor:
        """Take one step on a global batch.

        Returns float64 [3]: sum of the losses, correct predictions and clips of this worker.
        """
        pictures, rows = self._take(batch[self.rank :: self.world])
        counted = self._sum_over_workers(torch.tensor([float(len(rows))]))
        if not counted:
            return torch.zeros(3, dtype=torch.float64)
        self.optimizer.zero_grad()
        if pictures is None:
            # the other workers wait for this one's gradients; eval mode keeps the statistics
            self.network.eval()
            size = self.job.clips.model.size
            blank = torch.zeros(1, 1, size, size, 3, dtype=torch.uint8, device=self.device)
            (clip_logits(self.network, blank, self.bf16).sum() * 0).backward()
            self.network.train()
            result = torch.zeros(3, dtype=torch.float64)
        else:
            targets = self.labels[rows].to(self.device)
            logits = clip_logits(self.network, pictures, self.bf16)
            smooth_targets = smoothed(targets, self.config, self.job.task)
            loss = classification_loss(logits, smooth_targets, self.job.task)
            # gradients are averaged over the workers; the factor gives the mean over the batch
            (loss * (len(rows) * self.world / counted)).backward()
            correct = targets[torch.arange(len(rows)), logits.argmax(1)].sum()
            sums = [float(loss.detach()) * len(rows), float(correct), float(len(rows))]
            result = torch.tensor(sums, dtype=torch.float64)
        clip_gradients(self.unwrapped, self.config.clip_grad_norm)
        self.optimizer.step()
        return result

    def _sum_over_workers(self, values: Tensor) -> float:
        """Sum `values` over the workers, in place, and return the last value."""
        if self.world > 1:
            on_device = values.to(self.device)
            dist.all_reduce(on_device)
            values.copy_(on_device)
        return float(values[-1])

    def validate(self) -> dict[str, float]:
        """Return loss, top-1 and mAP on the validation videos, from the middles of the segments."""
        if not self.job.num_val:
            return {}
        self.network.eval()
        for buffer in self.unwrapped.buffers() if self.world > 1 else ():
            dist.broadcast(buffer, 0)  # each worker has its own statistics; rank 0's are kept
        logits, rows = [torch.zeros(0, self.job.num_classes)], [torch.zeros(0, dtype=torch.int64)]
        share = self._val_rows()
        for start in range(0, len(share), self.config.batch_size):
            pictures, ok_rows = self._take(share[start : start + self.config.batch_size])
            if pictures is not None:
                with torch.inference_mode():
                    logits.append(clip_logits(self.unwrapped, pictures, self.bf16).cpu())
                rows.append(ok_rows)
        parts = self._gather((torch.cat(logits).numpy(), torch.cat(rows).numpy()))
        all_logits = torch.from_numpy(np.concatenate([part[0] for part in parts]))
        targets = self.labels[np.concatenate([part[1] for part in parts])]
        if not len(targets):
            return {}
        unsmoothed = self.config.model_copy(update={"label_smoothing": 0.0})
        loss_targets = smoothed(targets, unsmoothed, self.job.task)
        scores = probabilities(all_logits, self.job.task).numpy()
        return {
            "val_loss": float(classification_loss(all_logits, loss_targets, self.job.task)),
            "val_top1": quality.top1_accuracy(scores, targets.numpy()),
            "val_mAP": quality.mean_average_precision(scores, targets.numpy()),
        }

    def _gather(self, value: Any) -> list[Any]:
        """Return the value of every worker, on every worker."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, value)
        return parts

    def report(self) -> None:
        """Report to Ray Train, with a checkpoint from rank 0."""
        import ray.train

        self.failed = {
            video: error for part in self._gather(self.failed) for video, error in part.items()
        }
        metrics = dict(self.curve[-1])
        if self.rank != 0:
            ray.train.report(metrics)
            return
        content = {
            "model": {
                name: value.detach().cpu() for name, value in self.unwrapped.state_dict().items()
            },
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
            "failed": self.failed,
            "resumed_at": self.start_epoch,
        }
        with tempfile.TemporaryDirectory() as folder:
            torch.save(content, Path(folder, STATE_FILE))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
