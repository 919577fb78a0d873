"""The variants of the paper's ablations.

Each against a reference written with PyTorch's own attention, and what all of them keep.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsq_ray.model import TSQNet, TSQOutput, TSQShape, saliency, tsq_loss
from tsq_ray.model.flops import cost_table, tsq_multiply_adds
from tsq_ray.model.layers import SelfAttention, TSQLayer
from tsq_ray.model.tsq import TSQBranch

B, T, C, DV, DT, DIM = 3, 7, 5, 24, 20, 16
SHAPE = TSQShape(
    num_classes=C, visual_dim=DV, text_dim=DT, dim_visual=DIM, dim_textual=8, dropout=0.0
)
VARIANTS = {
    "default": {},
    "class-agnostic": {"attention": "class-agnostic"},
    "shared": {"classifier": "shared"},
    "heads": {"num_heads": 4},
    "layers": {"num_layers": 3},
    "self-attention": {"self_attention": True},
    "all": {
        "num_layers": 2,
        "num_heads": 2,
        "self_attention": True,
        "classifier": "shared",
        "swap_values": "projected",
    },
    "agnostic layers": {"attention": "class-agnostic", "num_layers": 2, "num_heads": 4},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def make_net(**changes: object) -> TSQNet:
    torch.manual_seed(0)
    net = TSQNet(dataclasses.replace(SHAPE, **changes))
    for parameter in net.parameters():  # biases and norms too, so that one left out shows
        nn.init.normal_(parameter, std=0.4)
    return net


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, T, DV, generator=generator), torch.randn(B, T, DT, generator=generator)


def torchs_attention(
    layer: TSQLayer | SelfAttention, queries: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of nn.MultiheadAttention with the layer's weights, and its mean head weights."""
    reference = nn.MultiheadAttention(queries.shape[-1], layer.num_heads, batch_first=True).eval()
    projections = layer.query, layer.key, layer.value
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        reference.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
        reference.out_proj.load_state_dict(layer.out.state_dict())
        return reference(queries, keys, values)


