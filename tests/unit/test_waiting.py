"""Which of a cluster's actors a run waits for, and which belong to other jobs."""

from __future__ import annotations

from typing import Any

import pytest

from tsq_ray.runtime.waiting import lacking

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
