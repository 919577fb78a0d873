"""Ray Train: features -> TSQNet -> bundle (paper, section 3 and appendix A). What a worker does is in loop.py."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import torch
from torch import Tensor

from tsq_ray import bundle as bundles
from tsq_ray import provenance, runs, runtime, storage
from tsq_ray.bundle import Bundle
from tsq_ray.config import Config, check_budget, flatten, load_config
from tsq_ray.encoders import FrameEncoder, TextEncoder, object_names
from tsq_ray.errors import ModelError, RunError, RunFailed
from tsq_ray.model import TSQNet, TSQShape
from tsq_ray.prototypes import prototypes
from tsq_ray.stages import OBJECTS, VISUAL, classifier_settings, load_network
from tsq_ray.train.data import TrainingSet, describe_left_out, load_training_set
from tsq_ray.train.head import fit_head, head_logits
from tsq_ray.train.loop import STATE_FILE, train_loop

WORK_FOLDER = "_train"
_IDENTITY_FILE = "identity.json"
CURVES_FILE = "curves.csv"


def settings_for(features_uri: str, path: str | None = None, sets: tuple[str, ...] = ()) -> Config:
    """Settings of a training: the features' own as the base, then the TOML file and the sets.

    RunError where they ask for another decode or encoder than the features have.
    """
    made = runs.read_run(features_uri, "features")["config"]
    base = {"decode": made["decode"], "encoders": made["encoders"]}
    config = load_config(path, sets, base)
    now = config.model_dump(mode="json")
    before, after = (flatten({"decode": tree["decode"], "encoders": tree["encoders"]}) for tree in (made, now))
    # where weights lie may differ: their hashes are compared; the text model is only used from here on
    free = ("encoders.text.", "encoders.visual.", "decode.timeout_s", "decode.max_")
    differ = [key for key in after if not key.startswith(free) and not key.endswith(".weights") and before.get(key) != after[key]]
    if differ:
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {after[key]!r} asked for" for key in differ[:5])
        raise RunError(
            f"{storage.redact(features_uri)}: the features were made with other settings ({shown}); leave them out or extract again"
        )
    return config


def train(
    features_uri: str,
    out: str,
    config: Config,
    *,
    encoder: str | None = None,
    recognizer: str | None = None,
    split: str | None = None,
    address: str | None = None,
    show_progress: bool = True,
    debug: bool = False,
) -> dict[str, Any]:
    """Train TSQNet on the features of a finished extraction and write the bundle to `out`.

    `encoder`: finetune's output whose backbone made the features; without it the features' own encoder is taken and a linear frame head
    is fitted on the features. `recognizer`: finetune's output; without it the bundle cannot score. Returns a summary.
    Raises UserError for wrong input, RunFailed where the training fails.
    """
    started = time.time()
    out, features_uri = storage.normalize(out), storage.normalize(features_uri)
    check_budget(config.sampler.budget, config.decode.num_frames)
    run = runs.read_run(features_uri, "features")
    if encoder is not None:
        config = config.model_copy(update={"encoders": config.encoders.model_copy(update={"visual": classifier_settings(encoder)})})
    data = load_training_set(features_uri, split, config.train.task)
    identity = _identity(run, config, encoder, recognizer, split)
    done = _finished(out, identity)
    if done is not None:
        return done
    frame_encoder = _frame_encoder(config, run, data, encoder)
    answerer = _recognizer(recognizer, data.classes, config.train.task)
    text = _TextSide.make(config, data.classes) if config.train.modules == "both" else None
    shape = _shape(config, data, text)
    runs.write_json(storage.join(out, WORK_FOLDER, _IDENTITY_FILE), identity)
    start = {
        "visual": _visual_start(config, data, frame_encoder),
        "textual": text.classes if text and config.train.init_textual == "text" else None,
    }
    job = {
        "config": config.train.model_dump(mode="json"),
        "shape": dataclasses.asdict(shape),
        "start": {name: value.numpy() if value is not None else None for name, value in start.items()},
        "vocabulary": text.vocabulary.numpy() if text else None,
        "threads": config.resources.threads,
    }
    with runtime.cluster(address, debug) as ray:
        state, curve, seconds = _fit(ray, job, data, out, show_progress, debug)
    network = TSQNet(shape)
    network.load_state_dict(state)
    losses = {key: value for key, value in curve[-1].items() if key != "epoch"}
    summary = {
        "out": storage.redact(out),
        "videos": len(data.video_ids),
        "left_out": describe_left_out(data.left_out),
        "unlabelled": data.named,
        "warnings": data.warnings,
        "classes": len(data.classes),
        "epochs": config.train.epochs,
        "losses": losses,
        "train_seconds": round(seconds, 2),
    }
    record = {
        "identity": identity,
        "features": storage.redact(features_uri),
        "features_manifest": run["manifest"],
        "weights": run["weights"],
        "train": config.train.model_dump(mode="json"),
        "text": config.encoders.text.model_dump(mode="json") | {"sha256": text.sha256 if text else None},
        "summary": summary,
        "versions": provenance.versions(),
        "git_revision": provenance.git_revision(),
        "ended": provenance.now(),
    }
    objects = load_network(config.encoders.objects, with_head=True) if text else None
    if objects is not None:
        _same_weights(objects.state_hash(), run["weights"][OBJECTS], "encoders.objects")
    result = Bundle(
        data.classes,
        config.train.task,
        config.decode,
        config.encoders,
        config.sampler,
        network,
        frame_encoder,
        objects,
        text.vocabulary if text else None,
        answerer,
        record,
    )
    _write_curves(out, curve)
    bundles.save_bundle(result, out)
    _remove_work(out)
    return summary | {"seconds": round(time.time() - started, 2)}


def _identity(run: Mapping[str, Any], config: Config, encoder: str | None, recognizer: str | None, split: str | None) -> dict[str, Any]:
    return {
        "features": {"manifest": run["manifest"]["sha256"], "config": run["identity"]},
        "train": config.train.model_dump(mode="json", exclude={"num_workers", "checkpoint_every"}),
        "finetune": config.finetune.model_dump(mode="json"),
        "sampler": config.sampler.model_dump(mode="json"),
        "text": config.encoders.text.model_dump(mode="json"),
        "encoder": _classifier_digest(encoder),
        "recognizer": _classifier_digest(recognizer),
        "split": split,
    }


def _classifier_digest(uri: str | None) -> str | None:
    if uri is None:
        return None
    return bundles.read_classifier_settings(uri)[1]


def _finished(out: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of an equal training that is done already; RunError where `out` holds another one."""
    want = flatten(json.loads(json.dumps(identity)))
    if bundles.is_bundle(out):
        provenance = bundles.read_bundle_settings(out)[0]["provenance"]
        _refuse_other(out, flatten(provenance["identity"]), want)
        return provenance["summary"] | {"already_done": True}
    begun = runs.read_json(storage.join(out, WORK_FOLDER, _IDENTITY_FILE))
    if begun is not None:
        _refuse_other(out, flatten(begun), want)
    return None


