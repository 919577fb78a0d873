"""Compare `tsq extract` with a hand-written loop, the machine's limit and the `--dry-run` estimate.

python jobs/benchmarks/extract.py MANIFEST [--config docs/results.toml --videos 48 --rounds 3]

The loop, which does not use Ray, runs one single-threaded process per core: decord, Pillow and the
same timm networks with the same weights in float32, on the same frames (the middles of T
intervals). A second version of it uses this package's networks, whose batch norms are folded, to
show the cost of everything else. All sides are measured in steady state, from the first finished
video to the last, without start-up. They take turns and the fastest turn of each counts, because
other load can only slow a turn down. The limit is the rate of the cores if decoding took only its
CPU time and every multiply-add of the networks ran at the speed of a matrix product or a 1 x 1
convolution, whichever is faster, measured here in all processes at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from jobs.benchmarks.support.by_hand import by_hand
from jobs.benchmarks.support.timed import TimedCounts, counted_by, steady
from tsq_ray import extraction
from tsq_ray.config import Config, load_config
from tsq_ray.decode import VideoSource
from tsq_ray.decode.video import decode_video
from tsq_ray.estimate import estimate_extract
from tsq_ray.manifest import Manifest, VideoRows, read_manifest, write_manifest
from tsq_ray.model.flops import network_multiply_adds
from tsq_ray.networks import inference
from tsq_ray.results import Estimate
from tsq_ray.rows import OBJECTS, VISUAL, frame_spec
from tsq_ray.runtime import cluster
from tsq_ray.runtime.session import Session


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    options = _options(argv)
    config = load_config(options.config, options.set)
    cores = options.workers
    config = config.model_copy(
        update={"resources": config.resources.model_copy(update={"workers": cores, "threads": 1})}
    )
    with tempfile.TemporaryDirectory() as folder:
        manifest_uri = str(Path(folder, "manifest.parquet"))
        paths = _some_videos(options.manifest, options.videos, manifest_uri)
        predicted = estimate_extract(manifest_uri, config)
        ours: list[dict[str, Any]] = []
        loops: dict[bool, list[dict[str, float]]] = {
            False: [],
            True: [],
        }  # key: whether batch norms are folded
        with cluster.connect() as ray:
            for turn in range(options.rounds):
                ours.append(
                    _extract(ray, manifest_uri, str(Path(folder, f"features{turn}")), config)
                )
                for folded, found in loops.items():
                    found.append(_loop(paths, config, cores, folded))
        layers = _layers(config, max(one["peak"] for found in loops.values() for one in found))
        limit = _limit(
            read_manifest(manifest_uri), config, [one for found in loops.values() for one in found]
        )
    sys.stdout.write(_tables(ours, loops, limit, predicted, options) + "\n".join(layers) + "\n")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifest", help="manifest of local videos, for example of the surrogate")
    parser.add_argument("--config", help="settings, for example docs/results.toml")
    parser.add_argument("--set", action="append", default=[], help="a setting, section.key=value")
    parser.add_argument("--videos", type=int, default=48, help="videos, spread over the manifest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes on each side"
    )
    return parser.parse_args(argv)


def _some_videos(manifest_uri: str, count: int, out: str) -> list[str]:
    manifest = read_manifest(manifest_uri)
    places = np.unique(
        np.linspace(0, len(manifest.rows) - 1, min(count, len(manifest.rows))).astype(int)
    )
    rows = VideoRows.of([manifest.rows[int(place)] for place in places])
    write_manifest(Manifest(rows, manifest.classes, manifest.id, manifest.sources), out)
    return rows.table["uri"].to_pylist()


# -------------------------------------------------------------------------------------- tsq extract


def _extract(ray: Any, manifest_uri: str, out: str, config: Config) -> dict[str, Any]:
    counts = ray.remote(num_cpus=0)(TimedCounts).remote()
    with counted_by(counts):
        run = extraction.extract(manifest_uri, out, config, session=Session(show_progress=False))
    times = ray.get(counts.done_at.remote())
    measured = {
        "wall": run.wall_seconds,
        "stages": run.stage_seconds,
        "failed": run.counts.failed,
    }
    return measured | {"rate": steady(times, config.resources.workers)}


# ----------------------------------------------------------------------------------------- the loop


def _loop(paths: Sequence[str], config: Config, processes: int, folded: bool) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    barrier, queue, answers = context.Barrier(processes), context.Queue(), context.Queue()
    for path in paths:
        queue.put(path)
    for _ in range(processes):
        queue.put(None)
    workers = [
        context.Process(target=by_hand, args=(config, folded, barrier, queue, answers))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    results = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    times = sorted(moment for result in results for moment in result["times"])
    mean = {
        name: float(np.mean([result[name] for result in results]))
        for name in ("decode", "resize", "encode", "peak")
    }
    return {"rate": steady(times, processes)} | mean


# ---------------------------------------------------------------------------------------- the limit


def _limit(
    manifest: Manifest, config: Config, loops: Sequence[dict[str, float]]
) -> dict[str, float]:
    """Return a core's least seconds per video: decoding CPU time, and multiply-adds at the peak.

    Decoding is measured with one thread and nothing else running.
    """
    specs = {
        VISUAL: frame_spec(config.encoders.visual),
        OBJECTS: frame_spec(config.encoders.objects),
    }
    places = range(0, len(manifest.rows), max(1, len(manifest.rows) // 12))
    decode_video(VideoSource.of(manifest.rows[0]), config.decode, specs)
    started = time.process_time()
    for place in places:
        decode_video(VideoSource.of(manifest.rows[place]), config.decode, specs)
    decode = (time.process_time() - started) / len(places)
    adds = config.decode.num_frames * sum(
        network_multiply_adds(model, "true")
        for model in (config.encoders.visual, config.encoders.objects)
    )
    peak = max(one["peak"] for one in loops)
    return {"decode": decode, "adds": adds, "peak": peak, "encode": adds / peak}


def _layers(config: Config, peak: float) -> list[str]:
    """Break down the networks' time by layer kind: CPU time of one thread, 8 frames at a time."""
    torch.set_num_threads(1)
    lines = [
        "",
        "| networks alone | of the time | of the multiply-adds | G multiply-adds/s | of the peak |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    networks = extraction.choose_networks(config, None, None)[1].load()
    for model in (
        network for network in (networks.visual, networks.objects) if network is not None
    ):
        encoder = inference.prepare_for_inference(model, torch.device("cpu"), config.resources)
        seconds, adds, started = Counter[str](), Counter[str](), list[float]()

        def after(layer: torch.nn.Conv2d, output: torch.Tensor, kind: str) -> None:
            spent = time.process_time() - started.pop()  # noqa: B023
            seconds[kind] += spent  # type: ignore[assignment]  # noqa: B023
            adds[kind] += output.numel() * layer.weight[0].numel()  # noqa: B023

        for layer in encoder.backbone.modules():
            if isinstance(layer, torch.nn.Conv2d):
                kind = (
                    "depthwise"
                    if layer.groups > 1
                    else "1 x 1"
                    if layer.kernel_size == (1, 1)
                    else "the first"
                )
                layer.register_forward_pre_hook(
                    lambda *_: started.append(time.process_time())  # noqa: B023
                )
                layer.register_forward_hook(
                    lambda layer, _, output, kind=kind: after(layer, output, kind)
                )
        size = encoder.config.size
        frames = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8)
        with torch.inference_mode():
            encoder.features(frames)
            seconds.clear()
            adds.clear()
            whole = time.process_time()
            for _ in range(10):
                encoder.features(frames)
            whole = time.process_time() - whole
        for kind in seconds:
            rate = adds[kind] / seconds[kind]
            cells = (
                f"{seconds[kind] / whole:.0%}",
                f"{adds[kind] / adds.total():.0%}",
                f"{rate / 1e9:.1f}",
                f"{rate / peak:.0%}",
            )
            lines.append(
                f"| {encoder.config.model} at {size}, convolutions: {kind} | {' | '.join(cells)} |"
            )
        lines.append(
            f"| {encoder.config.model} at {size}, the rest "
            f"| {1 - seconds.total() / whole:.0%} | | | |"
        )
    return lines


