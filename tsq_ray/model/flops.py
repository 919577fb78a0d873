"""Multiply-adds, counted by running the modules on tensors without memory (device "meta").

No figure is hard-coded except one citation (`CITED`). Two ways to count a video's cost:

- "field", as in the literature (table 1): convolutions and matrix products, plus 2 per output
  element of a batch normalisation, of the unfolded architecture without its classifier at
  224 x 224, times (size / 224)^2; TSQNet with its constant queries recomputed for each video.
- "true": the same operations at the true size (a layer of 3.5 x 3.5 is 4 x 4), TSQNet with its
  queries folded, as this package runs it, plus the sum of the object embeddings, which matters with
  all 1000 objects per frame (table 9).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tsq_ray.config import ModelConfig, SamplerMode
from tsq_ray.errors import ModelError
from tsq_ray.model.tsq import TSQNet, TSQShape
from tsq_ray.networks.encoder import create_network, split_network

REFERENCE_SIZE = 224
CITED = {"efficientnet_b0": 0.39e9}
"""Multiply-adds at 224 from the architecture's own paper (Tan and Le 2019, table 2).

Table 1 of the TSQNet paper uses the same number; counting gives 0.398e9.
"""

Counting = Literal["field", "true"]


class NetworkLike(Protocol):
    """The settings that identify an image network; the settings sections satisfy it."""

    @property
    def kind(self) -> Literal["timm", "transformers", "openai"]: ...
    @property
    def model(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def model_args(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Network:
    """A network at an input size."""

    model: str
    """timm name, with or without a tag, or transformers id."""
    size: int
    """Height and width of the input, in pixels."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Extra constructor arguments."""
    kind: Literal["timm", "transformers"] = "timm"


class OpCount(NamedTuple):
    """Multiply-adds of one forward pass."""

    products: int
    """Multiply-adds of the convolutions and matrix products."""
    norms: int
    """2 per output element of each batch normalisation."""

    @property
    def total(self) -> int:
        return self.products + self.norms


@dataclass(frozen=True)
class CostRow:
    """One row of the paper's table 1; None in the columns that do not apply."""

    module: str
    arch: str | None
    resolution: int | None
    gflops_per_frame: float | None
    num_frames: float | None
    gflops: float


@dataclass(frozen=True)
class CostTable:
    """The cost of one video, in 1e9 multiply-adds."""

    rows: list[CostRow]
    counting: Counting

    @property
    def gflops(self) -> float:
        return sum(row.gflops for row in self.rows)


