"""Batches at the endpoint: run folders that are filled beside single requests."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.archive import Archive
from support.bundle import make_bundle
from support.endpoint import CLOSE, END_S, Endpoint, serving
from support.served import SECRET, SLOW_S, Listener, Served

from jobs.benchmarks.support.s3 import S3Server
from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.manifest import build_manifest
from tsq_ray.prediction import predict_rows
from tsq_ray.runs.tables import read_predictions
from tsq_ray.runs.verify import verify
from tsq_ray.serving.requests.webhooks import signature

pytestmark = pytest.mark.ray

LINES = {"Content-Type": "application/jsonl"}
DONE_S = 240.0


@pytest.fixture(scope="module")
def archive(served: Served) -> Archive:
    return served.batched


@pytest.fixture
def endpoint(served: Served) -> Endpoint:
    return served.endpoint


def ended(endpoint: Endpoint, batch: dict[str, Any], **params: Any) -> dict[str, Any]:
    """The batch once it has ended."""
    deadline = time.monotonic() + DONE_S
    while True:
        answer = endpoint.client.get(f"/v1/batches/{batch['id']}", params=params)
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            if found["status"] in ("completed", "failed", "cancelled"):
                return found
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.3)


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def batch_videos(endpoint: Endpoint) -> Counter[str]:
    """The metric of videos in batches by error type."""
    text = httpx.get(endpoint.metrics_url, trust_env=False).text
    found: Counter[str] = Counter()
    for labels, value in re.findall(r"^ray_tsq_batch_videos_total{(.*)} (.+)$", text, re.M):
        error_type = re.search(r'error_type="(\w*)"', labels)
        assert error_type is not None, labels
        found[error_type[1]] += int(float(value))
    return found


def wait_for_batch_videos(endpoint: Endpoint, wanted: Counter[str]) -> None:
    """Wait until the metric, which is exported every few seconds, is this."""
    deadline = time.monotonic() + END_S
    while (found := batch_videos(endpoint)) != wanted:
        assert time.monotonic() < deadline, (found, wanted)
        time.sleep(1)


def test_a_batch_of_lines(endpoint: Endpoint, archive: Archive) -> None:
    uris = {f"id {number}": str(archive.root / path) for number, path in enumerate(archive.paths)}
    before = batch_videos(endpoint)
    uris["twice"] = uris["id 0"]
    uris["missing"] = str(archive.root / "nothing.mp4")
    body = "\n".join(json.dumps({"custom_id": key, "uri": uri}) for key, uri in uris.items())
    headers = LINES | {"Idempotency-Key": "once"}
    params = {"metadata": '{"team": "b"}'}
    created = endpoint.client.post("/v1/batches", content=body, headers=headers, params=params)
    assert created.status_code == 200, created.text
    assert endpoint.score(json={"uri": uris["id 0"]}).status_code == 200
    beside = endpoint.client.get(f"/v1/batches/{created.json()['id']}").json()
    assert beside["status"] != "completed", "the single request waited for the batch"
    again = endpoint.client.post("/v1/batches", content=body, headers=headers, params=params).json()
    assert again["id"] == created.json()["id"]
    other = endpoint.client.post(
        "/v1/batches", content=body[:-1] + " }", headers=headers, params=params
    )
    assert other.json()["id"] == created.json()["id"], "the same content, spelt differently"
    other = endpoint.client.post("/v1/batches", content=body.splitlines()[0], headers=headers)
    why = "Idempotency-Key: belongs to another request; use a new key for each request"
    assert (other.status_code, other.json()["detail"]) == (422, why)

    batch = ended(endpoint, created.json(), verify=True)
    assert (batch["status"], batch["problems"]) == ("completed", [])
    assert batch["metadata"] == {"team": "b"}
    good, bad = lines_of(batch["output_uri"]), lines_of(batch["error_uri"])
    assert {line["custom_id"] for line in good + bad} == set(uris)
    assert len(good) + len(bad) == len(uris)
    counts = batch["request_counts"]
    assert counts["total"] == counts["completed"] + counts["failed"] == len(set(uris.values()))
    assert counts["failed"] == len(bad) == len(archive.bad) + 1
    errors = {line["uri"]: line["error_type"] for line in bad}
    assert errors[uris["missing"]] == "not_found"
    assert {str(archive.root / path): why for path, why in archive.bad.items()}.items() <= (
        errors.items()
    )
    by_type = Counter({"": counts["completed"]}) + Counter(errors.values())
    wait_for_batch_videos(endpoint, before + by_type)
    (row,) = predict_rows([uris["id 0"]], endpoint.model, scoring_config(endpoint.model))
    line = next(line for line in good if line["custom_id"] == "twice")
    assert line["top_labels"] == row["top_labels"]
    assert line["scores"] == pytest.approx(row["scores"], abs=CLOSE)
    assert (line["size_bytes"], line["selected_slot"]) == (row["size_bytes"], row["selected_slot"])


def test_a_batch_over_a_manifest_survives_the_replica_that_runs_it(
    served: Served, endpoint: Endpoint, archive: Archive
) -> None:
    manifest = str(served.manifests / "all.parquet")
    served.manifests.mkdir(exist_ok=True)
    build_manifest([str(archive.root)], manifest)
    hook = f"{served.listener}/hook"
    asked = {"manifest": manifest, "metadata": {"team": "a"}, "webhook": hook}
    batch = endpoint.client.post("/v1/batches", json=asked).json()
    deadline = time.monotonic() + DONE_S
    while not list(Path(batch["predictions_uri"]).glob("part-*")):
        assert time.monotonic() < deadline, "no part was written"
        time.sleep(0.1)
    for pid in endpoint.processes("ServeReplica:tsq:Batches"):
        os.kill(pid, signal.SIGKILL)

    batch = ended(endpoint, batch)
    assert (batch["status"], batch["metadata"]) == ("completed", {"team": "a"})
    assert verify(batch["predictions_uri"]).problems == ()
    assert read_predictions(batch["predictions_uri"]).num_rows == len(archive.paths)
    deadline = time.monotonic() + END_S
    while len(Listener.calls) < 2:
        assert time.monotonic() < deadline, "the webhook was not called again"
        time.sleep(0.2)
    headers, body = Listener.calls[-1]
    assert json.loads(body)["type"] == "batch.completed"
    assert json.loads(body)["data"]["id"] == headers["webhook-id"] == batch["id"]
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = signature(key, batch["id"], int(headers["webhook-timestamp"]), body)
    assert headers["webhook-signature"] == signed


def test_a_batch_is_cancelled(endpoint: Endpoint, archive: Archive) -> None:
    lines = [
        json.dumps({"custom_id": str(number), "uri": str(archive.root / f"no-{number}.mp4")})
        for number in range(2000)
    ]
    batch = endpoint.client.post("/v1/batches", content="\n".join(lines), headers=LINES).json()
    cancelled = endpoint.client.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert cancelled["status"] in ("cancelling", "cancelled")
    batch = ended(endpoint, batch)
    assert (batch["status"], batch["output_uri"]) == ("cancelled", None)
    assert endpoint.client.post(f"/v1/batches/{batch['id']}/cancel").json() == batch


def test_a_single_video_for_later(endpoint: Endpoint, archive: Archive) -> None:
    later = {"Prefer": "respond-async"}
    uri = {"uri": str(archive.root / archive.paths[0])}
    answer = endpoint.score(json=uri, headers=later)
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/batches/{answer.json()['id']}"
    batch = ended(endpoint, answer.json())
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert endpoint.score(json=uri | {"k": 2}, headers=later).status_code == 400
    assert endpoint.score(files={"file": b"x"}, headers=later).status_code == 400


def test_a_video_that_takes_too_long_becomes_a_batch_that_waits_for_it(
    served: Served, endpoint: Endpoint, archive: Archive
) -> None:
    padding = SLOW_S * 2**20 // 2  # 512 KiB/s
    box = (padding + 8).to_bytes(4, "big") + b"free" + bytes(padding)
    Listener.video = (archive.root / archive.paths[0]).read_bytes() + box
    uri = f"{served.slow_video}/a.mp4"
    # what it asks for besides the uri is not kept for later
    refused = endpoint.score(json={"uri": uri, "k": 2})
    assert (refused.status_code, refused.json()["error_type"]) == (504, "timeout")
    later = endpoint.score(json={"uri": uri})
    assert later.status_code == 202
    batch = ended(endpoint, later.json())
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert lines_of(batch["output_uri"])[0]["size_bytes"] == len(Listener.video)


def test_batches_are_listed_the_newest_first(endpoint: Endpoint) -> None:
    whole = endpoint.client.get("/v1/batches").json()
    ids = [batch["id"] for batch in whole["data"]]
    assert ids == sorted(ids, reverse=True)
    assert not whole["has_more"]
    first = endpoint.client.get("/v1/batches", params={"limit": 1}).json()
    assert (len(first["data"]), first["has_more"]) == (1, True)
    rest = endpoint.client.get("/v1/batches", params={"after": first["data"][0]["id"]}).json()
    assert [batch["id"] for batch in first["data"] + rest["data"]] == ids


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": "", "headers": LINES}, 400, "no line"),
        ({"content": "{", "headers": LINES}, 400, "line 1: "),
        ({"content": '{"custom_id": "a"}', "headers": LINES}, 400, "uri: Field required"),
        (
            {"content": '{"custom_id": "a", "uri": "/etc/passwd"}', "headers": LINES},
            403,
            "is not below a prefix",
        ),
        ({"json": {"manifest": "/etc/manifest.parquet"}}, 403, "is not below a prefix"),
        ({"json": {}}, 400, "manifest: Field required"),
        (
            {"content": "{}", "headers": LINES, "params": {"metadata": "no JSON"}},
            400,
            "metadata: Invalid JSON",
        ),
        (
            {"content": "{}", "headers": LINES, "params": {"webhook": "http://127.0.0.1:9/"}},
            403,
            "is not below a prefix",
        ),
        ({"content": "x", "headers": {"Content-Type": "text/csv"}}, 415, "application/jsonl"),
    ],
)
def test_a_batch_that_is_refused(
    endpoint: Endpoint, request_: dict[str, Any], status: int, message: str
) -> None:
    answer = endpoint.client.post("/v1/batches", **request_)
    assert answer.status_code == status
    assert message in answer.json()["detail"]


def test_a_webhook_must_be_allowed(endpoint: Endpoint, archive: Archive) -> None:
    asked = {"manifest": str(archive.root / "m.parquet"), "webhook": "http://127.0.0.1:9/hook"}
    assert endpoint.client.post("/v1/batches", json=asked).status_code == 403


def test_a_manifest_that_cannot_be_read_fails_the_batch(
    endpoint: Endpoint, archive: Archive
) -> None:
    asked = {"manifest": str(archive.root / "nothing.parquet")}
    batch = ended(endpoint, endpoint.client.post("/v1/batches", json=asked).json())
    assert batch["status"] == "failed"
    assert "no such file" in batch["errors"][0]
    for unknown in ("batch_none", "..", "batch_%2e%2e"):
        assert endpoint.client.get(f"/v1/batches/{unknown}").status_code == 404


@pytest.mark.slow
def test_a_batch_in_object_storage_resumes_in_the_next_endpoint(
    archive: Archive, s3: S3Server, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    settings = (
        "serve.batches_uri=s3://tsq-other/batches",
        f'serve.allowed_uri_prefixes=["{archive.root}"]',
        "output.rows_per_file=4",
    )
    uris = [str(archive.root / path) for path in archive.paths]
    uris += [str(archive.root / f"no-{number}.mp4") for number in range(300)]
    body = "\n".join(json.dumps({"custom_id": uri, "uri": uri}) for uri in uris)

    def parts(batch: dict[str, Any]) -> set[str]:
        found = (
            storage.name_of(file.uri) for file in storage.list_folder(batch["predictions_uri"])
        )
        return {name for name in found if name.startswith("part-")}

    with serving(bundle, tmp_path / "first", *settings, **s3.environment) as endpoint:
        batch = endpoint.client.post("/v1/batches", content=body, headers=LINES).json()
        deadline = time.monotonic() + DONE_S
        while not (before := parts(batch)):
            assert time.monotonic() < deadline, "no part was written"
            time.sleep(0.1)
    with serving(bundle, tmp_path / "second", *settings, **s3.environment) as endpoint:
        batch = ended(endpoint, batch)
    assert batch["status"] == "completed"
    assert before < parts(batch), "the rows of before are kept, others came"
    assert verify(batch["predictions_uri"]).problems == ()
    assert read_predictions(batch["predictions_uri"]).num_rows == len(uris)
    answered = [
        json.loads(line)["custom_id"]
        for place in (batch["output_uri"], batch["error_uri"])
        for line in storage.read_text(place).splitlines()
    ]
    assert sorted(answered) == sorted(uris)
