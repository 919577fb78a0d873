"""Label files -> entries: one reader a format, recognised by the file's first line.

    csv          path,label[,split]; several labels joined by |
    activitynet  JSON (v1.3): "database": {ID: {"subset", "annotations": [{"label"}]}}
    kinetics     CSV with youtube_id, time_start, time_end [, label, split]
    fcvid        lines `path train|test`; the 0/1 matrix FCVID_Label.txt lies beside the file
    video-list   lines `path class_id [class_id ...]` (mmaction2's video lists)
    frame-list   lines `name num_frames class_id [class_id ...]` (mmaction2's rawframes lists; with commas: AR-Net's and AdaFocus's)

A line that cannot be read is an error with its number.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tsq_ray import storage
from tsq_ray.containers import VIDEO_SUFFIXES
from tsq_ray.errors import ManifestError, StorageError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Words for a split, in files, in the names of lists and as folders above class folders -> its name in the manifest."""
_LINE_END = re.compile(r"\r\n|\n|\r")
FCVID_MATRIX = "FCVID_Label.txt"
"""Row i belongs to line i of FCVID's list of videos: 0 or 1 for each class."""


def composed(name: str) -> str:
    """`name` in Unicode's composed form (NFC): macOS writes names decomposed that look the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def split_named(word: str | None) -> str | None:
    """The split that a file's word means: Training is train; unknown words stay, an empty one is none."""
    return SPLITS.get(word.lower(), word) if word else None


def _lines_of(text: str) -> list[str]:
    """Lines as editors count them; str.splitlines also splits at U+2028 and others inside names."""
    return _LINE_END.split(text)


@dataclass(frozen=True)
class Classes:
    """Names that a class file fixes; class id `first` is the first one's."""

    uri: str
    names: list[str]
    first: int = 0

    def name_of(self, number: int, place: str) -> str:
        """The name of a class id. ManifestError, naming `place`, where there is none."""
        if not 0 <= number - self.first < len(self.names):
            last = self.first + len(self.names) - 1
            raise ManifestError(
                f"{place}: class id {number} is out of range; {storage.redact(self.uri)} has {len(self.names)} classes, {self.first} to {last}"
            )
        return self.names[number - self.first]


@dataclass(frozen=True)
class Entry:
    """What a label file says of one video."""

    line: str
    name: str
    labels: tuple[str, ...]
    split: str | None = None
    keys: tuple[str, ...] = ()
    """Ids that the video's file may be named after, best first; none: `name` is a path."""


@dataclass(frozen=True)
class LabelFile:
    """A label file as its reader needs it."""

    uri: str
    text: str
    classes: Classes | None

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return storage.redact(self.uri)

    @property
    def folder(self) -> str:
        """Where it lies."""
        return storage.parent_of(self.uri)

    def lines(self) -> Iterator[tuple[int, str]]:
        """(number, line) of those that are not blank."""
        return (
            (number, line.strip())
            for number, line in enumerate(_lines_of(self.text), 1)
            if line.strip()
        )

    def first_line(self) -> str:
        """The first that is not blank; empty where there is none."""
        return next((line for _, line in self.lines()), "")

    def class_names(self, numbers: Sequence[int], line: str) -> tuple[str, ...]:
        """The names of class ids."""
        if self.classes is None:
            raise ManifestError(
                f"{self.shown}: its labels are class ids; give their names with --classes FILE, one a line in the order of the ids "
                "(lists of one data set may differ in that order: take the file that came with the list)"
            )
        return tuple(
            dict.fromkeys(
                self.classes.name_of(number, f"{self.shown} {line}") for number in numbers
            )
        )


def stem_of(name: str) -> str:
    """A file name without a video's suffix."""
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and dot + suffix.lower() in VIDEO_SUFFIXES else name


def read_classes(uri: str) -> Classes:
    """Class names, one a line, in the order of their ids; a file that numbers its lines from 0 or 1 numbers the ids so."""
    lines = _lines_of(storage.read_text(storage.normalize(uri)))
    names = [composed(line.strip()) for line in lines if line.strip()]
    numbered = [re.match(r"(\d+)[\s,:;]+(\S.*)$", name) for name in names]
    first = 0
    if numbered and numbered[0] and numbered[0][1] in ("0", "1"):
        start = int(numbered[0][1])
        if all(match and int(match[1]) == number for number, match in enumerate(numbered, start)):
            names, first = [match[2] for match in numbered if match], start
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count != 1:
        problem = (
            f"a class name stands twice: {name!r}"
            if names
            else "no class name in it; expected one a line"
        )
        raise ManifestError(f"{storage.redact(uri)}: {problem}")
    return Classes(uri, names, first)


