"""`tsq verify`: a run folder against its own accounting and against its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import schema, storage
from tsq_ray.errors import ERROR_TYPES, RunError, StorageError
from tsq_ray.manifest import VideoRows, read_manifest
from tsq_ray.runs.done import EMPTY, DoneRows, done_rows, list_parts, other_version, read_part
from tsq_ray.runs.folder import RUN_FILE, part_name, read_run


def verify(uri: str) -> dict[str, Any]:
    """Check a run folder against its own accounting and, where it can be read, against its manifest.

    Returns {"uri", "kind", "counts", "checks", "problems"}; a run adds up when "problems" is empty.
    Raises RunError where there is no finished run to verify.
    """
    uri = storage.normalize(uri)
    run = read_run(uri)
    problems: list[str] = []
    listed, there = (
        {part["name"]: part["bytes"] for part in run["parts"]},
        {storage.name_of(part.uri): part.size_bytes for part in list_parts(uri)},
    )
    problems += [f"{name}: listed in {RUN_FILE} but missing" for name in sorted(listed.keys() - there.keys())]
    problems += [f"{name}: not listed in {RUN_FILE}" for name in sorted(there.keys() - listed.keys())]
    for name in sorted(there):
        try:
            problems += _check_part(storage.join(uri, name), run["kind"])
        except RunError as error:
            problems.append(str(error))
    done = DoneRows(EMPTY, []) if problems else done_rows(uri)
    rows = done.table
    ids = pc.value_counts(rows["video_id"])
    problems += [f"video {row['values']}: {row['counts']} rows" for row in ids.filter(pc.greater(ids.field("counts"), 1))[:20].to_pylist()]
    counts = run["counts"]
    if counts["inputs"] != counts["ok"] + counts["failed"] + counts["skipped"]:
        problems.append(f"inputs {counts['inputs']} != ok {counts['ok']} + failed {counts['failed']} + skipped {counts['skipped']}")
    for status in ("ok", "failed"):
        found = pc.sum(pc.equal(rows["status"], status)).as_py() or 0
        if found != counts[status]:
            problems.append(f"{found} rows are {status}, {RUN_FILE} says {counts[status]}")
    if run["status"] != "complete":
        problems.append(f"the run's status is {run['status']!r}")
    checks = ["parts", "rows", "counts"]
    checks.append(_check_manifest(run, done, problems))
    return {"uri": storage.redact(uri), "kind": run["kind"], "counts": counts, "checks": checks, "problems": problems}


def _check_part(uri: str, kind: str) -> list[str]:
    name = storage.name_of(uri)
    table = read_part(uri)
    problems = []
    columns = schema.FEATURES if kind == "features" else schema.PREDICTIONS
    missing = [column.name for column in columns if column.name not in table.column_names and column.name != "scores"]
    if missing:
        return [f"{name}: lacks the columns {missing}"]
    if name != part_name(table["video_id"].to_pylist()):
        problems.append(f"{name}: its name does not fit the videos in it")
    statuses = set(table["status"].to_pylist())
    if not statuses <= {"ok", "failed"}:
        problems.append(f"{name}: statuses {sorted(statuses)}")
    failed = table.filter(pc.equal(table["status"], "failed"))
    unknown = set(failed["error_type"].to_pylist()) - set(ERROR_TYPES)
    if unknown:
        problems.append(f"{name}: unknown error types {sorted(map(str, unknown))}")
    ok = table.filter(pc.equal(table["status"], "ok"))
    for column in ("visual", "object_ids", "frame_index") if kind == "features" else ("selected_slot", "top_labels", "frame_pts_s"):
        if ok[column].null_count:
            problems.append(f"{name}: {ok[column].null_count} rows are ok without {column}")
    return problems


def _check_manifest(run: Mapping[str, Any], done: DoneRows, problems: list[str]) -> str:
    try:
        manifest = read_manifest(run["manifest"]["uri"])
    except (ValueError, StorageError) as error:
        return f"manifest not checked ({error})"
    if manifest.sha256 != run["manifest"]["sha256"]:
        return "manifest not checked (it changed since this run)"
    rows = done.table
    place = manifest.rows.places(rows["video_id"])
    strangers, outdated = np.flatnonzero(place < 0), other_version(rows, manifest, place)
    for row in rows.select(["video_id", "part"]).take(pa.array(strangers)).to_pylist():
        problems.append(f"{done.parts[row['part']].name}: video {row['video_id']} is not in the manifest")
    for row in VideoRows(manifest.rows.table.take(pa.array(place[outdated]))):
        problems.append(f"video {row.video_id} ({storage.redact(row.uri)}): the row is of another version of the file")
    if run["counts"]["inputs"] != len(manifest.rows):
        problems.append(f"the manifest has {len(manifest.rows)} videos, {RUN_FILE} says {run['counts']['inputs']}")
    lost = len(manifest.rows) - len(np.unique(place[place >= 0]))
    if lost != run["counts"]["skipped"]:
        problems.append(f"{lost} videos of the manifest have no row, {RUN_FILE} says {run['counts']['skipped']} were skipped")
    return "manifest"
