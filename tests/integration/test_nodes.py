"""Runs on clusters of several nodes.

Few videos, a node that joins, nodes from nothing, a cluster in use, a node lost during scoring.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.bundle import make_bundle
from support.cluster import Driver, Ended, read_rows, visible_parts
from support.endpoint import Load, running
from support.manifests import cluster_spec, ray_manifests
from support.nodes import SLOW_SETTINGS, SlowStore, autoscaling, nodes, running_store, slow_manifest
from support.scrape import counters_of, wait_for_counters
from support.video import write_video

from jobs.benchmarks.support.s3 import free_ports
from tsq_ray.runs.lease import Lease

pytestmark = pytest.mark.ray
END_S = 400.0
SECONDS = 0.7
"""The store's delay before it returns a video."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SlowStore]:
    with running_store(tmp_path, SECONDS) as found:
        yield found


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(SLOW_SETTINGS)
    return path


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    with nodes(1, 1) as cluster:
        yield cluster


HOLDER = """
import sys, time
import ray

ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1)
class Holder:
    def ready(self):
        return True

held = [Holder.remote() for _ in range(2)]
ray.get([one.ready.remote() for one in held])
print("held", flush=True)
time.sleep(600)
"""


def test_one_video_on_two_nodes(
    two_nodes: Any, store: SlowStore, settings: Path, tmp_path: Path
) -> None:
    """No actor may need more CPUs than a node has, or the run waits forever."""
    argv = [
        "extract",
        slow_manifest(store, tmp_path, 1),
        "--out",
        tmp_path / "out",
        "--config",
        settings,
    ]
    with Driver([*argv, "--address", two_nodes.address], tmp_path / "run") as driver:
        ended = driver.ended(END_S)
    assert ended.code == 0, ended.err
    assert read_rows(str(tmp_path / "out")).num_rows == 1


@pytest.mark.slow
def test_a_cluster_that_another_job_holds(
    two_nodes: Any, store: SlowStore, settings: Path, tmp_path: Path
) -> None:
    argv = [
        "extract",
        slow_manifest(store, tmp_path, 4),
        "--out",
        tmp_path / "out",
        "--config",
        settings,
    ]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, two_nodes.address], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with Driver(
            [*argv, "--address", two_nodes.address, "--wait-s", "12"], tmp_path / "run"
        ) as driver:
            ended = driver.ended(END_S)
        looking = ["info", argv[1], "--cluster", "--address", two_nodes.address, "--json"]
        with Driver(looking, tmp_path / "info") as driver:
            found = driver.ended(END_S).json
    finally:
        holder.kill()
        holder.wait()
    assert ended.code == 1, ended.err
    lines = ended.err.splitlines()
    waiting = [line for line in lines if line.startswith("extract: waiting for ")]
    assert waiting, ended.err
    for fact in (
        "x (0.9 CPU",
        "free 0 of 2 CPU on 2 nodes",
        "largest node (1 CPU)",
        "2 x Holder",
        "no node is starting",
    ):
        assert fact in waiting[0]
    assert "gave up after --wait-s 12; run the same command again to resume" in lines[-1]
    assert found["free"]["CPU"] == "0 of 2"
    assert "2 x Holder" in found["held_by"]
    assert found["extract"]["would_wait"].startswith("yes: no room for a worker of 0.9 CPU, ")
    assert found.keys().isdisjoint({"train", "serve"})


@pytest.mark.slow
def test_a_dry_run_on_a_cluster_probes_one_of_its_nodes(
    two_nodes: Any, store: SlowStore, settings: Path, tmp_path: Path
) -> None:
    argv = ["extract", slow_manifest(store, tmp_path, 6, "probed"), "--out", tmp_path / "out"]
    argv += ["--config", settings, "--dry-run", "--price", "cpu=2", "--json"]
    found = []
    for more in ([], ["--nodes", "6"]):
        with Driver([*argv, "--address", two_nodes.address, *more], tmp_path / "run") as driver:
            found.append(driver.ended(END_S).json)
    two, six = found
    assert (two["nodes"], two["cpus"], six["nodes"], six["cpus"]) == (2, 2.0, 6, 6.0)
    assert len(two["probed"]) == 6
    assert two["seconds_a_video"] > 2 * six["seconds_a_video"] > 0
    assert two["cost"]["total"] == pytest.approx(2 * two["cpu_hours"], rel=1e-3)
    assert not (tmp_path / "out").exists()


