"""The graph as its callers see it, without Ray's cluster.

Its stages answer, are slow, die or are of another version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from tsq_ray.config import load_config
from tsq_ray.decode import VideoSource
from tsq_ray.rows import Answer
from tsq_ray.serving import graph as module
from tsq_ray.serving.graph import (
    Busy,
    Graph,
    InputLost,
    StageResult,
    TimeLimits,
    UploadOutOfReach,
    Video,
    WrongVersion,
    graph_version,
    model_of,
)
from tsq_ray.serving.requests.uploads import Upload

VIDEO = Video(VideoSource("/v/1.mp4"), "name")
ANSWER = Answer(columns={"status": "ok"}, version="one")


class Response:
    """The return value of a handle: awaited once, or cancelled."""

    def __init__(self, work: Callable[[], Any], seconds: float) -> None:
        self.work, self.seconds, self.cancelled = work, seconds, False

    def __await__(self) -> Any:
        yield from asyncio.sleep(self.seconds).__await__()
        return self.work()

    def cancel(self) -> None:
        self.cancelled = True


class Stage:
    """A deployment's handle, which is also that of `version`: each call gets the next of these
    results; the last one repeats."""

    def __init__(self, *results: Any, seconds: float = 0.0) -> None:
        self.results, self.seconds = list(results), seconds
        self.calls: list[tuple[Any, ...]] = []
        self.responses: list[Response] = []
        self.version = self

    def remote(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]

        def work() -> Any:
            if isinstance(result, Exception):
                raise result
            return result

        self.responses.append(Response(work, self.seconds))
        return self.responses[-1]


def stages(**more: Stage) -> dict[str, Any]:
    made = {
        "decoder": Stage(StageResult("frames", "one")),
        "sampler": Stage(StageResult("chosen", "one")),
        "recognizer": Stage(ANSWER),
    }
    return made | more


def score(parts: dict[str, Any], limits: TimeLimits | None = None) -> Answer:
    return asyncio.run(Graph(**parts, limits=limits or TimeLimits(5, 5, 20, 5)).score(VIDEO))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.001)


def test_each_stage_gets_what_the_one_before_returned() -> None:
    parts = stages()
    assert score(parts) is ANSWER
    assert parts["decoder"].calls == [(VIDEO,)]
    assert parts["sampler"].calls == [(VIDEO, StageResult("frames", "one"))]
    assert parts["recognizer"].calls == [(VIDEO, StageResult("chosen", "one"))]


@pytest.mark.parametrize(
    "lost",
    [ActorDiedError(), InputLost("ObjectLostError"), WrongVersion("two was asked for"), Busy("32")],
    ids=["dead", "lost", "version", "busy"],
)
@pytest.mark.parametrize("name", ["decoder", "sampler", "recognizer"])
def test_lost_work_is_repeated_from_the_start(name: str, lost: Exception) -> None:
    parts = stages()
    parts[name].results.insert(0, lost)
    assert score(parts) is ANSWER
    assert len(parts["decoder"].calls) == 2


class Kept(Upload):
    """An upload whose references are plain objects."""

    async def in_object_store(self) -> Upload:
        return replace(self, chunks=("reference",))


def test_an_upload_out_of_reach_is_sent_again_with_its_content() -> None:
    """Once; then the node that holds it is waited for."""
    parts, lost = stages(), UploadOutOfReach("TaskUnschedulableError")
    parts["decoder"].results[:0] = [lost, lost]
    video = replace(VIDEO, upload=Kept("node", "/proc/1/fd/9", 9, "hash", "a.mp4"))
    graph = Graph(**parts, limits=TimeLimits(5, 5, 20, 5))
    assert asyncio.run(graph.score(video)) is ANSWER
    sent = [call[0].upload for call in parts["decoder"].calls]
    assert [upload.chunks for upload in sent] == [(), ("reference",), ("reference",)]


def test_an_answer_of_another_version_is_not_accepted() -> None:
    parts = stages(decoder=Stage(StageResult("old", "one"), StageResult("frames", "two")))
    graph = Graph(**parts, limits=TimeLimits(5, 5, 20, 5), version="two")
    assert asyncio.run(graph.score(VIDEO)) is ANSWER
    assert parts["sampler"].calls == [(VIDEO, StageResult("frames", "two"))]


def test_a_stage_that_stays_down_makes_the_video_unavailable() -> None:
    answer = score(stages(sampler=Stage(ActorDiedError())), TimeLimits(5, 5, 0.2, 5))
    assert answer.error is not None
    assert answer.error.error_type == "unavailable"


@pytest.mark.parametrize("error", [ValueError("a defect"), TimeoutError("a defect's socket")])
def test_another_error_is_raised_immediately(error: Exception) -> None:
    parts = stages(sampler=Stage(error))
    with pytest.raises(type(error), match="a defect"):
        score(parts)
    assert len(parts["decoder"].calls) == 1


def test_a_slow_hop_is_cancelled_and_its_replica_counts_as_unavailable() -> None:
    parts = stages(recognizer=Stage(ANSWER, seconds=10))
    answer = score(parts, TimeLimits(5, 0.05, 0.3, 0.05))
    assert answer.error is not None
    assert answer.error.error_type == "unavailable"
    assert all(response.cancelled for response in parts["recognizer"].responses)
    assert not any(response.cancelled for response in parts["sampler"].responses)


def test_a_caller_that_gives_up_cancels_the_hop() -> None:
    parts = stages(sampler=Stage(StageResult("chosen", "one"), seconds=10))

    async def run() -> None:
        async with asyncio.timeout(0.1):
            await Graph(**parts, limits=TimeLimits(5, 5, 20, 5)).score(VIDEO)

    with pytest.raises(TimeoutError):
        asyncio.run(run())
    assert [response.cancelled for response in parts["sampler"].responses] == [True]
    assert parts["recognizer"].calls == []


def test_a_stage_that_does_not_answer_a_ping_is_silent() -> None:
    parts = stages(sampler=Stage("one", seconds=10), recognizer=Stage(ActorDiedError()))
    graph = Graph(**parts, limits=TimeLimits(5, 5, 20, 5))
    asyncio.run(graph.ping(0.1))
    assert {name: graph.silent_s(name) < 5 for name in parts} == {
        "decoder": True,
        "sampler": False,
        "recognizer": False,
    }
    assert parts["sampler"].responses[0].cancelled


@pytest.mark.parametrize(
    ("setting", "same"),
    [
        ("sampler.budget=3", False),
        ("decode.num_frames=9", False),
        ("resources.precision=bf16", False),
        ("resources.resize=device", False),
        ("resources.workers=3", True),
        ("serve.batch_size=3", True),
    ],
)
def test_a_version_is_the_bundle_and_what_changes_answers(setting: str, same: bool) -> None:
    plain = graph_version("a" * 64, load_config(None, []))
    assert (graph_version("a" * 64, load_config(None, [setting])) == plain) == same
    assert graph_version("b" * 64, load_config(None, [])) != plain
    assert model_of(plain) == "a" * 64