def written_out(branch: TSQBranch, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and saliency map of one module, layer by layer."""
    frames = branch.conv(features)
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, DIM, 2) / DIM)
    positions = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    embeddings = branch.conv(branch.embeddings).expand(B, -1, -1)
    response = torch.zeros_like(embeddings)
    for layer in (branch, *branch.further):
        queries = embeddings + response
        if layer.mixer is not None:
            queries = layer.mixer.norm(
                queries + torchs_attention(layer.mixer, queries, queries, queries)[0]
            )
        gathered, weights = torchs_attention(layer, queries, frames + positions, frames)
        response = layer.norm_response(response + gathered)
        response = layer.norm_ffn(response + layer.ffn_out(F.relu(layer.ffn_in(response))))
    rows = branch.class_weight.expand(C, -1)
    return (response * rows).sum(
        -1
    ) + branch.class_bias, weights  # one response times C rows, C times one, or C times C


@each_variant
def test_a_variant_is_its_equations_written_out(
    variant: dict[str, object], inputs: tuple[Tensor, Tensor]
) -> None:
    net = make_net(**variant).eval()
    with torch.no_grad():
        output = net(*inputs)
        logits, weights = written_out(net.visual, inputs[0])
    torch.testing.assert_close(output.attention_visual, weights)
    torch.testing.assert_close(output.logits_visual, logits)


@each_variant
def test_training_gives_four_logits_and_reaches_every_parameter(
    variant: dict[str, object], inputs: tuple[Tensor, Tensor]
) -> None:
    net = make_net(**variant).train()
    output = net(*inputs)
    for attention in (output.attention_visual, output.attention_textual):
        assert attention.shape == (B, net.shape.num_queries, T)
        torch.testing.assert_close(attention.sum(-1), torch.ones(B, net.shape.num_queries))
    assert all(
        logits.shape == (B, C)
        for logits in (
            output.logits_visual,
            output.logits_textual,
            output.logits_t2v,
            output.logits_v2t,
        )
    )
    tsq_loss(output, torch.eye(C)[:B], "single", 0.6, 0.6)["loss"].backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    moved = {
        name for name, parameter in net.named_parameters() if parameter.grad.abs().max() > 1e-6
    }
    # a shift of all keys, or with a shared row of all logits, is nothing to softmax
    shifts = "key.bias", "norm_ffn.bias"
    assert {name for name, _ in net.named_parameters() if not name.endswith(shifts)} <= moved


@each_variant
def test_the_swap_into_the_textual_module_does_not_affect_the_visual_one(
    variant: dict[str, object], inputs: tuple[Tensor, Tensor]
) -> None:
    net = make_net(**variant).train()
    output = net(*inputs)
    output.logits_v2t.square().sum().backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in net.visual.parameters())
    output.logits_t2v.square().sum().backward()
    assert all(layer.query.weight.grad.any() for layer in net.textual.layers), (
        "A^t is not detached, in any layer"
    )


@each_variant
def test_folding_changes_neither_the_output_nor_the_state(
    variant: dict[str, object], inputs: tuple[Tensor, Tensor]
) -> None:
    net = make_net(**variant).eval()
    before, names = net(*inputs), list(net.state_dict())
    net.fold()
    after = net(*inputs)
    assert list(net.state_dict()) == names
    for item in dataclasses.fields(TSQOutput):
        if getattr(before, item.name) is not None:
            torch.testing.assert_close(getattr(after, item.name), getattr(before, item.name))
    net.train()
    assert net.visual.folded_queries is None
    assert net.visual.folded_embeddings is None


def test_the_default_network_is_the_one_of_old_bundles() -> None:
    """Names and random stream are unchanged.

    A bundle from before the variants loads, and a training gives the same result.
    """
    torch.manual_seed(0)
    net = TSQNet(SHAPE)
    linear = [
        f"{name}.{kind}"
        for name in ("conv", "query", "key", "value", "out")
        for kind in ("weight", "bias")
    ]
    block = ["norm_response", "ffn_in", "ffn_out", "norm_ffn"]
    names = [
        "embeddings",
        "class_weight",
        "class_bias",
        *linear,
        *(f"{name}.{kind}" for name in block for kind in ("weight", "bias")),
    ]
    assert list(net.state_dict()) == [
        f"{module}.{name}" for module in ("visual", "textual") for name in names
    ]
    for value, expected in (
        (net.visual.embeddings, [0.5010083914, -0.4658180475, -1.6300053596]),
        (net.visual.ffn_out.weight, [-0.0461627879, -0.2161109000, -0.4215452969]),
        (net.textual.class_weight, [-0.0325305797, 0.2273003459, 0.1537911445]),
    ):
        torch.testing.assert_close(value.detach().flatten()[:3], torch.tensor(expected))


@pytest.mark.parametrize("attention", ["class-specific", "class-agnostic"])
def test_where_the_queries_start(attention: str) -> None:
    net, prototypes = (
        make_net(attention=attention),
        torch.randn(C, DV, generator=torch.Generator().manual_seed(2)),
    )
    net.set_embeddings(prototypes, None)
    torch.testing.assert_close(
        net.visual.embeddings.detach(),
        prototypes if attention == "class-specific" else prototypes.mean(0)[None],
    )
    with pytest.raises(AssertionError, match=r"shape \(1, 24\), expected \(5, 24\)"):
        net.set_embeddings(prototypes[:1], None)


def test_class_agnostic_attention_is_the_saliency() -> None:
    attention = torch.rand(B, 1, T, generator=torch.Generator().manual_seed(3))
    assert torch.equal(saliency(attention, torch.zeros(B, C), "single"), attention[:, 0])
    assert torch.equal(saliency(attention, torch.ones(B, C), "multi"), attention[:, 0])


@pytest.mark.parametrize("variant", ["heads", "layers", "self-attention"])
def test_balance_makes_a_prototype_attend_to_its_own_frames(variant: str) -> None:
    torch.manual_seed(0)
    prototypes = 5 + torch.randn(4, 40)
    visual = prototypes[torch.arange(20) % 4][None] + 0.1 * torch.randn(6, 20, 40)
    net = TSQNet(
        TSQShape(
            num_classes=4, visual_dim=40, dim_visual=256, modules="visual", **VARIANTS[variant]
        )
    )
    net.set_embeddings(prototypes, None)
    net.balance(visual, None)
    attention = net.eval()(visual, None).attention_visual
    own = torch.stack([attention[:, c, torch.arange(20) % 4 == c].sum(-1) for c in range(4)])
    assert (own > 0.5).all()


def test_one_query_starts_by_looking_at_all_frames() -> None:
    torch.manual_seed(0)
    prototypes = 5 + torch.randn(4, 40)
    visual = prototypes[torch.arange(20) % 4][None] + 0.1 * torch.randn(6, 20, 40)
    net = TSQNet(
        TSQShape(
            num_classes=4,
            visual_dim=40,
            dim_visual=256,
            modules="visual",
            attention="class-agnostic",
        )
    )
    net.set_embeddings(prototypes, None)
    net.balance(visual, None)
    assert net.eval()(visual, None).attention_visual.max() < 2 / 20


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({"num_heads": 3}, "num_heads 3 does not divide d' = 16"),
        ({"attention": "class-agnostic", "classifier": "shared"}, "every class the same score"),
    ],
)
def test_impossible_shapes(shape: dict[str, object], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        make_net(**shape)


# ----------------------------------------------------------------------------------- what they cost


def costs(**changes: object) -> tuple[int, int]:
    """Multiply-adds of the VQM with C = 200 and T = 16: by the field's convention, and folded."""
    shape = TSQShape(200, modules="visual", **changes)
    return tsq_multiply_adds(shape, 16, False)["visual"], tsq_multiply_adds(shape, 16, True)[
        "visual"
    ]


def test_costs_by_hand() -> None:
    conv, square, read = 1280 * 512, 512 * 512, 200 * 16 * 512
    field, true = costs()
    assert costs(num_heads=8) == (field, true)
    assert costs(classifier="shared") == (field, true)
    layer = 4 * 200 * square + 2 * 16 * square + 2 * read
    assert costs(num_layers=2) == (field + layer, true + layer), (
        "nothing of a further layer can be folded but conv(E)"
    )
    assert costs(self_attention=True) == (field + 4 * 200 * square + 2 * 200 * 200 * 512, true), (
        "the queries ask no video"
    )
    one = 16 * conv + 3 * square + 2 * 16 * square + 2 * 16 * 512 + 200 * 512
    assert costs(attention="class-agnostic") == (one + conv + square, one)


def test_the_objects_embeddings_weigh_in_the_true_count_only() -> None:
    recognizer = dataclasses.make_dataclass("Net", ["kind", "model", "size", "model_args"])(
        "timm", "resnet18", 64, {}
    )
    settings = {
        "num_frames": 16,
        "budget": 5,
        "recognizer": recognizer,
        "visual": recognizer,
        "objects": recognizer,
    }

    def textual(counting: str, top_objects: int) -> float:
        table = cost_table(
            "both", **settings, shape=TSQShape(200, top_objects=top_objects), counting=counting
        )
        return {row.module: row.gflops for row in table.rows}["TQM"]

    assert textual("true", 1000) - textual("true", 10) == pytest.approx(16 * 990 * 768 / 1e9)
    assert textual("field", 1000) == textual("field", 10)
