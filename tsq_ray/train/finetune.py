"""A classifier for the frames of a manifest, for the encoder or the recogniser: the whole network trained, or a linear head on a frozen
backbone, both with TSN's segment consensus.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from tsq_ray import artifact, provenance, runs, storage
from tsq_ray import bundle as bundles
from tsq_ray.bundle import Classifier
from tsq_ray.config import Config, ModelConfig
from tsq_ray.errors import RunFailed
from tsq_ray.manifest import Manifest, VideoRef, read_manifest
from tsq_ray.runtime import cluster
from tsq_ray.stages import load_network
from tsq_ray.train import frozen, trained
from tsq_ray.train.data import check_classes, describe_left_out, single_labels, training_rows

Role = Literal["encoder", "recognizer"]
_IDENTITY_FILE = "identity.json"


def finetune(
    manifest_uri: str,
    role: Role,
    out: str,
    config: Config,
    *,
    split: str | None = None,
    limit: int | None = None,
    address: str | None = None,
    wait_s: float = 0.0,
    show_progress: bool = True,
    debug: bool = False,
) -> dict[str, Any]:
    """Train the `role` network as `finetune.backbone` says and write the classifier to `out`; a stopped full training goes on.

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
    val = _validation_rows(manifest, rows, config)
    single_labels([list(row.labels or ()) for row in (*rows, *val)], config.train.task, what)
    settings = config.encoders.visual if role == "encoder" else config.recognizer
    network = load_network(settings, with_head=False)
    identity = _identity(manifest.sha256, role, config, settings, network.backbone_hash(), split, limit)
    done = _finished(out, identity)
    if done is not None:
        return done
    storage.check_writable(out)
    whole = config.finetune.backbone == "trained"
    if whole:
        trained.check_input(network)
        runs.write_json(storage.join(out, trained.WORK_FOLDER, _IDENTITY_FILE), identity.parts)
    with cluster.connect(address, debug) as ray:
        options: dict[str, Any] = {"show": show_progress, "debug": debug, "wait_s": wait_s}
        classes = len(manifest.classes)
        if whole:
            tuned = trained.tune(ray, network, rows, val, classes, out, config, **options)
        else:
            tuned = frozen.fit(ray, network, settings, rows, classes, config, **options)
    used = [row for row in rows if row.video_id not in tuned.failed]
    if not used:
        raise RunFailed(f"finetune: none of the {len(rows)} videos could be used ({dict(Counter(tuned.failed.values()))})")
    summary = {
        "out": storage.redact(out),
        "role": role,
        "backbone": config.finetune.backbone,
        "videos": len(used),
        "classes": classes,
        "failed": dict(Counter(tuned.failed.values())),
        "failed_videos": [storage.redact(row.uri) for row in (*rows, *val) if row.video_id in tuned.failed][:5],
        "left_out": describe_left_out(left_out),
        "unlabelled": named,
        "warnings": warnings,
        **tuned.figures,
        "seconds": round(time.time() - started, 2),
    }
    record = {
        "identity": identity.parts,
        "summary": summary,
        "manifest": {"uri": storage.redact(manifest.uri), "sha256": manifest.sha256},
        "finetune": config.finetune.model_dump(mode="json"),
        "decode": config.decode.model_dump(mode="json"),
        "versions": provenance.versions(),
        "git_revision": provenance.git_revision(),
        "ended": provenance.now(),
    }
    tuned.network.config = settings
    if whole:
        artifact.write_curves(out, tuned.curve)
    bundles.save_classifier(Classifier(tuned.network, manifest.classes, config.train.task, role, record), out)
    storage.remove_folder(storage.join(out, trained.WORK_FOLDER))
    return summary


def _validation_rows(manifest: Manifest, rows: Sequence[VideoRef], config: Config) -> list[VideoRef]:
    """The labelled videos of `finetune.val_split`, where they are others than those trained on."""
    if config.finetune.backbone == "frozen" or not config.finetune.val_split:
        return []
    taken = {row.video_id for row in rows}
    return [row for row in manifest.rows if row.split == config.finetune.val_split and row.labels and row.video_id not in taken]


def _identity(
    manifest: str, role: str, config: Config, settings: ModelConfig, backbone: str, split: str | None, limit: int | None
) -> runs.Identity:
    whole = config.finetune.backbone == "trained"
    # T frames a video for a head; a whole network's training takes its own, by finetune.segments
    decode = {"strategy", "backend"} if whole else {"strategy", "backend", "num_frames"}
    tuning = config.finetune.model_dump(mode="json", exclude={"head", "num_workers", "checkpoint_every"})
    return runs.Identity.of(
        manifest=manifest,
        role=role,
        model=settings.model_dump(mode="json", exclude={"weights"}),
        backbone=backbone,
        decode=config.decode.model_dump(mode="json", include=decode),
        finetune=tuning if whole else config.finetune.head.model_dump(mode="json"),
        task=config.train.task,
        split=split,
        limit=limit,
    )


def _finished(out: str, identity: runs.Identity) -> dict[str, Any] | None:
    """The summary of an equal finetune that is done already; RunError where `out` holds another one, done or begun."""
    done = storage.exists(storage.join(out, artifact.CLASSIFIER_FILE))
    if done:
        record = artifact.read_classifier_settings(out)[0]["provenance"]
        before = record["identity"]
    else:
        before = runs.read_json(storage.join(out, trained.WORK_FOLDER, _IDENTITY_FILE))
    if before is not None:
        identity.refuse_other(before, out, "holds the result of another finetune")
    return record["summary"] | {"already_done": True} if done else None
