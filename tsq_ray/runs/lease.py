"""Who writes to a run folder: one run at a time, which holds the folder's lease.

The lease is the file `_lease.json`, made by an exclusive create and rewritten while its run lives.
A run that was killed leaves its lease behind. Another one takes it over: at once where the kernel
says that its process is gone, otherwise once it has watched the lease for a while and nobody
rewrote it, so that no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from tsq_ray import provenance, storage
from tsq_ray.errors import RunError, RunFailed, StorageError

LEASE_FILE = "_lease.json"
_TRIES = 10
_held: set[str] = set()
"""Ids of the leases that this process holds now."""


@dataclass(frozen=True)
class LeaseTimes:
    """How often a lease is renewed and when it is taken for abandoned."""

    renew_s: float = 15.0
    """Between two renewals."""
    expire_s: float = 90.0
    """Unchanged for so long while another run watches: abandoned."""
    stale_s: float = 600.0
    """Not renewed for so long by the clock: abandoned without watching."""
    poll_s: float = 3.0
    """Between two looks of a run that watches."""


TIMES = LeaseTimes()


@dataclass(frozen=True)
class Holder:
    """The run that a lease names, and the process it is."""

    id: str
    host: str
    boot_id: str | None
    """Of the running kernel; None if the system does not tell."""
    pid_namespace: str | None
    """What `pid` is counted in: containers of one machine may have the same host name."""
    pid: int
    process_started: int | None
    """Clock ticks from boot to the start of the process: a number may be used again."""
    started: str

    @classmethod
    def of_this_process(cls) -> Holder:
        """A new run, of this process."""
        pid = os.getpid()
        return cls(uuid.uuid4().hex, *_machine(), pid, _start_of(pid), provenance.now())

    @classmethod
    def read(cls, data: bytes) -> Holder | None:
        """The holder that a lease names, None if it is not readable."""
        try:
            content = json.loads(data)
            found = cls(**{field.name: content[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return None
        return found if isinstance(found.pid, int) else None

    def lease(self, renewals: int) -> bytes:
        """The content of its lease after this number of renewals."""
        return (json.dumps(asdict(self) | {"renewals": renewals}, indent=1) + "\n").encode()

    def is_alive(self) -> bool | None:
        """Whether its process runs; None if that cannot be known from this machine."""
        machine = self.host, self.boot_id, self.pid_namespace
        if machine != _machine() or None in (*machine, self.process_started):
            return None
        if self.pid == os.getpid():  # it may have had a lease that it could not give back
            return self.id in _held
        start = _start_of(self.pid)
        return None if start is None and _is_hidden(self.pid) else start == self.process_started

    def __str__(self) -> str:
        return f"a run on {self.host} (process {self.pid}, since {self.started})"


class Lease:
    """The right to write to a run folder, held inside a `with` and renewed by a thread.

    Entering raises RunError if another run holds it; `take_over` takes it from that run at once.
    """

    def __init__(self, folder: str, *, take_over: bool = False, times: LeaseTimes = TIMES) -> None:
        self.folder, self.take_over, self.times = folder, take_over, times
        self.uri = storage.join(folder, LEASE_FILE)
        self.holder = Holder.of_this_process()
        self._renewals = 0
        self._content = self.holder.lease(0)
        self._lost: str | None = None
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="tsq-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._acquire()
        _held.add(self.holder.id)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        _held.discard(self.holder.id)
        self._ended.set()
        self._thread.join(self.times.poll_s)
        if self._thread.is_alive():  # storage does not answer; the lease expires
            return
        with contextlib.suppress(StorageError):
            if self._is_ours(self._read()):
                storage.remove(self.uri)

    def check(self) -> None:
        """Renew the lease now. RunFailed if another run has it: then nothing may be written."""
        self._renew()
        self.stop_if_lost()

    def stop_if_lost(self) -> None:
        """RunFailed if the last renewal found that another run has the lease."""
        if self._lost is not None:
            raise RunFailed(self._lost)

    def _acquire(self) -> None:
        for _ in range(_TRIES):
            if storage.create_bytes(self.uri, self._content):
                return
            found = self._read()
            if self._is_ours(found):  # the store's first answer was lost
                return
            if found is None or not self._is_abandoned(found):
                continue
            if storage.replace_bytes(self.uri, found, self._content):
                return
        raise RunError(f"{storage.redact(self.uri)}: cannot be taken; look at it, then delete it")

    def _is_abandoned(self, found: bytes) -> bool:
        """Whether the lease may be taken from its holder; False once it was given back.

        RunError if its holder lives.
        """
        holder = Holder.read(found)
        alive = holder.is_alive() if holder else None
        if self.take_over or alive is False:
            return True
        if alive:
            raise self._refusal(holder)
        return self._age_s() > self.times.stale_s or self._is_left_unchanged(found, holder)

    def _is_left_unchanged(self, found: bytes, holder: Holder | None) -> bool:
        limit_s = self.times.expire_s
        print(  # noqa: T201
            f"waiting up to {limit_s:g} s for {holder or 'another run'}: it holds "
            f"{storage.redact(self.folder)}; this run takes over unless that one shows life",
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + limit_s
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(self.times.poll_s, left))
            now = self._read()
            if now is None:
                return False
            if now != found:
                raise self._refusal(Holder.read(now) or holder)
        return True

    def _refusal(self, holder: Holder | None) -> RunError:
        return RunError(
            f"{storage.redact(self.folder)}: {holder or 'another run'} writes to this folder; "
            "wait for it, stop it, or take the folder from it with --take-over",
        )

    def _age_s(self) -> float:
        try:
            modified = storage.stat(self.uri).modified
        except StorageError as error:
            if error.error_type != "not_found":
                raise
            return 0.0
        return (datetime.now(timezone.utc) - modified).total_seconds() if modified else 0.0

    def _read(self) -> bytes | None:
        try:
            return storage.read_bytes(self.uri)
        except StorageError as error:
            if error.error_type != "not_found":
                raise
            return None

    def _is_ours(self, found: bytes | None) -> bool:
        holder = Holder.read(found) if found else None
        return holder is not None and holder.id == self.holder.id

    def _keep(self) -> None:
        while self._lost is None and not self._ended.wait(self.times.renew_s):
            with contextlib.suppress(StorageError):  # storage may be away for a moment
                self._renew()

    def _renew(self) -> None:
        with self._renewing:
            if self._lost is not None:
                return
            content = self.holder.lease(self._renewals + 1)
            if storage.replace_bytes(self.uri, self._content, content):
                self._renewals, self._content = self._renewals + 1, content
                return
            found = self._read()
            if found is not None and self._is_ours(found):  # the store's first answer was lost
                self._renewals, self._content = self._renewals + 1, found
            else:
                self._lost = self._loss(found)

    def _loss(self, found: bytes | None) -> str:
        holder = Holder.read(found) if found else None
        now = f"{holder} has it" if holder else f"its {LEASE_FILE} is gone"
        return (
            f"{storage.redact(self.folder)}: another run took over this folder, {now}; "
            "this run stops here: the parts that it finished stay, nothing else is written"
        )


def _machine() -> tuple[str, str | None, str | None]:
    """Host name, boot id and the namespace of process numbers."""
    boot_id = _read_or_none(Path("/proc/sys/kernel/random/boot_id"))
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = None
    return socket.gethostname(), boot_id, namespace


def _start_of(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if it has ended."""
    stat = _read_or_none(Path(f"/proc/{pid}/stat"))
    if stat is None:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _is_hidden(pid: int) -> bool:
    """Whether a process runs that /proc does not show, since it is another user's."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        pass
    return False


def _read_or_none(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
