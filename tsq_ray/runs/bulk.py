"""One run over a manifest into a run folder, from selecting the videos to the final accounting."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import ERROR_TYPES, RunError, RunFailed, StorageError
from tsq_ray.manifest import Manifest, VideoRows, choose_split
from tsq_ray.runs.done import FAILED, OK, WARNED, Done, outdated_labels, read_done, still_to_do
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
    """The videos of a manifest that a run should process.

    `split`: the split they were chosen by. `retry`: error types whose videos are processed again.
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
        """Select by `--split`, `--limit` and `--retry-failed`; UserError for an unknown name."""
        wanted = choose_split(manifest, split)[:limit]
        return cls(manifest, wanted, split, retry_reasons(retry_failed))

    def todo(self, done: Done) -> VideoRows:
        """Return the wanted videos that still need processing, given the rows of a run folder."""
        return still_to_do(self.wanted, done, self.retry)


def retry_reasons(retry: str | None) -> tuple[str, ...]:
    """Return the error types that `--retry-failed [REASON]` selects: none, all, or the one named.

    Raises RunError for an unknown reason.
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
    """Return the videos that a run into `out` would process; write nothing and ignore the lease.

    Raises RunError if the folder holds something else, another kind of run or the run of another
    manifest.
    """
    check_folder(out, kind, selection.manifest)
    return selection.todo(read_done(out, selection.manifest))


class BulkRun:
    """One run over a manifest into the folder `out`, holding the folder's lease inside its `with`:

        with BulkRun(out, "features", identity, selection, config) as run:
            seconds = ...  # publish parts with the rows of run.todo
            return run.close(seconds, more)

    `todo`: the wanted videos that have no row yet. Entering raises RunError if the folder belongs
    to other work, or if another run writes to it; `take_over` takes it from that run. `started`:
    start of the run in seconds since 1970; by default the current time.
    """

    todo: VideoRows
    _begun = False

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
        self.happened: dict[str, float] = {}
        """Incidents of the run, if not 0: nodes_lost, videos_done_again, waited_s, rows_removed."""
        self.used: dict[str, float] = {}
        """What the work took: cpu_hours and gpu_hours of the nodes, video_hours, frames, tokens."""
        self._held = contextlib.ExitStack()
        self._done: Done | None = None

    @property
    def id(self) -> str:
        """The id of this run, as in its log lines, its metrics and `_run.json`."""
        return self.lease.holder.run

    def __enter__(self) -> BulkRun:
        # before taking the lease, which writes a file and may wait for another run
        check_folder(self.out, self.kind, self.selection.manifest, self.identity)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.lease)
            self.todo = self.find_todo()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def begin(self) -> None:
        """Record the configuration, and reopen a finished folder if work remains.

        Until then the folder is unchanged, so that a run that is refused, by the cluster for
        example, leaves nothing behind. Called before the first part; further calls do nothing.
        """
        if self._begun:
            return
        self.check()
        begin(self.out, self.kind, self.identity, self.selection.manifest)
        if self.todo:
            reopen(self.out)
        self._begun = True

    def find_todo(self) -> VideoRows:
        """Read the folder and return the wanted videos that have no row."""
        self._done = read_done(self.out, self.selection.manifest, self._done)
        todo = self.selection.todo(self._done)
        _free_memory()
        return todo

    def count_settled(self) -> tuple[int, int]:
        """Return how many videos were ok and how many failed when the folder was last read.

        Videos still to do are not counted. The run must be over the whole manifest.
        """
        assert self._done is not None, "the run must have been entered"
        ok = accounting(self._done, None)["ok"]
        return ok, len(self.selection.manifest.rows) - len(self.todo) - ok

    def check(self) -> None:
        """Raise RunFailed if another run took over the folder, so that nothing more is written."""
        self.lease.check()

    def stop_if_lost(self) -> None:
        """Raise RunFailed if the last renewal found the lease lost; does not access storage."""
        self.lease.stop_if_lost()

    def publish(self, table: pa.Table) -> str:
        """Publish rows as one part of the folder and return its name."""
        self.begin()
        self.check()
        return write_part(self.out, table, self.config.output.compression)

    def close(
        self,
        seconds: Mapping[str, float],
        more: Callable[[], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Remove rows that do not count, write `_run.json` and return its content.

        `seconds`: time by stage. `more`: returns further keys; called once the parts are final.
        Raises RunFailed if a wanted video has no row, another run took over, or storage fails.
        """
        with _storage_errors_as_run_failed():
            return self._close(seconds, more)

    def _close(
        self,
        seconds: Mapping[str, float],
        more: Callable[[], Mapping[str, Any]],
    ) -> dict[str, Any]:
        self.begin()
        self.check()
        _free_memory()
        done = self._read_done()
        counts = accounting(done, self.selection.split)
        finished = read_json(storage.join(self.out, RUN_FILE))
        if finished is not None and self._is_up_to_date(finished, counts, done):
            return finished | {"videos_done_now": 0, "already_done": True}
        reopen(self.out)
        done = self._tidy(done)
        wanted = self.selection.wanted
        lost = wanted.table["uri"].filter(pa.array(done.row_of(wanted) < 0))
        status = "failed" if lost else "complete"
        record = self._record(seconds) | dict(more())
        self.check()
        run = finish(self.out, self.kind, status, self.selection.manifest, counts, record)
        if lost:
            raise RunFailed(
                f"{storage.redact(self.out)}: {len(lost)} of {len(wanted)} videos have no row "
                f"(first: {storage.redact(lost[0].as_py())}); run the same command again"
            )
        return run

    def _read_done(self) -> Done:
        self._done = read_done(self.out, self.selection.manifest, self._done)
        return self._done

    def _is_up_to_date(
        self,
        finished: Mapping[str, Any],
        counts: Mapping[str, Any],
        done: Done,
    ) -> bool:
        """Whether `_run.json` already says what this run would write."""
        same_manifest = finished.get("manifest", {}).get("sha256") == self.selection.manifest.sha256
        if self.todo or not same_manifest or finished["counts"] != counts:
            return False
        if finished["status"] != "complete":
            return False
        return bool(done.counts().all()) and not outdated_labels(done)

    def _tidy(self, done: Done) -> Done:
        """Remove rows that do not count, update changed labels and return the remaining rows."""
        compression = self.config.output.compression
        if not done.counts().all():
            self.happened["rows_removed"] = prune(self.out, done, compression)
            done = self._read_done()
        relabel(self.out, outdated_labels(done), done, compression)
        return done

    def _record(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(self.started))
        return {
            "config": self.config.record(),
            "split": self.selection.split,
            "run_id": self.id,
            "happened": self.happened,
            "used": self.used,
            "started": started,
            "wall_seconds": round(time.time() - self.started, 2),
            "videos_done_now": len(self.todo),
            "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
            "slowest_stage": max(seconds, key=lambda name: seconds[name]) if seconds else None,
        }


