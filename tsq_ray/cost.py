"""Cost of a run: CPU and GPU hours, money, and how it compares with recognising all frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tsq_ray.errors import ConfigError

_EXAMPLE = "--price cpu=0.04,gpu=1.50"
STAGES = ("decode", "sample", "recognize")
"""Stages of scoring, as `_run.json` names them."""


@dataclass(frozen=True)
class Price:
    """Hourly prices of one CPU and of one GPU, in any currency."""

    cpu: float = 0.0
    gpu: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Price:
        """Parse prices such as `cpu=0.04,gpu=1.50`. Raises ConfigError for any other text."""
        prices: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = (word.strip() for word in item.partition("="))
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if name not in ("cpu", "gpu") or name in prices or not 0 <= number < float("inf"):
                raise ConfigError(
                    f"--price {text}: {item.strip()!r} is not the price of a CPU or GPU per "
                    f"hour; write, for example, {_EXAMPLE}"
                )
            prices[name] = number
        return cls(**prices)


@dataclass(frozen=True)
class Used:
    """What a run took, or is expected to take."""

    cpu_hours: float
    """CPU hours of the nodes, idle time included."""
    gpu_hours: float
    videos: int
    video_hours: float
    """Hours of footage in them."""
    dense: float | None = None
    """How many times as long recognising all T frames without a sampler would take (with a server:
    how many times the tokens); None if nothing was recognised."""
    tokens_in: int = 0
    """Tokens sent to the recogniser's server; `tokens_out` were received from it."""
    tokens_out: int = 0
    tokens_cost: float = 0.0
    """Their cost at `recognizer.price_in` and `price_out`."""

    def cost(self, price: Price | None) -> dict[str, float] | None:
        """Return the cost: in total, per video, per hour of footage, and of recognising all T.

        The total includes a server's tokens; `tokens` is their part. Unknown figures are left out.
        None if nothing has a price.
        """
        if price is None and not self.tokens_cost:
            return None
        price = price or Price()
        total = self.cpu_hours * price.cpu + self.gpu_hours * price.gpu + self.tokens_cost
        costs = {"total": total}
        if self.tokens_cost:
            costs["tokens"] = self.tokens_cost
        if self.videos:
            costs["per_video"] = total / self.videos
        if self.video_hours:
            costs["per_video_hour"] = total / self.video_hours
        if self.dense is not None:
            costs["dense_total"] = total * self.dense
        return {name: float(f"{value:.4g}") for name, value in costs.items()}

    @classmethod
    def of_run(cls, record: Mapping[str, Any]) -> Used | None:
        """Return what the run of a `_run.json` took; None if it did none or predates `used`."""
        used, done = record.get("used"), record.get("videos_done_now", 0)
        if not used or not done:
            return None
        sent, received = (int(used.get(name, 0)) for name in ("tokens_in", "tokens_out"))
        server = record["config"]["recognizer"] if sent or received else None
        ratio = None
        if recognized := used.get("recognized_frames", 0):
            frames = used["sampled_frames"] / recognized
            ratio = frames if server is not None else dense(record["stage_seconds"], frames)
        return cls(
            used["cpu_hours"],
            used["gpu_hours"],
            done,
            used["video_hours"],
            ratio,
            sent,
            received,
            tokens_cost(server, sent, received) if server is not None else 0.0,
        )

    @classmethod
    def of_hours(cls, hours: Mapping[str, float]) -> Used | None:
        """Return what a training took, from its `cpu_hours` and `gpu_hours`; None if unknown."""
        if not hours:
            return None
        return cls(hours["cpu_hours"], hours["gpu_hours"], videos=0, video_hours=0.0)

    @classmethod
    def together(cls, runs: Iterable[Used | None]) -> Used | None:
        """Return the hours and tokens of several runs, without videos; None if none is known."""
        known = [run for run in runs if run is not None]
        if not known:
            return None
        return cls(
            sum(run.cpu_hours for run in known),
            sum(run.gpu_hours for run in known),
            videos=0,
            video_hours=0.0,
            tokens_in=sum(run.tokens_in for run in known),
            tokens_out=sum(run.tokens_out for run in known),
            tokens_cost=sum(run.tokens_cost for run in known),
        )


def tokens_cost(recognizer: Mapping[str, Any], tokens_in: float, tokens_out: float) -> float:
    """Return the cost of tokens at the settings' prices, which are per million.

    `recognizer`: the settings; a record of them leaves out prices that are 0.
    """
    sent, received = (recognizer.get(name, 0.0) for name in ("price_in", "price_out"))
    return float(tokens_in * sent + tokens_out * received) / 1e6


def dense(seconds: Mapping[str, float], frames: float) -> float | None:
    """Return how many times as long it takes to recognise every frame as only the chosen ones.

    Args:
        seconds: by stage; without a sampler, only decode and recognize would remain.
        frames: sampled frames per recognised one, T / K.
    """
    decode, sample, recognize = (seconds.get(name, 0.0) for name in STAGES)
    if not recognize:
        return None
    return round((decode + recognize * frames) / (decode + sample + recognize), 2)