UPLOAD = """
import asyncio, dataclasses, hashlib, os, sys, tempfile
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address=sys.argv[1], log_to_driver=False)

def on(node):
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, False)}

@ray.remote
class Ingress:
    def hold(self, size):
        from tsq_ray.serving.requests.uploads import Upload
        data = os.urandom(size)
        self.file = tempfile.TemporaryFile()
        self.file.write(data)
        self.file.flush()
        path = f"/proc/{os.getpid()}/fd/{self.file.fileno()}"
        node = ray.get_runtime_context().get_node_id()
        self.upload = Upload(node, path, size, hashlib.sha256(data).hexdigest(), "a.mp4")
        return self.upload

    async def store(self):
        return dataclasses.replace(await self.upload.in_object_store(), path="/nowhere")

@ray.remote
class Decoder:
    async def read(self, upload):
        from tsq_ray.serving.requests.uploads import local_path
        async with local_path(upload) as path:
            with open(path, "rb") as file:
                return path, hashlib.file_digest(file, "sha256").hexdigest()

first, second = (node["NodeID"] for node in ray.nodes() if node["Alive"])
ingress = Ingress.options(**on(first)).remote()
upload = ray.get(ingress.hold.remote(20_000_000))
stored = ray.get(ingress.store.remote())
for node, upload in ((first, upload), (second, upload), (second, stored)):
    path, digest = ray.get(Decoder.options(**on(node)).remote().read.remote(upload))
    print(path == upload.path, digest == upload.sha256)
"""


def test_an_upload_reaches_a_decoder_on_another_node(two_nodes: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, two_nodes.address],
        capture_output=True,
        text=True,
        timeout=END_S,
        check=True,
    )
    assert done.stdout.splitlines() == ["True True", "False True", "False True"]


def test_cluster_resources_and_the_layout_of_runs(two_nodes: Any, tmp_path: Path) -> None:
    argv = [
        "info",
        "--cluster",
        "--address",
        two_nodes.address,
        "--json",
        "--set",
        "serve.decoder.num_cpus=4",
    ]
    with Driver(argv, tmp_path / "run") as driver:
        found = driver.ended(END_S).json
    assert (found["nodes"], found["largest_node"], found["free"]["CPU"]) == (
        {"alive": 2},
        "1 CPU",
        "2 of 2",
    )
    assert found["extract"]["worker"].startswith("2 (as the cluster grows) of 0.9 CPU, ")
    assert found["train"]["worker"].startswith("1 of ")
    assert {"decoder", "sampler", "recognizer", "sender", "writer"} < found["score"].keys()
    assert found["extract"]["would_wait"] == "no"
    assert [set(node) for node in found["each_node"].values()] == [{"CPU", "memory", "disk"}] * 2
    assert (found["held_by"], found["waiting"]) == ("nobody", "nothing")
    assert found["autoscaler"] == "no node is starting"
    assert found["can_start"] == "nothing: no resources.node_types"
    assert found["serve"].startswith(
        "serve: a decoder asks for 4 CPU, which no node of the cluster can ever hold"
    )


ACTORS = """
import json, sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False)
from ray._private.state import actors

names = {node["NodeID"]: node["Labels"].get("part", "head") for node in ray.nodes()}
print(json.dumps(sorted({
    (actor["ActorClassName"], names[actor["Address"]["NodeID"]], actor["State"])
    for actor in actors().values()
    if actor["Address"]["NodeID"] in names
})))
"""


