"""`tsq evaluate` on a full cluster: its trainings are Ray tasks, which it counts itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.evaluate import make_case

from tsq_ray.errors import RunFailed
from tsq_ray.evaluation import bench as bench_module
from tsq_ray.evaluation import evaluate, evaluation_config
from tsq_ray.evaluation.bench import Bench, _Look, train_all
from tsq_ray.evaluation.store import Store
from tsq_ray.evaluation.videos import load_features
from tsq_ray.runs.lease import Lease
from tsq_ray.runtime import progress, usage, waiting
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.session import Session
from tsq_ray.summaries import evaluation_text


class _RayError(Exception):
    pass


class FullCluster:
    """What the evaluation calls of Ray, on a cluster where no task finds a place."""

    exceptions = SimpleNamespace(RayError=_RayError)

    def __init__(self) -> None:
        self.now = 0.0
        self.begun: set[str] = set()
        self.is_up = True

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Any:
        return lambda function: SimpleNamespace(remote=lambda *arguments: object())

    def wait(self, pending: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.now += timeout
        if self.now > 60:
            raise TimeoutError("a minute has passed")
        return [], pending

    def get(self, value: Any, timeout: float) -> Any:
        if not self.is_up:
            raise _RayError
        return value

    def counter(self, kind: type | None = None) -> Any:
        return SimpleNamespace(get=SimpleNamespace(remote=lambda: set(self.begun)))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FullCluster:
    ray = FullCluster()

    @contextlib.contextmanager
    def connect(session: Session) -> Iterator[FullCluster]:
        yield ray

    @contextlib.contextmanager
    def observer(*arguments: Any) -> Iterator[Any]:
        yield SimpleNamespace(observe=lambda done, watch: None)

    pool = SimpleNamespace(cpus=1.0, memory=0.0)
    monkeypatch.setattr(bench_module.cluster, "connect", connect)
    monkeypatch.setattr(bench_module.cluster, "lay_out", lambda *arguments: {"training": pool})
    monkeypatch.setattr(bench_module, "Observer", observer)
    monkeypatch.setattr(progress, "start_counts", ray.counter)
    monkeypatch.setattr(usage, "read_status", lambda ray: "status")
    monkeypatch.setattr(usage, "num_demanded", lambda status: 1000)
    monkeypatch.setattr(usage, "facts", lambda ray, status: ["free 0 of 2 CPU"])
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: ray.now))
    return ray


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    case = make_case(tmp_path)
    features = load_features(case.features, case.bundle, None)
    config = evaluation_config(case.model, None, ["train.modules=visual"])
    return Bench(case.bundle, features, config, None, Store(str(tmp_path / "out"), {}))


def train(bench: Bench, wait_s: float) -> None:
    specs = [bench.scsampler(0), bench.scsampler(1)]
    with Lease(bench.store.folder) as lease:
        train_all(bench, specs, Session(wait_s=wait_s), lease, lambda: None)


def test_an_evaluation_waits_for_room_only_as_long_as_it_may(
    ray: FullCluster, bench: Bench
) -> None:
    gave_up = r"^evaluate: waiting for 4 s: free 0 of 2 CPU; gave up after --wait-s 4; run the same"
    with pytest.raises(RunFailed, match=gave_up):
        train(bench, wait_s=4)


def test_an_evaluation_with_a_training_at_work_does_not_wait(
    ray: FullCluster, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    ray.begun.add(bench.store.key(bench.scsampler(1)))
    with pytest.raises(TimeoutError, match="a minute has passed"):
        train(bench, wait_s=4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluate: no progress after 4 s: at work: 1 x training"


def test_trainings_that_have_begun_are_remembered(ray: FullCluster) -> None:
    """The actor that they report to forgets them if it is restarted."""
    look = _Look(ray, ray.counter(), lambda: {"a", "b"})
    ray.begun.add("a")
    assert look().running == {"training": 1}
    ray.begun.clear()
    assert look().running == {"training": 1}
    ray.is_up = False
    assert (look().running, look().lacking) == ({}, {})


class LosingCluster(FullCluster):
    """A cluster that does each training in this process, and loses a node meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names = ["kept", "lost"]

    def remote(self, **options: Any) -> Any:
        return lambda function: SimpleNamespace(remote=partial(partial, function))

    def wait(self, pending: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.names = ["kept"]
        return pending, []

    def get(self, value: Any, timeout: float = 0.0) -> Any:
        return value()

    def counter(self, kind: type | None = None) -> Any:
        return SimpleNamespace(add=SimpleNamespace(remote=self.begun.add))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in self.names]


def test_the_summary_of_an_evaluation_says_what_happened(
    ray: FullCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case, losing = make_case(tmp_path), LosingCluster()
    monkeypatch.setattr(
        bench_module.cluster, "connect", lambda session: contextlib.nullcontext(losing)
    )
    monkeypatch.setattr(bench_module, "Observer", Observer)
    monkeypatch.setattr(progress, "start_counts", losing.counter)
    monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", False)
    sets = ["train.modules=visual", "train.epochs=1", "evaluate.seeds=[0]", "evaluate.budgets=[1]"]
    config = evaluation_config(case.model, None, sets)
    arguments = ([case.features], case.model, str(tmp_path / "out"), config)
    summary = evaluate(*arguments, tables=["table9"])
    assert summary.trained_now > 0
    assert summary.happened == {"nodes_lost": 1}
    assert "in this run: nodes lost: 1" in evaluation_text(summary).splitlines()
    again = evaluate(*arguments, tables=["table9"])
    assert (again.trained_now, again.happened) == (0, {})
    assert "in this run" not in evaluation_text(again)
