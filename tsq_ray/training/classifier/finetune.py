"""Frame classifiers trained on a manifest, for the encoder or the recogniser.

Either the whole network is trained, or a linear head on a frozen backbone, both with TSN's segment
consensus.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import provenance, runs, storage
from tsq_ray.bundle.settings import CLASSIFIER_FILE, read_classifier_settings, write_curves
from tsq_ray.bundle.weights import Classifier, save_classifier
from tsq_ray.config import Config, ModelConfig
from tsq_ray.errors import RunFailed
from tsq_ray.manifest import Manifest, VideoRows, read_manifest
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.stages import load_network
from tsq_ray.training.classifier import frozen, full
from tsq_ray.training.features import (
    TrainingRows,
    check_classes,
    describe_left_out,
    is_labelled,
    single_labels,
)

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
    take_over: bool = False,
    session: Session = DEFAULT_SESSION,
) -> dict[str, Any]:
    """Train the `role` network as `finetune.backbone` says and write the classifier to `out`.

    Uses the labelled videos of `split` (default: train), at most `limit`. A stopped run with the
    same settings is resumed. `take_over` takes the folder from another run that writes to it.

    Returns:
        A summary that counts and names the failed and unlabelled videos.

    Raises:
        UserError: wrong input.
        RunFailed: no video is usable, or the training fails.
    """
    started = time.time()
    out = storage.normalize(out)
    manifest = read_manifest(manifest_uri)
    what = f"manifest {storage.redact(manifest.uri)}"
    check_classes(manifest.classes, int(is_labelled(manifest.rows).sum()), what)
    chosen = TrainingRows.of(manifest.rows, split, limit, what)
    rows, val = chosen.rows, _validation_rows(manifest, chosen.rows, config)
    check_classes(manifest.classes, len(rows), what)
    single_labels(rows.table["labels"], config.train.task, what)
    single_labels(val.table["labels"], config.train.task, what)
    settings = config.encoders.visual if role == "encoder" else config.recognizer
    network = load_network(settings, with_head=False)
    identity = _identity(
        manifest.sha256, role, config, settings, network.backbone_hash(), split, limit
    )
    done = _finished(out, identity)
    if done is not None:
        return done
    storage.check_writable(out)
    work = storage.join(out, full.WORK_FOLDER)
    whole = config.finetune.backbone == "trained"
    if whole:
        full.check_input(network)
    with runs.Lease(out, take_over=take_over) as lease:
        # the run that held the lease before may have finished it
        if (done := _finished(out, identity)) is not None:
            return done
        runs.write_json(storage.join(work, _IDENTITY_FILE), identity.parts)
        ticks = (lease.stop_if_lost,)
        if whole:
            tuned = full.tune(
                network, rows, val, len(manifest.classes), work, config, session, ticks
            )
        else:
            tuned = frozen.fit_frozen(
                network,
                settings,
                runs.Selection(manifest, rows, chosen.split),
                work,
                config,
                session,
                ticks,
            )
        lease.check()
        summary = _summary(out, role, manifest, chosen, val, tuned, config) | {
            "seconds": round(time.time() - started, 2)
        }
        if not summary["videos"]:
            storage.remove_folder(work)  # nothing to resume, and other settings may work
            raise RunFailed(
                f"finetune: none of the {len(rows)} videos is usable ({summary['failed']})"
            )
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
            write_curves(out, tuned.curve)
        save_classifier(
            Classifier(tuned.network, manifest.classes, config.train.task, role, record), out
        )
        storage.remove_folder(work)
    return summary


def _summary(
    out: str,
    role: Role,
    manifest: Manifest,
    chosen: TrainingRows,
    val: VideoRows,
    tuned: full.Tuned,
    config: Config,
) -> dict[str, Any]:
    failed = pa.array(list(tuned.failed), pa.string())
    uris = [rows.table["uri"].filter(pc.is_in(rows.ids, failed)) for rows in (chosen.rows, val)]
    return {
        "out": storage.redact(out),
        "role": role,
        "backbone": config.finetune.backbone,
        "videos": len(chosen.rows) - len(uris[0]),
        "classes": len(manifest.classes),
        "failed": dict(Counter(tuned.failed.values())),
        "failed_videos": [storage.redact(uri) for part in uris for uri in part[:5].to_pylist()][:5],
        "left_out": describe_left_out(chosen.left_out),
        "unlabelled": chosen.named,
        "warnings": chosen.warnings,
        **tuned.figures,
    }


def _validation_rows(manifest: Manifest, rows: VideoRows, config: Config) -> VideoRows:
    """Return the labelled videos of `finetune.val_split` that are not trained on."""
    every = manifest.rows
    if config.finetune.backbone == "frozen" or not config.finetune.val_split:
        return every[:0]
    in_split = pc.fill_null(
        pc.equal(every.table["split"], config.finetune.val_split), False
    ).to_numpy()
    return every.where(in_split & is_labelled(every) & (rows.places(every.ids) < 0))


def _identity(
    manifest: str,
    role: str,
    config: Config,
    settings: ModelConfig,
    backbone: str,
    split: str | None,
    limit: int | None,
) -> runs.Identity:
    whole = config.finetune.backbone == "trained"
    # a head is fitted on T frames per video; a whole network takes finetune.segments frames instead
    decode = {"strategy", "backend"} if whole else {"strategy", "backend", "num_frames"}
    tuning = config.finetune.model_dump(
        mode="json", exclude={"head", "num_workers", "checkpoint_every"}
    )
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
    """Return the summary if `out` holds this finetune, finished; None if it does not.

    Raises RunError if `out` holds another finetune, finished or not.
    """
    done = storage.exists(storage.join(out, CLASSIFIER_FILE))
    if done:
        record = read_classifier_settings(out)[0]["provenance"]
        before = record["identity"]
    else:
        before = runs.read_json(storage.join(out, full.WORK_FOLDER, _IDENTITY_FILE))
    if before is not None:
        identity.refuse_other(before, out, "holds another finetune")
    return record["summary"] | {"already_done": True} if done else None
