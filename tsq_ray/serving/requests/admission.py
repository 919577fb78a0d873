"""Admission: how many requests are in hand, and whether another could be answered in time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator

from tsq_ray.serving.requests.problems import RequestError
from tsq_ray.serving.requests.shares import WHOLE, Places, Share

_RECENT = 32
"""Requests that the pace is measured on."""
_SAFETY = 0.7
"""Part of the time limit that the expected wait may take."""


class Admission:
    """Counts the requests in hand at one ingress replica and refuses those that would be too late.

    The expected wait is the number in hand times the pace: recent seconds a request, measured as
    the time that a request took over the number in hand beside it, whose median one long video
    hardly moves. A replica sees its own share of the load and therefore its own share of the pace.
    """

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._places, self._timeout_s = Places(limit), timeout_s
        self._paces: deque[float] = deque(maxlen=_RECENT)
        self.unanswered = 0
        self.draining = False

    @property
    def in_hand(self) -> int:
        """The requests that are being answered."""
        return self._places.used

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
        return self.expected_wait_s + self.pace_s - self._allowed_s if self.in_hand else 0.0

    @property
    def _allowed_s(self) -> float:
        return self._timeout_s * _SAFETY

    @contextlib.contextmanager
    def admitted(self, share: Share = WHOLE) -> Iterator[None]:
        """Count a request for the duration of the `with`.

        `share`: the client and its part of the requests that can be answered in time. Raises
        RequestError: 503 if the endpoint is ending, 429 if too many requests are in hand or it
        would be answered too late.
        """
        self.check_open()
        self.check_in_time()
        self._check_places(share)
        with self._places.held(share):
            yield

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request of any kind that came before the endpoint began to end."""
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

    def _check_places(self, share: Share) -> None:
        in_time = self._allowed_s / self.pace_s if self.pace_s else None
        if not self._places.has_room(share, limit=in_time):
            mine = self._places.used_by(share.client) if share.part < 1 else self.in_hand
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
