"""Pictures of the sample archive: a sprite per class, and the scenery that all classes share."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 320, 240
PAN = 64
"""Pixels by which a background is larger than the frame, so that the camera can pan."""
Rng = np.random.Generator

# --- evidence: one sprite (RGBA image) per class --------------------------------------------------


def _grid(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rotated coordinates of a size x size image, in about -1..1."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    angle = rng.uniform(-0.6, 0.6)
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _blend(mask: np.ndarray, on: np.ndarray, off: np.ndarray) -> np.ndarray:
    """Blend colour `on` where mask is 1 and `off` where it is 0: uint8 [size, size, 3]."""
    mask = np.clip(mask, 0, 1)[..., None]
    return np.clip(mask * on + (1 - mask) * off, 0, 255).astype(np.uint8)


def _jitter(rng: Rng, colour: tuple[int, int, int], by: float = 25) -> np.ndarray:
    return np.clip(np.array(colour) + rng.uniform(-by, by, 3), 0, 255)


def _outline(rng: Rng, size: int) -> np.ndarray:
    """Return the alpha of a soft-edged shape between an ellipse and a box: uint8 [size, size]."""
    axis = np.abs(np.linspace(-1, 1, size, dtype=np.float32))
    power = rng.uniform(2, 8)
    radius = (axis[None] ** power + axis[:, None] ** power) ** (1 / power)
    return (np.clip((1 - radius) * 20, 0, 1) * 255).astype(np.uint8)


def _textured(rng: Rng, texture: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([texture, _outline(rng, texture.shape[0])]), "RGBA")


def zebra_stripes(rng: Rng, size: int) -> Image.Image:
    """Wavy dark and light stripes."""
    x, y = _grid(rng, size)
    wave = (
        y + 0.12 * np.sin(x * rng.uniform(3, 6) + rng.uniform(0, 6)) + 0.05 * np.sin(x * 11 + y * 4)
    )
    mask = 0.5 + 3 * np.sin(wave * rng.uniform(14, 24))
    return _textured(rng, _blend(mask, _jitter(rng, (230, 225, 215)), _jitter(rng, (30, 26, 24))))


def honeycomb(rng: Rng, size: int) -> Image.Image:
    """Hexagonal wax cells."""
    x, y = _grid(rng, size)
    scale = rng.uniform(4, 7)
    points = np.stack([x, y], -1) * scale
    period = np.array([1, math.sqrt(3)], np.float32)
    near, shifted = points - np.round(points / period) * period, points - period / 2
    other = shifted - np.round(shifted / period) * period
    closest = np.where(
        (near**2).sum(-1, keepdims=True) < (other**2).sum(-1, keepdims=True), near, other
    )
    a, b = np.abs(closest[..., 0]), np.abs(closest[..., 1])
    edge = np.maximum(a, a / 2 + b * math.sqrt(3) / 2)  # 0 in a cell's centre, 0.5 on its wall
    wall = (edge - 0.40) * 30
    cell = _jitter(rng, (150, 84, 16)) * (0.6 + 0.9 * edge[..., None])
    return _textured(rng, _blend(wall, _jitter(rng, (244, 196, 72)), cell))


def checkerboard_floor(rng: Rng, size: int) -> Image.Image:
    """A tiled floor in perspective."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    depth = rng.uniform(1.5, 3.0) / (y + rng.uniform(1.4, 1.9))
    angle = rng.uniform(0, math.pi / 2)
    u, v = x * depth * 2.2, depth * 4
    tile_u, tile_v = (
        u * math.cos(angle) - v * math.sin(angle),
        u * math.sin(angle) + v * math.cos(angle),
    )
    mask = (np.floor(tile_u) + np.floor(tile_v)) % 2
    dark = (120, 24, 28) if rng.random() < 0.4 else (28, 28, 34)
    shade = (0.55 + 0.45 * (y + 1) / 2)[..., None]
    return _textured(
        rng, _blend(mask, _jitter(rng, (225, 222, 210)) * shade, _jitter(rng, dark) * shade)
    )


def spider_web(rng: Rng, size: int) -> Image.Image:
    """Threads from a centre, joined by sagging rings."""
    x, y = _grid(rng, size)
    x, y = x - rng.uniform(-0.25, 0.25), y - rng.uniform(-0.25, 0.25)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    spokes = int(rng.integers(10, 17))
    phase = (angle / (2 * math.pi) * spokes) % 1
    to_spoke = np.minimum(phase, 1 - phase)
    threads = 1.2 - to_spoke * radius * 2 * math.pi / spokes * size / 3
    rings = (radius * (1 - 0.35 * to_spoke) * rng.uniform(6, 9)) % 1
    loops = 1.2 - np.minimum(rings, 1 - rings) * size / 24
    mask = np.maximum(threads, loops)
    return _textured(
        rng, _blend(mask, _jitter(rng, (235, 238, 240), 15), _jitter(rng, (34, 44, 48), 20))
    )


