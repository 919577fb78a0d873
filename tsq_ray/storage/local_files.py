"""Local disks: look up paths, list the files below a folder, write and remove.

Functions raise OSError on failure; `storage_errors` in advice.py turns it into StorageError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import BinaryIO

from tsq_ray.errors import StorageError

_LOST_AND_FOUND = "lost+found"
_SPECIAL = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}
HIDDEN = "hidden (name begins with .)"
NOT_UTF8 = "name is not UTF-8"
VANISHED = "vanished while it was listed"
LINK_LOOP = "link loop"
LISTED_ELSEWHERE = "linked folder, listed under another link"


@dataclass(frozen=True)
class StoredFile:
    """One file as listed: `modified` in UTC, `etag` None on local disks."""

    uri: str
    size_bytes: int
    etag: str | None
    modified: datetime | None


@dataclass(frozen=True)
class LeftOut:
    """An entry that a listing leaves out, and the reason in plain words."""

    uri: str
    reason: str


class SpecialFile(OSError):
    """A FIFO, a socket or a device instead of a file; opening one may block forever."""


def absolute(path: str) -> str:
    """Make a path absolute. Links are kept, except those before a `..`, which are resolved.

    A `..` after a link means the parent of the link's target. Raises StorageError for a relative
    path if the current folder has been removed.
    """
    if not path or "\0" in path:
        return path
    path = os.path.expanduser(path)
    if not path.startswith("/"):
        path = os.path.join(_current_folder(path), path)
    parts = path.split("/")
    if ".." in parts:
        tail = len(parts) - parts[::-1].index("..")
        path = os.path.join(os.path.realpath("/".join(parts[:tail])), *parts[tail:])
    path = os.path.normpath(path)
    return f"/{path.lstrip('/')}"  # POSIX gives two leading slashes a special meaning


def _current_folder(path: str) -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        what = "is relative to the current folder, which has been removed"
        raise StorageError("not_found", f"{path}: {what}; change to another one") from None


def is_utf8(name: str) -> bool:
    """Whether a name can be encoded as UTF-8, as manifests require."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(path: str) -> str | None:
    """Return "directory", "file" (anything else that exists) or None."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return "directory" if stat.S_ISDIR(found.st_mode) else "file"


def look_up(path: str) -> StoredFile:
    """Look up the size and time of a file or folder. Raises SpecialFile if it is neither."""
    return _stored(path, _checked_stat(path))


def open_file(path: str) -> BinaryIO:
    """Open a file for reading. Raises SpecialFile, before opening it, if it is not a file."""
    _checked_stat(path)
    return open(path, "rb")


def _checked_stat(path: str) -> os.stat_result:
    found = os.stat(path)
    special = _special(found)
    if special:
        raise SpecialFile(errno.EINVAL, f"a {special}, not a regular file", path)
    return found


def _special(found: os.stat_result) -> str | None:
    kind = stat.S_IFMT(found.st_mode)
    return None if kind in (stat.S_IFREG, stat.S_IFDIR) else _SPECIAL.get(kind, "special file")


def _stored(path: str, found: os.stat_result) -> StoredFile:
    try:
        modified = datetime.fromtimestamp(found.st_mtime, tz=timezone.utc)
    except (ValueError, OverflowError, OSError):  # outside the years 1 to 9999
        modified = None
    return StoredFile(path, found.st_size, None, modified)


def list_folder(folder: str) -> list[StoredFile]:
    """List the files directly in a folder, sorted, with hidden ones; empty if it is missing."""
    found = []
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        os.scandir(folder) as entries,
    ):
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    found.append(_stored(entry.path, entry.stat()))
    return sorted(found, key=lambda file: file.uri)


def walk(root: str) -> Iterator[StoredFile | LeftOut]:
    """Yield every entry below a folder, sorted by folder and name: a file, or LeftOut.

    A link to a folder is followed under the link's name, once, unless the folder is also listed
    under its own name. Raises OSError if a folder cannot be listed; its `filename` says which.
    """
    yield from _Walk(root).entries()


class _Walk:
    """The state of one listing: the folders already entered through links."""

    def __init__(self, root: str) -> None:
        self.start, self.root = root, os.path.realpath(root)
        self.entered: set[tuple[int, int]] = set()

    def entries(self) -> Iterator[StoredFile | LeftOut]:
        # an explicit stack: folders may be nested deeper than Python's recursion limit
        todo = [(self.start, False)]
        while todo:
            folder, through_link = todo.pop()
            subfolders = []
            for entry in self._scan(folder, through_link):
                found = entry if isinstance(entry, LeftOut) else self._inspect(entry, through_link)
                if isinstance(found, tuple):
                    subfolders.append(found)
                else:
                    yield found
            todo += reversed(subfolders)

    def _scan(self, folder: str, through_link: bool) -> list[os.DirEntry[str]] | list[LeftOut]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENAMETOOLONG)
            if folder == self.start or not (gone or through_link):
                raise
            return [LeftOut(folder, _reason(error) if gone else f"linked folder, {_reason(error)}")]

    def _inspect(
        self, entry: os.DirEntry[str], through_link: bool
    ) -> StoredFile | LeftOut | tuple[str, bool]:
        """Return a file, a LeftOut, or a folder to enter and whether a link led to it."""
        if entry.name.startswith("."):
            return LeftOut(entry.path, HIDDEN)
        if not is_utf8(entry.name):
            return LeftOut(entry.path, NOT_UTF8)
        try:
            is_real_folder = entry.is_dir(follow_symlinks=False)
            if is_real_folder and entry.name == _LOST_AND_FOUND:
                return LeftOut(entry.path, f"{_LOST_AND_FOUND} (the file system's own)")
            if is_real_folder and not through_link:
                return entry.path, False
            found = entry.stat()
        except OSError as error:
            broken = error.errno in (errno.ENOENT, errno.ENOTDIR) and entry.is_symlink()
            return LeftOut(entry.path, "broken link" if broken else _reason(error))
        if stat.S_ISDIR(found.st_mode):
            return self._through_link(entry.path, found, is_real_folder)
        special = _special(found)
        if special:
            return LeftOut(entry.path, f"not a regular file ({special})")
        return _stored(entry.path, found)

    def _through_link(
        self, path: str, found: os.stat_result, is_real_folder: bool
    ) -> LeftOut | tuple[str, bool]:
        if not is_real_folder:
            target = os.path.realpath(path)
            if _is_within(os.path.realpath(os.path.dirname(path)), target) or _is_within(
                self.root, target
            ):
                return LeftOut(path, LINK_LOOP)
            if _is_within(target, self.root) and all(
                map(_is_entered, os.path.relpath(target, self.root).split("/"))
            ):
                return LeftOut(path, "linked folder, listed under its own name")
        # only folders behind links are identified by inode: some file systems repeat inode numbers
        number = found.st_dev, found.st_ino
        if number in self.entered:
            return LeftOut(path, LISTED_ELSEWHERE)
        self.entered.add(number)
        return path, True


def _is_entered(name: str) -> bool:
    return not name.startswith(".") and name != _LOST_AND_FOUND and is_utf8(name)


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _reason(error: OSError) -> str:
    known = {
        errno.ENOENT: VANISHED,
        errno.ELOOP: LINK_LOOP,
        errno.ENAMETOOLONG: "path is too long",
        errno.EACCES: "cannot be looked up (access denied)",
        errno.EPERM: "cannot be looked up (access denied)",
    }
    return known.get(error.errno or 0, f"cannot be looked up ({error.strerror})")


def write(path: str, data: bytes) -> None:
    """Publish atomically: readers see the old content or the new, never a part of it.

    If `path` is a link, the link stays and its target is replaced.
    """
    with open_write(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_write(path: str) -> Iterator[BinaryIO]:
    """Open a file that is published as by `write` when the `with` ends.

    Nothing is published if the `with` raises.
    """
    if os.path.islink(path):
        path = os.path.realpath(path)
    with _temporary_file(path) as (temporary, file):
        yield file
        _sync(file)
        os.replace(temporary, path)


def create(path: str, data: bytes) -> bool:
    """Publish a new file atomically; return False if it exists.

    Only one of several callers succeeds.
    """
    with _temporary_file(path) as (temporary, file):
        file.write(data)
        _sync(file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _create_in_place(path, data)
    return True


def _create_in_place(path: str, data: bytes) -> bool:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def replace(path: str, expected: bytes, data: bytes) -> bool:
    """Publish `data` if the content is still `expected`; return False if it changed or is gone.

    Only one of several callers on a machine succeeds.
    """
    try:
        with _locked(os.path.dirname(path)):
            with open(path, "rb") as file:
                found = file.read()
            if found == expected:
                write(path, data)
            return found == expected
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases however the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary_file(path: str) -> Iterator[tuple[str, BinaryIO]]:
    """Yield a temporary file next to `path`: its name and file object. Creates the folder."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # Parquet readers skip names with a leading dot; a file name is limited to 255 bytes
    temporary = os.path.join(folder, f".{name[:40]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield temporary, file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def remove_folder(path: str) -> None:
    """Delete a folder and everything below it, or a single file."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)
