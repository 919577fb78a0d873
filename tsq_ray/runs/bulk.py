"""One run over a manifest into a run folder, from what is to do to the accounting at the end."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import ERROR_TYPES, RunError, RunFailed, StorageError
from tsq_ray.manifest import Manifest, VideoRows, choose_split
from tsq_ray.runs.done import Current, done_rows, outdated_labels, pick_current, still_to_do
from tsq_ray.runs.folder import (
    RUN_FILE,
    Kind,
    begin,
    check_folder,
    finish,
    prune,
    read_json,
    relabel,
    reopen,
    write_part,
)
from tsq_ray.runs.identity import Identity
from tsq_ray.runs.lease import Lease


@dataclass(frozen=True)
class Selection:
    """The videos of a manifest that a run is asked for.

    `split`: the one they were chosen by. `retry`: videos that failed for one of these reasons are
    done again.
    """

    manifest: Manifest
    wanted: VideoRows
    split: str | None = None
    retry: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        split: str | None = None,
        limit: int | None = None,
        retry_failed: str | None = None,
    ) -> Selection:
        """Choose by `--split`, `--limit` and `--retry-failed` (UserError for an unknown name)."""
        wanted = choose_split(manifest, split)[:limit]
        return cls(manifest, wanted, split, retry_reasons(retry_failed))

    def todo(self, uri: str) -> VideoRows:
        """The wanted videos that are still to do in a run folder, which may not exist yet."""
        current = pick_current(done_rows(uri), self.manifest)
        todo = still_to_do(self.wanted, current, self.retry)
        del current
        _free_memory()
        return todo


def retry_reasons(retry: str | None) -> tuple[str, ...]:
    """`--retry-failed [REASON]` as error types: none, all, or the one named.

    RunError for an unknown one.
    """
    if retry is None:
        return ()
    if retry in ("", "all"):
        return ERROR_TYPES
    if retry not in ERROR_TYPES:
        allowed = ", ".join(ERROR_TYPES)
        raise RunError(f"--retry-failed {retry}: no such reason; allowed: {allowed}")
    return (retry,)


def todo_without_entering(out: str, kind: Kind, selection: Selection) -> VideoRows:
    """The videos that a run into `out` would do; writes nothing and heeds no lease.

    RunError if the folder belongs to something else, to another kind of run or manifest.
    """
    check_folder(out, kind, selection.manifest)
    return selection.todo(out)


class BulkRun:
    """One run over a manifest into the folder `out`, which it holds the lease of inside its `with`:

        with BulkRun(out, "features", identity, selection, config) as run:
            seconds = ...  # publish parts with the rows of run.todo
            return run.close(seconds, more)

    `todo`: the wanted videos that have no row yet. Entering raises RunError if the folder belongs
    to other work, or if another run writes to it; `take_over` takes it from that run. `started`:
    when the run began, in seconds since 1970; by default now.
    """

    todo: VideoRows

    def __init__(
        self,
        out: str,
        kind: Kind,
        identity: Identity,
        selection: Selection,
        config: Config,
        *,
        started: float | None = None,
        take_over: bool = False,
    ) -> None:
        self.out, self.kind, self.identity = out, kind, identity
        self.selection, self.config = selection, config
        self.started = time.time() if started is None else started
        self.lease = Lease(out, take_over=take_over)
        self._held = contextlib.ExitStack()

    def __enter__(self) -> BulkRun:
        # before the lease: a folder of something else gets no file, and nobody waits for a refusal
        check_folder(self.out, self.kind, self.selection.manifest, self.identity)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.lease)
            begin(self.out, self.kind, self.identity, self.selection.manifest)
            self.todo = self.selection.todo(self.out)
            if self.todo:
                reopen(self.out)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def check(self) -> None:
        """RunFailed if another run took the folder over: then nothing may be written any more."""
        self.lease.check()

    def stop_if_lost(self) -> None:
        """RunFailed if the last renewal found that another run took the folder over; asks no storage."""
        self.lease.stop_if_lost()

    def publish(self, table: pa.Table) -> str:
        """Publish rows as one part of the folder; its name."""
        self.check()
        return write_part(self.out, table, self.config.output.compression)

    def close(
        self,
        seconds: Mapping[str, float],
        more: Callable[[], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Take out rows that do not count, do the accounting and write `_run.json`; its content.

        `seconds`: by stage. `more`: further keys, asked for when the parts are final. RunFailed if
        a wanted video has no row, another run took over, or storage fails.
        """
        with _storage_fails_the_run():
            return self._close(seconds, more)

    def _close(
        self,
        seconds: Mapping[str, float],
        more: Callable[[], Mapping[str, Any]],
    ) -> dict[str, Any]:
        self.check()
        _free_memory()
        current = self._current()
        counts = accounting(self.selection.manifest, self.selection.split, current)
        finished = read_json(storage.join(self.out, RUN_FILE))
        if finished is not None and self._is_up_to_date(finished, counts, current):
            return finished | {"videos_done_now": 0, "already_done": True}
        reopen(self.out)
        current = self._tidy(current)
        wanted = self.selection.wanted
        lost = wanted.table["uri"].filter(pa.array(current.row_of(wanted) < 0))
        status = "failed" if lost else "complete"
        record = self._record(seconds) | dict(more())
        self.check()
        run = finish(self.out, self.kind, status, self.selection.manifest, counts, record)
        if lost:
            raise RunFailed(
                f"{storage.redact(self.out)}: {len(lost)} of {len(wanted)} videos have no row "
                f"(first: {storage.redact(lost[0].as_py())}); give the same command again"
            )
        return run

    def _current(self) -> Current:
        return pick_current(done_rows(self.out), self.selection.manifest)

    def _is_up_to_date(
        self,
        finished: Mapping[str, Any],
        counts: Mapping[str, Any],
        current: Current,
    ) -> bool:
        """Whether `_run.json` says already what this run would write."""
        same_manifest = finished.get("manifest", {}).get("sha256") == self.selection.manifest.sha256
        if self.todo or not same_manifest or finished["counts"] != counts:
            return False
        return len(current) == len(current.rows) and not outdated_labels(current)

    def _tidy(self, current: Current) -> Current:
        """Take out rows that do not count and renew labels that changed; the rows that are left."""
        compression = self.config.output.compression
        if len(current) < len(current.rows):
            prune(self.out, current, compression)
            current = self._current()
        relabel(self.out, outdated_labels(current), current, compression)
        return current

    def _record(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(self.started))
        return {
            "config": self.config.model_dump(mode="json"),
            "split": self.selection.split,
            "started": started,
            "wall_seconds": round(time.time() - self.started, 2),
            "videos_done_now": len(self.todo),
            "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
            "slowest_stage": max(seconds, key=lambda name: seconds[name]) if seconds else None,
        }


