"""Folding batch norms into convolutions for inference, and unfolding them for training.

Weights made for inference have each batch norm folded into the preceding convolution: running mean
0, running variance 1 and a bias. In training, such a layer would normalise activations that were
not normalised before, and destroy the network at the first step. So its statistics are estimated
first, without changing what the network computes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tsq_ray.networks.encoder import FrameEncoder


@torch.no_grad()
def fold_batch_norms(network: nn.Module, size: int, frames: int = 1) -> int:
    """Fold each batch norm that follows a convolution into it, in place; return their number.

    In eval mode the network computes the same as before. One picture (or one clip of several
    `frames`) of `size` x `size` reveals the pairs: the input of the batch norm is the very tensor
    that the convolution returned, and both run once. If the folded network's output differs
    (because the output of a convolution is used elsewhere too), nothing is folded.
    """
    pairs = _conv_norm_pairs(network, torch.zeros(frames, 3, size, size))
    if not pairs:
        return 0
    probe = torch.linspace(-1, 1, frames * 3 * size * size).reshape(frames, 3, size, size)
    before, original_state = network(probe), copy.deepcopy(network.state_dict())
    replaced: list[tuple[nn.Conv2d, bool, str, _BatchNorm]] = []
    for conv_name, norm_name in pairs:
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        replaced.append((conv, conv.bias is not None, norm_name, norm))
        conv.weight, conv.bias = (
            nn.Parameter(weight, requires_grad=False),
            nn.Parameter(bias, requires_grad=False),
        )
        # timm's batch norms include the activation
        _replace_module(network, norm_name, getattr(norm, "act", None) or nn.Identity())
    if torch.allclose(network(probe), before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        return len(pairs)
    for conv, had_bias, norm_name, norm in replaced:
        if not had_bias:
            conv.register_parameter("bias", None)
        _replace_module(network, norm_name, norm)
    network.load_state_dict(original_state)
    return 0


def _conv_norm_pairs(network: nn.Module, probe: Tensor) -> list[tuple[str, str]]:
    """Return the names of each (convolution, batch norm) pair, in execution order."""
    # keeps the tensors alive, so that no two share an id
    made_by: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []
    calls: Counter[str] = Counter()

    def after_conv(name: str, output: Tensor) -> None:
        calls[name] += 1
        made_by[id(output)] = (name, output)

    def before_norm(name: str, x: Tensor) -> None:
        calls[name] += 1
        if id(x) in made_by:
            pairs.append((made_by[id(x)][0], name))

    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(
                module.register_forward_hook(
                    lambda _m, _i, output, name=name: after_conv(name, output)
                )
            )
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _m, inputs, name=name: before_norm(name, inputs[0])
                )
            )
    try:
        network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


def folded_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms, by name, that are the identity plus a bias.

    A fresh layer has no bias either and does not count: it learns its statistics in training.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and _is_folded(module)
    }


def _is_folded(norm: _BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None or norm.bias is None:
        return False
    return bool(
        (norm.running_mean == 0).all() and (norm.running_var == 1).all() and (norm.bias != 0).any()
    )


@torch.no_grad()
def unfold_norms(network: FrameEncoder, batches: Iterable[Tensor]) -> int:
    """Give each folded batch norm the statistics of its input: mean m and variance v.

    Its weight becomes weight * sqrt(v), its bias bias + weight * m. So the network computes the
    same as before in eval mode, and about the same in training mode on similar batches.

    Args:
        network: in eval mode; changed in place.
        batches: uint8 [N, H, W, 3] each, on the network's device.

    Returns:
        The number of layers changed; 0 if none is folded or `batches` is empty.
    """
    folded = folded_norms(network)
    sums: dict[str, list[Tensor]] = {}

    def collect(name: str, x: Tensor) -> None:
        dims = [0, *range(2, x.ndim)]
        values = x.double()
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64)
        new = [values.sum(dims), values.square().sum(dims), count]
        sums[name] = (
            [old + more for old, more in zip(sums[name], new, strict=True)] if name in sums else new
        )

    hooks = [
        norm.register_forward_pre_hook(lambda _module, inputs, name=name: collect(name, inputs[0]))
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
        # a folded layer still divides by sqrt(1 + eps)
        weight = norm.weight.double() / (1 + norm.eps) ** 0.5
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.bias.copy_(norm.bias.double() + weight * mean)
        norm.weight.copy_(weight * (var + norm.eps).sqrt())
    return len(sums)
