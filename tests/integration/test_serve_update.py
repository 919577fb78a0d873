"""A deployment is replaced under load: no request is lost, no answer comes from two models.

A batch under way is scored again, by the new model alone.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.archive import CLASSES, make_archive
from support.bundle import make_bundle
from support.endpoint import ANSWER_S, VIDEO, Load

from jobs.benchmarks.support.s3 import free_ports
from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RENAMED = [f"new {name}" for name in CLASSES]
NAME = "train/1_1.mp4"
END_S = 600.0


@pytest.fixture
def url(ray_cluster: Any) -> Iterator[str]:
    """Serve with its own HTTP server."""
    from ray import serve

    (port,) = free_ports(1, below=10000)
    serve.start(
        http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": ANSWER_S},
        logging_config={"log_level": "ERROR"},
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(bundle: str, budget: int, folder: Path, web: str, wait: bool) -> None:
    """Deploy the application from a config, as `serve deploy` does."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    open_to_batches = {
        "batches_uri": str(folder / "batches"),
        "allowed_uri_prefixes": [str(folder), web],
        "fetch_timeout_s": END_S,
    }
    settings = {"sampler": {"budget": budget}, "serve": open_to_batches}
    application = {
        "name": "tsq",
        "route_prefix": "/",
        "import_path": "tsq_ray.serving.app:build",
        "args": {"model": bundle, "settings": settings, "anonymous": True},
        "deployments": [
            {"name": name, "ray_actor_options": {"num_cpus": 0.1}}
            for name in ("Ingress", "Decoder", "Sampler", "Recognizer", "Batches")
        ],
    }
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema(applications=[application]), _blocking=wait)


class Held(http.server.BaseHTTPRequestHandler):
    """Serves the head of a video at once, and the video itself once it is released."""

    data = b""
    released = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.released.wait(END_S)
        with contextlib.suppress(OSError):
            self.wfile.write(self.data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Held) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        Held.released.set()
        server.shutdown()


def test_an_update_loses_nothing_and_mixes_nothing(url: str, web: str, tmp_path: Path) -> None:
    video = make_archive(tmp_path / "videos").root / NAME
    data = Held.data = video.read_bytes()
    bundles = make_bundle(tmp_path / "old"), make_bundle(tmp_path / "new", classes=RENAMED)
    old, new = (read_bundle_settings(bundle)[1] for bundle in bundles)
    expected = {old: (3, set(CLASSES)), new: (2, set(RENAMED))}
    deploy(bundles[0], 3, tmp_path, web, wait=True)
    with httpx.Client(timeout=ANSWER_S, trust_env=False) as client:
        load = Load(lambda: client.post(f"{url}/v1/score", content=data, headers=VIDEO), 4)
        load.wait_for(8)
        batch = create_batch(client, url, [str(video), f"{web}last.mp4"])
        assert batch["model"] == old
        deploy(bundles[1], 2, tmp_path, web, wait=False)
        load.wait_until(lambda answer: model_of(answer) == new)
        load.wait_for(8)
        answers = load.ended()
        Held.released.set()
        batch = ended_batch(client, url, batch["id"])
    for answer in answers:
        assert answer is not None, "a connection was closed without an answer"
        assert answer.status_code == 200, answer.text
        row = answer.json()
        budget, names = expected[row["model"]]
        assert len(row["selected_slot"]) == budget
        assert set(row["top_labels"]) <= names
    assert {model_of(answer) for answer in answers} == {old, new}
    assert (batch["status"], batch["model"]) == ("completed", new), batch
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    assert verify(batch["predictions_uri"]).problems == ()
    for line in Path(batch["output_uri"]).read_text().splitlines():
        row = json.loads(line)
        assert (row["model"], len(row["selected_slot"])) == (new, 2)
    times = [when for when, _ in load.answers]
    silence = max(later - when for when, later in itertools.pairwise(times))
    print(f"{len(answers)} answers; longest silence {silence:.1f} s")


def create_batch(client: httpx.Client, url: str, uris: list[str]) -> dict[str, Any]:
    """A batch of these videos, once it has begun."""
    lines = [json.dumps({"custom_id": uri, "uri": uri}) for uri in uris]
    headers = {"Content-Type": "application/jsonl"}
    batch = client.post(f"{url}/v1/batches", content="\n".join(lines), headers=headers).json()
    while client.get(f"{url}/v1/batches/{batch['id']}").json()["status"] == "validating":
        time.sleep(0.2)
    return dict(batch)


def ended_batch(client: httpx.Client, url: str, batch: str) -> dict[str, Any]:
    deadline = time.monotonic() + END_S
    while True:
        found: dict[str, Any] = client.get(f"{url}/v1/batches/{batch}").json()
        if found["status"] in ("completed", "failed", "cancelled"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(1)


def model_of(answer: httpx.Response | None) -> Any:
    return answer.json().get("model") if answer is not None else None
