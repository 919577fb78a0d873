"""Hours and money of a run: prices, figures per video, and scaling a probe to other nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pytest

from tsq_ray.config import load_config
from tsq_ray.console import show_priced
from tsq_ray.cost import Price, Used, dense
from tsq_ray.errors import ConfigError, RunError
from tsq_ray.estimate import STARTUP_S, check_known, predict
from tsq_ray.probe import Probe, ProbeRequest, _server_seconds
from tsq_ray.results import (
    Counts,
    Estimate,
    EvaluationSummary,
    FinetuneSummary,
    LabelSummary,
    RunSummary,
    TrainingSummary,
    from_record,
)
from tsq_ray.runtime import parts
from tsq_ray.runtime.nodes import Cluster, Node, Stage
from tsq_ray.runtime.placement import layout
from tsq_ray.summaries import (
    estimate_text,
    evaluation_text,
    finetune_text,
    label_text,
    training_text,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu=0.04,gpu=1.5", Price(0.04, 1.5)),
        ("gpu=2", Price(0.0, 2.0)),
        (" cpu = 1 ", Price(1.0, 0.0)),
        ("cpu=0", Price()),
    ],
)
def test_prices(text: str, expected: Price) -> None:
    assert Price.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("", "''"),
        ("1.5", "'1.5'"),
        ("cpu=1,cpu=2", "'cpu=2'"),
        ("tpu=1", "'tpu=1'"),
        ("cpu=-1", "'cpu=-1'"),
        ("cpu=nan", "'cpu=nan'"),
        ("gpu=inf", "'gpu=inf'"),
        ("cpu=1,", "''"),
    ],
)
def test_wrong_prices(text: str, item: str) -> None:
    with pytest.raises(ConfigError, match=f"{item} is not the price .* cpu=0.04,gpu=1.50"):
        Price.parse(text)


def test_cost_per_video_and_hour_and_of_recognising_every_frame() -> None:
    used = Used(cpu_hours=10, gpu_hours=2, videos=100, video_hours=4, dense=3)
    assert used.cost(Price(0.5, 1.5)) == {
        "total": 8.0,
        "per_video": 0.08,
        "per_video_hour": 2.0,
        "dense_total": 24.0,
    }
    assert Used(1, 0, 0, 0).cost(Price(2)) == {"total": 2.0}


def test_recognising_every_frame_costs_t_over_k_of_the_recogniser_and_no_sampler() -> None:
    assert dense({"decode": 2, "sample": 1, "recognize": 1}, frames=4) == 1.5
    assert dense({"recognize": 1, "sample": 1}, 4) == 2.0
    assert dense({"decode": 1}, 4) is None


PRICED = {"config": {"recognizer": {"price_in": 2.0, "price_out": 8.0}}}


def test_tokens_cost_money_without_other_prices() -> None:
    used = Used(10, 0, 100, 4, 4.0, 1000, 10, tokens_cost=5.0)
    assert used.cost(None) == {
        "total": 5.0,
        "tokens": 5.0,
        "per_video": 0.05,
        "per_video_hour": 1.25,
        "dense_total": 20.0,
    }
    found = used.cost(Price(1.0))
    assert found is not None
    assert (found["total"], found["dense_total"]) == (15.0, 60.0)
    assert Used(10, 0, 100, 4).cost(None) is None


def test_the_recogniser_saw_every_frame_of_maxconf() -> None:
    """It chooses by the recogniser's own confidence."""
    rows = [
        {"frame_pts_s": [0.0] * 8, "selected_slot": [1, 2], "selected_by": [mode] * 2}
        for mode in ("maxconf", "maxconf-l", "visual")
    ]
    failed = dict.fromkeys(rows[0])
    table = pa.Table.from_pylist([*rows, failed]).append_column("duration_s", [[1.0] * 4])
    found = parts._amounts(table)
    assert (found[parts.SAMPLED], found[parts.RECOGNIZED]) == (24, 8 + 2 + 2)


