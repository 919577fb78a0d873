"""Train TSQNet, from features to a bundle (paper, section 3 and appendix A).

loop.py holds the workers' loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsq_ray import provenance, storage
from tsq_ray.bundle.settings import (
    is_bundle,
    read_bundle_settings,
    read_classifier_settings,
    write_curves,
)
from tsq_ray.bundle.weights import Bundle, classifier_settings, save_bundle
from tsq_ray.config import Config, TrainConfig, check_budget, check_top_objects, load_config
from tsq_ray.errors import RunError
from tsq_ray.model import TSQNet
from tsq_ray.results import TrainingSummary, from_record
from tsq_ray.runs.folder import read_json, read_run, write_json
from tsq_ray.runs.identity import Identity
from tsq_ray.runs.lease import Lease
from tsq_ray.runtime import cluster
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.training.features import (
    FeatureSource,
    Teacher,
    TrainingVideos,
    describe_left_out,
    select_videos,
)
from tsq_ray.training.on_worker import RemoteFeatures, features_on_worker
from tsq_ray.training.sampler.components import Components
from tsq_ray.training.sampler.launch import Fitted, fit_on_cluster
from tsq_ray.training.sampler.loop import SamplerJob

WORK_FOLDER = "_train"
_IDENTITY_FILE = "identity.json"


def training_config(
    features_uri: str, path: str | Path | None = None, sets: Iterable[str] = ()
) -> Config:
    """Load the settings of a training: those of the features, then the TOML file, then `sets`.

    Raises RunError if the decode or object encoder settings differ from those of the features,
    apart from limits and the paths of weights; `train` checks the visual encoder's.
    """
    recorded = read_run(features_uri, "features")["config"]
    base = {"decode": recorded["decode"], "encoders": recorded["encoders"]}
    config = load_config(path, sets, base)
    requested = Identity.of(
        decode=config.decode.record(),
        encoders=config.encoders.record(),
    )
    _refuse_other_settings(requested, base, features_uri, _may_change)
    return config


def _refuse_other_settings(
    requested: Identity, recorded: Mapping[str, Any], features: str, free: Callable[[str], bool]
) -> None:
    differ = requested.differences(recorded, words=("in the features", "asked for"), free=free)
    if differ:
        raise RunError(
            f"{storage.redact(features)}: the features were made with other settings "
            f"({differ}); give the settings and the encoder of the features, or extract again"
        )


def _may_change(key: str) -> bool:
    """Whether a training may use another value of this setting than its features."""
    # paths of weights may differ, because hashes are compared; the features hold no text embeddings
    free = ("encoders.text.", "encoders.visual.", "decode.timeout_s", "decode.max_")
    return key.startswith(free) or key.endswith(".weights")


def train(
    features_uri: str,
    out: str,
    config: Config | None = None,
    *,
    encoder: str | None = None,
    recognizer: str | None = None,
    split: str | None = None,
    take_over: bool = False,
    session: Session = DEFAULT_SESSION,
) -> TrainingSummary:
    """Train TSQNet on a finished extraction, write the bundle to `out` and return a summary.

    Raises UserError for wrong input and RunFailed if the training fails.

    Args:
        features_uri: folder of the extraction.
        out: folder of the bundle.
        config: the settings; `training_config(features_uri)` by default.
        encoder: what `finetune` or `import_network` wrote, whose backbone made the features;
            without it, a linear frame head is fitted on the features for the encoder that made
            them.
        recognizer: what `finetune` or `import_network` wrote; without it, the bundle cannot score.
        split: split to train on; by default `train`, or every row if the features have no splits.
        take_over: take the folder from another run that writes to it.
        session: the cluster to use and the output to show.
    """
    started = time.time()
    plan = _Plan.make(
        storage.normalize(features_uri),
        storage.normalize(out),
        config or training_config(features_uri),
        (encoder, recognizer),
        split,
    )
    if (done := plan.finished()) is not None:
        return done
    videos = select_videos(plan.source)
    parts = Components.load(plan.config, plan.run, videos.classes, encoder, recognizer)
    # only now, so that wrong input leaves no folder behind
    with Lease(plan.out, take_over=take_over) as lease:
        # the run that held the lease before may have finished it
        if (done := plan.finished()) is not None:
            return done
        parts, fitted = _fit(plan, videos, parts, session, lease)
        lease.check()
        return _publish(plan, videos, parts, fitted, started)


def keep_untaught(features_uri: str, out: str, config: Config, recognizer: str, why: str) -> None:
    """Write a bundle whose sampler was not taught, so that only baselines can choose frames.

    `why` is kept in its provenance. Raises UserError for wrong input, and if `out` holds another
    bundle.
    """
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"modules": "visual"})}
    )
    features, out = storage.normalize(features_uri), storage.normalize(out)
    plan = _Plan.make(features, out, config, (None, recognizer), None)
    with Lease(plan.out) as lease:
        if is_bundle(plan.out):
            record = read_bundle_settings(plan.out)[0]["provenance"]
            return plan.identity.refuse_other(record["identity"], plan.out, "holds another bundle")
        classes = list(read_classifier_settings(recognizer)[0]["classes"])
        parts = Components.load(config, plan.run, classes, None, recognizer).untaught()
        record = _record(plan, parts) | {"untaught": why}
        lease.check()
        save_bundle(_bundle(config, classes, parts, TSQNet(parts.shape), record), plan.out)


@dataclass(frozen=True)
class _Plan:
    """A training whose settings have been checked against its features."""

    features: str
    out: str
    config: Config
    run: Mapping[str, Any]
    """`_run.json` of the features."""
    source: FeatureSource
    identity: Identity

    @classmethod
    def make(
        cls,
        features: str,
        out: str,
        config: Config,
        classifiers: tuple[str | None, str | None],
        split: str | None,
    ) -> _Plan:
        """Check the settings and the split; raises UserError for wrong input."""
        check_budget(config.sampler, config.decode.num_frames, config.train.task)
        with_objects = config.train.modules == "both"
        if with_objects:
            check_top_objects(config.train.top_objects, config.encoders.num_objects)
        run = read_run(features, "features")
        if classifiers[0] is not None:
            config = config.with_visual_encoder(classifier_settings(classifiers[0]))
        requested = Identity.of(encoders={"visual": config.encoders.visual.record()})
        recorded = {"encoders": {"visual": run["config"]["encoders"]["visual"]}}
        _refuse_other_settings(requested, recorded, features, lambda key: key.endswith(".weights"))
        identity = _identity(run, config, classifiers, split)
        settings = config.train
        source = FeatureSource.of(
            features,
            split,
            settings.task,
            with_objects,
            settings.max_videos,
            _teacher(settings, classifiers[1]),
        )
        return cls(features, out, config, run, source, identity)

    @property
    def work(self) -> str:
        return storage.join(self.out, WORK_FOLDER)

    def finished(self) -> TrainingSummary | None:
        """Return the summary if `out` holds the finished result of this training, else None.

        Raises RunError if `out` holds another training.
        """
        if is_bundle(self.out):
            record = read_bundle_settings(self.out)[0]["provenance"]
            self.identity.refuse_other(record["identity"], self.out, "holds another training")
            return from_record(TrainingSummary, record["summary"], already_done=True)
        recorded = read_json(storage.join(self.work, _IDENTITY_FILE))
        if recorded is not None:
            self.identity.refuse_other(recorded, self.out, "holds another training")
        return None


def _teacher(settings: TrainConfig, recognizer: str | None) -> Teacher | None:
    """Return the teacher that the settings ask for. Raises RunError if it is missing."""
    if settings.target != "teacher":
        return None
    if recognizer is None:
        raise RunError(
            "train.target 'teacher' needs --recognizer URI: the recogniser that the features were "
            "extracted with"
        )
    classes = read_classifier_settings(recognizer)[0]["classes"]
    return Teacher(tuple(classes), settings.teacher_frames)


def _fit(
    plan: _Plan, videos: TrainingVideos, parts: Components, session: Session, lease: Lease
) -> tuple[Components, Fitted]:
    """Train in the work folder, resuming from any checkpoint there.

    Returns the components, whose encoder now has a head, and the result.
    """
    config, count = plan.config, videos.count
    with (
        cluster.connect(session, out=plan.out) as ray,
        Observer(ray, lease.holder, "train", lease.stop_if_lost) as observer,
        features_on_worker(
            plan.source, count, "train", config, session, observer.observe
        ) as features,
    ):
        # only now, so that a training that the cluster refuses leaves nothing behind
        write_json(storage.join(plan.work, _IDENTITY_FILE), plan.identity.parts)
        taught = None
        if plan.source.teacher is not None:
            taught = features.taught_classes(config.train.teacher_min_videos)
            parts = parts.of_classes(taught)
        job = _job(config, plan.source, features, parts, taught)
        return parts, fit_on_cluster(ray, job, config, count, plan.work, session, observer)


def _publish(
    plan: _Plan, videos: TrainingVideos, parts: Components, fitted: Fitted, started: float
) -> TrainingSummary:
    """Write the bundle, then remove the work folder."""
    summary = _summary(plan, videos, parts, fitted, round(time.time() - started, 2))
    record = _record(plan, parts) | {"summary": asdict(summary)}
    network = TSQNet(parts.shape)
    network.load_state_dict(fitted.state)
    write_curves(plan.out, fitted.curve)
    save_bundle(_bundle(plan.config, videos.classes, parts, network, record), plan.out)
    storage.remove_folder(plan.work)  # a finished bundle needs no checkpoints
    return summary


def _record(plan: _Plan, parts: Components) -> dict[str, Any]:
    """Return the provenance of a bundle."""
    text = plan.config.encoders.text.record()
    return {
        "identity": plan.identity.parts,
        "features": storage.redact(plan.features),
        "features_manifest": plan.run["manifest"],
        "weights": plan.run["weights"],
        "train": plan.config.train.record(),
        "text": text | {"sha256": parts.text.sha256 if parts.text else None},
        **provenance.of_this_run(),
    }


def _job(
    config: Config,
    source: FeatureSource,
    features: RemoteFeatures,
    parts: Components,
    taught: list[int] | None,
) -> SamplerJob:
    """Return the workers' job; fits a frame head if the encoder has none.

    `taught`: the teacher's classes that have a query.
    """
    text, task, encoder = parts.text, config.train.task, parts.encoder
    if encoder.head is None:
        encoder.head, _ = features.fit_head(config.finetune, task, taught)
    visual, seed = None, config.train.seed
    if config.train.init_visual != "random":
        visual = (
            features.prototypes(encoder.head, seed, task)
            if taught is None
            else features.taught_prototypes(seed, taught)
        )
    start = {"visual": visual, "textual": text.classes if text else None}
    return SamplerJob(
        config.train,
        parts.shape,
        {name: value.numpy() if value is not None else None for name, value in start.items()},
        text.vocabulary.numpy() if text else None,
        source,
        taught,
    )


def _summary(
    plan: _Plan, videos: TrainingVideos, parts: Components, fitted: Fitted, seconds: float
) -> TrainingSummary:
    epochs, text_warnings = plan.config.train.epochs, parts.text.warnings if parts.text else ()
    return TrainingSummary(
        out=storage.redact(plan.out),
        videos=videos.count,
        classes=parts.shape.num_classes,
        epochs=epochs,
        losses={key: value for key, value in fitted.curve[-1].items() if key != "epoch"},
        left_out=describe_left_out(videos.left_out),
        unlabelled=tuple(videos.unlabelled_uris),
        warnings=(*videos.warnings, *text_warnings),
        workers=fitted.workers,
        resumed_after_epoch=fitted.resumed_at,
        happened=fitted.happened,
        used=fitted.hours,
        train_seconds=round(fitted.seconds, 2),
        videos_per_s=round(videos.count * epochs / sum(fitted.epoch_seconds), 1),
        seconds=seconds,
    )


def _bundle(
    config: Config, classes: list[str], parts: Components, network: TSQNet, record: dict[str, Any]
) -> Bundle:
    return Bundle(
        classes,
        config.train.task,
        config.decode,
        config.encoders,
        config.sampler,
        network,
        parts.encoder,
        parts.objects,
        parts.text.vocabulary if parts.text else None,
        parts.recognizer,
        record,
        sampler_classes=None
        if parts.taught is None
        else [classes[number] for number in parts.taught],
    )


def _identity(
    run: Mapping[str, Any],
    config: Config,
    classifiers: tuple[str | None, str | None],
    split: str | None,
) -> Identity:
    encoder, recognizer = map(_classifier_digest, classifiers)
    return Identity.of(
        features={"manifest": run["manifest"]["sha256"], "config": run["identity"]},
        train=config.train.record(exclude={"num_workers", "checkpoint_every"}),
        finetune=config.finetune.record(exclude={"num_workers", "checkpoint_every"}),
        sampler=config.sampler.record(),
        text=config.encoders.text.record(),
        encoder=encoder,
        recognizer=recognizer,
        split=split,
    )


def _classifier_digest(uri: str | None) -> str | None:
    if uri is None:
        return None
    return read_classifier_settings(uri)[1]
