"""The lease of a run folder: only one run at a time holds it, and only that run may write.

The lease is the file `_lease.json`, created exclusively and rewritten while its run is alive. A
killed run leaves its lease behind. Another run takes it over: immediately if the kernel reports
that the process is gone, otherwise after watching the lease stay unchanged for a while. A lease is
never judged by its age, because the clocks of two machines may differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tsq_ray import log, provenance, storage
from tsq_ray.errors import RunError, RunFailed, StorageError

LEASE_FILE = "_lease.json"
_TRIES = 10
_held: set[str] = set()
"""Ids of the leases that this process holds."""


@dataclass(frozen=True)
class LeaseTimes:
    """How often a lease is renewed, and when it counts as abandoned."""

    renew_s: float = 15.0
    """Interval between renewals."""
    expire_s: float = 90.0
    """A lease that stays unchanged this long while another run watches is abandoned."""
    poll_s: float = 3.0
    """Interval between reads while watching."""

    @property
    def trusted_s(self) -> float:
        """How long a run may write after its last renewal; the rest is time to stop."""
        return 2 / 3 * self.expire_s


TIMES = LeaseTimes()


@dataclass(frozen=True)
class Holder:
    """The run that holds a lease, and its process."""

    id: str
    host: str
    boot_id: str | None
    """Boot id of the running kernel; None if the system does not provide one."""
    pid_namespace: str | None
    """Namespace of `pid`: containers on one machine may share a host name."""
    pid: int
    process_started: int | None
    """Clock ticks from boot to the start of the process, because a pid can be reused."""
    started: str

    @property
    def run(self) -> str:
        """The id of the run, as in its log lines, its metrics and `_run.json`."""
        return self.id[:12]

    @classmethod
    def of_this_process(cls) -> Holder:
        """Create the holder for a new run in this process."""
        pid = os.getpid()
        return cls(uuid.uuid4().hex, *_machine(), pid, _start_of(pid), provenance.now())

    @classmethod
    def read(cls, data: bytes) -> Holder | None:
        """Parse the holder from a lease; None if the content is not valid."""
        try:
            content = json.loads(data)
            found = cls(**{field.name: content[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return None
        return found if isinstance(found.pid, int) else None

    def lease(self, renewals: int) -> bytes:
        """Return the content of the lease after this number of renewals."""
        return (json.dumps(asdict(self) | {"renewals": renewals}, indent=1) + "\n").encode()

    def is_alive(self) -> bool | None:
        """Whether the holder's process runs; None if this machine cannot tell."""
        machine = self.host, self.boot_id, self.pid_namespace
        if machine != _machine() or None in (*machine, self.process_started):
            return None
        # this process may have left behind a lease that it could not remove
        if self.pid == os.getpid():
            return self.id in _held
        start = _start_of(self.pid)
        return None if start is None and _is_hidden(self.pid) else start == self.process_started

    def __str__(self) -> str:
        return f"a run on {self.host} (process {self.pid}, since {self.started})"