def placed_actors(address: str) -> list[tuple[str, str, str]]:
    """Class, node and state of each actor that has had a node."""
    asked = [sys.executable, "-c", ACTORS, address]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    return [(kind, node, state) for kind, node, state in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.slow
def test_labels_place_each_part(store: SlowStore, settings: Path, tmp_path: Path) -> None:
    """Decoders and writers on the nodes with their labels, encoders on the others."""
    labels = [{"part": "decode"}, {"part": "networks"}]
    with nodes(0, 1, 1, labels=labels) as cluster:
        argv = ["extract", slow_manifest(store, tmp_path, 12), "--out", tmp_path / "out"]
        argv += ["--config", settings, "--set", "resources.decoders=1"]
        for part, label in (("decode", "decode"), ("networks", "networks"), ("write", "decode")):
            argv += ["--set", f"resources.labels.{part}=part={label}"]
        with Driver([*argv, "--address", cluster.address], tmp_path / "run") as driver:
            ended = driver.ended(END_S)
        assert ended.code == 0, ended.err
        placed = placed_actors(cluster.address)
    assert read_rows(str(tmp_path / "out")).num_rows == 12
    for kind, node in (("DecodeWorker", "decode"), ("EncodeWorker", "networks")):
        assert {where for name, where, _ in placed if kind in name} == {node}
    assert {where for name, where, _ in placed if "WritePart" in name} == {"decode"}


@pytest.mark.slow
def test_a_run_stops_when_its_folder_is_taken_over(
    two_nodes: Any, store: SlowStore, settings: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    argv = [
        "extract",
        slow_manifest(store, tmp_path, 120),
        "--out",
        out,
        "--config",
        settings,
        "--address",
        two_nodes.address,
    ]
    with Driver([*argv, "--set", "output.rows_per_file=2"], tmp_path / "run") as driver:
        driver.wait_until(lambda: len(store.begun) >= 3, END_S)
        with Lease(out, take_over=True):
            ended = driver.ended(END_S)
            parts = visible_parts(out)
            time.sleep(3)
            assert visible_parts(out) == parts, "it goes on writing"
    assert ended.code == 1, ended.err
    assert "another run took over this folder" in ended.err.splitlines()[-1]
    assert len(store.begun) < 120


@pytest.mark.slow
def test_a_node_that_joins_works_within_30_s(
    store: SlowStore, settings: Path, tmp_path: Path
) -> None:
    with nodes(1) as cluster:
        argv = [
            "extract",
            slow_manifest(store, tmp_path, 150),
            "--out",
            tmp_path / "out",
            "--config",
            settings,
        ]
        with Driver([*argv, "--address", cluster.address], tmp_path / "run") as driver:
            driver.wait_until(lambda: len(store.begun) >= 5, END_S)
            first = time.monotonic()
            driver.wait_until(lambda: len(store.begun) >= 20, END_S)
            before = store.rate(first, time.monotonic())
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
            joined = time.monotonic()
            driver.wait_until(lambda: len(store.begun) >= 140, END_S)
            after = store.rate(joined + 30, time.monotonic())
            ended = driver.ended(END_S)
    assert ended.code == 0, ended.err
    assert after >= 1.6 * before, (before, after)
    assert read_rows(str(tmp_path / "out")).num_rows == 150


TYPES = {"cpu": ({"CPU": 1.0}, 3), "gpu": ({"CPU": 1.0, "GPU": 1.0}, 1)}
NODE_TYPES = "resources.node_types=[{cpus = 1, count = 3}, {cpus = 1, gpus = 1, count = 1}]"


LABELS = {"cpu": {"part": "decode"}, "gpu": {"part": "networks"}}
LABELLED = (
    NODE_TYPES.replace("count = 3", "count = 3, labels = 'part=decode'").replace(
        "count = 1}]", "count = 1, labels = 'part=networks'}]"
    ),
    "resources.labels.decode=part=decode",
    "resources.labels.write=part=decode",
)


def extract_from_nothing(
    store: SlowStore, settings: Path, folder: Path, count: int, gpus: int, *sets: str
) -> Ended:
    """A head without CPUs and both groups at 0, as in the files in cluster/."""
    with autoscaling(TYPES, LABELS if sets else {}) as address:
        argv = [
            "extract",
            slow_manifest(store, folder, count),
            "--out",
            folder / "out",
            "--config",
            settings,
            "--address",
            address,
        ]
        for one in (NODE_TYPES, f"resources.gpus={gpus}", *sets):
            argv += ["--set", one]
        # a Ray instance that this process started has left its token's mode in the environment
        with Driver(argv, folder / "run", {"RAY_AUTH_MODE": "disabled"}) as driver:
            return driver.ended(END_S)


@pytest.mark.slow
@pytest.mark.parametrize("sets", [(), LABELLED], ids=["any node", "by labels"])
def test_a_cluster_grows_from_nothing_to_its_limits(
    store: SlowStore, settings: Path, sets: tuple[str, ...], tmp_path: Path
) -> None:
    ended = extract_from_nothing(store, settings, tmp_path, 150, 0, *sets)
    assert ended.code == 0, ended.err
    assert read_rows(str(tmp_path / "out")).num_rows == 150
    moments = sorted(store.begun.values())
    fastest = max(store.rate(moment, moment + 10) for moment in moments[: len(moments) // 2])
    assert fastest > 2.2 / SECONDS, "more than two nodes at work"


@pytest.mark.slow
def test_gpus_are_requested_from_the_autoscaler(
    store: SlowStore, settings: Path, tmp_path: Path
) -> None:
    """The new node's GPU exists in name only: the encoder placed there finds none and says so."""
    ended = extract_from_nothing(store, settings, tmp_path, 4, gpus=1)
    assert ended.code == 1
    assert "NVIDIA" in ended.err.splitlines()[-1]


def drain(address: str, node_id: str, folder: str) -> None:
    """Give the notice that a spot pod of this folder of cluster/kuberay gives before it ends."""
    (manifest,) = ray_manifests(folder, "spot")
    (container,) = cluster_spec(manifest)["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    shell, option, command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("sh", "-c")
    notice, _, wait = command.partition(";")
    assert wait.split()[0] == "sleep"
    ray = str(Path(sys.executable).with_name("ray"))
    here = f"{notice.replace('ray ', f'{ray} ', 1)} --address {address} --node-id {node_id}"
    subprocess.run([shell, option, here], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("notice", [True, False], ids=["with notice", "without"])
def test_a_spot_node_is_taken_away(
    store: SlowStore, settings: Path, notice: bool, tmp_path: Path
) -> None:
    """With notice, its worker finishes what it has and takes nothing new: no video is done twice.

    The counters equal the rows in either case.
    """
    count = 120 if notice else 60  # 20 s pass before the node is taken
    argv = ["extract", slow_manifest(store, tmp_path, count), "--out", tmp_path / "out", "--json"]
    argv += ["--config", settings, "--set", "output.rows_per_file=4"]
    with (
        nodes(1, 1) as cluster,
        Driver([*argv, "--address", cluster.address], tmp_path / "run") as driver,
    ):
        driver.wait_until(lambda: len(store.begun) >= 12, END_S)
        (other,) = cluster.worker_nodes
        if notice:
            drain(cluster.address, other.node_id, "cluster")
            time.sleep(20)
        cluster.remove_node(other, allow_graceful=False)
        ended = driver.ended(END_S)
        assert ended.code == 0, ended.err
        rows, parts = read_rows(str(tmp_path / "out")), ended.json["parts"]
        head = cluster.head_node
        url = f"http://{head.node_ip_address}:{head.metrics_export_port}/metrics"
        wait_for_counters(url, ended.json["run_id"], counters_of(rows, len(parts)))
    assert (rows.num_rows, set(rows["status"].to_pylist())) == (count, {"ok"})
    happened = ended.json["happened"]
    assert happened["nodes_lost"] == 1
    if notice:  # without it, those that were in hand and not yet published
        assert "videos_done_again" not in happened


@pytest.mark.slow
def test_a_pod_of_the_endpoint_is_drained(tmp_path: Path) -> None:
    """Its replicas are replaced on another node before they end: each request has its answer."""
    write_video(tmp_path / "a.mp4", num_frames=12)
    data, (port,) = (tmp_path / "a.mp4").read_bytes(), free_ports(1, below=10000)
    bundle = make_bundle(tmp_path / "bundle")
    # a Ray instance that this process started has left its token's mode in the environment
    environment = {"RAY_AUTH_MODE": "disabled", "TSQ_TOKEN": ""}
    with nodes(0, 2, labels=[{"part": "first"}]) as cluster:
        argv = ["serve", "--model", bundle, "--port", str(port), "--address", cluster.address]
        with running(argv, port, tmp_path / "endpoint", environment, None) as endpoint:
            (first,) = cluster.worker_nodes
            assert replicas_on(cluster.address, "first")
            cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20, labels={"part": "second"})
            load = Load(lambda: endpoint.score(content=data), 2)
            load.wait_for(4)
            drain(cluster.address, first.node_id, "endpoint")
            deadline = time.monotonic() + 140  # as the pod has
            while replicas_on(cluster.address, "first"):
                assert time.monotonic() < deadline, "replicas are left on the node"
            load.wait_for(4)
            answers = load.ended()
            cluster.remove_node(first, allow_graceful=False)
            assert endpoint.answers_again(content=data).json()["status"] == "ok"
    bad = [answer.text if answer else None for answer in answers if not answer or answer.is_error]
    assert bad == []
    assert len({json.dumps(answer.json()["scores"]) for answer in answers if answer}) == 1


def replicas_on(address: str, node: str) -> list[str]:
    """The endpoint's replicas that are alive on this node."""
    return [
        kind
        for kind, where, state in placed_actors(address)
        if "ServeReplica" in kind and (where, state) == (node, "ALIVE")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["first time", "second time", "third time", "with notice"])
def test_a_node_is_lost_during_scoring(store: SlowStore, how: str, tmp_path: Path) -> None:
    count = 150 if how == "with notice" else 60  # 20 s pass before the node is taken
    with nodes(1, 1) as cluster:
        bundle = make_bundle(tmp_path / "bundle")
        argv = [
            "score",
            slow_manifest(store, tmp_path, count),
            "--model",
            bundle,
            "--out",
            tmp_path / "out",
        ]
        with Driver(
            [*argv, "--address", cluster.address, "--set", "output.rows_per_file=4"],
            tmp_path / "run",
        ) as driver:
            driver.wait_until(lambda: len(store.begun) >= 12, END_S)
            (other,) = cluster.worker_nodes
            if how == "with notice":
                drain(cluster.address, other.node_id, "cluster")
                time.sleep(20)
            cluster.remove_node(other, allow_graceful=False)
            lost, seen = time.monotonic(), len(store.begun)
            driver.wait_until(lambda: len(store.begun) >= seen + 6, END_S)
            resumed = time.monotonic() - lost
            ended = driver.ended(END_S)
    assert ended.code == 0, ended.err
    rows = read_rows(str(tmp_path / "out"))
    assert rows.num_rows == count
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert resumed < 60, "by the issue of this test: a run used to stand still"
