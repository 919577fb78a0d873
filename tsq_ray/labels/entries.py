"""What all label formats share: the text of the file, and what it says about each video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tsq_ray import storage
from tsq_ray.containers import VIDEO_SUFFIXES
from tsq_ray.errors import ManifestError
from tsq_ray.labels.classes import Classes, lines_of

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Name of a split (in label files, list names, folders above class folders) -> manifest name."""


def canonical_split(name: str | None) -> str | None:
    """Return a split's name in the manifest: Training becomes train, unknown names are kept.

    None if `name` is None or empty.
    """
    return SPLITS.get(name.lower(), name) if name else None


@dataclass(frozen=True)
class Entry:
    """What a label file says about one video."""

    line: str
    name: str
    labels: tuple[str, ...]
    split: str | None = None
    keys: tuple[str, ...] = ()
    """Ids that the video's file may be named after, best first; empty if `name` is a path."""
    alternatives: tuple[str, ...] = ()
    """Other spellings of `name`, tried in turn if no video has it."""


@dataclass(frozen=True)
class LabelFile:
    """The text of a label file, and the classes that its ids refer to."""

    uri: str
    text: str
    classes: Classes | None

    @property
    def shown(self) -> str:
        """The URI without secrets, for messages."""
        return storage.redact(self.uri)

    @property
    def folder(self) -> str:
        """The folder that holds the file."""
        return storage.parent_of(self.uri)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Iterate over (number, line), skipping blank lines."""
        return (
            (number, line.strip())
            for number, line in enumerate(lines_of(self.text), 1)
            if line.strip()
        )

    def first_line(self) -> str:
        """Return the first line that is not blank; empty if all are."""
        return next((line for _, line in self.lines()), "")

    def class_names(self, numbers: Sequence[int], line: str) -> tuple[str, ...]:
        """Return the names of class ids, without repetitions. Raises ManifestError."""
        if self.classes is None:
            raise ManifestError(
                f"{self.shown}: its labels are class ids; give their names with --classes FILE, "
                "one per line in the order of the ids (lists of one data set may differ in that "
                "order: use the file that came with the list)"
            )
        return tuple(
            dict.fromkeys(
                self.classes.name_of(number, f"{self.shown} {line}") for number in numbers
            )
        )


def stem_of(name: str) -> str:
    """Return a file name without its suffix, if that is a video suffix."""
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and dot + suffix.lower() in VIDEO_SUFFIXES else name
