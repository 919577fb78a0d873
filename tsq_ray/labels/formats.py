"""Read label files into entries: one reader per format, recognised by the file's first line.

    csv          path,label[,split]; several labels joined by |
    activitynet  JSON (v1.3): "database": {ID: {"subset", "annotations": [{"label"}]}}
    label-studio JSON or JSON-MIN, exported by Label Studio: [{"data", "annotations"}]
    kinetics     CSV with youtube_id, time_start, time_end [, label, split]
    fcvid        lines `path train|test`; the 0/1 matrix FCVID_Label.txt is in the same folder
    video-list   lines `path class_id [class_id ...]` (mmaction2's video lists)
    frame-list   lines `name num_frames class_id [class_id ...]` (mmaction2's rawframes lists;
                 with commas: AR-Net's and AdaFocus's)

A line that cannot be read is an error that gives its number.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tsq_ray import storage
from tsq_ray.errors import ManifestError, StorageError
from tsq_ray.labels.classes import Classes, lines_of
from tsq_ray.labels.entries import SPLITS, Entry, LabelFile, canonical_split, stem_of
from tsq_ray.labels.json_files import read_activitynet, read_label_studio

FCVID_MATRIX = "FCVID_Label.txt"
"""Row i holds 0 or 1 per class for line i of FCVID's list of videos."""


