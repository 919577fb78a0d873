"""A frame encoder made ready to run: batch norms folded into their convolutions, channels last, bf16 where that is wanted; and pictures sent through it.

The copies made here are for inference alone: their weights are no longer those that `FrameEncoder.state_hash` names.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tsq_ray.config import Precision, ResourcesConfig
from tsq_ray.decode import FrameSpec
from tsq_ray.decode.frames import target_size
from tsq_ray.encoders import FrameEncoder
from tsq_ray.rows import frame_spec

AS_IT_COMES = ResourcesConfig()
"""bf16 on GPUs, fp32 on CPUs, not compiled."""
_CHUNK = {"cpu": 8, "cuda": 256}
"""Frames that go through a network at a time: on a CPU the activations of 8 stay in its cache, 1.5 times faster than 50 at once."""


def takes_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether a network computes in bf16: `auto` is yes on a GPU with instructions for it; others emulate it, slowly."""
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def ready(encoder: FrameEncoder, device: torch.device, how: ResourcesConfig = AS_IT_COMES) -> FrameEncoder:
    """A copy of an encoder on `device` that computes the same, faster; in bf16 nearly the same. The encoder stays as it is.

    `how`: its `precision` and `compile`; compiled, the first frames of each size of a chunk (`encode_pictures`) take a minute.
    """
    made = copy.deepcopy(encoder).cpu().eval().requires_grad_(False)
    fold_batch_norms(made.backbone, made.config.size)
    made.to(device=device)
    made.backbone.to(memory_format=torch.channels_last)
    made.dtype = torch.bfloat16 if takes_bf16(how.precision, device) else torch.float32
    made.backbone.to(made.dtype)
    if made.head is not None:
        made.head.to(made.dtype)
    if how.compile:
        made.backbone.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
        made.fixed_sizes = True
    return made


class Pictures(NamedTuple):
    """What a network is to look at of one video."""

    frames: np.ndarray
    """uint8 [n, H, W, 3], RGB."""
    whole: bool = False
    """Whether these are frames as they are, of any size, still to be resized for the network."""


@torch.inference_mode()
def encode_pictures(encoder: FrameEncoder, pictures: Sequence[Pictures]) -> tuple[Tensor, Tensor | None]:
    """N pictures in all -> features [N, D] and logits [N, C] or None, on the CPU in float32, a chunk of frames at a time."""
    device = next(encoder.parameters()).device
    chunk = _CHUNK[device.type]
    features, logits = [], []
    for part in _chunks(pictures, chunk, device, frame_spec(encoder.config)):
        count = len(part)
        if encoder.fixed_sizes:
            part = _padded(part, chunk)
        # a CUDA graph writes its next result over this one
        feature = encoder.features(part)[:count].clone() if encoder.fixed_sizes else encoder.features(part)
        features.append(feature.float())
        if encoder.head is not None:
            logits.append(encoder.head(feature).float())
    # one copy back at the end: the device goes on while the next chunk is on its way
    return torch.cat(features).cpu(), torch.cat(logits).cpu() if logits else None


def _chunks(pictures: Sequence[Pictures], chunk: int, device: torch.device, spec: FrameSpec) -> Iterator[Tensor]:
    """uint8 [n, size, size, 3] on `device`, `chunk` of them at a time and the rest last, whichever videos they are of."""
    waiting: list[Tensor] = []
    room = chunk
    for frames, whole in pictures:
        start = 0
        while start < len(frames):
            # what came through Ray's object store is read-only
            part = torch.from_numpy(np.require(frames[start : start + room], requirements=("C", "W")))
            start, room = start + len(part), room - len(part)
            if device.type == "cuda":
                part = part.pin_memory().to(device, non_blocking=True)
            waiting.append(resize_frames(part, spec) if whole else part)
            if not room:
                yield torch.cat(waiting)
                waiting, room = [], chunk
    if waiting:
        yield torch.cat(waiting)


def resize_frames(frames: Tensor, spec: FrameSpec) -> Tensor:
    """uint8 [N, H, W, 3] -> uint8 [N, size, size, 3] on the same device; as the decoder does it with Pillow (`decode.frames.fit`), but for rounding."""
    width, height = target_size(frames.shape[2], frames.shape[1], spec)
    resized = frames.permute(0, 3, 1, 2).float()
    if (height, width) != frames.shape[1:3]:
        resized = F.interpolate(resized, (height, width), mode=spec.interpolation, antialias=True)
    top, left = (height - spec.size) // 2, (width - spec.size) // 2
    resized = resized[:, :, top : top + spec.size, left : left + spec.size]
    return resized.round().clamp_(0, 255).byte().permute(0, 2, 3, 1)


def _padded(part: Tensor, chunk: int) -> Tensor:
    """[n, ...] with n made up to the next power of two of at least 8, by empty frames: few sizes to compile."""
    size = min(chunk, max(8, 1 << (len(part) - 1).bit_length()))
    return torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])]) if size > len(part) else part


@torch.no_grad()
def fold_batch_norms(network: nn.Module, size: int) -> int:
    """Fold each batch norm that follows a convolution into it, in place; how many. A network in eval mode computes what it did before.

    Which one follows which is seen on one picture of `size` x `size`: a batch norm whose input is the very tensor that a convolution gave, both
    called once. Nothing is folded where the network then computes something else (a convolution's output that is used elsewhere too).
    """
    pairs = _conv_norm_pairs(network, size)
    if not pairs:
        return 0
    probe = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
    before, kept = network(probe), copy.deepcopy(network.state_dict())
    replaced: list[tuple[nn.Conv2d, bool, str, _BatchNorm]] = []
    for conv_name, norm_name in pairs:
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        replaced.append((conv, conv.bias is not None, norm_name, norm))
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        # timm's batch norms carry the activation
        _put(network, norm_name, getattr(norm, "act", None) or nn.Identity())
    if torch.allclose(network(probe), before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        return len(pairs)
    for conv, had_bias, norm_name, norm in replaced:
        if not had_bias:
            conv.register_parameter("bias", None)
        _put(network, norm_name, norm)
    network.load_state_dict(kept)
    return 0


def _conv_norm_pairs(network: nn.Module, size: int) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm), in the order in which they run."""
    made_by: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no two have the same id
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
            hooks.append(module.register_forward_hook(lambda _m, _i, output, name=name: after_conv(name, output)))  # type: ignore[misc]
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            hooks.append(module.register_forward_pre_hook(lambda _m, inputs, name=name: before_norm(name, inputs[0])))  # type: ignore[misc]
    try:
        network(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
