"""Admission: how many requests are in hand, and whether another could be answered in time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator

from tsq_ray.serving.requests.problems import RequestError

_RECENT = 32
"""Requests that the pace is measured on."""
_SAFETY = 0.7
"""Part of the time limit that the expected wait may take."""


class Admission:
    """Counts the requests in hand at one ingress replica and refuses those that would be too late.

    The expected wait is the number in hand times the pace: recent seconds a request, measured as the
    time that a request took over the number in hand beside it, whose median one long video hardly
    moves. A replica sees its own share of the load and therefore its own share of the pace.
    """

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._limit, self._timeout_s = limit, timeout_s
        self._paces: deque[float] = deque(maxlen=_RECENT)
        self._by_client: Counter[str] = Counter()
        self.in_hand = self.unanswered = 0
        self.draining = False

    @property
    def pace_s(self) -> float:
        """Recent seconds a request; 0 before the first."""
        return statistics.median(self._paces) if self._paces else 0.0

    @property
    def expected_wait_s(self) -> float:
        """How long the requests in hand will take, in seconds."""
        return self.in_hand * self.pace_s

    @property
    def late_s(self) -> float:
        """By how many seconds one more request would be too late; not above 0 if it would not."""
        allowed_s = self._timeout_s * _SAFETY
        return self.expected_wait_s + self.pace_s - allowed_s if self.in_hand else 0.0

    @contextlib.contextmanager
    def admitted(self, client: str = "", share: float = 1.0) -> Iterator[None]:
        """Count a request for the duration of the `with`.

        `share`: the part of the places that `client` may hold. Raises RequestError: 503 if the
        endpoint is ending, 429 if too many requests are in hand or it would be answered too late.
        """
        self.check_open()
        self.check_in_time()
        self._check_places(client, share)
        self.in_hand += 1
        self._by_client[client] += 1
        try:
            yield
        finally:
            self.in_hand -= 1
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request of any kind that came before the endpoint was told to end."""
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
                f"{self.in_hand} requests are in hand and would take {self.expected_wait_s:.0f} s, "
                f"too long for the limit of {self._timeout_s:g} s; try again later",
                retry_after_s=self.late_s,
            )

    def _check_places(self, client: str, share: float) -> None:
        if self.in_hand >= self._limit or self._by_client[client] >= max(1, self._limit * share):
            mine = self._by_client[client] if share < 1 else self.in_hand
            raise RequestError(
                429,
                f"{mine} requests are in hand, which is the limit; try again later",
                retry_after_s=max(1.0, self.pace_s),
            )

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the pace of the work in the `with`, unless it fails."""
        started, before = time.monotonic(), self.in_hand
        yield
        beside = max(1.0, (before + self.in_hand) / 2)
        self._paces.append((time.monotonic() - started) / beside)
