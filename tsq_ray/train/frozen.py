"""A linear head on a frozen backbone: Ray Data decodes and runs the backbone once, the head is fitted on the features."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tsq_ray import runtime
from tsq_ray.config import Config, ModelConfig
from tsq_ray.decode import DecodedVideo, DecodePool
from tsq_ray.encoders import FrameEncoder, best_device
from tsq_ray.inference import Pictures, encode_pictures, ready
from tsq_ray.manifest import VideoRef
from tsq_ray.rows import frame_spec, source_of
from tsq_ray.stages import load_network
from tsq_ray.train.data import multi_hot
from tsq_ray.train.head import fit_head
from tsq_ray.train.trained import Tuned


def fit(
    ray: Any,
    network: FrameEncoder,
    settings: ModelConfig,
    rows: Sequence[VideoRef],
    num_classes: int,
    config: Config,
    *,
    show: bool,
    debug: bool,
) -> Tuned:
    """Fit a head for `network` (that of `settings`) on the labelled videos `rows`."""
    plan = _Plan(config, settings, network.dim, runtime.start_counts(), _threads(config, ray))
    try:
        features, failures = runtime.run_with_progress(lambda: _features(ray, rows, plan, debug), plan.counts, len(rows), "finetune", show)
    except ray.exceptions.RayError as error:
        raise runtime.run_failed(error, "finetune") from error
    used = [row for row in rows if row.video_id in features]
    if not used:
        return Tuned(network, failures, {}, [])
    stacked = np.stack([features[row.video_id] for row in used])
    targets = multi_hot([list(row.labels or ()) for row in used], num_classes)
    network.head = fit_head(stacked, targets, config.finetune, config.train.task)
    return Tuned(network, failures, {"train_accuracy": _accuracy(network.head, stacked, targets)}, [])


@dataclass(frozen=True)
class _Plan:
    config: Config
    model: ModelConfig
    dim: int
    counts: Any
    threads: int


def _threads(config: Config, ray: Any) -> int:
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return config.resources.threads or max(1, cpus // (config.resources.workers or cpus))


def _features(ray: Any, rows: Sequence[VideoRef], plan: _Plan, debug: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """video id -> float16 [T, D], and of the failed ones video id -> error type."""
    runtime.quiet_data(debug)
    config, cpus, gpus = plan.config, float(ray.cluster_resources().get("CPU", 1)), runtime.num_gpus(ray, plan.config)
    workers = gpus or config.resources.workers or max(1, int(cpus))
    batch = config.resources.batch_size
    data = runtime.todo_dataset(ray, rows, runtime.block_rows(len(rows), workers, batch, batch))
    data = data.map_batches(
        _BackboneWorker,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=runtime.share_cpus(cpus, workers),
        num_gpus=1 if gpus else None,
        batch_size=batch,
        batch_format="pyarrow",
        fn_constructor_args=(plan,),
        **runtime.RETRIES,
    )
    features: dict[str, np.ndarray] = {}
    failures: dict[str, str] = {}
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        for record in table.to_pylist():
            if record["error_type"] is None:
                array = np.frombuffer(record["features"], np.float16).reshape(config.decode.num_frames, plan.dim)
                features[record["video_id"]] = array
            else:
                failures[record["video_id"]] = record["error_type"]
    return features, failures


class _BackboneWorker:
    """Decode in a child, run the backbone here."""

    def __init__(self, plan: _Plan) -> None:
        torch.set_num_threads(plan.threads)
        self.counts = plan.counts
        network = load_network(plan.model, with_head=False)
        network.head = None
        self.network = ready(network, best_device(), plan.config.resources)
        self.pool = DecodePool(plan.config.decode, {"frame": frame_spec(plan.model)}, 1)

    def __call__(self, batch: pa.Table) -> pa.Table:
        refs = runtime.refs_of(batch)
        futures: list[Future[Any]] = [self.pool.submit(source_of(ref)) for ref in refs]
        features: list[bytes | None] = []
        errors: list[str | None] = []
        for future in futures:
            video = future.result()
            if isinstance(video, DecodedVideo):
                encoded, _ = encode_pictures(self.network, [Pictures(video.frames["frame"])])
                features.append(encoded.numpy()[video.slot_frame].astype(np.float16).tobytes())
                errors.append(None)
            else:
                features.append(None)
                errors.append(video.error_type)
        self.counts.add.remote(errors)
        return pa.table(
            {
                "video_id": [ref.video_id for ref in refs],
                "features": pa.array(features, pa.large_binary()),
                "error_type": pa.array(errors, pa.string()),
            }
        )


def _accuracy(head: torch.nn.Module, features: np.ndarray, targets: np.ndarray) -> float:
    """Share of the training videos whose best class, logits averaged over all frames, is one of their labels."""
    right = [
        bool(row[int(head(torch.from_numpy(video.astype(np.float32))).mean(0).argmax())])
        for video, row in zip(features, targets, strict=True)
    ]
    return round(float(np.mean(right)), 4)
