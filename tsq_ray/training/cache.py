"""Arrays in files of this machine, shared by the processes that train on it: made once, mapped by all, removed by the last one.

Mapped files are as fast as memory where they fit into it, and do not run out of memory where they do not. The folder's lock tells who uses it:
it is exclusive while somebody writes, shared while somebody reads, and the kernel gives it back however a process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tsq_ray.errors import StorageError

Create = Callable[[str, np.dtype, Sequence[int]], np.ndarray]
"""(name, type, shape) -> a writable array of that name."""
_LAYOUT = "layout.json"
"""Name -> [type, shape]; written last, so that a folder with it is complete."""


@contextlib.contextmanager
def node_arrays(key: str, write: Callable[[Create], None]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of `key` on this machine for the time of the `with`; `write` makes them where nobody has yet.

    They lie in the temporary folder (TMPDIR). What others of this user left there, whom nobody can be reading for any more, goes first.
    Changes to the arrays are the process's own. Raises StorageError where there is no room.
    """
    prefix = Path(tempfile.gettempdir()) / f"tsq-features-{os.getuid()}-"
    folder = Path(f"{prefix}{key}")
    for other in prefix.parent.glob(f"{prefix.name}*"):
        if other != folder:
            _remove_unused(other)
    lock = _enter(folder, write)
    try:
        yield {
            name: _mapped(folder / name, dtype, shape)
            for name, (dtype, shape) in _layout(folder).items()
        }
    finally:
        _remove_unused(folder, lock)


def _enter(folder: Path, write: Callable[[Create], None]) -> int:
    """The descriptor that holds a shared lock on the complete folder."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # the last one of those before has just removed it
            continue
        try:
            if os.fstat(lock).st_uid != os.getuid():
                raise StorageError(
                    "access_denied",
                    f"{folder}: belongs to another user; set TMPDIR to a folder of yours",
                )
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not (folder / _LAYOUT).exists():
                fcntl.flock(
                    lock, fcntl.LOCK_EX
                )  # the shared lock is given up first: two who want to write do not block each other
                if _is_at(lock, folder) and not (folder / _LAYOUT).exists():
                    _fill(folder, write)
                fcntl.flock(lock, fcntl.LOCK_SH)
            if (
                _is_at(lock, folder) and (folder / _LAYOUT).exists()
            ):  # else somebody took it away before it was locked
                return lock
        except BaseException:
            _remove_unused(folder, lock)
            raise
        os.close(lock)


def _is_at(lock: int, folder: Path) -> bool:
    """Whether the folder that is locked is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder))
    except FileNotFoundError:
        return False


def _fill(folder: Path, write: Callable[[Create], None]) -> None:
    layout: dict[str, tuple[str, list[int]]] = {}

    def create(name: str, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
        layout[name] = (np.dtype(dtype).str, list(shape))
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with open(folder / name, "wb") as file:
            try:
                os.posix_fallocate(
                    file.fileno(), 0, size
                )  # a mapped file that finds no room later ends the process
            except OSError as error:
                free = shutil.disk_usage(folder).free
                raise StorageError(
                    "unavailable",
                    f"{folder}: no room for the {size / 1e9:.2f} GB of {name} ({free / 1e9:.2f} GB are free); set TMPDIR to a larger disk",
                ) from error
        return np.asarray(np.memmap(folder / name, dtype, mode="r+", shape=tuple(shape)))

    write(create)
    (folder / _LAYOUT).write_text(json.dumps(layout))


def _layout(folder: Path) -> dict[str, tuple[str, list[int]]]:
    return json.loads((folder / _LAYOUT).read_text())


def _mapped(path: Path, dtype: str, shape: Sequence[int]) -> np.ndarray:
    # copy on write: torch wants arrays that may be written to
    return np.asarray(np.memmap(path, np.dtype(dtype), mode="c", shape=tuple(shape)))


def _remove_unused(folder: Path, lock: int | None = None) -> None:
    """Remove the folder unless a process uses it; `lock`, ours, is closed."""
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY) if lock is None else lock
    if lock is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(lock, folder):
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
