"""What a run exports to Prometheus through Ray (docs/operations.md lists it).

Ray puts `ray_` before each name. The driver counts everything: it learns of each part exactly once,
no matter which processes are killed. Each series has the labels `run`, the id of the run as in its
JSON log lines and `_run.json`, and `stage`, the command. Runs that write no rows (train, finetune,
evaluate) export only those of `update` and `end`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PublishedPart:
    """What a published part holds."""

    videos: Mapping[str, int]
    """Rows by error type; "" for those that are ok."""
    video_bytes: int
    """Size of their videos."""
    fetched_bytes: int
    """Bytes of these videos that were read from storage."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of work on these videos, by step."""
    tokens: Mapping[str, float] = field(default_factory=dict)
    """tokens_in and tokens_out of the recogniser's server."""


class RunMetrics:
    """The metrics of one run."""

    def __init__(self, run: str, stage: str, holder: str) -> None:
        """`run`: its id. `stage`: its command. `holder`: who runs it, as in its folder's lease."""
        from ray.util import metrics

        def create(kind: Any, name: str, text: str, *more: str) -> Any:
            return kind(f"tsq_run_{name}", text, ("run", "stage", *more))

        counter, gauge = metrics.Counter, metrics.Gauge
        self.stage, self._holder = stage, holder
        self._tags = {"run": run, "stage": stage}
        self._videos = create(
            counter, "videos", "Rows published, by status and error type.", "status", "error_type"
        )
        self._parts = create(counter, "parts", "Parts published.")
        self._bytes = create(
            counter, "video_bytes", "Size of the videos whose rows were published."
        )
        self._fetched = create(
            counter, "fetched_bytes", "Bytes of those videos that were read from storage."
        )
        self._seconds = create(counter, "seconds", "Seconds of work on those videos.", "step")
        self._tokens = create(
            counter, "tokens", "Tokens that the recogniser's server counted.", "direction"
        )
        self._left = create(gauge, "videos_left", "Videos that have no published row yet.")
        self._queued = create(
            gauge, "videos_queued", "Videos done whose rows are not published yet."
        )
        self._last = create(
            gauge, "last_part_timestamp_seconds", "When the last part was published."
        )
        self._waiting = create(
            gauge, "waiting_seconds", "Seconds that the run has been waiting for room."
        )
        self._nodes = create(gauge, "nodes_lost", "Nodes lost during the run.")
        self._again = create(
            gauge, "videos_done_again", "Videos done again because their rows were lost."
        )
        self._progress = create(
            gauge, "last_progress_timestamp_seconds", "When the run's progress last changed."
        )
        self._info = create(gauge, "info", "1 during the run.", "holder")
        self._ended = create(counter, "ended", "Runs whose work on the cluster ended.", "status")
        self._published = time.time()

    def published(self, part: PublishedPart) -> None:
        """Count a part."""
        self._published = time.time()
        for error_type, count in part.videos.items():
            status = "failed" if error_type else "ok"
            self._videos.inc(count, self._tags | {"status": status, "error_type": error_type})
        self._parts.inc(1, self._tags)
        if part.video_bytes > 0:
            self._bytes.inc(part.video_bytes, self._tags)
        if part.fetched_bytes > 0:
            self._fetched.inc(part.fetched_bytes, self._tags)
        for step, value in part.seconds.items():
            if value > 0:
                self._seconds.inc(value, self._tags | {"step": step})
        for name, tokens in part.tokens.items():
            if tokens > 0:
                self._tokens.inc(tokens, self._tags | {"direction": name.removeprefix("tokens_")})

    def update(self, waiting_s: float, progressed: float, happened: Mapping[str, float]) -> None:
        """Set the gauges of any run. Call it every few seconds, because gauges expire.

        `progressed`: when the run's progress last changed, in seconds since 1970.
        """
        self._waiting.set(waiting_s, self._tags)
        self._progress.set(progressed, self._tags)
        self._nodes.set(happened.get("nodes_lost", 0), self._tags)
        self._info.set(1, self._tags | {"holder": self._holder})

    def update_rows(self, left: int, queued: int, again: int) -> None:
        """Set the gauges of a run that writes rows, as often as `update`."""
        self._left.set(left, self._tags)
        self._queued.set(queued, self._tags)
        self._again.set(again, self._tags)
        self._last.set(self._published, self._tags)

    def end(self, status: str) -> None:
        """Count the end of the run. `status`: complete or failed."""
        self._ended.inc(1, self._tags | {"status": status})