def red_balls(rng: Rng, size: int) -> Image.Image:
    """A few shiny spheres."""
    x, y = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32))
    picture = np.zeros((size, size, 4), np.uint8)
    for _ in range(int(rng.integers(4, 8))):
        radius = size * rng.uniform(0.13, 0.24)
        dx = (x - rng.uniform(radius, size - radius)) / radius
        dy = (y - rng.uniform(radius, size - radius)) / radius
        distance = dx**2 + dy**2
        light = np.clip(-0.45 * dx - 0.55 * dy + 0.7 * np.sqrt(np.clip(1 - distance, 0, 1)), 0, 1)
        shaded = (
            _jitter(rng, (205, 30, 32)) * (0.3 + 0.8 * light[..., None])
            + 190 * np.clip(light[..., None], 0, 1) ** 24
        )
        inside = distance < 1
        picture[inside, :3] = np.clip(shaded, 0, 255).astype(np.uint8)[inside]
        picture[inside, 3] = 255
    return Image.fromarray(picture, "RGBA")


CLASSES: dict[str, Callable[[Rng, int], Image.Image]] = {
    "checkerboard floor": checkerboard_floor,
    "honeycomb": honeycomb,
    "red balls": red_balls,
    "spider web": spider_web,
    "zebra stripes": zebra_stripes,
}


# --- scenery: shared by all classes ---------------------------------------------------------------


def _muted(rng: Rng) -> tuple[int, int, int]:
    red, green, blue = (
        np.clip(rng.uniform(50, 205) + rng.uniform(-55, 55, 3), 0, 255).astype(int).tolist()
    )
    return red, green, blue


def _clouds(rng: Rng) -> Image.Image:
    coarse = np.array(_muted(rng)) + rng.uniform(-70, 70, (6, 8, 3))
    return Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize(
        (WIDTH + PAN, HEIGHT + PAN), Image.Resampling.BICUBIC
    )


def _skyline(rng: Rng) -> Image.Image:
    picture = Image.new("RGB", (WIDTH + PAN, HEIGHT + PAN), _muted(rng))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(8, 20))):
        left, top = int(rng.integers(-40, WIDTH + PAN)), int(rng.integers(60, HEIGHT))
        draw.rectangle(
            (left, top, left + int(rng.integers(20, 90)), HEIGHT + PAN), fill=_muted(rng)
        )
    return picture


def _page(rng: Rng) -> Image.Image:
    """Draw rows of dark marks that look like text from afar."""
    picture = Image.new(
        "RGB", (WIDTH + PAN, HEIGHT + PAN), tuple(int(v) for v in rng.integers(190, 245, 3))
    )
    draw, ink = ImageDraw.Draw(picture), _muted(rng)
    height = int(rng.integers(4, 9))
    for top in range(10, HEIGHT + PAN, height * 2 + 3):
        left = int(rng.integers(5, 60))
        while left < WIDTH + PAN - int(rng.integers(5, 120)):
            width = int(rng.integers(6, 40))
            draw.rectangle((left, top, left + width, top + height), fill=ink)
            left += width + int(rng.integers(4, 9))
    return picture


def _speckle(rng: Rng) -> Image.Image:
    noise = (
        np.array(_muted(rng))
        + rng.normal(0, rng.uniform(15, 40), (HEIGHT // 3, WIDTH // 3, 1))
        + rng.normal(0, 8, 3)
    )
    return Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).resize(
        (WIDTH + PAN, HEIGHT + PAN), Image.Resampling.BILINEAR
    )


BACKGROUNDS = (_clouds, _skyline, _page, _speckle)


def neutral(rng: Rng) -> Image.Image:
    """Draw a plain shape that carries no class information."""
    size = int(rng.integers(24, 90))
    picture = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw, colour = ImageDraw.Draw(picture), (*_muted(rng), 255)
    kind = int(rng.integers(3))
    if kind == 0:
        draw.ellipse((1, 1, size - 2, size * rng.uniform(0.4, 0.95)), fill=colour)
    elif kind == 1:
        draw.rectangle((1, 1, size - 2, size * rng.uniform(0.3, 0.95)), fill=colour)
    else:
        draw.polygon(
            [(float(px), float(py)) for px, py in rng.uniform(0, size, (3, 2))], fill=colour
        )
    return picture


def decoy(rng: Rng) -> Image.Image:
    """Draw a patch of dots, plain gradient or plaid.

    It is as large as the evidence, so that an outline alone does not give the class away.
    """
    size = int(HEIGHT * rng.uniform(0.4, 0.9))
    x, y = _grid(rng, size)
    kind, turns = int(rng.integers(3)), rng.uniform(9, 16)
    if kind == 0:
        mask = (np.sin(x * turns) * np.sin(y * turns) - 0.3) * 5
    elif kind == 1:
        mask = (x + 1) / 2
    else:
        mask = 0.5 + 0.3 * np.sin(x * turns) + 0.3 * np.sin(y * turns)
    return _textured(rng, _blend(mask, np.array(_muted(rng)), np.array(_muted(rng))))
