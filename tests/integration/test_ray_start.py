"""Starting or joining Ray when something is wrong: long folders, dead clusters, busy machines."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.cluster import MARK, SETTINGS, Ended, end_marked, read_rows, refused
from support.video import write_video

from jobs.benchmarks.support.s3 import free_ports
from tsq_ray.errors import RunFailed
from tsq_ray.runtime import cluster
from tsq_ray.runtime.session import Session

pytestmark = pytest.mark.ray


def tsq_process(*argv: str | Path, environment: Mapping[str, str]) -> Ended:
    """Run `tsq ARGV` as a separate process without the Ray settings of this one."""
    mark = uuid.uuid4().hex
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "tsq_ray", *map(str, argv)]
    try:
        done = subprocess.run(
            command,
            env={**own, **environment, MARK: mark},
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        end_marked(mark)
    return Ended(done.returncode, done.stdout, done.stderr)


def long_folder(base: Path, length: int) -> Path:
    """A folder whose path has this many characters."""
    folder = Path(f"{base}/job_".ljust(length, "x"))
    folder.mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("length", [90, 150])
def test_an_extraction_below_a_long_tmpdir(tmp_path: Path, length: int) -> None:
    """Batch systems create folders too long for Ray's sockets and the decoder's."""
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS)
    (tmp_path / "v").mkdir()
    for number in range(2):
        write_video(tmp_path / f"v/{number}.mp4", 24)
    environment = {"TMPDIR": str(long_folder(tmp_path, length))}
    manifest, out = tmp_path / "m.parquet", tmp_path / "features"
    index = tsq_process("index", tmp_path / "v", "--out", manifest, environment=environment)
    assert index.code == 0, index.err
    argv = ["extract", manifest, "--out", out, "--config", settings]
    extract = tsq_process(*argv, environment=environment)
    assert extract.code == 0, extract.err
    assert "2 inputs = 2 ok + 0 failed + 0 skipped" in extract.out
    told = [line for line in extract.err.splitlines() if "TMPDIR" in line]
    assert len(told) == 1
    place = f"/tsq-ray-{os.getuid()}; set RAY_TMPDIR to choose another folder"
    expected = rf"TMPDIR is too long .* \({length} bytes, at most \d+\): .*{place}"
    assert re.fullmatch(expected, told[0])
    assert read_rows(str(out)).column("status").to_pylist() == ["ok", "ok"]


@pytest.mark.slow
def test_a_relative_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of Ray's processes run in this folder."""
    monkeypatch.chdir("/tmp")
    name = f"tsq-{uuid.uuid4().hex[:6]}"
    ended = tsq_process("info", "--cluster", environment={"TMPDIR": name})
    assert (ended.code, ended.err) == (0, "")


PORT = free_ports(1)[0]
DEAD = f"127.0.0.1:{PORT}"


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (
            [],
            {"RAY_ADDRESS": DEAD},
            rf"RAY_ADDRESS={DEAD}: no Ray cluster answers there \(.*refused\); start one with: "
            "ray start --head, or unset RAY_ADDRESS to start Ray here",
        ),
        pytest.param(
            [],
            {"RAY_ADDRESS": f"ray://{DEAD}"},
            f"RAY_ADDRESS=ray://{DEAD}: no Ray cluster .* unset RAY_ADDRESS to start Ray here",
            marks=pytest.mark.slow,
        ),
        (
            ["--address", DEAD],
            {},
            rf"--address {DEAD}: no Ray cluster answers there \(.*refused\); start one with: "
            "ray start --head, or leave --address out to start Ray here",
        ),
        pytest.param(
            ["--address", DEAD],
            {"RAY_ADDRESS": "127.0.0.1:1"},
            f"--address {DEAD}: no Ray cluster .* leave --address out to start Ray here",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--address", "no-such-host.invalid:6379"],
            {},
            "--address no-such-host.invalid:6379: no Ray cluster .* leave --address out .*",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--address", "http://127.0.0.1:8265"],
            {},
            "--address http://127.0.0.1:8265: a dashboard's URL, which --submit takes; without it "
            "name the cluster as auto, HOST:PORT or ray://HOST:PORT, or leave --address out to .*",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [],
            {"RAY_ADDRESS": "https://cluster.invalid"},
            "RAY_ADDRESS=https://cluster.invalid: a dashboard's URL, .* or unset RAY_ADDRESS to .*",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--address", "auto"],
            {"RAY_ADDRESS": DEAD},
            f"RAY_ADDRESS={DEAD}: no Ray cluster .* unset RAY_ADDRESS to start Ray here",
            marks=pytest.mark.slow,
        ),
        (
            [],
            {"RAY_TMPDIR": f"/tmp/{'x' * 120}"},
            r"RAY_TMPDIR is too long for Ray's Unix sockets \(125 bytes, at most \d+\): /tmp/x+; "
            "set RAY_TMPDIR to a shorter path",
        ),
        (
            [],
            {"RAY_TMPDIR": "/etc/hostname"},
            r"Ray could not be started here \(.*Not a directory.*\); set RAY_TMPDIR to a folder .*",
        ),
    ],
    ids=[
        "env",
        "env-client",
        "option",
        "both",
        "host",
        "dashboard",
        "env-dashboard",
        "env-auto",
        "long",
        "file",
    ],
)
def test_one_line_with_the_true_cause(
    argv: list[str], environment: dict[str, str], message: str
) -> None:
    ended = tsq_process("info", "--cluster", *argv, environment=environment)
    assert re.fullmatch(message, refused(ended, 1)), ended.err


