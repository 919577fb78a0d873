"""The run folder of extract and score: its configuration, its parts, `_run.json`.

A part is published atomically and named after the videos in it, so that a task that runs twice
writes the same file twice. `_config.json` is written before the first part, `_run.json` after the
last. Progress is read from the parts alone: a killed run leaves nothing else behind. Duplicate and
outdated rows, which only kills and changed videos can cause, are removed before `_run.json` is
written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tsq_ray import provenance, schema, storage
from tsq_ray.errors import RunError, StorageError
from tsq_ray.manifest import Manifest
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import Done, Part, list_parts
from tsq_ray.runs.identity import Identity
from tsq_ray.runs.lease import LEASE_FILE

RUN_FILE = "_run.json"
CONFIG_FILE = "_config.json"
FORMAT = 1
Kind = Literal["features", "predictions"]


def read_json(uri: str) -> dict[str, Any] | None:
    """Read a JSON object; None if the file does not exist."""
    try:
        data = storage.read_bytes(uri)
    except StorageError as error:
        if error.error_type == "not_found":
            return None
        raise
    try:
        return json.loads(data)
    except ValueError:
        raise RunError(
            f"{storage.redact(uri)}: not JSON; the file is damaged, delete it and run again"
        ) from None


def write_json(uri: str, content: Mapping[str, Any]) -> None:
    """Publish a JSON object, indented for reading."""
    storage.write_bytes(uri, (json.dumps(content, indent=1, default=str) + "\n").encode())


def read_run(uri: str, kind: Kind | None = None) -> dict[str, Any]:
    """Read `_run.json` of a finished run.

    Raises RunError if `uri` is not a run folder, its run is unfinished, or it is of another kind.
    """
    uri = storage.normalize(uri)
    run = read_json(storage.join(uri, RUN_FILE))
    if run is None:
        if read_json(storage.join(uri, CONFIG_FILE)) is not None:
            raise RunError(
                f"{storage.redact(uri)}: this run is not finished; "
                "run its command again to resume it"
            )
        raise RunError(
            f"{storage.redact(uri)}: no run folder (no {RUN_FILE}); "
            "name what extract or score wrote with --out"
        )
    provenance.check_format(run, FORMAT, storage.redact(uri), RunError)
    if kind is not None and run["kind"] != kind:
        raise RunError(f"{storage.redact(uri)}: holds {run['kind']}, expected {kind}")
    return run


def begin(uri: str, kind: Kind, identity: Identity, manifest: Manifest) -> None:
    """Create a run folder or check an existing one. Raises RunError as `check_folder` does."""
    if not check_folder(uri, kind, manifest, identity):
        content = {"format": FORMAT, "kind": kind, "manifest_id": manifest.id}
        write_json(storage.join(uri, CONFIG_FILE), {**content, "config": identity.parts})


def check_folder(
    uri: str,
    kind: Kind,
    manifest: Manifest,
    identity: Identity | None = None,
) -> bool:
    """Check that a run may write to this folder; return whether one has already begun there.

    Raises RunError if it is a file, holds something else, or belongs to another kind of run, a
    manifest of other sources, another format or, with `identity`, another configuration.
    """
    shown = storage.redact(uri)
    if storage.is_file(uri):
        raise RunError(f"{shown}: is a file; name a folder, a new one or that of an earlier run")
    begun = read_json(storage.join(uri, CONFIG_FILE))
    if begun is None:
        _refuse_foreign_files(uri)
        return False
    provenance.check_format(begun, FORMAT, shown, RunError)
    if begun.get("kind") != kind:
        raise RunError(f"{shown}: holds {begun.get('kind')}, not {kind}; use another --out")
    if begun.get("manifest_id") != manifest.id:
        what = "made from a manifest of other sources"
        raise RunError(f"{shown}: {what}; use that manifest or another --out")
    if identity is not None:
        identity.refuse_other(begun.get("config", {}), uri, "made with another configuration")
    return True


def _refuse_foreign_files(uri: str) -> None:
    files = storage.walk(uri) if storage.is_folder(uri) else ()
    lease = storage.join(uri, LEASE_FILE)
    foreign = next((file.uri for file in files if file.uri != lease), None)
    if foreign is not None:
        what = f"holds files that are not a run's ({storage.redact(foreign)})"
        raise RunError(f"{storage.redact(uri)}: {what}; use an empty folder")


def part_name(video_ids: Iterable[str]) -> str:
    """Return the name of the part that holds exactly these videos."""
    return f"part-{hashlib.sha256(','.join(sorted(video_ids)).encode()).hexdigest()[:20]}.parquet"


def write_part(uri: str, table: pa.Table, compression: str) -> str:
    """Publish a table as one part of the run folder and return its name."""
    name = part_name(table["video_id"].to_pylist())
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression=compression,
        use_dictionary=["status", "error_type", "codec", "split"],
    )
    storage.write_bytes(storage.join(uri, name), sink.getvalue().to_pybytes())
    return name


def reopen(uri: str) -> None:
    """Remove `_run.json` before rows change: the run is unfinished until `finish`."""
    storage.remove(storage.join(uri, RUN_FILE))


def prune(uri: str, done: Done, compression: str) -> int:
    """Remove duplicates and rows of changed or deleted videos; return how many were removed."""
    counts, written, stale = done.counts(), set(), []
    for part in done.parts:
        mask = counts[part.start : part.start + part.num_rows]
        if mask.all():
            continue
        stale.append(part.name)
        if mask.any():
            written.add(
                write_part(
                    uri, read_part(storage.join(uri, part.name)).filter(pa.array(mask)), compression
                )
            )
    # the remaining rows of one part may reuse the name of another stale part: keep that file
    for name in set(stale) - written:
        storage.remove(storage.join(uri, name))
    return int((~counts).sum())


def relabel(uri: str, parts: Iterable[Part], done: Done, compression: str) -> None:
    """Update labels, label names and splits of these parts from the manifest.

    Nothing else in a row changes. Every row of the parts must count: prune first.
    """
    manifest = done.manifest
    for part in parts:
        table = read_part(storage.join(uri, part.name))
        rows = manifest.rows.take(done.rows["place"][part.start : part.start + part.num_rows])
        names = [
            [manifest.classes[number] for number in row.labels] if row.labels else None
            for row in rows
        ]
        values = {
            "labels": rows.table["labels"],
            "split": rows.table["split"],
            "label_names": names,
        }
        for column, new in values.items():
            if column in table.column_names:
                place = table.schema.get_field_index(column)
                field = table.schema.field(place)
                table = table.set_column(
                    place, field, pa.array(new, field.type) if isinstance(new, list) else new
                )
        metadata = {
            **(table.schema.metadata or {}),
            schema.CLASSES_KEY: json.dumps(manifest.classes).encode(),
        }
        write_part(uri, table.replace_schema_metadata(metadata), compression)


def finish(
    uri: str,
    kind: Kind,
    status: str,
    manifest: Manifest,
    counts: Mapping[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `_run.json`, the last file of a run, and return it."""
    parts = [
        {"name": storage.name_of(part.uri), "bytes": part.size_bytes} for part in list_parts(uri)
    ]
    run = {
        "format": FORMAT,
        "kind": kind,
        "status": status,
        "counts": dict(counts),
        "manifest": {
            "uri": storage.redact(manifest.uri),
            "id": manifest.id,
            "sha256": manifest.sha256,
        },
        "classes": manifest.classes,
        "identity": (read_json(storage.join(uri, CONFIG_FILE)) or {}).get("config", {}),
        **provenance.of_this_run(),
        "parts": parts,
        **more,
    }
    write_json(storage.join(uri, RUN_FILE), run)
    return run
