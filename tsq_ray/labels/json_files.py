"""Read label files in JSON: ActivityNet's database and Label Studio's exports.

Label Studio's JSON holds a task per video with its annotations, JSON-MIN a row per annotation. Only
people's choices are labels: predictions, drafts and skipped annotations are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tsq_ray import storage
from tsq_ray.errors import ManifestError
from tsq_ray.labels.entries import Entry, LabelFile, canonical_split, stem_of

CONTROLS = ("label", "choice", "choices")
"""Usual names of the control whose choices are the labels; the first that a file has counts."""
VIDEO_KEYS = ("uri", "video")
"""Keys of a task's data that name its video, best first; else any value with a video suffix."""
_MAX_FOLDERS = 8
"""Number of a URL's last folders that are compared with the ends of the videos' paths."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)", re.DOTALL)
"""The name that Label Studio gives an uploaded file."""
_NEVER = datetime.min.replace(tzinfo=timezone.utc)


def _parse(file: LabelFile, what: str) -> Any:
    """Return the content of a JSON file. Raises ManifestError."""
    try:
        content = json.loads(file.text)
        if _HALF_PAIR.search(file.text) and not storage.is_utf8(
            json.dumps(content, ensure_ascii=False)
        ):
            raise ValueError("half of a surrogate pair, which is no character")
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{file.shown}: not {what} ({error!r})") from None
    return content


def read_activitynet(file: LabelFile) -> list[Entry]:
    """Read {"database": {ID: {"subset", "annotations": [{"label"}]}}}. Raises ManifestError."""
    what = "ActivityNet JSON: no usable 'database'"
    content = _parse(file, what)
    try:
        videos = list(content["database"].items())
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{file.shown}: not {what} ({error!r})") from None
    entries = []
    for key, video in videos:
        try:
            labels = tuple(
                dict.fromkeys(str(part["label"]) for part in video.get("annotations", ()))
            )
            subset = None if video.get("subset") is None else str(video["subset"])
        except (KeyError, TypeError, AttributeError):
            raise ManifestError(
                f"{file.shown}: not ActivityNet JSON: {key!r} is {str(video)[:80]!r}; "
                "expected 'subset' and 'annotations', each with a 'label'"
            ) from None
        entries.append(Entry(repr(key), key, labels, canonical_split(subset), keys=(key,)))
    return entries


@dataclass(frozen=True)
class _Annotation:
    """The latest annotation of a task: its choices by control name, empty if it has none."""

    place: str
    data: dict[str, Any]
    time: datetime
    choices: dict[str, list[str]]


def read_label_studio(file: LabelFile) -> list[Entry]:
    """Read Label Studio's JSON or JSON-MIN export.

    The latest annotation of a task by `updated_at` counts; if all were skipped, the video has no
    label. Raises ManifestError with the number of the task.
    """
    tasks = _parse(file, "Label Studio JSON")
    if not isinstance(tasks, list):
        raise ManifestError(
            f"{file.shown}: not Label Studio JSON: got {str(tasks)[:80]!r}; "
            "expected a list of tasks (export as JSON or JSON-MIN)"
        )
    latest: dict[str, _Annotation] = {}
    for number, task in enumerate(tasks, 1):
        place = f"{file.shown} task {number}"
        _expect(isinstance(task, dict), place, task, "a task with 'data' and 'annotations'")
        full = isinstance(task.get("data"), dict)
        annotation = _latest_annotation(task, place) if full else _row_annotation(task, place)
        # JSON-MIN has a row per annotation, with the id of its task
        key = str(task.get("id", place)) if not full else place
        if key not in latest or latest[key].time <= annotation.time:
            latest[key] = annotation
    control = _control(file, latest.values())
    return [
        Entry(
            annotation.place.removeprefix(f"{file.shown} "),
            names[0],
            tuple(dict.fromkeys(annotation.choices.get(control, ()))),
            _split(annotation),
            alternatives=names[1:],
        )
        for annotation in latest.values()
        for names in [_names(annotation)]
    ]


def _expect(holds: bool, place: str, value: object, expected: str) -> None:
    if not holds:
        raise ManifestError(f"{place}: got {str(value)[:80]!r}; expected {expected}")


def _latest_annotation(task: dict[str, Any], place: str) -> _Annotation:
    """Return the latest annotation of a task that was not skipped."""
    annotations = task.get("annotations", [])
    _expect(
        isinstance(annotations, list) and all(isinstance(item, dict) for item in annotations),
        place,
        annotations,
        "'annotations', a list of objects with a 'result'",
    )
    best = _Annotation(place, task["data"], _NEVER, {})
    for annotation in annotations:
        time = _time(annotation, place)
        if not annotation.get("was_cancelled") and best.time <= time:
            best = _Annotation(place, task["data"], time, _choices(annotation.get("result"), place))
    return best


def _choices(result: object, place: str) -> dict[str, list[str]]:
    """Return the choices of an annotation by the name of their control."""
    expected = "'result', a list with {'from_name', 'type': 'choices', 'value': {'choices': [...]}}"
    _expect(isinstance(result, list), place, result, expected)
    choices: dict[str, list[str]] = {}
    for part in result if isinstance(result, list) else ():
        _expect(isinstance(part, dict), place, part, expected)
        if part.get("type") == "choices":
            control, value = part.get("from_name"), part.get("value")
            holds = isinstance(control, str) and isinstance(value, dict) and "choices" in value
            _expect(holds, place, part, expected)
            choices.setdefault(control, []).extend(_texts(value["choices"], place))
    return choices


def _row_annotation(task: dict[str, Any], place: str) -> _Annotation:
    """Return the annotation of a JSON-MIN row, which holds data, choices and times side by side."""
    choices: dict[str, list[str]] = {}
    for control in CONTROLS:
        value = task.get(control)
        for part in value if isinstance(value, list) else [] if value is None else [value]:
            texts = part.get("choices") if isinstance(part, dict) else [part]
            choices.setdefault(control, []).extend(_texts(texts, place))
    return _Annotation(place, task, _time(task, place), choices)


def _texts(values: object, place: str) -> list[str]:
    holds = isinstance(values, list) and all(isinstance(x, str) and x.strip() for x in values)
    _expect(holds, place, values, "'choices', a list of class names")
    return [text.strip() for text in values] if isinstance(values, list) else []


def _time(record: dict[str, Any], place: str) -> datetime:
    text = record.get("updated_at") or record.get("created_at")
    if text is None:
        return _NEVER
    try:
        time = datetime.fromisoformat(text)
    except (ValueError, TypeError):
        raise ManifestError(
            f"{place}: got {str(text)[:80]!r}; expected 'updated_at' as 2026-01-31T12:00:00Z"
        ) from None
    return time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)


def _control(file: LabelFile, annotations: Iterable[_Annotation]) -> str:
    """Return the name of the control whose choices are the labels; empty if there are none."""
    names = list(dict.fromkeys(name for each in annotations for name in each.choices))
    usual = [name for name in CONTROLS if name in names]
    if not usual and len(names) > 1:
        raise ManifestError(
            f"{file.shown}: choices of {len(names)} controls, {str(names)[:80]}; "
            f"name the one with the classes {CONTROLS[0]!r} in the labelling interface"
        )
    return (usual or names or [""])[0]


def _split(annotation: _Annotation) -> str | None:
    split = annotation.data.get("split")
    return canonical_split(split) if isinstance(split, str) else None


def _names(annotation: _Annotation) -> tuple[str, ...]:
    """Return the spellings of a task's video, best first."""
    texts = {
        key: value
        for key, value in annotation.data.items()
        if isinstance(value, str) and value.strip() and "\0" not in value
    }
    named = [texts[key] for key in VIDEO_KEYS if key in texts]
    found = named or [text for text in texts.values() if _is_video(storage.name_of(text))]
    if not found:
        raise ManifestError(
            f"{annotation.place}: no video among its data ({str(list(annotation.data))[:80]}); "
            f"expected {' or '.join(map(repr, VIDEO_KEYS))} with a path or URL"
        )
    return tuple(dict.fromkeys([*found, *(name for text in found for name in _spellings(text))]))


def _is_video(name: str) -> bool:
    return stem_of(name) != name


def _spellings(text: str) -> Iterator[str]:
    """Iterate over the names a path or URL may have in the listing: the ends of its path."""
    path = text
    if text.startswith(("http://", "https://", "/data/")):
        try:
            url = urlsplit(text)
        except ValueError:
            return
        path = unquote(url.path)
        if path.rstrip("/").endswith("/local-files"):  # Label Studio's link to a file on its disk
            path = "/" + parse_qs(url.query).get("d", [""])[0].lstrip("/")
            yield path
    parts = [part for part in path.partition("://")[2 if "://" in path else 0].split("/") if part]
    yield from _uploaded(parts)
    for first in range(max(0, len(parts) - _MAX_FOLDERS - 1), len(parts) - 1):
        yield "/".join(parts[first:])


def _uploaded(parts: Sequence[str]) -> Iterator[str]:
    match = _UPLOADED.fullmatch(parts[-1]) if "upload" in parts[:-1] else None
    if match:
        yield match[1]
