"""One run over a manifest into a run folder."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import ERROR_TYPES, RunError, RunFailed, StorageError
from tsq_ray.manifest import Manifest, VideoRef, VideoRows
from tsq_ray.runs.done import Current, done_rows, outdated_labels, pick_current, still_to_do
from tsq_ray.runs.folder import RUN_FILE, Kind, begin, finish, prune, read_json, relabel, reopen
from tsq_ray.runs.identity import Identity


def retry_reasons(retry: str | None) -> tuple[str, ...]:
    """`--retry-failed [REASON]` as error types: none, all, or the one named (RunError for an unknown one)."""
    if retry is None:
        return ()
    if retry in ("", "all"):
        return ERROR_TYPES
    if retry not in ERROR_TYPES:
        raise RunError(f"--retry-failed {retry}: no such reason; there is: {', '.join(ERROR_TYPES)}")
    return (retry,)


def enter(
    uri: str, kind: Kind, identity: Identity, manifest: Manifest, wanted: Sequence[VideoRef], retry: Collection[str] = ()
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
