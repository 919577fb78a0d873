"""Ray job: features to a trained bundle, with the arguments of `tsq train`.

ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
    python jobs/train.py FEATURES --out BUNDLE
"""

from __future__ import annotations

import sys

from _command import run

if __name__ == "__main__":
    sys.exit(run("train"))