def _refuse_other(out: str, before: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    differ = sorted(key for key in before.keys() | want.keys() if before.get(key) != want.get(key))
    if differ:
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {want.get(key)!r} now" for key in differ[:5])
        raise RunError(f"{storage.redact(out)}: holds another training ({shown}); take another --out")


def _frame_encoder(config: Config, run: Mapping[str, Any], data: TrainingSet, encoder: str | None) -> FrameEncoder:
    """The features' encoder with a frame head over the classes: finetune's, or one fitted here."""
    network = load_network(config.encoders.visual, with_head=encoder is not None)
    _same_weights(network.backbone_hash(), run["weights"][VISUAL], "--encoder" if encoder else "encoders.visual")
    if encoder is None:
        network.head = fit_head(data.visual, data.targets, config.finetune, config.train.task)
    else:
        classifier = bundles.load_classifier(encoder)
        bundles.class_order(classifier.classes, data.classes, f"--encoder {storage.redact(encoder)}")
    return network


def _same_weights(have: str, want: str, what: str) -> None:
    if have != want:
        raise ModelError(
            f"{what}: its weights (sha256 {have[:12]}) are not those that made the features ({want[:12]}); name the same ones or extract again"
        )


def _recognizer(uri: str | None, classes: list[str], task: str) -> FrameEncoder | None:
    if uri is None:
        return None
    classifier = bundles.load_classifier(uri)
    bundles.class_order(classifier.classes, classes, f"--recognizer {storage.redact(uri)}")
    if classifier.task != task:
        raise ModelError(f"--recognizer {storage.redact(uri)}: was finetuned for task {classifier.task!r}, train.task is {task!r}")
    return classifier.encoder


@dataclasses.dataclass
class _TextSide:
    vocabulary: Tensor
    """[1000, Dt], the object names."""
    classes: Tensor
    """[C, Dt], the class names."""
    sha256: str

    @classmethod
    def make(cls, config: Config, classes: list[str]) -> _TextSide:
        encoder = TextEncoder(config.encoders.text)
        return cls(encoder.embed(object_names()), encoder.embed(classes), encoder.state_hash())


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
    )