def accounting(manifest: Manifest, split: str | None, current: Current) -> dict[str, Any]:
    """inputs = ok + failed + skipped, failures by reason.

    What has no row was skipped by the split or by the limit.
    """
    table = current.table
    is_ok, is_failed = pc.equal(table["status"], "ok"), pc.equal(table["status"], "failed")
    reasons = pc.value_counts(pc.fill_null(table["error_type"].filter(is_failed), "internal"))
    by_type = Counter({record["values"]: record["counts"] for record in reasons.to_pylist()})
    missing = manifest.rows.table["split"].filter(pa.array(current.row < 0))
    by_split = 0
    if split is not None and len(missing):
        by_split = len(missing) - pc.sum(pc.equal(pc.fill_null(missing, ""), split)).as_py()
    return {
        "inputs": len(manifest.rows),
        "ok": pc.sum(is_ok).as_py() or 0,
        "failed": by_type.total(),
        "skipped": len(missing),
        "skipped_by": {"split": by_split, "limit": len(missing) - by_split},
        "failed_by_type": dict(by_type.most_common()),
        "with_warnings": pc.sum(pc.and_(is_ok, table["has_warnings"])).as_py() or 0,
    }


def _free_memory() -> None:
    """Give back what Arrow keeps and what Ray Data leaves in reference cycles.

    Of a large run some hundred megabytes.
    """
    gc.collect()
    pa.default_memory_pool().release_unused()


@contextlib.contextmanager
def _storage_fails_the_run() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        advice = "the rows are there, the run is not closed: give the same command again"
        raise RunFailed(f"{error}; {advice}") from error
