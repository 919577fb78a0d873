"""One run at a time writes to a folder: who gets the lease, who takes it over, who must stop."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tsq_ray import storage
from tsq_ray.errors import RunError, RunFailed
from tsq_ray.runs.lease import LEASE_FILE, TIMES, Holder, Lease, LeaseTimes

FAST = LeaseTimes(renew_s=0.05, expire_s=0.6, poll_s=0.05)
SLOW = dataclasses.replace(FAST, renew_s=60)
"""Does not renew by itself while a test lasts."""


def write_lease(folder: Path, renewals: int = 0, **changes: Any) -> Holder:
    """Leave another run's lease in a folder, by default one from another machine."""
    foreign = {"host": "elsewhere", "boot_id": "another", "pid": 4321} | changes
    holder = dataclasses.replace(Holder.of_this_process(), **foreign)
    storage.write_bytes(str(folder / LEASE_FILE), holder.lease(renewals))
    return holder


def holder_in(folder: Path) -> Holder:
    found = Holder.read((folder / LEASE_FILE).read_bytes())
    assert found is not None
    return found


def ended_process() -> int:
    """The process id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


RACER = """
    import sys, time
    from pathlib import Path
    from tsq_ray.errors import RunError
    from tsq_ray.runs.lease import Lease

    folder, number = Path(sys.argv[1]), sys.argv[2]
    (folder.parent / f"ready-{number}").touch()
    while not (folder.parent / "go").exists():
        time.sleep(0.001)
    try:
        with Lease(str(folder)) as lease:
            print("won", flush=True)
            sys.stdin.read()
            lease.check()
    except RunError as error:
        print("refused" if "writes to this folder" in str(error) else error, flush=True)
"""


@pytest.fixture
def race(tmp_path: Path) -> Iterator[Callable[[int], list[str]]]:
    """race(2): the outcomes of two processes that take the lease of `tmp_path/out` at once."""
    racers: list[subprocess.Popen[str]] = []

    def run(count: int) -> list[str]:
        command = [sys.executable, "-c", textwrap.dedent(RACER), str(tmp_path / "out")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        for number in range(count):
            racers.append(subprocess.Popen([*command, str(number)], text=True, **pipes))
        while len(list(tmp_path.glob("ready-*"))) < count:
            assert all(racer.poll() is None for racer in racers)
            time.sleep(0.02)
        (tmp_path / "go").touch()
        return [racer.stdout.readline().strip() for racer in racers if racer.stdout]

    yield run
    for racer in racers:
        racer.communicate(timeout=60)
        assert racer.returncode == 0


@pytest.mark.parametrize("before", ["nothing", "the lease of a dead process"])
def test_of_racing_processes_one_wins(
    race: Callable[[int], list[str]],
    tmp_path: Path,
    before: str,
) -> None:
    if before != "nothing":
        here = Holder.of_this_process()
        write_lease(tmp_path / "out", host=here.host, boot_id=here.boot_id, pid=ended_process())
    assert sorted(race(3)) == ["refused", "refused", "won"]


def test_a_lease_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    with Lease(str(tmp_path / "out")) as lease:
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LEASE_FILE]
        found = holder_in(tmp_path / "out")
        assert found == lease.holder
        assert (found.pid, found.is_alive()) == (os.getpid(), True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_or_is_written_to_stays(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with Lease(str(tmp_path / "empty")), Lease(str(tmp_path / "written")):
        (tmp_path / "written/part").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "part", "written"]


def test_a_living_holder_on_this_machine_is_refused_immediately(tmp_path: Path) -> None:
    with Lease(str(tmp_path)) as first:
        message = (
            f"^{re.escape(str(tmp_path))}: a run on {re.escape(first.holder.host)} "
            rf"\(process {os.getpid()}, since .*\) writes to this folder; "
            "wait for it, stop it, or take over the folder with --take-over$"
        )
        started = time.monotonic()
        with pytest.raises(RunError, match=message):
            Lease(str(tmp_path)).__enter__()
        assert time.monotonic() - started < TIMES.expire_s / 2
        first.check()


@pytest.mark.parametrize("process", ["ended", "another with its number", "zombie", "this one"])
def test_a_dead_holder_on_this_machine_is_replaced_immediately(
    tmp_path: Path, process: str
) -> None:
    here = Holder.of_this_process()
    same = {"host": here.host, "boot_id": here.boot_id}
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()  # it has ended, and no parent has reaped it
        if process == "ended":
            write_lease(tmp_path, **same, pid=ended_process())
        elif process == "zombie":
            write_lease(tmp_path, **same, pid=child.pid)
        elif process == "this one":  # it could not release the lease
            write_lease(tmp_path, **same, pid=os.getpid())
        else:
            write_lease(tmp_path, **same, pid=os.getppid(), process_started=1)
        with Lease(str(tmp_path)) as lease:
            assert holder_in(tmp_path) == lease.holder


@pytest.mark.parametrize("lease", ["foreign", "of a system without /proc", "not JSON", "not ours"])
def test_an_unchanged_lease_is_taken_over_when_it_expires(
    tmp_path: Path,
    lease: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = Holder.of_this_process()
    same = {"host": here.host, "boot_id": here.boot_id}
    if lease == "of a system without /proc":
        write_lease(tmp_path, **same, process_started=None)
    elif lease.startswith("not"):
        content = "{" if lease == "not JSON" else json.dumps({"pid": "x"})
        (tmp_path / LEASE_FILE).write_text(content)
    else:
        write_lease(tmp_path)
    started = time.monotonic()
    with Lease(str(tmp_path), times=FAST) as taken:
        assert time.monotonic() - started >= FAST.expire_s
        assert holder_in(tmp_path).id == taken.holder.id
    said = capsys.readouterr().err
    whom = r"a run on \S+ \(process 4321, since \S+\)"
    whom = "another run" if lease.startswith("not") else whom
    expected = (
        rf"waiting up to 0\.6 s for {whom}: it holds {re.escape(str(tmp_path))}; "
        "this run takes over unless that one renews its lease\n"
    )
    assert re.fullmatch(expected, said)


def test_a_foreign_lease_that_is_renewed_is_refused(tmp_path: Path) -> None:
    write_lease(tmp_path)
    renewal = threading.Timer(0.2, write_lease, (tmp_path, 1))
    renewal.start()
    with pytest.raises(RunError, match=r"a run on elsewhere \(process 4321, .* with --take-over$"):
        Lease(str(tmp_path), times=dataclasses.replace(FAST, expire_s=120)).__enter__()
    renewal.join()
    assert holder_in(tmp_path).host == "elsewhere"


def test_a_lease_released_while_it_is_watched_is_free(tmp_path: Path) -> None:
    write_lease(tmp_path)
    threading.Timer(0.1, (tmp_path / LEASE_FILE).unlink).start()
    started = time.monotonic()
    with Lease(str(tmp_path), times=dataclasses.replace(FAST, expire_s=120)):
        assert time.monotonic() - started < 60


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_a_live_lease_is_safe_from_a_machine_whose_clock_is_wrong(
    tmp_path: Path, ahead_s: float
) -> None:
    write_lease(tmp_path)
    seen = time.time() + ahead_s
    os.utime(tmp_path / LEASE_FILE, (seen, seen))
    renewal = threading.Timer(0.2, write_lease, (tmp_path, 1))
    renewal.start()
    with pytest.raises(RunError, match=r"a run on elsewhere .* writes to this folder"):
        Lease(str(tmp_path), times=dataclasses.replace(FAST, expire_s=120)).__enter__()
    renewal.join()


def test_a_holder_renews_its_lease(tmp_path: Path) -> None:
    with Lease(str(tmp_path), times=FAST) as lease:
        before = (tmp_path / LEASE_FILE).read_bytes()
        end = time.monotonic() + 30
        while (tmp_path / LEASE_FILE).read_bytes() == before and time.monotonic() < end:
            time.sleep(0.02)
        after = (tmp_path / LEASE_FILE).read_bytes()
        assert (after != before, Holder.read(after)) == (True, lease.holder)


def test_a_run_that_is_taken_over_must_stop_and_leaves_the_new_lease(tmp_path: Path) -> None:
    with Lease(str(tmp_path), times=SLOW) as first:
        first.check()
        with Lease(str(tmp_path), take_over=True, times=SLOW) as second:
            with pytest.raises(RunFailed, match=r"another run took over .*, a run on .* has"):
                first.check()
            second.check()
            with pytest.raises(RunFailed, match="another run took over"):
                first.check()
            assert holder_in(tmp_path) == second.holder
    assert not (tmp_path / LEASE_FILE).exists()


def watch_for(lease: Lease, seconds: float) -> None:
    """Look as a run does whether it must stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lease.stop_if_lost()
        time.sleep(0.02)


