"""A classifier for the frames of a manifest: a linear head on a frozen backbone, for the encoder or the recogniser.

Ray Data decodes and runs the backbone; the head is fitted on the features with TSN's segment consensus.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from tsq_ray import bundle as bundles
from tsq_ray import provenance, runtime, storage
from tsq_ray.bundle import Classifier
from tsq_ray.config import Config, ModelConfig
from tsq_ray.decode import DecodedVideo, DecodePool
from tsq_ray.encoders import encode_pictures
from tsq_ray.errors import RunError, RunFailed
from tsq_ray.manifest import VideoRef, read_manifest
from tsq_ray.stages import frame_spec, load_network, source_of
from tsq_ray.train.data import check_classes, describe_left_out, multi_hot, single_labels, training_rows
from tsq_ray.train.head import fit_head

Role = Literal["encoder", "recognizer"]


def finetune(
    manifest_uri: str,
    role: Role,
    out: str,
    config: Config,
    *,
    split: str | None = None,
    limit: int | None = None,
    address: str | None = None,
    show_progress: bool = True,
    debug: bool = False,
) -> dict[str, Any]:
    """Fit a linear head on the frozen `role` network and write the classifier to `out`.

    Takes the labelled videos of `split` (default: train); failed and unlabelled ones are counted and named in the summary, which
    is returned. Raises UserError for wrong input, RunFailed where no video is left or the work fails.
    """
    started = time.time()
    out = storage.normalize(out)
    manifest = read_manifest(manifest_uri)
    what = f"manifest {storage.redact(manifest.uri)}"
    check_classes(manifest.classes, sum(row.labels is not None for row in manifest.rows), what)
    rows, left_out, named, warnings = training_rows(manifest.rows, split, what)
    check_classes(manifest.classes, len(rows), what)
    left_out["limit"] = len(rows) - len(rows[:limit])
    rows = rows[:limit]
    single_labels([list(row.labels or ()) for row in rows], config.train.task, what)
    settings = config.encoders.visual if role == "encoder" else config.recognizer
    network = load_network(settings, with_head=False)
    identity = _identity(manifest.sha256, role, config, settings, network.backbone_hash(), split, limit)
    done = _finished(out, identity)
    if done is not None:
        return done
    storage.check_writable(out)
    with runtime.cluster(address, debug) as ray:
        plan = _Plan(config, settings, network.dim, runtime.start_counts(), _threads(config, ray))
        try:
            features, failures = runtime.run_with_progress(
                lambda: _features(ray, rows, plan, debug), plan.counts, len(rows), f"finetune {role}", show_progress
            )
        except ray.exceptions.RayError as error:
            raise runtime.run_failed(error, "finetune") from error
    rows = [row for row in rows if row.video_id in features]
    if not rows:
        raise RunFailed(f"finetune: none of the {len(failures)} videos could be used ({dict(Counter(failures.values()))})")
    labels = [list(row.labels or ()) for row in rows]
    stacked = np.stack([features[row.video_id] for row in rows])
    targets = multi_hot(labels, len(manifest.classes))
    network.head = fit_head(stacked, targets, config.finetune, config.train.task)
    summary = {
        "out": storage.redact(out),
        "role": role,
        "videos": len(rows),
        "classes": len(manifest.classes),
        "failed": dict(Counter(failures.values())),
        "failed_videos": list(failures)[:5],
        "left_out": describe_left_out(left_out),
        "unlabelled": named,
        "warnings": warnings,
        "train_accuracy": _accuracy(network.head, stacked, targets),
        "seconds": round(time.time() - started, 2),
    }
    record = {
        "identity": identity,
        "summary": summary,
        "manifest": {"uri": storage.redact(manifest.uri), "sha256": manifest.sha256},
        "finetune": config.finetune.model_dump(mode="json"),
        "decode": config.decode.model_dump(mode="json"),
        "versions": provenance.versions(),
        "git_revision": provenance.git_revision(),
        "ended": provenance.now(),
    }
    network.config = settings
    bundles.save_classifier(Classifier(network, manifest.classes, config.train.task, role, record), out)
    return summary


def _identity(
    manifest: str, role: str, config: Config, settings: ModelConfig, backbone: str, split: str | None, limit: int | None
) -> dict[str, Any]:
    return {
        "manifest": manifest,
        "role": role,
        "model": settings.model_dump(mode="json", exclude={"weights"}),
        "backbone": backbone,
        "decode": config.decode.model_dump(mode="json", include={"strategy", "backend", "num_frames"}),
        "finetune": config.finetune.model_dump(mode="json"),
        "task": config.train.task,
        "split": split,
        "limit": limit,
    }


def _finished(out: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    if not storage.exists(storage.join(out, bundles.CLASSIFIER_FILE)):
        return None
    provenance = bundles.read_classifier_settings(out)[0]["provenance"]
    if provenance["identity"] != identity:
        raise RunError(f"{storage.redact(out)}: holds the result of another finetune; take another --out")
    return provenance["summary"] | {"already_done": True}


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


def _features(ray: Any, rows: list[VideoRef], plan: _Plan, debug: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """video id -> float16 [T, D], and URI -> error type of the failed ones."""
    runtime.quiet_data(debug)
    config, resources = plan.config, ray.cluster_resources()
    cpus = float(resources.get("CPU", 1))
    gpus = int(resources.get("GPU", 0)) if config.resources.gpus < 0 else min(int(resources.get("GPU", 0)), config.resources.gpus)
    workers = gpus or config.resources.workers or max(1, int(cpus))
    data = runtime.todo_dataset(ray, rows, workers, config.resources.batch_size)
    data = data.map_batches(
        _BackboneWorker,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=runtime.share_cpus(cpus, workers),
        num_gpus=1 if gpus else None,
        batch_size=config.resources.batch_size,
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
                failures[storage.redact(record["uri"])] = record["error_type"]
    return features, failures


class _BackboneWorker:
    """Decode in a child, run the backbone here."""

    def __init__(self, plan: _Plan) -> None:
        torch.set_num_threads(plan.threads)
        self.counts = plan.counts
        self.network = load_network(plan.model, with_head=False)
        self.network.head = None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network.to(device)
        self.pool = DecodePool(plan.config.decode, {"frame": frame_spec(plan.model)}, 1)

    def __call__(self, batch: pa.Table) -> pa.Table:
        refs = runtime.refs_of(batch)
        futures: list[Future[Any]] = [self.pool.submit(source_of(ref)) for ref in refs]
        features: list[bytes | None] = []
        errors: list[str | None] = []
        for future in futures:
            video = future.result()
            if isinstance(video, DecodedVideo):
                encoded, _ = encode_pictures(self.network, video.frames["frame"])
                features.append(encoded.numpy()[video.slot_frame].astype(np.float16).tobytes())
                errors.append(None)
            else:
                features.append(None)
                errors.append(video.error_type)
        self.counts.add.remote(errors)
        return pa.table(
            {
                "video_id": [ref.video_id for ref in refs],
                "uri": [ref.uri for ref in refs],
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
