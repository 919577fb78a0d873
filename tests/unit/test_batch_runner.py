"""Batches without a server: keys, restarts, look-ups.

No video passes a prefix here, so that every row is `access_denied` and no graph is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.bundle import make_bundle

from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.manifest import build_manifest
from tsq_ray.runs.lease import Lease
from tsq_ray.runs.tables import read_predictions
from tsq_ray.runs.verify import verify
from tsq_ray.serving import batch_runner
from tsq_ray.serving.batch_folders import BatchFolders, BatchInput, Claim
from tsq_ray.serving.batch_runner import BatchRunner
from tsq_ray.serving.batches import in_time
from tsq_ray.serving.graph import Graph, TimeLimits
from tsq_ray.serving.requests.models import (
    Batch,
    BatchLine,
    BatchOptions,
    BatchRequest,
    LinesOptions,
)
from tsq_ray.serving.requests.parse import validate
from tsq_ray.serving.requests.problems import RequestError

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


# ----------------------------------------------------------------------------------- one key, one
# batch


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
    claim = Claim.of(lost, [BatchOptions(), *LINES])
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


# ----------------------------------------------------------------------------------------- restarts


@contextlib.contextmanager
def storage_gone(folder: Path) -> Iterator[None]:
    """Nothing below the folder can be looked up, read or written."""
    away = folder.with_name("away")
    folder.rename(away)
    folder.symlink_to(folder)  # a loop, which no call follows
    try:
        yield
    finally:
        folder.unlink()
        away.rename(folder)


def unfinished(folders: BatchFolders, number: int) -> Batch:
    """A batch of lines that was written by an endpoint that has ended."""
    name = f"batch_{number:014d}_aaaaaaaaaaaa"
    card = Batch(
        id=name,
        status="in_progress",
        model="",
        input_uri=folders.at(name, "manifest.parquet"),
        predictions_uri=folders.at(name, "predictions"),
        created_at=1,
    )
    folders.create(card, BatchInput(manifest=card.input_uri, lines=LINES))
    return card


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What batches log, while they wait only a moment between tries."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(batch_runner, "_WAITS_S", (0.05,))
    logger = logging.getLogger("ray.serve")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_batches_resume_once_storage_answers(
    start: Start, tmp_path: Path, warnings: list[str]
) -> None:
    folders = BatchFolders(f"{tmp_path}/batches")
    cards = [unfinished(folders, number) for number in (1, 2)]

    async def work() -> None:
        with storage_gone(tmp_path / "batches"):
            runner = start()
            resumed = asyncio.create_task(runner.resume())
            await until(lambda: len(warnings) > 1)
        await asyncio.wait_for(resumed, LIMIT_S)
        for card in cards:
            check_rows(await ended(runner, card.id))
        assert "cannot be listed" in warnings[0]

    asyncio.run(work())


def test_a_damaged_batch_does_not_keep_the_others(
    start: Start, tmp_path: Path, warnings: list[str]
) -> None:
    folders = BatchFolders(f"{tmp_path}/batches")
    cards = [unfinished(folders, number) for number in (1, 2, 3)]
    Path(folders.at(cards[0].id, "batch.json")).write_text("{")
    Path(folders.at(cards[1].id, "input.json")).unlink()

    async def work() -> None:
        runner = start()
        resumed = asyncio.create_task(runner.resume())
        check_rows(await ended(runner, cards[2].id))
        failed = await ended(runner, cards[1].id)
        assert (failed.status, "no such file" in failed.errors[0]) == ("failed", True)
        assert f"batch {cards[0].id} cannot be read" in warnings[0]
        folders.save(cards[0])
        await asyncio.wait_for(resumed, LIMIT_S)
        check_rows(await ended(runner, cards[0].id))

    asyncio.run(work())


def test_a_batch_that_was_not_resumed_yet_is_cancelled(start: Start, tmp_path: Path) -> None:
    card = unfinished(BatchFolders(f"{tmp_path}/batches"), 1)

    async def work() -> None:
        runner = start()
        assert (await runner.cancel(card.id)).status in ("cancelling", "cancelled")
        assert (await ended(runner, card.id)).status == "cancelled"
        assert (await start().cancel(card.id)).status == "cancelled"

    asyncio.run(work())


def test_a_batch_that_another_version_began_gets_a_folder_of_its_own(
    start: Start, tmp_path: Path
) -> None:
    folders = BatchFolders(f"{tmp_path}/batches")
    card = unfinished(folders, 1)
    folders.save_input(card.id, folders.input(card.id).model_copy(update={"version": "old+1"}))
    mark = Path(card.predictions_uri, "old.txt")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()

    async def work() -> Batch:
        runner = start()
        await runner.resume()
        return await ended(runner, card.id)

    found = asyncio.run(work())
    check_rows(found)
    assert found.predictions_uri.startswith(f"{card.predictions_uri}-")
    assert found.model != card.model
    assert mark.exists()
    lines = Path(folders.at(card.id, "errors.jsonl")).read_text().splitlines()
    assert {json.loads(line)["model"] for line in lines} == {found.model}


@pytest.mark.parametrize("found", ["completed", "cancelling"])
def test_what_the_old_replica_does_to_a_batch_meanwhile_counts(
    found: Any, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "_BUSY_WAIT_S", 0.05)
    folders = BatchFolders(f"{tmp_path}/batches")
    card = unfinished(folders, 1)

    async def work() -> Batch:
        runner = start()
        with Lease(card.predictions_uri):
            resumed = asyncio.create_task(runner.resume())
            await asyncio.sleep(0.3)
            assert not (await runner.get(card.id)).has_ended
            folders.save(card.model_copy(update={"status": found, f"{found}_at": 7}))
        await resumed
        return await ended(runner, card.id)

    last = asyncio.run(work())
    assert last.status == {"cancelling": "cancelled"}.get(found, found)
    assert found == "cancelling" or last.completed_at == 7
    assert not list(Path(card.predictions_uri).glob("part-*"))


def test_the_end_of_a_batch_is_written_once_storage_takes_it(
    start: Start, tmp_path: Path, warnings: list[str]
) -> None:
    async def work() -> None:
        runner = start()
        batch = await runner.create(None, LINES, None)
        with storage_gone(tmp_path / "batches"):
            await until(lambda: any("the end of batch" in line for line in warnings))
        assert (await ended(runner, batch.id)).status == "failed"
        await until(lambda: BatchFolders(f"{tmp_path}/batches").card(batch.id).has_ended)

    asyncio.run(work())


# ------------------------------------------------------------------------------------- web servers


class Web(http.server.BaseHTTPRequestHandler):
    """POST is recorded. /manifest, /move to /secret, /silent (never answers), a file of 7 bytes for
    any other name."""

    manifest = b""
    asked: ClassVar[list[str]] = []
    released = threading.Event()
    calls: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.calls.append({"id": self.headers["webhook-id"], **call})
        self.send_response(204)
        self.end_headers()

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.asked.append(name)
        if name == "silent":
            self.released.wait(60)
            return
        content = self.manifest if name == "manifest" else b"a video"
        self.send_response(302 if name == "move" else 200)
        self.send_header("Location", "/secret")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Web.released.clear()
        Web.asked.clear()
        Web.calls.clear()
        yield f"http://127.0.0.1:{server.server_port}/files"
        Web.released.set()
        server.shutdown()


def named(web: str) -> str:
    """The setting that names the host of a web server, but none of its files."""
    return f'serve.allowed_uri_prefixes=["{web}/none"]'


def test_a_look_up_follows_no_redirect_and_asks_no_private_address(start: Start, web: str) -> None:
    lines = [BatchLine(custom_id=name, uri=f"{web}/{name}") for name in ("move", "a.mp4")]

    async def work() -> dict[str, int]:
        runner = start(named(web))
        batch = await ended(runner, (await runner.create(None, lines, None)).id)
        check_rows(batch, lines)
        rows = read_predictions(batch.predictions_uri)
        return dict(zip(rows["uri"].to_pylist(), rows["size_bytes"].to_pylist(), strict=True))

    assert asyncio.run(work()) == {f"{web}/move": 0, f"{web}/a.mp4": 7}
    assert "secret" not in Web.asked

    async def private() -> None:
        runner = start()
        local = [BatchLine(custom_id="a", uri=f"{web}/a.mp4".replace("127.0.0.1", "localhost"))]
        batch = await ended(runner, (await runner.create(None, local, None)).id)
        check_rows(batch, local)

    Web.asked.clear()
    asyncio.run(private())
    assert Web.asked == []


def test_a_manifest_on_a_web_server(start: Start, web: str, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"x")
    build_manifest([str(tmp_path / "videos")], str(tmp_path / "manifest.parquet"))
    Web.manifest = (tmp_path / "manifest.parquet").read_bytes()

    async def work(name: str, *settings: str) -> Batch:
        runner = start(*settings)
        place = web if settings else web.replace("127.0.0.1", "localhost")
        asked = BatchRequest(manifest=f"{place}/{name}?signature=SECRET")
        return await ended(runner, (await runner.create(asked, [], None)).id)

    uri = str(tmp_path / "videos" / "a.mp4")
    check_rows(asyncio.run(work("manifest", named(web))), [BatchLine(custom_id="a", uri=uri)])
    for name, settings, message in (
        ("move", (named(web),), "redirects"),
        ("other", (named(web),), f"manifest {web}/other"),
        ("manifest", (), "its address is not public"),
    ):
        batch = asyncio.run(work(name, *settings))
        assert batch.status == "failed"
        assert re.search(message, batch.errors[0]), batch.errors
        assert "SECRET" not in str(batch)
    assert "secret" not in Web.asked


def test_silent_sources_keep_no_other_batch(start: Start, web: str) -> None:
    silent = [BatchLine(custom_id=str(n), uri=f"{web}/{n}/silent") for n in range(40)]

    async def work() -> None:
        runner = start(named(web), "serve.fetch_timeout_s=600")
        slow = await runner.create(None, silent, None)
        await until(lambda: len(Web.asked) > 7)
        check_rows(await ended(runner, (await runner.create(None, LINES, None)).id))
        web_lines = [BatchLine(custom_id="a", uri=f"{web}/a.mp4")]
        fast = await runner.create(None, web_lines, None)
        check_rows(await ended(runner, fast.id), web_lines)
        assert (await runner.get(slow.id)).status == "validating"
        Web.released.set()
        check_rows(await ended(runner, slow.id), silent)

    asyncio.run(work())


def test_an_answer_about_batches_has_a_time_limit() -> None:
    async def work() -> None:
        assert await in_time(asyncio.sleep(0, "answer"), 5.0) == "answer"
        with pytest.raises(RequestError, match=r"serve.request_timeout_s = 0.1 s") as caught:
            await in_time(asyncio.Event().wait(), 0.1)
        assert caught.value.status == 504

    asyncio.run(work())


def test_a_webhook_is_called_once_also_after_a_restart(
    start: Start, web: str, tmp_path: Path
) -> None:
    hook = f"{web}/hook"
    folders = BatchFolders(f"{tmp_path}/batches")
    before = unfinished(folders, 1)
    folders.create(
        before.model_copy(update={"status": "completed"}), folders.input(before.id), hook
    )
    setting = f'serve.webhook_prefixes=["{web}"]'

    async def work() -> str:
        runner = start(setting)
        await asyncio.gather(runner.resume(), runner.resume())
        options = BatchOptions(webhook=hook, metadata={"team": "a"})
        batch = await ended(runner, (await runner.create(options, LINES, None)).id)
        assert batch.metadata == {"team": "a"}
        await until(lambda: folders.webhook(batch.id) is folders.webhook(before.id) is None)
        await start(setting).resume()
        await asyncio.sleep(0.2)
        return batch.id

    new = asyncio.run(work())
    assert sorted((call["id"], call["type"]) for call in Web.calls) == [
        (before.id, "batch.completed"),
        (new, "batch.completed"),
    ]


def test_options_of_lines_stand_in_the_query() -> None:
    found = validate(LinesOptions, {"metadata": '{"team": "a"}', "webhook": "https://a.example/"})
    assert (found.metadata, found.webhook) == ({"team": "a"}, "https://a.example/")
    assert validate(LinesOptions, {}).metadata == {}
    for metadata, message in (
        ("team", "metadata: Invalid JSON"),
        ('{"team": 1}', "metadata.team: Input should be a valid string"),
        (json.dumps(dict.fromkeys("abcdefghijklmnopq", "")), "metadata: Dictionary should have"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            validate(LinesOptions, {"metadata": metadata})
        assert caught.value.status == 400