def record(**used: float) -> dict[str, Any]:
    return {
        "videos_done_now": 10,
        "used": {"cpu_hours": 1.0, "gpu_hours": 0.0, "video_hours": 0.5, **used},
        "stage_seconds": {"decode": 2.0, "recognize": 1.0, "write": 9.0},
    }


def test_hours_tokens_and_money_of_two_runs() -> None:
    sample, scored = Used(1, 2, 10, 3, None, 100, 10, 5.0), Used(4, 0, 90, 27, 9.0, 50, 5, 2.5)
    both = Used.together([sample, scored])
    assert both == Used(5, 2, 0, 0.0, None, 150, 15, 7.5)
    assert both.cost(Price(1.0)) == {"total": 12.5, "tokens": 7.5}
    assert Used.together([None, scored]) == Used(4, 0, 0, 0.0, None, 50, 5, 2.5)
    assert Used.together([None, None]) is None


def test_the_summary_of_label_has_the_money_of_the_sample_and_of_the_archive() -> None:
    """The sample, which the recogniser sees densely, is the larger bill of a server."""
    counts = Counts(10, 10, 0, 0, {}, {}, 0)
    dense, few = (
        record(tokens_in=tokens, tokens_out=500, sampled_frames=160, recognized_frames=40) | PRICED
        for tokens in (3_000_000, 1_000_000)
    )
    runs = [
        RunSummary("out", kind, counts, 0, True, 1.0, {}, None, {}, found | {"videos_done_now": 0})
        for kind, found in (("features", dense), ("predictions", few))
    ]
    used = Used.together(map(Used.of_run, (dense, few)))
    assert used is not None
    trained = from_record(TrainingSummary, TRAINED | {"happened": {"nodes_lost": 1}})
    choice = {"mode": "both", "budget": 2, "top1": 0.9, "low": 0.8, "high": 1.0, "cost": 0.4}
    summary = LabelSummary(
        *("out", 10, 4, 0.8, [choice], choice, "K = 2: fine", runs[0], trained, runs[1]),
        *(asdict(used), "report.html", 1.0),
    )
    lines = label_text(summary, Price(1.0)).splitlines()
    assert lines[:3] == [
        "K = 2: fine",
        "K  TSQNet agrees     cost  uniform agrees  cost",
        "2  90 % (80 to 100)  40 %  -               -     chosen",
    ]
    assert lines.count("already done: nothing to do") == 2
    assert lines.index("the sampler:") < lines.index("in this run: nodes lost: 1")
    assert "used 3 CPU hours, 0.5 GPU hours" in lines[lines.index("in this run: nodes lost: 1") - 1]
    assert lines[-2:] == [
        "sample, training and archive together used 2 CPU hours, 0 GPU hours; 4000000 tokens "
        "sent, 1000 received; cost 10.01 (of which tokens 8.008)",
        "report: report.html",
    ]


