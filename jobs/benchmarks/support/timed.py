"""Counts of a run that record when each video was finished, and the rate that follows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tsq_ray.runtime import progress

_WARM_UP = 2
"""Uncounted videos per process."""


class TimedCounts(progress.RowCounts):
    """Counts that record when each row was finished."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def add(self, statuses: Sequence[str | None]) -> None:
        self.times += [time.time()] * len(statuses)
        super().add(statuses)

    def done_at(self) -> list[float]:
        """Return the times in seconds since the epoch, ascending."""
        return sorted(self.times)


@contextlib.contextmanager
def counted_by(counts: Any) -> Iterator[None]:
    """Have runs inside the `with` count with this actor."""
    start, progress.start_counts = progress.start_counts, lambda *_: counts
    try:
        yield
    finally:
        progress.start_counts = start


def steady(times: Sequence[float], workers: int) -> float:
    """Return videos per second in steady state.

    From the end of the warm-up until `workers` videos remain, since the last ones may run alone.
    """
    first, last = _WARM_UP * workers, len(times) - workers
    return (last - first) / (times[last - 1] - times[first - 1])
