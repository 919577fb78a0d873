"""Render a small labelled archive of untrimmed videos.

python jobs/sample_archive.py OUT [--videos-per-class N] [--seed S]

Each video lasts about 20 s, of which only 10 to 20 % shows its class. The rest is scenery shared by
all classes, plus in some videos a glimpse of another class. The frames worth choosing are therefore
known:

    OUT/<split>/<class_folder>/NNN.mp4   split: train | val
    OUT/labels.csv                       path,label,split (paths relative to OUT)
    OUT/annotations.json                 {"videos": {path: {"label": ..., "segments": [...]}}},
                                         each segment [start_s, end_s]

Drawn with numpy and Pillow; nothing is downloaded, and the same seed gives the same files.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, FPS = 320, 240, 10
PAN = 64  # pixels by which a background is larger than the frame, so that the camera can pan
SPLITS = ("train", "val")
Rng = np.random.Generator


@dataclass(frozen=True)
class Shot:
    """A sprite shown from frame `first` until before frame `stop`."""

    class_name: str
    first: int
    stop: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """The contents of one video.

    `evidence` of its class, perhaps a `glimpse` of another, and scenery that changes at `cuts`.
    """

    label: str
    num_frames: int
    keyframe_every: int
    evidence: tuple[Shot, ...]
    glimpse: tuple[Shot, ...]
    cuts: tuple[int, ...]
    seed: int

    @property
    def segments(self) -> list[list[float]]:
        """Start and end of the evidence, in seconds."""
        return [[shot.first / FPS, shot.stop / FPS] for shot in self.evidence]


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


def _neutral(rng: Rng) -> Image.Image:
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


def _decoy(rng: Rng) -> Image.Image:
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


# --- videos ---------------------------------------------------------------------------------------


def plan_video(label: str, others: list[str], rng: Rng) -> Plan:
    """Choose what a video of class `label` shows, and when."""
    num_frames = int(rng.integers(18 * FPS, 22 * FPS + 1))
    total = round(num_frames * rng.uniform(0.105, 0.195))
    lengths = [total]
    if total >= 3 * FPS:
        first = int(rng.integers(round(1.5 * FPS), total - round(1.5 * FPS) + 1))
        lengths = [first, total - first]
    shown = [label] * len(lengths)
    if others and rng.random() < 0.4:
        lengths.append(int(rng.integers(FPS // 2, FPS)))
        shown.append(str(rng.choice(others)))
    timeline = zip(shown, lengths, _starts(lengths, num_frames, rng), strict=True)
    shots = [
        Shot(name, first, first + length, int(rng.integers(2**31)))
        for name, length, first in timeline
    ]
    cuts, at = [0], 0
    while (at := at + int(rng.integers(3 * FPS, 7 * FPS))) < num_frames - FPS:
        cuts.append(at)
    return Plan(
        label=label,
        num_frames=num_frames,
        keyframe_every=int(rng.integers(2 * FPS, 5 * FPS + 1)),
        evidence=tuple(
            sorted(
                (shot for shot in shots if shot.class_name == label), key=lambda shot: shot.first
            )
        ),
        glimpse=tuple(shot for shot in shots if shot.class_name != label),
        cuts=tuple(cuts),
        seed=int(rng.integers(2**31)),
    )


def _starts(lengths: list[int], num_frames: int, rng: Rng) -> list[int]:
    """Return the first frame of each shot; shots are in random order, at least a second apart."""
    order = rng.permutation(len(lengths))
    slack = num_frames - sum(lengths) - FPS * (len(lengths) - 1)
    gaps = np.sort(rng.integers(0, slack + 1, len(lengths)))
    starts, used = [0] * len(lengths), 0
    for place, shot in enumerate(order):
        starts[shot] = int(gaps[place]) + used
        used += lengths[shot] + FPS
    return starts


def frames(plan: Plan) -> Iterator[np.ndarray]:
    """Yield the frames of a video: uint8 [HEIGHT, WIDTH, 3]."""
    shots = [(shot, *_staging(shot)) for shot in (*plan.evidence, *plan.glimpse)]
    for number, first in enumerate(plan.cuts):
        stop = plan.cuts[number + 1] if number + 1 < len(plan.cuts) else plan.num_frames
        rng = np.random.default_rng([plan.seed, number])
        background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))](rng)
        pan = rng.uniform(0, PAN, (2, 2))
        shapes = [_decoy(rng)] * (rng.random() < 0.5) + [
            _neutral(rng) for _ in range(int(rng.integers(1, 4)))
        ]
        moving = [
            (shape, rng.uniform((-30, -30), (WIDTH - 60, HEIGHT - 60), (2, 2))) for shape in shapes
        ]
        for index in range(first, stop):
            along = (index - first) / (stop - first)
            left, top = _between(pan, along)
            picture = background.crop((left, top, left + WIDTH, top + HEIGHT))
            for shape, path in moving:
                picture.paste(shape, _between(path, along), shape)
            for shot, sprite, path in shots:
                if shot.first <= index < shot.stop:
                    picture.paste(
                        sprite,
                        _between(path, (index - shot.first) / (shot.stop - shot.first)),
                        sprite,
                    )
            yield np.asarray(picture)


def _staging(shot: Shot) -> tuple[Image.Image, np.ndarray]:
    """Return a shot's sprite and the ends of its path across the frame: [2, 2] (x, y)."""
    rng = np.random.default_rng(shot.seed)
    size = int(HEIGHT * rng.uniform(0.6, 1.05))
    sprite = CLASSES[shot.class_name](rng, size)
    centre = np.array([(WIDTH - size) / 2, (HEIGHT - size) / 2])
    return sprite, centre + rng.uniform((-60, -30), (60, 30), (2, 2))


