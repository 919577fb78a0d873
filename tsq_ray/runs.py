"""The run folder of extract and score: parts, what is done (resume), accounting, verify, `_run.json`.

A part is published whole and named after the videos in it, so that a task that is run twice writes the same file twice.
`_config.json` is written before the first part, `_run.json` after the last. What is done is read from the parts alone:
a killed run leaves nothing else behind. Duplicate and outdated rows, which only kills and changed videos can leave,
are taken out before `_run.json` is written.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsq_ray import provenance, schema, storage
from tsq_ray.config import Config, differing, flatten
from tsq_ray.done import (
    EMPTY,
    Current,
    DoneRows,
    Part,
    done_rows,
    list_parts,
    other_version,
    outdated_labels,
    pick_current,
    read_part,
    still_to_do,
)
from tsq_ray.errors import ERROR_TYPES, RunError, RunFailed, StorageError
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, read_manifest

__all__ = ["Current", "done_rows", "list_parts", "pick_current", "read_manifest", "read_part", "still_to_do"]

RUN_FILE = "_run.json"
CONFIG_FILE = "_config.json"
FORMAT = 1
Kind = Literal["features", "predictions"]


def read_json(uri: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        data = storage.read_bytes(uri)
    except StorageError as error:
        if error.error_type == "not_found":
            return None
        raise
    try:
        return json.loads(data)
    except ValueError:
        raise RunError(f"{storage.redact(uri)}: not JSON; the file is damaged, delete it and run again") from None


def write_json(uri: str, content: Mapping[str, Any]) -> None:
    """Publish a JSON object, readable by people."""
    storage.write_bytes(uri, (json.dumps(content, indent=1, default=str) + "\n").encode())


def read_run(uri: str, kind: Kind | None = None) -> dict[str, Any]:
    """`_run.json` of a finished run. RunError where `uri` is no run folder, is not finished, or is of another kind."""
    uri = storage.normalize(uri)
    run = read_json(storage.join(uri, RUN_FILE))
    if run is None:
        if read_json(storage.join(uri, CONFIG_FILE)) is not None:
            raise RunError(f"{storage.redact(uri)}: this run is not finished; give its command again, it goes on where it stopped")
        raise RunError(f"{storage.redact(uri)}: no run folder (no {RUN_FILE}); name what extract or score wrote with --out")
    if run.get("format") != FORMAT:
        raise RunError(f"{storage.redact(uri)}: run format {run.get('format')!r}; this version reads {FORMAT}")
    if kind is not None and run["kind"] != kind:
        raise RunError(f"{storage.redact(uri)}: holds {run['kind']}, expected {kind}")
    return run


def begin(uri: str, kind: Kind, identity: Mapping[str, Any], manifest: Manifest) -> None:
    """Make or enter a run folder. RunError where it belongs to another configuration or manifest; names the keys that differ.

    `identity` holds, nested, everything that the rows hang on.
    """
    want = json.loads(json.dumps({"format": FORMAT, "kind": kind, "manifest_id": manifest.id, "config": identity}, default=str))
    have = check_folder(uri, kind, manifest)
    if have is None:
        write_json(storage.join(uri, CONFIG_FILE), want)
        return
    before, after = flatten(have), flatten(want)
    differ = differing(before, after)
    if differ:
        shown = "; ".join(f"{key.removeprefix('config.')}: {before.get(key)!r} there, {after.get(key)!r} now" for key in differ[:5])
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise RunError(f"{storage.redact(uri)}: made with another configuration ({shown}{more}); use the same one or another --out")


def check_folder(uri: str, kind: Kind, manifest: Manifest) -> dict[str, Any] | None:
    """`_config.json` of a run folder, None of a new one. RunError where it is a file, holds something else, or belongs to another kind of run or manifest."""
    shown_uri = storage.redact(uri)
    if storage.is_file(uri):
        raise RunError(f"{shown_uri}: is a file; name a folder, a new one or that of an earlier run")
    have = read_json(storage.join(uri, CONFIG_FILE))
    if have is None:
        foreign = next(storage.walk(uri), None) if storage.is_folder(uri) else None
        if foreign is not None:
            raise RunError(f"{shown_uri}: holds files of something else ({storage.redact(foreign.uri)}); take an empty folder")
        return None
    if have.get("kind") != kind:
        raise RunError(f"{shown_uri}: holds {have.get('kind')}, not {kind}; take another --out")
    if have.get("manifest_id") != manifest.id:
        raise RunError(f"{shown_uri}: made from a manifest of other sources; use that manifest or another --out")
    return have


def enter(
    uri: str, kind: Kind, identity: Mapping[str, Any], manifest: Manifest, wanted: Sequence[VideoRef], retry: Collection[str] = ()
) -> VideoRows:
    """Make or enter a run folder, as `begin`; the wanted videos that are still to do in it, failed ones again where their reason is in `retry`."""
    begin(uri, kind, identity, manifest)
    return remaining(uri, manifest, wanted, retry)


def remaining(uri: str, manifest: Manifest, wanted: Sequence[VideoRef], retry: Collection[str] = ()) -> VideoRows:
    """The wanted videos that are still to do in a run folder, which may not exist yet; failed ones again where their reason is in `retry`."""
    todo = still_to_do(wanted, pick_current(done_rows(uri), manifest), retry)
    _release()
    return todo


def _release() -> None:
    """Give back what Arrow keeps for later and what Ray Data leaves in reference cycles: of a large run some hundred megabytes."""
    gc.collect()
    pa.default_memory_pool().release_unused()


def part_name(video_ids: Iterable[str]) -> str:
    """The name of the part that holds exactly these videos."""
    return f"part-{hashlib.sha256(','.join(sorted(video_ids)).encode()).hexdigest()[:20]}.parquet"


def write_part(uri: str, table: pa.Table, compression: str) -> str:
    """Publish a table as one part of the run folder; its name."""
    name = part_name(table["video_id"].to_pylist())
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, use_dictionary=["status", "error_type", "codec", "split"])
    storage.write_bytes(storage.join(uri, name), sink.getvalue().to_pybytes())
    return name


def retry_reasons(retry: str | None) -> tuple[str, ...]:
    """`--retry-failed [REASON]` as error types: none, all, or the one named (RunError for an unknown one)."""
    if retry is None:
        return ()
    if retry in ("", "all"):
        return ERROR_TYPES
    if retry not in ERROR_TYPES:
        raise RunError(f"--retry-failed {retry}: no such reason; there is: {', '.join(ERROR_TYPES)}")
    return (retry,)


def reopen(uri: str) -> None:
    """Take `_run.json` away before rows change: from here until `finish` the folder is not finished."""
    storage.remove(storage.join(uri, RUN_FILE))


def prune(uri: str, current: Current, compression: str) -> int:
    """Take out rows that do not count: duplicates, rows of changed and of deleted videos; how many went."""
    counts, written, stale = current.counts(), set(), []
    for part in current.rows.parts:
        mask = counts[part.start : part.start + part.num_rows]
        if mask.all():
            continue
        stale.append(part.name)
        if mask.any():
            written.add(write_part(uri, read_part(storage.join(uri, part.name)).filter(pa.array(mask)), compression))
    # what is left of one part may have taken the name of another one that has nothing left
    for name in set(stale) - written:
        storage.remove(storage.join(uri, name))
    return int((~counts).sum())


def relabel(uri: str, parts: Iterable[Part], current: Current, compression: str) -> None:
    """Take labels, their names and splits of these parts from the manifest anew; nothing else of a row changes.

    Every row of the parts must count: prune first.
    """
    manifest = current.manifest
    for part in parts:
        table = read_part(storage.join(uri, part.name))
        rows = VideoRows(manifest.rows.table.take(pa.array(current.place[part.start : part.start + part.num_rows])))
        names = [[manifest.classes[number] for number in row.labels] if row.labels else None for row in rows]
        values = {"labels": rows.table["labels"], "split": rows.table["split"], "label_names": names}
        for column, new in values.items():
            if column in table.column_names:
                place = table.schema.get_field_index(column)
                field = table.schema.field(place)
                table = table.set_column(place, field, pa.array(new, field.type) if isinstance(new, list) else new)
        metadata = {**(table.schema.metadata or {}), schema.CLASSES_KEY: json.dumps(manifest.classes).encode()}
        write_part(uri, table.replace_schema_metadata(metadata), compression)


def accounting(manifest: Manifest, split: str | None, current: Current) -> dict[str, Any]:
    """inputs = ok + failed + skipped, failures by reason; what has no row is skipped by the split or by the limit."""
    table = current.table
    is_ok = pc.equal(table["status"], "ok")
    reasons = pc.value_counts(pc.fill_null(table["error_type"].filter(pc.equal(table["status"], "failed")), "internal"))
    by_reason = Counter({record["values"]: record["counts"] for record in reasons.to_pylist()})
    missing = manifest.rows.table["split"].filter(pa.array(current.row < 0))
    by_split = len(missing) - pc.sum(pc.equal(pc.fill_null(missing, ""), split)).as_py() if split is not None and len(missing) else 0
    return {
        "inputs": len(manifest.rows),
        "ok": pc.sum(is_ok).as_py() or 0,
        "failed": sum(by_reason.values()),
        "skipped": len(missing),
        "skipped_by": {"split": by_split, "limit": len(missing) - by_split},
        "failed_by_type": dict(by_reason.most_common()),
        "with_warnings": pc.sum(pc.and_(is_ok, table["has_warnings"])).as_py() or 0,
    }


def finish(uri: str, kind: Kind, status: str, manifest: Manifest, counts: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Write `_run.json`, the last file of a run, and return it."""
    config = read_json(storage.join(uri, CONFIG_FILE)) or {}
    parts = [{"name": storage.name_of(part.uri), "bytes": part.size_bytes} for part in list_parts(uri)]
    run = {
        "format": FORMAT,
        "kind": kind,
        "status": status,
        "counts": dict(counts),
        "manifest": {"uri": storage.redact(manifest.uri), "id": manifest.id, "sha256": manifest.sha256},
        "classes": manifest.classes,
        "identity": config.get("config", {}),
        "versions": provenance.versions(),
        "git_revision": provenance.git_revision(),
        "ended": provenance.now(),
        "parts": parts,
        **more,
    }
    write_json(storage.join(uri, RUN_FILE), run)
    return run