class Lease:
    """The right to write to a run folder, held inside a `with` and renewed by a thread.

    Entering raises RunError if another run holds it, unless `take_over` is set. A local folder that
    the lease made is removed at the end if nothing was written to it.
    """

    def __init__(self, folder: str, *, take_over: bool = False, times: LeaseTimes = TIMES) -> None:
        self.folder, self.take_over, self.times = folder, take_over, times
        self.uri = storage.join(folder, LEASE_FILE)
        self.holder = Holder.of_this_process()
        self._renewals = 0
        self._content = self.holder.lease(0)
        self._renewed = time.monotonic()
        self._lost: str | None = None
        self._made_folder = False
        self._renewal_error = "storage does not answer"
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_regularly, name="tsq-lease", daemon=True)

    def __enter__(self) -> Lease:
        log.use_run(self.holder.run)
        self._made_folder = storage.is_local(self.folder) and not storage.exists(self.folder)
        self._acquire()
        _held.add(self.holder.id)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        _held.discard(self.holder.id)
        self._ended.set()
        self._thread.join(self.times.poll_s)
        if self._thread.is_alive():  # storage does not answer: let the lease expire
            return
        with contextlib.suppress(StorageError):
            if self._is_ours(self._read()):
                storage.remove(self.uri)
                if self._made_folder:
                    storage.remove_empty_folder(self.folder)

    def check(self) -> None:
        """Renew the lease. Raises RunFailed if another run has it: writing is then forbidden."""
        self._renew()
        self.stop_if_lost()

    def stop_if_lost(self) -> None:
        """Raise RunFailed if the lease is, or may be, lost; does not access storage.

        It is lost if the last renewal found that another run has it. Another run may take it once
        no renewal has succeeded for `expire_s`; workers must have stopped by then.
        """
        if self._lost is not None:
            raise RunFailed(self._lost)
        since = time.monotonic() - self._renewed
        if since > self.times.trusted_s:
            raise RunFailed(
                f"{storage.redact(self.uri)}: not renewed for {since:.0f} s "
                f"({self._renewal_error}), so another run may take over this folder; this run "
                "stops: its finished parts are kept, run the same command again to resume"
            )

    def _acquire(self) -> None:
        for _ in range(_TRIES):
            self._renewed = time.monotonic()
            if storage.create_bytes(self.uri, self._content):
                return
            found = self._read()
            if self._is_ours(found):  # created, but the response was lost and the retry failed
                return
            if found is None or not self._is_abandoned(found):
                continue
            self._renewed = time.monotonic()  # watching took time
            if storage.replace_bytes(self.uri, found, self._content):
                return
        raise RunError(f"{storage.redact(self.uri)}: cannot be taken; inspect it, then delete it")

    def _is_abandoned(self, found: bytes) -> bool:
        """Whether the lease may be taken from its holder; False if it has been released since.

        Raises RunError if the holder is alive.
        """
        holder = Holder.read(found)
        alive = holder.is_alive() if holder else None
        if self.take_over or alive is False:
            return True
        if alive:
            raise self._refusal(holder)
        return self._is_left_unchanged(found, holder)

    def _is_left_unchanged(self, found: bytes, holder: Holder | None) -> bool:
        limit_s = self.times.expire_s
        log.say(
            f"waiting up to {limit_s:g} s for {holder or 'another run'}: it holds "
            f"{storage.redact(self.folder)}; this run takes over unless that one renews its lease"
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
            "wait for it, stop it, or take over the folder with --take-over",
        )

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

    def _renew_regularly(self) -> None:
        while self._lost is None and not self._ended.wait(self.times.renew_s):
            try:
                self._renew()
            # `stop_if_lost` ends the run if renewals keep failing, whatever the reason
            except Exception as error:  # noqa: BLE001
                self._renewal_error = storage.redact(str(error)) or type(error).__name__

    def _renew(self) -> None:
        with self._renewing:
            if self._lost is not None:
                return
            started, content = time.monotonic(), self.holder.lease(self._renewals + 1)
            if not storage.replace_bytes(self.uri, self._content, content):
                found = self._read()
                if found is None or not self._is_ours(found):
                    self._lost = self._loss_message(found)
                    return
                content = found  # replaced, but the response was lost and the retry failed
            self._renewals, self._content, self._renewed = self._renewals + 1, content, started

    def _loss_message(self, found: bytes | None) -> str:
        holder = Holder.read(found) if found else None
        now = f"{holder} has it" if holder else f"its {LEASE_FILE} is gone"
        return (
            f"{storage.redact(self.folder)}: another run took over this folder, {now}; "
            "this run stops: its finished parts are kept, nothing else is written"
        )


def _machine() -> tuple[str, str | None, str | None]:
    """Return the host name, the boot id and the pid namespace."""
    boot_id = _read_or_none(Path("/proc/sys/kernel/random/boot_id"))
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = None
    return socket.gethostname(), boot_id, namespace


def _start_of(pid: int) -> int | None:
    """Return the clock ticks from boot to the start of a process; None if it has ended."""
    stat = _read_or_none(Path(f"/proc/{pid}/stat"))
    if stat is None:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _is_hidden(pid: int) -> bool:
    """Whether a process runs that /proc hides because it belongs to another user."""
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
