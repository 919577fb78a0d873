"""Admission: how many requests are in flight, and whether another could be answered in time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator

from tsq_ray.serving.requests.problems import RequestError
from tsq_ray.serving.requests.shares import WHOLE, Quota, Share

_RECENT = 32
"""Number of recent requests from which the pace is measured."""
_SAFETY = 0.7
"""Part of the time limit that the expected wait may take."""


class Admission:
    """Counts an ingress replica's requests in flight and refuses those that would be too late.

    The expected wait is the number in flight times the pace, the recent seconds per request. Each
    request measures the time it took, divided by the number then in flight; the pace is the median,
    which one long video hardly changes. A replica sees its own share of the load and therefore its
    own share of the pace.
    """

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._quota, self._timeout_s = Quota(limit), timeout_s
        self._paces: deque[float] = deque(maxlen=_RECENT)
        self.unanswered = 0
        self.draining = False

    @property
    def in_flight(self) -> int:
        """The number of requests being answered."""
        return self._quota.used

    @property
    def pace_s(self) -> float:
        """Recent seconds per request; 0 before the first."""
        return statistics.median(self._paces) if self._paces else 0.0

    @property
    def expected_wait_s(self) -> float:
        """How long the requests in flight will take, in seconds."""
        return self.in_flight * self.pace_s

    @property
    def late_s(self) -> float:
        """By how many seconds one more request would be late; 0 or less if it would not be."""
        return self.expected_wait_s + self.pace_s - self._allowed_s if self.in_flight else 0.0

    @property
    def _allowed_s(self) -> float:
        return self._timeout_s * _SAFETY

    @contextlib.contextmanager
    def admitted(self, share: Share = WHOLE) -> Iterator[None]:
        """Count a request for the duration of the `with`.

        `share`: the client and its part of the requests that can be answered in time. Raises
        RequestError: 503 if the endpoint is ending, 429 if too many requests are in flight or this
        one would be answered too late.
        """
        self.check_open()
        self.check_in_time()
        self._check_quota(share)
        with self._quota.held(share):
            yield

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request of any kind, if it came before the endpoint began to end."""
        counted = not self.draining
        self.unanswered += counted
        try:
            yield
        finally:
            self.unanswered -= counted

    def check_open(self) -> None:
        """Raise RequestError 503 if the endpoint is ending."""
        if self.draining:
            raise RequestError(503, "the endpoint is ending; try again at another replica")

    def check_in_time(self) -> None:
        """Raise RequestError 429 if one more request would be answered too late."""
        if self.late_s > 0:
            raise RequestError(
                429,
                f"{self.in_flight} requests are in flight and would take "
                f"{self.expected_wait_s:.0f} s, too long for the limit of {self._timeout_s:g} s; "
                "try again later",
                retry_after_s=self.late_s,
            )

    def _check_quota(self, share: Share) -> None:
        in_time = self._allowed_s / self.pace_s if self.pace_s else None
        if not self._quota.has_room(share, limit=in_time):
            mine = self._quota.used_by(share.client) if share.part < 1 else self.in_flight
            raise RequestError(
                429,
                f"{mine} requests are in flight, which is the limit; try again later",
                retry_after_s=max(1.0, self.pace_s),
            )

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the pace of the work in the `with`, unless it fails."""
        started, before = time.monotonic(), self.in_flight
        yield
        concurrent = max(1.0, (before + self.in_flight) / 2)
        self._paces.append((time.monotonic() - started) / concurrent)
