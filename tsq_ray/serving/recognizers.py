"""What a recogniser replica works with: a network on its device, or a server."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tsq_ray.asking.questions import Asker, Question, ServerModel
from tsq_ray.config import Config
from tsq_ray.rows import Answer
from tsq_ray.runtime.nodes import Layout
from tsq_ray.serving import warmup
from tsq_ray.serving.microbatching import Microbatches

if TYPE_CHECKING:  # torch: only in the replicas that need it
    from tsq_ray.stages import Sampled

_JPEG_QUALITY = 90


class Recognizing(Protocol):
    """What the deployment needs of either."""

    classes: Sequence[str]

    async def answer(self, handed: Any) -> Answer:
        """Return the answer for what the sampler handed on about one video."""
        ...

    def jpegs(self, handed: Any, columns: dict[str, Any]) -> list[str]:
        """Return the chosen frames as the recogniser saw them, as base64 JPEG."""
        ...

    async def check(self) -> None:
        """Process a made-up video, if that costs nothing. Raises whatever is wrong."""
        ...


class NetworkRecognizer:
    """A network, whose batches wait for each other."""

    def __init__(self, model: str, config: Config, placed: Layout) -> None:
        import torch

        from tsq_ray.bundle.weights import load_recognizer
        from tsq_ray.stages import Recognize

        device = torch.device("cuda" if placed["recognizer"].gpus else "cpu")
        classifier = load_recognizer(model)
        self.classes: Sequence[str] = classifier.classes
        self._network, self._budget = classifier.encoder.config, config.sampler.most_frames
        recognize = Recognize(classifier, device, config.resources)
        recognize([self._made_up()])
        self._microbatches = microbatches(recognize, config, placed)

    async def answer(self, handed: Sampled) -> Answer:
        """Recognise the chosen frames of one video."""
        return await self._microbatches(handed)

    def jpegs(self, handed: Sampled, columns: dict[str, Any]) -> list[str]:
        """Return the chosen frames in the shape of the video."""
        assert handed.candidates is not None
        places = {slot: place for place, slot in enumerate(handed.candidates.slots.tolist())}
        size = (columns["width"], columns["height"]) if self._network.resize == "squash" else None
        chosen = [places[int(slot)] for slot in columns["selected_slot"]]
        return [_jpeg(handed.pictures.frames[place], size) for place in chosen]

    async def check(self) -> None:
        """Process a made-up video."""
        await self._microbatches(self._made_up())

    def _made_up(self) -> Sampled:
        return warmup.sampled_video(self._network.size, self._budget)


class ServerRecognizer:
    """A server, which is asked about as many videos at a time as it may be."""

    def __init__(self, model: ServerModel) -> None:
        self.classes: Sequence[str] = model.classes
        self._asker = Asker(model)

    async def answer(self, handed: Question) -> Answer:
        """Ask about one video; a caller that gives up ends the request."""
        return await self._asker.answer(handed)

    def jpegs(self, handed: Question, columns: dict[str, Any]) -> list[str]:
        """Return the chosen frames as they were sent."""
        sent = dict(zip(handed.slots.tolist(), handed.jpegs, strict=True))
        return [base64.b64encode(sent[int(slot)]).decode() for slot in columns["selected_slot"]]

    async def check(self) -> None:
        """Raise ModelError if the server refuses the key; asks about no video, to cost nothing."""
        await self._asker.client.check()


def microbatches(
    work: Callable[[list[Any]], list[Any]], config: Config, placed: Layout
) -> Microbatches[Any, Any]:
    """Return `work` in batches as the settings and the layout say."""
    settings = config.serve
    threads = config.resources.threads or min(placed.threads, _node_cpus())
    return Microbatches(
        work,
        settings.batch_size,
        settings.batch_wait_s,
        threads,
        placed.on_gpu,
        config.resources.compile,
    )


def _node_cpus() -> int:
    import ray

    # in a container os.cpu_count() may be too high; Ray knows the actual number
    here, there = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here]
    return max(1, min([there, *(count for count in cpus if count)]))


def _jpeg(picture: np.ndarray, size: tuple[int, int] | None) -> str:
    """Return a picture, uint8 [h, w, 3], as base64 JPEG, in the proportions of `size`."""
    from PIL import Image

    image = Image.fromarray(picture)
    if size is not None:
        width, height = size
        scale = min(image.size) / min(width, height)
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
