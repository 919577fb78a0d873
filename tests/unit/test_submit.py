"""What `--submit` makes of a command line: files that travel, paths, refusals, the job's name."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import requests
import typer
from aiohttp import web

from tsq_ray.cli import app, main
from tsq_ray.commands.jobs import _check_paths, _Output, _Rewrite
from tsq_ray.config import load_config
from tsq_ray.errors import RunFailed
from tsq_ray.manifest import Manifest, VideoRef, VideoRows, video_id, write_manifest
from tsq_ray.runtime.jobs import Jobs, _Follower


def context(command: str, *argv: str) -> Any:
    group: Any = typer.main.get_command(app)
    return group.commands[command].make_context(command, list(argv))


def rewritten(folder: Path, shared_fs: bool, command: str, *argv: str) -> tuple[list[str], str]:
    (folder / "job").mkdir(exist_ok=True)
    rewrite = _Rewrite(folder / "job", shared_fs)
    found = list(rewrite.arguments(context(command, *argv)))
    return found, rewrite.digest(found)


def write_videos(manifest: Path, *uris: str) -> None:
    rows = VideoRows.of(VideoRef(video_id(uri), uri, 9) for uri in uris)
    write_manifest(Manifest(rows, [], "m", ("s3://b",)), str(manifest))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with small files in it."""
    for name in ("own.toml", "labels.csv"):
        (tmp_path / name).write_text(f"content of {name}")
    write_videos(tmp_path / "m.parquet", "s3://b/a.mp4")
    write_videos(tmp_path / "local.parquet", "/videos/a.mp4", "s3://b/a.mp4")
    (tmp_path / "features").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_small_files_travel_with_the_job(here: Path) -> None:
    argv = ["m.parquet", "--model", "s3://b/model", "--out", "s3://b/out", "--config", "own.toml"]
    options = ["--set", "sampler.budget=3", "--set", "serve.batch_size=2", "--scores", "top"]
    found, _ = rewritten(here, False, "score", *argv, *options, "--limit", "5", "--json")
    assert found == [
        *("inputs/0-m.parquet", "--model", "s3://b/model", "--out", "s3://b/out"),
        *("--config", "inputs/1-own.toml", *options[:4], "--limit", "5", "--scores", "top"),
        "--json",
    ]
    assert (here / "job/inputs/1-own.toml").read_text() == "content of own.toml"


def test_an_option_of_zero_is_passed_on(here: Path) -> None:
    argv = ["s3://b/m", "--model", "s3://b/model", "--out", "s3://b/out", "--max-failed", "0"]
    assert rewritten(here, False, "score", *argv)[0][-2:] == ["--max-failed", "0.0"]


def test_the_options_of_a_prediction_are_passed_on(here: Path) -> None:
    asked = ["--dry-run", "--nodes", "3", "--price", "cpu=1"]
    argv = ["s3://b/m", "--out", "s3://b/out", *asked]
    assert rewritten(here, False, "extract", *argv)[0][3:] == asked
    assert rewritten(here, False, "info", "m.parquet", "--cluster")[0] == [
        *("inputs/0-m.parquet", "--cluster"),
    ]


def test_weights_that_are_no_files_and_absolute_paths_are_passed_on(here: Path) -> None:
    sets = ["encoders.visual.weights=random:3", "recognizer.weights=package:x"]
    _check_paths(load_config(None, [*sets, "encoders.objects.weights=s3://b/w.pth"]), False)
    _check_paths(load_config(None, ["recognizer.weights=/models/w.pth"]), True)


def test_labels_travel_unless_they_are_folders(here: Path) -> None:
    argv = ["s3://b/videos", "--out", "s3://b/m.parquet", "--labels"]
    assert "inputs/0-labels.csv" in rewritten(here, False, "index", *argv, "labels.csv")[0]
    assert "folders" in rewritten(here, False, "index", *argv, "folders")[0]


@pytest.mark.parametrize("shared_fs", [False, True])
def test_class_names_and_annotations_travel(here: Path, shared_fs: bool) -> None:
    for command, *argv, option, file in (
        ("index", "s3://b/v", "--out", "s3://b/m", "--classes", "names.txt"),
        ("evaluate", "s3://b/f", "--model=s3://b/b", "--out=s3://b/e", "--annotations", "a.json"),
    ):
        (here / file).write_text(f"content of {file}")
        found, first = rewritten(here, shared_fs, command, *argv, option, file)
        assert found[found.index(option) + 1] == f"inputs/0-{file}"
        assert (here / f"job/inputs/0-{file}").read_text() == f"content of {file}"
        (here / file).write_text("something else")
        assert first != rewritten(here, shared_fs, command, *argv, option, file)[1]