@contextlib.contextmanager
def _storage_fails_the_run() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise RunFailed(f"{error}; the rows are there, the run is not closed: give the same command again") from error


@_storage_fails_the_run()
def close_run(
    out: str,
    kind: Kind,
    manifest: Manifest,
    wanted: Sequence[VideoRef],
    todo: Sequence[VideoRef],
    split: str | None,
    config: Config,
    started: float,
    seconds: Mapping[str, float],
    more: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Take out rows that do not count, do the accounting and write `_run.json`. RunFailed where a wanted video has no row, or storage fails."""
    _release()
    current = pick_current(done_rows(out), manifest)
    stale = len(current) < len(current.rows)
    finished = read_json(storage.join(out, RUN_FILE))
    unchanged = finished is not None and finished.get("manifest", {}).get("sha256") == manifest.sha256
    counts = accounting(manifest, split, current)
    relabelled = outdated_labels(current)
    if not todo and not stale and not relabelled and finished is not None and unchanged and finished["counts"] == counts:
        return finished | {"videos_done_now": 0, "already_done": True}
    reopen(out)
    if stale:
        prune(out, current, config.output.compression)
        current = pick_current(done_rows(out), manifest)
        relabelled = outdated_labels(current)
    relabel(out, relabelled, current, config.output.compression)
    rows = VideoRows.of(wanted)
    lost = rows.table["uri"].filter(pa.array(current.row_of(rows) < 0))
    run = finish(
        out,
        kind,
        "failed" if lost else "complete",
        manifest,
        counts,
        {
            "config": config.model_dump(mode="json"),
            "split": split,
            "started": _iso(started),
            "wall_seconds": round(time.time() - started, 2),
            "videos_done_now": len(todo),
            "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
            "slowest_stage": max(seconds, key=lambda name: seconds[name]) if seconds else None,
            **more(),
        },
    )
    if lost:
        raise RunFailed(
            f"{out}: {len(lost)} of {len(wanted)} videos have no row (first: {storage.redact(lost[0].as_py())}); give the same command again"
        )
    return run


def _iso(timestamp: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(timestamp))


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
