"""One training of an evaluation, in one process: fit on one set of videos, score another.

Shapes: V videos, T frames, D dims, C classes, N objects.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsq_ray.config import Task, TextConfig, TrainConfig
from tsq_ray.errors import RunFailed
from tsq_ray.evaluation.videos import VideoSet
from tsq_ray.model import TSQNet, TSQShape, object_embeddings, saliency
from tsq_ray.training.head import standard_scale
from tsq_ray.training.sampler.loop import fit_tsqnet

SCSAMPLER_HIDDEN = 256
_SCSAMPLER = {
    "epochs": 30,
    "batch_size": 64,
    "pairs": 64,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "margin": 1.0,
}
_CHUNK = 64
"""Videos per forward pass."""


@dataclass(frozen=True)
class TrainingSpec:
    """One training, seeded by `config.seed`; equal specs on the same data give the same result."""

    kind: Literal["tsq", "scsampler"]
    config: TrainConfig
    text: TextConfig

    def identity(self) -> dict[str, Any]:
        """Return all settings that the result depends on."""
        if self.kind == "scsampler":
            return {
                "kind": self.kind,
                "seed": self.config.seed,
                "hidden": SCSAMPLER_HIDDEN,
                **_SCSAMPLER,
            }
        config = self.config.record(exclude={"num_workers", "checkpoint_every"})
        text = self.text.record() if self.config.modules == "both" else None
        return {"kind": self.kind, "train": config, "text": text}


@dataclass
class Learned:
    """The result of a training on the measured videos.

    `diverged` holds the reason if the loss was not finite; `arrays` and `losses` are then empty.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Saliencies "saliency_visual" [V, T] and, with both modules, "saliency_textual" [V, T]; for
    figure 4, the queries "visual_before" and "visual_after" [C, D], and likewise "textual_*"."""
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    diverged: str | None = None


def learn(
    spec: TrainingSpec,
    training: Mapping[str, np.ndarray],
    measured: Mapping[str, np.ndarray],
    shape: TSQShape | None,
    text: Mapping[str, np.ndarray] | None,
    start: Mapping[str, np.ndarray | None],
    top_classes: int,
    taught: np.ndarray | None = None,
) -> Learned:
    """Fit one sampler on `training` and score `measured` (`arrays_of` of both).

    Args:
        spec: what to train.
        training: "visual" [V, T, D], "object_ids" and "object_probs" [V, T, N], "targets" [V, C];
            for "scsampler" also "teacher" [V, T].
        measured: as `training`; only the first three arrays are used.
        shape: shape of the network; None for "scsampler".
        text: {"vocabulary" [1000, Dt], "classes" [C, Dt]}; None without a textual module.
        start: initial queries {"visual", "textual"}, each None for random initialisation.
        top_classes: number of top classes whose saliencies are aggregated.
        taught: a teacher's soft targets [n, C] for the first n videos of `training`, instead of
            their labels.
    """
    started = time.monotonic()
    try:
        if spec.kind == "scsampler":
            scores = fit_scsampler(training["visual"], training["teacher"], spec.config.seed)(
                measured["visual"]
            )
            return Learned(
                {"saliency_visual": scores}, seconds=round(time.monotonic() - started, 2)
            )
        assert shape is not None
        vocabulary = torch.from_numpy(np.array(text["vocabulary"])) if text is not None else None
        initial = {
            name: torch.from_numpy(np.array(value)) if value is not None else None
            for name, value in start.items()
        }
        if taught is not None:
            training = {name: values[: len(taught)] for name, values in training.items()}
            training["targets"] = taught
        state, curve = fit_tsqnet(
            _used_arrays(training, _FIT, shape), vocabulary, initial, shape, spec.config, threads=1
        )
    except RunFailed as error:
        return Learned(seconds=round(time.monotonic() - started, 2), diverged=str(error))
    network = TSQNet(shape).eval()
    network.load_state_dict(state)
    visual, textual = saliencies(network, measured, vocabulary, spec.config.task, top_classes)
    arrays = {"saliency_visual": visual} | (
        {"saliency_textual": textual} if textual is not None else {}
    )
    for module, before in initial.items():
        if f"{module}.embeddings" in state:
            arrays |= {f"{module}_after": state[f"{module}.embeddings"].numpy()}
            arrays |= {f"{module}_before": before.numpy()} if before is not None else {}
    losses = {name: float(value) for name, value in curve[-1].items() if name != "epoch"}
    return Learned(arrays, losses, round(time.monotonic() - started, 2))


_FIT = ("visual", "object_ids", "object_probs", "targets")


def _used_arrays(
    arrays: Mapping[str, np.ndarray], names: Sequence[str], shape: TSQShape
) -> dict[str, np.ndarray]:
    """Return the named arrays, with only as many objects per frame as the network uses."""
    return {
        name: arrays[name][..., : shape.top_objects] if name.startswith("object_") else arrays[name]
        for name in names
    }


def arrays_of(videos: VideoSet) -> dict[str, np.ndarray]:
    """Return the arrays of `videos` that `learn` takes."""
    return {name: getattr(videos, name) for name in _FIT}


@torch.inference_mode()
def saliencies(
    network: TSQNet,
    arrays: Mapping[str, np.ndarray],
    vocabulary: Tensor | None,
    task: Task,
    top_classes: int,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the saliencies (equation 5) of the visual and the textual module, float32 [V, T] each.

    `arrays` holds "visual", "object_ids" and "object_probs". The textual saliencies are None
    without a textual module.
    """
    network = network.eval()
    network.fold()
    inputs, by_visual, by_text = _used_arrays(arrays, _FIT[:3], network.shape), [], []
    for first in range(0, len(arrays["visual"]), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        part = {name: torch.from_numpy(np.array(value[chunk])) for name, value in inputs.items()}
        text = None
        if network.textual is not None:
            assert vocabulary is not None
            ids, probs = part["object_ids"].long(), part["object_probs"].float()
            text = object_embeddings(ids, probs, vocabulary)
        output = network(part["visual"].float(), text)
        by_visual.append(saliency(output.attention_visual, output.logits_visual, task, top_classes))
        attention, logits = output.attention_textual, output.logits_textual
        if attention is not None and logits is not None:
            by_text.append(saliency(attention, logits, task, top_classes))
    return torch.cat(by_visual).numpy(), torch.cat(by_text).numpy() if by_text else None


class ScSampler:
    """The fitted ranker: features [V, T, D] -> scores [V, T]."""

    def __init__(self, network: nn.Module, mean: Tensor, scale: Tensor) -> None:
        self.network, self.mean, self.scale = network, mean, scale

    @torch.inference_mode()
    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return scores; higher is more salient."""
        return np.stack(
            [self._score(torch.from_numpy(np.array(video)).float()).numpy() for video in features]
        )

    def _score(self, frames: Tensor) -> Tensor:
        return self.network((frames - self.mean) / self.scale)[..., 0]


def fit_scsampler(features: np.ndarray, teacher: np.ndarray, seed: int) -> ScSampler:
    """Fit a class-agnostic ranker after SCSampler (Korbar et al. 2019, section 3.2).

    It learns on which of two frames the recogniser does better. A multilayer perceptron
    D -> 256 -> 1 (ReLU) on the standardised frame feature gives a frame's saliency s. Each step
    draws 64 random pairs of slots (i, j) per video. With z = 1 if the recogniser's probability of
    the video's true class is higher on i than on j and -1 if it is lower (pairs with equal
    probabilities do not count), the loss is the mean of max(0, 1 - z (s_i - s_j)). AdamW, learning
    rate 1e-3, weight decay 1e-4, 30 epochs of batches of 64 videos.

    It differs from the paper in its input: there a dedicated network sees compressed video or the
    MFCCs of clips, here the ranker sees the feature of the light encoder that all samplers share.

    Args:
        features: float [V, T, D].
        teacher: float [V, T], the recogniser's probability of the true class.
        seed: seed of initialisation, video order and pairs.
    """
    settings = _SCSAMPLER
    mean, scale = standard_scale(features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(features.shape[-1], SCSAMPLER_HIDDEN),
            nn.ReLU(),
            nn.Linear(SCSAMPLER_HIDDEN, 1),
        )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"]
    )
    generator = torch.Generator().manual_seed(seed)
    sampler = ScSampler(network, mean, scale)
    num_videos, num_frames = teacher.shape
    target = torch.from_numpy(np.array(teacher, np.float32))
    for _ in range(int(settings["epochs"])):
        for batch in torch.randperm(num_videos, generator=generator).split(
            int(settings["batch_size"])
        ):
            scores = sampler._score(torch.from_numpy(features[batch.numpy()]).float())
            i, j = torch.randint(
                num_frames, (2, len(batch), int(settings["pairs"])), generator=generator
            )
            sign = torch.sign(target[batch].gather(1, i) - target[batch].gather(1, j))
            gap = scores.gather(1, i) - scores.gather(1, j)
            loss = (
                F.relu(settings["margin"] - sign * gap) * sign.abs()
            ).sum() / sign.abs().sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    return sampler
