"""Arrays in local files, shared by the training processes of a machine.

The first process writes them, all processes map them, and the last one removes them. Mapped files
are as fast as memory if they fit into it, and cause no out-of-memory error if they do not. A lock
on the folder shows who uses it: exclusive while writing, shared while reading. The kernel releases
it however a process ends.
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
"""Creates a writable array from (name, type, shape)."""
_LAYOUT = "layout.json"
"""Maps name to [type, shape]; written last, so a folder that has it is complete."""


@contextlib.contextmanager
def node_arrays(key: str, write: Callable[[Create], None]) -> Iterator[dict[str, np.ndarray]]:
    """Provide the arrays of `key` on this machine for the duration of the `with`.

    If no process has written them yet, `write` is called. They lie in the temporary folder
    (TMPDIR); unused arrays that other runs of this user left there are removed first. Changes to
    the arrays stay private to the process. Raises StorageError if the disk has no room.
    """
    prefix = Path(tempfile.gettempdir()) / f"tsq-features-{os.getuid()}-"
    folder = Path(f"{prefix}{key}")
    for other in prefix.parent.glob(f"{prefix.name}*"):
        if other != folder:
            _remove_unused(other)
    lock = _lock_folder(folder, write)
    try:
        yield {
            name: _mapped(folder / name, dtype, shape)
            for name, (dtype, shape) in _layout(folder).items()
        }
    finally:
        _remove_unused(folder, lock)


def _lock_folder(folder: Path, write: Callable[[Create], None]) -> int:
    """Return a descriptor that holds a shared lock on the complete folder."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its last user has just removed it
            continue
        try:
            if os.fstat(lock).st_uid != os.getuid():
                raise StorageError(
                    "access_denied",
                    f"{folder}: belongs to another user; set TMPDIR to a folder of your own",
                )
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not (folder / _LAYOUT).exists():
                # releases the shared lock first, so two writers do not block each other
                fcntl.flock(lock, fcntl.LOCK_EX)
                if _is_at(lock, folder) and not (folder / _LAYOUT).exists():
                    _fill(folder, write)
                fcntl.flock(lock, fcntl.LOCK_SH)
            # otherwise another process removed it before it was locked
            if _is_at(lock, folder) and (folder / _LAYOUT).exists():
                return lock
        except BaseException:
            _remove_unused(folder, lock)
            raise
        os.close(lock)


def _is_at(lock: int, folder: Path) -> bool:
    """Whether the locked folder is still the one at this path."""
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
                # reserves the space now: a mapped file on a full disk kills the process
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                free = shutil.disk_usage(folder).free
                raise StorageError(
                    "unavailable",
                    f"{folder}: no room for the {size / 1e9:.2f} GB of {name} "
                    f"({free / 1e9:.2f} GB free); set TMPDIR to a larger disk "
                    "or lower train.max_videos",
                ) from error
        return np.asarray(np.memmap(folder / name, dtype, mode="r+", shape=tuple(shape)))

    write(create)
    (folder / _LAYOUT).write_text(json.dumps(layout))


def _layout(folder: Path) -> dict[str, tuple[str, list[int]]]:
    return json.loads((folder / _LAYOUT).read_text())


def _mapped(path: Path, dtype: str, shape: Sequence[int]) -> np.ndarray:
    # copy on write, because torch expects writable arrays
    return np.asarray(np.memmap(path, np.dtype(dtype), mode="c", shape=tuple(shape)))


def _remove_unused(folder: Path, lock: int | None = None) -> None:
    """Remove the folder unless a process uses it; closes `lock`, this process's own lock."""
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
