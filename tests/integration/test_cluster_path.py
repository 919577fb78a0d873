"""The whole path as jobs over two nodes with disks of their own, against S3, losing a node in each.

The commands are those of cluster/kuberay/jobs. The head has no CPUs. A node that is lost is
replaced by a new one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.archive import Archive, make_archive
from support.cluster import Driver, read_rows, titled, tsq, upload, visible_parts
from support.endpoint import running
from support.head import Head, running_head
from support.nodes import SLOW_SETTINGS
from support.proxy import S3Proxy, running_proxy
from support.train import registered_checkpoints

from jobs.benchmarks.support.s3 import S3Server, free_ports
from tsq_ray import storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BASE = "s3://tsq-other/path"
JOBS = Path(__file__).resolve().parents[2] / "cluster/kuberay/jobs"
END_S = 500.0
SECONDS = 0.5
"""What a video takes longer to arrive."""


@dataclass
class Cloud:
    """Two nodes of one CPU behind a head without CPUs; they know S3 only through the proxy."""

    head: Head
    proxy: S3Proxy
    folder: Path
    holders: set[Path] = field(default_factory=set)
    """Temporary folders in which a training kept features."""

    def lose_a_node(self, actor: str = "") -> None:
        """Kill the newest node that runs such an actor; another one joins."""
        with_actor = (node for node in reversed(self.head.nodes) if titled(node.mark, actor))
        next(with_actor).kill()
        self.head.add_node(1)

    def both_work(self, actor: str) -> bool:
        """Whether both nodes that are left run such an actor."""
        left = [node for node in self.head.nodes if node.process.poll() is None]
        return len(left) == 2 and all(titled(node.mark, actor) for node in left)

    def run(
        self,
        name: str,
        *argv: str,
        lose_when: Callable[[], bool] | None = None,
        actor: str = "",
    ) -> Any:
        """Submit a command, follow its job and return its summary.

        `lose_when`: when to lose a node, one that runs an `actor`.
        """
        command = [*argv, "--submit", "--address", self.head.url, "--json"]
        with Driver(command, self.folder / name, self.head.environment) as driver:
            if lose_when is not None:
                driver.wait_until(lose_when, END_S)
                self.lose_a_node(actor)
            return driver.ended(END_S).json

    def has_checkpoint(self, bundle: str) -> bool:
        """Whether a training has one; notes who holds features."""
        folders = [self.folder / "temporary", *(node.folder for node in self.head.nodes)]
        self.holders.update(one for one in folders if list(one.glob("tsq-features-*")))
        return bool(registered_checkpoints(f"{bundle}/_train"))


@pytest.fixture(scope="module")
def archive(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    made = make_archive(tmp_path_factory.mktemp("archive"), train=8, val=4)
    upload(made.root, f"{BASE}/videos")
    return made


@pytest.fixture
def cloud(s3: S3Server, tmp_path: Path) -> Iterator[Cloud]:
    (tmp_path / "temporary").mkdir()
    with running_proxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("TMPDIR", str(tmp_path / "temporary"))
        proxy.slow = (".mp4", SECONDS)
        with running_head(tmp_path, cpus=0) as head:
            patch.undo()
            head.add_node(1)
            head.add_node(1)
            yield Cloud(head, proxy, tmp_path)


def test_from_videos_to_answers(cloud: Cloud, archive: Archive, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(SLOW_SETTINGS.replace("epochs = 4", "epochs = 60"))
    features, bundle = f"{BASE}/features", f"{BASE}/bundle"
    encoder, predictions = f"{BASE}/encoder", f"{BASE}/predictions"

    index = cloud.run("index", *shipped("index", settings))
    assert index["videos"] == len(archive.paths)
    finetune = shipped("finetune", settings)
    tuned = cloud.run(
        "recognizer",
        *finetune,
        lose_when=lambda: len(visible_parts(f"{BASE}/recognizer/_finetune/features")) >= 2,
    )
    assert tuned["happened"]["nodes_lost"] >= 1
    as_encoder = cloud.run("encoder", *finetune, "--role", "encoder", "--out", encoder)
    for found in (tuned, as_encoder):
        assert found["train_accuracy"] > 0.5

    extract = [*shipped("extract", settings), "--encoder", encoder]
    one = cloud.run("one", *extract, "--out", f"{BASE}/one", "--limit", "1")
    assert one["counts"]["ok"] == 1, "fewer videos than nodes"
    found = cloud.run(
        "extract",
        *extract,
        lose_when=lambda: len(visible_parts(features)) >= 2 and cloud.both_work("ExtractWorker"),
    )
    adds_up(features, archive, found)

    trained = cloud.run(
        "train",
        *shipped("train", settings),
        *("--encoder", encoder),
        *("--set", "train.num_workers=[1, 2]", "--set", "train.checkpoint_every=2"),
        lose_when=lambda: cloud.has_checkpoint(bundle),
        actor="RayTrainWorker",
    )
    assert trained["resumed_after_epoch"] > 0
    assert trained["videos"] == 3 * 8 + 1
    assert cloud.holders
    assert tmp_path / "temporary" not in cloud.holders, "the driver's node reads no features"

    found = cloud.run(
        "score",
        *shipped("score", settings),
        *("--set", "output.rows_per_file=4"),
        lose_when=lambda: len(visible_parts(predictions)) >= 2,
    )
    adds_up(predictions, archive, found)
    assert found["metrics"]["mAP"] > 0.5

    tables = cloud.run(
        "evaluate",
        *shipped("evaluate", settings),
        *("--table", "table2", "--split", "val", "--set", "evaluate.budgets=[1, 2]"),
        lose_when=lambda: bool(visible_parts(f"{BASE}/evaluation/trainings")),
    )
    assert tables["trained_now"] > 1
    assert tables["measured"]["videos"] == 3 * 4 + 1
    check_endpoint(cloud, archive, bundle, tmp_path)


def shipped(run: str, settings: Path) -> list[str]:
    """The command of a job in cluster/kuberay/jobs, with the bucket and settings of this test."""
    words = shlex.split(yaml.safe_load((JOBS / f"{run}.yaml").read_text())["spec"]["entrypoint"])
    return [
        word.replace("s3://BUCKET", BASE).replace("/etc/tsq/settings.toml", str(settings))
        for word in words[words.index(run) :]
    ]


def adds_up(run: str, archive: Archive, summary: dict[str, Any]) -> None:
    """Every video has one row, and the summary says that a node was lost."""
    assert tsq("verify", run, "--json").json["problems"] == []
    rows = read_rows(run)
    assert rows.num_rows == len(archive.paths)
    failed = {
        storage.name_of(uri): error_type
        for uri, error_type in zip(
            rows["uri"].to_pylist(), rows["error_type"].to_pylist(), strict=True
        )
        if error_type is not None
    }
    assert failed == {Path(path).name: error_type for path, error_type in archive.bad.items()}
    assert summary["happened"]["nodes_lost"] == 1


def check_endpoint(cloud: Cloud, archive: Archive, bundle: str, folder: Path) -> None:
    """An endpoint on the nodes answers again after one of them is lost."""
    video, (port,) = (archive.root / "val/0_8.mp4").read_bytes(), free_ports(1, below=10000)
    argv = ["serve", "--model", bundle, "--port", str(port), "--address", cloud.head.address]
    with running(argv, port, folder / "endpoint", cloud.head.environment, None) as endpoint:
        assert endpoint.score(content=video).status_code == 200
        cloud.lose_a_node()
        labels = endpoint.answers_again(content=video).json()["top_labels"]
        assert labels[0] == archive.labels["val/0_8.mp4"]
