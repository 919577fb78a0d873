"""Ray job: manifest and bundle to predictions, with the arguments of `tsq score`.

ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
    python jobs/score.py MANIFEST --model BUNDLE --out URI
"""

from __future__ import annotations

import sys

from _command import run

if __name__ == "__main__":
    sys.exit(run("score"))
