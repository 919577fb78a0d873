"""Full-size frames to the wanted sizes: rotated for display, resized with antialiasing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from tsq_ray.decode.types import WHOLE, FrameSpec

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def orient(rgb: np.ndarray, matrix: Sequence[int]) -> np.ndarray:
    """Turn a stored picture [H, W, 3] into the displayed one.

    `matrix` is the 2 x 2 part (a, b, c, d) of a display matrix, rounded to quarter turns and flips.
    A point (x, y) of the stored picture is displayed at (a x + c y, b x + d y), so a transposing
    matrix has |b| > |a|.
    """
    a, b, c, d = matrix
    if abs(b) > abs(a):
        rgb = rgb.transpose(1, 0, 2)
        across, down = c, b
    else:
        across, down = a, d
    if across < 0:
        rgb = rgb[:, ::-1]
    if down < 0:
        rgb = rgb[::-1]
    return rgb


def target_size(width: int, height: int, spec: FrameSpec) -> tuple[int, int]:
    """The width and height to which a frame is resized, before any crop."""
    if spec.resize == "none":
        return width, height
    if spec.resize == "squash":
        return spec.resize_to or spec.size, spec.resize_to or spec.size
    if spec.resize == "crop" and spec.resize_to:
        short = spec.resize_to
        longer = int(short * max(width, height) / min(width, height))
        return (short, longer) if width <= height else (longer, short)
    short = spec.size if spec.resize == "keep" else round(spec.size * 8 / 7)
    if width <= height:
        return short, max(round(height * short / width), short)
    return max(round(width * short / height), short), short


def crop_corner(width: int, height: int, spec: FrameSpec) -> tuple[int, int]:
    """Return left and top of the centre that `crop` cuts out of a resized frame."""
    across, down = width - spec.size, height - spec.size
    if spec.centre == "nearest":
        return round(across / 2), round(down / 2)
    return across // 2, down // 2


def resize_picture(
    rgb: np.ndarray, spec: FrameSpec, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize uint8 [H, W, 3] to uint8 [h, w, 3] as `spec` says.

    If `size` (width, height) is given, resize to it instead.
    """
    width, height = size or target_size(rgb.shape[1], rgb.shape[0], spec)
    crops = size is None and (spec.resize == "crop" or spec.resize_to > 0)
    if (height, width) == rgb.shape[:2] and not crops:
        return rgb
    image = Image.fromarray(np.ascontiguousarray(rgb)).resize(
        (width, height), _FILTERS[spec.interpolation]
    )
    if crops:
        left, top = crop_corner(width, height, spec)
        image = image.crop((left, top, left + spec.size, top + spec.size))
    return np.asarray(image)


def _is_small(height: int, width: int, spec: FrameSpec) -> bool:
    """Whether passing on whole frames pays.

    It does not for a strip, which is enlarged many times before its centre is cropped.
    """
    return height * width <= spec.size**2 and max(height, width) <= 4 * min(height, width)


class FrameStore:
    """The N distinct frames of one video in every wanted size, collected one at a time."""

    def __init__(self, specs: Mapping[str, FrameSpec], count: int) -> None:
        self.specs = specs
        self.count = count
        self.frames: dict[str, np.ndarray] = {}
        self.width = self.height = 0
        self._filled = np.zeros(count, bool)
        self._pictures: Mapping[str, FrameSpec] = specs

    def put(self, i: int, rgb: np.ndarray) -> None:
        """Store frame i of N, uint8 [H, W, 3] as displayed."""
        if not self.width:
            self.height, self.width = rgb.shape[:2]
            whole = WHOLE in self.specs and _is_small(self.height, self.width, self.specs[WHOLE])
            self._pictures = {name: spec for name, spec in self.specs.items() if name != WHOLE}
            self.specs = {WHOLE: self.specs[WHOLE]} if whole else self._pictures
        elif WHOLE in self.frames and rgb.shape[:2] != (self.height, self.width):
            self._switch_to_resized()
        for name, spec in self.specs.items():
            # one array holds all frames, so later frames of another size get the first one's size
            size = (
                target_size(self.width, self.height, spec)
                if spec.resize in ("keep", "none")
                else None
            )
            picture = resize_picture(rgb, spec, size)
            if name not in self.frames:
                self.frames[name] = np.empty((self.count, *picture.shape), np.uint8)
            self.frames[name][i] = picture
        self._filled[i] = True

    def _switch_to_resized(self) -> None:
        """Store resized pictures instead: whole frames of several sizes do not fit one array."""
        self.specs, whole = self._pictures, self.frames.pop(WHOLE)
        for i in np.flatnonzero(self._filled):
            self.put(int(i), whole[i])

    @property
    def complete(self) -> bool:
        """Whether all N frames are stored."""
        return bool(self._filled.all())
