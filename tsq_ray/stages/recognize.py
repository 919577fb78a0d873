"""Label videos from their chosen frames.

Shapes: n frames shown to the recogniser, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tsq_ray.asking.questions import Asking, Question, ServerModel, jpegs_of
from tsq_ray.bundle.weights import Bundle, Classifier
from tsq_ray.config import Config, RecognizerConfig, ResourcesConfig
from tsq_ray.model.choosers import Candidates
from tsq_ray.networks.encoder import CPU, FrameEncoder
from tsq_ray.networks.inference import (
    DEFAULT_RESOURCES,
    Pictures,
    encode_pictures,
    num_inputs,
    prepare_for_inference,
)
from tsq_ray.rows import Answer, best_labels, selection_columns
from tsq_ray.stages.sample import Sampled, array_probabilities


class Recognize:
    """Label each video from its chosen frames.

    The logits of the frames, or of the clips that they form in time order, are averaged, then go
    through softmax (sigmoid for multi-label).
    """

    def __init__(
        self,
        model: Bundle | Classifier,
        device: torch.device = CPU,
        resources: ResourcesConfig = DEFAULT_RESOURCES,
    ) -> None:
        """`model`: a bundle, or its recogniser alone (`load_recognizer`)."""
        encoder = model.recognizer if isinstance(model, Bundle) else model.encoder
        assert isinstance(encoder, FrameEncoder)
        self.device = device
        self.recognizer = prepare_for_inference(encoder, self.device, resources)
        self.classes, self.task = model.classes, model.task

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
        return [Answer(item.row, item.error, fetched_bytes=item.fetched_bytes) for item in items]

    def _logits(self, pictures: Sequence[Pictures]) -> list[Tensor]:
        """Return the logits [n, C] of each video's n pictures or clips, all in one pass."""
        _, logits = encode_pictures(self.recognizer, pictures)
        assert logits is not None
        config = self.recognizer.config
        return list(logits.split([num_inputs(config, len(each.frames)) for each in pictures]))

    def _recognize(self, items: Sequence[Sampled]) -> list[tuple[np.ndarray, Tensor]]:
        """Return each video's chosen candidates, as places, and the logits of the candidates shown.

        Each pass of the network adds one candidate of every video that is still undecided.
        """
        found = self._logits([item.take(0, _candidates(item).first) for item in items])
        places: list[np.ndarray | None] = [None] * len(items)
        waiting = list(range(len(items)))
        while True:
            for number in waiting:
                answers = array_probabilities(found[number], self.task)
                places[number] = items[number].enough(answers)
            waiting = [number for number in waiting if places[number] is None]
            if not waiting:
                break
            ends = [len(found[number]) for number in waiting]
            added = self._logits(
                [items[n].take(end, end + 1) for n, end in zip(waiting, ends, strict=True)]
            )
            for number, logits in zip(waiting, added, strict=True):
                found[number] = torch.cat([found[number], logits])
        return [
            (place, logits)
            for place, logits in zip(places, found, strict=True)
            if place is not None
        ]

    def _answer(self, item: Sampled, places: np.ndarray, logits: Tensor) -> None:
        selection = _candidates(item).selection(places)
        item.row |= selection_columns(
            selection.slots, selection.selected_by, item.frame_index, item.row["frame_pts_s"]
        )
        if self.recognizer.config.clip_frames == 1:  # all clips are of chosen frames
            logits = logits[torch.from_numpy(places)]
        scores = array_probabilities(logits.mean(0), self.task)
        item.row |= {"scores": scores} | best_labels(scores, self.classes)


def question_of(item: Sampled, config: RecognizerConfig) -> Question:
    """Return the question to a server about a sampled video."""
    if item.candidates is None:
        return Question(
            item.row, item.frame_index, error=item.error, fetched_bytes=item.fetched_bytes
        )
    return Question(
        item.row,
        item.frame_index,
        jpegs_of(item.pictures.frames, config, item.row["width"], item.row["height"]),
        item.candidates.slots,
        item.candidates.selected_by,
        item.candidates.rounds,
        fetched_bytes=item.fetched_bytes,
    )


def recognizer_for(
    bundle: Bundle, config: Config, device: torch.device
) -> Callable[[Sequence[Sampled]], list[Answer]]:
    """Return the last step of scoring: the bundle's network on `device`, or its server.

    Raises ModelError if the server refuses the key.
    """
    if not isinstance(bundle.recognizer, ServerModel):
        return Recognize(bundle, device, config.resources)
    asking = Asking(replace(bundle.recognizer, config=config.recognizer))

    def ask(items: Sequence[Sampled]) -> list[Answer]:
        return asking([question_of(item, config.recognizer) for item in items])

    return ask


def _candidates(item: Sampled) -> Candidates:
    assert item.candidates is not None
    return item.candidates
