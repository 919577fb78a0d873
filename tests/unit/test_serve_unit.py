"""The endpoint's rules without a server.

Address, replicas, and what scoring may override.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.bundle import make_bundle

from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.config import load_config
from tsq_ray.errors import ConfigError, ModelError, UserError
from tsq_ray.runtime.nodes import Cluster, Node, Pool
from tsq_ray.runtime.placement import layout
from tsq_ray.runtime.session import Session
from tsq_ray.score_run import identity_of
from tsq_ray.serving.access import (
    TOKEN_VARIABLE,
    check_binding,
    check_token_rule,
    is_loopback,
    read_token,
)
from tsq_ray.serving.bench import numbers, process_name
from tsq_ray.serving.endpoint import check_room
from tsq_ray.serving.requests.admission import Admission


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle")


# -------------------------------------------------------------------------------- token and address


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("localhost", True), ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True)),
        *(
            ("0.0.0.0", False),
            ("::", False),
            ("10.0.0.1", False),
            ("example.org", False),
            ("127.0.0.1.example.org", False),
            ("", False),
        ),
    ],
)
def test_only_loopback_needs_no_token(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
    check_token_rule(host, True)
    if expected:
        check_token_rule(host, False)
    else:
        with pytest.raises(
            ConfigError, match=f"beyond loopback needs a bearer token.*{TOKEN_VARIABLE}"
        ):
            check_token_rule(host, False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("secret", "secret"), (" secret\n", "secret"), ("", None), (" \n", None), (None, None)],
)
def test_read_token(
    value: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(TOKEN_VARIABLE, value)
    assert read_token() == expected


def test_check_binding() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--port {port}: cannot be bound \(Address already in use\)"
        ):
            check_binding("127.0.0.1", port)
    check_binding("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.77 .*cannot be bound"):
        check_binding("192.0.2.77", port)  # an address reserved for documentation
    with pytest.raises(ConfigError, match=r"--host no\.such\.host\.invalid .*cannot be bound"):
        check_binding("no.such.host.invalid", port)


# -------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize(
    ("token", "args", "message"),
    [
        (
            None,
            {},
            "no token: set the environment variable TSQ_TOKEN or serve.tokens_file, or args",
        ),
        ("", {"anonymous": False}, "no token"),
        (" ", {"anonymous": "no"}, "no token"),
        (
            "t",
            {"model": None},
            r"args\.model: Input should be a valid string, got None; allowed: model: the bundle",
        ),
        (
            "t",
            {"modle": "x"},
            r"args\.modle: Extra inputs are not permitted, got 'x'; allowed: model: the bundle",
        ),
        ("t", {"anonymous": "perhaps"}, r"args\.anonymous: Input should be a valid boolean"),
        (None, {"settings": ["serve"]}, r"args\.settings: Input should be a valid dictionary"),
        ("t", {"model": "/nowhere/bundle"}, "/nowhere/bundle: has no bundle.json"),
        ("t", {"settings": {"sampler": {"budget": 9}}}, r"sampler.budget \(K\) is 9, above"),
        (
            "t",
            {"settings": {"serve": {"sampler": {"max_replica": 2}}}},
            "unknown setting serve.sampler.max_replica",
        ),
    ],
)
def test_build_refuses(
    token: str | None,
    args: dict[str, Any],
    message: str,
    bundle: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tsq_ray.serving.app import build

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    if token is not None:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(UserError, match=message):
        build({"model": bundle} | args)


@pytest.mark.parametrize(
    ("token", "anonymous"), [("t", False), ("t", True), (None, True), (None, "true")]
)
def test_build(
    token: str | None, anonymous: bool | str, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve import Application

    from tsq_ray.serving.app import build

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    if token is not None:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    assert isinstance(build({"model": bundle, "anonymous": anonymous}), Application)


def test_relative_paths_are_resolved_where_the_endpoint_is_deployed(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsq_ray.serving.app import build

    monkeypatch.chdir(tmp_path)
    given = {
        "tokens_file": "tokens.toml",
        "batches_uri": "runs/batches",
        "allowed_uri_prefixes": ["videos", "s3://bucket/videos", "https://"],
    }
    built = build({"model": bundle, "anonymous": True, "settings": {"serve": given}})
    ingress = built._bound_deployment.init_args
    for settings in (ingress[1].serve, ingress[5]._bound_deployment.init_args[1].serve):
        assert settings.tokens_file == f"{tmp_path}/tokens.toml"
        assert settings.batches_uri == f"{tmp_path}/runs/batches"
        assert settings.allowed_uri_prefixes == (
            f"{tmp_path}/videos",
            "s3://bucket/videos",
            "https://",
        )


def test_sources_that_stall_leave_uploads_their_room(
    bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsq_ray.serving import app

    found: dict[str, int] = {}
    bind = app.bind_graph

    def see(model: str, config: Any, placed: Any, ongoing: Any) -> Any:
        found.update(ongoing)
        return bind(model, config, placed, ongoing)

    monkeypatch.setattr(app, "bind_graph", see)
    settings = {"serve": {"max_fetches": 7, "decoder": {"max_ongoing_requests": 5}}}
    app.build({"model": bundle, "anonymous": True, "settings": settings})
    assert found == {"decoder": 12, "sampler": 32, "recognizer": 32}


# ---------------------------------------------------------------------------------- what is logged


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/score", 405),
        ("GET", "/v1/batches?limit=x", 400),
    ],
)
def test_a_request_that_reaches_nothing_is_logged_and_counted(
    method: str,
    path: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    counted: list[Any] = []
    metrics = SimpleNamespace(answered=lambda *told: counted.append(told))
    client = client_of(monkeypatch, metrics=metrics)
    logger = logging.getLogger("ray.serve")
    # Ray Serve, once started in this process, keeps its records from the root's handlers
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, logger.name)
    answer = client.request(method, path, headers={"x-request-id": "id-1"})
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert counted == [(status, None, 0.0)]
    (logged,) = (vars(record) for record in caplog.records if record.msg == "answered")
    assert logged["request_id"] == "id-1"
    assert (logged["path"], logged["status"]) == (path.partition("?")[0], status)


def client_of(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> Any:
    """A client of an ingress that has these parts and no replica around it."""
    from ray import serve
    from starlette.testclient import TestClient

    from tsq_ray.serving.api import api
    from tsq_ray.serving.app import Ingress

    ingress = Ingress.func_or_class.__new__(Ingress.func_or_class)
    vars(ingress).update(parts)
    context = SimpleNamespace(servable_object=ingress)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    return TestClient(api)


@pytest.mark.parametrize("silent", ["decoder", "sampler", "recognizer"])
def test_an_endpoint_with_a_silent_stage_is_not_ready(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsq_ray.serving.graph import STAGES, Graph, TimeLimits

    graph = Graph(None, None, None, TimeLimits.of(load_config()))
    client = client_of(monkeypatch, graph=graph, admission=Admission(8, 60.0))
    graph.answered |= dict.fromkeys(STAGES, time.monotonic())
    assert client.get("/readyz").json() == {"status": "ok"}
    graph.answered[silent] -= 31
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, 503)
    assert answer.json()["detail"] == f"the {silent} has not answered recently"
    assert answer.headers["Retry-After"]
    assert client.get("/healthz").status_code == 200
    graph.answered[silent] = time.monotonic()
    assert client.get("/readyz").status_code == 200


# ------------------------------------------------------------------------------- replicas, settings


def test_deployment_options() -> None:
    from tsq_ray.serving.deployments import deployment_options

    config = load_config(None, ["serve.request_timeout_s=50", "serve.sampler.upscale_delay_s=3"])
    scaled = deployment_options(Pool("sampler", 2, 3, 5, 1.5, 0.5, 2**30), 32, config)
    scaling = {
        "min_replicas": 2,
        "initial_replicas": 3,
        "max_replicas": 5,
        "target_ongoing_requests": 16,
        "upscale_delay_s": 3,
        "downscale_delay_s": 300,
    }
    assert scaled["autoscaling_config"] == scaling
    assert scaled["ray_actor_options"] == {"num_cpus": 1.5, "num_gpus": 0.5, "memory": 2**30}
    assert "num_replicas" not in scaled
    assert scaled["max_surge_percent"] == 100, "an update starts the new replica first"
    assert scaled["graceful_shutdown_timeout_s"] > 50, "and the old one finishes its work"
    fixed = deployment_options(Pool("decoder", 3, 3, 3, 0.25), 1, config)
    assert (fixed["num_replicas"], fixed["max_ongoing_requests"]) == (3, 1)
    assert "autoscaling_config" not in fixed
    decoders = deployment_options(Pool("decoder", 1, 1, 3, 0.25), 32, config)
    aim = decoders["autoscaling_config"]["target_ongoing_requests"]
    assert aim == 2 * config.serve.decoder_processes
    entries = deployment_options(Pool("ingress", 1, 1, 3, 0.1), 1280, config)
    aim = entries["autoscaling_config"]["target_ongoing_requests"]
    assert aim == config.serve.max_queued_requests / 2, "an ingress refuses more than these"


@pytest.mark.parametrize(
    ("address", "variable", "joins"),
    [
        (None, None, False),
        ("local", None, False),
        (None, "10.0.0.1:6379", True),
        ("auto", None, True),
        ("local", "10.0.0.1:6379", False),
    ],
)
def test_a_session_joins_the_cluster_of_the_environment(
    address: str | None, variable: str | None, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert Session(address).joins_cluster == joins


@pytest.mark.parametrize("text", ["nan", "inf", "0", "1,-2", "a", "0.5"])
def test_loads_that_cannot_be_measured(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--clients '.*': expected"):
        numbers("--clients", text)


@pytest.mark.parametrize(
    ("sets", "node", "message"),
    [
        ([], Node(1), None),
        (["serve.sampler.num_gpus=0.5", "serve.recognizer.num_gpus=0.5"], Node(1, 1), None),
        (
            ["serve.sampler.num_gpus=1", "serve.recognizer.num_gpus=1"],
            Node(1, 1),
            "need 2 GPUs, the cluster has 1",
        ),
        (["serve.decoder.num_cpus=2"], Node(2), "need 2.7 CPUs, the cluster has 2"),
        (["serve.decoder.num_cpus=2", "serve.decoder.min_replicas=0"], Node(2), None),
    ],
)
def test_check_room(sets: list[str], node: Node, message: str | None) -> None:
    found = Cluster((node,))
    placed = layout("serve", load_config(None, sets), found, 1)
    if message is None:
        check_room(placed, found)
    else:
        with pytest.raises(ConfigError, match=message):
            check_room(placed, found)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(
            ("sampler.budget", 2),
            ("sampler.lambda_visual", 0.25),
            ("sampler.mode", "uniform"),
            ("sampler.seed", 9),
        ),
        *(
            ("decode.timeout_s", 3.0),
            ("decode.max_pixels", 9),
            ("resources.batch_size", 3),
            ("serve.batch_size", 4),
        ),
    ],
)
def test_scoring_may_override(setting: str, value: Any, bundle: str, tmp_path: Path) -> None:
    section, key = setting.split(".")
    text = f'"{value}"' if isinstance(value, str) else str(value)
    (tmp_path / "run.toml").write_text(f"[{section}]\n{key} = {text}\n")
    found = [
        scoring_config(bundle, sets=[f"{setting}={value}"]),
        scoring_config(bundle, path=str(tmp_path / "run.toml")),
        scoring_config(bundle, settings={section: {key: value}}),
    ]
    assert [getattr(getattr(config, section), key) for config in found] == [value] * 3
    assert {config.decode.num_frames for config in found} == {
        8
    }  # the bundle's own, not the default


def test_predictions_of_another_decoder_than_the_bundles_are_another_run(bundle: str) -> None:
    content, digest = read_bundle_settings(bundle)
    configs = [
        scoring_config(bundle, sets=[f"decode.backend={backend}"]) for backend in ("pyav", "nvdec")
    ]
    own, other = (identity_of(content, digest, config, True).parts for config in configs)
    assert other == {**own, "decode": {"backend": "nvdec"}}
    assert "decode" not in own, "folders of before the choice stay the same run"


@pytest.mark.parametrize(
    ("setting", "was"),
    [
        *(
            ("decode.num_frames=4", "8"),
            ("decode.strategy=keyframe", "'uniform'"),
            ("encoders.visual.size=64", "32"),
        ),
        *(
            ("encoders.objects.model=resnet18", "'test_efficientnet'"),
            ("recognizer.resize=squash", "'crop'"),
            ("sampler.top_classes=2", "5"),
        ),
    ],
)
def test_scoring_may_not_override(setting: str, was: str, bundle: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(
        ConfigError,
        match=(
            f"scoring cannot change what the bundle was trained with .{name}: {was} in the bundle"
        ),
    ):
        scoring_config(bundle, sets=[setting])


def test_scoring_refuses_more_frames_than_there_are(bundle: str) -> None:
    with pytest.raises(
        ConfigError, match=r"sampler.budget \(K\) is 9, above decode.num_frames \(T\) = 8"
    ):
        scoring_config(bundle, sets=["sampler.budget=9"])
    with pytest.raises(ModelError, match=r"has no bundle\.json"):
        scoring_config(os.path.dirname(bundle))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ray::ServeReplica:tsq:Decoder", "Decoder"),
        ("ray::ServeReplica:tsq:Decoder.handle_request ", "Decoder"),
        ("ray::ServeController.listen_for_change", "ServeController"),
        ("/usr/bin/python -c from tsq_ray.decode.sandbox import x", "decoding processes"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=y", "raylet"),
        ("/usr/bin/vim", None),
    ],
)
def test_processes_are_counted_under_one_name_whatever_they_do(line: str, name: str | None) -> None:
    assert process_name(line) == name


# ----------------------------------------------------------------------------------------- webhooks

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_a_signature_is_that_of_standard_webhooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its own libraries sign this message (standardwebhooks 1.1.0 on the package index)."""
    from tsq_ray.serving.requests.webhooks import SECRET_VARIABLE, signature, signing_key

    for secret in (SECRET, SECRET.removeprefix("whsec_"), f" {SECRET}\n"):
        monkeypatch.setenv(SECRET_VARIABLE, secret)
        key = signing_key()
        assert key is not None
        message = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
        assert signature(key, *message) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "secret", ["webhook-secret", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "A" * 88]
)
def test_a_secret_of_webhooks_is_base64(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsq_ray.serving.requests.webhooks import SECRET_VARIABLE, signing_key

    monkeypatch.setenv(SECRET_VARIABLE, secret)
    with pytest.raises(ConfigError, match="TSQ_WEBHOOK_SECRET: not whsec_ and the base64 of 24 to"):
        signing_key()
    monkeypatch.setenv(SECRET_VARIABLE, "")
    assert signing_key() is None
