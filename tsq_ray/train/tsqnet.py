"""Ray Train: features -> TSQNet -> bundle (paper, section 3 and appendix A).

The order of samples and the dropout hang on (seed, epoch, step) alone, so a run that was killed and resumed from a checkpoint goes on as
if it had not been. Legend: V videos, B batch, T frames, C classes, D dims.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import torch
from torch import Tensor

from tsq_ray import bundle as bundles
from tsq_ray import runs, runtime, storage
from tsq_ray.bundle import Bundle
from tsq_ray.config import Config, TrainConfig, check_budget, flatten, load_config
from tsq_ray.encoders import FrameEncoder, TextEncoder, object_names
from tsq_ray.errors import ModelError, RunError, RunFailed
from tsq_ray.model import TSQNet, TSQShape, object_embeddings, tsq_loss
from tsq_ray.prototypes import prototypes
from tsq_ray.stages import OBJECTS, VISUAL, classifier_settings, load_network
from tsq_ray.train.data import TrainingSet, describe_left_out, load_training_set
from tsq_ray.train.head import fit_head, head_logits

WORK_FOLDER = "_train"
CURVES_FILE = "curves.csv"
_STATE_FILE = "state.pt"
_SAMPLE = 64
"""Videos that set the scale of the convolutions."""


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
    provenance = {
        "identity": identity,
        "features": storage.redact(features_uri),
        "features_manifest": run["manifest"],
        "weights": run["weights"],
        "train": config.train.model_dump(mode="json"),
        "text": config.encoders.text.model_dump(mode="json") | {"sha256": text.sha256 if text else None},
        "summary": summary,
        "versions": runs.versions(),
        "git_revision": runs.git_revision(),
        "ended": runs.now(),
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
        provenance,
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
    place = storage.join(out, WORK_FOLDER, "identity.json")
    begun = runs.read_json(place)
    if begun is not None:
        _refuse_other(out, flatten(begun), want)
    else:
        runs.write_json(place, identity)
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
        _train_loop,
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
        content = torch.load(Path(folder, _STATE_FILE), weights_only=True)
    return content["model"], content["curve"], time.monotonic() - started


class _Epochs:
    """Progress of a training; lives in a Ray actor."""

    def __init__(self) -> None:
        self.done = 0

    def set(self, done: int) -> None:
        self.done = done

    def get(self) -> tuple[int, dict[str, int]]:
        return self.done, {}


def _train_loop(job: dict[str, Any]) -> None:
    """One worker: its share of every batch, gradients averaged over the workers."""
    import ray
    import ray.train
    from ray.train.torch import get_device, prepare_model

    torch.set_num_threads(job["threads"])
    config = TrainConfig.model_validate(job["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    arrays = ray.get(job["data"])
    device = get_device()
    torch.manual_seed(config.seed)
    bare = TSQNet(TSQShape(**job["shape"]))
    bare.set_embeddings(*(torch.from_numpy(value.copy()) if value is not None else None for value in job["start"].values()))
    batches = Batches(arrays, job["vocabulary"], config, rank, world, device)
    bare.balance(*batches.sample())
    optimizer = torch.optim.SGD(bare.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    first, curve = _resume(bare, optimizer)
    network = prepare_model(bare.to(device))
    _to_device(optimizer, device)
    for epoch in range(first, config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch)
        losses = train_epoch(network, optimizer, batches, config, epoch)
        curve.append({"epoch": epoch + 1, **losses})
        last = epoch + 1 == config.epochs
        if rank == 0:
            job["counts"].set.remote(epoch + 1)
        if last or (epoch + 1) % config.checkpoint_every == 0:
            _report(bare, optimizer, curve, rank)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """x0.1 at 1/4, 1/2 and 3/4 of the epochs (appendix A: 25, 50 and 75 of 100)."""
    return config.lr * 0.1 ** sum(epoch >= config.epochs * quarter // 4 for quarter in (1, 2, 3))


class Batches:
    """This worker's share of each global batch, in an order that hangs on (seed, epoch) alone."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        vocabulary: np.ndarray | None,
        config: TrainConfig,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        self.vocabulary = torch.from_numpy(np.array(vocabulary)).to(device) if vocabulary is not None else None
        self.config, self.rank, self.world, self.device = config, rank, world, device

    def order(self, epoch: int) -> list[Tensor]:
        """The global batches of an epoch: int64 [<= B] each."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return list(torch.randperm(len(self.tensors["targets"]), generator=generator).split(self.config.batch_size))

    def share(self, batch: Tensor) -> tuple[Tensor, Tensor | None, Tensor, float]:
        """(visual [b, T, D], text [b, T, Dt], targets [b, C], weight): weight makes the mean over workers the mean over the batch."""
        mine = batch[self.rank :: self.world]
        weight = len(mine) * self.world / len(batch)
        if not len(mine):  # fewer videos than workers: compute one for the sake of the collective, count none
            mine = batch[:1]
        return *self._frames(mine), self.tensors["targets"][mine].to(self.device).float(), weight

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """The same few videos on every worker, on the CPU: (visual [n, T, D], text [n, T, Dt])."""
        num_videos = len(self.tensors["targets"])
        visual, text = self._frames(torch.arange(min(_SAMPLE, num_videos)) * num_videos // min(_SAMPLE, num_videos))
        return visual.cpu(), text.cpu() if text is not None else None

    def _frames(self, videos: Tensor) -> tuple[Tensor, Tensor | None]:
        visual = self.tensors["visual"][videos].to(self.device, non_blocking=True).float()
        if self.vocabulary is None:
            return visual, None
        ids, probs = (self.tensors[name][videos].to(self.device, non_blocking=True) for name in ("object_ids", "object_probs"))
        return visual, object_embeddings(ids.long(), probs.float(), self.vocabulary)


def train_epoch(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, config: TrainConfig, epoch: int
) -> dict[str, float]:
    """One pass: mean of each loss over the steps, as this worker saw them."""
    network.train()
    totals: dict[str, float] = {}
    order = batches.order(epoch)
    for step, batch in enumerate(order):
        # dropout is the same in an undisturbed and in a resumed run
        torch.manual_seed(((config.seed * 1_000_003 + epoch) * 10_007 + step) * 101 + batches.rank)
        visual, text, targets, weight = batches.share(batch)
        parts = tsq_loss(network(visual, text), targets, config.task, config.alpha, config.beta)
        optimizer.zero_grad()
        (parts["loss"] * weight).backward()
        optimizer.step()
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach()) / len(order)
    if not np.isfinite(totals["loss"]):
        raise RunFailed(f"train: the loss is {totals['loss']} in epoch {epoch + 1}; lower train.lr ({config.lr})")
    return totals


def _resume(network: TSQNet, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, float]]]:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, []
    with checkpoint.as_directory() as folder:
        content = torch.load(Path(folder, _STATE_FILE), weights_only=True, map_location="cpu")
    network.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return len(content["curve"]), content["curve"]


def _to_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(device)


def _report(network: TSQNet, optimizer: torch.optim.Optimizer, curve: list[dict[str, float]], rank: int) -> None:
    import ray.train

    if rank != 0:
        ray.train.report(dict(curve[-1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = {name: value.detach().cpu() for name, value in network.state_dict().items()}
        torch.save({"model": model, "optimizer": optimizer.state_dict(), "curve": curve}, Path(folder, _STATE_FILE))
        ray.train.report(dict(curve[-1]), checkpoint=ray.train.Checkpoint.from_directory(folder))


def _write_curves(out: str, curve: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(curve[0]))
    writer.writeheader()
    writer.writerows(curve)
    storage.write_bytes(storage.join(out, CURVES_FILE), text.getvalue().encode())


def _remove_work(out: str) -> None:
    """The checkpoints are of no use beside the finished bundle."""
    storage.remove_folder(storage.join(out, WORK_FOLDER))
