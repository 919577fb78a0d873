"""Inference speed of all networks on a GPU, alone at several batch sizes and fed by decoding.

python jobs/benchmarks/gpu.py [--videos FOLDER] [--batches 1,32,128] [--num-frames 50] [--compile]
                              [--backend nvdec] [--device cuda]

Runs the package's own stages (encoders, TSQNet, recogniser) with random weights of the paper's
networks (MobileNetV2, EfficientNet-B0, ResNet-50; options choose others) on random uint8 frames in
host memory. The time includes the copy to the device but no decoding. With resize `device` the
input is whole frames of --frame pixels, resized on the device for each network; with `decoder` it
already has the sizes of the networks.

Prints a table of videos/s, multiply-adds per second and their share of the rate of a matrix product
(--matrix) on the same device in the same precision, measured in the same run. With --videos, a
second table compares decoding alone, the network alone and the network fed by decoding processes
(--backend nvdec: the GPU's decoder), in the fastest configuration of the first table.

The paper reports 17.7 and 121.1 videos/s at batches of 1 and 32 on an RTX 3090 (table A.1). Without
a GPU it runs on the CPU, slowly; --small is a smoke test with tiny networks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from tsq_ray import storage
from tsq_ray.bundle.weights import Bundle
from tsq_ray.config import DecodeConfig, EncodersConfig, ModelConfig, ResourcesConfig, SamplerConfig
from tsq_ray.decode import WHOLE, DecodedVideo, DecodePool, VideoSource
from tsq_ray.evaluation.measures import gflops
from tsq_ray.model import TSQNet, TSQShape
from tsq_ray.networks.encoder import NUM_OBJECTS, FrameEncoder, load_encoder
from tsq_ray.stages import Recognize, Sample, bundle_specs

_TEXT_DIM = 768
NAME = "0" * 16


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    options = _options(argv)
    device = torch.device(options.device)
    bundle = _bundle(options)
    budget = SamplerConfig(budget=min(options.budget, options.num_frames))
    peaks = {
        precision: _matrix_peak(device, precision, options.matrix)
        for precision in options.precisions
    }
    adds_per_video = 1e9 * gflops(
        bundle, "both", options.num_frames, budget.most_frames, bundle.sampler.shape, "true"
    )
    ways = itertools.product(
        options.precisions, (False, True) if options.compile else (False,), options.resizes
    )
    sys.stdout.write(_head(options, device, adds_per_video))
    best: tuple[float, bool, Callable[[list[DecodedVideo]], Any]] | None = None
    for precision, compiled, resize in ways:
        run, whole = (
            _network(
                bundle, budget, device, ResourcesConfig(precision=precision, compile=compiled)
            ),
            resize == "device",
        )
        for batch in options.batches:
            rate = _rate(
                run,
                [
                    _frames(bundle, number, options.frame if whole else None)
                    for number in range(batch)
                ],
                options.rounds,
            )
            cells = (
                precision,
                "yes" if compiled else "no",
                resize,
                batch,
                f"{rate:.1f}",
                f"{rate * adds_per_video / 1e12:.3f}",
                f"{rate * adds_per_video / peaks[precision]:.1%}",
            )
            sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
            sys.stdout.flush()
            if best is None or rate > best[0]:
                best = rate, whole, run
    shown = ", ".join(f"{precision} {peak / 1e12:.3f}" for precision, peak in peaks.items())
    sys.stdout.write(f"\nmeasured matrix peak, T multiply-adds/s: {shown}\n")
    if options.videos and best is not None:
        sys.stdout.write(_end_to_end(bundle, options, *best))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--videos", help="folder of videos for the table of decoding and network together"
    )
    parser.add_argument(
        "--decoders",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="decoding processes; default: one per CPU",
    )
    parser.add_argument(
        "--batches", type=_numbers, default=[1, 32, 128], help="batch sizes; default 1,32,128"
    )
    parser.add_argument("--num-frames", type=int, default=50, help="T; default 50")
    parser.add_argument("--budget", type=int, default=5, help="K; default 5")
    parser.add_argument("--classes", type=int, default=200, help="default 200")
    parser.add_argument("--visual", default="mobilenetv2_100:188", help="MODEL:SIZE")
    parser.add_argument("--objects", default="tf_efficientnet_b0:112", help="MODEL:SIZE")
    parser.add_argument("--recognizer", default="resnet50:224", help="MODEL:SIZE")
    parser.add_argument(
        "--precisions",
        type=lambda text: text.split(","),
        default=["fp32", "bf16"],
        help="default fp32,bf16",
    )
    parser.add_argument(
        "--resizes",
        type=lambda text: text.split(","),
        default=["decoder", "device"],
        help="default decoder,device",
    )
    parser.add_argument(
        "--frame",
        type=_pair,
        default=(340, 256),
        help="WIDTHxHEIGHT of a whole frame; default 340x256",
    )
    parser.add_argument(
        "--backend",
        choices=("pyav", "nvdec"),
        default="pyav",
        help="decoder for the videos of the second table",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also run compiled networks (CUDA graphs); takes minutes",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument(
        "--matrix",
        type=int,
        default=8192,
        help="side of the matrices whose product gives the peak; default 8192",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="smoke test: tiny networks, T = 8, batches 1 and 2",
    )
    options = parser.parse_args(argv)
    if options.small:
        options.visual, options.objects, options.recognizer = (
            "test_efficientnet:32",
            "test_efficientnet:32",
            "test_resnet:32",
        )
        options.num_frames, options.batches, options.classes, options.matrix, options.rounds = (
            8,
            [1, 2],
            5,
            256,
            2,
        )
        options.frame = (48, 32)
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _pair(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def _model(text: str, seed: int) -> ModelConfig:
    name, _, size = text.rpartition(":")
    return ModelConfig(model=name, weights=f"random:{seed}", size=int(size))


def _bundle(options: argparse.Namespace) -> Bundle:
    """Return a bundle of networks with random weights."""
    encoders = EncodersConfig(visual=_model(options.visual, 0), objects=_model(options.objects, 1))

    def with_head(config: ModelConfig, num_classes: int) -> FrameEncoder:
        network = load_encoder(config, with_head=False)
        network.head = nn.Linear(network.dim, num_classes).requires_grad_(False)
        return network.eval()

    visual = with_head(encoders.visual, options.classes)
    return Bundle(
        classes=[str(number) for number in range(options.classes)],
        task="single",
        decode=DecodeConfig(num_frames=options.num_frames, backend=options.backend),
        encoders=encoders,
        sampler_defaults=SamplerConfig(),
        sampler=TSQNet(TSQShape(options.classes, visual.dim, _TEXT_DIM))
        .eval()
        .requires_grad_(False),
        encoder=visual,
        objects=with_head(encoders.objects, NUM_OBJECTS),
        vocabulary=torch.randn(NUM_OBJECTS, _TEXT_DIM),
        recognizer=with_head(_model(options.recognizer, 2), options.classes),
    )


def _network(
    bundle: Bundle, budget: SamplerConfig, device: torch.device, resources: ResourcesConfig
) -> Callable[[list[DecodedVideo]], Any]:
    sample, recognize = (
        Sample(bundle, budget, device, resources),
        Recognize(bundle, device, resources),
    )
    return lambda videos: recognize(sample([(NAME, video) for video in videos]))


def _frames(bundle: Bundle, seed: int, frame: tuple[int, int] | None) -> DecodedVideo:
    """Return a decoded video of noise.

    `frame`: width and height of whole frames; None: frames in the networks' sizes.
    """
    random, count = np.random.default_rng(seed), bundle.decode.num_frames
    index = np.arange(count, dtype=np.int32)
    sizes = (
        {WHOLE: frame}
        if frame
        else {name: (spec.size, spec.size) for name, spec in bundle_specs(bundle, "both").items()}
    )
    return DecodedVideo(
        frames={
            name: random.integers(0, 256, (count, height, width, 3), np.uint8)
            for name, (width, height) in sizes.items()
        },
        slot_frame=index,
        frame_index=index,
        frame_pts_s=index.astype(np.float32),
        duration_s=float(count),
        fps=1.0,
        width=0,
        height=0,
        codec="-",
        source_num_frames=count,
        warnings=[],
        decode_ms=0.0,
    )


def _rate(
    run: Callable[[list[DecodedVideo]], Any], videos: list[DecodedVideo], rounds: int
) -> float:
    """Return videos per second of the median round, after a warm-up round.

    The results arrive on the host, so no work is still pending when the clock stops.
    """
    run(videos)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run(videos)
        seconds.append(time.perf_counter() - started)
    return len(videos) / statistics.median(seconds)


def _matrix_peak(device: torch.device, precision: str, side: int) -> float:
    """Return multiply-adds per second of a square matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return side**3 / min(seconds)


