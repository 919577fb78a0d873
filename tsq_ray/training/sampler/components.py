"""The components of a bundle besides TSQNet: networks, name embeddings, initial queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tsq_ray import storage
from tsq_ray.asking.questions import ServerModel
from tsq_ray.bundle.settings import check_class_order, read_server
from tsq_ray.bundle.weights import Classifier, load_classifier, load_network
from tsq_ray.config import Config, check_budget
from tsq_ray.errors import ModelError
from tsq_ray.model import TSQShape
from tsq_ray.networks.encoder import FrameEncoder, object_names
from tsq_ray.networks.text import text_encoder
from tsq_ray.rows import OBJECTS, RECOGNIZER, VISUAL


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings of object and class names, of dimension Dt (paper, section 3.2)."""

    vocabulary: Tensor
    """[1000, Dt], embeddings of the object names."""
    classes: Tensor | None
    """[C, Dt], embeddings of the class names; None for a random start."""
    sha256: str
    warnings: list[str]

    @classmethod
    def make(cls, config: Config, classes: list[str]) -> Embeddings:
        """Embed the object names and, if they initialise the queries, the class names.

        Raises ModelError if the word vectors know no object name, or lack one of these class names.
        """
        encoder = text_encoder(config.encoders.text)
        weights = storage.redact(config.encoders.text.weights)
        objects = object_names()
        vocabulary = encoder.embed(objects)
        unknown = _unknown(objects, vocabulary)
        if len(unknown) == len(objects):
            raise ModelError(
                f"encoders.text.weights {weights!r}: has no word of any of the {len(objects)} "
                "object names; use English vectors"
            )
        start = encoder.embed(classes) if config.train.init_textual == "text" else None
        unknown_classes = _unknown(classes, start) if start is not None else []
        if unknown_classes:
            raise ModelError(
                f"encoders.text.weights {weights!r}: has no word of {len(unknown_classes)} of the "
                f"{len(classes)} class names (first: {unknown_classes[0]!r}); rename them, use "
                "other vectors, or set train.init_textual=random"
            )
        warnings = []
        if unknown:
            warnings.append(
                f"{len(unknown)} object names have no word in {weights} and are ignored "
                f"(first: {unknown[0]!r})"
            )
        return cls(vocabulary, start, encoder.state_hash(), warnings)


def _unknown(names: list[str], vectors: Tensor) -> list[str]:
    """Return the names without a vector."""
    return [name for name, known in zip(names, vectors.any(1).tolist(), strict=True) if not known]


@dataclasses.dataclass(frozen=True)
class Components:
    """The components of a bundle other than TSQNet."""

    encoder: FrameEncoder
    """Has no head if one must be fitted on the features."""
    objects: FrameEncoder | None
    text: Embeddings | None
    recognizer: FrameEncoder | ServerModel | None
    shape: TSQShape
    taught: list[int] | None = None
    """The teacher's classes that have a query; None: all classes have one."""

    def of_classes(self, taught: list[int]) -> Components:
        """Return the components of a sampler that has queries only for these teacher classes."""
        text = self.text
        if text is not None and text.classes is not None:
            text = dataclasses.replace(text, classes=text.classes[taught])
        shape = dataclasses.replace(self.shape, num_classes=len(taught))
        return dataclasses.replace(self, text=text, shape=shape, taught=taught)

    def untaught(self) -> Components:
        """Return the components of a sampler that nothing can be taught: one query, of no class."""
        shape = dataclasses.replace(self.shape, num_classes=1)
        return dataclasses.replace(self, shape=shape, taught=[])

    @classmethod
    def load(
        cls,
        config: Config,
        run: Mapping[str, Any],
        classes: list[str],
        encoder: str | None,
        recognizer: str | None,
    ) -> Components:
        """Load the components; raises ModelError if one does not fit the features.

        Args:
            config: the settings.
            run: `_run.json` of the features.
            classes: the class names of the features.
            encoder: finetune's output, whose head is used too.
            recognizer: finetune's output.
        """
        frame_encoder = _frame_encoder(config, run, classes, encoder)
        network = _recognizer(config, run, classes, recognizer) if recognizer else None
        text = objects = None
        if config.train.modules == "both":
            text = Embeddings.make(config, classes)
            objects = load_network(config.encoders.objects, with_head=True)
            _check_same_weights(objects.state_hash(), run["weights"][OBJECTS], "encoders.objects")
        shape = _shape(config, len(classes), frame_encoder.dim, text)
        return cls(frame_encoder, objects, text, network, shape)


def _frame_encoder(
    config: Config, run: Mapping[str, Any], classes: list[str], encoder: str | None
) -> FrameEncoder:
    """Load the encoder of the features, with the frame head of finetune or without a head."""
    if encoder is not None and config.train.target == "labels":
        network = _classifier(encoder, "--encoder", classes, config.train.task).encoder
        _check_same_weights(network.backbone_hash(), run["weights"][VISUAL], "--encoder")
        return network
    network = load_network(config.encoders.visual, with_head=False)
    _check_same_weights(network.backbone_hash(), run["weights"][VISUAL], "encoders.visual")
    network.head = None
    return network


def _recognizer(
    config: Config, run: Mapping[str, Any], classes: list[str], uri: str
) -> FrameEncoder | ServerModel:
    """Load the recogniser; a teacher must be the one whose logits the features hold."""
    network: FrameEncoder | ServerModel
    if (server := read_server(uri)) is not None:
        what = f"--recognizer {storage.redact(uri)}"
        _check_classes_and_task(server, what, classes, config.train.task)
        network = server
    else:
        network = _classifier(uri, "--recognizer", classes, config.train.task).encoder
    if config.train.target == "teacher":
        _check_same_weights(
            network.state_hash(), run["weights"].get(RECOGNIZER) or "", "--recognizer"
        )
    check_budget(config.sampler, config.decode.num_frames, config.train.task, network.config)
    return network


def _check_same_weights(sha256: str, expected: str, what: str) -> None:
    if sha256 != expected:
        raise ModelError(
            f"{what}: its weights (sha256 {sha256[:12]}) are not those that made the features "
            f"({expected[:12]}); give the same weights or extract again"
        )


def _classifier(uri: str, option: str, classes: list[str], task: str) -> Classifier:
    """Load finetune's output; raises ModelError if its classes or its task differ."""
    classifier = load_classifier(uri)
    _check_classes_and_task(classifier, f"{option} {storage.redact(uri)}", classes, task)
    return classifier


def _check_classes_and_task(
    classifier: Classifier | ServerModel, what: str, classes: list[str], task: str
) -> None:
    check_class_order(classifier.classes, classes, what)
    if classifier.task != task:
        raise ModelError(
            f"{what}: was finetuned for task {classifier.task!r}, train.task is {task!r}"
        )


def _shape(config: Config, num_classes: int, visual_dim: int, text: Embeddings | None) -> TSQShape:
    settings = config.train
    return TSQShape(
        num_classes=num_classes,
        visual_dim=visual_dim,
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
