"""The endpoint's own metrics, exported with Ray's (docs/serving.md lists them).

Ray puts `ray_` before each name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ray.serve import metrics

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
STAGES = ("decode", "sample", "recognize")


def _tags(*names: str) -> Any:
    # Ray's annotation allows a single name only
    return names


class IngressMetrics:
    """What an ingress replica counts."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._requests = metrics.Counter(
            "tsq_requests",
            "Requests to /v1 by HTTP status and error type (of a failed video, or rate).",
            _tags("status", "error_type"),
        )
        self._seconds = metrics.Histogram(
            "tsq_request_seconds", "Seconds from a request to its answer.", _SECONDS
        )
        self._stages = metrics.Histogram(
            "tsq_stage_seconds",
            "Seconds of processing per video, by stage.",
            _SECONDS,
            _tags("stage"),
        )
        self._waiting = metrics.Histogram(
            "tsq_waiting_seconds", "Seconds that a prediction spent outside the stages.", _SECONDS
        )
        self._frames = metrics.Counter("tsq_frames_decoded", "Frames decoded for the sampler.")
        self._in_flight = metrics.Gauge("tsq_requests_in_hand", "Requests that have no answer yet.")
        self._bytes = metrics.Gauge("tsq_upload_bytes_in_hand", "Bytes of uploads in flight.")
        self._wait = metrics.Gauge(
            "tsq_expected_wait_seconds", "Seconds that the requests in flight are expected to take."
        )
        self._model = metrics.Gauge(
            "tsq_model_info", "1 for the served model.", _tags("sha256", "task", "mode", "budget")
        )
        self._about = {name: str(model[name]) for name in ("task", "mode", "budget")}
        self._about["sha256"] = model["id"]

    def answered(self, status: int, error_type: str | None, seconds: float) -> None:
        """Count an answer."""
        self._requests.inc(1, {"status": str(status), "error_type": error_type or ""})
        self._seconds.observe(seconds)

    def scored(self, row: Mapping[str, Any], seconds: float) -> None:
        """Count a prediction."""
        spent = {stage: row[f"{stage}_ms"] / 1000 for stage in STAGES}
        for stage, value in spent.items():
            self._stages.observe(value, {"stage": stage})
        self._waiting.observe(max(0.0, seconds - sum(spent.values())))
        self._frames.inc(len(row["frame_pts_s"]))

    def in_flight(self, requests: int, upload_bytes: int, expected_wait_s: float) -> None:
        """Set the gauges of requests in flight; call it every few seconds, as gauges expire."""
        self._model.set(1, self._about)
        self._in_flight.set(requests)
        self._bytes.set(upload_bytes)
        self._wait.set(expected_wait_s)


class DecoderMetrics:
    """What a decoder replica counts."""

    def __init__(self) -> None:
        self._lost = metrics.Counter(
            "tsq_decoders_restarted", "Decoding processes that were killed or died."
        )
        self._seen = 0

    def lost(self, total: int) -> None:
        """Count the newly lost decoding processes; `total`: lost so far."""
        if total > self._seen:
            self._lost.inc(total - self._seen)
            self._seen = total


class BatchMetrics:
    """What the replica that keeps the batches counts."""

    def __init__(self) -> None:
        self._videos = metrics.Counter(
            "tsq_batch_videos",
            "Videos of batches that have their row, by status and error type.",
            _tags("status", "error_type"),
        )

    def written(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count the rows of a part that was written."""
        for (status, error_type), count in Counter(
            (row["status"], row.get("error_type") or "") for row in rows
        ).items():
            self._videos.inc(count, {"status": status, "error_type": error_type})
