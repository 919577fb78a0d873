"""jobs/*.py through `ray job submit`, and `tsq --submit`, on a head node of this machine."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cluster import MARK, Chain, Chains, Driver, end_marked, read_rows, short_folder, tsq

from jobs.benchmarks.support.s3 import free_ports

pytestmark = pytest.mark.ray

RAY = str(Path(sys.executable).with_name("ray"))
_START_S = 120.0


@dataclass(frozen=True)
class Head:
    """A head node: its dashboard's URL, and the environment of its clients."""

    url: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` in the foreground, with its own ports and folder."""
    names = (
        "port",
        "dashboard-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
        "ray-client-server-port",
    )
    ports = dict(zip(names, free_ports(len(names), below=10000), strict=True))
    mark, token, log = (
        uuid.uuid4().hex,
        secrets.token_hex(32),
        tmp_path_factory.mktemp("head") / "log",
    )
    # a Ray instance that this process started has left its token's mode in the environment
    own = {MARK: mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own
    with short_folder() as folder, log.open("wb") as sink:
        command = [
            RAY,
            "start",
            "--head",
            "--block",
            "--num-cpus=4",
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
        ]
        command += [
            f"--temp-dir={folder}",
            "--disable-usage-stats",
            f"--object-store-memory={256 * 2**20}",
        ]
        command += [f"--{name}={port}" for name, port in ports.items()]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{ports['dashboard-port']}"
            wait_for(
                urllib.request.Request(
                    f"{url}/api/version", headers={"Authorization": f"Bearer {token}"}
                ),
                process,
                log,
            )
            yield Head(url, environment)
        finally:
            process.kill()
            process.wait()
            end_marked(mark, patience_s=0)


def wait_for(request: urllib.request.Request, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, (
                f"no dashboard after {_START_S:g} s: {log.read_text()[-2000:]}"
            )
            time.sleep(0.5)


def run(head: Head, command: list[str], repo: Path) -> str:
    """The output of a client of the head node, run in the repository's root."""
    done = subprocess.run(
        command,
        cwd=repo,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def chain(chains: Chains) -> Chain:
    return chains("local")


@pytest.mark.slow
def test_extract_train_and_score_as_ray_jobs(
    head: Head, chain: Chain, repo_dir: Path, tmp_path: Path
) -> None:
    features, bundle, predictions = (
        str(tmp_path / name) for name in ("features", "bundle", "predictions")
    )
    settings = ["--config", str(chain.settings)]
    submit = [RAY, "job", "submit", "--address", head.url, "--working-dir", ".", "--", "python"]
    tuned = ["--recognizer", chain.recognizer]
    jobs = {
        "extract": ["jobs/extract.py", chain.manifest, "--out", features, *settings],
        "train": [
            "jobs/train.py",
            features,
            "--out",
            bundle,
            *tuned,
            *settings,
            "--set",
            "train.modules=visual",
        ],
        "score": [
            "jobs/score.py",
            chain.manifest,
            "--model",
            bundle,
            "--out",
            predictions,
            "--split",
            "val",
        ],
    }
    for name, job in jobs.items():
        assert "succeeded" in run(head, [*submit, *job], repo_dir), name
    assert tsq("verify", features, "--json").json["counts"]["ok"] == 15
    found = tsq("verify", predictions, "--json").json
    assert (found["problems"], found["counts"]["ok"], found["counts"]["skipped"]) == ([], 4, 13)
    info = tsq("info", bundle, "--json").json
    assert (info["kind"], info["sampler_shape"]["modules"]) == ("bundle", "visual")


def test_a_job_that_fails_says_why(
    head: Head, chain: Chain, repo_dir: Path, tmp_path: Path
) -> None:
    command = [
        RAY,
        "job",
        "submit",
        "--address",
        head.url,
        "--working-dir",
        ".",
        "--",
        "python",
        "jobs/score.py",
    ]
    command += [chain.manifest, "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "p")]
    done = subprocess.run(
        command,
        cwd=repo_dir,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode != 0
    assert "error: " in done.stdout + done.stderr
    assert "has no bundle.json" in done.stdout + done.stderr


def test_submit(head: Head, chain: Chain, tmp_path: Path) -> None:
    out = str(tmp_path / "features")
    command = [
        sys.executable,
        "-m",
        "tsq_ray",
        "extract",
        chain.manifest,
        "--out",
        out,
        "--config",
        str(chain.settings),
        "--limit",
        "3",
    ]
    text = run(head, [*command, "--submit", "--address", head.url], tmp_path)
    assert ": SUCCEEDED" in text
    assert "18 inputs = " in text, "the job's own output is shown"
    assert tsq("verify", out, "--json").json["counts"]["skipped_by"] == {"split": 0, "limit": 15}
    assert read_rows(out).num_rows == 3


def test_an_interrupted_follower_says_that_the_job_continues(
    head: Head, chain: Chain, repo_dir: Path, tmp_path: Path
) -> None:
    argv = [
        "extract",
        chain.manifest,
        "--out",
        tmp_path / "out",
        "--config",
        chain.settings,
        "--submit",
        "--address",
        head.url,
    ]
    with Driver(argv, tmp_path / "run", head.environment) as driver:
        driver.wait_until(lambda: "job: " in (tmp_path / "run.err").read_text())
        driver.interrupt()
        ended = driver.ended()
    assert ended.code == 1
    job = re.findall(r"^job: (\S+)$", ended.err, re.MULTILINE)[0]
    assert (
        f"keeps running: follow it with `ray job logs --follow {job}`, "
        f"stop it with `ray job stop {job}`" in ended.err.splitlines()[-1]
    )
    run(head, [RAY, "job", "stop", job, "--address", head.url], repo_dir)


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}", "127.0.0.1:{port}"])
def test_an_address_that_does_not_answer(chain: Chain, address: str, tmp_path: Path) -> None:
    place = address.format(port=free_ports(1)[0])
    submit = ["--submit"] if address.startswith("http") else []
    command = [
        sys.executable,
        "-m",
        "tsq_ray",
        "extract",
        chain.manifest,
        "--out",
        str(tmp_path / "f"),
        "--config",
        str(chain.settings),
    ]
    done = subprocess.run(
        [*command, *submit, "--address", place],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.strip().splitlines()] == ["error"], (
        done.stderr
    )
    assert place in done.stderr
