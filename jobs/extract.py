"""Ray job: manifest to feature Parquet, with the arguments of `tsq extract`.

ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
    python jobs/extract.py MANIFEST --out URI
"""

from __future__ import annotations

import sys

from _command import run

if __name__ == "__main__":
    sys.exit(run("extract"))
