"""Output folders, chiefly the run folder of `tsq extract` and `tsq score`.

`done` reads the parts of a run folder and `folder` writes them; `identity` decides whether two runs
do the same work; `lease` keeps a second writer out; `bulk` is one run from its first row to
`_run.json`; `verify` checks a finished run.
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