BUSY = "RAY_raylet_start_wait_time_s=120"


@pytest.mark.slow
def test_a_machine_too_busy_to_start_ray() -> None:
    """Ray's own switch delays the registration of a node, as a busy machine does."""
    delay = "NodeInfoGcsService.grpc_server.RegisterNode=90000000:90000000"
    environment = {"RAY_testing_asio_delay_us": delay}
    ended = tsq_process("info", "--cluster", environment=environment)
    announced, told = ended.err.splitlines()
    assert (ended.code, announced.partition(" ")[0]) == (1, "RAY_testing_asio_delay_us")
    assert told.startswith(
        "error: Ray could not be started here (The current node timed out during"
    )
    assert told.endswith(BUSY)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make this process look as if it had no Ray yet."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        # the real one takes Ray 30 s: the slow test above provokes it
        (
            Exception("The current node timed out during startup. This could happen because ..."),
            rf"Ray could not be started here \(The current node timed out .*\); the machine is too "
            rf"busy: run the same command again when it is less loaded, or let Ray .* {BUSY}",
        ),
        (
            RuntimeError("anything\nelse"),
            r"Ray could not be started here \(anything else\); --debug shows Ray's own output",
        ),
    ],
)
def test_whatever_ray_raises_is_a_failed_run(
    no_ray: pytest.MonkeyPatch, raised: Exception, message: str
) -> None:
    import ray

    def init(**_: Any) -> None:
        raise raised

    no_ray.setattr(ray, "init", init)
    with pytest.raises(RunFailed) as caught, cluster.connect():
        pass
    assert re.fullmatch(message, str(caught.value))


@pytest.mark.parametrize(
    ("last", "detail"),
    [(None, "none runs on this machine"), (DEAD, r"[\d.]+:\d+: .*Connection refused")],
    ids=["none", "killed"],
)
@pytest.mark.parametrize("named", ["--address auto", "RAY_ADDRESS=auto"])
def test_auto_without_a_cluster(
    no_ray: pytest.MonkeyPatch, tmp_path: Path, named: str, last: str | None, detail: str
) -> None:
    """A cluster that was killed leaves its address behind, where Ray would retry for minutes."""
    from ray._private import services

    # other tests' clusters may run on this machine
    no_ray.setattr(services, "find_gcs_addresses", functools.cache(set))
    no_ray.setenv("RAY_TMPDIR", str(tmp_path))
    if last is not None:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray/ray_current_cluster").write_text(last)
    session = Session(address="auto")
    if named.startswith("RAY_"):
        no_ray.setenv("RAY_ADDRESS", "auto")
        session = Session()
    with pytest.raises(RunFailed) as caught, cluster.connect(session):
        pass
    expected = rf"{named}: no Ray cluster answers there \({detail}\); start one with: ray start .*"
    assert re.fullmatch(expected, str(caught.value))


def test_an_interrupt_while_ray_starts_stays_an_interrupt(no_ray: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: Any) -> None:
        raise KeyboardInterrupt

    no_ray.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt), cluster.connect():
        pass


def test_a_folder_that_other_users_may_write_to_is_not_used(
    no_ray: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for base in (first, second):
        base.mkdir()
    name = f"tsq-ray-{os.getuid()}"
    (first / name).mkdir(mode=0o700)
    (first / name).chmod(0o777)
    no_ray.setattr(cluster, "_SHORT_FOLDERS", (str(first), str(second)))
    no_ray.setenv("TMPDIR", "/" + "x" * 100)
    assert cluster._temp_dir() == f"{second}/{name}/ray"
    assert (second / name).stat().st_mode & 0o777 == 0o700


OMP = """
import os
import ray
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
assert "OMP_WAIT_POLICY" not in os.environ
from tsq_ray.runtime import progress  # the workers start without what it sets here

@ray.remote
class Look:
    def __init__(self, counts):
        import sys
        self.found = (os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)

    def get(self):
        return self.found

print(ray.get(Look.remote(progress.Counts()).get.remote()))
"""


def output_of(code: str, *gone: str) -> subprocess.CompletedProcess[str]:
    """What a Python program prints, without the environment's variables that begin so."""
    mark = uuid.uuid4().hex
    own = {name: value for name, value in os.environ.items() if not name.startswith(gone)}
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**own, MARK: mark},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        end_marked(mark)


@pytest.mark.slow
def test_a_worker_of_a_cluster_sets_its_threads_policy() -> None:
    """The cluster's processes were started elsewhere, without the variable."""
    done = output_of(OMP, "RAY_", "OMP_", "TMPDIR")
    assert done.stdout == "('PASSIVE', False)\n", done.stderr


LOOPBACK = """
import os
from tsq_ray.runtime import cluster

with cluster.connect() as ray:
    address = ray.util.get_node_ip_address()
print(address, [name for name in os.environ if "OSX_CLUSTER" in name])
"""


def test_a_ray_of_our_own_is_on_loopback_and_leaves_nothing_for_the_next() -> None:
    """A cluster of several nodes, started later from the same environment, has real addresses."""
    done = output_of(LOOPBACK, "RAY_")
    assert done.stdout == "127.0.0.1 []\n", done.stderr
