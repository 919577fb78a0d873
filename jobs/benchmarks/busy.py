"""Inference next to busy processes, with and without this package's thread setting.

python jobs/benchmarks/busy.py [--busy 0 2 --rounds 3 --batch 16 --size 188]

Every process of this package sets OMP_WAIT_POLICY=PASSIVE (tsq_ray/__init__.py), so a thread that
waits for the others of a layer sleeps instead of spinning. The two sides alternate, each in a
process of its own that runs one batch of MobileNetV2 (random weights) to warm up and one that is
timed, with one thread per core. The table shows medians. `busy`: number of processes that only
occupy a core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

_VARIABLE = "OMP_WAIT_POLICY"
_BATCH = """
import sys, time
import timm, torch

batch, size = map(int, sys.argv[1:])
network = timm.create_model("mobilenetv2_100", pretrained=False).eval()
pictures = torch.rand(batch, 3, size, size)
with torch.inference_mode():
    network(pictures)
    started = time.perf_counter()
    network(pictures)
    print(time.perf_counter() - started)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, 2], help="numbers of busy processes"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=188)
    options = parser.parse_args(argv)
    sys.stdout.write(
        "| busy processes | s without | s with | ratio |\n| ---: | ---: | ---: | ---: |\n"
    )
    for busy in options.busy:
        without, passive = _measure(busy, options)
        sys.stdout.write(f"| {busy} | {without:.2f} | {passive:.2f} | {without / passive:.2f}x |\n")
        sys.stdout.flush()
    return 0


def _measure(busy: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return median seconds without and with the setting."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    sides = (bare, bare | {_VARIABLE: "PASSIVE"})
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        rounds = [[_seconds(side, options) for side in sides] for _ in range(options.rounds)]
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    return statistics.median(first for first, _ in rounds), statistics.median(
        second for _, second in rounds
    )


def _seconds(environment: dict[str, str], options: argparse.Namespace) -> float:
    command = [sys.executable, "-c", _BATCH, str(options.batch), str(options.size)]
    return float(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    )


if __name__ == "__main__":
    sys.exit(main())