def _rows(
    file: LabelFile, needed: Sequence[str], optional: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Iterate over (line, {column: value}) of a CSV with a header, skipping blank lines."""
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
                        f"{file.shown}: columns are {columns}; "
                        f"expected {','.join(needed)}{optional}"
                    )
            elif len(values) != len(columns) or not values[columns.index(needed[0])]:
                raise ManifestError(
                    f"{file.shown} line {reader.line_num}: got {','.join(cells)[:80]!r}; "
                    f"expected {','.join(columns)} (quote a value that contains a comma)"
                )
            else:
                _check_quotes(f"{file.shown} line {reader.line_num}", cells)
                yield f"line {reader.line_num}", dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise ManifestError(
            f"{file.shown} line {reader.line_num}: not CSV ({error}); "
            f"expected {','.join(needed)}{optional}"
        ) from None


def _check_quotes(place: str, cells: Sequence[str]) -> None:
    for cell in cells:
        if cell[:1].isspace() and cell.strip().startswith('"'):
            raise ManifestError(
                f"{place}: {cell[:80]!r} keeps its quotes; "
                "expected the first one right after a comma, or after a comma and blanks"
            )


def _columns(first_line: str) -> set[str]:
    return {name.strip().strip('"') for name in first_line.split(",")}


def _read_csv(file: LabelFile) -> list[Entry]:
    entries = []
    for line, row in _rows(file, ("path", "label"), "[,split]"):
        labels = tuple(
            dict.fromkeys(part.strip() for part in row["label"].split("|") if part.strip())
        )
        entries.append(Entry(line, row["path"], labels, canonical_split(row.get("split"))))
    return entries


def _read_kinetics(file: LabelFile) -> list[Entry]:
    entries = []
    for line, row in _rows(file, ("youtube_id", "time_start", "time_end"), "[,label][,split]"):
        try:
            start, end = (round(float(row[name])) for name in ("time_start", "time_end"))
        except (ValueError, OverflowError):
            raise ManifestError(
                f"{file.shown} {line}: got time_start {row['time_start']!r} "
                f"and time_end {row['time_end']!r}; expected seconds"
            ) from None
        video = row["youtube_id"]
        clip = f"{video}_{start:06d}_{end:06d}"
        # some test sets withhold their labels
        labels = (row["label"],) if row.get("label") else ()
        split = canonical_split(row.get("split"))
        entries.append(Entry(line, clip, labels, split, keys=(clip, video)))
    return entries


def _read_fcvid(file: LabelFile) -> list[Entry]:
    place = storage.join(file.folder, FCVID_MATRIX)
    try:
        rows = lines_of(storage.read_text(place))
    except StorageError as error:
        raise ManifestError(
            f"{file.shown}: a list of FCVID's videos needs {FCVID_MATRIX} "
            f"in the same folder: {error}"
        ) from None
    while rows and not rows[-1].strip():
        rows.pop()
    lines = list(file.lines())
    if len(rows) != len(lines):
        raise ManifestError(
            f"{storage.redact(place)}: {len(rows)} lines; expected {len(lines)}, "
            f"one per video of {file.shown}"
        )
    entries = []
    for row, (number, line) in enumerate(lines):
        name, _, split = line.replace("\t", " ").rpartition(" ")
        if not name.strip() or split.lower() not in SPLITS:
            raise ManifestError(
                f"{file.shown} line {number}: got {line[:80]!r}; "
                f"expected a path and {' or '.join(sorted(SPLITS))}"
            )
        numbers = _marked_ids(rows[row], f"{storage.redact(place)} line {row + 1}", file.classes)
        labels = file.class_names(numbers, f"line {number}")
        entries.append(Entry(f"line {number}", name.strip(), labels, SPLITS[split.lower()]))
    return entries


def _marked_ids(row: str, place: str, classes: Classes | None) -> list[int]:
    """Return the class ids marked 1 in a row of the FCVID matrix."""
    cells = re.split(r"[\s,]+", row.strip())
    if not set(cells) <= {"0", "1"} or (classes is not None and len(cells) != len(classes.names)):
        expected = f"{len(classes.names)} values, " if classes else ""
        raise ManifestError(
            f"{place}: {len(cells)} values, {row[:40]!r}; "
            f"expected {expected}each 0 or 1, one per class"
        )
    first = classes.first if classes else 0
    return [number for number, cell in enumerate(cells, first) if cell == "1"]


_LIST_LINE = re.compile(
    r"(?P<path>\S.*?)(?P<gap>\s*,\s*|\s+)(?P<numbers>\d+(?:(?:\s*,\s*|\s+)\d+)*)$"
)
"""A path, which may contain blanks, followed by numbers."""


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _read_list(file: LabelFile, frames: bool) -> list[Entry]:
    """Read a list with one or more class ids per line, after the number of frames if `frames`."""
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
    """Return the split that a list's name contains as a word: anet_val_video.txt is val.

    None if it contains none or several.
    """
    words = re.split(r"[^a-z]+", storage.name_of(uri).lower())
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 else None


def _is_fcvid(first_line: str) -> bool:
    words = first_line.split()
    return len(words) > 1 and words[-1].lower() in SPLITS


def _is_list(first_line: str, frames: bool) -> bool:
    """Whether a first line belongs to a list of videos or, if `frames`, to a list of frames.

    A list of videos has a path with a video suffix, or ids joined by commas after a blank; any
    other line with at least two numbers belongs to a list of frames.
    """
    match = _LIST_LINE.match(first_line)
    if match is None:
        return False
    name = posixpath.basename(match["path"])
    of_videos = stem_of(name) != name or ("," in match["numbers"] and "," not in match["gap"])
    return not of_videos and len(_numbers(match["numbers"])) > 1 if frames else of_videos


@dataclass(frozen=True)
class Reader:
    """A format: its layout for messages, a test of the file's first line, and the parser."""

    layout: str
    recognise: Callable[[str], bool]
    read: Callable[[LabelFile], list[Entry]]
    searches_sources: bool = True
    """Whether paths are also looked up below the sources, not only relative to the label file."""


READERS: dict[str, Reader] = {
    "activitynet": Reader(
        "JSON with a 'database'", lambda line: line.startswith("{"), read_activitynet
    ),
    "label-studio": Reader(
        "JSON, a list of tasks",
        lambda line: re.match(r"\[\s*($|[{\]])", line) is not None,
        read_label_studio,
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
        searches_sources=False,
    ),
    "fcvid": Reader(
        f"lines of a path and train or test, {FCVID_MATRIX} in the same folder",
        _is_fcvid,
        _read_fcvid,
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
"""The supported formats, in the order they are tried."""


def recognise(file: LabelFile) -> str:
    """Return the name of a file's format.

    Raises ManifestError, listing the supported formats, if its first line fits none of them.
    """
    for name, reader in READERS.items():
        if reader.recognise(file.first_line()):
            return name
    known = ", ".join(f"{name} ({reader.layout})" for name, reader in READERS.items())
    raise ManifestError(
        f"{file.shown}: unknown label format; it begins with {file.first_line()[:80]!r}; "
        f"known: {known}; --labels-format NAME reads it as one of them"
    )