def accounting(done: Done, split: str | None) -> dict[str, Any]:
    """Count the rows such that inputs = ok + failed + skipped, with failures by reason.

    Videos without a row were skipped by the split or by the limit.
    """
    manifest, rows = done.manifest, done.counting
    flags = rows["flags"]
    numbers = np.bincount(rows["error"][flags & FAILED > 0], minlength=len(ERROR_TYPES))
    by_type = Counter(
        {name: int(number) for name, number in zip(ERROR_TYPES, numbers, strict=True) if number}
    )
    missing = manifest.rows.table["split"].filter(pa.array(done.row < 0))
    by_split = 0
    if split is not None and len(missing):
        by_split = len(missing) - pc.sum(pc.equal(pc.fill_null(missing, ""), split)).as_py()
    return {
        "inputs": len(manifest.rows),
        "ok": int((flags & OK > 0).sum()),
        "failed": by_type.total(),
        "skipped": len(missing),
        "skipped_by": {"split": by_split, "limit": len(missing) - by_split},
        "failed_by_type": dict(by_type.most_common()),
        "with_warnings": int((flags & (OK | WARNED) == OK | WARNED).sum()),
    }


def _free_memory() -> None:
    """Free Arrow's unused memory and the reference cycles that Ray Data leaves.

    A large run frees several hundred megabytes.
    """
    gc.collect()
    pa.default_memory_pool().release_unused()


@contextlib.contextmanager
def _storage_errors_as_run_failed() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        advice = "the rows are saved but the run is not closed: run the same command again"
        raise RunFailed(f"{error}; {advice}") from error
