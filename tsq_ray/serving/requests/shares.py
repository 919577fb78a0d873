"""Limited resources that clients share: requests, bytes of uploads, fetches."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple


class Share(NamedTuple):
    """The client of a request, and the part of any quota that this client may hold."""

    client: str = ""
    part: float = 1.0


WHOLE = Share()


class Quota:
    """A limited resource, counted in total and by client."""

    def __init__(self, limit: int, minimum: int = 1) -> None:
        """`minimum`: what every client may hold, however small its share."""
        self.limit, self.used, self._minimum = limit, 0, minimum
        self._by_client: Counter[str] = Counter()

    def used_by(self, client: str) -> int:
        """Return how much a client holds."""
        return self._by_client[client]

    def allowed(self, share: Share, limit: float | None = None) -> float:
        """Return how much a client may hold, out of `limit` if that is below the total limit."""
        return max(self._minimum, min(self.limit, limit or self.limit) * share.part)

    def has_room(self, share: Share = WHOLE, count: int = 1, limit: float | None = None) -> bool:
        """Return whether a client may hold `count` more."""
        mine = self.used_by(share.client) + count
        return self.used + count <= self.limit and mine <= self.allowed(share, limit)

    def take(self, share: Share, count: int) -> None:
        """Add to what a client holds."""
        self.used += count
        self._by_client[share.client] += count
        if not self._by_client[share.client]:
            del self._by_client[share.client]

    def give_back(self, share: Share, count: int) -> None:
        """Remove from what a client holds."""
        self.take(share, -count)

    @contextlib.contextmanager
    def held(self, share: Share = WHOLE) -> Iterator[None]:
        """Hold one unit for the duration of the `with`."""
        self.take(share, 1)
        try:
            yield
        finally:
            self.give_back(share, 1)