def _tables(
    ours: Sequence[dict[str, Any]],
    loops: dict[bool, list[dict[str, float]]],
    limit: dict[str, float],
    predicted: Estimate,
    options: argparse.Namespace,
) -> str:
    turns = range(1, len(ours) + 1)
    lines = [
        "| videos/s | " + " | ".join(f"turn {turn}" for turn in turns) + " | fastest |",
        "| --- |" + " ---: |" * (len(ours) + 1),
    ]
    best = {}
    for name, found in (
        ("tsq extract", ours),
        ("loop by hand", loops[False]),
        ("loop by hand, folded", loops[True]),
    ):
        rates = [one["rate"] for one in found]
        best[name] = max(rates)
        lines.append(
            f"| {name} | " + " | ".join(f"{rate:.3f}" for rate in rates) + f" | {max(rates):.3f} |"
        )
    for name, other in (("ratio (aim >= 0.95)", False), ("ratio to folded", True)):
        ratios = [one["rate"] / two["rate"] for one, two in zip(ours, loops[other], strict=True)]
        ratio = best["tsq extract"] / max(one["rate"] for one in loops[other])
        lines.append(
            f"| {name} | "
            + " | ".join(f"{value:.3f}" for value in ratios)
            + f" | **{ratio:.3f}** |"
        )
    least = options.workers / (limit["decode"] + limit["encode"])
    stages = max(ours, key=lambda one: one["rate"])["stages"]
    lines += [
        "",
        "| seconds a video | decode + resize | encode | write |",
        "| --- | ---: | ---: | ---: |",
    ]
    share = [stages.get(name, 0.0) / options.videos for name in ("decode", "encode", "write")]
    lines.append(
        "| tsq extract, by stage | " + " | ".join(f"{value:.3f}" for value in share) + " |"
    )
    for name, folded in (("loop by hand", False), ("loop by hand, folded", True)):
        loop = max(loops[folded], key=lambda one: one["rate"])
        lines.append(f"| {name} | {loop['decode'] + loop['resize']:.3f} | {loop['encode']:.3f} | |")
    speed = f"{limit['adds'] / 1e9:.2f} G multiply-adds at {limit['peak'] / 1e9:.0f} G/s per core"
    lines.append(
        f"| limit | {limit['decode']:.3f} (CPU time) | {limit['encode']:.3f} ({speed}) | |"
    )
    lines.append(
        f"\nlimit of the machine: {least:.3f} videos/s; reached: {best['tsq extract'] / least:.0%}"
    )
    real = min(one["wall"] for one in ours)
    lines.append(
        "start-up and shutdown in addition: "
        f"{real - options.videos / best['tsq extract']:.1f} s, with Ray already running"
    )
    guess, right = predicted.seconds_a_video, 1 / best["tsq extract"]
    lines.append(
        f"--dry-run: {guess:.3f} s per video predicted, {right:.3f} measured: "
        f"{guess / right:.2f} (aim 0.7 to 1.3)"
    )
    lines.append(
        f"{options.videos} videos, {options.workers} processes on {os.cpu_count()} cores, no GPU; "
        f"failed {ours[0]['failed']}\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