def test_with_a_shared_file_system_paths_are_absolute(here: Path) -> None:
    found, _ = rewritten(here, True, "train", "features", "--out", "bundle", "--config", "own.toml")
    assert found[:3] == [str(here / "features"), "--out", str(here / "bundle")]
    assert "inputs/0-own.toml" in found


def test_the_job_knows_of_a_shared_file_system(here: Path) -> None:
    """It refuses a local --out otherwise if the cluster has several machines."""
    argv = ["train", "s3://b/features", "--out", "/shared/bundle"]
    assert "--shared-fs" in rewritten(here, True, *argv, "--shared-fs")[0]
    assert "--shared-fs" not in rewritten(here, True, *argv)[0]


def test_the_name_follows_from_the_command_and_the_files(here: Path) -> None:
    argv = ["m.parquet", "--out", "s3://b/out"]

    def digest(*more: str) -> str:
        return rewritten(here, False, "extract", *argv, *more)[1]

    first = digest("--config", "own.toml", "--limit", "3")
    assert first == digest("--limit", "3", "--config", "own.toml", "--address", "http://a:1")
    assert first != digest("--limit", "4", "--config", "own.toml")
    (here / "own.toml").write_text("something else")
    assert first != digest("--config", "own.toml", "--limit", "3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["extract", "m.parquet", "--out", "feat"], "out 'feat' is on this machine"),
        (
            ["extract", "/nowhere/m.parquet", "--out", "s3://b/o"],
            "manifest '/nowhere/m.parquet' is",
        ),
        (["train", "features", "--out", "s3://b/o"], "features 'features' is on this machine"),
        (
            ["extract", "m.parquet", "--out", "s3://b/o", "--set", "encoders.text.weights=/w"],
            "encoders.text.weights = '/w' is on this machine",
        ),
        (
            [
                "extract",
                "m.parquet",
                "--out",
                "s3://b/o",
                "--set",
                "encoders.text.weights=words.txt",
            ],
            "encoders.text.weights = 'words.txt' is on this machine",
        ),
        (
            [
                *("evaluate", "s3://b/p", "--model", "s3://b/m", "--out", "s3://b"),
                *("--set", 'evaluate.word_vectors=["glove.txt"]'),
            ],
            "evaluate.word_vectors = 'glove.txt' is on this machine",
        ),
        (
            ["train", "features", "--out", "o", "--shared-fs", "--set", "recognizer.weights=w.pth"],
            "recognizer.weights = 'w.pth' is relative to this folder",
        ),
        (
            ["extract", "local.parquet", "--out", "s3://b/o"],
            "1 of the 2 videos of {here}/local.parquet are on this machine, where the cluster "
            "cannot see them, for example /videos/a.mp4",
        ),
        (["extract", "m.parquet", "--out", "feat", "--dry-run"], "out 'feat' is on this machine"),
        (["info", "features", "--cluster"], "uri 'features' is on this machine"),
        (["info", "s3://b/features"], "--submit: info runs as a job only with --cluster"),
        (["index", "s3://b/v", "--out", "s3://b/m", "--labels", "no.csv"], "--labels: no file"),
        (
            ["evaluate", "s3://b/p", "--model", "s3://b/m", "--out", "s3://b", "--annotations=no"],
            "--annotations: no file",
        ),
    ],
)
def test_what_the_cluster_cannot_see_is_refused(
    here: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--submit", "--address", "http://127.0.0.1:1"]) == 2
    assert message.format(here=here) in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ("index", "s3://b/v", "--out", "s3://b/m", "--classes", "large"),
        ("index", "s3://b/v", "--out", "s3://b/m", "--labels", "large", "--shared-fs"),
        ("evaluate", "s3://b/f", "--model=s3://b/b", "--out=s3://b/e", "--annotations", "large"),
    ],
    ids=["classes", "labels", "annotations"],
)
def test_a_file_too_large_to_travel_is_refused(
    here: Path, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with (here / "large").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert main([*argv, "--submit", "--address", "http://127.0.0.1:1"]) == 2
    option = next(word for word in ("--classes", "--labels", "--annotations") if word in argv)
    assert capsys.readouterr().err == (
        f"error: {option}: {here}/large is too large to travel with a job (at most 64 MiB); "
        "put it where the cluster can read it\n"
    )
    os.truncate(here / "large", 64 * 2**20)
    shipped, _ = rewritten(here, "--shared-fs" in argv, *argv)
    assert "inputs/0-large" in shipped


def test_a_large_manifest_does_not_travel(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(here / "m.parquet", 64 * 2**20 + 1)
    argv = ["extract", "m.parquet", "--out", "s3://b/o", "--submit"]
    assert main([*argv, "--address", "http://127.0.0.1:1"]) == 2
    assert "manifest 'm.parquet' is on this machine" in capsys.readouterr().err
    assert rewritten(here, True, *argv)[0][0] == str(here / "m.parquet")


class LostConnection:
    """A client of Ray's jobs whose dashboard is gone."""

    def _lost(self, job_id: str) -> None:
        raise requests.ConnectionError("[Errno 111] Connection refused")

    get_job_info = get_job_logs = stop_job = _lost


@pytest.mark.parametrize("command", ["logs", "stop"])
def test_a_lost_connection_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tsq_ray.runtime.jobs._client", lambda *arguments: LostConnection())
    assert main(["jobs", command, "j-1", "--address", "http://head:8265"]) == 1
    assert capsys.readouterr().err == (
        "error: connection to http://head:8265 lost, so nothing is known about job j-1 "
        "([Errno 111] Connection refused); run the same command again\n"
    )
    with pytest.raises(RunFailed, match=r"^connection to http://head:8265 lost, so nothing is"):
        Jobs("http://head:8265").get("j-1")


class YoungCluster:
    """A client of Ray's jobs on a cluster whose agents still start."""

    def __init__(self) -> None:
        self.tries = 0

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, **_: object) -> None:
        self.tries += 1
        if self.tries < 3:
            raise RuntimeError("Request failed with status code 500: No available agent to submit")


def test_a_job_waits_for_a_cluster_that_has_only_just_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster = YoungCluster()
    monkeypatch.setattr("tsq_ray.runtime.jobs._client", lambda *arguments: cluster)
    monkeypatch.setattr("tsq_ray.runtime.jobs._RETRY_S", 0.0)
    assert Jobs("http://head:8265").submit("tsq", ["index"], str(tmp_path)) == ("tsq-1", True)
    monkeypatch.setattr("tsq_ray.runtime.jobs._AGENT_S", -1.0)
    cluster.tries = 0
    with pytest.raises(RunFailed, match="No available agent to submit"):
        Jobs("http://head:8265").submit("tsq", ["index"], str(tmp_path))


def test_a_cluster_that_stays_away_ends_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsq_ray.runtime.jobs._client", lambda *arguments: LostConnection())
    monkeypatch.setattr("tsq_ray.runtime.jobs._LOST_S", -1.0)
    gone = r"has not answered for -1 s \(\[Errno 111\] Connection refused\); the job may still be"
    with pytest.raises(RunFailed, match=gone):
        Jobs("http://head:8265").follow("j-1", print)


async def silent_dashboard(request: web.Request) -> web.StreamResponse:
    """Sends one line of a job's output and then nothing, not even an answer to a ping."""
    if request.path == "/api/version":
        return web.json_response({"version": "4", "ray_version": "2", "ray_commit": "0"})
    socket = web.WebSocketResponse(autoping=False)
    await socket.prepare(request)
    await socket.send_str("one line\n")
    async for _ in socket:
        pass
    return socket


def test_a_connection_whose_peer_is_gone_ends() -> None:
    written: list[str] = []

    async def follow() -> None:
        app = web.Application()
        app.router.add_route("GET", "/{path:.*}", silent_dashboard)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            port = runner.addresses[0][1]
            jobs = await asyncio.to_thread(Jobs, f"http://127.0.0.1:{port}")
            following = _Follower(jobs, "job-1", written.append).tail(heartbeat_s=0.4)
            await asyncio.wait_for(following, 60)
        finally:
            await runner.cleanup()

    with pytest.raises(ConnectionError, match="no answer from http"):
        asyncio.run(follow())
    assert written == ["one line\n"]


def test_a_summary_is_found_in_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    output = _Output(as_json=True)
    for text in ("a line of Ray\n{\n", ' "ok": 3\n}\n', "another\n"):
        output.write(text)
    output.end()
    shown = capsys.readouterr()
    assert shown.out == '{\n "ok": 3\n}\n'
    assert shown.err.startswith("a line of Ray")
