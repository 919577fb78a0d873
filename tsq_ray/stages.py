"""Decode, encode, sample, recognize as plain callables on batches: no Ray here. Ray Data and Ray Serve wrap these.

Legend: T frames (slots) a video, N distinct source frames, K chosen, C classes, D dims.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

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
    TSQMode,
    check_budget,
)
from tsq_ray.decode import WHOLE, DecodedVideo, DecodePool, FrameSpec, VideoSource
from tsq_ray.errors import ModelError, StorageError, VideoError
from tsq_ray.model import (
    TSQNet,
    baselines,
    by_importance,
    frames_until_sure,
    object_embeddings,
    saliency,
    select_frames,
)
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
    """The pictures that scoring with `mode` needs, and no others; `native_size` as in `picture_specs`."""
    recognizer = bundle.recognizer.config if bundle.recognizer is not None else None
    return picture_specs(bundle.encoders, bundle.objects is not None, recognizer, mode, native_size)


def pictures_of(video: DecodedVideo, name: str) -> Pictures:
    """The pictures `name` of a video's N distinct frames, or the whole frames to make them of."""
    return (
        Pictures(video.frames[WHOLE], True)
        if WHOLE in video.frames
        else Pictures(video.frames[name])
    )


def load_network(config: ModelConfig, with_head: bool) -> FrameEncoder:
    """A network by its settings; `weights` may also name what `tsq finetune` wrote."""
    if (
        config.weights != "hub"
        and not config.weights.startswith(("package:", "random:"))
        and storage.is_folder(storage.normalize(config.weights))
    ):
        return load_classifier(config.weights).encoder
    return load_encoder(config, with_head)


def classifier_settings(uri: str) -> ModelConfig:
    """Settings that load the classifier at `uri` as a network: its own model and preprocessing, its weights."""
    return load_classifier(uri).encoder.config.model_copy(
        update={"weights": storage.normalize(uri)}
    )


class Decode:
    """Videos -> frames, each in a killable child; a video's failure is a value, not an exception."""

    def __init__(
        self, config: DecodeConfig, specs: Mapping[str, FrameSpec], num_processes: int = 1
    ) -> None:
        self.pool = DecodePool(config, specs, num_processes)

    def __call__(
        self, sources: Sequence[VideoSource]
    ) -> list[DecodedVideo | VideoError | StorageError]:
        """In the order of `sources`."""
        return self.pool.decode(sources)

    def close(self) -> None:
        """End the children."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class FrameFeatures:
    """What the cheap encoders say of a video's T frames; `object_*` are None without a textual module."""

    visual: np.ndarray
    """float32 [T, D]."""
    object_ids: np.ndarray | None
    """int16 [T, n]."""
    object_probs: np.ndarray | None
    """float32 [T, n]."""
    visual_logits: np.ndarray | None = None
    """float32 [T, C] of the frame head, where the visual encoder has one."""
    recognizer_logits: np.ndarray | None = None
    """float32 [T, C], where a recogniser was given."""


class Encode:
    """Frames -> FrameFeatures, with the `num_objects` most probable objects. Each distinct source frame is encoded once."""

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
        """In the order of `videos`; frames of all of them go through each network together."""
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
    """A video on its way to the recogniser: the prediction's columns so far, and the pictures to look at."""

    row: dict[str, Any]
    pictures: Pictures
    """n of them: the chosen frames; every frame of the T for `maxconf`; none of a failed video."""
    frame_index: np.ndarray
    """int32 [T]."""
    choose: bool = False
    """Whether the recogniser has yet to choose (maxconf)."""
    order: np.ndarray | None = None
    """int [n]: with an adaptive budget, the places in `pictures` in which the recogniser looks at them, until it is sure."""
    error: VideoError | StorageError | None = None
    """Why there are no pictures."""

    def next_picture(self, number: int) -> Pictures:
        """The picture that comes at this place of `order`."""
        assert self.order is not None
        return _take(self.pictures, self.order[number : number + 1])


_NOTHING = Pictures(np.zeros((0, 1, 1, 3), np.uint8))


def _stacked(arrays: Sequence[np.ndarray | None]) -> Tensor:
    """Arrays of one shape as a tensor with one more dimension."""
    return torch.from_numpy(np.stack([array for array in arrays if array is not None]))