def _between(ends: np.ndarray, along: float) -> tuple[int, int]:
    x, y = (ends[0] + (ends[1] - ends[0]) * along).astype(int).tolist()
    return x, y


def write_video(path: Path, plan: Plan) -> None:
    """Encode a plan as H.264 in MP4.

    One thread and no scene-cut keyframes, so that the bytes depend only on the plan.
    """
    with av.open(str(path), "w") as container:
        options = {
            "preset": "ultrafast",
            "crf": "25",
            "g": str(plan.keyframe_every),
            "sc_threshold": "0",
            "threads": "1",
        }
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in frames(plan):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def plan_archive(videos_per_class: int, val_per_class: int, seed: int) -> dict[str, Plan]:
    """Return the plan of every video in the archive, by relative path."""
    plans: dict[str, Plan] = {}
    for split_number, (split, count) in enumerate(
        zip(SPLITS, (videos_per_class, val_per_class), strict=True)
    ):
        for class_number, label in enumerate(CLASSES):
            others = [name for name in CLASSES if name != label]
            for index in range(count):
                rng = np.random.default_rng([seed, split_number, class_number, index])
                plans[f"{split}/{label.replace(' ', '_')}/{index:03d}.mp4"] = plan_video(
                    label, others, rng
                )
    return plans


def render_archive(
    out: str | Path, videos_per_class: int = 16, val_per_class: int | None = None, seed: int = 0
) -> Path:
    """Render the archive into the folder `out` and return it.

    `videos_per_class` are for training; `val_per_class` (default: 3 for every 8 training videos, at
    least 1) for validation. Existing videos are kept, and each appears under its name only once it
    is complete. Raises ValueError if there would be nothing to train on, or if the folder holds an
    archive of another seed.
    """
    if videos_per_class < 1:
        raise ValueError(f"videos_per_class is {videos_per_class}; it must be at least 1")
    val_per_class = max(1, videos_per_class * 3 // 8) if val_per_class is None else val_per_class
    root = Path(out)
    annotations = root / "annotations.json"
    if annotations.exists() and (there := json.loads(annotations.read_text()).get("seed")) != seed:
        raise ValueError(
            f"{root} holds an archive of seed {there}, not {seed}; "
            "name another folder or delete that one"
        )
    plans = plan_archive(videos_per_class, val_per_class, seed)
    root.mkdir(parents=True, exist_ok=True)
    videos = {
        path: {"label": plan.label, "segments": plan.segments} for path, plan in plans.items()
    }
    annotations.write_text(json.dumps({"seed": seed, "videos": videos}, indent=1) + "\n")
    for path, plan in plans.items():
        target = root / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}")
            write_video(partial, plan)
            partial.rename(target)
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows([path, plan.label, path.split("/")[0]] for path, plan in plans.items())
    return root


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Render a small labelled archive of untrimmed videos."
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--videos-per-class",
        type=int,
        default=16,
        metavar="N",
        help="training videos per class (default 16)",
    )
    parser.add_argument(
        "--val-per-class",
        type=int,
        metavar="N",
        help="validation videos per class (default: 3/8 of N)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="another seed gives another archive (default 0)",
    )
    args = parser.parse_args()
    if args.videos_per_class < 1 or (args.val_per_class is not None and args.val_per_class < 0):
        parser.error("--videos-per-class must be at least 1 and --val-per-class at least 0")
    try:
        root = render_archive(args.out, args.videos_per_class, args.val_per_class, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"rendered {len(list(root.glob('*/*/[!.]*.mp4')))} videos of {len(CLASSES)} classes "
        f"in {root}"
    )


if __name__ == "__main__":
    main()
