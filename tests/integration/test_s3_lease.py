"""The lease of a run folder on a real S3 server: conditional writes, renewal, takeover."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import get_args

import pytest
from support.proxy import EXPIRED_TOKEN, S3Proxy, Trouble
from support.race import Kind, check_one_writer_wins

from jobs.benchmarks.support.s3 import S3Server
from tsq_ray import storage
from tsq_ray.errors import RunError, RunFailed
from tsq_ray.runs.lease import LEASE_FILE, Holder, Lease, LeaseTimes

WRITERS = 24
FAST = LeaseTimes(renew_s=0.3, expire_s=3.0, poll_s=0.3)


@pytest.fixture
def folder() -> str:
    """A prefix of its own."""
    return f"s3://tsq-other/lease/{uuid.uuid4().hex}"


@pytest.mark.parametrize("kind", get_args(Kind))
def test_of_many_writers_one_succeeds(s3: S3Server, folder: str, kind: Kind) -> None:
    for attempt in range(2):
        check_one_writer_wins(kind, f"{folder}/{attempt}", WRITERS)


def test_a_store_without_conditional_writes_still_writes(s3_proxy: S3Proxy, folder: str) -> None:
    unknown = Trouble(501, "NotImplemented")
    s3_proxy.trouble(unknown, 1, only="PUT")
    assert storage.create_bytes(f"{folder}/file", b"first")
    assert not storage.create_bytes(f"{folder}/file", b"second")
    s3_proxy.trouble(unknown, 1, only="PUT")
    assert storage.replace_bytes(f"{folder}/file", b"first", b"second")
    assert storage.read_bytes(f"{folder}/file") == b"second"
    assert len(s3_proxy.given) == 1


def test_a_lease_is_held_renewed_and_released(s3: S3Server, folder: str) -> None:
    uri = f"{folder}/{LEASE_FILE}"
    with Lease(folder, times=FAST) as lease:
        before = storage.read_bytes(uri)
        lease.check()
        assert storage.read_bytes(uri) != before
        with pytest.raises(RunError, match=r"writes to this folder; .* with --take-over"):
            Lease(folder, times=FAST).__enter__()
    assert not storage.exists(uri)


def test_a_foreign_lease_is_watched_and_taken_over(
    s3: S3Server,
    folder: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = Holder.of_this_process()
    foreign = dataclasses.replace(here, host="elsewhere", boot_id="another")
    storage.write_bytes(f"{folder}/{LEASE_FILE}", foreign.lease(0))
    with Lease(folder, times=FAST) as lease:
        lease.check()
    assert capsys.readouterr().err.startswith("waiting up to 3 s for a run on elsewhere")


def test_a_foreign_lease_that_is_renewed_is_refused(s3: S3Server, folder: str) -> None:
    with Lease(folder, times=FAST) as lease:
        lease.holder = dataclasses.replace(lease.holder, host="elsewhere")
        lease.check()
        with pytest.raises(RunError, match=r"a run on elsewhere \(process .* writes to this"):
            Lease(folder, times=dataclasses.replace(FAST, expire_s=60)).__enter__()


def test_a_run_that_is_taken_over_must_stop(s3: S3Server, folder: str) -> None:
    with Lease(folder, times=FAST) as first, Lease(folder, take_over=True, times=FAST) as second:
        with pytest.raises(RunFailed, match="another run took over this folder"):
            first.check()
        second.check()


def watch_for(lease: Lease, seconds: float) -> None:
    """Look as a run does whether it must stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lease.stop_if_lost()
        time.sleep(0.02)


def test_a_run_whose_keys_expire_stops_before_another_may_take_over(
    s3_proxy: S3Proxy, folder: str
) -> None:
    """Its workers on other nodes may have keys that go on working."""
    with Lease(folder, times=FAST) as lease:
        s3_proxy.trouble(EXPIRED_TOKEN)
        with pytest.raises(RunFailed, match=r"not renewed for \d s \(.*keys have expired"):
            watch_for(lease, FAST.expire_s)
        s3_proxy.heal()
        lease.check()
