"""Decode, encode, sample and recognise as plain callables on batches, without Ray.

Ray Data and Ray Serve wrap them.

Shapes: T frames (slots) per video, N distinct source frames, K chosen frames, C classes, D dims.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tsq_ray import storage
from tsq_ray.bundle.settings import NO_RECOGNIZER
from tsq_ray.bundle.weights import Bundle, Classifier, load_classifier
from tsq_ray.config import (
    TSQ_MODES,
    DecodeConfig,
    ModelConfig,
    ResourcesConfig,
    SamplerConfig,
    Task,
    check_budget,
)
from tsq_ray.decode import WHOLE, DecodedVideo, DecodePool, FrameSpec, VideoSource
from tsq_ray.errors import ModelError, StorageError, VideoError
from tsq_ray.model import (
    TSQNet,
    object_embeddings,
    saliency,
)
from tsq_ray.model.choosers import Candidates, View, chooser_for
from tsq_ray.model.selection import Selection
from tsq_ray.model.task import probabilities
from tsq_ray.networks.encoder import FrameEncoder, best_device, load_encoder, top_objects
from tsq_ray.networks.inference import (
    DEFAULT_RESOURCES,
    Pictures,
    encode_pictures,
    prepare_for_inference,
)
from tsq_ray.rows import OBJECTS, RECOGNIZER, VISUAL, Answer, picture_specs, source_columns
from tsq_ray.schema import TOP_LABELS, TOP_OBJECTS


def bundle_specs(bundle: Bundle, mode: str, native_size: bool = False) -> dict[str, FrameSpec]:
    """Return exactly the pictures that scoring with `mode` needs.

    `native_size`: as in `picture_specs`.
    """
    recognizer = bundle.recognizer.config if bundle.recognizer is not None else None
    return picture_specs(bundle.encoders, bundle.objects is not None, recognizer, mode, native_size)


def pictures_of(video: DecodedVideo, name: str) -> Pictures:
    """Return a video's pictures for network `name`, one per distinct source frame.

    If the video has whole frames, return those; the network's device resizes them.
    """
    return (
        Pictures(video.frames[WHOLE], True)
        if WHOLE in video.frames
        else Pictures(video.frames[name])
    )


def load_network(config: ModelConfig, with_head: bool) -> FrameEncoder:
    """Load the network of these settings; `weights` may also name an output of `tsq finetune`."""
    if (
        config.weights != "hub"
        and not config.weights.startswith(("package:", "random:"))
        and storage.is_folder(storage.normalize(config.weights))
    ):
        return load_classifier(config.weights).encoder
    return load_encoder(config, with_head)


def classifier_settings(uri: str) -> ModelConfig:
    """Return settings that load the classifier at `uri`, with its own model and preprocessing."""
    return load_classifier(uri).encoder.config.model_copy(
        update={"weights": storage.normalize(uri)}
    )


class Decode:
    """Decode videos in killable child processes; return failures instead of raising them."""

    def __init__(
        self, config: DecodeConfig, specs: Mapping[str, FrameSpec], num_processes: int = 1
    ) -> None:
        self.pool = DecodePool(config, specs, num_processes)

    def __call__(
        self, sources: Sequence[VideoSource]
    ) -> list[DecodedVideo | VideoError | StorageError]:
        """Return frames or failures in the order of `sources`."""
        return self.pool.decode(sources)

    def close(self) -> None:
        """End the child processes."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class FrameFeatures:
    """Outputs of the light encoders for a video's T frames.

    `object_*` are None without a textual module.
    """

    visual: np.ndarray
    """float32 [T, D]."""
    object_ids: np.ndarray | None
    """int16 [T, n]."""
    object_probs: np.ndarray | None
    """float32 [T, n]."""
    visual_logits: np.ndarray | None = None
    """float32 [T, C] of the frame head, if the visual encoder has one."""
    recognizer_logits: np.ndarray | None = None
    """float32 [T, C], if a recogniser was given."""


