"""What a run waits for, when it says so, and what it says while its actors work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tsq_ray.errors import RunFailed
from tsq_ray.runtime import usage, waiting
from tsq_ray.runtime.waiting import Seen, Watch, lacking, look_at_tasks, num_pending, running

MINE, OTHER = "01000000", "02000000"


def actor(name: str, state: str, job: str = MINE) -> dict[str, Any]:
    return {"ActorClassName": name, "State": state, "JobID": job}


@pytest.mark.parametrize(
    ("actors", "expected"),
    [
        ([], {}),
        ([actor("Worker", "PENDING_CREATION"), actor("Worker", "PENDING_CREATION")], {"Worker": 2}),
        ([actor("Worker", "PENDING_CREATION"), actor("Worker", "ALIVE")], {}),
        ([actor("Worker", "RESTARTING"), actor("Writer", "ALIVE")], {"Worker": 1}),
        ([actor("Worker", "DEAD")], {}),
        ([actor("Worker", "PENDING_CREATION", OTHER)], {}),
        ([actor("Worker", "ALIVE", OTHER), actor("Worker", "PENDING_CREATION")], {"Worker": 1}),
        (
            [actor("ServeReplica:tsq-score-1:Decoder", "PENDING_CREATION", OTHER)],
            {"ServeReplica:tsq-score-1:Decoder": 1},
        ),
        ([actor("ServeReplica:tsq-score-2:Decoder", "PENDING_CREATION", OTHER)], {}),
        ([actor("ServeReplica:tsq-score-12:Decoder", "PENDING_CREATION", OTHER)], {}),
    ],
    ids=[
        "none",
        "two",
        "one runs",
        "lost",
        "dead",
        "another's",
        "another's runs",
        "replicas",
        "another's replicas",
        "a longer name",
    ],
)
def test_actors(actors: list[dict[str, Any]], expected: dict[str, int]) -> None:
    assert lacking(actors, {}, MINE, "tsq-score-1") == expected


@pytest.mark.parametrize(
    ("job", "state", "expected"),
    [(MINE, "PENDING", {"placement group": 1}), (MINE, "CREATED", {}), (OTHER, "PENDING", {})],
)
def test_placement_groups(job: str, state: str, expected: dict[str, int]) -> None:
    assert lacking([], {f"{'ab' * 14}{job}": {"state": state}}, MINE) == expected


def test_pending_actors_include_those_created_for_nodes_that_may_join() -> None:
    actors = [
        *(actor("Decoder", "ALIVE"), actor("Decoder", "PENDING_CREATION")),
        *(actor("Encoder", "PENDING_CREATION"), actor("Encoder", "RESTARTING")),
        *(actor("Encoder", "DEAD"), actor("Encoder", "PENDING_CREATION", OTHER)),
    ]
    assert num_pending(actors, {f"group{MINE}": {"state": "PENDING"}}, MINE) == 4


def test_running_actors_are_the_run_s_own_without_counters() -> None:
    actors = [
        *(actor("Worker", "ALIVE"), actor("Worker", "ALIVE"), actor("Worker", "RESTARTING")),
        *(actor("Counts", "ALIVE"), actor("ServeController", "ALIVE"), actor("Writer", "DEAD")),
        *(actor("Worker", "ALIVE", OTHER), actor("ServeReplica:mine:Decoder", "ALIVE", OTHER)),
    ]
    assert running(actors, MINE, "mine") == {"Worker": 2, "ServeReplica:mine:Decoder": 1}


FULL = Seen(Counter(Worker=2), Counter(), False, lambda: "free 0 of 8 CPU")
LOADING = Seen(Counter(Worker=2), Counter(), True)
WORKING = Seen(Counter(), Counter(Worker=2, Writer=1))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watch]:
    """watch(look, done, wait_s): watch a run for a minute, given both at each second."""

    def run(
        look: Callable[[float], Seen],
        done: Callable[[float], int],
        wait_s: float,
        seconds: int = 61,
    ) -> Watch:
        now = [1000.0]
        monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
        watched = Watch(None, "extract", wait_s, look=lambda: look(now[0] - 1000))
        for second in range(seconds):
            now[0] = 1000.0 + second
            watched.tick(done(second))
        return watched

    return run


@pytest.mark.parametrize(
    ("seen", "lines"),
    [
        (
            FULL,
            [f"extract: waiting for {s} s: free 0 of 8 CPU" for s in (10, 25, 40, 55)],
        ),
        (
            LOADING,
            [
                f"extract: still starting after {s} s: Worker (loading what they need)"
                for s in (10, 25, 40, 55)
            ],
        ),
        (
            WORKING,
            [
                f"extract: no progress after {s} s: at work: 2 x Worker, 1 x Writer"
                for s in (10, 25, 40, 55)
            ],
        ),
        (Seen(Counter(), Counter()), []),
    ],
    ids=["no room", "loading", "working", "nothing yet"],
)
def test_from_the_tenth_second_on_a_stalled_run_says_why_every_15_s(
    watch: Callable[..., Watch], seen: Seen, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    watch(lambda second: seen, lambda second: 0, 0)
    assert capsys.readouterr().err.splitlines() == lines


def test_a_run_with_long_pauses_is_reported_only_after_twice_the_longest(
    watch: Callable[..., Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    watch(lambda second: WORKING, lambda second: 1 if second < 14 else 2, 0)
    assert capsys.readouterr().err.splitlines() == [
        f"extract: no progress after {s} s: at work: 2 x Worker, 1 x Writer" for s in (10, 40)
    ]


def test_a_long_wait_does_not_hide_a_later_stall(
    watch: Callable[..., Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    watch(
        lambda second: FULL if second < 600 else WORKING,
        lambda second: 1 if second < 600 else 2,
        0,
        seconds=671,
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "no progress" in line]
    assert lines == ["extract: no progress after 70 s: at work: 2 x Worker, 1 x Writer"]


def test_a_run_that_makes_progress_says_nothing(
    watch: Callable[..., Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    watched = watch(lambda second: FULL, lambda second: second // 9, 20)
    assert capsys.readouterr().err == ""
    assert watched.waited_s == 0


def test_the_seconds_of_a_wait_are_kept(watch: Callable[..., Watch]) -> None:
    watched = watch(lambda second: FULL if second < 30 else WORKING, lambda second: 0, 0)
    assert (watched.waited_s, watched.waiting_s) == (40, 0), "until it was seen to have ended"


def test_a_run_waits_for_room_only_as_long_as_it_may(watch: Callable[..., Watch]) -> None:
    with pytest.raises(
        RunFailed, match=r"waiting for 32 s: free .* gave up after --wait-s 32; run"
    ):
        watch(lambda second: FULL, lambda second: 0, 32)
    watch(lambda second: WORKING, lambda second: 0, 32)
    watch(lambda second: LOADING, lambda second: 0, 32)


def test_what_the_autoscaler_says_is_named() -> None:
    from ray.autoscaler.v2 import schema

    bundle = schema.ResourceRequestByCount({"CPU": 1.0, "memory": 2.0 * 2**30}, 3)
    group = schema.ResourceRequestByCount({"GPU": 1.0, "CPU": 2.0}, 2)
    summary = schema.ResourceDemandSummary(
        ray_task_actor_demand=[schema.RayTaskActorDemand([bundle])],
        placement_group_demand=[schema.PlacementGroupResourceDemand([group], "STRICT_SPREAD")],
    )
    pending, failed = schema.LaunchRequest.Status.PENDING, schema.LaunchRequest.Status.FAILED
    launches = [schema.LaunchRequest("m7i", "cpu", 2, pending, 0)]
    broken = [schema.LaunchRequest("g6", "gpu", 1, failed, 0, details="no capacity")]
    status = schema.ClusterStatus(
        pending_launches=launches, failed_launches=broken, resource_demands=summary
    )
    assert usage.num_demanded(status) == 4
    assert usage.demands(status) == "3 x (1 CPU, 2 GiB), 2 x (2 CPU, 1 GPU)"
    assert usage.launches(status) == "2 x cpu starting, gpu failed to start (no capacity)"
    assert usage.launches(schema.ClusterStatus()) == "no node is starting"


@pytest.mark.parametrize(
    ("waiting_for", "at_work", "demanded", "expected"),
    [
        (3, 0, 3, (Counter(training=3), Counter(), False)),
        (3, 0, 1, (Counter(training=3), Counter(), True)),
        (2, 1, 2, (Counter(), Counter(training=1), False)),
        (0, 0, 0, (Counter(), Counter(), False)),
    ],
    ids=["no room", "starting", "one runs", "all done"],
)
def test_tasks(
    monkeypatch: pytest.MonkeyPatch,
    waiting_for: int,
    at_work: int,
    demanded: int,
    expected: tuple[Counter[str], Counter[str], bool],
) -> None:
    monkeypatch.setattr(usage, "read_status", lambda ray: "status")
    monkeypatch.setattr(usage, "num_demanded", lambda status: demanded)
    seen = look_at_tasks(None, "training", waiting_for, at_work)
    assert (seen.lacking, seen.running, seen.loading) == expected
