"""A linear head on a frozen backbone: Ray Data decodes and runs the backbone once, the head is fitted on the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tsq_ray import schema
from tsq_ray.config import Config, ModelConfig
from tsq_ray.encoders import FrameEncoder
from tsq_ray.feature_pipeline import FeaturePlan, Networks, feature_stage
from tsq_ray.manifest import VideoRef
from tsq_ray.runtime import cluster, parts, progress
from tsq_ray.runtime.placement import layout
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
    wait_s: float = 0.0,
) -> Tuned:
    """Fit a head for `network` (that of `settings`) on the labelled videos `rows`."""
    placed = layout("finetune", config, cluster.read_cluster(ray, config), len(rows))
    arrow = schema.features_schema(config.decode.num_frames, network.dim, [])
    plan = FeaturePlan(config, Networks(settings), arrow, progress.start_counts(), placed)
    try:
        features, failures = progress.run_with_progress(
            lambda: _features(rows, plan, debug), plan.counts, len(rows), "finetune", show, wait_s=wait_s
        )
    except ray.exceptions.RayError as error:
        raise cluster.run_failed(error, "finetune") from error
    used = [row for row in rows if row.video_id in features]
    if not used:
        return Tuned(network, failures, {}, [])
    stacked = np.stack([features[row.video_id] for row in used])
    targets = multi_hot([list(row.labels or ()) for row in used], num_classes)
    network.head = fit_head(stacked, targets, config.finetune, config.train.task)
    return Tuned(network, failures, {"train_accuracy": _accuracy(network.head, stacked, targets)}, [])


def _features(rows: Sequence[VideoRef], plan: FeaturePlan, debug: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """video id -> float16 [T, D], and of the failed ones video id -> error type."""
    features: dict[str, np.ndarray] = {}
    failures: dict[str, str] = {}
    for data in parts.executions(rows, plan.first_pool.start):
        for table in feature_stage(data, plan, debug).iter_batches(batch_size=None, batch_format="pyarrow"):
            ok = table.filter(pc.equal(table["status"], "ok"))
            if len(ok):
                arrays = _arrays(ok["visual"], plan.config.decode.num_frames)
                features |= dict(zip(ok["video_id"].to_pylist(), arrays, strict=True))
            failed = table.filter(pc.equal(table["status"], "failed"))
            failures |= dict(zip(failed["video_id"].to_pylist(), failed["error_type"].to_pylist(), strict=True))
    return features, failures


def _arrays(column: pa.ChunkedArray, num_frames: int) -> np.ndarray:
    """A column of lists as [rows, T, D], a copy of its own."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), num_frames, -1).copy()


def _accuracy(head: torch.nn.Module, features: np.ndarray, targets: np.ndarray) -> float:
    """Share of the training videos whose best class, logits averaged over all frames, is one of their labels."""
    right = [
        bool(row[int(head(torch.from_numpy(video.astype(np.float32))).mean(0).argmax())])
        for video, row in zip(features, targets, strict=True)
    ]
    return round(float(np.mean(right)), 4)
