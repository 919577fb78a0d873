"""A library's preprocessing for a network, expressed as settings.

What a library's transform does is measured on pictures, not read from its options, which differ
between libraries and classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tsq_ray.decode import Centre, FrameSpec
from tsq_ray.decode.frames import resize_picture
from tsq_ray.errors import ModelError
from tsq_ray.rows import centre_of

Apply = Callable[[np.ndarray], np.ndarray]
"""uint8 [H, W, 3] to float [3, size, size]."""
_MAX_ENLARGEMENT = 1.3
"""The shorter side before the crop is at most this many times the size."""
_MAX_DIFFERENCE = 1.0
"""Maximum mean difference from the library's picture, of 255 levels: resizes round differently."""


def preprocessing_of(apply: Apply, kind: str, what: str) -> dict[str, Any]:
    """Return the ModelConfig fields `size`, `resize`, `resize_to`, `interpolation`, `mean`, `std`.

    `kind` is the library of the network. Raises ModelError if no values do what `apply` does.
    """
    black, white = (apply(np.full((240, 320, 3), level, np.uint8)) for level in (0, 255))
    if black.ndim != 3 or black.shape[0] != 3 or black.shape[1] != black.shape[2]:
        raise ModelError(f"{what}: makes pictures of shape {black.shape}, not 3 x size x size")
    size = int(black.shape[1])
    std = 1 / (white - black).mean((1, 2))
    mean = -black.mean((1, 2)) * std
    red = np.zeros((240, 320, 3), np.uint8)
    red[..., 0] = 255
    expected = np.where(np.arange(3)[:, None, None] == 0, white, black)
    if not np.allclose(apply(red), expected, atol=0.05 * float(np.abs(white - black).max())):
        raise ModelError(f"{what}: mixes or reorders the colours, which this package cannot do")

    def levels(picture: np.ndarray) -> np.ndarray:
        return (apply(picture) * std[:, None, None] + mean[:, None, None]) * 255

    pictures = [_picture(300, 420), _picture(380, 290)]
    targets = [levels(picture) for picture in pictures]

    def difference(spec: FrameSpec) -> float:
        return max(
            float(np.abs(resize_picture(picture, spec).transpose(2, 0, 1) - target).mean())
            for picture, target in zip(pictures, targets, strict=True)
        )

    best = min(_candidates(size, centre_of(kind)), key=difference)
    if difference(best) > _MAX_DIFFERENCE:
        raise ModelError(
            f"{what}: resizes pictures in a way that this package cannot reproduce (the closest, "
            f"{best.resize}, differs by {difference(best):.1f} of 255 levels)"
        )
    return {
        "size": size,
        "resize": best.resize,
        "resize_to": best.resize_to,
        "interpolation": best.interpolation,
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(float(value), 6) for value in std],
    }


def _candidates(size: int, centre: Centre) -> list[FrameSpec]:
    specs = []
    for interpolation in ("bilinear", "bicubic"):
        specs.append(FrameSpec(size, "squash", interpolation))
        for shorter in range(size + 1, int(size * _MAX_ENLARGEMENT) + 1):
            specs.append(FrameSpec(size, "squash", interpolation, shorter, centre))
        for shorter in range(size, int(size * _MAX_ENLARGEMENT) + 1):
            specs.append(FrameSpec(size, "crop", interpolation, shorter, centre))
    return specs


def _picture(height: int, width: int) -> np.ndarray:
    """Return a picture with smooth parts, edges and noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(rows / (9 + 7 * c) + columns / (13 - 3 * c)) for c in range(3)]
    picture = np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    picture[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 120)
    return picture.clip(0, 255).astype(np.uint8)
