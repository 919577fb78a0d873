"""The extraction of jobs/benchmarks/extract.py as one would write it by hand, without Ray."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from tsq_ray import extraction
from tsq_ray.config import Config
from tsq_ray.networks import inference
from tsq_ray.rows import OBJECTS, VISUAL, frame_spec


def by_hand(config: Config, folded: bool, barrier: Any, queue: Any, answers: Any) -> None:
    """Extract the videos of `queue` in a single-threaded process.

    `folded`: prepare the networks for inference as this package does.
    """
    torch.set_num_threads(1)
    networks = extraction.choose_networks(config, None, None)[1].load()
    import decord  # after torch: decord may ship a BLAS that would replace torch's
    from PIL import Image

    specs = {
        VISUAL: frame_spec(config.encoders.visual),
        OBJECTS: frame_spec(config.encoders.objects),
    }
    assert networks.objects is not None
    models = {VISUAL: networks.visual.eval(), OBJECTS: networks.objects.eval()}
    if folded:
        models = {
            name: inference.prepare_for_inference(model, torch.device("cpu"), config.resources)
            for name, model in models.items()
        }
    assert all(spec.resize == "squash" for spec in specs.values()), (
        "the hand-written loop only supports resize = squash"
    )
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    times, spent = [], {"decode": 0.0, "resize": 0.0, "encode": 0.0}
    barrier.wait()
    peak = _peak()
    barrier.wait()
    while (path := queue.get()) is not None:
        started = time.perf_counter()
        reader = decord.VideoReader(path, num_threads=1)
        middles = (np.arange(config.decode.num_frames) + 0.5) / config.decode.num_frames
        frames = reader.get_batch((middles * len(reader)).astype(int)).asnumpy()
        decoded = time.perf_counter()
        pictures = {
            name: np.stack(
                [
                    np.asarray(
                        Image.fromarray(frame).resize(
                            (spec.size, spec.size), filters[spec.interpolation]
                        )
                    )
                    for frame in frames
                ]
            )
            for name, spec in specs.items()
        }
        resized = time.perf_counter()
        with torch.inference_mode():
            for name, model in models.items():
                for part in torch.from_numpy(pictures[name]).split(8):
                    features = model.features(part)
                    if model.head is not None:
                        model.head(features).softmax(-1).topk(config.encoders.num_objects)
        spent["decode"] += decoded - started
        spent["resize"] += resized - decoded
        spent["encode"] += time.perf_counter() - resized
        times.append(time.time())
    answers.put(
        {"times": times, "peak": peak}
        | {name: value / max(1, len(times)) for name, value in spent.items()}
    )


def _peak() -> float:
    """Return a thread's peak of multiply-adds per second while the other processes measure theirs.

    It is the rate of a matrix product or of a 1 x 1 convolution, whichever is faster.
    """
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    picture = torch.randn(8, 128, 28, 28).to(memory_format=torch.channels_last)
    pointwise = torch.nn.Conv2d(128, 128, 1).to(memory_format=torch.channels_last)
    found = []
    with torch.inference_mode():
        for work, count in (
            (lambda: left @ right, 512**3),
            (lambda: pointwise(picture), 8 * 28 * 28 * 128 * 128),
        ):
            seconds = []
            for _ in range(20):
                started = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - started)
            found.append(count / min(seconds))
    return max(found)
