"""What a run exports to Prometheus through Ray (docs/operations.md lists it).

Ray puts `ray_` before each name. Everything is counted by the driver, which hears of each part
once, whatever was killed. Each series has the labels `run`, the id of the run as in its JSON log
lines and `_run.json`, and `stage`, the command. Runs that write no rows (train, finetune, evaluate)
export those of `update` and `end` only.
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
    """Bytes of them read from storage."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of work on them by step."""
    tokens: Mapping[str, float] = field(default_factory=dict)
    """tokens_in and tokens_out of the recogniser's server."""


class RunMetrics:
    """The metrics of one run."""

    def __init__(self, run: str, stage: str, holder: str) -> None:
        """`run`: its id. `stage`: its command. `holder`: who runs it, as in its folder's lease."""
        from ray.util import metrics

        def made(kind: Any, name: str, text: str, *more: str) -> Any:
            return kind(f"tsq_run_{name}", text, ("run", "stage", *more))

        counter, gauge = metrics.Counter, metrics.Gauge
        self.stage, self._holder = stage, holder
        self._tags = {"run": run, "stage": stage}
        self._videos = made(
            counter, "videos", "Rows published, by status and error type.", "status", "error_type"
        )
        self._parts = made(counter, "parts", "Parts published.")
        self._bytes = made(counter, "video_bytes", "Size of the videos whose rows were published.")
        self._fetched = made(
            counter, "fetched_bytes", "Bytes of those videos that were read from storage."
        )
        self._seconds = made(counter, "seconds", "Seconds of work on those videos.", "step")
        self._tokens = made(
            counter, "tokens", "Tokens that the recogniser's server counted.", "direction"
        )
        self._left = made(gauge, "videos_left", "Videos that have no published row yet.")
        self._queued = made(gauge, "videos_queued", "Videos done whose rows are not published yet.")
        self._last = made(gauge, "last_part_timestamp_seconds", "When the last part was published.")
        self._waiting = made(
            gauge, "waiting_seconds", "Seconds that it has waited for room by now."
        )
        self._nodes = made(gauge, "nodes_lost", "Nodes lost during the run.")
        self._again = made(
            gauge, "videos_done_again", "Videos done again because their rows were lost."
        )
        self._progress = made(
            gauge, "last_progress_timestamp_seconds", "When its progress last changed."
        )
        self._info = made(gauge, "info", "1 while the run lasts.", "holder")
        self._ended = made(counter, "ended", "Runs whose work on the cluster ended.", "status")
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
        """Set the gauges of any run; to be called every few seconds, as they expire.

        `progressed`: when its progress last changed, in seconds since 1970.
        """
        self._waiting.set(waiting_s, self._tags)
        self._progress.set(progressed, self._tags)
        self._nodes.set(happened.get("nodes_lost", 0), self._tags)
        self._info.set(1, self._tags | {"holder": self._holder})

    def update_rows(self, left: int, queued: int, again: int) -> None:
        """Set the gauges of a run that writes rows, in the same way."""
        self._left.set(left, self._tags)
        self._queued.set(queued, self._tags)
        self._again.set(again, self._tags)
        self._last.set(self._published, self._tags)

    def end(self, status: str) -> None:
        """Count the end of the run. `status`: complete or failed."""
        self._ended.inc(1, self._tags | {"status": status})
