"""Optimiser, learning rate and precision of full fine-tuning."""

from __future__ import annotations

import math

import torch
from torch import nn

from tsq_ray.config import FinetuneConfig, Precision
from tsq_ray.networks.encoder import FrameEncoder
from tsq_ray.networks.inference import takes_bf16


def make_optimizer(network: FrameEncoder, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Create SGD with momentum 0.9, or AdamW, with up to four parameter groups.

    Backbone and head each have a group with weight decay and one without (biases, norms).
    """
    groups = []
    assert network.head is not None
    for module, scale in ((network.backbone, 1.0), (network.head, config.head_lr_factor)):
        for decayed in (True, False):
            parameters = [value for value in module.parameters() if (value.ndim > 1) == decayed]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "weight_decay": config.weight_decay if decayed else 0.0,
                        "scale": scale,
                    }
                )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)


def lr_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Fraction of the peak learning rate at a step (from 0): linear warm-up, then cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


def set_lr(
    optimizer: torch.optim.Optimizer,
    config: FinetuneConfig,
    epoch: int,
    step: int,
    steps_per_epoch: int,
) -> float:
    """Set the learning rate of a step in every group and return that of the backbone."""
    total = config.epochs * steps_per_epoch
    lr = config.lr * lr_factor(
        epoch * steps_per_epoch + step, total, round(config.warmup_epochs * steps_per_epoch)
    )
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: as `takes_bf16`, and for `auto` on CPUs that support it."""
    if precision == "auto" and device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return takes_bf16(precision, device)


def clip_gradients(network: nn.Module, limit: float) -> None:
    """Scale gradients down to norm `limit` if it is exceeded; 0 disables clipping."""
    if limit:
        nn.utils.clip_grad_norm_(network.parameters(), limit)
