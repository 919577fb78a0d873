"""The endpoint for real, asked over HTTP.

`tsq serve` and a Serve config file run as separate processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.archive import Archive, make_archive
from support.bundle import make_bundle
from support.cluster import Driver, marked, refused, tsq

from jobs.benchmarks.support.s3 import S3Server, free_ports
from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.prediction import predict_rows

REPO = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.ray

TOKEN = "correct-horse-battery"
START_S, ANSWER_S, END_S = 300.0, 120.0, 60.0
MAX_UPLOAD_BYTES = 2**20
TIMEOUT_S = 12
GOOD = (
    "train/0_0.mp4",
    "train/1_1.mp4",
    "train/2_2.mp4",
    "val/portrait.mp4",
    "train/one_frame.mp4",
)
TIMES = {"decode_ms", "sample_ms", "recognize_ms"}
SOURCE = {"video_id", "uri", "size_bytes", "etag", "modified"}
CLOSE = 1e-4


@dataclass
class Endpoint:
    """A running server and a client that has its token."""

    driver: Driver
    url: str
    client: httpx.Client
    folder: Path
    """The server's TMPDIR."""

    def score(self, **request: Any) -> httpx.Response:
        return self.client.post("/v1/score", **request)

    def answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/healthz").status_code == 200
        return False


@contextlib.contextmanager
def running(
    argv: list[str],
    port: int,
    folder: Path,
    environment: Mapping[str, str],
    token: str | None,
    **how: Any,
) -> Iterator[Endpoint]:
    """Run the server for the `with` block, from its first healthy answer on."""
    (folder / "tmp").mkdir(parents=True)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"http://127.0.0.1:{port}"
    with (
        Driver(
            argv, folder / "serve", {"TMPDIR": str(folder / "tmp"), **environment}, **how
        ) as driver,
        httpx.Client(base_url=url, headers=headers, timeout=ANSWER_S, trust_env=False) as client,
    ):
        endpoint = Endpoint(driver, url, client, folder / "tmp")
        deadline = time.monotonic() + START_S
        while not endpoint.answers():
            assert driver.process.poll() is None, f"the endpoint ended: {driver.ended()}"
            assert time.monotonic() < deadline, "the endpoint does not answer"
            time.sleep(0.2)
        yield endpoint


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("served") / "videos")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def rows(archive: Archive, bundle: str) -> dict[str, dict[str, Any]]:
    """What `predict` answers for each file of the archive."""
    found = predict_rows(
        [str(archive.root / path) for path in archive.paths], bundle, scoring_config(bundle)
    )
    return dict(zip(archive.paths, found, strict=True))


