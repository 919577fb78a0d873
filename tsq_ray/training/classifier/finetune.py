"""Frame classifiers trained on a manifest, for the encoder or the recogniser.

Either the whole network is trained, or a linear head on a frozen backbone, both with TSN's segment
consensus.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import provenance, storage
from tsq_ray.bundle.settings import CLASSIFIER_FILE, read_classifier_settings, write_curves
from tsq_ray.bundle.weights import Classifier, load_network, save_classifier
from tsq_ray.config import Config, ModelConfig, load_config
from tsq_ray.errors import ConfigError, RunFailed
from tsq_ray.manifest import Manifest, VideoRows, read_manifest
from tsq_ray.networks.encoder import FrameEncoder
from tsq_ray.results import FinetuneSummary, from_record
from tsq_ray.runs.bulk import Selection
from tsq_ray.runs.folder import read_json, write_json
from tsq_ray.runs.identity import Identity
from tsq_ray.runs.lease import Lease
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.training.classifier import frozen, full
from tsq_ray.training.features import (
    TrainingRows,
    check_classes,
    check_single_labels,
    describe_left_out,
    is_labelled,
)

Role = Literal["encoder", "recognizer"]
_IDENTITY_FILE = "identity.json"


def finetune(
    manifest_uri: str,
    role: Role,
    out: str,
    config: Config | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    take_over: bool = False,
    session: Session = DEFAULT_SESSION,
) -> FinetuneSummary:
    """Train the `role` network as `finetune.backbone` says and write the classifier to `out`.

    Raises UserError for wrong input, RunFailed if no video is usable or the training fails.

    Args:
        manifest_uri: what `build_manifest` wrote.
        role: "encoder" trains `encoders.visual`, "recognizer" trains `recognizer`.
        out: folder of the classifier; a stopped run with the same settings is resumed.
        config: the settings; `load_config()` by default.
        split: split to train on; by default `train`, or every row if the manifest has no splits.
        limit: at most this many labelled videos.
        take_over: take the folder from another run that writes to it.
        session: the cluster to use and the output to show.
    """
    started = time.time()
    plan = _Plan.make(
        manifest_uri, role, storage.normalize(out), config or load_config(), split, limit
    )
    if (done := plan.finished()) is not None:
        return done
    if plan.trains_backbone:
        full.check_input(plan.network)
    with Lease(plan.out, take_over=take_over) as lease:
        # the run that held the lease before may have finished it
        if (done := plan.finished()) is not None:
            return done
        tuned = _fit(plan, session, lease)
        return _publish(plan, tuned, started)


@dataclass(frozen=True)
class _Plan:
    """A fine-tuning run whose input has been checked."""

    out: str
    role: Role
    config: Config
    manifest: Manifest
    chosen: TrainingRows
    val: VideoRows
    settings: ModelConfig
    network: FrameEncoder
    """The backbone, without a head."""
    identity: Identity

    @classmethod
    def make(
        cls,
        manifest_uri: str,
        role: Role,
        out: str,
        config: Config,
        split: str | None,
        limit: int | None,
    ) -> _Plan:
        """Read and check the input; raises UserError for wrong input."""
        if role not in get_args(Role):
            raise ConfigError(f"role {role!r}: allowed are {', '.join(get_args(Role))}")
        manifest = read_manifest(manifest_uri)
        what = f"manifest {storage.redact(manifest.uri)}"
        check_classes(manifest.classes, int(is_labelled(manifest.rows).sum()), what)
        chosen = TrainingRows.of(manifest.rows, split, limit, what)
        val = _validation_rows(manifest, chosen.rows, config)
        check_classes(manifest.classes, len(chosen.rows), what)
        for rows in (chosen.rows, val):
            check_single_labels(rows.table["labels"], config.train.task, what)
        settings = config.encoders.visual if role == "encoder" else config.recognizer
        if settings.clip_frames > 1:
            raise ConfigError(
                f"model {settings.model!r} takes clips of {settings.clip_frames} frames; finetune "
                "trains only networks of single frames; use tsq import to use it unchanged"
            )
        network = load_network(settings, with_head=False)
        identity = _identity(
            manifest.sha256, role, config, settings, network.backbone_hash(), split, limit
        )
        return cls(out, role, config, manifest, chosen, val, settings, network, identity)

    @property
    def trains_backbone(self) -> bool:
        return self.config.finetune.backbone == "trained"

    @property
    def work(self) -> str:
        return storage.join(self.out, full.WORK_FOLDER)

    def begin(self) -> None:
        """Record in the work folder what is trained there, once the cluster accepts the run."""
        write_json(storage.join(self.work, _IDENTITY_FILE), self.identity.parts)

    def finished(self) -> FinetuneSummary | None:
        """Return the summary if `out` holds the finished result of this run, else None.

        Raises RunError if `out` holds another finetune, finished or not.
        """
        done = storage.exists(storage.join(self.out, CLASSIFIER_FILE))
        if done:
            record = read_classifier_settings(self.out)[0]["provenance"]
            recorded = record["identity"]
        else:
            recorded = read_json(storage.join(self.work, _IDENTITY_FILE))
        if recorded is not None:
            self.identity.refuse_other(recorded, self.out, "holds another finetune")
        return from_record(FinetuneSummary, record["summary"], already_done=True) if done else None


def _fit(plan: _Plan, session: Session, lease: Lease) -> full.Tuned:
    """Train in the work folder, resuming from any checkpoint there."""
    rows = plan.chosen.rows
    where: tuple[Any, ...] = (plan.work, plan.config, session, lease, plan.begin)
    if plan.trains_backbone:
        num_classes = len(plan.manifest.classes)
        tuned = full.tune(plan.network, rows, plan.val, num_classes, *where)
    else:
        selection = Selection(plan.manifest, rows, plan.chosen.split)
        tuned = frozen.fit_frozen(plan.network, plan.settings, selection, *where)
    lease.check()
    if not _usable(rows, tuned):
        storage.remove_folder(plan.work)  # nothing to resume, and other settings may work
        failed = dict(Counter(tuned.failed.values()))
        raise RunFailed(f"finetune: none of the {len(rows)} videos is usable ({failed})")
    return tuned


def _publish(plan: _Plan, tuned: full.Tuned, started: float) -> FinetuneSummary:
    """Write the classifier, then remove the work folder."""
    config, manifest = plan.config, plan.manifest
    summary = _summary(plan, tuned, round(time.time() - started, 2))
    record = {
        "identity": plan.identity.parts,
        "summary": asdict(summary),
        "manifest": {"uri": storage.redact(manifest.uri), "sha256": manifest.sha256},
        "finetune": config.finetune.record(),
        "decode": config.decode.record(),
        **provenance.of_this_run(),
    }
    tuned.network.config = plan.settings
    if plan.trains_backbone:
        write_curves(plan.out, tuned.curve)
    classifier = Classifier(tuned.network, manifest.classes, config.train.task, plan.role, record)
    save_classifier(classifier, plan.out)
    storage.remove_folder(plan.work)
    return summary


def _usable(rows: VideoRows, tuned: full.Tuned) -> int:
    return len(rows) - len(_failed_uris(rows, tuned))


def _failed_uris(rows: VideoRows, tuned: full.Tuned) -> list[str]:
    failed = pa.array(list(tuned.failed), pa.string())
    return rows.table["uri"].filter(pc.is_in(rows.ids, failed)).to_pylist()


def _summary(plan: _Plan, tuned: full.Tuned, seconds: float) -> FinetuneSummary:
    rows, chosen = plan.chosen.rows, plan.chosen
    failed = [*_failed_uris(rows, tuned)[:5], *_failed_uris(plan.val, tuned)[:5]]
    return FinetuneSummary(
        out=storage.redact(plan.out),
        role=plan.role,
        backbone=plan.config.finetune.backbone,
        videos=_usable(rows, tuned),
        classes=len(plan.manifest.classes),
        failed=dict(Counter(tuned.failed.values())),
        failed_videos=tuple(map(storage.redact, failed[:5])),
        left_out=describe_left_out(chosen.left_out),
        unlabelled=tuple(chosen.unlabelled_uris),
        warnings=tuple(chosen.warnings),
        happened=tuned.happened,
        used=tuned.hours,
        seconds=seconds,
        **tuned.figures,
    )


def _validation_rows(manifest: Manifest, rows: VideoRows, config: Config) -> VideoRows:
    """Return the labelled videos of `finetune.val_split` that are not trained on."""
    videos = manifest.rows
    if config.finetune.backbone == "frozen" or not config.finetune.val_split:
        return videos[:0]
    in_split = pc.fill_null(
        pc.equal(videos.table["split"], config.finetune.val_split), False
    ).to_numpy()
    return videos.where(in_split & is_labelled(videos) & (rows.places(videos.ids) < 0))


def _identity(
    manifest: str,
    role: str,
    config: Config,
    settings: ModelConfig,
    backbone: str,
    split: str | None,
    limit: int | None,
) -> Identity:
    whole = config.finetune.backbone == "trained"
    # a head is fitted on T frames per video; a whole network takes finetune.segments frames instead
    decode = {"strategy", "backend"} if whole else {"strategy", "backend", "num_frames"}
    tuning = config.finetune.record(exclude={"head", "num_workers", "checkpoint_every"})
    return Identity.of(
        manifest=manifest,
        role=role,
        model=settings.record(exclude={"weights"}),
        backbone=backbone,
        decode=config.decode.record(include=decode),
        finetune=tuning if whole else config.finetune.head.record(),
        task=config.train.task,
        split=split,
        limit=limit,
    )
