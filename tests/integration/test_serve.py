"""The endpoint for real, asked over HTTP.

`tsq serve` and a Serve config file run as separate processes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image
from support.archive import Archive
from support.browser import Page, page
from support.bundle import make_bundle
from support.cluster import marked, refused, tsq
from support.contract import check_document
from support.endpoint import (
    ANSWER_S,
    CLOSE,
    END_S,
    SOURCE,
    TIMES,
    TOKEN,
    Endpoint,
    Load,
    running,
    same_answer,
    serving,
)
from support.served import MAX_UPLOAD_BYTES, Served

from jobs.benchmarks.support.s3 import S3Server, free_ports
from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.prediction import predict_rows
from tsq_ray.rows import plain_row
from tsq_ray.serving.requests.models import Prediction, Problem

REPO = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.ray

GOOD = (
    "train/0_0.mp4",
    "train/1_1.mp4",
    "train/2_2.mp4",
    "val/portrait.mp4",
    "train/one_frame.mp4",
)


@pytest.fixture(scope="module")
def archive(served: Served) -> Archive:
    return served.archive


@pytest.fixture(scope="module")
def bundle(served: Served) -> str:
    return served.bundle


@pytest.fixture(scope="module")
def rows(archive: Archive, bundle: str) -> dict[str, dict[str, Any]]:
    """What `predict` answers for each file of the archive."""
    found = predict_rows(
        [str(archive.root / path) for path in archive.paths], bundle, scoring_config(bundle)
    )
    return dict(zip(archive.paths, found, strict=True))


@pytest.fixture
def endpoint(served: Served) -> Endpoint:
    """`tsq serve` with a token, two open folders, small uploads and a sampler that may scale."""
    return served.endpoint


FORMS = ("uri", "s3", "body", "form")


def is_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem details of an answer with this status."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    answer: dict[str, Any] = response.json()
    Problem.model_validate_json(response.content)
    assert answer["status"] == status
    assert answer["detail"]
    assert answer["request_id"] == response.headers["x-request-id"]
    return answer


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
    Prediction.model_validate_json(response.content)
    same_answer(answer, rows[name])
    uris = {"uri": str(archive.root / name), "s3": f"s3://tsq-other/open/{Path(name).name}"}
    assert answer["uri"] == uris.get(
        form, f"upload:{Path(name).name}" if form == "form" else "upload"
    )
    assert all(answer[name] > 0 for name in TIMES)
    if form == "uri":
        expected = plain_row({key: rows[name][key] for key in SOURCE})
        assert {key: answer[key] for key in SOURCE} == expected


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
@pytest.mark.parametrize("name", ["train/cut.mp4", "val/text.mp4"])
def test_bad_uploads_are_distinguished(
    endpoint: Endpoint, archive: Archive, name: str, form: str
) -> None:
    response = endpoint.score(**request_for(archive.root / name, form))
    answer = is_problem(response, 422)
    assert answer["error_type"] == archive.bad[name]
    shown = f"upload:{Path(name).name}: " if form == "form" else "upload: "
    assert answer["detail"].startswith(shown)
    assert answer["video"]["size_bytes"] == (archive.root / name).stat().st_size
    assert "/proc/" not in response.text


@pytest.mark.parametrize(
    ("uri", "status", "error_type"),
    [
        ("train/cut.mp4", 422, "truncated"),
        ("train/nothing.mp4", 404, "not_found"),
        ("train/" + "x" * 300, 404, "not_found"),
        ("train/fifo.mp4", 422, "not_video"),
        ("train", 403, None),
        ("val/0_3.mp4", 403, None),
        ("train/../val/0_3.mp4", 403, None),
        ("s3://tsq-other/open/nothing.mp4", 404, "not_found"),
        ("s3://tsq-other/closed/a.mp4", 403, None),
        ("https://host.example/a.mp4?X-Amz-Signature=SECRET", 403, None),
        ("s3://key:SECRET@tsq-other/open/a.mp4", 403, None),
    ],
)
def test_a_uri_that_gives_no_prediction(
    endpoint: Endpoint, archive: Archive, uri: str, status: int, error_type: str | None
) -> None:
    if uri.endswith("fifo.mp4"):
        os.mkfifo(archive.root / uri)
    asked = uri if "://" in uri else str(archive.root / uri)
    response = endpoint.score(json={"uri": asked})
    (archive.root / "train/fifo.mp4").unlink(missing_ok=True)
    answer = is_problem(response, status)
    assert answer.get("error_type") == error_type
    assert ("video" in answer) == (error_type is not None)
    assert "SECRET" not in response.text
    for prefix in (str(archive.root / "train"), "s3://tsq-other/open"):
        assert prefix not in response.text or prefix in asked.replace("key:SECRET@", "")


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "Invalid JSON"),
        ({"json": {"path": "a.mp4"}}, 400, "uri: Field required"),
        ({"json": {"uri": ["a.mp4"]}}, 400, "uri: Input should be a valid string"),
        ({"json": {"uri": "/a", "k": 0}}, 400, "k: Input should be greater than or equal to 1"),
        ({"content": b"x", "params": {"k": 9}}, 400, "k: 9 is above 8"),
        ({"content": b"x", "params": {"top": 99}}, 400, "top: 99 is above 3"),
        ({"json": {"uri": "a\x00b"}}, 403, "is not absolute"),
        ({"files": {"video": ("a.mp4", b"x")}}, 400, "the form has no `file`"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b""}, 400, "the file is empty"),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "video/*"),
        ({"content": b"x", "headers": {"Content-Encoding": "gzip"}}, 415, "Content-Encoding"),
    ],
)
def test_a_malformed_request_is_refused(
    endpoint: Endpoint, request_: dict[str, Any], status: int, message: str
) -> None:
    answer = is_problem(endpoint.score(**request_), status)
    assert message in answer["detail"]
    assert "error_type" not in answer


@pytest.mark.parametrize("form", ["announced", "chunks", "form"])
def test_an_upload_above_the_limit_gets_413(endpoint: Endpoint, form: str) -> None:
    data = bytes(3 * MAX_UPLOAD_BYTES)
    request_ = {
        "announced": {"content": data},
        "chunks": {"content": iter([data])},
        "form": {"files": {"file": ("a.mp4", data)}},
    }[form]
    assert "larger than" in is_problem(endpoint.score(**request_), 413)["detail"]


def test_an_upload_of_exactly_the_limit_is_accepted(endpoint: Endpoint) -> None:
    assert endpoint.score(content=bytes(MAX_UPLOAD_BYTES)).json()["error_type"] == "not_video"
    too_large = bytes(MAX_UPLOAD_BYTES + 1)
    for _ in range(10):  # one after the other: a refused one may leave its connection unusable
        for form in ({"content": too_large}, {"files": {"file": ("a.mp4", too_large)}}):
            answer = endpoint.score(**form)
            is_problem(answer, 413)
            assert answer.headers["Connection"] == "close"


@pytest.mark.parametrize("path", ["/v1/score", "/v1/models"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer"])
def test_without_the_token_nothing_is_revealed(
    endpoint: Endpoint, path: str, header: str | None
) -> None:
    headers = {"Authorization": header} if header else {}
    method = "POST" if path == "/v1/score" else "GET"
    response = httpx.request(
        method, endpoint.url + path, headers=headers, content=b"x", trust_env=False
    )
    is_problem(response, 401)
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert TOKEN not in response.text


@pytest.mark.parametrize("form", ["uri", "body"])
def test_what_a_request_may_ask_for(
    endpoint: Endpoint, archive: Archive, rows: dict[str, dict[str, Any]], form: str
) -> None:
    path, row = archive.root / GOOD[0], rows[GOOD[0]]
    options: dict[str, Any] = {"k": 2, "top": 2, "scores": False, "frames": True}
    request_ = {"json": {"uri": str(path)} | options}
    if form == "body":
        request_ = {"content": path.read_bytes(), "params": options}
    answer = endpoint.score(**request_).json()
    assert "scores" not in answer
    assert len(answer["top_labels"]) == len(answer["selected_slot"]) == 2
    chosen = zip(answer["selected_index"], answer["selected_pts_s"], strict=True)
    for frame, (index, seconds) in zip(answer["frames"], chosen, strict=True):
        assert (frame["index"], frame["seconds"]) == (index, seconds)
        with Image.open(io.BytesIO(base64.b64decode(frame["jpeg"]))) as picture:
            assert picture.format == "JPEG"
    config = scoring_config(str(endpoint.model), sets=["sampler.budget=2"])
    (two,) = predict_rows([str(path)], str(endpoint.model), config)
    assert answer["selected_slot"] == two["selected_slot"]
    assert answer["top_scores"] == pytest.approx(two["top_scores"][:2], abs=CLOSE)
    assert len(row["selected_slot"]) == 3, "the endpoint's own budget is another one"


def test_models_health_and_unknown_paths(endpoint: Endpoint, archive: Archive) -> None:
    (model,) = endpoint.client.get("/v1/models").json()["models"]
    assert model["classes"] == sorted(set(archive.labels.values()))
    expected = {"task": "single", "num_frames": 8, "budget": 3, "mode": "both"}
    expected |= {"clip_frames": 1}
    assert model | expected == model
    answer = endpoint.score(content=(archive.root / GOOD[0]).read_bytes())
    assert answer.json()["model"] == answer.headers["X-TSQ-Model"] == model["id"]
    for path in ("/healthz", "/readyz"):
        assert httpx.get(endpoint.url + path, trust_env=False).json() == {"status": "ok"}
    for path, status in (("/v1/nothing", 404), ("/v1/score/", 404), ("/v1/score", 405)):
        assert "/openapi.json" in is_problem(endpoint.client.get(path), status)["detail"]
    for path in ("/-/routes", "/-/healthz"):  # Serve's own
        answer = endpoint.client.get(path)
        assert (answer.status_code, answer.json()["status"]) == (404, 404)


def test_the_documentation_needs_no_other_server(endpoint: Endpoint) -> None:
    page = endpoint.client.get("/docs").text
    assert "/openapi.json" in page
    assert not re.search(r"https?://", page)
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert name in page
        assert endpoint.client.get(f"/docs/{name}").status_code == 200
    document = endpoint.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert {"/v1/score", "/v1/models", "/v1/batches", "/healthz"} <= document["paths"].keys()


def test_a_request_id_is_in_the_answer_and_in_the_log(endpoint: Endpoint, archive: Archive) -> None:
    mine = {"x-request-id": "my-own-id", "Content-Type": "video/mp4"}
    data = (archive.root / "train/cut.mp4").read_bytes()
    response = endpoint.score(content=data, headers=mine)
    assert response.headers["x-request-id"] == response.json()["request_id"] == "my-own-id"
    (line,) = log_lines(endpoint, "my-own-id")
    assert (line["status"], line["error_type"], line["token"]) == (422, "truncated", "TSQ_TOKEN")
    assert line["seconds"] > 0


def test_the_line_about_a_prediction(endpoint: Endpoint, archive: Archive) -> None:
    mine = {"x-request-id": "my-prediction", "Content-Type": "video/mp4"}
    data = (archive.root / GOOD[0]).read_bytes()
    answer = endpoint.score(content=data, headers=mine, params={"frames": True}).json()
    (line,) = log_lines(endpoint, "my-prediction")
    named = ("video_id", "size_bytes", *sorted(TIMES))
    assert {name: line[name] for name in named} == {name: answer[name] for name in named}
    assert line["size_bytes"] == len(data)
    assert (line["status"], line["path"], line["token"]) == (200, "/v1/score", "TSQ_TOKEN")
    assert "error_type" not in line
    text = json.dumps(line)
    for kept in (TOKEN, endpoint.driver.environment["AWS_SECRET_ACCESS_KEY"]):
        assert kept not in text
    assert answer["frames"]
    for frame in answer["frames"]:
        assert frame["jpeg"] not in text
    assert not line.keys() & {"frames", "scores", "top_labels"}


def log_lines(endpoint: Endpoint, request_id: str) -> list[dict[str, Any]]:
    """The lines about a request in the JSON logs of the replicas."""
    deadline = time.monotonic() + END_S
    while True:
        logs = Path(endpoint.driver.environment["RAY_TMPDIR"]).rglob("replica_*Ingress*.log")
        lines = [line for log in set(logs) for line in log.read_text().splitlines()]
        if found := [json.loads(line) for line in lines if f'"{request_id}"' in line]:
            return list({line["asctime"]: line for line in found}.values())
        assert time.monotonic() < deadline, "no line about the request"
        time.sleep(0.5)


def test_metrics_count_the_requests(endpoint: Endpoint, archive: Archive) -> None:
    endpoint.score(content=(archive.root / GOOD[0]).read_bytes())
    endpoint.score(content=(archive.root / "train/cut.mp4").read_bytes())
    wanted = (
        'ray_tsq_requests_total{.*status="200"',
        'ray_tsq_requests_total{.*error_type="truncated".*status="422"',
        'ray_tsq_stage_seconds_bucket{.*stage="decode"',
        "ray_tsq_waiting_seconds_count",
        "ray_tsq_frames_decoded_total",
        "ray_tsq_requests_in_hand",
        "ray_tsq_expected_wait_seconds",
        'ray_tsq_model_info{.*sha256="',
    )
    deadline = time.monotonic() + END_S  # they are exported every few seconds
    while True:
        text = httpx.get(endpoint.metrics_url, trust_env=False).text
        missing = [name for name in wanted if not re.search(name, text)]
        if not missing:
            break
        assert time.monotonic() < deadline, missing
        time.sleep(1)


def test_dashboard_and_alerts_use_metrics_that_exist(endpoint: Endpoint, archive: Archive) -> None:
    endpoint.score(content=(archive.root / GOOD[0]).read_bytes())
    files = sorted((REPO / "cluster" / "monitoring").iterdir())
    named = {name for file in files for name in re.findall(r"ray_tsq_[a-z_]+", file.read_text())}
    used = {name for name in named if not name.startswith("ray_tsq_run_")} - {
        "ray_tsq_decoders_restarted_total"
    }  # exported from the first loss on
    assert len(used) >= 8
    deadline = time.monotonic() + END_S
    while True:
        text = httpx.get(endpoint.metrics_url, trust_env=False).text
        missing = {name for name in used if not re.search(rf"^{name}{{", text, re.MULTILINE)}
        if not missing:
            break
        assert time.monotonic() < deadline, missing
        time.sleep(1)


def test_nothing_listens_beyond_loopback(endpoint: Endpoint) -> None:
    sockets = set()
    for pid in marked(endpoint.driver.mark):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(link))
    open_to_others = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, state, inode = (line.split()[number] for number in (1, 3, 9))
            host = address.partition(":")[0]
            loopback = host == "0100007F" or host.endswith("FFFF00000100007F")
            loopback |= host == "00000000000000000000000001000000"
            if state == "0A" and f"socket:[{inode}]" in sockets and not loopback:
                open_to_others.append(address)
    assert open_to_others == []


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
        if rows[name]["status"] == "ok":
            same_answer(answer, rows[name])
        else:
            # an empty file is refused as a request
            assert answer.get("error_type", "not_video") == archive.bad[name]
    assert (
        len({answer["top_scores"][0] for answer in answers if "top_scores" in answer}) > 8
    )  # distinct, so that a mix-up shows


def test_the_document_is_kept(endpoint: Endpoint) -> None:
    assert check_document(endpoint, 16) > 60


@pytest.mark.slow
def test_the_document_is_kept_2000_times(endpoint: Endpoint) -> None:
    sent = check_document(endpoint, 400)
    print(f"{sent} made-up requests")
    assert sent >= 2000


@pytest.mark.slow
def test_decoders_scale_up_and_down(archive: Archive, bundle: str, tmp_path: Path) -> None:
    settings = (
        "serve.decoder.max_replicas=2",
        "serve.decoder.target_ongoing_requests=1",
        "serve.decoder.upscale_delay_s=1",
        "serve.decoder.downscale_delay_s=5",
    )
    data = (archive.root / GOOD[0]).read_bytes()
    with serving(bundle, tmp_path, *settings) as endpoint:

        def until(replicas: int) -> None:
            start = time.monotonic()
            while len(endpoint.processes("ServeReplica:tsq:Decoder")) != replicas:
                assert time.monotonic() < start + ANSWER_S, f"no {replicas} decoders"
                time.sleep(0.5)
            print(f"{replicas} decoders after {time.monotonic() - start:.0f} s")

        until(1)
        load = Load(lambda: endpoint.score(content=data), 8)
        until(2)
        answers = load.ended()
        until(1)
        assert {answer.status_code for answer in answers if answer is not None} == {200}
        assert None not in answers


def test_no_upload_and_no_secret_is_left_behind(endpoint: Endpoint, archive: Archive) -> None:
    endpoint.score(content=(archive.root / GOOD[0]).read_bytes())
    assert [
        path.name
        for path in endpoint.folder.iterdir()
        if path.name.startswith(("tsq-upload", "tsq-fetch"))
    ] == []
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


@pytest.mark.slow
def test_the_kubernetes_config_serves(
    archive: Archive, bundle: str, rows: dict[str, dict[str, Any]], repo_dir: Path, tmp_path: Path
) -> None:
    """The Serve config of cluster/kuberay/endpoint/service.yaml with this bundle.

    It asks for no more CPUs and GPUs than this machine has.
    """
    file = repo_dir / "cluster" / "kuberay" / "endpoint" / "service.yaml"
    manifest = yaml.safe_load(file.read_text())
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
        answer = endpoint.answers_again(content=(archive.root / GOOD[2]).read_bytes()).json()
        assert len(answer["selected_slot"]) == 2
        assert answer["saliency_visual"] == pytest.approx(
            rows[GOOD[2]]["saliency_visual"], abs=10 * CLOSE
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
            r"environment variable TSQ_TOKEN, or serve\.tokens_file",
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


@pytest.mark.parametrize(
    "loop", [["--clients", "1,3"], pytest.param(["--rates", "2,4"], marks=pytest.mark.slow)]
)
def test_bench(
    endpoint: Endpoint, archive: Archive, loop: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQ_TOKEN", TOKEN)
    video = archive.root / GOOD[0]
    ended = tsq("bench", endpoint.url, video, *loop, "--seconds", "2", "--json")
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    assert [point["load"] for point in found["points"]] == [float(n) for n in loop[1].split(",")]
    for point in found["points"]:
        assert point["statuses"].keys() == {"200"}
        assert 0 < point["p50_s"] <= point["p95_s"] <= point["p99_s"]
        assert point["cpu_ms"]["Ingress"] > 0
    assert found["saturated_at"] in [point["load"] for point in found["points"]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["URL", "VIDEO", "--clients", "x"], "--clients 'x': expected numbers above 0"),
        (["URL", "VIDEO", "--rates", "0"], "--rates '0': expected numbers above 0"),
        (["URL", "/nowhere.mp4"], "/nowhere.mp4: no such file"),
    ],
)
def test_bench_refuses(endpoint: Endpoint, archive: Archive, argv: list[str], message: str) -> None:
    named = {"URL": endpoint.url, "VIDEO": str(archive.root / GOOD[0])}
    assert message in refused(tsq("bench", *(named.get(word, word) for word in argv)))


@pytest.mark.slow
def test_a_token_of_a_file_works_at_once(bundle: str, tmp_path: Path) -> None:
    """`tsq token new` appends to the file that a running endpoint reads again."""
    file = tmp_path / "tokens.toml"
    first = json.loads(tsq("token", "new", "first", "--file", file, "--json").out)["token"]
    with serving(bundle, tmp_path / "run", f"serve.tokens_file={file}") as endpoint:
        url = f"{endpoint.url}/v1/models"

        def status(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            return httpx.get(url, headers=headers, trust_env=False).status_code

        assert (status(first), status("wrong")) == (200, 401)
        made = tsq("token", "new", "second", "--rate", "2/hour", "--file", file, "--json")
        second = json.loads(made.out)["token"]
        answers = [status(second) for _ in range(8)]
        assert answers[0] == 200
        assert set(answers) == {200, 429}
        assert status(first) == 200
    assert "has a token 'first' already" in refused(tsq("token", "new", "first", "--file", file))
    assert first not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_the_page_in_a_browser(endpoint: Endpoint, archive: Archive, tmp_path: Path) -> None:
    """A token, a file, its frames and curves, a dropped file, another K, a URI, an error; on a
    phone, in the dark."""
    asyncio.run(use_the_page(endpoint, archive.root, tmp_path))


async def use_the_page(endpoint: Endpoint, videos: Path, folder: Path) -> None:
    async with page(folder / "profile") as browser:
        await browser.set_size(1100, 900)
        await browser.open(endpoint.url)
        await browser.until("!document.getElementById('access').hidden")
        await browser.value(f"document.getElementById('token').value = '{TOKEN}'")
        await browser.value("document.querySelector('#access button').click()")
        await browser.until("!document.getElementById('work').hidden")

        await browser.choose_file("#file", videos / GOOD[0])
        await browser.until("document.querySelectorAll('#frames img').length === 3")
        assert await browser.value("document.querySelectorAll('#curves path').length") == 2
        assert await browser.value("document.querySelectorAll('#curves .chosen').length") == 3
        assert await browser.value("document.querySelectorAll('#labels tr').length") == 3
        loaded = "[...document.querySelectorAll('#frames img')].every((one) => one.naturalWidth)"
        await browser.until(loaded)
        await browser.until("document.getElementById('player').readyState > 0")
        await browser.value("document.querySelector('#frames figure').click()")
        await browser.until("document.getElementById('player').currentTime > 0")
        await seek_in_the_curves(browser, endpoint, videos / GOOD[0])
        shown = await browser.value("document.getElementById('result').innerText")
        assert "The recogniser's opinion of the chosen frames" in shown
        await browser.screenshot(folder / "page.png")
        await drop_a_file(browser, endpoint, videos / GOOD[2])

        assert "k=" not in await browser.value("document.getElementById('curl').textContent")
        await set_value(browser, "k", "1", "change")
        await browser.until("document.querySelectorAll('#frames img').length === 1")
        assert "k=1" in await browser.value("document.getElementById('curl').textContent")

        await set_value(browser, "uri", str(videos / GOOD[1]), "input")
        await browser.value("document.querySelector('#ask button').click()")
        await browser.until("document.getElementById('curl').textContent.includes('1_1.mp4')")
        await browser.until("document.getElementById('busy').hidden")
        assert await browser.value("document.getElementById('problem').hidden")

        await browser.choose_file("#file", videos / "train/cut.mp4")
        told = await browser.until(
            "!document.getElementById('problem').hidden"
            " && document.getElementById('problem').textContent"
        )
        assert "cut off" in told

        await browser.set_size(390, 800, dark=True)
        assert await browser.value("document.documentElement.scrollWidth") <= 390
        await browser.screenshot(folder / "phone.png")
        assert [
            url
            for url in browser.requested
            if not url.startswith((endpoint.url, "data:", "blob:", "about:"))
        ] == []
        assert browser.complaints == []


async def seek_in_the_curves(browser: Page, endpoint: Endpoint, video: Path) -> None:
    """Click on the curves, whose axis ends with the video and has margins of 1 % of the width."""
    duration_s = endpoint.score(content=video.read_bytes()).json()["duration_s"]
    for across in (0.75, 0.25):
        await browser.click("#curves svg", across)
        expected = duration_s * (across - 0.01) / 0.98
        place = "document.getElementById('player').currentTime"
        await browser.until(f"Math.abs({place} - {expected}) < 0.02 * {duration_s}")


async def drop_a_file(browser: Page, endpoint: Endpoint, video: Path) -> None:
    row = endpoint.score(content=video.read_bytes()).json()
    await browser.drop_file("#drop", video)
    assert not await browser.value("document.getElementById('busy').hidden")
    await browser.until("document.getElementById('busy').hidden")
    assert video.name in await browser.value("document.getElementById('curl').textContent")
    cells = "[...document.querySelectorAll('#labels tr')].map(({cells}) => [cells[0], cells[2]])"
    found = await browser.value(f"{cells}.map((pair) => pair.map((cell) => cell.textContent))")
    assert [label for label, _ in found] == row["top_labels"]
    assert [float(score) for _, score in found] == pytest.approx(row["top_scores"], abs=0.001)


async def set_value(browser: Page, name: str, value: str, event: str) -> None:
    node = f"document.getElementById('{name}')"
    await browser.value(
        f"{node}.value = {json.dumps(value)}; {node}.dispatchEvent(new Event('input'));"
        f" {node}.dispatchEvent(new Event('{event}'))"
    )