def _rows(
    file: LabelFile, needed: Sequence[str], optional: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """(line, column -> value) of a CSV with a header; blank lines are passed over."""
    # newline="": a line may also end in \r alone
    reader = csv.reader(io.StringIO(file.text, newline=""), strict=True, skipinitialspace=True)
    columns: list[str] = []
    try:
        for cells in reader:
            values = [cell.strip() for cell in cells]
            if not any(values):
                continue
            if not columns:
                columns = values
                if not set(needed) <= set(columns):
                    raise ManifestError(
                        f"{file.shown}: columns are {columns}; expected {','.join(needed)}{optional}"
                    )
            elif len(values) != len(columns) or not values[columns.index(needed[0])]:
                raise ManifestError(
                    f"{file.shown} line {reader.line_num}: got {','.join(cells)[:80]!r}; expected {','.join(columns)} "
                    "(a value with a comma in it stands in quotes)"
                )
            else:
                _check_quotes(f"{file.shown} line {reader.line_num}", cells)
                yield f"line {reader.line_num}", dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise ManifestError(
            f"{file.shown} line {reader.line_num}: not CSV ({error}); expected {','.join(needed)}{optional}"
        ) from None


def _check_quotes(place: str, cells: Sequence[str]) -> None:
    for cell in cells:
        if cell[:1].isspace() and cell.strip().startswith('"'):
            raise ManifestError(
                f"{place}: {cell[:80]!r} keeps its quotes; expected them right after a comma, or a comma and blanks"
            )


def _columns(first_line: str) -> set[str]:
    return {name.strip().strip('"') for name in first_line.split(",")}


def _read_csv(file: LabelFile) -> list[Entry]:
    entries = []
    for line, row in _rows(file, ("path", "label"), "[,split]"):
        labels = tuple(
            dict.fromkeys(part.strip() for part in row["label"].split("|") if part.strip())
        )
        entries.append(Entry(line, row["path"], labels, split_named(row.get("split"))))
    return entries


def _read_kinetics(file: LabelFile) -> list[Entry]:
    entries = []
    for line, row in _rows(file, ("youtube_id", "time_start", "time_end"), "[,label][,split]"):
        try:
            start, end = (round(float(row[name])) for name in ("time_start", "time_end"))
        except (ValueError, OverflowError):
            raise ManifestError(
                f"{file.shown} {line}: got time_start {row['time_start']!r} and time_end {row['time_end']!r}; expected seconds"
            ) from None
        video = row["youtube_id"]
        clip = f"{video}_{start:06d}_{end:06d}"
        labels = (
            (row["label"],) if row.get("label") else ()
        )  # some test sets keep their labels back
        split = split_named(row.get("split"))
        entries.append(Entry(line, clip, labels, split, keys=(clip, video)))
    return entries


def _read_activitynet(file: LabelFile) -> list[Entry]:
    try:
        database: dict[str, Any] = json.loads(file.text)["database"]
        videos = list(database.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"{file.shown}: not ActivityNet JSON: no usable 'database' ({error!r})"
        ) from None
    entries = []
    for key, video in videos:
        try:
            labels = tuple(
                dict.fromkeys(str(part["label"]) for part in video.get("annotations", ()))
            )
            subset = None if video.get("subset") is None else str(video["subset"])
        except (KeyError, TypeError, AttributeError):
            raise ManifestError(
                f"{file.shown}: not ActivityNet JSON: {key!r} is {str(video)[:80]!r}; expected 'subset' and 'annotations' with a 'label' each"
            ) from None
        entries.append(Entry(repr(key), key, labels, split_named(subset), keys=(key,)))
    return entries


def _read_fcvid(file: LabelFile) -> list[Entry]:
    place = storage.join(file.folder, FCVID_MATRIX)
    try:
        rows = _lines_of(storage.read_text(place))
    except StorageError as error:
        raise ManifestError(
            f"{file.shown}: a list of FCVID's videos needs {FCVID_MATRIX} beside it: {error}"
        ) from None
    while rows and not rows[-1].strip():
        rows.pop()
    lines = list(file.lines())
    if len(rows) != len(lines):
        raise ManifestError(
            f"{storage.redact(place)}: {len(rows)} lines; expected {len(lines)}, one for each video of {file.shown}"
        )
    entries = []
    for row, (number, line) in enumerate(lines):
        name, _, split = line.replace("\t", " ").rpartition(" ")
        if not name.strip() or split.lower() not in SPLITS:
            raise ManifestError(
                f"{file.shown} line {number}: got {line[:80]!r}; expected a path and {' or '.join(sorted(SPLITS))}"
            )
        numbers = _ones(rows[row], f"{storage.redact(place)} line {row + 1}", file.classes)
        labels = file.class_names(numbers, f"line {number}")
        entries.append(Entry(f"line {number}", name.strip(), labels, SPLITS[split.lower()]))
    return entries


def _ones(row: str, place: str, classes: Classes | None) -> list[int]:
    """The class ids of a row of 0 and 1."""
    cells = re.split(r"[\s,]+", row.strip())
    if not set(cells) <= {"0", "1"} or (classes is not None and len(cells) != len(classes.names)):
        expected = f"{len(classes.names)} values, " if classes else ""
        raise ManifestError(
            f"{place}: {len(cells)} values, {row[:40]!r}; expected {expected}each 0 or 1, one for each class"
        )
    first = classes.first if classes else 0
    return [number for number, cell in enumerate(cells, first) if cell == "1"]


_LIST_LINE = re.compile(
    r"(?P<path>\S.*?)(?P<gap>\s*,\s*|\s+)(?P<numbers>\d+(?:(?:\s*,\s*|\s+)\d+)*)$"
)
"""A path, which may hold blanks, and the numbers after it."""


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _read_list(file: LabelFile, frames: bool) -> list[Entry]:
    """A list with a class id or more a line; `frames`: the number of frames stands before them."""
    entries = []
    split = _split_of(file.uri)
    for number, line in file.lines():
        match = _LIST_LINE.match(line)
        numbers = _numbers(match["numbers"])[int(frames) :] if match else []
        if match is None or not numbers:
            expected = (
                "name num_frames class_id [class_id ...]"
                if frames
                else "path class_id [class_id ...]"
            )
            raise ManifestError(
                f"{file.shown} line {number}: got {line[:80]!r}; expected {expected}"
            )
        entries.append(
            Entry(
                f"line {number}", match["path"], file.class_names(numbers, f"line {number}"), split
            )
        )
    return entries


def _split_of(uri: str) -> str | None:
    """The split that a list's name has as a word: anet_val_video.txt is val; None where it has none or several."""
    words = re.split(r"[^a-z]+", storage.name_of(uri).lower())
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 else None


def _is_fcvid(first_line: str) -> bool:
    words = first_line.split()
    return len(words) > 1 and words[-1].lower() in SPLITS


def _is_list(first_line: str, frames: bool) -> bool:
    """A path with a video's suffix, or ids joined by commas after a blank, make a list of videos; two numbers or more one of frames."""
    match = _LIST_LINE.match(first_line)
    if match is None:
        return False
    name = posixpath.basename(match["path"])
    of_videos = stem_of(name) != name or ("," in match["numbers"] and "," not in match["gap"])
    return not of_videos and len(_numbers(match["numbers"])) > 1 if frames else of_videos


@dataclass(frozen=True)
class Reader:
    """How a format is named in messages, recognised from a file's first line, and read."""

    layout: str
    recognise: Callable[[str], bool]
    read: Callable[[LabelFile], list[Entry]]
    anywhere: bool = True
    """Whether a path is looked for below the sources too, and not beside the label file alone."""


READERS: dict[str, Reader] = {
    "activitynet": Reader(
        "JSON with a 'database'", lambda line: line.startswith("{"), _read_activitynet
    ),
    "kinetics": Reader(
        "CSV with youtube_id,time_start,time_end",
        lambda line: "youtube_id" in _columns(line),
        _read_kinetics,
    ),
    "csv": Reader(
        "path,label[,split]",
        lambda line: {"path", "label"} <= _columns(line),
        _read_csv,
        anywhere=False,
    ),
    "fcvid": Reader(
        f"lines of a path and train or test, {FCVID_MATRIX} beside it", _is_fcvid, _read_fcvid
    ),
    "video-list": Reader(
        "lines path class_id ...",
        lambda line: _is_list(line, False),
        lambda file: _read_list(file, False),
    ),
    "frame-list": Reader(
        "lines name num_frames class_id ...",
        lambda line: _is_list(line, True),
        lambda file: _read_list(file, True),
    ),
}
"""The known formats, in the order in which they are tried."""


def recognise(file: LabelFile) -> str:
    """The name of a file's format. ManifestError, naming the known ones, where its first line fits none."""
    for name, reader in READERS.items():
        if reader.recognise(file.first_line()):
            return name
    known = ", ".join(f"{name} ({reader.layout})" for name, reader in READERS.items())
    raise ManifestError(
        f"{file.shown}: not a label file that is known; it begins with {file.first_line()[:80]!r}; known: {known}; "
        "--labels-format NAME reads it as one of them"
    )
