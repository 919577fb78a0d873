"""jobs/run.py through `ray job submit`, and `tsq --submit`, on a head node of this machine."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.cluster import Chain, Chains, Driver, Ended, read_rows, refused, tsq
from support.head import RAY, Head, running_head

from jobs.benchmarks.support.s3 import free_ports

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("head"), cpus=4) as found:
        yield found


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
        "extract": ["jobs/run.py", "extract", chain.manifest, "--out", features, *settings],
        "train": [
            "jobs/run.py",
            "train",
            features,
            "--out",
            bundle,
            *tuned,
            *settings,
            "--set",
            "train.modules=visual",
        ],
        "score": [
            "jobs/run.py",
            "score",
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


@pytest.mark.slow
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
        "jobs/run.py",
        "score",
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


@pytest.mark.slow
def test_an_archive_without_labels_is_labelled_by_a_job(
    head: Head, chain: Chain, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ["--recognizer", chain.recognizer, "--sample", "18", "--agreement", "0.7"]
    asked += ["--config", chain.settings, "--set", "train.teacher_min_videos=1"]
    label = submitted("label", chain.archive.root, "--out", out, *asked, "--address", head.url)
    done = client([*label, "--json"], head.environment, tmp_path)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["predictions"]["counts"]
    assert (counts["inputs"], counts["failed"]) == (
        len(chain.archive.paths),
        len(chain.archive.bad),
    )
    assert read_rows(str(out / "predictions")).num_rows == len(chain.archive.paths)


@pytest.mark.slow
def test_a_job_says_what_the_cluster_has(head: Head, tmp_path: Path) -> None:
    """Each time anew: its last job has ended."""
    info = [sys.executable, "-m", "tsq_ray", "info", "--cluster", "--submit", "--json"]
    for attempt in (1, 2):
        done = client([*info, "--address", head.url], head.environment, tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"^job tsq-info-\w+-{attempt}: SUCCEEDED$", done.stderr, re.MULTILINE)
        assert json.loads(done.stdout)["free"]["CPU"] == "4 of 4"


def submitted(*argv: object) -> list[str]:
    return [sys.executable, "-m", "tsq_ray", *map(str, argv), "--submit", "--shared-fs"]


def client(
    command: list[str], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def test_submit_ships_what_the_command_names_and_returns_its_exit_code(
    head: Head, chain: Chain, tmp_path: Path
) -> None:
    out = tmp_path / "m.parquet"
    named = (f"{chain.archive.root}/{path},{label}" for path, label in chain.archive.labels.items())
    (tmp_path / "own.csv").write_text("\n".join(["path,label", *named]))
    index = ["index", chain.archive.root, "--labels", "own.csv", "--out", out]
    command = [*submitted(*index), "--address", head.url, "--json"]
    done = client(command, head.environment, tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["videos"], printed["labelled"]) == (18, 17), "stdout has the summary alone"
    assert re.search(r"^job tsq-index-\w+-1: SUCCEEDED$", done.stderr, re.MULTILINE)
    assert pq.read_table(out).num_rows == 18
    wrong = submitted("index", chain.archive.root, "--out", out, "--address", head.url)
    refused = client(wrong, head.environment, tmp_path)
    assert refused.returncode == 2
    assert f"{out}: already exists; add --update to list again" in refused.stdout


def test_the_same_command_attaches_and_jobs_can_be_stopped(
    head: Head, chain: Chain, repo_dir: Path, tmp_path: Path
) -> None:
    argv = ["extract", chain.manifest, "--out", tmp_path / "out", "--config", chain.settings]
    argv += ["--submit", "--shared-fs", "--address", head.url]
    with Driver(argv, tmp_path / "run", head.environment) as driver:
        driver.wait_until(lambda: "job: " in (tmp_path / "run.err").read_text())
        driver.interrupt()
        ended = driver.ended()
    assert ended.code == 1
    job = re.findall(r"^job: (\S+)$", ended.err, re.MULTILINE)[0]
    assert (
        f"keeps running: follow it with `tsq jobs attach {job} --address {head.url}`, "
        f"stop it with `tsq jobs stop {job} --address {head.url}`" in ended.err.splitlines()[-1]
    )
    with Driver(argv, tmp_path / "again", head.environment) as driver:
        driver.wait_until(lambda: "job: " in (tmp_path / "again.err").read_text())
        assert f"job: {job}, already running; following it" in (tmp_path / "again.err").read_text()
        jobs = [sys.executable, "-m", "tsq_ray", "jobs"]
        listed = client(
            [*jobs, "list", "--address", head.url, "--json"], head.environment, tmp_path
        )
        (found,) = [one for one in json.loads(listed.stdout)["jobs"] if one["id"] == job]
        assert (found["status"], found["exit_code"]) in (("PENDING", None), ("RUNNING", None))
        run(head, [*jobs, "stop", job, "--address", head.url], repo_dir)
        stopped = driver.ended()
    assert (stopped.code, stopped.err.splitlines()[-1]) == (1, f"job {job}: STOPPED")
    printed = client([*jobs, "logs", job, "--address", head.url], head.environment, tmp_path)
    assert printed.stdout == stopped.out
    unknown = client([*jobs, "attach", "x", "--address", head.url], head.environment, tmp_path)
    assert unknown.returncode == 2
    assert "has no job 'x'; list them with: tsq jobs list" in unknown.stderr


@pytest.mark.slow
def test_a_lost_connection_is_made_again(head: Head, chain: Chain, tmp_path: Path) -> None:
    """The follower's connection breaks in mid-run, as a port-forward does; nothing is lost of
    it."""
    port = int(head.url.rpartition(":")[2])
    with Forward(port) as forward:
        argv = ["extract", chain.manifest, "--out", tmp_path / "out", "--config", chain.settings]
        argv += ["--submit", "--shared-fs", "--address", forward.url]
        with Driver(argv, tmp_path / "run", head.environment) as driver:
            driver.wait_until(lambda: "job: " in (tmp_path / "run.err").read_text())
            forward.cut()
            driver.wait_until(lambda: "lost; trying again" in (tmp_path / "run.err").read_text())
            forward.mend()
            ended = driver.ended()
    assert ended.code == 0, ended
    assert "connected again" in ended.err
    assert ended.out.count("inputs = ") == 1, "each line of the job's output is shown once"


class Forward:
    """A TCP forward on loopback that can be cut and mended."""

    def __init__(self, port: int) -> None:
        self.port, self.own = port, free_ports(1, below=10000)[0]
        self.url = f"http://127.0.0.1:{self.own}"
        self.connections: list[socket.socket] = []
        self.server: socket.socket | None = None

    def __enter__(self) -> Forward:
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def mend(self) -> None:
        self.server = socket.create_server(("127.0.0.1", self.own), reuse_port=True)
        threading.Thread(target=self._accept, args=(self.server,), daemon=True).start()

    def cut(self) -> None:
        ends = [*self.connections, *([self.server] if self.server else [])]
        self.connections.clear()
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                here = server.accept()[0]
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self.port))
            self.connections += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_tokens(head: Head, tmp_path: Path) -> None:
    """The token is found in its variable and in its file, without a mode; else one line is said."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    bare = {name: value for name, value in head.environment.items() if name not in names}
    command = [sys.executable, "-m", "tsq_ray", "jobs", "list", "--address", head.url]
    token = head.environment["RAY_AUTH_TOKEN"]
    for name, content in (("right", token), ("wrong", "0" * 64), ("none", None)):
        home = tmp_path / name
        (home / ".ray").mkdir(parents=True)
        if content is not None:
            (home / ".ray" / "auth_token").write_text(content)
        done = client(command, bare | {"HOME": str(home)}, tmp_path)
        if name == "right":
            assert done.returncode == 0, done.stderr
            continue
        assert done.returncode == 1
        what = "does not accept the token" if content else "wants a token but got none"
        assert done.stderr.startswith(f"error: {head.url}: this cluster {what}; set RAY_AUTH_TOKEN")
        assert len(done.stderr.strip().splitlines()) == 1
    by_variable = bare | {"HOME": str(tmp_path / "none"), "RAY_AUTH_TOKEN": token}
    assert client(command, by_variable, tmp_path).returncode == 0