def _head(options: argparse.Namespace, device: torch.device, adds_per_video: float) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    models = f"{options.visual}, {options.objects}, {options.recognizer}"
    return (
        f"{name}; {models}; T = {options.num_frames}, K = {options.budget}, C = {options.classes}; "
        f"{adds_per_video / 1e9:.2f} G multiply-adds per video\n\n"
        "| precision | compiled | resize | batch | videos/s | T multiply-adds/s "
        "| of the matrix peak |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: |\n"
    )


def _end_to_end(
    bundle: Bundle,
    options: argparse.Namespace,
    rate: float,
    whole: bool,
    run: Callable[[list[DecodedVideo]], Any],
) -> str:
    """Measure videos/s over the same files: decoding alone, and decoding that feeds the network."""
    uris = [
        file.uri
        for file in storage.walk(storage.normalize(options.videos))
        if file.uri.endswith((".mp4", ".webm", ".mkv", ".avi"))
    ]
    batch = max(options.batches)
    with DecodePool(bundle.decode, bundle_specs(bundle, "both", whole), options.decoders) as pool:
        started = time.perf_counter()
        kept = [WHOLE in video.frames for video in _decoded(pool, uris, options.decoders)]
        decoded = len(kept)
        if not decoded:
            raise SystemExit(f"{options.videos}: none of {len(uris)} videos could be decoded")
        alone = decoded / (time.perf_counter() - started)
        started, waiting, done = time.perf_counter(), list[DecodedVideo](), 0
        for video in _decoded(pool, uris, max(batch, options.decoders)):
            waiting.append(video)
            if len(waiting) == batch:
                run(waiting)
                done, waiting = done + len(waiting), []
        if waiting:
            run(waiting)
        together = (done + len(waiting)) / (time.perf_counter() - started)
    return (
        f"\n| {decoded} of {len(uris)} videos, {options.decoders} decoding processes "
        f"({options.backend}), batches of {batch} | videos/s |\n| --- | ---: |\n"
        f"| decoding alone | {alone:.2f} |\n| network alone | {rate:.2f} |\n"
        f"| together | {together:.2f} |\n"
        f"| together, of the slower one | {together / min(alone, rate):.2f} |\n\n"
        f"{sum(kept)} videos with whole frames\n"
    )


def _decoded(pool: DecodePool, uris: Sequence[str], ahead: int) -> Iterator[DecodedVideo]:
    """Yield the videos that decode, with up to `ahead` in progress at a time."""
    pending: deque[Future[Any]] = deque()
    for uri in [*uris, *[None] * ahead]:
        if uri is not None:
            pending.append(pool.submit(VideoSource(uri)))
        if pending and (uri is None or len(pending) >= ahead):
            video = pending.popleft().result()
            if isinstance(video, DecodedVideo):
                yield video


if __name__ == "__main__":
    sys.exit(main())
