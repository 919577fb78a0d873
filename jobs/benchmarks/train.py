"""Training speed: `tsq train` in Ray Train against a plain PyTorch loop with features in memory.

python jobs/benchmarks/train.py [--videos 2000 --epochs 4 --rounds 3 --workers 1 --threads 2 ...]

Writes random features to a temporary folder; both sides read them and take turns, with the same
network, batches and threads. Prints one table: steps per second of each (the fastest epoch of a
turn, because other load can only slow an epoch down), their ratio, and the time that a Ray Train
run takes besides its epochs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tsq_ray import schema
from tsq_ray.config import Config, validate_config
from tsq_ray.model import TSQNet, TSQShape, object_embeddings, tsq_loss
from tsq_ray.networks.inference import takes_bf16
from tsq_ray.runs.folder import FORMAT, RUN_FILE, write_json, write_part
from tsq_ray.runs.lease import Holder
from tsq_ray.runtime import cluster
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.session import Session
from tsq_ray.training.features import FeatureSource, source_arrays
from tsq_ray.training.sampler.launch import Fitted, fit_on_cluster
from tsq_ray.training.sampler.loop import SamplerJob

_ROWS = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    options = _options(argv)
    config = validate_config(
        {
            "train": {
                "epochs": options.epochs,
                "batch_size": options.batch_size,
                "dim_visual": options.dim_visual,
                "dim_textual": options.dim_textual,
                "num_workers": options.workers,
            },
            "resources": {"threads": options.threads},
        }
    )
    shape = TSQShape(
        options.classes, options.dim, options.text_dim, options.dim_visual, options.dim_textual
    )
    vocabulary = torch.randn(1000, options.text_dim, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, cluster.connect(Session(options.address)) as ray:
        features = str(Path(folder, "features"))
        _write_features(features, options)
        source = FeatureSource.of(features, None, "single")
        start = {"visual": None, "textual": None}
        job = SamplerJob(config.train, shape, start, vocabulary.numpy(), source)
        ours: list[Fitted] = []
        plain: list[list[float]] = []
        for turn in range(options.rounds):
            work, session = str(Path(folder, f"work{turn}")), Session(show_progress=False)
            with Observer(ray, Holder.of_this_process(), "train") as seen:
                ours.append(fit_on_cluster(ray, job, config, options.videos, work, session, seen))
            plain.append(
                _plain(source, vocabulary, shape, config, options.threads * options.workers)
            )
    sys.stdout.write(_table(ours, plain, options))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = {
        "videos": 2000,
        "frames": 16,
        "dim": 1280,
        "classes": 200,
        "text-dim": 768,
        "dim-visual": 512,
        "dim-textual": 256,
    }
    for name, value in (
        sizes
        | {
            "batch-size": 64,
            "epochs": 4,
            "rounds": 3,
            "workers": 1,
            "threads": torch.get_num_threads(),
        }
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--address", help="address of a Ray cluster; default: start one here")
    return parser.parse_args(argv)


def _write_features(uri: str, options: argparse.Namespace) -> None:
    """Write a finished extraction of random features."""
    random = np.random.default_rng(0)
    arrow = schema.features_schema(
        options.frames, options.dim, [str(number) for number in range(options.classes)]
    )
    for start in range(0, options.videos, _ROWS):
        rows = []
        for number in range(start, min(start + _ROWS, options.videos)):
            row: dict[str, Any] = {
                "video_id": f"{number:016x}",
                "uri": str(number),
                "size_bytes": 0,
                "labels": [number % options.classes],
                "status": "ok",
                "warnings": [],
                "visual": random.normal(size=(options.frames, options.dim)),
                "object_ids": random.integers(0, 1000, (options.frames, schema.TOP_OBJECTS)),
                "object_probs": random.dirichlet(np.ones(schema.TOP_OBJECTS), options.frames),
            }
            rows.append(row)
        write_part(uri, schema.table_from_rows(rows, arrow), "zstd")
    write_json(
        f"{uri}/{RUN_FILE}",
        {"format": FORMAT, "kind": "features", "classes": schema.classes_of(arrow)},
    )


def _plain(
    source: FeatureSource, vocabulary: torch.Tensor, shape: TSQShape, config: Config, threads: int
) -> list[float]:
    """Return the seconds per epoch of a hand-written loop with all features in memory."""
    settings, device = config.train, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with source_arrays(source) as arrays:
        visual, ids, probs, targets = (
            torch.from_numpy(np.array(arrays[name]))
            for name in ("visual", "object_ids", "object_probs", "targets")
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(settings.seed)
    network, words = TSQNet(shape).to(device).train(), vocabulary.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.lr, momentum=settings.momentum)
    bf16 = takes_bf16(settings.precision, device)
    seconds = []
    for _ in range(settings.epochs):
        started = time.perf_counter()
        for batch in torch.randperm(len(visual)).split(settings.batch_size):
            frames, labels = visual[batch].to(device).float(), targets[batch].to(device).float()
            text = object_embeddings(
                ids[batch].to(device).long(), probs[batch].to(device).float(), words
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = tsq_loss(
                    network(frames, text), labels, settings.task, settings.alpha, settings.beta
                )["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return seconds


def _table(
    ours: Sequence[Fitted], plain: Sequence[Sequence[float]], options: argparse.Namespace
) -> str:
    steps = -(-options.videos // options.batch_size)

    def rate(seconds: Sequence[float]) -> float:
        return steps / min(seconds)

    rows = [
        ("tsq train", [rate(fitted.epoch_seconds) for fitted in ours]),
        ("plain loop", [rate(seconds) for seconds in plain]),
    ]
    ratios = [own / peer for own, peer in zip(rows[0][1], rows[1][1], strict=True)]
    start = statistics.median(fitted.seconds - sum(fitted.epoch_seconds) for fitted in ours)
    turns = range(1, options.rounds + 1)
    lines = [
        "| steps/s | " + " | ".join(f"turn {turn}" for turn in turns) + " | median | videos/s |",
        "| --- |" + " ---: |" * (options.rounds + 2),
    ]
    for name, rates in rows:
        middle = statistics.median(rates)
        lines.append(
            f"| {name} | "
            + " | ".join(f"{value:.2f}" for value in rates)
            + f" | {middle:.2f} | {middle * options.videos / steps:.0f} |"
        )
    lines.append(
        "| ratio | "
        + " | ".join(f"{value:.3f}" for value in ratios)
        + f" | {statistics.median(ratios):.3f} | |"
    )
    sizes = (
        f"{options.videos} videos, T={options.frames}, {options.dim} dims, C={options.classes}, "
        f"batch {options.batch_size}"
    )
    lines.append(
        f"\n{sizes}, {options.workers} worker(s) with {options.threads} thread(s); "
        f"start-up and shutdown of a Ray Train run: {start:.1f} s\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
