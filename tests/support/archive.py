"""A tiny labelled archive: clips whose middle shows the colour of their class, and bad files."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

FPS = 8
NUM_FRAMES = 24
COLOURS = {"amber light": (240, 170, 20), "blue sea": (20, 60, 220), "green field": (30, 190, 40)}
CLASSES = sorted(COLOURS)


def write_clip(
    path: Path,
    label: str,
    seed: int,
    num_frames: int = NUM_FRAMES,
    size: tuple[int, int] = (96, 64),
) -> Path:
    """Grey noise with the colour of `label` in its middle third.

    A clip of one frame is all colour. The index lies at the end of the file.
    """
    rng = np.random.default_rng([seed, CLASSES.index(label)])
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"preset": "ultrafast", "g": "6", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            picture = rng.integers(90, 150, (height, width, 3))
            if num_frames // 3 <= number < num_frames - num_frames // 3:
                picture = picture // 6 + np.array(COLOURS[label]) * 5 // 6
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@dataclass
class Archive:
    """A folder of videos with `labels.csv`; paths are relative to it."""

    root: Path
    labels: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    """Path -> error type of the unusable files."""

    @property
    def paths(self) -> list[str]:
        """Every video file."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*.mp4"))

    def add(self, path: str, label: str, split: str, seed: int, **shape: object) -> None:
        """Render one labelled clip."""
        write_clip(self.root / path, label, seed, **shape)  # type: ignore[arg-type]
        self.labels[path], self.splits[path] = label, split

    def write_labels(self) -> Path:
        """labels.csv."""
        with (self.root / "labels.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "split"])
            writer.writerows(
                [path, label, self.splits[path]] for path, label in sorted(self.labels.items())
            )
        return self.root / "labels.csv"


def make_archive(root: Path, train: int = 3, val: int = 1, odd: bool = True) -> Archive:
    """`train` and `val` clips of each class.

    `odd` adds a clip of one frame, another aspect, an unlabelled clip and three broken files.
    """
    archive = Archive(root)
    for number, label in enumerate(CLASSES):
        for index in range(train + val):
            split = "train" if index < train else "val"
            archive.add(f"{split}/{number}_{index}.mp4", label, split, seed=index)
    if odd:
        archive.add("train/one_frame.mp4", CLASSES[0], "train", seed=50, num_frames=1)
        archive.add("val/portrait.mp4", CLASSES[1], "val", seed=51, size=(48, 128))
        write_clip(root / "unlabelled.mp4", CLASSES[2], seed=52)
        whole = (root / "train/0_0.mp4").read_bytes()
        for path, content, error in (
            ("train/cut.mp4", whole[: len(whole) // 2], "truncated"),
            ("train/empty.mp4", b"", "not_video"),
            ("val/text.mp4", b"this is no video\n" * 40, "not_video"),
        ):
            (root / path).write_bytes(content)
            archive.bad[path] = error
            archive.labels[path], archive.splits[path] = CLASSES[2], path.split("/")[0]
    archive.write_labels()
    return archive
