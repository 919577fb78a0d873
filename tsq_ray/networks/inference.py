"""Inference with frame encoders: batch norms folded, channels last, optionally bf16 or compiled.

The copies made here are for inference only: their weights no longer match the hash that
`FrameEncoder.state_hash` returns for the original.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tsq_ray.config import ModelConfig, Precision, ResourcesConfig
from tsq_ray.decode import FrameSpec
from tsq_ray.decode.frames import crop_corner, target_size
from tsq_ray.networks.batch_norm import fold_batch_norms
from tsq_ray.networks.encoder import FrameEncoder
from tsq_ray.rows import frame_spec

DEFAULT_RESOURCES = ResourcesConfig()
"""bf16 on GPUs, fp32 on CPUs, not compiled."""
_CHUNK = {"cpu": 8, "cuda": 256}
"""Frames per forward pass. The activations of 8 stay in a CPU's cache: 1.5 times faster than 50."""


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep the memory that one layer frees for the next layer.

    glibc returns large blocks to the system, which then hands them out again page by page; this
    takes a fifth to a third of a network's time on a CPU. Peak memory stays the same. Does nothing
    with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def takes_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether a network computes in bf16.

    `auto` chooses it only on GPUs with native bf16 instructions; others emulate it slowly.
    """
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def prepare_for_inference(
    encoder: FrameEncoder, device: torch.device, resources: ResourcesConfig = DEFAULT_RESOURCES
) -> FrameEncoder:
    """Return a faster copy of an encoder on `device`; the original does not change.

    The copy computes the same, or nearly the same in bf16. Only `precision` and `compile` of
    `resources` are used; a compiled copy takes a minute for the first frames of each chunk size
    (`encode_pictures`).
    """
    if device.type == "cpu":
        keep_freed_memory()
    prepared = copy.deepcopy(encoder).cpu().eval().requires_grad_(False)
    fold_batch_norms(prepared.backbone, prepared.config.size, prepared.config.clip_frames)
    prepared.to(device=device)
    if prepared.config.clip_frames == 1:  # not for the convolutions of a video network
        prepared.backbone.to(memory_format=torch.channels_last)
    prepared.dtype = torch.bfloat16 if takes_bf16(resources.precision, device) else torch.float32
    prepared.backbone.to(prepared.dtype)
    if prepared.head is not None:
        prepared.head.to(prepared.dtype)
    if resources.compile:
        prepared.backbone.compile(
            mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False
        )
        prepared.fixed_sizes = True
    return prepared


class Pictures(NamedTuple):
    """The frames of one video for a network."""

    frames: np.ndarray
    """uint8 [n, H, W, 3], RGB."""
    native_size: bool = False
    """Whether the frames still have the size of the video and must be resized for the network."""


@torch.inference_mode()
def encode_pictures(
    encoder: FrameEncoder, pictures: Sequence[Pictures]
) -> tuple[Tensor, Tensor | None]:
    """Return the features [N, D] and logits [N, C] of N pictures in total, float32 on the CPU.

    A video network gives one row per clip: the frames of each item are cut into clips, the last of
    which is filled by repeating its last frame (`num_inputs`). The logits are None if the encoder
    has no head. Runs one chunk of frames at a time.
    """
    device, clip = next(encoder.parameters()).device, encoder.config.clip_frames
    chunk = max(1, _CHUNK[device.type] // clip) * clip
    pictures = [_whole_clips(each, clip) for each in pictures]
    features, logits = [], []
    for part in _chunks(pictures, chunk, device, frame_spec(encoder.config)):
        count = len(part) // clip
        if encoder.fixed_sizes:
            part = _padded(part, chunk, clip)
        # the next run of a CUDA graph overwrites this result
        feature = (
            encoder.features(part)[:count].clone()
            if encoder.fixed_sizes
            else encoder.features(part)
        )
        features.append(feature.float())
        if encoder.head is not None:
            logits.append(encoder.head(feature).float())
    # a single copy back at the end, so that the device computes while the next chunk is on its way
    return torch.cat(features).cpu(), torch.cat(logits).cpu() if logits else None


def _chunks(
    pictures: Sequence[Pictures], chunk: int, device: torch.device, spec: FrameSpec
) -> Iterator[Tensor]:
    """Yield uint8 [chunk, size, size, 3] on `device`, across videos; the last may be smaller."""
    waiting: list[Tensor] = []
    room = chunk
    for frames, native_size in pictures:
        start = 0
        while start < len(frames):
            # arrays from Ray's object store are read-only
            part = torch.from_numpy(
                np.require(frames[start : start + room], requirements=("C", "W"))
            )
            start, room = start + len(part), room - len(part)
            if device.type == "cuda":
                part = part.pin_memory().to(device, non_blocking=True)
            waiting.append(resize_frames(part, spec) if native_size else part)
            if not room:
                yield torch.cat(waiting)
                waiting, room = [], chunk
    if waiting:
        yield torch.cat(waiting)


def resize_frames(frames: Tensor, spec: FrameSpec) -> Tensor:
    """Resize uint8 [N, H, W, 3] to uint8 [N, size, size, 3] on the same device.

    Equals the decoder's resize with Pillow (`decode.frames.resize_picture`) except for rounding.
    """
    width, height = target_size(frames.shape[2], frames.shape[1], spec)
    resized = frames.permute(0, 3, 1, 2).float()
    if (height, width) != frames.shape[1:3]:
        resized = F.interpolate(resized, (height, width), mode=spec.interpolation, antialias=True)
    left, top = crop_corner(width, height, spec)
    resized = resized[:, :, top : top + spec.size, left : left + spec.size]
    return resized.round().clamp_(0, 255).byte().permute(0, 2, 3, 1)


def num_inputs(config: ModelConfig, count: int) -> int:
    """Return how many network inputs `count` frames of a video make: frames, or clips of them."""
    return -(-count // config.clip_frames)


def _whole_clips(pictures: Pictures, clip: int) -> Pictures:
    missing = -len(pictures.frames) % clip
    if not missing:
        return pictures
    frames = np.concatenate([pictures.frames, np.repeat(pictures.frames[-1:], missing, 0)])
    return pictures._replace(frames=frames)


def _padded(part: Tensor, chunk: int, clip: int) -> Tensor:
    """Pad [n, ...] with empty frames until the clips are a power of two, with at least 8 frames."""
    clips = max(-(-8 // clip), 1 << (len(part) // clip - 1).bit_length())
    size = min(chunk, clips * clip)
    return (
        torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
        if size > len(part)
        else part
    )
