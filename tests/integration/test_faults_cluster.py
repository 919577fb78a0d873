"""Faults of a run on a cluster of two nodes with S3 behind a proxy.

Rows of the fault table in docs/operations.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Driver, Ended, short_folder, tsq
from support.fault import BAD, Site, adds_up, make_site, one_line
from support.proxy import (
    CUT,
    EXPIRED_TOKEN,
    EXPIRED_TOKEN_403,
    INTERNAL_ERROR,
    SLOW_DOWN,
    S3Proxy,
    Trouble,
    running_proxy,
)

from jobs.benchmarks.support.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]
END_S = 900.0


@dataclass
class Cloud:
    """A Ray cluster whose nodes know S3 only through the proxy."""

    cluster: Any
    proxy: S3Proxy

    def driver(self, site: Site, log: Path, *more: str) -> Driver:
        """The site's command as a separate process on this cluster."""
        return Driver(
            [*site.argv, "--address", self.cluster.address, *more],
            log,
            {"AWS_ENDPOINT_URL": self.proxy.endpoint},
        )

    def run(self, site: Site, log: Path, *more: str) -> Ended:
        with self.driver(site, log, *more) as driver:
            return driver.ended(END_S)

    def run_into(self, trouble: Trouble, site: Site, log: Path) -> Ended:
        """Answer every request this way, from the first part until the run has ended."""
        try:
            with self.driver(site, log) as driver:
                driver.wait_until(lambda: site.parts, END_S)
                self.proxy.trouble(trouble)
                return driver.ended(END_S)
        finally:
            self.proxy.heal()


@pytest.fixture(scope="module")
def cloud(s3: S3Server) -> Iterator[Cloud]:
    from ray.cluster_utils import Cluster

    with (
        running_proxy(s3.endpoint) as proxy,
        short_folder() as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        head = {
            "num_cpus": 2,
            "include_dashboard": False,
            "object_store_memory": 128 * 2**20,
            "temp_dir": str(folder),
        }
        cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        try:
            patch.undo()
            yield Cloud(cluster, proxy)
        finally:
            cluster.shutdown()


def test_storage_fails_for_a_while(cloud: Cloud, tmp_path: Path) -> None:
    site = make_site(tmp_path, "s3://tsq-other/stumbles")
    with cloud.driver(site, tmp_path / "run") as driver:
        seen = 0
        for trouble in (SLOW_DOWN, INTERNAL_ERROR, CUT):
            driver.wait_until(lambda seen=seen: len(site.parts) > seen, END_S)  # type: ignore[misc]
            seen = len(site.parts)
            cloud.proxy.trouble(trouble, 2)
            driver.wait_until(lambda: len(cloud.proxy.given) == 2, END_S)
        ended = driver.ended(END_S)
    cloud.proxy.heal()
    assert ended.code == 0, ended.err
    adds_up(site)


@pytest.mark.parametrize(
    "trouble", [INTERNAL_ERROR, EXPIRED_TOKEN], ids=lambda trouble: trouble.code
)
def test_storage_stays_unavailable(cloud: Cloud, trouble: Trouble, tmp_path: Path) -> None:
    site = make_site(tmp_path, f"s3://tsq-other/{trouble.code}")
    ended = cloud.run_into(trouble, site, tmp_path / "run")
    said = (
        "the keys have expired; renew them"
        if trouble is EXPIRED_TOKEN
        else "storage did not respond as expected"
    )
    assert said in one_line(ended)
    before = site.parts
    assert 0 < len(before) < 9
    assert tsq("verify", site.out).code == 2, "the run is not finished"
    assert cloud.run(site, tmp_path / "again").code == 0
    assert before <= site.parts
    adds_up(site)


def test_keys_are_refused_during_a_run(cloud: Cloud, tmp_path: Path) -> None:
    """The output is stored elsewhere, so the run continues to its end."""
    site = make_site(tmp_path, "s3://tsq-other/refused", out=str(tmp_path / "features"))
    ended = cloud.run_into(EXPIRED_TOKEN_403, site, tmp_path / "run")
    assert ended.code in (0, 1), ended.err
    denied = [row for row in site.rows().values() if row["error_type"] == "access_denied"]
    assert denied
    assert all("check the keys" in row["error_message"] for row in denied)
    assert cloud.run(site, tmp_path / "again", "--retry-failed", "access_denied").code == 0
    adds_up(site)


def test_a_node_is_lost(cloud: Cloud, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.options += ["--set", "resources.workers=2"]
    node = cloud.cluster.add_node(num_cpus=2, object_store_memory=128 * 2**20)
    with cloud.driver(site, tmp_path / "run") as driver:
        driver.wait_until(lambda: site.parts, END_S)
        cloud.cluster.remove_node(node, allow_graceful=False)
        ended = driver.ended(END_S)
    assert ended.code == 0, ended.err
    adds_up(site, BAD)