TRAINED = {
    **{"out": "out", "videos": 2, "classes": 1, "left_out": {}, "unlabelled": [], "warnings": []},
    **{"epochs": 1, "losses": {"loss": 0.5}, "workers": 1, "train_seconds": 1, "videos_per_s": 2},
    **{"role": "encoder", "backbone": "frozen", "failed": {}, "failed_videos": []},
    **{"train_accuracy": 1.0, "measured": {}, "trained_now": 2, "tables": {}, "seconds": 1.0},
    "used": {"cpu_hours": 3.0, "gpu_hours": 0.5},
}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (FinetuneSummary, finetune_text),
        (TrainingSummary, training_text),
        (EvaluationSummary, evaluation_text),
    ],
)
def test_what_a_training_used_and_cost(
    kind: type[Any], text: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    summary = from_record(kind, TRAINED)
    show_priced(summary, False, text, Price(0.1, 2.0))
    assert "used 3 CPU hours, 0.5 GPU hours; cost 1.3" in capsys.readouterr().out.splitlines()
    show_priced(summary, True, text, Price(0.1, 2.0))
    assert json.loads(capsys.readouterr().out)["cost"] == {"total": 1.3}
    show_priced(summary, True, text, None)
    assert "cost" not in json.loads(capsys.readouterr().out)


def test_work_of_an_earlier_call_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    summary = from_record(TrainingSummary, TRAINED, already_done=True)
    show_priced(summary, False, training_text, Price(0.1))
    assert "hours" not in capsys.readouterr().out
    show_priced(summary, True, training_text, Price(0.1))
    assert "cost" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (record(), Used(1.0, 0.0, 10, 0.5)),
        (
            record(sampled_frames=160, recognized_frames=40),
            Used(1.0, 0.0, 10, 0.5, 2.0),
        ),
        (
            record(tokens_in=3_000_000, tokens_out=500, sampled_frames=160, recognized_frames=40)
            | PRICED,
            Used(1.0, 0.0, 10, 0.5, 4.0, 3_000_000, 500, 6.004),
        ),
        (record(sampled_frames=160, recognized_frames=160), Used(1.0, 0.0, 10, 0.5, 1.0)),
        (record() | {"videos_done_now": 0}, None),
        ({"videos_done_now": 10}, None),
    ],
    ids=["features", "predictions", "tokens", "every frame", "nothing done", "a run of 0.1.0"],
)
def test_what_a_run_used(content: dict[str, Any], expected: Used | None) -> None:
    assert Used.of_run(content) == expected


FOUR, GPU = Node(4), Node(8, 1)


def predicted(
    stage: Stage,
    own: Node,
    nodes: list[Node],
    videos: int = 10_000,
    sets: tuple[str, ...] = (),
    **seconds: Any,
) -> dict[str, Any]:
    """The estimate for these nodes, from a probe on `own`."""
    config = load_config(None, sets)
    asked = ProbeRequest(stage, config, lambda placed: pytest.fail("not measured here"), (), videos)
    spent = {"seconds": 0.5, "decode_s": 1.0, "network_s": 0.5} | seconds
    placed = layout(stage, config, Cluster((own,)), videos)
    probe = Probe(
        layout=placed,
        cpus=own.cpus,
        uris=("a",),
        failed=0,
        load_s=5,
        row_bytes=100,
        video_s=36,
        dense=2,
        **spent,
    )
    return predict(probe, asked, nodes, Price(1.0, 10.0))


@pytest.mark.parametrize("stage", ["extract", "score"])
@pytest.mark.parametrize("count", [1, 2, 10])
def test_equal_nodes_share_the_work(stage: Stage, count: int) -> None:
    found = predicted(stage, FOUR, [FOUR] * count)
    assert found["seconds_a_video"] == pytest.approx(0.5 / count, abs=1e-4)
    seconds = 10_000 * 0.5 / count + STARTUP_S + 5
    assert found["wall_seconds"] == pytest.approx(seconds, abs=0.1)
    assert found["cpu_hours"] == pytest.approx(seconds * 4 * count / 3600, rel=1e-3)
    assert (found["nodes"], found["cpus"], found["gpus"]) == (count, 4.0 * count, 0)
    assert (found["video_hours"], found["bytes_out"]) == (100.0, 1_000_000)
    assert found["cost"]["per_video_hour"] == pytest.approx(found["cpu_hours"] / 100, rel=1e-3)


def test_a_cluster_without_nodes_needs_to_be_told_what_they_are_like() -> None:
    with pytest.raises(RunError, match=r"resources.node_types names none; set it to the nodes"):
        check_known(Cluster((Node(0),), grows=True))
    check_known(Cluster((Node(0),), (Node(8, count=2),), grows=True))


def test_few_videos_do_not_use_many_nodes() -> None:
    assert predicted("extract", FOUR, [FOUR] * 100, videos=8)["seconds_a_video"] == 0.25


