"""A deployment is replaced under load: no request is lost, no answer comes from two models."""

from __future__ import annotations

import itertools
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

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RENAMED = [f"new {name}" for name in CLASSES]
NAME = "train/1_1.mp4"


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


def deploy(bundle: str, budget: int, wait: bool) -> None:
    """Deploy the application from a config, as `serve deploy` does."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    settings = {"sampler": {"budget": budget}}
    application = {
        "name": "tsq",
        "route_prefix": "/",
        "import_path": "tsq_ray.serving.app:build",
        "args": {"model": bundle, "settings": settings, "anonymous": True},
        "deployments": [
            {"name": name, "ray_actor_options": {"num_cpus": 0.1}}
            for name in ("Ingress", "Decoder", "Sampler", "Recognizer")
        ],
    }
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema(applications=[application]), _blocking=wait)


def test_an_update_loses_nothing_and_mixes_nothing(url: str, tmp_path: Path) -> None:
    data = (make_archive(tmp_path / "videos").root / NAME).read_bytes()
    bundles = make_bundle(tmp_path / "old"), make_bundle(tmp_path / "new", classes=RENAMED)
    old, new = (read_bundle_settings(bundle)[1] for bundle in bundles)
    expected = {old: (3, set(CLASSES)), new: (2, set(RENAMED))}
    deploy(bundles[0], 3, wait=True)
    with httpx.Client(timeout=ANSWER_S, trust_env=False) as client:
        load = Load(lambda: client.post(f"{url}/v1/score", content=data, headers=VIDEO), 4)
        load.wait_for(8)
        deploy(bundles[1], 2, wait=False)
        load.wait_until(lambda answer: model_of(answer) == new)
        load.wait_for(8)
        answers = load.ended()
    for answer in answers:
        assert answer is not None, "a connection was closed without an answer"
        assert answer.status_code == 200, answer.text
        row = answer.json()
        budget, names = expected[row["model"]]
        assert len(row["selected_slot"]) == budget
        assert set(row["top_labels"]) <= names
    assert {model_of(answer) for answer in answers} == {old, new}
    times = [when for when, _ in load.answers]
    silence = max(later - when for when, later in itertools.pairwise(times))
    print(f"{len(answers)} answers; longest silence {silence:.1f} s")


def model_of(answer: httpx.Response | None) -> Any:
    return answer.json().get("model") if answer is not None else None