def _take(pictures: Pictures, places: np.ndarray) -> Pictures:
    return pictures._replace(frames=pictures.frames[places])


class Sample:
    """Decoded videos -> the K frames of each (paper, section 3.3), or those of a baseline."""

    def __init__(
        self,
        bundle: Bundle,
        config: SamplerConfig,
        device: torch.device | None = None,
        resources: ResourcesConfig = DEFAULT_RESOURCES,
    ) -> None:
        check_sampler(bundle, config)
        self.config, self.task = config, bundle.task
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
        """(video id, its frames or its failure) -> in the order of `items`; the id seeds the random baseline."""
        started = time.perf_counter()
        videos = [video for _, video in items if isinstance(video, DecodedVideo)]
        chosen = iter(
            self._choose([name for name, video in items if isinstance(video, DecodedVideo)], videos)
        )
        share_ms = (time.perf_counter() - started) * 1000 / max(1, len(videos))
        sampled = []
        for _, video in items:
            if not isinstance(video, DecodedVideo):
                sampled.append(Sampled({}, _NOTHING, np.zeros(0, np.int32), error=video))
                continue
            selection, curves = next(chosen)
            row = (
                source_columns(video)
                | curves
                | {"decode_ms": video.decode_ms, "sample_ms": share_ms}
            )
            pictures = pictures_of(video, RECOGNIZER)
            if selection is None:
                sampled.append(
                    Sampled(row, _take(pictures, video.slot_frame), video.frame_index, choose=True)
                )
            else:
                row |= selection_columns(selection, video.frame_index, video.frame_pts_s)
                order = (
                    self._order(curves, video, selection)
                    if self.config.budget == "adaptive"
                    else None
                )
                sampled.append(
                    Sampled(
                        row,
                        _take(pictures, video.slot_frame[selection.slots]),
                        video.frame_index,
                        order=order,
                    )
                )
        return sampled

    def _select(self, curves: Mapping[str, Any], video: DecodedVideo, budget: int) -> Selection:
        visual, textual, config = curves["saliency_visual"], curves["saliency_textual"], self.config
        mode = cast(TSQMode, config.mode)
        return select_frames(visual, textual, video.frame_index, budget, config.lambda_visual, mode)

    def _order(
        self, curves: Mapping[str, Any], video: DecodedVideo, selection: Selection
    ) -> np.ndarray:
        ranked = by_importance(
            lambda budget: self._select(curves, video, budget).slots, self.config.most_frames
        )
        return np.searchsorted(selection.slots, ranked)

    def _choose(
        self, names: Sequence[str], videos: Sequence[DecodedVideo]
    ) -> list[tuple[Selection | None, dict[str, Any]]]:
        config = self.config
        if config.mode == "uniform":
            return [
                (baselines.uniform(video.frame_index, config.most_frames), {}) for video in videos
            ]
        if config.mode == "random":
            return [
                (baselines.random(video.frame_index, config.most_frames, config.seed, name), {})
                for name, video in zip(names, videos, strict=True)
            ]
        if config.mode == "maxconf" or not videos:
            return [(None, {}) for _ in videos]
        assert self.encode is not None
        features = self.encode(videos)
        if config.mode == "maxconf-l":
            return [
                (
                    baselines.maxconf(
                        _probabilities(feature.visual_logits, self.task),
                        video.frame_index,
                        config.most_frames,
                        "maxconf-l",
                    ),
                    {},
                )
                for feature, video in zip(features, videos, strict=True)
            ]
        return self._query(features, videos)

    @torch.inference_mode()
    def _query(
        self, features: Sequence[FrameFeatures], videos: Sequence[DecodedVideo]
    ) -> list[tuple[Selection | None, dict[str, Any]]]:
        visual = torch.from_numpy(np.stack([feature.visual for feature in features])).to(
            self.device
        )
        text = None
        if self.vocabulary is not None:
            ids = _stacked([feature.object_ids for feature in features]).long()
            probs = _stacked([feature.object_probs for feature in features])
            text = object_embeddings(ids.to(self.device), probs.to(self.device), self.vocabulary)
        output = self.network(visual, text)
        top = self.config.top_classes
        by_visual = (
            saliency(output.attention_visual, output.logits_visual, self.task, top).cpu().numpy()
        )
        by_text = None
        if output.attention_textual is not None and output.logits_textual is not None:
            by_text = (
                saliency(output.attention_textual, output.logits_textual, self.task, top)
                .cpu()
                .numpy()
            )
        chosen: list[tuple[Selection | None, dict[str, Any]]] = []
        for number, video in enumerate(videos):
            curves = {
                "saliency_visual": by_visual[number],
                "saliency_textual": by_text[number] if by_text is not None else None,
            }
            chosen.append((self._select(curves, video, self.config.most_frames), curves))
        return chosen


