"""The TSQ layer and network against the paper's equations."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tsq_ray.model import TSQNet, TSQOutput, TSQShape, object_embeddings, tsq_loss

B, T, C, DV, DT = 3, 7, 5, 24, 20
SHAPE = TSQShape(
    num_classes=C, visual_dim=DV, text_dim=DT, dim_visual=16, dim_textual=9, dropout=0.0
)


def make_net(**changes: object) -> TSQNet:
    torch.manual_seed(0)
    return TSQNet(dataclasses.replace(SHAPE, **changes))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, T, DV, generator=generator), torch.randn(B, T, DT, generator=generator)


def test_shape_survives_json() -> None:
    assert TSQShape(**json.loads(json.dumps(dataclasses.asdict(SHAPE)))) == SHAPE


def test_training_gives_the_four_logits_and_both_attentions(inputs: tuple[Tensor, Tensor]) -> None:
    output = make_net().train()(*inputs)
    for logits in (
        output.logits_visual,
        output.logits_textual,
        output.logits_t2v,
        output.logits_v2t,
    ):
        assert logits.shape == (B, C)
    for attention in (output.attention_visual, output.attention_textual):
        assert attention.shape == (B, C, T)
        torch.testing.assert_close(attention.sum(-1), torch.ones(B, C))


def test_evaluation_has_no_swap(inputs: tuple[Tensor, Tensor]) -> None:
    output = make_net().eval()(*inputs)
    assert output.logits_textual is not None
    assert output.logits_t2v is None
    assert output.logits_v2t is None


def test_visual_only_network_has_nothing_textual(inputs: tuple[Tensor, Tensor]) -> None:
    net = make_net(modules="visual").train()
    output = net(inputs[0], None)
    assert [
        f.name for f in dataclasses.fields(TSQOutput) if getattr(output, f.name) is not None
    ] == ["logits_visual", "attention_visual"]
    assert not any(name.startswith("textual") for name in net.state_dict())


def test_text_may_be_left_out_only_in_evaluation(inputs: tuple[Tensor, Tensor]) -> None:
    net = make_net()
    with_text = net.eval()(*inputs)
    without = net(inputs[0], None)
    assert without.logits_textual is None
    torch.testing.assert_close(without.logits_visual, with_text.logits_visual)
    with pytest.raises(AssertionError, match="text is None"):
        net.train()(inputs[0], None)


def test_layer_is_the_equations_written_out(inputs: tuple[Tensor, Tensor]) -> None:
    net = make_net().eval()
    branch = net.visual
    with torch.no_grad():
        output = net(*inputs)
        x = inputs[0] @ branch.conv.weight.T + branch.conv.bias
        e = branch.embeddings @ branch.conv.weight.T + branch.conv.bias
        position = torch.zeros(T, 16)
        for t in range(T):
            for i in range(0, 16, 2):
                angle = torch.tensor(t / 10000 ** (i / 16))
                position[t, i], position[t, i + 1] = torch.sin(angle), torch.cos(angle)
        for b in range(B):
            keys, values = branch.key(x[b] + position), branch.value(x[b])
            for c in range(C):
                attention = torch.softmax(keys @ branch.query(e[c]) / 4, dim=0)
                torch.testing.assert_close(output.attention_visual[b, c], attention)
                response = branch.norm_response(branch.out(attention @ values))
                response = branch.norm_ffn(
                    response + branch.ffn_out(torch.relu(branch.ffn_in(response)))
                )
                torch.testing.assert_close(
                    output.logits_visual[b, c],
                    branch.class_weight[c] @ response + branch.class_bias[c],
                )


@pytest.mark.parametrize("swap_values", ["input", "projected"])
def test_swap_gathers_with_the_other_attention_through_the_own_classifier(
    swap_values: str, inputs: tuple[Tensor, Tensor]
) -> None:
    net = make_net(swap_values=swap_values).train()
    output = net(*inputs)
    for branch, frames, attention, logits in (
        (net.visual, inputs[0], output.attention_textual, output.logits_t2v),
        (net.textual, inputs[1], output.attention_visual, output.logits_v2t),
    ):
        values = branch.conv(frames)
        if swap_values == "projected":
            values = branch.value(values)
        torch.testing.assert_close(logits, branch.run_with_attention([attention], [values]))


def attention_parameters(net: TSQNet, name: str) -> list[Tensor]:
    branch = getattr(net, name)
    return [branch.embeddings, branch.query.weight, branch.key.weight]


@pytest.mark.parametrize(
    ("logits", "feels", "other"),
    [("logits_t2v", True, "textual"), ("logits_v2t", False, "visual")],
)
def test_gradient_through_the_swapped_attention(
    logits: str, feels: bool, other: str, inputs: tuple[Tensor, Tensor]
) -> None:
    net = make_net().train()
    getattr(net(*inputs), logits).square().sum().backward()
    reached = [
        p.grad is not None and bool(p.grad.abs().sum() > 0)
        for p in attention_parameters(net, other)
    ]
    assert reached == [feels] * 3


def test_every_parameter_is_trained(inputs: tuple[Tensor, Tensor]) -> None:
    net = make_net().train()
    targets = torch.eye(C)[:B]
    tsq_loss(net(*inputs), targets, "single", 0.6, 0.6)["loss"].backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_order_of_the_frames_matters_only_through_the_positions(
    inputs: tuple[Tensor, Tensor],
) -> None:
    net = make_net().eval()
    flipped = net(*(x.flip(1) for x in inputs))
    assert not torch.allclose(
        flipped.attention_visual.flip(2), net(*inputs).attention_visual, atol=1e-3
    )
    torch.nn.init.zeros_(
        net.visual.key.weight
    )  # keys without content or position: every frame alike
    torch.testing.assert_close(net(*inputs).attention_visual, torch.full((B, C, T), 1 / T))


def test_a_video_does_not_depend_on_its_batch(inputs: tuple[Tensor, Tensor]) -> None:
    net = make_net().eval()
    whole, alone = net(*inputs), net(inputs[0][1:2], inputs[1][1:2])
    torch.testing.assert_close(alone.logits_visual[0], whole.logits_visual[1])
    torch.testing.assert_close(alone.attention_textual[0], whole.attention_textual[1])


def test_half_precision_features_are_taken(inputs: tuple[Tensor, Tensor]) -> None:
    output = make_net().eval()(inputs[0].half(), inputs[1].half())
    assert output.logits_visual.dtype == torch.float32


@pytest.mark.parametrize("modules", ["both", "visual"])
def test_folding_changes_neither_the_output_nor_the_state(
    modules: str, inputs: tuple[Tensor, Tensor]
) -> None:
    net = make_net(modules=modules).eval()
    text = inputs[1] if modules == "both" else None
    before, names = net(inputs[0], text), list(net.state_dict())
    net.fold()
    after = net(inputs[0], text)
    assert net.visual.folded_queries is not None
    assert list(net.state_dict()) == names
    for item in dataclasses.fields(TSQOutput):
        if getattr(before, item.name) is not None:
            torch.testing.assert_close(getattr(after, item.name), getattr(before, item.name))


@pytest.mark.parametrize("change", ["train", "load", "set_embeddings"])
def test_new_weights_drop_the_fold(change: str, inputs: tuple[Tensor, Tensor]) -> None:
    net = make_net().eval()
    net.fold()
    old = net(*inputs).logits_visual
    if change == "train":
        net.train()
        with torch.no_grad():
            net.visual.query.weight.mul_(3)
        net.eval()
    elif change == "load":
        torch.manual_seed(5)
        net.load_state_dict(TSQNet(SHAPE).state_dict())
    else:
        net.set_embeddings(torch.ones(C, DV), None)
    assert net.visual.folded_queries is None
    assert not torch.allclose(net(*inputs).logits_visual, old)


def test_folding_in_training_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"call eval\(\) first"):
        make_net().train().fold()


def test_set_embeddings() -> None:
    net = make_net()
    untouched = net.textual.embeddings.clone()
    net.set_embeddings(torch.full((C, DV), 2.0), None)
    assert net.visual.embeddings.eq(2).all()
    assert net.visual.embeddings.requires_grad
    assert torch.equal(net.textual.embeddings, untouched)
    with pytest.raises(AssertionError, match=r"shape \(5, 3\), expected \(5, 20\)"):
        net.set_embeddings(None, torch.zeros(C, 3))
    with pytest.raises(AssertionError, match="VQM-only"):
        make_net(modules="visual").set_embeddings(None, torch.zeros(C, DT))


@pytest.mark.parametrize("count", [10, 300, 1000], ids=["rows", "matrix", "all"])
def test_object_embeddings_are_the_kept_objects_weighted(count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    vocabulary = torch.randn(1000, 12, generator=generator)
    dense = torch.rand(2, 4, 1000, generator=generator).softmax(-1)
    probs, ids = dense.topk(count, dim=-1)
    kept = torch.zeros_like(dense).scatter(-1, ids, probs)
    torch.testing.assert_close(
        object_embeddings(ids.to(torch.int16), probs, vocabulary), kept @ vocabulary
    )
    half = object_embeddings(ids.to(torch.int16), probs.half(), vocabulary)
    torch.testing.assert_close(half, kept @ vocabulary, rtol=1e-2, atol=1e-4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A second thread only slows tensors this small: on a busy machine the threads wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("task", ["single", "multi"])
def test_training_learns_the_classes_and_finds_their_frames(task: str) -> None:
    """A class shows itself in 3 of 10 frames; the others are noise shared by all classes."""
    generator = torch.Generator().manual_seed(3)
    patterns_v, patterns_t = (
        torch.randn(C, DV, generator=generator) * 1.5,
        torch.randn(C, DT, generator=generator) * 1.5,
    )
    labels = torch.arange(100) % C
    salient = torch.rand(100, 10, generator=generator).argsort(1)[:, :3]
    visual, text = (
        torch.randn(100, 10, DV, generator=generator),
        torch.randn(100, 10, DT, generator=generator),
    )
    rows = torch.arange(100)[:, None]
    visual[rows, salient] += patterns_v[labels][:, None]
    text[rows, salient] += patterns_t[labels][:, None]
    net = make_net(dropout=0.1).train()
    net.set_embeddings(patterns_v, patterns_t)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    targets = torch.eye(C)[labels]
    for _ in range(150):
        loss = tsq_loss(net(visual, text), targets, task, 0.6, 0.6)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    output = net.eval()(visual, text)
    attended = output.attention_visual[torch.arange(100), labels].gather(1, salient).sum(1).mean()
    assert (output.logits_visual.argmax(1) == labels).float().mean() > 0.95
    assert attended > 0.6


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_balance_centres_frames_and_makes_them_as_large_as_positions(size: float) -> None:
    network = TSQNet(
        TSQShape(num_classes=3, visual_dim=40, text_dim=24, dim_visual=16, dim_textual=16)
    )
    visual, text = size * (3 + torch.randn(5, 7, 40)), torch.randn(5, 7, 24) / size
    network.balance(visual, text)
    assert network.textual is not None
    for branch, frames in ((network.visual, visual), (network.textual, text)):
        projected = branch.project(frames)
        assert projected.square().mean().sqrt().item() == pytest.approx(math.sqrt(0.5), rel=1e-3)
        assert projected.mean((0, 1)).abs().max().item() < 1e-3


def test_balance_makes_a_prototype_attend_to_its_own_frames() -> None:
    torch.manual_seed(0)
    prototypes = 5 + torch.randn(4, 40)
    visual = prototypes[torch.arange(20) % 4][None] + 0.1 * torch.randn(6, 20, 40)
    network = TSQNet(TSQShape(num_classes=4, visual_dim=40, dim_visual=64, modules="visual"))
    network.set_embeddings(prototypes, None)
    network.balance(visual, None)
    attention = network.eval()(visual, None).attention_visual
    own = torch.stack([attention[:, c, torch.arange(20) % 4 == c].sum(-1) for c in range(4)])
    assert (own > 0.25).all()
