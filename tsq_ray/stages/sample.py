"""Choose the frames that the recogniser sees (paper, section 3.3).

Shapes: T frames (slots) per video, V videos, K chosen frames, C classes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tsq_ray.bundle.settings import NO_RECOGNIZER, NO_TEXTUAL_MODULE, NOT_TAUGHT
from tsq_ray.bundle.weights import Bundle
from tsq_ray.config import (
    LEARNED_MODES,
    TSQ_MODES,
    ResourcesConfig,
    SamplerConfig,
    Task,
    check_budget,
)
from tsq_ray.decode import DecodedVideo, Outcome
from tsq_ray.errors import Failure, ModelError
from tsq_ray.model import TSQNet, object_embeddings, saliency
from tsq_ray.model.choosers import Candidates, Chooser, View, chooser_for
from tsq_ray.model.task import probabilities
from tsq_ray.networks.encoder import CPU
from tsq_ray.networks.inference import DEFAULT_RESOURCES, Pictures
from tsq_ray.rows import RECOGNIZER, Row, source_columns
from tsq_ray.stages.encode import Encode, FrameFeatures, pictures_of


@dataclass
class Sampled:
    """A video ready for the recogniser: its candidates and the prediction columns known so far."""

    row: Row
    pictures: Pictures
    """One per candidate, in the same order; empty for a failed video."""
    frame_index: np.ndarray
    """int32 [T]."""
    candidates: Candidates | None = None
    """None for a failed video."""
    chooser: Chooser | None = None
    """What chose the candidates; None for a failed video."""
    error: Failure | None = None
    """Why the video failed."""
    fetched_bytes: int = 0
    """As in DecodedVideo."""

    def take(self, start: int, stop: int) -> Pictures:
        """Return the pictures of candidates start..stop-1."""
        return self.pictures._replace(frames=self.pictures.frames[start:stop])

    def enough(self, probabilities: np.ndarray) -> np.ndarray | None:
        """Return the places of the chosen candidates, as `Chooser.enough`."""
        assert self.chooser is not None
        assert self.candidates is not None
        return self.chooser.enough(self.candidates, probabilities)


_NO_PICTURES = Pictures(np.zeros((0, 1, 1, 3), np.uint8))


def _stacked(arrays: Sequence[np.ndarray | None]) -> Tensor:
    """Stack arrays of equal shape into a tensor with a new first dimension."""
    return torch.from_numpy(np.stack([array for array in arrays if array is not None]))


class Sample:
    """Choose the K frames of each decoded video by TSQNet (paper, section 3.3) or a baseline."""

    def __init__(
        self,
        bundle: Bundle,
        config: SamplerConfig,
        device: torch.device = CPU,
        resources: ResourcesConfig = DEFAULT_RESOURCES,
    ) -> None:
        check_sampler(bundle, config)
        self.config, self.task = config, bundle.task
        self.textual = (
            bundle.objects is not None and config.mode in TSQ_MODES and config.mode != "visual"
        )
        self.encode: Encode | None = None
        self.device = device
        if config.mode in LEARNED_MODES:
            objects, kept = (
                bundle.objects if self.textual else None,
                bundle.sampler.shape.top_objects,
            )
            self.encode = Encode(
                bundle.encoder, objects, device=self.device, num_objects=kept, resources=resources
            )
            self.network: TSQNet = bundle.sampler.to(self.device).eval()
            self.network.fold()
            self.vocabulary = (
                bundle.vocabulary.to(self.device)
                if self.textual and bundle.vocabulary is not None
                else None
            )

    def __call__(
        self, items: Sequence[tuple[str, Outcome]], budgets: Sequence[int | None] = ()
    ) -> list[Sampled]:
        """Return one `Sampled` per item, in order.

        `items`: (video id, its frames or its failure); the id seeds the random baseline. `budgets`:
        K of each item; None: the K of the settings.
        """
        started = time.perf_counter()
        live = [(name, video) for name, video in items if isinstance(video, DecodedVideo)]
        views = iter(self._views(live))
        share_ms = (time.perf_counter() - started) * 1000 / max(1, len(live))
        sampled = []
        for (_, video), budget in itertools.zip_longest(items, budgets):
            if not isinstance(video, DecodedVideo):
                sampled.append(Sampled({}, _NO_PICTURES, np.zeros(0, np.int32), error=video))
                continue
            view, chooser = next(views), chooser_for(self.config.with_budget(budget))
            candidates = chooser.candidates(view)
            row = source_columns(video)
            if view.visual is not None:
                row |= {"saliency_visual": view.visual, "saliency_textual": view.textual}
            row |= {"decode_ms": video.decode_ms, "sample_ms": share_ms}
            pictures = pictures_of(video, RECOGNIZER)
            frames = pictures.frames[video.slot_frame[candidates.slots]]
            pictures = pictures._replace(frames=frames)
            fetched = video.fetched_bytes
            sampled.append(
                Sampled(
                    row, pictures, video.frame_index, candidates, chooser, fetched_bytes=fetched
                )
            )
        return sampled

    def _views(self, items: Sequence[tuple[str, DecodedVideo]]) -> list[View]:
        """Return the chooser's view of each video, running the light networks if it needs them."""
        videos = [video for _, video in items]
        if self.encode is None or not videos:
            return [View(video.frame_index, name) for name, video in items]
        features = self.encode(videos)
        if self.config.mode == "maxconf-l":
            confidences = [
                array_probabilities(feature.visual_logits, self.task).max(axis=1)
                for feature in features
            ]
            return [
                View(video.frame_index, name, scores=scores)
                for (name, video), scores in zip(items, confidences, strict=True)
            ]
        by_visual, by_text = self._saliencies(features)
        return [
            View(video.frame_index, name, visual, textual, features=feature.visual)
            for (name, video), visual, textual, feature in zip(
                items, by_visual, by_text, features, strict=True
            )
        ]

    @torch.inference_mode()
    def _saliencies(
        self, features: Sequence[FrameFeatures]
    ) -> tuple[np.ndarray, Sequence[np.ndarray | None]]:
        """Return the saliencies of both modules, [V, T] each (equation 5).

        Without a textual module, its saliency is None for every video.
        """
        visual = _stacked([feature.visual for feature in features]).to(self.device)
        text = None
        if self.vocabulary is not None:
            ids = _stacked([feature.object_ids for feature in features]).long()
            probs = _stacked([feature.object_probs for feature in features])
            text = object_embeddings(ids.to(self.device), probs.to(self.device), self.vocabulary)
        output = self.network(visual, text)
        top = self.config.top_classes
        by_visual = saliency(output.attention_visual, output.logits_visual, self.task, top)
        if output.attention_textual is None or output.logits_textual is None:
            return by_visual.cpu().numpy(), [None] * len(features)
        by_text = saliency(output.attention_textual, output.logits_textual, self.task, top)
        return by_visual.cpu().numpy(), list(by_text.cpu().numpy())


def check_sampler(bundle: Bundle, config: SamplerConfig) -> None:
    """Check that the bundle can score with these settings.

    Raises ConfigError if K > T, ModelError if the bundle has no recogniser or does not support the
    mode.
    """
    if bundle.recognizer is None:
        raise ModelError(NO_RECOGNIZER)
    check_budget(config, bundle.decode.num_frames, bundle.task, bundle.recognizer.config)
    if config.mode == "textual" and bundle.objects is None:
        raise ModelError(NO_TEXTUAL_MODULE)
    if not bundle.is_taught and config.mode in LEARNED_MODES:
        raise ModelError(NOT_TAUGHT)


def array_probabilities(logits: np.ndarray | Tensor | None, task: Task) -> np.ndarray:
    """Return the probabilities of logits as an array."""
    assert logits is not None
    return probabilities(torch.as_tensor(logits).float(), task).numpy()
