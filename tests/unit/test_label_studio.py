"""Label Studio: its exports as labels, whatever it or a hand has written into them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsq_ray.errors import ManifestError
from tsq_ray.labels import read_labels
from tsq_ray.manifest import assemble_manifest

Make = Callable[..., Path]


def chosen(*labels: str, control: str = "label", **more: Any) -> dict[str, Any]:
    """An annotation as Label Studio exports it."""
    result = {
        "id": "x1",
        "type": "choices",
        "value": {"choices": list(labels)},
        "origin": "manual",
        "to_name": "video",
        "from_name": control,
    }
    return {
        "id": 7,
        "completed_by": 1,
        "result": [result] if labels else [],
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": "2026-03-01T10:00:00.000000Z",
        "updated_at": "2026-03-01T10:00:05.123456Z",
        "lead_time": 4.2,
    } | more


def task(video: str, *annotations: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "id": 31,
        "annotations": list(annotations),
        "file_upload": None,
        "drafts": [],
        "predictions": [11],
        "data": {"video": video, "fps": 25.0} | data,
        "meta": {},
        "project": 1,
    }


def labelled(folder: Path, content: Any, **options: str) -> dict[str, tuple[list[str], str | None]]:
    """File name -> (class names, split), of the videos below `folder` that have either."""
    file = folder.parent / "export.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    manifest, found = assemble_manifest([str(folder)], [str(file)], **options)  # type: ignore[arg-type]
    assert found.labels_from == f"{file} (label-studio)"
    return {
        Path(row.uri).name: ([manifest.classes[label] for label in row.labels or ()], row.split)
        for row in manifest.rows
        if row.labels or row.split
    }


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "indented"])
def test_choices_are_labels_and_the_rest_is_not(make: Make, indent: int | None) -> None:
    folder = make("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4")
    moments = {
        "from_name": "moments",
        "to_name": "video",
        "type": "timelinelabels",
        "value": {"ranges": [{"start": 3, "end": 3}], "timelinelabels": ["chosen frame"]},
    }
    answer = chosen("swim")
    answer["result"].append(moments)
    tasks = [
        task(f"{folder}/a.mp4", answer, split="validation"),
        task(f"{folder}/b.mp4", chosen("cook", "big, dogs")),
        task(f"{folder}/c.mp4"),
        task(f"{folder}/d.mp4", chosen("swim", was_cancelled=True)),
        task(f"{folder}/e.mp4", chosen()),
    ]
    tasks[2]["predictions"] = [{"result": chosen("swim")["result"], "score": 0.9}]
    assert labelled(folder, json.dumps(tasks, indent=indent)) == {
        "a.mp4": (["swim"], "val"),
        "b.mp4": (["big, dogs", "cook"], None),
    }
    _, found = assemble_manifest([str(folder)], [str(folder.parent / "export.json")])
    assert (found.labelled, found.unlabelled, found.missing) == (2, 3, [])


def test_the_latest_annotation_that_was_not_skipped_counts(make: Make) -> None:
    folder = make("a.mp4", "b.mp4")
    late = {"updated_at": "2026-03-02T09:00:00+01:00"}
    later = {"updated_at": "2026-03-02T08:30:00"}
    tasks = [
        task("videos/a.mp4", chosen("cook", **late), chosen("swim", **later), chosen("cook")),
        task(
            "videos/b.mp4",
            chosen("swim"),
            chosen("cook", updated_at=None),
            chosen("cook", was_cancelled=True, **late),
        ),
    ]
    assert labelled(folder, tasks) == {"a.mp4": (["swim"], None), "b.mp4": (["swim"], None)}


def test_json_min_has_a_row_for_each_annotation(make: Make) -> None:
    folder = make("a.mp4", "b.mp4", "c.mp4")
    rows = [
        {"video": "videos/a.mp4", "id": 1, "label": "cook", "updated_at": "2026-03-02T09:00:00Z"},
        {"video": "videos/a.mp4", "id": 1, "label": "swim", "updated_at": "2026-03-03T09:00:00Z"},
        {"video": "videos/b.mp4", "id": 2, "label": {"choices": ["swim", "cook"]}},
        {"video": "videos/c.mp4", "id": 3, "annotation_id": None, "updated_at": None},
    ]
    assert labelled(folder, rows) == {
        "a.mp4": (["swim"], None),
        "b.mp4": (["cook", "swim"], None),
    }


@pytest.mark.parametrize(
    "video",
    [
        "{folder}/sub/a.mp4",
        "videos/sub/a.mp4",
        "sub/a.mp4",
        "/data/local-files/?d={local}/sub/a.mp4",
        "/data/local-files/?d=sub%2Fa.mp4",
        "/data/upload/3/0a1b2c3d-a.mp4",
        "s3://bucket/elsewhere/sub/a.mp4",
        "https://host/elsewhere/sub/a.mp4?X-Amz-Signature=0123",
        "/another/machine/sub/a.mp4",
    ],
)
def test_the_video_of_a_task(make: Make, video: str) -> None:
    folder = make("a b.mp4", "sub/a.mp4", "other/b.mp4")
    name = video.format(folder=folder, local=str(folder).lstrip("/"))
    assert labelled(folder, [task(name, chosen("x"))]) == {"a.mp4": (["x"], None)}
    under_a_key = task(name, chosen("x"))
    under_a_key["data"] = {"number": 3, "clip": name}
    assert labelled(folder, [under_a_key]) == {"a.mp4": (["x"], None)}
    own = task("/data/local-files/?d=nowhere.mp4", chosen("x"), uri=f"{folder}/sub/a.mp4")
    assert labelled(folder, [own]) == {"a.mp4": (["x"], None)}


def test_a_video_in_another_folder_is_another_video(make: Make) -> None:
    folder = make("sub/a.mp4", "b.mp4")
    tasks = [
        task("https://host/other/a.mp4?secret=1", chosen("x")),
        task("videos/b.mp4", chosen("y")),
    ]
    assert labelled(folder, tasks) == {"b.mp4": (["y"], None)}
    _, found = assemble_manifest([str(folder)], [str(folder.parent / "export.json")])
    assert found.missing == ["https://host/other/a.mp4?..."]


@pytest.mark.parametrize("control", ["label", "choice", "action"])
def test_the_control_with_the_classes(make: Make, control: str) -> None:
    answer = chosen("x", control=control)
    if control != "action":
        answer["result"] += chosen("blurred", control="quality")["result"]
    assert labelled(make("a.mp4"), [task("videos/a.mp4", answer)]) == {"a.mp4": (["x"], None)}


def two_controls() -> dict[str, Any]:
    answer = chosen("x", control="action")
    answer["result"] += chosen("blurred", control="quality")["result"]
    return answer


GOOD = task("videos/a.mp4", chosen("x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"not Label Studio JSON \(JSONDecodeError"),
        ("[{" + '"data": [' + "[" * 100_000, r"not Label Studio JSON \(RecursionError"),
        ('[{"data": {"video": "\\ud800.mp4"}}]', "half of a surrogate pair, which is no character"),
        ([GOOD, 3], "task 2: got '3'; expected a task with 'data' and 'annotations'"),
        ([GOOD, GOOD | {"annotations": 3}], "task 2: got '3'; expected 'annotations', a list of"),
        ([GOOD, GOOD | {"annotations": [[]]}], r"task 2: got '\[\[\]\]'; expected 'annotations'"),
        ([GOOD | {"annotations": [{}]}], "task 1: got 'None'; expected 'result', a list with"),
        ([task("a", chosen("x", result=[3]))], "task 1: got '3'; expected 'result', a list with"),
        (
            [task("a", chosen("x", result=[{"type": "choices", "value": {}}]))],
            "task 1: got .*; expected 'result', a list with",
        ),
        ([task("a", chosen(" "))], "task 1: got .*; expected 'choices', a list of class names"),
        ([{"video": "a", "label": [3]}], "task 1: got .*; expected 'choices', a list of class"),
        ([{"video": "a", "label": {}}], "task 1: got 'None'; expected 'choices', a list of class"),
        (
            [task("a", chosen("x", updated_at="soon"))],
            "task 1: got 'soon'; expected 'updated_at' as 2026-01-31T12:00:00Z",
        ),
        ([task("a", chosen("x", updated_at=3))], "task 1: got '3'; expected 'updated_at'"),
        (  # the classes are those of "label", and the second task has none of it
            [GOOD, task("videos/a.mp4", two_controls())],
            "task 2: videos/a.mp4 has other labels",
        ),
        (
            [task("videos/a.mp4", two_controls())],
            r"choices of 2 controls, \['action', 'quality'\]; "
            r"name the one with the classes 'label'",
        ),
        (
            [GOOD | {"data": {"text": "words"}}],
            r"task 1: no video among its data \(\['text'\]\); expected 'uri' or 'video'",
        ),
        (
            [GOOD, task("videos/a.mp4", chosen("y"))],
            "task 2: videos/a.mp4 has other labels or another split than in .* task 1; keep one",
        ),
        ([], "none of its 0 videos is among the 1 videos found"),
    ],
)
def test_unusable_exports_are_reported(make: Make, content: Any, message: str) -> None:
    folder = make("a.mp4")
    with pytest.raises(ManifestError, match=message) as caught:
        labelled(folder, content)
    assert "\n" not in str(caught.value)


def test_another_json_is_not_label_studios(make: Make, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"tasks": []}')
    folder = str(make("a.mp4"))
    with pytest.raises(
        ManifestError, match=r"expected a list of tasks \(export as JSON or JSON-MIN\)"
    ):
        assemble_manifest([folder], [str(tmp_path / "labels.json")], labels_format="label-studio")


# --------------------------------------------------------------------------------------------- fuzz

WORDS = st.sampled_from(
    [
        *(
            "videos/a.mp4",
            "~\0",
            "~nobody/a.mp4",
            "http://[",
            "s3://",
            "file://a",
            "\ud800",
            "../..",
        ),
        *("/data/local-files/?d=%00", "/data/upload/x", "choices", "label", "2026-03-01T10:00:00Z"),
        *("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "\n", ""),
    ]
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    if not isinstance(value, (dict, list)):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def exports(draw: st.DrawFn) -> str:
    """A valid export in which up to three values are replaced or removed; or its text cut off."""
    short = {"video": "videos/a.mp4", "id": 1, "label": "x", "updated_at": "2026-03-02T09:00:00Z"}
    content = [copy.deepcopy(GOOD), copy.deepcopy(draw(st.sampled_from([GOOD, short])))]
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from([place for place in places(content) if place]))
        target: Any = content
        for key in path[:-1]:
            target = target[key]
        if isinstance(target, dict) and draw(st.booleans()):
            del target[path[-1]]
        else:
            target[path[-1]] = draw(ANY)
    text = json.dumps(content)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


@pytest.fixture(scope="module")
def export_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "export.json"


@settings(max_examples=300, deadline=None)
@given(text=exports() | ANY.map(json.dumps))
def test_no_export_raises_anything_but_a_manifest_error(export_file: Path, text: str) -> None:
    source = str(export_file.parent)
    export_file.write_text(text)
    files = [(source, f"{source}/videos/a.mp4"), (source, f"{source}/other/a.mp4")]
    try:
        found = read_labels([str(export_file)], files, format_name="label-studio")
    except ManifestError as error:
        message = str(error)
    else:
        message = f"{export_file} is usable"
        for labels, _ in found.by_uri.values():
            assert all(label.strip() and label.encode() for label in labels)
    assert str(export_file) in message
    assert "\n" not in message
