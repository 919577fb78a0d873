"""Small networks of the transformers library with random weights, as folders to import."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SIZE, CLIP, CLASSES = 64, 4, ("a cat", "a dog", "a street_market", "snow")
_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_PICTURES: dict[str, Any] = {"image_size": SIZE, "patch_size": 16}
_LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {n: i for i, n in enumerate(CLASSES)}}
_CROP = {"height": SIZE, "width": SIZE}


def _vit() -> tuple[Any, Any]:
    config = transformers.ViTConfig(**_WIDTHS, **_PICTURES, **_LABELS)
    return transformers.ViTForImageClassification(config), transformers.ViTImageProcessor(
        size=_CROP
    )


def _convnext() -> tuple[Any, Any]:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], image_size=SIZE, **_LABELS
    )
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=0.875)
    return transformers.ConvNextForImageClassification(config), processor


def _resnet() -> tuple[Any, Any]:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **_LABELS
    )
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=0.95)
    return transformers.ResNetForImageClassification(config), processor


def _deit() -> tuple[Any, Any]:
    """Two classifiers whose logits are averaged: no linear layer ends it."""
    config = transformers.DeiTConfig(**_WIDTHS, **_PICTURES, **_LABELS)
    processor = transformers.DeiTImageProcessor(size={"height": 72, "width": 72}, crop_size=_CROP)
    return transformers.DeiTForImageClassificationWithTeacher(config), processor


def _levit() -> tuple[Any, Any]:
    config = transformers.LevitConfig(
        image_size=SIZE,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[1, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        **_LABELS,
    )
    processor = transformers.LevitImageProcessor(size={"shortest_edge": SIZE}, crop_size=_CROP)
    return transformers.LevitForImageClassification(config), processor


def _clip(network: Any = transformers.CLIPModel, **labels: Any) -> tuple[Any, Any]:
    text = {**_WIDTHS, "vocab_size": 300, "max_position_embeddings": 32, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text | {"bos_token_id": 0, "pad_token_id": 2, "projection_dim": 24},
        vision_config={**_WIDTHS, **_PICTURES, "projection_dim": 24},
        projection_dim=24,
        **labels,
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=_CROP)
    return network(config), processor


def _siglip(network: Any = transformers.SiglipModel, **labels: Any) -> tuple[Any, Any]:
    text = {**_WIDTHS, "vocab_size": 300, "max_position_embeddings": 32}
    config = transformers.SiglipConfig(
        text_config=text | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        vision_config={**_WIDTHS, **_PICTURES},
        **labels,
    )
    return network(config), transformers.SiglipImageProcessor(size=_CROP)


def _videomae() -> tuple[Any, Any]:
    config = transformers.VideoMAEConfig(**_WIDTHS, **_PICTURES, **_LABELS, num_frames=CLIP)
    processor = transformers.VideoMAEImageProcessor(size={"shortest_edge": SIZE}, crop_size=_CROP)
    return transformers.VideoMAEForVideoClassification(config), processor


def _timesformer() -> tuple[Any, Any]:
    config = transformers.TimesformerConfig(**_WIDTHS, **_PICTURES, **_LABELS, num_frames=CLIP)
    processor = transformers.VideoMAEImageProcessor(size={"shortest_edge": SIZE}, crop_size=_CROP)
    return transformers.TimesformerForVideoClassification(config), processor


def _vivit() -> tuple[Any, Any]:
    config = transformers.VivitConfig(
        **_WIDTHS, **_LABELS, image_size=SIZE, num_frames=CLIP, tubelet_size=[2, 16, 16]
    )
    processor = transformers.VivitImageProcessor(size={"shortest_edge": 73}, crop_size=_CROP)
    return transformers.VivitForVideoClassification(config), processor


def _imagegpt() -> tuple[Any, Any]:
    """It sees colour clusters."""
    config = transformers.ImageGPTConfig(
        n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=16, **_LABELS
    )
    processor = transformers.ImageGPTImageProcessor(
        clusters=[[number / 8 - 1] * 3 for number in range(16)], size={"height": 8, "width": 8}
    )
    return transformers.ImageGPTForImageClassification(config), processor


def _vjepa2() -> tuple[Any, Any]:
    """Its config says the frames of a clip in words of its own."""
    predictor = {"pred_hidden_size": 32, "pred_num_hidden_layers": 1}
    config = transformers.VJEPA2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pred_num_attention_heads=2,
        num_pooler_layers=1,
        crop_size=SIZE,
        frames_per_clip=CLIP,
        **predictor,
        **_LABELS,
    )
    return transformers.VJEPA2ForVideoClassification(config), transformers.VideoMAEImageProcessor()


def _naflex() -> tuple[Any, Any]:
    """It sees patches."""
    vision = {**_WIDTHS, "patch_size": 16, "num_patches": 16}
    config = transformers.Siglip2Config(
        text_config={**_WIDTHS, "vocab_size": 300}, vision_config=vision
    )
    return transformers.Siglip2Model(config), transformers.Siglip2ImageProcessor()


def _bert() -> tuple[Any, Any]:
    """It sees no pictures at all."""
    config = transformers.BertConfig(**_WIDTHS, vocab_size=300)
    return transformers.BertModel(config), transformers.ViTImageProcessor()


VIDEO_CLASSIFIERS = {"videomae": _videomae, "timesformer": _timesformer, "vivit": _vivit}
CLASSIFIERS = {
    "vit": _vit,
    "convnext": _convnext,
    "resnet": _resnet,
    "deit": _deit,
    "levit": _levit,
    "clip-classifier": partial(_clip, transformers.CLIPForImageClassification, **_LABELS),
    "siglip-classifier": partial(_siglip, transformers.SiglipForImageClassification, **_LABELS),
}
DUAL_ENCODERS = {"clip": _clip, "siglip": _siglip}
UNSUPPORTED = {"imagegpt": _imagegpt, "vjepa2": _vjepa2, "naflex": _naflex, "bert": _bert}


def save_pretrained(kind: str, folder: Path) -> str:
    """Write the network, its image processor and, for a dual encoder, its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        every = CLASSIFIERS | DUAL_ENCODERS | VIDEO_CLASSIFIERS | UNSUPPORTED
        network, processor = every[kind]()
        for parameter in network.parameters():  # answers that differ between pictures
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
        if hasattr(network, "logit_bias"):  # SigLIP's
            network.logit_bias.data.fill_(-2.0)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind in DUAL_ENCODERS:
        _tokenizer().save_pretrained(folder)
    return str(folder)


def _tokenizer() -> Any:
    """One token per letter and an end, at which CLIP reads the whole text."""
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    letters = {token: number for number, token in enumerate([*special, *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
