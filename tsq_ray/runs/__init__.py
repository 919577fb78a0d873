"""Output folders, above all the run folder of extract and score: what is done, what is left, who writes, whether it adds up.

The names below are what the stages need. `done` reads the parts, `folder` writes them, `identity`
tells whether it is the same work, `lease` who may write, `bulk` is one run from its first row to
`_run.json`, `verify` checks it.
"""

from tsq_ray.runs.bulk import BulkRun, Selection, todo_without_entering
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.folder import (
    CONFIG_FILE,
    FORMAT,
    RUN_FILE,
    Kind,
    read_json,
    read_run,
    write_json,
    write_part,
)
from tsq_ray.runs.identity import Identity
from tsq_ray.runs.lease import Lease

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "RUN_FILE",
    "BulkRun",
    "Identity",
    "Kind",
    "Lease",
    "Selection",
    "list_parts",
    "read_json",
    "read_part",
    "read_run",
    "todo_without_entering",
    "write_json",
    "write_part",
]
