"""Full fine-tuning piece by piece, without Ray.

Views, schedule, folded batch norms, and any network learning a few clips.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tsq_ray.config import DecodeConfig, FinetuneConfig, ModelConfig, load_config
from tsq_ray.errors import ConfigError, ModelError
from tsq_ray.manifest import VideoRef, VideoRows, video_id
from tsq_ray.model.task import classification_loss
from tsq_ray.networks.batch_norm import folded_norms, unfold_norms
from tsq_ray.networks.encoder import FrameEncoder, load_encoder
from tsq_ray.runs.folder import write_part
from tsq_ray.runtime.nodes import Pool
from tsq_ray.schema import features_schema, table_from_rows
from tsq_ray.training.classifier import finetune, frozen
from tsq_ray.training.classifier.augment import Augment, random_choices, training_spec
from tsq_ray.training.classifier.clips import ClipPlan, epoch_batches
from tsq_ray.training.classifier.full import Tuned, check_input
from tsq_ray.training.classifier.optim import (
    clip_gradients,
    lr_factor,
    make_optimizer,
    set_lr,
    use_bf16,
)
from tsq_ray.training.classifier.worker import TunePlan, clip_logits, smoothed, start_network

SIZE = 32
RESNET = ModelConfig(model="test_resnet", weights="random:0", size=SIZE)
SMALL_SWIN = {
    "img_size": SIZE,
    "window_size": 2,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
}
NETWORKS = {
    "batch norm": RESNET,
    "fixed input size": ModelConfig(
        model="swin_tiny_patch4_window7_224", weights="random:0", size=SIZE, model_args=SMALL_SWIN
    ),
    "no norm": ModelConfig(model="test_nfnet", weights="random:0", size=SIZE),
    "transformer": ModelConfig(
        model="test_vit", weights="random:0", size=SIZE, model_args={"img_size": SIZE}
    ),
}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# ------------------------------------------------------------------------------------ failed videos


def test_of_two_urls_that_differ_in_the_query_alone_one_failed(tmp_path: Path) -> None:
    uris = [f"https://videos.example/v.mp4?version={number}" for number in (1, 2)]
    refs = [VideoRef(video_id(uri), uri, 9) for uri in uris]
    states = [{"status": "failed", "error_type": "corrupt"}, {"status": "ok"}]
    rows = [vars(ref) | {"warnings": []} | state for ref, state in zip(refs, states, strict=True)]
    write_part(str(tmp_path), table_from_rows(rows, features_schema(2, 3, ["a"])), "zstd")
    network = load_encoder(RESNET, with_head=False)
    tuned = Tuned(network, frozen._failed(str(tmp_path)), {}, [], {})
    assert finetune._failed_uris(VideoRows.of(refs), tuned) == [uris[0]]
    assert finetune._usable(VideoRows.of(refs), tuned) == 1


# -------------------------------------------------------------------------------------------- views


def test_a_view_depends_only_on_seed_epoch_and_video() -> None:
    keys = [
        (0, 0, "00000000000000aa"),
        (1, 0, "00000000000000aa"),
        (0, 1, "00000000000000aa"),
        (0, 0, "00000000000000ab"),
    ]
    views = [random_choices(*key, segments=3) for key in keys]
    assert views == [random_choices(*key, segments=3) for key in keys]
    assert len(set(views)) == len(keys)
    assert all(
        len(view.places) == 3 and all(0 <= place < 1 for place in view.places) for view in views
    )


@pytest.mark.parametrize("color_jitter", [0.0, 0.4])
def test_augmentation_depends_only_on_its_seed(color_jitter: float) -> None:
    augment = Augment(FinetuneConfig(color_jitter=color_jitter), RESNET)
    frames = noise(3, 40, 60, 3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = augment(frames, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(augment(frames, 5), first)
    assert not np.array_equal(augment(frames, 6), first)
    assert (first.shape, first.dtype) == ((3, SIZE, SIZE, 3), np.uint8)


def test_all_frames_of_a_clip_are_seen_alike() -> None:
    augment = Augment(FinetuneConfig(color_jitter=0.4), RESNET)
    views = augment(np.repeat(noise(1, 40, 60, 3), 4, axis=0), 11)
    assert (views == views[0]).all()


@pytest.mark.parametrize(("flip", "expected"), [(True, {"as is", "mirrored"}), (False, {"as is"})])
def test_flip_without_a_crop(flip: bool, expected: set[str]) -> None:
    augment = Augment(FinetuneConfig(crop_scale=(1, 1), flip=flip), RESNET)
    frames = noise(2, SIZE, SIZE, 3)
    seen = set()
    for seed in range(12):
        view = augment(frames, seed)
        mirrored = np.array_equal(view, frames[:, :, ::-1])
        assert mirrored or np.array_equal(view, frames)
        seen.add("mirrored" if mirrored else "as is")
    assert seen == expected


def test_crops_take_the_share_asked_for() -> None:
    # the picture shows its own row numbers, so a crop's height can be read from it
    picture = np.repeat(np.arange(200, dtype=np.uint8)[:, None], 200, axis=1)
    frames = np.repeat(picture[None, ..., None], 3, axis=3)
    augment = Augment(FinetuneConfig(crop_scale=(0.25, 0.25)), RESNET)
    heights = [float(np.ptp(augment(frames, seed)[0, :, 0, 0].astype(int))) for seed in range(20)]
    # a quarter of the area, of aspect 3/4 to 4/3
    assert min(heights) > 100 * math.sqrt(3 / 4) - 12
    assert max(heights) < 100 * math.sqrt(4 / 3) + 12


@pytest.mark.parametrize(("resize", "expected"), [("squash", "squash"), ("crop", "keep")])
def test_crops_come_from_a_larger_picture(resize: Any, expected: str) -> None:
    spec = training_spec(ModelConfig(model="m", size=224, resize=resize, interpolation="bicubic"))
    assert (spec.size, spec.resize, spec.interpolation) == (256, expected, "bicubic")


@pytest.mark.parametrize("scale", ["[0.5, 0.4]", "[0.0, 1.0]", "[0.5, 1.5]"])
def test_a_wrong_crop_scale_is_refused(scale: str) -> None:
    with pytest.raises(ConfigError, match="expected 0 < smallest <= largest <= 1"):
        load_config(sets=[f"finetune.crop_scale={scale}"])


# ---------------------------------------------------------------------------------- order, schedule


def test_an_epoch_has_every_video_once_in_an_order_of_its_own() -> None:
    epochs = [epoch_batches(seed=3, epoch=epoch, num_videos=21, batch_size=8) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == list(range(21))
        assert {len(batch) for batch in batches} == {7}  # no batch of five at the end
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()
    again = epoch_batches(seed=3, epoch=1, num_videos=21, batch_size=8)
    assert np.array_equal(np.concatenate(again), np.concatenate(epochs[1]))


@pytest.mark.parametrize(
    ("step", "warmup", "expected"),
    [(0, 0, 1.0), (0, 4, 0.25), (3, 4, 1.0), (4, 4, 1.0), (12, 4, 0.5), (10, 0, 0.5), (1, 20, 0.1)],
)
def test_learning_rate(step: int, warmup: int, expected: float) -> None:
    assert lr_factor(step, 20, warmup) == pytest.approx(expected)


def test_learning_rate_falls_to_nothing() -> None:
    factors = [lr_factor(step, 50, 5) for step in range(50)]
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_groups_of_the_optimizer(name: Any) -> None:
    config = FinetuneConfig(
        optimizer=name, lr=0.1, head_lr_factor=3, weight_decay=0.2, warmup_epochs=0
    )
    network = trainable(RESNET, config)
    optimizer = make_optimizer(network, config)
    grouped = [value for group in optimizer.param_groups for value in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, network.parameters()))
    assert set_lr(optimizer, config, 0, 0, 5) == 0.1
    assert network.head is not None
    of_head = set(map(id, network.head.parameters()))
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.3 if id(group["params"][0]) in of_head else 0.1)
        assert {value.ndim > 1 for value in group["params"]} == {group["weight_decay"] == 0.2}


def test_gradients_are_clipped() -> None:
    layer = torch.nn.Linear(3, 3)
    for limit, expected in ((0.0, 30.0), (40.0, 30.0), (6.0, 6.0)):
        layer.weight.grad, layer.bias.grad = torch.full((3, 3), 10.0), torch.zeros(3)
        clip_gradients(layer, limit)
        assert float(layer.weight.grad.norm()) == pytest.approx(expected)


def test_precision_as_requested() -> None:
    device = torch.device("cpu")
    assert use_bf16("bf16", device)
    assert not use_bf16("fp32", device)
    assert use_bf16("auto", device) in (True, False)


@pytest.mark.parametrize(
    ("task", "expected"),
    [("single", [[0.925, 0.025, 0.025, 0.025]]), ("multi", [[0.95, 0.05, 0.05, 0.05]])],
)
def test_label_smoothing(task: str, expected: list[list[float]]) -> None:
    targets = torch.tensor([[True, False, False, False]])
    torch.testing.assert_close(
        smoothed(targets, FinetuneConfig(label_smoothing=0.1), task), torch.tensor(expected)
    )
    torch.testing.assert_close(smoothed(targets, FinetuneConfig(), task), targets.float())


# ------------------------------------------------------------------------------- folded batch norms


def folded_network() -> FrameEncoder:
    """Batch norms as folding leaves them: statistics of nothing, and a bias."""
    network = load_encoder(RESNET, with_head=False)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return network


def test_unfolding_keeps_what_the_network_computes_and_makes_training_agree() -> None:
    network = folded_network()
    pictures = torch.from_numpy(noise(24, SIZE, SIZE, 3))
    num_norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert len(folded_norms(network)) == num_norms > 5
    with torch.no_grad():
        before = network.features(pictures)
        folded_training = network.train().features(pictures)
        network = folded_network()
        assert unfold_norms(network, [pictures[:16], pictures[16:]]) == num_norms
        after = network.features(pictures)
        training = network.train().features(pictures)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    far, near = (
        float((values - before).norm() / before.norm()) for values in (folded_training, training)
    )
    assert near < 0.01 < 0.2 < far
    assert folded_norms(network) == {}


@pytest.mark.parametrize("kind", ["fresh", "with statistics", "no batch norm"])
def test_other_networks_are_left_alone(kind: str) -> None:
    network = load_encoder(
        NETWORKS["transformer"] if kind == "no batch norm" else RESNET, with_head=False
    )
    pictures = torch.from_numpy(noise(4, SIZE, SIZE, 3))
    if kind == "with statistics":
        with torch.no_grad():
            folded = folded_network()
            network = folded.train()
            network.features(pictures)
        network.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert unfold_norms(network, [pictures]) == 0
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


# ----------------------------------------------------------------------------------------- networks


def trainable(model: ModelConfig, config: FinetuneConfig | None = None) -> FrameEncoder:
    plan = ClipPlan(
        config or FinetuneConfig(),
        model,
        DecodeConfig(),
        videos=None,
        counts=None,
        decoders=Pool("decoder", 1, 1, 1, 0.1),
        memory=0,
    )
    job = TunePlan(
        plan, "single", num_classes=3, num_train=6, num_val=0, labels=None, backbone=None, threads=1
    )
    return start_network(job, load_encoder(model, with_head=False).backbone.state_dict())


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("bf16", [False, True])
def test_any_network_learns_a_few_clips(kind: str, bf16: bool) -> None:
    torch.manual_seed(0)
    config = FinetuneConfig(optimizer="adamw", lr=1e-3)
    check_input(load_encoder(NETWORKS[kind], with_head=False))
    network = trainable(NETWORKS[kind], config).train()
    optimizer = make_optimizer(network, config)
    pictures = torch.from_numpy(noise(6, 2, SIZE, SIZE, 3))
    targets = smoothed(torch.eye(3, dtype=torch.bool).repeat(2, 1), config, "single")
    losses = []
    for _ in range(8):
        loss = classification_loss(clip_logits(network, pictures, bf16), targets, "single")
        optimizer.zero_grad()
        loss.backward()
        # several workers wait for the gradient of every parameter
        assert [name for name, value in network.named_parameters() if value.grad is None] == []
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(3), abs=0.3)
    assert losses[-1] < 0.7 * losses[0]


def test_the_head_starts_equal_on_every_worker_and_small() -> None:
    one, other = trainable(RESNET), trainable(RESNET)
    assert one.head is not None
    assert other.head is not None
    assert torch.equal(one.head.weight, other.head.weight)  # type: ignore[arg-type]
    deviation = one.head.weight.detach().std()  # type: ignore[operator]
    assert float(deviation) == pytest.approx(0.01, rel=0.2)


def test_one_frame_alone_passes_a_batch_norm() -> None:
    network = trainable(ModelConfig(model="mobilenetv2_100", weights="random:0", size=SIZE)).train()
    assert clip_logits(network, torch.from_numpy(noise(1, 1, SIZE, SIZE, 3)), False).shape == (1, 3)


def test_a_clip_is_answered_by_the_mean_of_its_frames() -> None:
    network = trainable(RESNET).eval()
    pictures = torch.from_numpy(noise(2, 3, SIZE, SIZE, 3))
    with torch.no_grad():
        expected = torch.stack([network(clip)[1].mean(0) for clip in pictures])
        torch.testing.assert_close(clip_logits(network, pictures, False), expected)


def test_a_size_that_the_network_does_not_take_is_reported() -> None:
    fixed = NETWORKS["fixed input size"].model_copy(update={"size": 48})
    with pytest.raises(
        ModelError,
        match=r"swin_tiny_patch4_window7_224': does not take pictures of size 48.*img_size",
    ):
        check_input(load_encoder(fixed, with_head=False))
