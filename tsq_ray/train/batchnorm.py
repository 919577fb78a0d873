"""Batch norm of folded weights: statistics estimated anew, without a change of what the network computes.

Weights made for inference have each batch norm folded into the convolution before it: running mean 0, running variance 1 and a bias. In
training such a layer would normalise what was never normalised, and destroy the network at the first step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tsq_ray.encoders import FrameEncoder


def folded_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Name -> the batch norms that are identity + bias. A fresh layer (no bias either) is none: it learns its statistics in training."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm) and _is_folded(module)}


def _is_folded(norm: _BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None or norm.bias is None:
        return False
    return bool((norm.running_mean == 0).all() and (norm.running_var == 1).all() and (norm.bias != 0).any())


@torch.no_grad()
def unfold_norms(network: FrameEncoder, batches: Iterable[Tensor]) -> int:
    """Give the folded batch norms the mean m and the variance v of what reaches them, weight * sqrt(v) and bias + weight * m.

    In eval mode the network computes what it did before; in training mode, where batches look like `batches`, about the same.

    Args:
        network: in eval mode; changed in place.
        batches: uint8 [N, H, W, 3] each, on the network's device.

    Returns the number of layers changed; 0 where none is folded or `batches` is empty.
    """
    folded = folded_norms(network)
    sums: dict[str, list[Tensor]] = {}

    def collect(name: str, x: Tensor) -> None:
        dims = [0, *range(2, x.ndim)]
        values = x.double()
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64)
        new = [values.sum(dims), values.square().sum(dims), count]
        sums[name] = [old + more for old, more in zip(sums[name], new, strict=True)] if name in sums else new

    hooks = [
        norm.register_forward_pre_hook(lambda _module, inputs, name=name: collect(name, inputs[0]))  # type: ignore[misc]
        for name, norm in folded.items()
    ]
    for pictures in batches if folded else ():
        network.features(pictures)
    for hook in hooks:
        hook.remove()
    for name, (total, squares, count) in sums.items():
        norm = folded[name]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = total / count
        var = (squares / count - mean.square()).clamp_min(0)
        # a folded layer divides by sqrt(1 + eps) too
        weight = norm.weight.double() / (1 + norm.eps) ** 0.5
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.bias.copy_(norm.bias.double() + weight * mean)
        norm.weight.copy_(weight * (var + norm.eps).sqrt())
    return len(sums)