def _visual_start(config: Config, data: TrainingSet, encoder: FrameEncoder) -> Tensor | None:
    if config.train.init_visual == "random":
        return None
    assert encoder.head is not None
    logits = head_logits(encoder.head, data.visual)
    return prototypes(data.visual, logits, data.labels, len(data.classes), config.train.seed, config.train.task)


def _fit(
    ray: Any, job: dict[str, Any], data: TrainingSet, out: str, show: bool, debug: bool
) -> tuple[dict[str, Tensor], list[dict[str, float]], float]:
    """Run the Ray Train job; the final weights, the losses of each epoch, the seconds it took."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    runtime.quiet_data(debug)
    settings = job["config"]
    workers, resources = settings["num_workers"], ray.cluster_resources()
    arrays = {"visual": data.visual, "object_ids": data.object_ids, "object_probs": data.object_probs, "targets": data.targets}
    counts = ray.remote(num_cpus=0)(_Epochs).remote()
    gpu = resources.get("GPU", 0) >= workers
    job = job | {
        "data": ray.put(arrays),
        "counts": counts,
        "threads": job["threads"] or max(1, int(resources.get("CPU", 1)) // workers),
    }
    fs, path = storage.filesystem(storage.join(out, WORK_FOLDER))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": runtime.share_cpus(resources.get("CPU", 1), workers)} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name="tsqnet",
            storage_path=path,
            storage_filesystem=pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    started = time.monotonic()
    try:
        result = runtime.run_with_progress(trainer.fit, counts, settings["epochs"], "train", show, unit="epochs")
    except Exception as error:
        raise runtime.run_failed(error, "train") from error
    if result.checkpoint is None:
        raise RunFailed("train: Ray Train returned no checkpoint; give the same command again (--debug shows its log)")
    with result.checkpoint.as_directory() as folder:
        content = torch.load(Path(folder, STATE_FILE), weights_only=True)
    return content["model"], content["curve"], time.monotonic() - started


class _Epochs:
    """Progress of a training; lives in a Ray actor."""

    def __init__(self) -> None:
        self.done = 0

    def set(self, done: int) -> None:
        self.done = done

    def get(self) -> tuple[int, dict[str, int]]:
        return self.done, {}


def _write_curves(out: str, curve: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(curve[0]))
    writer.writeheader()
    writer.writerows(curve)
    storage.write_bytes(storage.join(out, CURVES_FILE), text.getvalue().encode())


def _remove_work(out: str) -> None:
    """The checkpoints are of no use beside the finished bundle."""
    storage.remove_folder(storage.join(out, WORK_FOLDER))
