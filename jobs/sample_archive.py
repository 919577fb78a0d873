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
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from jobs.sample_pictures import BACKGROUNDS, CLASSES, HEIGHT, PAN, WIDTH, Rng, decoy, neutral

FPS = 10
SPLITS = ("train", "val")


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
        shapes = [decoy(rng)] * (rng.random() < 0.5) + [
            neutral(rng) for _ in range(int(rng.integers(1, 4)))
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
    if annotations.exists() and (found := json.loads(annotations.read_text()).get("seed")) != seed:
        raise ValueError(
            f"{root} holds an archive of seed {found}, not {seed}; "
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