@pytest.fixture(scope="module")
def endpoint(
    archive: Archive, bundle: str, s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """`tsq serve` with a token, two open folders, small uploads and a sampler that may scale."""
    (port,) = free_ports(1, below=10000)
    prefixes = json.dumps([str(archive.root / "train"), "s3://tsq-other/open"])
    argv = [
        "serve",
        "--model",
        bundle,
        "--port",
        str(port),
        "--set",
        f"serve.allowed_uri_prefixes={prefixes}",
    ]
    argv += [
        "--set",
        f"serve.max_upload_mb={MAX_UPLOAD_BYTES / 2**20}",
        "--set",
        "serve.sampler.max_replicas=2",
    ]
    argv += [
        "--set",
        "serve.recognizer.min_replicas=1",
        "--set",
        "serve.recognizer.max_replicas=3",
        "--set",
        "serve.ingress.max_replicas=2",
    ]
    folder = tmp_path_factory.mktemp("endpoint")
    with running(argv, port, folder, {"TSQ_TOKEN": TOKEN, **s3.environment}, TOKEN) as found:
        yield found


def same_answer(answer: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Every column except times and the source of the bytes."""
    assert answer.keys() - TIMES == row.keys() - TIMES - {"labels", "split"}
    for name in row.keys() - TIMES - SOURCE - {"labels", "split"}:
        value = row[name].tolist() if hasattr(row[name], "tolist") else row[name]
        if name in ("scores", "top_scores", "saliency_visual", "saliency_textual"):
            assert answer[name] == pytest.approx(value, abs=CLOSE), name
        else:
            assert answer[name] == value, name


FORMS = ("uri", "s3", "body", "form")


def request_for(path: Path, form: str) -> dict[str, Any]:
    if form == "uri":
        return {"json": {"uri": str(path)}}
    if form == "s3":
        storage.write_bytes(f"s3://tsq-other/open/{path.name}", path.read_bytes())
        return {"json": {"uri": f"s3://tsq-other/open/{path.name}"}}
    return (
        {"content": path.read_bytes()}
        if form == "body"
        else {"files": {"file": (path.name, path.read_bytes(), "video/mp4")}}
    )


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in GOOD for form in FORMS if form != "uri" or name.startswith("train/")],
)
def test_same_answer_as_predict(
    endpoint: Endpoint, archive: Archive, rows: dict[str, dict[str, Any]], name: str, form: str
) -> None:
    response = endpoint.score(**request_for(archive.root / name, form))
    assert response.status_code == 200, response.text
    answer = response.json()
    same_answer(answer, rows[name])
    uris = {"uri": str(archive.root / name), "s3": f"s3://tsq-other/open/{Path(name).name}"}
    assert answer["uri"] == uris.get(
        form, f"upload:{Path(name).name}" if form == "form" else "upload"
    )
    assert all(answer[name] > 0 for name in TIMES)


def test_a_chunked_body_is_an_upload_too(
    endpoint: Endpoint, archive: Archive, rows: dict[str, dict[str, Any]]
) -> None:
    data = (archive.root / GOOD[0]).read_bytes()
    response = endpoint.score(content=iter([data[:1000], data[1000:]]))
    assert response.status_code == 200
    same_answer(response.json(), rows[GOOD[0]])


def test_the_example_that_calls_the_endpoint(endpoint: Endpoint, archive: Archive) -> None:
    example = REPO / "docs" / "examples" / "call_endpoint.py"
    good, bad = (str(archive.root / name) for name in (GOOD[0], "train/cut.mp4"))
    done = subprocess.run(
        [sys.executable, str(example), endpoint.url, good, bad],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TSQ_TOKEN": TOKEN},
    )
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{good}: ")
    assert "chosen frames at" in first
    assert second.startswith(f"{bad}: truncated: ")


@pytest.mark.parametrize("form", ["body", "form"])
@pytest.mark.parametrize("name", ["train/cut.mp4", "train/empty.mp4", "val/text.mp4"])
def test_bad_uploads_are_distinguished(
    endpoint: Endpoint, archive: Archive, name: str, form: str
) -> None:
    response = endpoint.score(**request_for(archive.root / name, form))
    answer = response.json()
    assert response.status_code == 422
    assert (answer["status"], answer["error_type"]) == ("failed", archive.bad[name])
    assert answer["error_message"].startswith(
        f"upload:{Path(name).name}: " if form == "form" else "upload: "
    )
    assert "/proc/" not in response.text


@pytest.mark.parametrize(
    ("uri", "status", "error_type"),
    [
        ("train/cut.mp4", 422, "truncated"),
        ("train/nothing.mp4", 404, "not_found"),
        ("train", 403, None),
        ("val/0_3.mp4", 403, None),
        ("train/../val/0_3.mp4", 403, None),
        ("s3://tsq-other/open/nothing.mp4", 404, "not_found"),
        ("s3://tsq-other/closed/a.mp4", 403, None),
        ("https://host.example/a.mp4?X-Amz-Signature=SECRET", 403, None),
    ],
)
def test_a_uri_that_gives_no_prediction(
    endpoint: Endpoint, archive: Archive, uri: str, status: int, error_type: str | None
) -> None:
    response = endpoint.score(json={"uri": uri if "://" in uri else str(archive.root / uri)})
    answer = response.json()
    assert (response.status_code, answer.get("error_type")) == (status, error_type)
    assert answer["status"] == ("failed" if error_type else "refused")
    assert answer["error_message"]
    assert "SECRET" not in response.text


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"content": b"{", "headers": {"Content-Type": "application/json"}},
            "the JSON body must be",
        ),
        ({"json": {"path": "a.mp4"}}, "the JSON body must be"),
        ({"json": {"uri": ["a.mp4"]}}, "the JSON body must be"),
        ({"json": {"uri": "a\x00b"}}, "the JSON body must be"),
        ({"files": {"video": ("a.mp4", b"x")}}, "the form has no `file`"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "boundary"),
    ],
)
def test_a_malformed_request_is_refused(
    endpoint: Endpoint, request_: dict[str, Any], message: str
) -> None:
    response = endpoint.score(**request_)
    assert response.status_code == 400
    assert response.json().keys() == {"status", "error_message"}
    assert message in response.json()["error_message"]


@pytest.mark.parametrize("form", ["announced", "chunks", "form"])
def test_an_upload_above_the_limit_gets_413(endpoint: Endpoint, form: str) -> None:
    data = bytes(3 * MAX_UPLOAD_BYTES)
    request_ = {
        "announced": {"content": data},
        "chunks": {"content": iter([data])},
        "form": {"files": {"file": ("a.mp4", data)}},
    }[form]
    response = endpoint.score(**request_)
    assert response.status_code == 413
    assert response.json()["status"] == "refused"
    assert "larger than" in response.json()["error_message"]


def test_an_upload_of_exactly_the_limit_is_accepted(endpoint: Endpoint) -> None:
    assert endpoint.score(content=bytes(MAX_UPLOAD_BYTES)).json()["error_type"] == "not_video"
    assert endpoint.score(content=bytes(MAX_UPLOAD_BYTES + 1)).status_code == 413
    form = endpoint.score(files={"file": ("a.mp4", bytes(MAX_UPLOAD_BYTES + 1))})
    assert (form.status_code, form.json()["status"]) == (413, "refused")


@pytest.mark.parametrize("path", ["/v1/score", "/v1/model"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer"])
def test_without_the_token_nothing_is_revealed(
    endpoint: Endpoint, path: str, header: str | None
) -> None:
    headers = {"Authorization": header} if header else {}
    response = httpx.request(
        "POST" if path == "/v1/score" else "GET",
        endpoint.url + path,
        headers=headers,
        content=b"x",
        trust_env=False,
    )
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json().keys() == {"status", "error_message"}
    assert TOKEN not in response.text


def test_model_health_and_unknown_paths(endpoint: Endpoint, archive: Archive) -> None:
    model = endpoint.client.get("/v1/model").json()
    assert model["classes"] == sorted(set(archive.labels.values()))
    assert (model["task"], model["num_frames"], model["budget"], model["mode"]) == (
        "single",
        8,
        3,
        "both",
    )
    assert httpx.get(endpoint.url + "/healthz", trust_env=False).json() == {"status": "ok"}
    for path, status in (("/", 404), ("/v1/nothing", 404), ("/v1/score", 405), ("/docs", 404)):
        response = endpoint.client.get(path)
        assert (response.status_code, response.json()["status"]) == (status, "refused")
        assert "POST /v1/score" in response.json()["error_message"]


def test_sixteen_requests_at_once_each_get_their_own_answer(
    endpoint: Endpoint, archive: Archive, rows: dict[str, dict[str, Any]]
) -> None:
    names = [(archive.paths * 2)[number] for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = [
            response.json()
            for response in pool.map(
                lambda name: endpoint.score(content=(archive.root / name).read_bytes()), names
            )
        ]
    for name, answer in zip(names, answers, strict=True):
        assert answer["status"] == rows[name]["status"]
        if answer["status"] == "ok":
            same_answer(answer, rows[name])
        else:
            assert answer["error_type"] == archive.bad[name]
    assert (
        len({answer["top_scores"][0] for answer in answers if answer["status"] == "ok"}) > 8
    )  # distinct, so that a mix-up shows


def process_of(mark: str, title: str) -> int:
    """The server's process whose title is `title`."""
    found = []
    for pid in marked(mark):
        with contextlib.suppress(OSError):
            if title in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").partition("\0")[0]:
                found.append(pid)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.slow
def test_replicas_scale_as_the_settings_say(ray_cluster: Any, bundle: str) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client

    from tsq_ray.runtime.nodes import Cluster
    from tsq_ray.runtime.placement import layout
    from tsq_ray.serving.app import application

    sets = [
        "serve.ingress.max_replicas=2",
        "serve.sampler.max_replicas=2",
        "serve.recognizer.max_replicas=3",
        "serve.decoder.max_replicas=1",
    ]
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    try:
        config = scoring_config(bundle, sets=sets)
        app = application(bundle, config, layout("serve", config, Cluster(()), 1), None)
        serve.run(app, name="scaled", route_prefix=None)
        details = _get_global_client().get_serve_details()["applications"]["scaled"]["deployments"]
        limits = {}
        for name, found in details.items():
            scaling = found["deployment_config"].get("autoscaling_config")
            limits[name] = (
                (scaling["min_replicas"], scaling["max_replicas"])
                if scaling
                else found["deployment_config"]["num_replicas"]
            )
        assert limits == {"Ingress": (1, 2), "Decoder": 1, "Sampler": (1, 2), "Recognizer": (1, 3)}
    finally:
        serve.delete("scaled")


def test_no_upload_and_no_secret_is_left_behind(endpoint: Endpoint, archive: Archive) -> None:
    endpoint.score(content=(archive.root / GOOD[0]).read_bytes())
    assert [path.name for path in endpoint.folder.iterdir() if path.name.startswith("tsq-")] == []
    secrets = (TOKEN, "SECRET", endpoint.driver.environment["AWS_SECRET_ACCESS_KEY"])
    logs = [
        path
        for path in Path(endpoint.driver.environment["RAY_TMPDIR"]).rglob("*")
        if path.suffix in (".log", ".out", ".err", "")
    ]
    logs += [endpoint.driver.log.with_suffix(".out"), endpoint.driver.log.with_suffix(".err")]
    texts = {path: path.read_text(errors="replace") for path in logs if path.is_file()}
    assert len(texts) > 10
    assert [
        path.name for path, text in texts.items() if any(secret in text for secret in secrets)
    ] == []


def until_answered(endpoint: Endpoint, status: int, **request_: Any) -> httpx.Response:
    """Ask until the answer has this status."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            response = endpoint.score(**request_)
            if response.status_code == status:
                return response
        assert time.monotonic() < deadline, f"no answer {status}"
        time.sleep(0.2)


class SlowBody:
    """An upload that pauses in the middle until it is released, for at most `most_s`."""

    def __init__(self, data: bytes, most_s: float) -> None:
        self.data, self.most_s, self.go_on = data, most_s, threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        yield self.data[:100]
        self.go_on.wait(self.most_s)
        yield self.data[100:]


@pytest.mark.slow
def test_limits_a_crash_and_the_shutdown(
    archive: Archive, bundle: str, rows: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    (port,) = free_ports(1, below=10000)
    argv = ["serve", "--model", bundle, "--port", str(port), "--set", "serve.max_queued_requests=2"]
    argv += ["--set", f"serve.request_timeout_s={TIMEOUT_S}"]
    data = (archive.root / GOOD[1]).read_bytes()
    with (
        running(argv, port, tmp_path, {"TSQ_TOKEN": ""}, None) as endpoint,
        ThreadPoolExecutor(8) as pool,
    ):
        until_answered(endpoint, 200, content=data)  # loopback needs no token

        bodies: list[SlowBody] = []
        waiting = []
        while (
            full := endpoint.score(json={})
        ).status_code != 429:  # a probe without a length: 400 while there is room
            assert full.status_code == 400
            assert len(bodies) < 8
            bodies.append(SlowBody(data, ANSWER_S))
            waiting.append(pool.submit(endpoint.score, content=bodies[-1]))
            time.sleep(1)
        assert full.headers["Retry-After"] == "1"
        assert full.json().keys() == {"status", "error_message"}
        assert "2 requests are in progress" in full.json()["error_message"]
        for body in bodies:
            body.go_on.set()
        assert [found.result(ANSWER_S).status_code for found in waiting].count(200) == 2

        late = endpoint.score(content=SlowBody(data, TIMEOUT_S + 5))
        assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
        assert f"serve.request_timeout_s = {TIMEOUT_S} s" in late.json()["error_message"]

        os.kill(process_of(endpoint.driver.mark, "ServeReplica:tsq:Sampler"), signal.SIGKILL)
        same_answer(until_answered(endpoint, 200, content=data).json(), rows[GOOD[1]])

        endpoint.driver.process.send_signal(signal.SIGTERM)
        ended = endpoint.driver.ended(END_S)
        assert ended.code == 0, ended
        shown = [
            line for line in ended.err.strip().splitlines() if "(raylet)" not in line
        ]  # Ray reports the killed replica
        serving = f"serving {bundle} on http://127.0.0.1:{port}/v1/score (stop with Ctrl-C)"
        assert shown == ["starting: ready in about 20 s", serving, "stopped"]
        assert "Traceback" not in ended.out
        deadline = time.monotonic() + END_S
        while left := marked(endpoint.driver.mark):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.2)


@pytest.mark.slow
def test_the_kubernetes_config_serves(
    archive: Archive, bundle: str, rows: dict[str, dict[str, Any]], repo_dir: Path, tmp_path: Path
) -> None:
    """The Serve config of cluster/kuberay/rayservice.yaml with this bundle.

    It asks for no more CPUs and GPUs than this machine has.
    """
    manifest = yaml.safe_load((repo_dir / "cluster" / "kuberay" / "rayservice.yaml").read_text())
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (port,) = free_ports(1, below=10000)
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["proxy_location"] = "HeadOnly"
    (application,) = config["applications"]
    application["args"]["model"] = bundle
    application["args"]["settings"] = {"sampler": {"budget": 2}}
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0.1}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    argv = ["run", str(tmp_path / "serve.yaml")]
    with running(
        argv, port, tmp_path / "run", {"TSQ_TOKEN": TOKEN}, TOKEN, module="ray.serve.scripts"
    ) as endpoint:
        answer = until_answered(endpoint, 200, content=(archive.root / GOOD[2]).read_bytes()).json()
        assert len(answer["selected_slot"]) == 2
        assert answer["saliency_visual"] == pytest.approx(
            rows[GOOD[2]]["saliency_visual"].tolist(), abs=CLOSE
        )
        assert (
            httpx.post(endpoint.url + "/v1/score", content=b"x", trust_env=False).status_code == 401
        )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            r"--host 0\.0\.0\.0: a host beyond loopback needs a bearer token; set the "
            r"environment variable TSQ_TOKEN",
        ),
        (["--host", "::"], "--host ::: a host beyond loopback needs a bearer token"),
        (["--set", "serve.sampler.min_replicas=3"], "min_replicas 3 is above max_replicas 1"),
        (
            ["--set", "decode.num_frames=16"],
            "scoring cannot change what the bundle was trained with",
        ),
        (
            ["--set", "sampler.budget=9"],
            r"sampler.budget \(K\) is 9, above decode.num_frames \(T\) = 8",
        ),
    ],
)
def test_serve_refuses(
    bundle: str, argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TSQ_TOKEN", raising=False)
    port = str(free_ports(1, below=10000)[0])
    assert re.search(message, refused(tsq("serve", "--model", bundle, "--port", port, *argv)))


def test_serve_refuses_a_port_in_use(bundle: str, s3: S3Server) -> None:
    port = s3.endpoint.rpartition(":")[2]
    message = refused(tsq("serve", "--model", bundle, "--port", port))
    assert message == (
        f"--host 127.0.0.1 --port {port}: cannot be bound (Address already in use); choose "
        "another --port or --host"
    )


def test_serve_refuses_what_is_no_bundle_or_cannot_score(tmp_path: Path) -> None:
    port = str(free_ports(1, below=10000)[0])
    assert "has no bundle.json" in refused(tsq("serve", "--model", tmp_path, "--port", port))
    without = make_bundle(tmp_path / "no_recognizer", with_recognizer=False)
    assert "the bundle has no recogniser" in refused(
        tsq("serve", "--model", without, "--port", port)
    )
    whole = Path(make_bundle(tmp_path / "damaged"))
    (whole / "sampler.safetensors").write_bytes(b"x")
    assert "its content is not what was written" in refused(
        tsq("serve", "--model", whole, "--port", port)
    )
