"""Batches without a server: keys, restarts, look-ups.

No video passes a prefix here, so that every row is `access_denied` and no graph is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bundle import make_bundle

from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.runs.tables import read_predictions
from tsq_ray.runs.verify import verify
from tsq_ray.serving.batch_folders import BatchFolders, Claim
from tsq_ray.serving.batches import BatchRunner, _hash_of
from tsq_ray.serving.graph import Graph, TimeLimits
from tsq_ray.serving.requests.models import Batch, BatchLine
from tsq_ray.serving.requests.problems import RequestError

pytestmark = pytest.mark.ray

LIMIT_S = 60.0
LINES = [BatchLine(custom_id=name, uri=f"/nowhere/{name}.mp4") for name in ("a", "b")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle")


Start = Callable[..., BatchRunner]


@pytest.fixture
def start(bundle: str, tmp_path: Path) -> Start:
    """start(setting, ...) -> a runner of the batches below tmp_path/batches."""

    def started(*settings: str) -> BatchRunner:
        config = scoring_config(bundle, None, [f"serve.batches_uri={tmp_path}/batches", *settings])
        return BatchRunner(bundle, config, Graph(None, None, None, TimeLimits.of(config)))

    return started


async def ended(runner: BatchRunner, batch: str) -> Batch:
    """The batch once it has ended."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := await runner.get(batch)).has_ended:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)
    return found


def check_rows(batch: Batch, lines: list[BatchLine] = LINES) -> None:
    """A batch has one row a line, and they add up."""
    assert batch.status == "completed", batch
    assert verify(batch.predictions_uri).problems == ()
    assert sorted(read_predictions(batch.predictions_uri)["uri"].to_pylist()) == sorted(
        line.uri for line in lines
    )


# ----------------------------------------------------------------------------------- one key, one batch


def test_requests_of_one_key_at_the_same_moment_are_one_batch(start: Start) -> None:
    async def work() -> None:
        runner = start()
        made = await asyncio.gather(*(runner.create(None, LINES, "key") for _ in range(4)))
        assert len({batch.id for batch in made}) == 1
        check_rows(await ended(runner, made[0].id))
        assert (await runner.create(None, LINES, "key")).status == "completed"
        assert len((await runner.newest(10, None)).data) == 1
        assert (await runner.create(None, LINES, "another")).id != made[0].id

    asyncio.run(work())


def test_a_key_whose_batch_was_not_written_makes_it(start: Start, tmp_path: Path) -> None:
    lost = "batch_00000000000001_aaaaaaaaaaaa"
    claim = Claim(batch=lost, request=_hash_of(None, LINES))
    assert BatchFolders(f"{tmp_path}/batches").claim("key", claim) == claim

    async def work() -> None:
        runner = start()
        assert (await runner.create(None, LINES, "key")).id == lost
        check_rows(await ended(runner, lost))

    asyncio.run(work())


def test_a_key_of_another_request_is_refused(start: Start) -> None:
    async def work() -> None:
        runner = start()
        batch = await runner.create(None, LINES, "key")
        with pytest.raises(RequestError, match="Idempotency-Key: belongs to another") as caught:
            await runner.create(None, LINES[:1], "key")
        assert caught.value.status == 422
        await ended(runner, batch.id)

    asyncio.run(work())


def test_a_client_that_goes_away_leaves_a_whole_batch(start: Start) -> None:
    async def work() -> None:
        runner = start()
        asked = asyncio.create_task(runner.create(None, LINES, "key"))
        await asyncio.sleep(0)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        check_rows(await ended(runner, (await runner.create(None, LINES, "key")).id))
        assert len((await runner.newest(10, None)).data) == 1

    asyncio.run(work())