class Encode:
    """Encode frames, keeping the `num_objects` most probable objects per frame.

    Each distinct source frame is encoded once.
    """

    def __init__(
        self,
        visual: FrameEncoder,
        objects: FrameEncoder | None,
        recognizer: FrameEncoder | None = None,
        device: torch.device | None = None,
        num_objects: int = TOP_OBJECTS,
        resources: ResourcesConfig = DEFAULT_RESOURCES,
    ) -> None:
        self.device, self.num_objects = device or best_device(), num_objects
        self.visual = prepare_for_inference(visual, self.device, resources)
        self.objects = (
            prepare_for_inference(objects, self.device, resources) if objects is not None else None
        )
        self.recognizer = (
            prepare_for_inference(recognizer, self.device, resources)
            if recognizer is not None
            else None
        )

    def __call__(self, videos: Sequence[DecodedVideo]) -> list[FrameFeatures]:
        """Return features in the order of `videos`; each network encodes all frames together."""
        if not videos:
            return []
        visual, visual_logits = self._run(self.visual, videos, VISUAL)
        ids: list[Any] = [None] * len(videos)
        probs: list[Any] = [None] * len(videos)
        logits: list[Any] = [None] * len(videos)
        if self.objects is not None:
            _, object_logits = self._run(self.objects, videos, OBJECTS)
            assert object_logits is not None
            for number, scores in enumerate(object_logits):
                top_ids, top_probs = top_objects(scores, self.num_objects)
                ids[number], probs[number] = top_ids.numpy().astype(np.int16), top_probs.numpy()
        if self.recognizer is not None:
            _, found = self._run(self.recognizer, videos, RECOGNIZER)
            assert found is not None
            logits = [scores.numpy() for scores in found]
        frame_logits = (
            [scores.numpy() for scores in visual_logits]
            if visual_logits is not None
            else [None] * len(videos)
        )
        return [
            FrameFeatures(feature.numpy(), *rest)
            for feature, *rest in zip(visual, ids, probs, frame_logits, logits, strict=True)
        ]

    def _run(
        self, encoder: FrameEncoder, videos: Sequence[DecodedVideo], name: str
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        pictures = [pictures_of(video, name) for video in videos]
        features, logits = encode_pictures(encoder, pictures)
        counts = [len(part.frames) for part in pictures]
        slots = [torch.from_numpy(video.slot_frame.astype(np.int64)) for video in videos]

        def per_slot(values: Tensor) -> list[Tensor]:
            return [part[slot] for part, slot in zip(values.split(counts), slots, strict=True)]

        return per_slot(features), per_slot(logits) if logits is not None else None


@dataclass
class Sampled:
    """A video ready for the recogniser: its candidates and the prediction columns known by then."""

    row: dict[str, Any]
    pictures: Pictures
    """One per candidate, in the same order; empty for a failed video."""
    frame_index: np.ndarray
    """int32 [T]."""
    candidates: Candidates | None = None
    """None for a failed video."""
    error: VideoError | StorageError | None = None
    """Why the video failed."""

    def take(self, start: int, stop: int) -> Pictures:
        """Return the pictures of candidates start..stop-1."""
        return self.pictures._replace(frames=self.pictures.frames[start:stop])


_NOTHING = Pictures(np.zeros((0, 1, 1, 3), np.uint8))


def _stacked(arrays: Sequence[np.ndarray | None]) -> Tensor:
    """Stack arrays of equal shape into a tensor with a new first dimension."""
    return torch.from_numpy(np.stack([array for array in arrays if array is not None]))


class Sample:
    """Choose the K frames of each decoded video by TSQNet (paper, section 3.3) or a baseline."""

    def __init__(
        self,
        bundle: Bundle,
        config: SamplerConfig,
        device: torch.device | None = None,
        resources: ResourcesConfig = DEFAULT_RESOURCES,
    ) -> None:
        check_sampler(bundle, config)
        self.config, self.task, self.chooser = config, bundle.task, chooser_for(config)
        self.textual = (
            bundle.objects is not None and config.mode in TSQ_MODES and config.mode != "visual"
        )
        self.encode: Encode | None = None
        self.device = device or best_device()
        if config.mode in (*TSQ_MODES, "maxconf-l"):
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
        self, items: Sequence[tuple[str, DecodedVideo | VideoError | StorageError]]
    ) -> list[Sampled]:
        """Return one `Sampled` per item, in order.

        `items`: (video id, its frames or its failure); the id seeds the random baseline.
        """
        started = time.perf_counter()
        live = [(name, video) for name, video in items if isinstance(video, DecodedVideo)]
        found = [(view, self.chooser.candidates(view)) for view in self._views(live)]
        share_ms = (time.perf_counter() - started) * 1000 / max(1, len(live))
        chosen = iter(found)
        sampled = []
        for _, video in items:
            if not isinstance(video, DecodedVideo):
                sampled.append(Sampled({}, _NOTHING, np.zeros(0, np.int32), error=video))
                continue
            view, candidates = next(chosen)
            row = source_columns(video)
            if view.visual is not None:
                row |= {"saliency_visual": view.visual, "saliency_textual": view.textual}
            row |= {"decode_ms": video.decode_ms, "sample_ms": share_ms}
            pictures = pictures_of(video, RECOGNIZER)
            frames = pictures.frames[video.slot_frame[candidates.slots]]
            pictures = pictures._replace(frames=frames)
            sampled.append(Sampled(row, pictures, video.frame_index, candidates))
        return sampled

    def _views(self, items: Sequence[tuple[str, DecodedVideo]]) -> list[View]:
        """Return the chooser's view of each video, running the light networks if it needs them."""
        videos = [video for _, video in items]
        if self.encode is None or not videos:
            return [View(video.frame_index, name) for name, video in items]
        features = self.encode(videos)
        if self.config.mode == "maxconf-l":
            confidences = [
                _probabilities(feature.visual_logits, self.task).max(axis=1) for feature in features
            ]
            return [
                View(video.frame_index, name, scores=scores)
                for (name, video), scores in zip(items, confidences, strict=True)
            ]
        by_visual, by_text = self._saliencies(features)
        return [
            View(video.frame_index, name, visual, textual)
            for (name, video), visual, textual in zip(items, by_visual, by_text, strict=True)
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
    check_budget(config, bundle.decode.num_frames, bundle.task)
    if bundle.recognizer is None:
        raise ModelError(NO_RECOGNIZER)
    if config.mode == "textual" and bundle.objects is None:
        raise ModelError(
            "sampler.mode 'textual': the bundle was trained with train.modules = 'visual'; "
            "use 'visual' or a baseline"
        )


def selection_columns(
    selection: Selection, frame_index: np.ndarray, frame_pts_s: np.ndarray
) -> dict[str, Any]:
    """Return the prediction columns that describe a selection."""
    return {
        "selected_slot": selection.slots,
        "selected_index": frame_index[selection.slots],
        "selected_pts_s": frame_pts_s[selection.slots],
        "selected_by": selection.selected_by,
    }


def _probabilities(logits: np.ndarray | Tensor | None, task: Task) -> np.ndarray:
    assert logits is not None
    return probabilities(torch.as_tensor(logits).float(), task).numpy()


class Recognize:
    """Label each video from its chosen frames.

    The frames' logits are averaged, then pass through softmax (sigmoid for multi-label).
    """

    def __init__(
        self,
        model: Bundle | Classifier,
        config: SamplerConfig,
        device: torch.device | None = None,
        resources: ResourcesConfig = DEFAULT_RESOURCES,
    ) -> None:
        """`model`: a bundle, or its recogniser alone (`load_recognizer`)."""
        encoder = model.recognizer if isinstance(model, Bundle) else model.encoder
        assert encoder is not None
        self.device = device or best_device()
        self.recognizer = prepare_for_inference(encoder, self.device, resources)
        self.classes, self.task, self.chooser = model.classes, model.task, chooser_for(config)

    def __call__(self, items: Sequence[Sampled]) -> list[Answer]:
        """Return answers in the order of `items`; failures pass through."""
        started = time.perf_counter()
        live = [item for item in items if item.candidates is not None]
        if live:
            for item, (places, logits) in zip(live, self._recognize(live), strict=True):
                self._answer(item, places, logits)
            share_ms = (time.perf_counter() - started) * 1000 / len(live)
            for item in live:
                item.row["recognize_ms"] = share_ms
        return [Answer(item.row, item.error) for item in items]

    def _logits(self, pictures: Sequence[Pictures]) -> list[Tensor]:
        """Return the logits [n, C] of each video's n pictures, all in one pass of the network."""
        _, logits = encode_pictures(self.recognizer, pictures)
        assert logits is not None
        return list(logits.split([len(each.frames) for each in pictures]))

    def _recognize(self, items: Sequence[Sampled]) -> list[tuple[np.ndarray, Tensor]]:
        """Return each video's chosen candidates, as places, and the logits of the candidates shown.

        Each pass of the network adds one candidate of every video that is still undecided.
        """
        found = self._logits([item.take(0, _candidates(item).first) for item in items])
        places: list[np.ndarray | None] = [None] * len(items)
        waiting = list(range(len(items)))
        while True:
            for number in waiting:
                answers = _probabilities(found[number], self.task)
                places[number] = self.chooser.enough(_candidates(items[number]), answers)
            waiting = [number for number in waiting if places[number] is None]
            if not waiting:
                break
            ends = [len(found[number]) for number in waiting]
            more = self._logits(
                [items[n].take(end, end + 1) for n, end in zip(waiting, ends, strict=True)]
            )
            for number, logits in zip(waiting, more, strict=True):
                found[number] = torch.cat([found[number], logits])
        return [
            (place, logits)
            for place, logits in zip(places, found, strict=True)
            if place is not None
        ]

    def _answer(self, item: Sampled, places: np.ndarray, logits: Tensor) -> None:
        selection = _candidates(item).selection(places)
        item.row |= selection_columns(selection, item.frame_index, item.row["frame_pts_s"])
        scores = _probabilities(logits[torch.from_numpy(places)].mean(0), self.task)
        best = np.argsort(-scores, kind="stable")[:TOP_LABELS]
        item.row |= {
            "scores": scores,
            "top_labels": [self.classes[number] for number in best],
            "top_scores": scores[best],
        }


def _candidates(item: Sampled) -> Candidates:
    assert item.candidates is not None
    return item.candidates
