"""The cores of a node: no more holders than cores, across threads and processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from tsq_ray.serving.cores import Cores

_HOLD = """
import sys, time
from pathlib import Path
from tsq_ray.serving.cores import Cores
with Cores(Path(sys.argv[1]), 1).one():
    print("held", flush=True)
    time.sleep(600)
"""


def test_no_more_holders_than_cores_and_everybody_gets_a_turn(tmp_path: Path) -> None:
    lock, inside, most, turns = threading.Lock(), 0, 0, []

    def work(number: int) -> None:
        nonlocal inside, most
        with Cores(tmp_path, 2).one():
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1
                turns.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 2
    assert sorted(turns) == list(range(8))


def test_a_killed_holder_leaves_its_core(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        held = threading.Event()

        def take() -> None:
            with Cores(tmp_path, 1).one():
                held.set()

        waiting = threading.Thread(target=take)
        waiting.start()
        assert not held.wait(0.3)
    finally:
        holder.kill()
        holder.wait()
    waiting.join(60)
    assert held.is_set()
