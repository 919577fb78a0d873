"""Networks prepared for inference compute what they did before."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tsq_ray.config import ModelConfig, ResourcesConfig
from tsq_ray.decode import FrameSpec
from tsq_ray.decode.frames import resize_picture
from tsq_ray.networks.batch_norm import fold_batch_norms
from tsq_ray.networks.encoder import FrameEncoder, load_encoder
from tsq_ray.networks.inference import (
    Pictures,
    encode_pictures,
    prepare_for_inference,
    resize_frames,
    takes_bf16,
)

CPU = torch.device("cpu")
NORMS = (nn.BatchNorm2d,)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Networks this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network_of(name: str, **arguments: Any) -> nn.Module:
    """A timm network whose batch norms have statistics and weights of their own."""
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
    for module in network.modules():
        if isinstance(module, NORMS):
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return network


def pictures(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mobilenetv2_100", {"pad_type": "same"}),
        ("tf_efficientnet_lite0", {}),
        ("tf_efficientnet_b0", {}),
        ("resnet18", {}),
        ("test_efficientnet", {}),
        ("test_resnet", {}),
    ],
)
def test_every_batch_norm_is_folded_and_nothing_else_changes(
    name: str, arguments: dict[str, Any]
) -> None:
    network = network_of(name, **arguments)
    x = torch.randn(2, 3, 64, 64)
    norms = sum(isinstance(module, NORMS) for module in network.modules())
    with torch.inference_mode():
        before = network(x)
        assert fold_batch_norms(network, 64) == norms > 0
        assert not [module for module in network.modules() if isinstance(module, NORMS)]
        torch.testing.assert_close(
            network(x), before, rtol=1e-3, atol=1e-4 * float(before.abs().max())
        )


def test_a_network_without_batch_norms_stays_as_it_is() -> None:
    assert fold_batch_norms(network_of("test_vit"), 160) == 0


class Twice(nn.Module):
    """The convolution's output before and after the batch norm; folding would change the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return (y + self.norm(y)).mean((2, 3))


