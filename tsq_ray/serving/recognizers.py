"""The backends of a recogniser replica: a network on its device, or a server."""

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


class RecognizerBackend(Protocol):
    """What the deployment needs from either backend."""

    classes: Sequence[str]

    async def answer(self, sampled: Any) -> Answer:
        """Return the answer for the sampler's result on one video."""
        ...

    def jpegs(self, sampled: Any, columns: dict[str, Any]) -> list[str]:
        """Return the chosen frames as the recogniser saw them, as base64 JPEG."""
        ...

    async def check(self) -> None:
        """Process a made-up video, if that is free. Raises what goes wrong."""
        ...


class NetworkRecognizer:
    """A network, which processes videos in batches."""

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

    async def answer(self, sampled: Sampled) -> Answer:
        """Recognise the chosen frames of one video."""
        return await self._microbatches(sampled)

    def jpegs(self, sampled: Sampled, columns: dict[str, Any]) -> list[str]:
        """Return the chosen frames in the video's aspect ratio, as base64 JPEG."""
        assert sampled.candidates is not None
        places = {slot: place for place, slot in enumerate(sampled.candidates.slots.tolist())}
        size = (columns["width"], columns["height"]) if self._network.resize == "squash" else None
        chosen = [places[int(slot)] for slot in columns["selected_slot"]]
        return [_jpeg(sampled.pictures.frames[place], size) for place in chosen]

    async def check(self) -> None:
        """Process a made-up video."""
        await self._microbatches(self._made_up())

    def _made_up(self) -> Sampled:
        return warmup.sampled_video(self._network.size, self._budget)


class ServerRecognizer:
    """A server, asked about a limited number of videos at a time."""

    def __init__(self, model: ServerModel) -> None:
        self.classes: Sequence[str] = model.classes
        self._asker = Asker(model)

    async def answer(self, question: Question) -> Answer:
        """Ask about one video; if the caller gives up, the request is cancelled."""
        return await self._asker.answer(question)

    def jpegs(self, question: Question, columns: dict[str, Any]) -> list[str]:
        """Return the chosen frames as they were sent, as base64 JPEG."""
        sent = dict(zip(question.slots.tolist(), question.jpegs, strict=True))
        return [base64.b64encode(sent[int(slot)]).decode() for slot in columns["selected_slot"]]

    async def check(self) -> None:
        """Raise ModelError if the server refuses the key. Sends no video, so it costs nothing."""
        await self._asker.client.check()


def microbatches(
    work: Callable[[list[Any]], list[Any]], config: Config, placed: Layout
) -> Microbatches[Any, Any]:
    """Return `work` in batches, according to the settings and the layout."""
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
    node_id, limit = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    nodes = [node for node in ray.nodes() if node["NodeID"] == node_id]
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    return max(1, min([limit, *(count for count in cpus if count)]))


def _jpeg(picture: np.ndarray, size: tuple[int, int] | None) -> str:
    """Return a picture, uint8 [h, w, 3], as base64 JPEG, in the aspect ratio of `size`."""
    from PIL import Image

    image = Image.fromarray(picture)
    if size is not None:
        width, height = size
        scale = min(image.size) / min(width, height)
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
