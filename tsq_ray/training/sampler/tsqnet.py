"""Training TSQNet, from features to a bundle (paper, section 3 and appendix A).

The workers run loop.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tsq_ray import provenance, runs, storage
from tsq_ray.bundle.settings import (
    class_order,
    is_bundle,
    read_bundle_settings,
    read_classifier_settings,
    write_curves,
)
from tsq_ray.bundle.weights import Bundle, load_classifier, save_bundle
from tsq_ray.config import Config, check_budget, check_top_objects, load_config
from tsq_ray.errors import ModelError, RunError
from tsq_ray.model import TSQNet, TSQShape
from tsq_ray.networks.encoder import FrameEncoder, object_names
from tsq_ray.networks.text import text_encoder
from tsq_ray.prototypes import prototypes
from tsq_ray.rows import OBJECTS, VISUAL
from tsq_ray.runtime import cluster
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.stages import classifier_settings, load_network
from tsq_ray.training.features import (
    FeatureSource,
    TrainingSet,
    describe_left_out,
    open_training_set,
)
from tsq_ray.training.head import fit_head, head_logits
from tsq_ray.training.sampler.launch import Fitted, fit_on_cluster

WORK_FOLDER = "_train"
_IDENTITY_FILE = "identity.json"


def training_settings(
    features_uri: str, path: str | Path | None = None, sets: Iterable[str] = ()
) -> Config:
    """Load the settings of a training: those of the features, then the TOML file, then the sets.

    Raises RunError if their decode or encoder settings differ from those of the features.
    """
    made = runs.read_run(features_uri, "features")["config"]
    base = {"decode": made["decode"], "encoders": made["encoders"]}
    config = load_config(path, sets, base)
    wanted = runs.Identity.of(
        decode=config.decode.model_dump(mode="json"),
        encoders=config.encoders.model_dump(mode="json"),
    )
    differ = wanted.differences(base, words=("in the features", "asked for"), free=_may_change)
    if differ:
        raise RunError(
            f"{storage.redact(features_uri)}: the features were made with other settings "
            f"({differ}); leave these settings out or extract again"
        )
    return config


def _may_change(key: str) -> bool:
    """Whether a training may change this setting of its features."""
    # paths of weights may differ, because hashes are compared; only training uses the text model
    free = ("encoders.text.", "encoders.visual.", "decode.timeout_s", "decode.max_")
    return key.startswith(free) or key.endswith(".weights")


def train(
    features_uri: str,
    out: str,
    config: Config,
    *,
    encoder: str | None = None,
    recognizer: str | None = None,
    split: str | None = None,
    take_over: bool = False,
    session: Session = DEFAULT_SESSION,
) -> dict[str, Any]:
    """Train TSQNet on a finished extraction, write the bundle to `out` and return a summary.

    Raises UserError for wrong input and RunFailed if the training fails.

    Args:
        features_uri: folder of the extraction.
        out: folder of the bundle.
        config: the settings; see `training_settings`.
        encoder: finetune's output whose backbone made the features; without it, a linear frame head
            is fitted on the features for the encoder that made them.
        recognizer: finetune's output; without it, the bundle cannot score.
        split: split to train on; see `training_split`.
        take_over: take the folder from another run that writes to it.
        session: the command's cluster and output options.
    """
    started = time.time()
    out, features_uri = storage.normalize(out), storage.normalize(features_uri)
    check_budget(config.sampler, config.decode.num_frames, config.train.task)
    if config.train.modules == "both":
        check_top_objects(config.train.top_objects, config.encoders.num_objects)
    run = runs.read_run(features_uri, "features")
    if encoder is not None:
        config = config.model_copy(
            update={
                "encoders": config.encoders.model_copy(
                    update={"visual": classifier_settings(encoder)}
                )
            }
        )
    identity = _identity(run, config, encoder, recognizer, split)
    done = _finished(out, identity)
    if done is not None:
        return done
    source = FeatureSource.of(
        features_uri, split, config.train.task, with_objects=config.train.modules == "both"
    )
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(open_training_set(source))
        parts = _Parts.load(config, run, data, encoder, recognizer)
        # only now, so that wrong input leaves no folder behind
        lease = stack.enter_context(runs.Lease(out, take_over=take_over))
        # the run that held the lease before may have finished it
        if (done := _finished(out, identity)) is not None:
            return done
        work = storage.join(out, WORK_FOLDER)
        runs.write_json(storage.join(work, _IDENTITY_FILE), identity.parts)
        with cluster.connect(session) as ray:
            job = _job(config, source, data, parts)
            fitted = fit_on_cluster(
                ray, job, config, len(data), work, session, (lease.stop_if_lost,)
            )
        summary = _summary(out, config, data, parts.text, fitted)
        record = {
            "identity": identity.parts,
            "features": storage.redact(features_uri),
            "features_manifest": run["manifest"],
            "weights": run["weights"],
            "train": config.train.model_dump(mode="json"),
            "text": config.encoders.text.model_dump(mode="json")
            | {"sha256": parts.text.sha256 if parts.text else None},
            "summary": summary,
            "versions": provenance.versions(),
            "git_revision": provenance.git_revision(),
            "ended": provenance.now(),
        }
        lease.check()
        write_curves(out, fitted.curve)
        save_bundle(_bundle(config, data, parts, fitted, record), out)
        storage.remove_folder(work)  # a finished bundle needs no checkpoints
    return summary | {"seconds": round(time.time() - started, 2)}


@dataclasses.dataclass
class _Parts:
    """The parts of a bundle other than TSQNet."""

    encoder: FrameEncoder
    objects: FrameEncoder | None
    text: _TextSide | None
    recognizer: FrameEncoder | None
    shape: TSQShape

    @classmethod
    def load(
        cls,
        config: Config,
        run: Mapping[str, Any],
        data: TrainingSet,
        encoder: str | None,
        recognizer: str | None,
    ) -> _Parts:
        """Load the parts; raises ModelError if one does not fit the features."""
        frame_encoder = _frame_encoder(config, run, data, encoder)
        answers = _recognizer(recognizer, data.classes, config.train.task)
        text = objects = None
        if config.train.modules == "both":
            text = _TextSide.make(config, data.classes)
            objects = load_network(config.encoders.objects, with_head=True)
            _same_weights(objects.state_hash(), run["weights"][OBJECTS], "encoders.objects")
        return cls(frame_encoder, objects, text, answers, _shape(config, data, text))


def _job(config: Config, source: FeatureSource, data: TrainingSet, parts: _Parts) -> dict[str, Any]:
    text = parts.text
    start = {
        "visual": _visual_start(config, data, parts.encoder),
        "textual": text.classes if text else None,
    }
    return {
        "config": config.train.model_dump(mode="json"),
        "shape": dataclasses.asdict(parts.shape),
        "start": {
            name: value.numpy() if value is not None else None for name, value in start.items()
        },
        "vocabulary": text.vocabulary.numpy() if text else None,
        "source": source,
    }


def _summary(
    out: str, config: Config, data: TrainingSet, text: _TextSide | None, fitted: Fitted
) -> dict[str, Any]:
    return {
        "out": storage.redact(out),
        "videos": len(data),
        "left_out": describe_left_out(data.selection.left_out),
        "unlabelled": data.selection.named,
        "warnings": [*data.selection.warnings, *(text.warnings if text else ())],
        "classes": len(data.classes),
        "epochs": config.train.epochs,
        "losses": {key: value for key, value in fitted.curve[-1].items() if key != "epoch"},
        "workers": fitted.workers,
        "went_on_after_epoch": fitted.resumed_at,
        "train_seconds": round(fitted.seconds, 2),
        "videos_per_s": round(len(data) * config.train.epochs / sum(fitted.epoch_seconds), 1),
    }


def _bundle(
    config: Config, data: TrainingSet, parts: _Parts, fitted: Fitted, record: dict[str, Any]
) -> Bundle:
    network = TSQNet(parts.shape)
    network.load_state_dict(fitted.state)
    return Bundle(
        data.classes,
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
    )


def _identity(
    run: Mapping[str, Any],
    config: Config,
    encoder: str | None,
    recognizer: str | None,
    split: str | None,
) -> runs.Identity:
    return runs.Identity.of(
        features={"manifest": run["manifest"]["sha256"], "config": run["identity"]},
        train=config.train.model_dump(mode="json", exclude={"num_workers", "checkpoint_every"}),
        finetune=config.finetune.model_dump(mode="json"),
        sampler=config.sampler.model_dump(mode="json"),
        text=config.encoders.text.model_dump(mode="json"),
        encoder=_classifier_digest(encoder),
        recognizer=_classifier_digest(recognizer),
        split=split,
    )


def _classifier_digest(uri: str | None) -> str | None:
    if uri is None:
        return None
    return read_classifier_settings(uri)[1]


def _finished(out: str, identity: runs.Identity) -> dict[str, Any] | None:
    """Return the summary if `out` holds this training, finished; None if it does not.

    Raises RunError if `out` holds another training.
    """
    if is_bundle(out):
        provenance = read_bundle_settings(out)[0]["provenance"]
        identity.refuse_other(provenance["identity"], out, "holds another training")
        return provenance["summary"] | {"already_done": True}
    begun = runs.read_json(storage.join(out, WORK_FOLDER, _IDENTITY_FILE))
    if begun is not None:
        identity.refuse_other(begun, out, "holds another training")
    return None


def _frame_encoder(
    config: Config, run: Mapping[str, Any], data: TrainingSet, encoder: str | None
) -> FrameEncoder:
    """Load the encoder of the features, with the frame head of finetune or one fitted here."""
    network = load_network(config.encoders.visual, with_head=encoder is not None)
    _same_weights(
        network.backbone_hash(),
        run["weights"][VISUAL],
        "--encoder" if encoder else "encoders.visual",
    )
    if encoder is None:
        network.head = fit_head(data.visual, data.targets, config.finetune, config.train.task)
    else:
        classifier = load_classifier(encoder)
        class_order(classifier.classes, data.classes, f"--encoder {storage.redact(encoder)}")
    return network


def _same_weights(have: str, want: str, what: str) -> None:
    if have != want:
        raise ModelError(
            f"{what}: its weights (sha256 {have[:12]}) are not those that made the features "
            f"({want[:12]}); give the same weights or extract again"
        )


def _recognizer(uri: str | None, classes: list[str], task: str) -> FrameEncoder | None:
    if uri is None:
        return None
    classifier = load_classifier(uri)
    class_order(classifier.classes, classes, f"--recognizer {storage.redact(uri)}")
    if classifier.task != task:
        raise ModelError(
            f"--recognizer {storage.redact(uri)}: was finetuned for task {classifier.task!r}, "
            f"train.task is {task!r}"
        )
    return classifier.encoder


@dataclasses.dataclass
class _TextSide:
    vocabulary: Tensor
    """[1000, Dt], embeddings of the object names."""
    classes: Tensor | None
    """[C, Dt], embeddings of the class names; None for a random start."""
    sha256: str
    warnings: list[str]

    @classmethod
    def make(cls, config: Config, classes: list[str]) -> _TextSide:
        """Embed the object and class names.

        Raises ModelError if the word vectors know no object, or lack a class that starts a query.
        """
        encoder, place = (
            text_encoder(config.encoders.text),
            storage.redact(config.encoders.text.weights),
        )
        objects = object_names()
        vocabulary = encoder.embed(objects)
        unknown = _unknown(objects, vocabulary)
        if len(unknown) == len(objects):
            raise ModelError(
                f"encoders.text.weights {place!r}: has no word of any of the {len(objects)} object "
                "names; use English vectors"
            )
        start = encoder.embed(classes) if config.train.init_textual == "text" else None
        strange = _unknown(classes, start) if start is not None else []
        if strange:
            raise ModelError(
                f"encoders.text.weights {place!r}: has no word of {len(strange)} of the "
                f"{len(classes)} class names (first: {strange[0]!r}); rename them, use other "
                "vectors, or set train.init_textual=random"
            )
        warnings = (
            [
                f"{len(unknown)} object names have no word in {place} and are ignored "
                f"(first: {unknown[0]!r})"
            ]
            if unknown
            else []
        )
        return cls(vocabulary, start, encoder.state_hash(), warnings)


def _unknown(names: list[str], vectors: Tensor) -> list[str]:
    """Return the names without a vector."""
    return [name for name, known in zip(names, vectors.any(1).tolist(), strict=True) if not known]


def _shape(config: Config, data: TrainingSet, text: _TextSide | None) -> TSQShape:
    settings = config.train
    return TSQShape(
        num_classes=len(data.classes),
        visual_dim=data.visual.shape[-1],
        text_dim=text.vocabulary.shape[1] if text else 1,
        dim_visual=settings.dim_visual,
        dim_textual=settings.dim_textual,
        dropout=settings.dropout,
        swap_values=settings.swap_values,
        modules=settings.modules,
        attention=settings.attention,
        classifier=settings.classifier,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        self_attention=settings.self_attention,
        top_objects=settings.top_objects,
    )


def _visual_start(config: Config, data: TrainingSet, encoder: FrameEncoder) -> Tensor | None:
    if config.train.init_visual == "random":
        return None
    assert encoder.head is not None
    logits = head_logits(encoder.head, data.visual)
    return prototypes(
        data.visual, logits, data.labels, len(data.classes), config.train.seed, config.train.task
    )