@pytest.mark.slow
def test_the_local_head_of_the_docs(chain: Chain, repo_dir: Path, tmp_path: Path) -> None:
    """The commands of the page, with the token's file alone, which any `tsq` command leaves.

    The head has ports of its own and stays on loopback; `ray stop` would end every Ray here.
    """
    page = (repo_dir / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"## A local head node\n```bash\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", "").splitlines()]
    _, start, submit, stop = lines
    assert (start[:4], stop) == (["ray", "start", "--head", "--port=6379"], ["ray", "stop"])
    (tmp_path / "runs").mkdir()
    (tmp_path / "jobs").mkdir()
    shutil.copy(chain.manifest, tmp_path / submit[2])
    shutil.copy(chain.settings, tmp_path / submit[submit.index("--config") + 1])
    with running_head(tmp_path, cpus=2, home=tmp_path / "home") as head:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{head.url}/api/version", timeout=30)
        environment = head.environment | {"RAY_ADDRESS": head.url}
        done = client([sys.executable, "-m", "tsq_ray", *submit[1:]], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    verified = tsq("verify", tmp_path / submit[submit.index("--out") + 1], "--json").json
    assert verified["counts"]["ok"] == 15


@pytest.fixture(scope="module")
def joining(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """joining(home, RAY_AUTH_TOKEN=...): `info --cluster` by a client with no other token."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    bare = {name: value for name, value in head.environment.items() if name not in names}
    # the head listens on loopback only, for which Ray would take this machine's other address
    bare["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    folder = tmp_path_factory.mktemp("client")
    command = [sys.executable, "-m", "tsq_ray", "info", "--cluster", "--address", head.address]

    def join(home: Path, **own: str) -> Ended:
        done = client(command, bare | {"HOME": str(home)} | own, folder)
        return Ended(done.returncode, done.stdout, done.stderr)

    return join


@pytest.mark.slow
def test_joining_with_a_token(head: Head, joining: Callable[..., Ended], tmp_path: Path) -> None:
    """A command that joins the cluster itself must also be in the cluster's mode."""
    right = head.environment["RAY_AUTH_TOKEN"]
    done = joining(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=right)
    assert done.code == 0, done.err
    wrong = joining(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    for what, done in (
        ("does not accept the token", wrong),
        ("may want a token but got none", joining(tmp_path)),
    ):
        message = refused(done, code=1)
        assert message.startswith(
            f"--address {head.address}: what listens there {what}, or is not a Ray cluster"
        )
        variables = "RAY_AUTH_TOKEN" if done is wrong else "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"
        assert f"for a token, set {variables} or ~/.ray/auth_token to the cluster's" in message


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "variable"])
def test_joining_with_a_token_but_without_the_mode(
    place: str, head: Head, joining: Callable[..., Ended], tmp_path: Path
) -> None:
    token, own = head.environment["RAY_AUTH_TOKEN"], {}
    if place == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    else:
        own["RAY_AUTH_TOKEN"] = token
    message = refused(joining(tmp_path, **own), code=1)
    assert message.startswith(
        f"--address {head.address}: what listens there may want this user's token, which is sent "
        "only with RAY_AUTH_MODE=token, or is not a Ray cluster"
    )
    assert "; for a token, set RAY_AUTH_MODE=token, or leave --address out" in message
    assert joining(tmp_path, **own, RAY_AUTH_MODE="token").code == 0


@pytest.mark.slow
def test_an_output_that_another_machine_cannot_see(chain: Chain, tmp_path: Path) -> None:
    """A node with another address counts as another machine; this one has the disk all the same."""
    out = tmp_path / "features"
    argv = ["extract", chain.manifest, "--out", str(out), "--config", str(chain.settings)]
    with running_head(tmp_path, cpus=1) as head:
        head.add_node(1, host="127.0.0.2")
        # the head listens on loopback only, for which Ray would take this machine's other address
        environment = head.environment | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        command = [sys.executable, "-m", "tsq_ray", *argv, "--address", head.address]
        alone = client(command, environment, tmp_path)
        shared = client([*command, "--shared-fs"], environment, tmp_path)
    message = refused(Ended(alone.returncode, alone.stdout, alone.stderr))
    assert message == (
        f"--out {out}: a path of this machine, which the cluster's other machines (127.0.0.2) "
        "cannot see; use a URI such as s3://..., or --shared-fs if they have this path too"
    )
    assert shared.returncode == 0, shared.stderr
    assert read_rows(str(out)).num_rows == len(chain.archive.paths)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:{port}", pytest.param("127.0.0.1:{port}", marks=pytest.mark.slow)],
)
def test_an_address_that_does_not_answer(chain: Chain, address: str, tmp_path: Path) -> None:
    place = address.format(port=free_ports(1)[0])
    submit = ["--submit", "--shared-fs"] if address.startswith("http") else []
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