@pytest.mark.parametrize(
    ("decode_s", "network_s", "speed"),
    [(0.1, 1.0, 1.0), (8.0, 0.1, 3.0)],
    ids=["the GPU limits", "decoding limits"],
)
def test_more_cpu_nodes_help_a_gpu_only_if_decoding_limits(
    decode_s: float, network_s: float, speed: float
) -> None:
    spent = {"decode_s": decode_s, "network_s": network_s}
    alone = predicted("extract", GPU, [GPU], **spent)["seconds_a_video"]
    found = predicted("extract", GPU, [GPU, Node(8), Node(8)], **spent)
    assert alone / found["seconds_a_video"] == pytest.approx(speed, rel=0.1)
    assert found["gpus"] == 1
    assert found["gpu_hours"] > 0


def test_a_probe_without_a_good_video_scales_with_the_gpus() -> None:
    found = predicted("extract", GPU, [GPU] * 2, decode_s=0.0, network_s=0.0)
    assert found["seconds_a_video"] == 0.25


def test_a_server_limits_the_run_and_costs_tokens() -> None:
    sets = (
        *("recognizer.kind=openai", "recognizer.url=http://host/v1", "recognizer.price_in=2"),
        *("recognizer.price_out=10", "recognizer.max_concurrent=4"),
    )
    asked: dict[str, Any] = {"requests_s": 6.0, "tokens": (900.0, 10.0), "spent": (14400.0, 160.0)}
    found = predicted("score", FOUR, [FOUR] * 10, sets=sets, **asked)
    assert found["seconds_a_video"] == 1.5  # a turn at the server of 6 s, four at a time
    assert (found["tokens_in"], found["tokens_out"]) == (9_000_000, 100_000)
    assert (found["probed_tokens_in"], found["probed_tokens_out"]) == (14400, 160)
    assert found["cost"]["tokens"] == 19.0
    assert found["cost"]["total"] == pytest.approx(19.0 + found["cpu_hours"], rel=1e-3)
    assert found["cost"]["dense_total"] == pytest.approx(2 * found["cost"]["total"], rel=1e-3)
    text = estimate_text(from_record(Estimate, found, videos=10_000, inputs=10_000, bytes_in=0))
    assert "; 9000000 tokens sent, 100000 received; cost " in text
    assert "of which tokens 19)" in text
    assert "the probe itself asked the server: 14400 tokens sent, 160 received" in text


@pytest.mark.parametrize(
    ("nodes", "limit", "in_flight"),
    [(1, 8, 8), (2, 8, 8), (5, 8, 20), (1, 10, 8), (1, 1000, 64), (2, 1000, 128)],
    ids=["one node", "two nodes", "one a worker", "equal shares", "all frames", "on two nodes"],
)
def test_a_server_answers_an_extraction_no_faster_on_more_nodes(
    nodes: int, limit: int, in_flight: int
) -> None:
    """The workers, four on each node, share `max_concurrent`, but each has at least one request."""
    sets = (
        *("recognizer.kind=openai", "recognizer.url=http://host/v1", "decode.num_frames=16"),
        *("resources.gpus=0", f"recognizer.max_concurrent={limit}"),
    )
    alone = predicted("extract", FOUR, [FOUR] * nodes, sets=sets)
    found = predicted("extract", FOUR, [FOUR] * nodes, sets=sets, requests_s=640.0)
    assert found["workers"] == 4 * nodes
    waiting = found["seconds_a_video"] - alone["seconds_a_video"]
    assert waiting == pytest.approx(640 / in_flight, abs=1e-3)


def test_what_a_server_took_for_rows_of_an_extraction_and_of_scoring() -> None:
    asked = [{"_requests_s": 8.0, "_waited_s": 2.0}, {"_requests_s": 4.0, "_waited_s": 1.0}, {}]
    assert _server_seconds(asked) == (4.0, 1.0)
    assert _server_seconds([{"recognize_ms": 3000.0}, {"recognize_ms": None}]) == (1.5, 1.5)
