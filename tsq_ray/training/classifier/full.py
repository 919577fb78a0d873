"""Full fine-tuning: backbone and head on Ray Train, clips from Ray Data.

worker.py holds the workers' loop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import ModelError, RunFailed
from tsq_ray.manifest import VideoRows
from tsq_ray.networks.encoder import FrameEncoder
from tsq_ray.runs.lease import Lease
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.nodes import Layout
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.session import Session
from tsq_ray.training.classifier.clips import ClipPlan
from tsq_ray.training.classifier.worker import TunePlan, start_network, tune_loop
from tsq_ray.training.features import multi_hot
from tsq_ray.training.resumable import run_workers, scaling

WORK_FOLDER = "_finetune"
_STORE_SHARE = 0.3
"""Share of the object store for clips that wait for the training."""


@dataclass(frozen=True)
class Tuned:
    """The result of a fine-tuning."""

    network: FrameEncoder
    failed: dict[str, str]
    """Error type by video id, of training and validation videos."""
    figures: dict[str, Any]
    """Figures for the summary."""
    curve: list[dict[str, float]]
    """One row per epoch, nan for what was not measured; empty for a frozen backbone."""
    happened: Mapping[str, float]
    """Lost nodes, repeated work and waits, if any."""
    hours: Mapping[str, float] = field(default_factory=dict)
    """`cpu_hours` and `gpu_hours` of all live nodes."""


def check_input(network: FrameEncoder) -> None:
    """Raise ModelError if the network does not accept pictures of the size in its settings."""
    size = network.config.size
    try:
        with torch.inference_mode():
            network.features(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(
            f"model {network.config.model!r}: does not take pictures of size {size} "
            f"({' '.join(str(error).split())[:120]}); set the size it was made for, "
            "or model_args = {img_size = ...} if it has that argument"
        ) from None


def tune(
    network: FrameEncoder,
    train: VideoRows,
    val: VideoRows,
    num_classes: int,
    work: str,
    config: Config,
    session: Session,
    lease: Lease,
    begin: Callable[[], None],
) -> Tuned:
    """Train `network` with a new head on the labelled videos `train` and measure it on `val`.

    Checkpoints go to the folder `work`; if it already holds some, training resumes from the last.
    `begin` is called before anything is written there. Raises RunFailed if the training fails or
    the lease is lost.
    """
    backbone = network.backbone.state_dict()
    with (
        cluster.connect(session, out=lease.folder) as ray,
        Observer(ray, lease.holder, "finetune", lease.stop_if_lost) as observer,
    ):
        job, placed = _plan(ray, network, backbone, train, val, num_classes, config)
        begin()
        total = job.num_clips(config.finetune.epochs)
        options: dict[str, Any] = {"counts": job.clips.counts, "total": total}
        options["observe"] = observer.observe
        content = run_workers(
            tune_loop, {"job": job}, scaling(placed), work, "finetune", session, **options
        )
        last = content["curve"][-1]
        if not math.isfinite(last["loss"]):
            storage.remove_folder(work)  # a diverged training cannot resume
            failed = content["failed"].keys() & set(train.table["video_id"].to_pylist())
            if len(failed) < len(train):
                raise RunFailed(
                    f"finetune: the loss is {last['loss']} in epoch {last['epoch']}; "
                    f"lower finetune.lr ({config.finetune.lr})"
                )
            raise RunFailed(
                f"finetune: none of the {len(train)} videos is usable "
                f"({dict(Counter(content['failed'].values()))})"
            )
        tuned = start_network(job, backbone)
    tuned.load_state_dict(content["model"])
    tuned.eval().requires_grad_(False)
    return Tuned(tuned, content["failed"], *_figures(content), observer.happened, observer.hours)


def _plan(
    ray: Any,
    network: FrameEncoder,
    backbone: dict[str, Any],
    train: VideoRows,
    val: VideoRows,
    num_classes: int,
    config: Config,
) -> tuple[TunePlan, Layout]:
    settings = config.finetune
    placed = cluster.lay_out(ray, "finetune", config, len(train))
    table = pa.concat_tables([train.table, val.table])
    store = ray.cluster_resources().get("object_store_memory", 1e9)
    plan = ClipPlan(
        config=settings,
        model=network.config,
        decode=config.decode.model_copy(update={"num_frames": settings.segments}),
        videos=ray.put(table),
        counts=progress.start_counts(),
        decoders=placed["decoder"],
        memory=int(store * _STORE_SHARE / settings.num_workers),
    )
    job = TunePlan(
        clips=plan,
        task=config.train.task,
        num_classes=num_classes,
        num_train=len(train),
        num_val=len(val),
        labels=ray.put(multi_hot(table["labels"], num_classes)),
        backbone=ray.put(backbone),
        threads=placed.threads,
        device=placed.device,
    )
    return job, placed


def _figures(content: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Return the figures for the summary, and the curve with equal columns in every row."""
    curve = content["curve"]
    last = curve[-1]
    figures = {
        "epochs": len(curve),
        "resumed_after_epoch": content["resumed_at"],
        "losses": {"loss": last["loss"]},
        "train_accuracy": last["accuracy"],
    }
    figures |= {name: value for name, value in last.items() if name.startswith("val_")}
    rounded = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in figures.items()
    }
    names = list(dict.fromkeys(name for row in curve for name in row))
    return rounded, [{name: row.get(name, math.nan) for name in names} for row in curve]
