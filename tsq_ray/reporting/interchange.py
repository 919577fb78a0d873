"""Predictions in the formats of other tools: Label Studio's tasks, ActivityNet's JSON."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from tsq_ray import storage
from tsq_ray.errors import RunError, UserError
from tsq_ray.labels import id_of
from tsq_ray.rows import Row

TASKS_FILE, INTERFACE_FILE = "label_studio_tasks.json", "label_studio_interface.xml"
RESULTS_FILE, DATABASE_FILE = "activitynet_results.json", "activitynet_database.json"
ACTIVITYNET_VERSION = "VERSION 1.3"
_SUBSETS = {"train": "training", "val": "validation", "test": "testing"}
_VIDEO, _CHOICES, _TIMELINE, _MOMENT = "video", "label", "moments", "chosen frame"
_DEFAULT_FPS = 24.0
"""Label Studio's own default."""
_MIN_SCORE = 0.5
"""Probability from which a class of a multi-label bundle is predicted."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@contextlib.contextmanager
def _json_file(uri: str, opening: str, closing: str) -> Iterator[Callable[[str], None]]:
    """Write a JSON file piece by piece: `opening`, the added members, `closing`."""
    with storage.open_write(uri) as file:
        file.write(opening.encode())
        separator = "\n"

        def add(member: str) -> None:
            nonlocal separator
            file.write((separator + member).encode())
            separator = ",\n"

        yield add
        file.write(f"\n{closing}\n".encode())


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------- Label Studio


def write_label_studio(
    rows: Iterable[Row],
    out: str,
    classes: Sequence[str],
    multi: bool,
    model_version: str,
    document_root: str,
) -> None:
    """Write a Label Studio task for each ok video, and the labelling interface.

    A task holds a prediction for people to correct: the predicted classes as choices and the chosen
    frames as moments of the timeline. `document_root`: the folder of local videos that Label Studio
    serves. Raises RunError for class names that XML cannot hold, UserError for a video outside
    `document_root`.
    """
    root = storage.normalize(document_root).rstrip("/") + "/"
    interface = _interface(classes, multi)
    with _json_file(storage.join(out, TASKS_FILE), "[", "]") as add:
        for row in rows:
            if row["status"] == "ok":
                add(_dumps(_task(row, root, multi, model_version)))
    storage.write_bytes(storage.join(out, INTERFACE_FILE), interface)


def _interface(classes: Sequence[str], multi: bool) -> bytes:
    """Return the labelling interface as XML: the video, its classes, its moments."""
    invalid = next(filter(_NOT_XML.search, classes), None)
    if invalid is not None:
        raise RunError(
            f"label-studio: class {invalid!r} has a control character, which XML cannot hold; "
            "rename the class"
        )
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Video", name=_VIDEO, value="$video", frameRate="$fps")
    choices = ElementTree.SubElement(
        view, "Choices", name=_CHOICES, toName=_VIDEO, choice="multiple" if multi else "single"
    )
    for name in classes:
        ElementTree.SubElement(choices, "Choice", value=name)
    moments = ElementTree.SubElement(view, "TimelineLabels", name=_TIMELINE, toName=_VIDEO)
    ElementTree.SubElement(moments, "Label", value=_MOMENT)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="utf-8") + b"\n"


def _task(row: Row, root: str, multi: bool, model_version: str) -> dict[str, Any]:
    data = {
        "video": _video_url(row["uri"], root),
        "fps": row["fps"] or _DEFAULT_FPS,
        "uri": row["uri"],
        "video_id": row["video_id"],
    }
    if row["split"]:
        data["split"] = row["split"]
    result = [
        _region(_CHOICES, _CHOICES, "choices", {"choices": _predicted(row, multi)}),
        *(
            _region(
                f"moment-{number}",
                _TIMELINE,
                "timelinelabels",
                {"ranges": [{"start": frame, "end": frame}], "timelinelabels": [_MOMENT]},
            )
            for number, frame in enumerate(_frame_numbers(row), 1)
        ),
    ]
    score = round(row["top_scores"][0], 6)
    prediction = {"model_version": model_version, "score": score, "result": result}
    return {"data": data, "predictions": [prediction]}


def _region(number: str, control: str, kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": number, "from_name": control, "to_name": _VIDEO, "type": kind, "value": value}


def _predicted(row: Row, multi: bool) -> list[str]:
    """Return the best class; if `multi`, all probable classes."""
    pairs = zip(row["top_labels"], row["top_scores"], strict=True)
    probable = [label for label, score in pairs if score >= _MIN_SCORE] if multi else []
    return probable or row["top_labels"][:1]


def _frame_numbers(row: Row) -> list[int]:
    """Return the chosen frames as Label Studio counts: from 1, at the video's mean frame rate."""
    fps = row["fps"] or 0
    return [max(1, round(time * fps) + 1) for time in row["selected_pts_s"] or ()] if fps else []


def _video_url(uri: str, root: str) -> str:
    """Return the URL under which Label Studio plays a video."""
    if not storage.is_local(uri):
        return uri
    if not uri.startswith(root):
        raise UserError(
            f"label-studio: {uri} is outside the document root {root}; "
            "name a folder that holds all videos with --document-root"
        )
    return "/data/local-files/?d=" + quote(uri.removeprefix(root))


# -------------------------------------------------------------------------------------- ActivityNet


def write_activitynet(rows: Callable[[], Iterable[Row]], out: str, details: str) -> bool:
    """Write the predictions as ActivityNet's results, and known labels as its ground truth.

    A key is the video's file name without suffix and leading `v_`, or its video_id if several
    videos have that name. A segment is the whole video. Returns whether any labels are known;
    without any, no ground truth is written.
    """
    names = Counter(id_of(storage.name_of(row["uri"])) for row in rows())
    opening = f'{{"version": {_dumps(ACTIVITYNET_VERSION)}, '
    external = _dumps({"used": True, "details": details})
    with contextlib.ExitStack() as stack:
        add_result = stack.enter_context(
            _json_file(
                storage.join(out, RESULTS_FILE),
                f'{opening}"external_data": {external}, "results": {{',
                "}}",
            )
        )
        add_known = None
        for row in rows():
            name = id_of(storage.name_of(row["uri"]))
            key = _dumps(name if names[name] == 1 else row["video_id"])
            if row["status"] == "ok":
                add_result(f"{key}: {_dumps(_results(row))}")
            if row["label_names"] and add_known is None:
                place = storage.join(out, DATABASE_FILE)
                header = f'{opening}"taxonomy": [], "database": {{'
                add_known = stack.enter_context(_json_file(place, header, "}}"))
            if row["label_names"] and add_known is not None:
                add_known(f"{key}: {_dumps(_ground_truth(row))}")
    return add_known is not None


def _segment(row: Row) -> list[float]:
    return [0.0, round(row["duration_s"] or 0.0, 3)]


def _results(row: Row) -> list[dict[str, Any]]:
    return [
        {"label": label, "score": round(score, 6), "segment": _segment(row)}
        for label, score in zip(row["top_labels"], row["top_scores"], strict=True)
    ]


def _ground_truth(row: Row) -> dict[str, Any]:
    split = row["split"] or ""
    return {
        "duration": _segment(row)[1],
        "subset": _SUBSETS.get(split, split),
        "resolution": f"{row['width']}x{row['height']}" if row["width"] else "",
        "url": row["uri"],
        "annotations": [{"label": label, "segment": _segment(row)} for label in row["label_names"]],
    }
