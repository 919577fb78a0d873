"""The run folder of extract and score: what is done, what is left, who writes, whether it adds up.

The names below are what stages and reports need. `done` reads the parts, `folder` writes them,
`bulk` is one run from its first row to `_run.json`, `verify` checks it.
"""

from tsq_ray.runs.bulk import close_run, enter, remaining, retry_reasons
from tsq_ray.runs.done import list_parts, read_part
from tsq_ray.runs.folder import (
    FORMAT,
    RUN_FILE,
    Kind,
    check_folder,
    read_json,
    read_run,
    reopen,
    write_json,
    write_part,
)
from tsq_ray.runs.identity import Identity

__all__ = [
    "FORMAT",
    "RUN_FILE",
    "Identity",
    "Kind",
    "check_folder",
    "close_run",
    "enter",
    "list_parts",
    "read_json",
    "read_part",
    "read_run",
    "remaining",
    "reopen",
    "retry_reasons",
    "write_json",
    "write_part",
]