class Shared(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.norm(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("kind", [Twice, Shared])
def test_what_cannot_be_folded_is_left(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind().eval()
    network.norm.running_mean.fill_(0.5)  # type: ignore[union-attr,operator]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before, state = (
            network(x),
            {name: value.clone() for name, value in network.state_dict().items()},
        )
        assert fold_batch_norms(network, 16) == 0
        assert torch.equal(network(x), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def encoder_of(name: str, size: int) -> FrameEncoder:
    return load_encoder(
        ModelConfig(model=name, weights="random:0", size=size), with_head=True, num_classes=7
    )


def test_a_prepared_encoder_is_a_copy_with_the_same_output() -> None:
    encoder = encoder_of("test_efficientnet", 64)
    own, frames = encoder.state_hash(), pictures(19, 64)
    features, logits = encode_pictures(
        prepare_for_inference(encoder, CPU),
        [Pictures(frames[:3]), Pictures(frames[3:17]), Pictures(frames[17:])],
    )
    with torch.inference_mode():
        expected, expected_logits = encoder(torch.from_numpy(frames))
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-4)
    assert encoder.state_hash() == own


def test_bf16_gives_nearly_the_same_in_float32() -> None:
    encoder, frames = encoder_of("test_resnet", 64), pictures(9, 64)
    exact, _ = encode_pictures(
        prepare_for_inference(encoder, CPU, ResourcesConfig(precision="fp32")), [Pictures(frames)]
    )
    features, logits = encode_pictures(
        prepare_for_inference(encoder, CPU, ResourcesConfig(precision="bf16")), [Pictures(frames)]
    )
    assert logits is not None
    assert (features.dtype, logits.dtype) == (torch.float32, torch.float32)
    assert torch.nn.functional.cosine_similarity(features, exact).min() > 0.99
    assert not torch.equal(features, exact)


@pytest.mark.slow
def test_compiled_gives_the_same_for_any_number_of_frames() -> None:
    encoder = encoder_of("test_resnet", 64)
    compiled = prepare_for_inference(encoder, CPU, ResourcesConfig(compile=True))
    for count in (1, 8, 11):
        expected, _ = encode_pictures(
            prepare_for_inference(encoder, CPU), [Pictures(pictures(count, 64))]
        )
        features, logits = encode_pictures(compiled, [Pictures(pictures(count, 64))])
        assert logits is not None
        assert len(logits) == count
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", False), ("fp32", False), ("bf16", True)]
)
def test_precision_on_a_cpu(precision: Any, expected: bool) -> None:
    assert takes_bf16(precision, CPU) == expected


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same() -> None:
    encoder, frames = encoder_of("test_resnet", 64), pictures(300, 64)
    exact, _ = encode_pictures(prepare_for_inference(encoder, CPU), [Pictures(frames)])
    features, _ = encode_pictures(
        prepare_for_inference(encoder, torch.device("cuda")), [Pictures(frames)]
    )
    assert torch.nn.functional.cosine_similarity(features, exact).min() > 0.99


SPECS = [
    FrameSpec(48),
    FrameSpec(48, interpolation="bicubic"),
    FrameSpec(48, "crop"),
    FrameSpec(56, "crop", "bicubic"),
]


def assert_resized_as_by_the_decoder(
    shape: tuple[int, int], spec: FrameSpec, device: torch.device
) -> None:
    frames = np.random.default_rng(2).integers(0, 256, (3, *shape, 3)).astype(np.uint8)
    frames[1, :, shape[1] // 2 :] = 0  # an edge, at which bicubic overshoots
    expected = np.stack([resize_picture(frame, spec) for frame in frames]).astype(int)
    resized = resize_frames(torch.from_numpy(frames).to(device), spec)
    assert resized.dtype == torch.uint8
    difference = np.abs(resized.cpu().numpy() - expected)
    assert difference.mean() < 0.6, "a rounding"
    # Pillow also rounds and clips between its two directions: if bicubic overshoots, as at the
    # edges of noise, the difference is larger
    assert difference.max() <= (2 if spec.interpolation == "bilinear" else 20)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(240, 320), (97, 61), (48, 48), (20, 33)])
def test_the_device_resizes_as_the_decoder_does(shape: tuple[int, int], spec: FrameSpec) -> None:
    assert_resized_as_by_the_decoder(shape, spec, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_a_gpu_resizes_as_the_decoder_does(spec: FrameSpec) -> None:
    assert_resized_as_by_the_decoder((240, 320), spec, torch.device("cuda"))


def test_whole_frames_of_several_sizes_go_through_a_network_together() -> None:
    encoder = prepare_for_inference(encoder_of("test_resnet", 64), CPU)
    spec, sizes = FrameSpec(64), [(5, 90, 120), (0, 64, 64), (9, 64, 64), (4, 200, 70)]
    videos = [
        np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8)
        for number, size in enumerate(sizes)
    ]
    videos[2].flags.writeable = False  # as Ray delivers it
    expected, _ = encode_pictures(
        encoder,
        [
            Pictures(np.stack([resize_picture(frame, spec) for frame in video]))
            for video in videos
            if len(video)
        ],
    )
    features, _ = encode_pictures(encoder, [Pictures(video, native_size=True) for video in videos])
    assert len(features) == 18
    torch.testing.assert_close(features, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_freed_memory_is_kept_for_the_next_layer() -> None:
    """A new process, because the C library's setting lasts as long as the process."""
    script = """
import resource, torch
from tsq_ray.networks.inference import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def faults_of_layers():
    torch.ones(40 << 20, dtype=torch.uint8)
    before = faults()
    for _ in range(20):
        torch.ones(40 << 20, dtype=torch.uint8)
    return faults() - before
returned = faults_of_layers()
keep_freed_memory()
print(faults_of_layers(), returned)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split())
    assert kept < returned / 10
