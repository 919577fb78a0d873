"""What a run takes: hours of CPUs and GPUs, money by their prices, and the share of the network."""

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
    """Prices of one CPU and of one GPU for an hour, in any currency."""

    cpu: float = 0.0
    gpu: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Price:
        """Read prices such as `cpu=0.04,gpu=1.50`. Raises ConfigError if they are none."""
        found: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = (word.strip() for word in item.partition("="))
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if name not in ("cpu", "gpu") or name in found or not 0 <= number < float("inf"):
                raise ConfigError(
                    f"--price {text}: {item.strip()!r} is not the price of a CPU or GPU for an "
                    f"hour; write for example {_EXAMPLE}"
                )
            found[name] = number
        return cls(**found)


@dataclass(frozen=True)
class Used:
    """What a run took, or is expected to take."""

    cpu_hours: float
    """Hours that the nodes' CPUs were there, idle or not."""
    gpu_hours: float
    videos: int
    video_hours: float
    """Hours of footage in them."""
    dense: float | None = None
    """How many times as much time it would take to recognise all T frames, without a sampler, or as
    many tokens of a server; None if nothing was recognised."""
    tokens_in: int = 0
    """Tokens that the recogniser's server was sent, and `tokens_out` that it answered."""
    tokens_out: int = 0
    tokens_cost: float = 0.0
    """Their money, by `recognizer.price_in` and `price_out`."""

    def cost(self, price: Price | None) -> dict[str, float] | None:
        """Return the money: in all, per video and per hour of footage, and of recognising all T.

        That of a server's tokens counts; `tokens` is their part. Leaves out what cannot be said.
        None if nothing has a price.
        """
        if price is None and not self.tokens_cost:
            return None
        price = price or Price()
        total = self.cpu_hours * price.cpu + self.gpu_hours * price.gpu + self.tokens_cost
        found = {"total": total}
        if self.tokens_cost:
            found["tokens"] = self.tokens_cost
        if self.videos:
            found["per_video"] = total / self.videos
        if self.video_hours:
            found["per_video_hour"] = total / self.video_hours
        if self.dense is not None:
            found["dense_total"] = total * self.dense
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    @classmethod
    def of_run(cls, record: Mapping[str, Any]) -> Used | None:
        """Return what the run of a `_run.json` took; None if it did no videos or is of 0.1.0."""
        used, done = record.get("used"), record.get("videos_done_now", 0)
        if not used or not done:
            return None
        sent, received = (int(used.get(name, 0)) for name in ("tokens_in", "tokens_out"))
        server = record["config"]["recognizer"] if sent or received else None
        times = None
        if recognized := used.get("recognized_frames", 0):
            frames = used["sampled_frames"] / recognized
            times = frames if server is not None else dense(record["stage_seconds"], frames)
        return cls(
            used["cpu_hours"],
            used["gpu_hours"],
            done,
            used["video_hours"],
            times,
            sent,
            received,
            tokens_cost(server, sent, received) if server is not None else 0.0,
        )

    @classmethod
    def together(cls, runs: Iterable[Used | None]) -> Used | None:
        """Return the hours and tokens of several runs, without videos; None if none is known."""
        found = [run for run in runs if run is not None]
        if not found:
            return None
        return cls(
            sum(run.cpu_hours for run in found),
            sum(run.gpu_hours for run in found),
            videos=0,
            video_hours=0.0,
            tokens_in=sum(run.tokens_in for run in found),
            tokens_out=sum(run.tokens_out for run in found),
            tokens_cost=sum(run.tokens_cost for run in found),
        )


def tokens_cost(recognizer: Mapping[str, Any], tokens_in: float, tokens_out: float) -> float:
    """Return the money of tokens by the settings `recognizer`, whose prices are of a million.

    A record of settings has a price only if it is not 0.
    """
    sent, received = (recognizer.get(name, 0.0) for name in ("price_in", "price_out"))
    return float(tokens_in * sent + tokens_out * received) / 1e6


def dense(seconds: Mapping[str, float], frames: float) -> float | None:
    """Return how many times as much time recognising every frame takes as recognising the chosen.

    Args:
        seconds: by stage; without a sampler, only those of decode and recognize remain.
        frames: how many frames there are for each chosen one, T / K.
    """
    decode, sample, recognize = (seconds.get(name, 0.0) for name in STAGES)
    if not recognize:
        return None
    return round((decode + recognize * frames) / (decode + sample + recognize), 2)