def check_sampler(bundle: Bundle, config: SamplerConfig) -> None:
    """Refuse K > T (ConfigError), a bundle without a recogniser and a mode that it cannot serve (ModelError)."""
    check_budget(config, bundle.decode.num_frames, bundle.task)
    if bundle.recognizer is None:
        raise ModelError(NO_RECOGNIZER)
    if config.mode == "textual" and bundle.objects is None:
        raise ModelError(
            "sampler.mode 'textual': the bundle was trained with train.modules = 'visual'; use 'visual' or a baseline"
        )


def selection_columns(
    selection: Selection, frame_index: np.ndarray, frame_pts_s: np.ndarray
) -> dict[str, Any]:
    """The prediction columns of a choice."""
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
    """The chosen frames -> one answer a video: their logits averaged, then softmax (sigmoid for multi-label)."""

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
        self.classes, self.task, self.config = model.classes, model.task, config
        self._first = math.ceil(config.margin)

    def __call__(self, items: Sequence[Sampled]) -> list[Answer]:
        """In the order of `items`; failures pass through."""
        started = time.perf_counter()
        live = [item for item in items if len(item.pictures.frames)]
        if live:
            for item, frame_logits in zip(live, self._recognize_until_confident(live), strict=True):
                self._answer(item, frame_logits)
            share_ms = (time.perf_counter() - started) * 1000 / len(live)
            for item in live:
                item.row["recognize_ms"] = share_ms
        return [Answer(item.row, item.error) for item in items]

    def _logits(self, pictures: Sequence[Pictures]) -> list[Tensor]:
        """n pictures of each of several videos -> [n, C] of each; they go through the network together."""
        _, logits = encode_pictures(self.recognizer, pictures)
        assert logits is not None
        return list(logits.split([len(each.frames) for each in pictures]))

    def _recognize_until_confident(self, items: Sequence[Sampled]) -> list[Tensor]:
        """The logits of every picture; with an adaptive budget of those it took, and the other pictures leave the item's row.

        No margin is reached by fewer frames than itself, so that many go first, then one more of each video that is still open.
        """
        found = self._logits(
            [
                item.pictures
                if item.order is None
                else _take(item.pictures, item.order[: self._first])
                for item in items
            ]
        )
        open_items = [number for number, item in enumerate(items) if item.order is not None]
        while open_items := [
            number for number in open_items if self._is_open(items[number], found[number])
        ]:
            more = self._logits(
                [items[number].next_picture(len(found[number])) for number in open_items]
            )
            for number, logits in zip(open_items, more, strict=True):
                found[number] = torch.cat([found[number], logits])
        for number, item in enumerate(items):
            if item.order is not None:
                keep = np.sort(item.order[: len(found[number])])
                for name in ("selected_slot", "selected_index", "selected_pts_s"):
                    item.row[name] = item.row[name][keep]
                item.row["selected_by"] = [item.row["selected_by"][place] for place in keep]
        return found

    def _is_open(self, item: Sampled, logits: Tensor) -> bool:
        assert item.order is not None
        return (
            len(logits) < len(item.order)
            and frames_until_sure(_probabilities(logits, self.task), self.config.margin) is None
        )

    def _answer(self, item: Sampled, frame_logits: Tensor) -> None:
        if item.choose:
            selection = baselines.maxconf(
                _probabilities(frame_logits, self.task),
                item.frame_index,
                self.config.most_frames,
                "maxconf",
            )
            item.row |= selection_columns(selection, item.frame_index, item.row["frame_pts_s"])
            frame_logits = frame_logits[torch.from_numpy(selection.slots.astype(np.int64))]
        scores = _probabilities(frame_logits.mean(0), self.task)
        best = np.argsort(-scores, kind="stable")[:TOP_LABELS]
        item.row |= {
            "scores": scores,
            "top_labels": [self.classes[number] for number in best],
            "top_scores": scores[best],
        }
