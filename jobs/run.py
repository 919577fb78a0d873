"""Ray job: a `tsq` command on the job's own cluster.

ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
    python jobs/run.py [--attempts N] extract MANIFEST --out URI

With --attempts, a failed run (exit code 1) is started again, up to N runs in all, and resumes.
Wrong input (exit code 2) ends the job immediately. On nodes without `tsq_ray`, the job uses the
package that was shipped with this file.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PAUSE_S = 20.0


def arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments of `tsq`; the job's own cluster is the default address."""
    has_address = any(item == "--address" or item.startswith("--address=") for item in argv)
    return [*argv, *([] if has_address else ["--address", "auto"])]


def attempts(argv: list[str]) -> tuple[int, list[str]]:
    """Take --attempts from the start of a command line."""
    if argv[:1] == ["--attempts"] and len(argv) > 1 and argv[1].isdecimal():
        return max(1, int(argv[1])), argv[2:]
    return 1, argv


def main(argv: list[str], pause_s: float = _PAUSE_S) -> int:
    """Run the command and return its exit code."""
    limit, command = attempts(argv)
    if limit == 1:
        # `ray job submit --working-dir .` ships the folder but does not install the package
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from tsq_ray.cli import main as tsq

        return tsq(arguments(command))
    for remaining in reversed(range(limit)):
        code = subprocess.call([sys.executable, __file__, *command])
        if code in (0, 2) or not remaining:
            break
        print(f"exit code {code}; runs left: {remaining}", file=sys.stderr, flush=True)
        time.sleep(pause_s)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
