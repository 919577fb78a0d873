"""Follow a run on its cluster, for its metrics, its summary and its record."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from tsq_ray import log
from tsq_ray.runs.lease import Holder
from tsq_ray.runtime.metrics import RunMetrics
from tsq_ray.runtime.waiting import Watch

LOOK_EVERY_S = 3.0


class Observer:
    """Follows a run for the duration of a `with`: its progress, its waits, the nodes it loses."""

    def __init__(
        self, ray: Any, holder: Holder, stage: str, check: Callable[[], None] = lambda: None
    ) -> None:
        """`holder` names the run; `check` is called each time and may raise to end the run."""
        self.stage, self.metrics = stage, RunMetrics(holder.run, stage, str(holder))
        self.happened: dict[str, float] = {}
        """nodes_lost and waited_s, if not 0."""
        self.hours: dict[str, float] = {}
        """cpu_hours and gpu_hours of all live nodes so far."""
        self._exact_hours: Counter[str] = Counter()
        self._ray, self._check = ray, check
        self._nodes: set[str] = set()
        self._looked = -math.inf
        self._done, self._progressed = 0, time.time()
        self._watch: Watch | None = None
        self._waited_before = 0.0

    def __enter__(self) -> Self:
        self.look()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.look()
        self.metrics.end("failed" if kind else "complete")

    def observe(self, done: int, watch: Watch) -> None:
        """Note the work done and the waits; look at the nodes every few seconds."""
        self._check()
        if watch is not self._watch:
            self._waited_before, self._watch = self._waited_s(), watch
        if done != self._done:
            self._done, self._progressed = done, time.time()
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self.look()

    def look(self) -> None:
        """Compare the nodes with those seen last, and export the metrics."""
        now = time.monotonic()
        hours = (now - self._looked) / 3600 if self._nodes else 0.0
        self._looked = now
        with contextlib.suppress(self._ray.exceptions.RayError):
            alive = [node for node in self._ray.nodes() if node["Alive"]]
            self._record_hours(alive, hours)
            nodes = {node["NodeID"] for node in alive}
            if lost := len(self._nodes - nodes):
                self._note("nodes_lost", self.happened.get("nodes_lost", 0) + lost)
                log.say(f"{self.stage}: {lost} node{'s' * (lost > 1)} lost", nodes_lost=lost)
            self._nodes = nodes
        self._note("waited_s", round(self._waited_s(), 1))
        self._export()

    def _record_hours(self, nodes: Sequence[Mapping[str, Any]], hours: float) -> None:
        """Record that the run had these nodes for these hours."""
        for kind, name in (("CPU", "cpu_hours"), ("GPU", "gpu_hours")):
            count = sum(node["Resources"].get(kind, 0.0) for node in nodes)
            self._exact_hours[name] += hours * count
            self.hours[name] = round(self._exact_hours[name], 6)

    def _export(self) -> None:
        waiting_s = self._watch.waiting_s if self._watch is not None else 0.0
        self.metrics.update(waiting_s, self._progressed, self.happened)

    def _note(self, name: str, value: float) -> None:
        if value:
            self.happened[name] = value

    def _waited_s(self) -> float:
        watch = self._watch
        return self._waited_before + (watch.waited_s + watch.waiting_s if watch else 0.0)