@pytest.mark.parametrize("trouble", ["a hang", "an error"])
def test_a_run_that_cannot_renew_stops_before_another_may_take_over(
    tmp_path: Path, trouble: str
) -> None:
    times = dataclasses.replace(FAST, expire_s=3)
    away = tmp_path / "away"
    with Lease(str(tmp_path / "out"), times=times) as lease, contextlib.ExitStack() as stack:
        lease.stop_if_lost()
        if trouble == "a hang":
            lock = os.open(tmp_path / "out", os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        else:
            (tmp_path / "out").rename(away)
            (tmp_path / "out").write_text("a file where the folder was")
        with pytest.raises(
            RunFailed, match=r"_lease.json: not renewed for \d s \(.+\), so another"
        ):
            watch_for(lease, times.expire_s)
        if trouble == "an error":
            (tmp_path / "out").unlink()
            away.rename(tmp_path / "out")
        stack.close()
        lease.check()  # storage is back, and nobody took over
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_lease_is_gone_must_stop(tmp_path: Path) -> None:
    with Lease(str(tmp_path), times=SLOW) as lease:
        (tmp_path / LEASE_FILE).unlink()
        with pytest.raises(RunFailed, match=r"another run took over .*_lease.json is gone"):
            lease.check()


def test_a_thread_that_finds_another_holder_stops_the_run(tmp_path: Path) -> None:
    with Lease(str(tmp_path), times=FAST) as lease:
        other = write_lease(tmp_path)
        lease._thread.join(30)
        assert not lease._thread.is_alive()
        with pytest.raises(RunFailed, match=r"a run on elsewhere \(process 4321"):
            lease.check()
    assert holder_in(tmp_path) == other


def test_a_lease_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"_lease.json: cannot be taken; inspect it, then delete it"):
        Lease(str(tmp_path)).__enter__()


INTERRUPTED = """
    import sys
    from tsq_ray.console import guarded
    from tsq_ray.runs.lease import Lease

    def command():
        if len(sys.argv) > 1:
            with Lease(sys.argv[1]):
                raise KeyboardInterrupt
        raise KeyboardInterrupt

    sys.exit(guarded(command, debug=False))
"""


@pytest.mark.parametrize("with_lease", [True, False])
def test_only_an_interrupted_run_says_that_its_work_is_saved(
    tmp_path: Path, with_lease: bool
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED)]
    command += [str(tmp_path / "out")] if with_lease else []
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    how = "; run the same command again: saved work is not repeated" if with_lease else ""
    assert (ended.returncode, ended.stderr) == (1, f"error: interrupted{how}\n")
