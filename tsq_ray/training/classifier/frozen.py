"""A linear head on a frozen backbone: extracts its features, then fits the head to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from tsq_ray import storage
from tsq_ray.config import Config, ModelConfig
from tsq_ray.feature_pipeline import LoadedNetworks, Networks, extract_features
from tsq_ray.networks.encoder import FrameEncoder
from tsq_ray.runs.bulk import Selection
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runtime.session import Session
from tsq_ray.training.classifier.full import Tuned
from tsq_ray.training.features import FeatureSource, open_training_set
from tsq_ray.training.head import fit_head


def fit_frozen(
    network: FrameEncoder,
    settings: ModelConfig,
    selection: Selection,
    work: str,
    config: Config,
    session: Session,
    ticks: Sequence[Callable[[], None]] = (),
) -> Tuned:
    """Fit a head for `network` (built from `settings`) to the selected videos, all labelled.

    Their features are kept in the folder `work`, so that a stopped run resumes. Raises what
    `extract_features` raises.
    """
    features = storage.join(work, "features")
    config = config.with_visual_encoder(settings)
    networks, loaded = Networks(settings), LoadedNetworks(network, None, None)
    options: dict[str, Any] = {"stage": "finetune", "ticks": ticks}
    run = extract_features(features, selection, config, networks, loaded, session, **options)
    failed = _failed(features)
    if not run["counts"]["ok"]:
        return Tuned(network, failed, {}, [])
    source = FeatureSource.of(features, selection.split, config.train.task, with_objects=False)
    with open_training_set(source) as data:
        network.head = fit_head(data.visual, data.targets, config.finetune, config.train.task)
        accuracy = _accuracy(network.head, data.visual, data.targets)
    return Tuned(network, failed, {"train_accuracy": accuracy}, [])


def _failed(features: str) -> dict[str, str]:
    """Return the error type of each failed video, by video id."""
    found: dict[str, str] = {}
    for part in list_parts(features):
        table = read_part(part.uri, ["video_id", "status", "error_type"])
        table = table.filter(pc.equal(table["status"], "failed"))
        found |= dict(
            zip(table["video_id"].to_pylist(), table["error_type"].to_pylist(), strict=True)
        )
    return found


def _accuracy(head: torch.nn.Module, features: np.ndarray, targets: np.ndarray) -> float:
    """Share of videos whose best class, by mean logits over all frames, is one of their labels."""
    right = [
        bool(row[int(head(torch.from_numpy(video.astype(np.float32))).mean(0).argmax())])
        for video, row in zip(features, targets, strict=True)
    ]
    return round(float(np.mean(right)), 4)
