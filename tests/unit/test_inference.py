"""Networks made ready to run compute what they did before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tsq_ray.config import ModelConfig
from tsq_ray.encoders import FrameEncoder, load_encoder
from tsq_ray.inference import encode_pictures, fold_batch_norms, ready, takes_bf16
from tsq_ray.sections import ResourcesConfig

CPU = torch.device("cpu")
NORMS = (nn.BatchNorm2d,)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Networks this small are slower on many."""
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
def test_every_batch_norm_is_folded_and_nothing_else_changes(name: str, arguments: dict[str, Any]) -> None:
    network = network_of(name, **arguments)
    x = torch.randn(2, 3, 64, 64)
    norms = sum(isinstance(module, NORMS) for module in network.modules())
    with torch.inference_mode():
        before = network(x)
        assert fold_batch_norms(network, 64) == norms > 0
        assert not [module for module in network.modules() if isinstance(module, NORMS)]
        torch.testing.assert_close(network(x), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_a_network_without_batch_norms_stays_as_it_is() -> None:
    assert fold_batch_norms(network_of("test_vit"), 160) == 0


class Twice(nn.Module):
    """Uses the convolution's output before and after the batch norm: folding would change the sum."""

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
        self.first, self.second, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.norm(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("kind", [Twice, Shared])
def test_what_cannot_be_folded_is_left(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind().eval()
    network.norm.running_mean.fill_(0.5)  # type: ignore[union-attr,operator]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before, state = network(x), {name: value.clone() for name, value in network.state_dict().items()}
        assert fold_batch_norms(network, 16) == 0
        assert torch.equal(network(x), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def encoder_of(name: str, size: int) -> FrameEncoder:
    return load_encoder(ModelConfig(model=name, weights="random:0", size=size), with_head=True, num_classes=7)


def test_a_ready_encoder_is_a_copy_that_says_the_same() -> None:
    encoder = encoder_of("test_efficientnet", 64)
    own, frames = encoder.state_hash(), pictures(19, 64)
    features, logits = encode_pictures(ready(encoder, CPU), frames)
    with torch.inference_mode():
        expected, expected_logits = encoder(torch.from_numpy(frames))
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-4)
    assert encoder.state_hash() == own


def test_bf16_says_nearly_the_same_in_float32() -> None:
    encoder, frames = encoder_of("test_resnet", 64), pictures(9, 64)
    exact, _ = encode_pictures(ready(encoder, CPU, ResourcesConfig(precision="fp32")), frames)
    features, logits = encode_pictures(ready(encoder, CPU, ResourcesConfig(precision="bf16")), frames)
    assert logits is not None
    assert (features.dtype, logits.dtype) == (torch.float32, torch.float32)
    assert torch.nn.functional.cosine_similarity(features, exact).min() > 0.99
    assert not torch.equal(features, exact)


@pytest.mark.slow
def test_compiled_says_the_same_whatever_the_number_of_frames() -> None:
    encoder = encoder_of("test_resnet", 64)
    compiled = ready(encoder, CPU, ResourcesConfig(compile=True))
    for count in (1, 8, 11):
        expected, _ = encode_pictures(ready(encoder, CPU), pictures(count, 64))
        features, logits = encode_pictures(compiled, pictures(count, 64))
        assert logits is not None
        assert len(logits) == count
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("precision", "expected"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_precision_on_a_cpu(precision: Any, expected: bool) -> None:
    assert takes_bf16(precision, CPU) == expected


@pytest.mark.gpu
def test_a_gpu_says_nearly_the_same() -> None:
    encoder, frames = encoder_of("test_resnet", 64), pictures(300, 64)
    exact, _ = encode_pictures(ready(encoder, CPU), frames)
    features, _ = encode_pictures(ready(encoder, torch.device("cuda")), frames)
    assert torch.nn.functional.cosine_similarity(features, exact).min() > 0.99
