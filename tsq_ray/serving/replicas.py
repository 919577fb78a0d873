"""The Serve graph of a bulk scoring run, deployed without HTTP.

The number of replicas follows the number of nodes, and senders never exceed the replicas' capacity.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import ConfigError, RunFailed, TsqError
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.nodes import Cluster
from tsq_ray.runtime.placement import layout
from tsq_ray.runtime.session import Session
from tsq_ray.serving.graph import STAGES

LOOK_EVERY_S = 2.0
"""Interval between checks of the nodes and of the replicas' capacity."""
_RAISED = re.compile(r"^(?:tsq_ray\.errors\.\w+: |(?=[\w.]+(?:Error|Exception|Exit): ))(.+)$", re.M)
"""The last line of a traceback, without the exception's class if it is one of this package."""


class Replicas:
    """The graph of a run, rescaled as nodes join and leave."""

    def __init__(
        self, ray: Any, app: str, config: Config, model: str, counts: Any, videos: int
    ) -> None:
        """Lay out the graph. `app` names the Serve application; `counts` is a FlowCounts actor."""
        self._ray, self._app, self._config, self._model, self._counts, self._videos = (
            ray,
            app,
            config,
            model,
            counts,
            videos,
        )
        self.placed = layout("score", config, cluster.read_cluster(ray, config), videos)
        self._checked_at = 0.0
        self._nodes: Cluster | None = None
        self._targets = {name: self.placed[name].start for name in STAGES}

    @contextlib.contextmanager
    def deployed(self, session: Session, observe: progress.Observe) -> Iterator[None]:
        """Deploy the graph for the duration of the `with`. Raises RunFailed if it cannot start.

        `observe` is called twice a second while it starts.
        """
        from ray import serve

        cluster.quiet_data(session.debug)
        # a Serve instance that already runs, for example for an endpoint, keeps its HTTP options
        serve.start(
            proxy_location="Disabled",
            logging_config={
                "log_level": "INFO" if session.debug else "ERROR",
                "enable_access_log": False,
            },
        )
        try:
            try:
                progress.run_watched(self._start, "score", session, self._app, observe)
            except (self._ray.exceptions.RayError, RuntimeError, ValueError) as error:
                raise start_failed(error, self._app, "score: the graph") from error
            yield
        finally:  # on a shared cluster the application would keep asking for resources
            serve.delete(self._app)

    def _start(self) -> None:
        from ray import serve

        from tsq_ray.serving.app import bulk_application

        app = bulk_application(self._model, self._config, self.placed, self.ongoing())
        serve.run(app, name=self._app, route_prefix=None, external_scaler_enabled=True)

    def ongoing(self) -> dict[str, int]:
        """Return the concurrent requests per replica, so that one batch waits while one runs."""
        batch, placed = self._config.serve.batch_size, self.placed
        ahead = 2 * batch if placed.on_gpu else max(2 * batch, 2 * placed.threads)
        server = self._config.recognizer
        last = 2 * server.max_concurrent if server.kind == "openai" else ahead
        return {"decoder": 2 * placed.decoder_processes, "sampler": ahead, "recognizer": last}

    def tick(self) -> None:
        """Adapt the number of replicas to the live nodes, and the senders' room to the replicas."""
        if time.monotonic() - self._checked_at < LOOK_EVERY_S:
            return
        self._checked_at = time.monotonic()
        nodes = cluster.read_cluster(self._ray, self._config)
        if nodes != self._nodes:
            self._nodes = nodes
            self._scale(nodes)
        self._counts.set_room.remote(self._room())

    def _scale(self, nodes: Cluster) -> None:
        from ray.serve._private.common import DeploymentID
        from ray.serve.context import _get_global_client

        try:
            placed = layout("score", self._config, nodes, self._videos)
        except ConfigError:  # the remaining nodes are too few; others may join
            return
        for name in STAGES:
            count = placed[name].start
            if count != self._targets[name]:
                self._targets[name] = count
                target = DeploymentID(name.capitalize(), self._app)
                # the call behind Serve's REST API for external scalers
                controller: Any = getattr(_get_global_client(), "_controller")  # noqa: B009
                self._ray.get(controller.update_deployment_replicas.remote(target, count))

    def _room(self) -> int:
        """Return how many requests the running replicas process at a time."""
        from ray import serve
        from ray.serve._private.common import ReplicaState

        running = {name: 0 for name in STAGES}
        found = serve.status().applications.get(self._app)
        if found is not None:
            for name in STAGES:
                status = found.deployments.get(name.capitalize())
                running[name] = (
                    status.replica_states.get(ReplicaState.RUNNING, 0) if status is not None else 0
                )
        ongoing = self.ongoing()
        # a network shares the cores with the other stages, a server does not
        asks_server = self._config.recognizer.kind == "openai"
        busy = STAGES if asks_server else ("decoder", "sampler")
        return max(1, sum(running[name] * ongoing[name] for name in busy))


def start_failed(error: BaseException, app: str, doing: str) -> TsqError:
    """Turn an error while starting an application into one that says why its replicas died."""
    from ray import serve

    found = None
    with contextlib.suppress(Exception):  # Serve itself may have failed
        found = serve.status().applications.get(app)
    for name, deployment in (found.deployments if found is not None else {}).items():
        # the message has the replica's traceback, whose last line names the error
        raised = _RAISED.findall(deployment.message)
        if raised:
            why = storage.redact(raised[-1])
            return RunFailed(f"{doing}: no {name.lower()} could start: {why}")
    return cluster.run_failed(error, doing)


class FlowCounts(progress.RowCounts):
    """Row counts that also divide the graph's room for requests among the senders."""

    def __init__(self) -> None:
        super().__init__()
        self.room = 8
        self.senders: dict[str, float] = {}

    def set_room(self, room: int) -> None:
        """Set the number of videos that may be in flight."""
        self.room = room

    def share(self, sender: str) -> int:
        """Return a sender's share of the room; senders that no longer ask get none."""
        now = time.monotonic()
        self.senders[sender] = now
        alive = sum(now - asked < 5 * LOOK_EVERY_S for asked in self.senders.values())
        return max(1, -(-self.room // alive))
