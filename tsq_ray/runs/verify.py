"""`tsq verify`: check a run folder against its own accounting and its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from tsq_ray import schema, storage
from tsq_ray.errors import ERROR_TYPES, RunError, StorageError
from tsq_ray.manifest import Manifest, VideoRows, read_manifest
from tsq_ray.results import Counts, Verification
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import FAILED, OK, OTHER_VERSION, Done, list_parts, read_done
from tsq_ray.runs.folder import RUN_FILE, part_name, read_run

_SHOWN = 20
"""Maximum number of videos to name per kind of problem."""


def verify(uri: str) -> Verification:
    """Check a run folder against its own accounting and, if it can be read, its manifest.

    Raises RunError if `uri` holds no finished run.
    """
    uri = storage.normalize(uri)
    run = read_run(uri)
    problems = _check_parts(uri, run)
    if problems:
        checks = ["parts", "counts", "rows and manifest not checked (repair the parts first)"]
    else:
        manifest, reason = _manifest_of(run)
        done = read_done(uri, manifest or Manifest(VideoRows.of([]), []))
        problems += _check_rows(run, done)
        if manifest is not None:
            problems += _check_manifest(run, done)
        checks = ["parts", "rows", "counts", reason or "manifest"]
    problems += _check_counts(run)
    counts = Counts(**run["counts"])
    return Verification(storage.redact(uri), run["kind"], counts, tuple(checks), tuple(problems))


def _check_parts(uri: str, run: Mapping[str, Any]) -> list[str]:
    listed = {part["name"] for part in run["parts"]}
    present = {storage.name_of(part.uri) for part in list_parts(uri)}
    problems = [f"{name}: listed in {RUN_FILE} but missing" for name in sorted(listed - present)]
    problems += [f"{name}: not listed in {RUN_FILE}" for name in sorted(present - listed)]
    for name in sorted(present):
        try:
            problems += _check_part(storage.join(uri, name), run["kind"])
        except RunError as error:
            problems.append(str(error))
    return problems


def _check_counts(run: Mapping[str, Any]) -> list[str]:
    counts, problems = run["counts"], []
    if counts["inputs"] != counts["ok"] + counts["failed"] + counts["skipped"]:
        problems.append(
            f"inputs {counts['inputs']} != ok {counts['ok']} + failed {counts['failed']} "
            f"+ skipped {counts['skipped']}"
        )
    if run["status"] != "complete":
        problems.append(f"the run's status is {run['status']!r}")
    return problems


def _check_rows(run: Mapping[str, Any], done: Done) -> list[str]:
    keys, numbers = np.unique(done.rows["key"], return_counts=True)
    twice = np.flatnonzero(numbers > 1)[:_SHOWN]
    problems = [f"video {keys[place]:016x}: {numbers[place]} rows" for place in twice]
    for status, flag in (("ok", OK), ("failed", FAILED)):
        found = int(done.has(flag).sum())
        if found != run["counts"][status]:
            problems.append(f"{found} rows are {status}, {RUN_FILE} says {run['counts'][status]}")
    return problems


def _check_part(uri: str, kind: str) -> list[str]:
    name = storage.name_of(uri)
    table = read_part(uri)
    problems = []
    columns = schema.FEATURES if kind == "features" else schema.PREDICTIONS
    missing = [
        column.name
        for column in columns
        if column.name not in table.column_names and column.name != "scores"
    ]
    if missing:
        return [f"{name}: lacks the columns {missing}"]
    if name != part_name(table["video_id"].to_pylist()):
        problems.append(f"{name}: its name does not match the videos in it")
    statuses = set(table["status"].to_pylist())
    if not statuses <= {"ok", "failed"}:
        problems.append(f"{name}: statuses {sorted(statuses)}")
    failed = table.filter(pc.equal(table["status"], "failed"))
    unknown = set(failed["error_type"].to_pylist()) - set(ERROR_TYPES)
    if unknown:
        problems.append(f"{name}: unknown error types {sorted(map(str, unknown))}")
    ok = table.filter(pc.equal(table["status"], "ok"))
    for column in (
        ("visual", "object_ids", "frame_index")
        if kind == "features"
        else ("selected_slot", "top_labels", "frame_pts_s")
    ):
        if ok[column].null_count:
            problems.append(f"{name}: {ok[column].null_count} rows are ok without {column}")
    return problems


def _manifest_of(run: Mapping[str, Any]) -> tuple[Manifest | None, str]:
    """Return the manifest that the run was made from, or None and why it cannot be compared."""
    try:
        manifest = read_manifest(run["manifest"]["uri"])
    except (ValueError, StorageError) as error:
        return None, f"manifest not checked ({error})"
    if manifest.sha256 != run["manifest"]["sha256"]:
        return None, "manifest not checked (it changed since this run)"
    return manifest, ""


def _check_manifest(run: Mapping[str, Any], done: Done) -> list[str]:
    manifest, place, problems = done.manifest, done.rows["place"], []
    for row in done.rows[place < 0][:_SHOWN]:
        problems.append(
            f"{done.parts[row['part']].name}: video {row['key']:016x} is not in the manifest"
        )
    for ref in manifest.rows.take(place[done.has(OTHER_VERSION)][:_SHOWN]):
        problems.append(
            f"video {ref.video_id} ({storage.redact(ref.uri)}): "
            "the row is from another version of the file"
        )
    if run["counts"]["inputs"] != len(manifest.rows):
        problems.append(
            f"the manifest has {len(manifest.rows)} videos, "
            f"{RUN_FILE} says {run['counts']['inputs']}"
        )
    missing = len(manifest.rows) - len(np.unique(place[place >= 0]))
    if missing != run["counts"]["skipped"]:
        problems.append(
            f"{missing} videos of the manifest have no row, "
            f"{RUN_FILE} says {run['counts']['skipped']} were skipped"
        )
    return problems