def count_ops(model: nn.Module, *inputs: Tensor | None) -> OpCount:
    """Count one forward pass of `model` in its current mode.

    Model and inputs may be on the "meta" device.
    """
    norms = 0

    def add(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal norms
        norms += 2 * output.numel()

    hooks = [
        module.register_forward_hook(add)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return OpCount(counter.get_total_flops() // 2, norms)


def count_network(network: NetworkLike) -> OpCount:
    """Count a network without its classifier, on one picture of its input size.

    A model behind a server counts as 0: its work is unknown, and it costs money instead.

    Raises:
        ModelError: the library has no model of that name, or rejects the arguments or the size.
    """
    if network.kind == "openai":
        return OpCount(0, 0)
    count = _count_transformers if network.kind == "transformers" else _count_timm
    arguments = json.dumps(dict(network.model_args), sort_keys=True)
    return count(network.model, network.size, arguments)


def network_multiply_adds(network: NetworkLike, counting: Counting = "field") -> float:
    """Return the multiply-adds of one frame of size x size pixels through a network.

    `counting`: see the module docstring. A transformers network is made for one size, so both ways
    count it at that size; a model behind a server counts as 0.
    """
    if counting == "true" or network.kind != "timm":
        return count_network(network).total
    name = network.model.split(".")[0].removeprefix("tf_")
    if name in CITED and not network.model_args:
        reference = CITED[name]
    else:
        reference = count_network(Network(network.model, REFERENCE_SIZE, network.model_args)).total
    return reference * (network.size / REFERENCE_SIZE) ** 2


def tsq_multiply_adds(shape: TSQShape, num_frames: int, folded: bool) -> dict[str, int]:
    """Return the multiply-adds {"visual": VQM, "textual": TQM} of one video of T frames.

    A VQM-only shape has no "textual".
    """
    visual = _count_tsq(replace(shape, modules="visual"), num_frames, folded)
    if shape.modules == "visual":
        return {"visual": visual}
    return {"visual": visual, "textual": _count_tsq(shape, num_frames, folded) - visual}


def cost_table(
    mode: SamplerMode,
    *,
    num_frames: int,
    budget: float,
    recognizer: NetworkLike,
    visual: NetworkLike | None = None,
    objects: NetworkLike | None = None,
    shape: TSQShape | None = None,
    counting: Counting = "field",
) -> CostTable:
    """Return the paper's table 1 for one configuration.

    Only what the mode needs is counted: "visual" has no object recogniser and no TQM.

    Args:
        mode: see `sampler.mode`.
        num_frames: T.
        budget: K; the mean of an adaptive budget.
        recognizer: runs on the K chosen frames; with "maxconf", on all T.
        visual: frame encoder; not needed by "textual", "uniform", "random" and "maxconf".
        objects: object recogniser, for "both" and "textual".
        shape: shape of the sampler, for "both", "visual" and "textual".
        counting: "field" or "true".
    """
    rows: list[CostRow] = []

    def add(module: str, network: NetworkLike | None, frames: float) -> None:
        assert network is not None, f"the cost of mode {mode!r} needs the network of {module}"
        each = network_multiply_adds(network, counting) / 1e9
        rows.append(CostRow(module, network.model, network.size, each, frames, each * frames))

    if mode in ("both", "visual", "maxconf-l"):
        add("Vis.Enc.", visual, num_frames)
    if mode in ("both", "textual"):
        add("Obj.Rec.", objects, num_frames)
    add("Rec.Net.", recognizer, num_frames if mode == "maxconf" else budget)
    if mode in ("both", "visual", "textual"):
        assert shape is not None, f"the cost of mode {mode!r} needs the sampler's shape"
        counts = tsq_multiply_adds(shape, num_frames, folded=counting == "true")
        if counting == "true" and "textual" in counts:
            counts["textual"] += num_frames * shape.top_objects * shape.text_dim
        for module, name, others in (("VQM", "visual", "textual"), ("TQM", "textual", "visual")):
            if mode != others:
                rows.append(CostRow(module, None, None, None, None, counts[name] / 1e9))
    return CostTable(rows, counting)


@functools.cache
def _count_timm(name: str, size: int, model_args: str) -> OpCount:
    import timm

    arguments = json.loads(model_args)
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(
                name, pretrained=False, **{**arguments, "num_classes": 0}
            )
            # Swin, ViT: the size is part of the architecture
            if model.pretrained_cfg.get("fixed_input_size"):
                model = timm.create_model(
                    name, pretrained=False, **{**arguments, "num_classes": 0, "img_size": size}
                )
        return count_ops(model.eval(), torch.empty(1, 3, size, size, device="meta"))
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"cannot build {name!r} at size {size} with {arguments} in timm: {reason}; "
            "see timm.list_models()"
        ) from error


@functools.cache
def _count_transformers(name: str, size: int, model_args: str) -> OpCount:
    config = ModelConfig(
        kind="transformers", model=name, size=size, model_args=json.loads(model_args)
    )
    with torch.device("meta"):
        encoder = split_network(config, create_network(config, 1), with_head=False)
        clip = config.clip_frames
        products, norms = count_ops(encoder.backbone, torch.empty(clip, 3, size, size))
    return OpCount(products // clip, norms // clip)


@functools.cache
def _count_tsq(shape: TSQShape, num_frames: int, folded: bool) -> int:
    with torch.device("meta"):
        net = TSQNet(shape).eval()
    if folded:
        net.fold()
    text = (
        torch.empty(1, num_frames, shape.text_dim, device="meta")
        if shape.modules == "both"
        else None
    )
    return count_ops(net, torch.empty(1, num_frames, shape.visual_dim, device="meta"), text).total
