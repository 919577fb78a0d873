"""Equation 4 against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tsq_ray.model import TSQOutput, tsq_loss
from tsq_ray.model.task import classification_loss

ATTENTION = torch.full((1, 2, 3), 1 / 3)


def output_of(*logits: list[float] | None) -> TSQOutput:
    visual, textual, t2v, v2t = (None if row is None else torch.tensor([row]) for row in logits)
    assert visual is not None
    return TSQOutput(visual, ATTENTION, textual, ATTENTION, t2v, v2t)


LOG3, LOG9 = math.log(3), math.log(9)


def test_weighted_sum_of_the_four_parts() -> None:
    # softmax of (0, 0), (ln 3, 0), (0, ln 3), (ln 9, 0):
    # the probability of class 0 is 1/2, 3/4, 1/4, 9/10
    parts = tsq_loss(
        output_of([0.0, 0.0], [LOG3, 0.0], [0.0, LOG3], [LOG9, 0.0]),
        torch.tensor([[1.0, 0.0]]),
        "single",
        0.6,
        0.2,
    )
    expected = {
        "visual": math.log(2),
        "textual": math.log(4 / 3),
        "t2v": math.log(4),
        "v2t": math.log(10 / 9),
    }
    assert {name: value.item() for name, value in parts.items() if name != "loss"} == pytest.approx(
        expected
    )
    assert parts["loss"].item() == pytest.approx(
        math.log(2) + math.log(4 / 3) + 0.6 * math.log(4) + 0.2 * math.log(10 / 9)
    )


def test_several_labels_share_the_weight_in_the_single_task() -> None:
    loss = tsq_loss(
        output_of([LOG3, 0.0], None, None, None), torch.tensor([[1.0, 1.0]]), "single", 0.6, 0.6
    )["loss"]
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_multi_is_the_binary_cross_entropy_summed_over_the_classes() -> None:
    loss = tsq_loss(
        output_of([LOG3, LOG9], None, None, None), torch.tensor([[1.0, 0.0]]), "multi", 0.6, 0.6
    )["loss"]
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(10))


def test_only_the_parts_that_exist() -> None:
    assert set(
        tsq_loss(
            output_of([0.0, 0.0], None, None, None), torch.tensor([[1.0, 0.0]]), "single", 0.6, 0.6
        )
    ) == {"loss", "visual"}
    evaluation = tsq_loss(
        output_of([0.0, 0.0], [0.0, 0.0], None, None),
        torch.tensor([[1.0, 0.0]]),
        "single",
        0.6,
        0.6,
    )
    assert set(evaluation) == {"loss", "visual", "textual"}
    assert evaluation["loss"].item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("single", (math.log(4 / 3) + math.log(4)) / 2),
        ("multi", (math.log(4 / 3) + math.log(4)) / 2 + math.log(2)),
    ],
)
def test_mean_over_the_videos(task: str, expected: float) -> None:
    output = TSQOutput(torch.tensor([[LOG3, 0.0], [LOG3, 0.0]]), ATTENTION)
    loss = tsq_loss(output, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), task, 0.0, 0.0)["loss"]
    assert loss.item() == pytest.approx(expected)


def test_a_multi_label_network_of_many_classes_learns_in_a_few_steps_of_sgd() -> None:
    """Averaged over the classes, the gradient would be 50 times smaller and nothing learnt."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randperm(50, generator=generator)[:2] for _ in range(200)])
    targets = torch.zeros(200, 50).scatter_(1, labels, 1.0)
    prototypes = torch.randn(50, 64, generator=generator)
    inputs = targets @ prototypes + 0.3 * torch.randn(200, 64, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Linear(64, 50)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        classification_loss(network(inputs), targets, "multi").backward()
        optimizer.step()
    found = network(inputs).topk(2, dim=1).indices
    assert targets.gather(1, found).mean().item() > 0.8
