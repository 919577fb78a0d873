"""The multiply-add counter against the paper's table 1 and totals, counted from the modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tsq_ray.errors import ModelError
from tsq_ray.model import TSQShape
from tsq_ray.model.flops import (
    Network,
    cost_table,
    count_network,
    count_ops,
    network_multiply_adds,
    tsq_multiply_adds,
)

MOBILENET = Network("mobilenetv2_100", 188)
EFFICIENTNET = Network("tf_efficientnet_b0", 112)
RESNET = Network("resnet50", 224)
ACTIVITYNET = {
    "num_frames": 16,
    "budget": 5,
    "recognizer": RESNET,
    "visual": MOBILENET,
    "objects": EFFICIENTNET,
    "shape": TSQShape(200),
}


def test_counts_a_hand_made_network() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
    ).eval()
    assert count_ops(net, torch.zeros(1, 3, 6, 6)) == (3 * 4 * 9 * 36 + 4 * 36 * 2, 2 * 4 * 36)


def test_table_1_row_by_row() -> None:
    table = cost_table("both", **ACTIVITYNET)
    rows = [
        (r.module, r.resolution, r.gflops_per_frame and round(r.gflops_per_frame, 3), r.num_frames)
        for r in table.rows
    ]
    assert rows == [
        ("Vis.Enc.", 188, 0.220, 16),
        ("Obj.Rec.", 112, pytest.approx(0.0975, abs=6e-4), 16),
        ("Rec.Net.", 224, 4.109, 5),
        ("VQM", None, None, None),
        ("TQM", None, None, None),
    ]
    # 0.220 x 16 is printed as 3.52; unrounded it is 3.526
    assert [r.gflops for r in table.rows] == pytest.approx(
        [3.526, 1.56, 20.547, 0.363, 0.0987], abs=5e-4
    )
    assert round(table.gflops, 2) == 26.09


@pytest.mark.parametrize(
    ("mode", "changes", "total"),
    [
        ("both", {"shape": TSQShape(239)}, 26.18),
        ("visual", {}, 24.44),
        ("visual", {"shape": TSQShape(200, modules="visual"), "objects": None}, 24.44),
        ("both", {"budget": 4, "visual": Network("mobilenetv2_100", 112)}, 19.71),
        ("visual", {"budget": 4, "visual": Network("mobilenetv2_100", 112)}, 18.05),
        ("textual", {}, 22.21),
        ("uniform", {}, 20.55),
        ("random", {"visual": None, "objects": None, "shape": None}, 20.55),
        ("maxconf", {}, 65.75),
        (
            "maxconf-l",
            {
                "num_frames": 50,
                "visual": Network("mobilenetv2_100", 224),
                "recognizer": Network("resnet101", 224),
            },
            54.80,
        ),
    ],
)
def test_totals(mode: str, changes: dict[str, object], total: float) -> None:
    assert round(cost_table(mode, **{**ACTIVITYNET, **changes}).gflops, 2) == total


def test_true_counts_at_the_true_size() -> None:
    assert round(network_multiply_adds(MOBILENET, "true") / 1e9, 3) == 0.227
    objects = count_network(EFFICIENTNET)
    assert (
        round(objects.products / 1e9, 3) == 0.106
    )  # the convolutions; with the batch normalisations:
    assert round(network_multiply_adds(EFFICIENTNET, "true") / 1e9, 3) == 0.110


def test_efficientnets_citation_is_close_to_the_count() -> None:
    assert round(count_network(Network("tf_efficientnet_b0", 224)).total / 1e9, 3) == 0.398
    assert network_multiply_adds(Network("efficientnet_b0.ra_in1k", 224)) == 0.39e9


def test_tsq_modules_folded_and_not() -> None:
    plain, folded = (tsq_multiply_adds(TSQShape(200), 16, folded) for folded in (False, True))
    conv, square = 1280 * 512, 512 * 512
    by_hand = (
        (16 + 200) * conv + 4 * 200 * square + 2 * 16 * square + 2 * 200 * 16 * 512 + 200 * 512
    )
    assert plain["visual"] == by_hand
    assert folded["visual"] == by_hand - 200 * (conv + square)
    assert {name: round(count / 1e9, 4) for name, count in plain.items()} == {
        "visual": 0.3630,
        "textual": 0.0987,
    }
    assert {name: round(count / 1e9, 3) for name, count in folded.items()} == {
        "visual": 0.180,
        "textual": 0.046,
    }
    assert set(tsq_multiply_adds(TSQShape(200, modules="visual"), 16, True)) == {"visual"}


def test_true_table_is_folded() -> None:
    rows = {
        row.module: row.gflops for row in cost_table("both", **ACTIVITYNET, counting="true").rows
    }
    assert rows["VQM"] == pytest.approx(0.180, abs=5e-4)
    assert rows["Vis.Enc."] == pytest.approx(16 * 0.227, abs=1e-3)


def test_a_network_of_a_fixed_size_is_built_for_the_requested_size() -> None:
    small, large = (
        network_multiply_adds(Network("vit_tiny_patch16_224", size), "true") for size in (112, 224)
    )
    assert large > 3 * small


def test_model_args_are_used() -> None:
    halved = network_multiply_adds(Network("resnet18", 64, {"layers": [1, 1, 1, 1]}))
    assert halved < 0.6 * network_multiply_adds(Network("resnet18", 64))


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (Network("nonesuch", 224), r"cannot build 'nonesuch' at size 224.*see timm.list_models"),
        (Network("resnet18", 224, {"foo": 1}), "unexpected keyword argument 'foo'"),
    ],
)
def test_unknown_networks(network: Network, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        count_network(network)


def test_a_missing_network_is_named() -> None:
    with pytest.raises(AssertionError, match=r"mode 'visual' needs the network of Vis.Enc."):
        cost_table("visual", num_frames=16, budget=5, recognizer=RESNET, shape=TSQShape(200))
