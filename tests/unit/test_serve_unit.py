"""The endpoint's rules without a server.

Token, address, prefixes, sizes, replicas, and what scoring may override.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from support.bundle import make_bundle

from tsq_ray import scoring
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import read_bundle_settings
from tsq_ray.config import ServeConfig, load_config
from tsq_ray.errors import ConfigError, ModelError, UserError
from tsq_ray.runtime.nodes import Cluster, Node, Pool
from tsq_ray.runtime.placement import layout
from tsq_ray.serving.access import (
    TOKEN_VARIABLE,
    check_binding,
    check_token_rule,
    is_loopback,
    read_token,
)
from tsq_ray.serving.endpoint import check_room
from tsq_ray.serving.requests import (
    RequestError,
    check_prefix,
    check_token,
    limited,
    read_form,
    read_request,
    read_uri,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle")


def refusal(run: Callable[[], Any]) -> tuple[int, str]:
    with pytest.raises(RequestError, match=r".") as caught:
        run()
    return caught.value.status, str(caught.value)


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
    check_token_rule(host, "t")
    if expected:
        check_token_rule(host, None)
    else:
        with pytest.raises(
            ConfigError, match=f"beyond loopback needs a bearer token.*{TOKEN_VARIABLE}"
        ):
            check_token_rule(host, None)


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


@pytest.mark.parametrize(
    ("header", "passes"),
    [
        *(("Bearer secret", True), ("bearer secret", True), ("Bearer  secret ", True)),
        *(
            (None, False),
            ("", False),
            ("Bearer", False),
            ("Bearer ", False),
            ("secret", False),
            ("Basic secret", False),
        ),
        *(
            ("Bearer secre", False),
            ("Bearer secrets", False),
            ("Bearer Secret", False),
            ("Bearer sécret", False),
        ),
    ],
)
def test_check_token(header: str | None, passes: bool) -> None:
    check_token(header, None)
    if passes:
        check_token(header, "secret")
    else:
        assert refusal(lambda: check_token(header, "secret"))[0] == 401


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


@pytest.mark.ray
@pytest.mark.parametrize(
    ("token", "args", "message"),
    [
        (None, {}, "no token: set the environment variable TSQ_TOKEN, or args.anonymous = true"),
        ("", {"anonymous": False}, "no token"),
        (" ", {"anonymous": "no"}, "no token"),
        ("t", {"model": None}, "args.model is missing"),
        ("t", {"modle": "x"}, "unknown args key 'modle'; allowed: model, settings, anonymous"),
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


@pytest.mark.ray
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


# ----------------------------------------------------------------------------------------- prefixes

S3 = ("s3://bucket/open",)
HTTP = ("https://host.example/videos/",)


@pytest.mark.parametrize(
    ("uri", "prefixes", "expected"),
    [
        ("s3://bucket/open/a.mp4", S3, "s3://bucket/open/a.mp4"),
        ("S3://bucket/open/a.mp4", S3, "s3://bucket/open/a.mp4"),
        ("s3a://bucket/open/a.mp4", S3, "s3://bucket/open/a.mp4"),
        ("s3://bucket/open/a.mp4", ("s3://other", "S3://bucket/open/"), "s3://bucket/open/a.mp4"),
        ("s3://bucket/open/a.mp4", (), None),
        ("s3://bucket/open", S3, None),
        ("s3://bucket/opened/a.mp4", S3, None),
        ("s3://bucket/open/../closed/a.mp4", S3, None),
        ("s3://bucket/open/..", S3, None),
        ("s3://Bucket/open/a.mp4", S3, None),
        ("gs://bucket/open/a.mp4", S3, None),
        # a plain key: no name is a chain of file systems
        (
            "s3://bucket/open/a.zip::file:///etc/passwd",
            S3,
            "s3://bucket/open/a.zip::file:///etc/passwd",
        ),
        ("zip://a.mp4::s3://bucket/open/a.zip", S3, None),
        (
            "https://host.example/videos/a.mp4?sig=1",
            HTTP,
            "https://host.example/videos/a.mp4?sig=1",
        ),
        ("https://host.example/videos/%2e%2e/a.mp4", HTTP, None),
        ("https://host.example/videos/..%2Fa.mp4", HTTP, None),
        ("https://host.example/videos/..\\a.mp4", HTTP, None),
        ("https://host.example.evil/videos/a.mp4", HTTP, None),
        ("https://host.example@evil/videos/a.mp4", HTTP, None),
        ("http://host.example/videos/a.mp4", HTTP, None),
        ("~no-such-user/a.mp4", ("/",), None),
        ("x" * 5000, S3, None),
    ],
)
def test_check_prefix(uri: str, prefixes: tuple[str, ...], expected: str | None) -> None:
    settings = ServeConfig(allowed_uri_prefixes=prefixes)
    if expected is not None:
        assert check_prefix(uri, settings) == expected
        return
    status, message = refusal(lambda: check_prefix(uri, settings))
    assert status == 403
    assert "sig=" not in message


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        *(
            ("open/a.mp4", True),
            ("open/deep/../a.mp4", True),
            ("./open//a.mp4", True),
            ("open/inner", True),
        ),
        *(
            ("closed/a.mp4", False),
            ("open/../closed/a.mp4", False),
            ("open/link/a.mp4", False),
            ("open/link.mp4", False),
        ),
        *(("opened/a.mp4", False), ("open", False), ("alias/a.mp4", True)),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://", "FILE://"])
def test_check_prefix_of_local_files(name: str, passes: bool, scheme: str, tmp_path: Path) -> None:
    for folder in ("open", "closed", "opened"):
        (tmp_path / folder).mkdir()
    (tmp_path / "closed" / "a.mp4").touch()
    (tmp_path / "open" / "link").symlink_to(tmp_path / "closed")
    (tmp_path / "open" / "link.mp4").symlink_to(tmp_path / "closed" / "a.mp4")
    (tmp_path / "open" / "inner").symlink_to(tmp_path / "open" / "a.mp4")
    (tmp_path / "alias").symlink_to(tmp_path / "open")
    settings = ServeConfig(allowed_uri_prefixes=(f"{tmp_path}/open/",))
    uri = f"{scheme}{tmp_path}/{name}"
    if passes:
        assert check_prefix(uri, settings) == f"{tmp_path}/open/a.mp4"
    else:
        assert refusal(lambda: check_prefix(uri, settings))[0] == 403


def test_no_prefix_is_no_prefix() -> None:
    assert ServeConfig().allowed_uri_prefixes == ()
    with pytest.raises(ConfigError, match=r"setting serve\.allowed_uri_prefixes"):
        load_config(None, ['serve.allowed_uri_prefixes=[""]'])


# ----------------------------------------------------------------------------------------- requests


def request_of(parts: Sequence[bytes], **headers: str) -> tuple[Request, list[int]]:
    """A request whose body comes in `parts`, and a list that counts the parts taken."""
    taken: list[int] = []

    async def receive() -> dict[str, Any]:
        taken.append(len(taken))
        return {
            "type": "http.request",
            "body": parts[len(taken) - 1],
            "more_body": len(taken) < len(parts),
        }

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(
        {"type": "http", "method": "POST", "path": "/", "headers": named}, receive
    ), taken


def ended(work: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await work

    return asyncio.run(wait())


def test_a_body_is_cut_off_at_the_limit() -> None:
    request, taken = request_of([b"x" * 40] * 10)
    status, message = refusal(lambda: ended(limited(request, 100).body()))
    assert status == 413
    assert "larger than the limit of 100 bytes" in message
    assert len(taken) == 3  # the other seven were never requested


def test_a_body_announced_as_too_large_is_not_read() -> None:
    request, taken = request_of([b"x"], content_length="101")
    assert refusal(lambda: limited(request, 100))[0] == 413
    assert taken == []


def test_a_body_of_the_limit_passes() -> None:
    request, _ = request_of([b"x" * 60, b"y" * 40], content_length="100")
    assert ended(limited(request, 100).body()) == b"x" * 60 + b"y" * 40


def form_body(name: str, content: bytes) -> bytes:
    head = f'--cut\r\nContent-Disposition: form-data; name="{name}"; filename="../a.mp4"\r\n\r\n'
    return head.encode() + content + b"\r\n--cut--\r\n"


def test_an_upload_in_a_form() -> None:
    body = form_body("file", b"\x00video\r\n")
    request, _ = request_of(
        [body[:30], body[30:]], content_type="multipart/form-data; boundary=cut"
    )
    asked = ended(read_request(request, ServeConfig()))
    assert asked.upload == b"\x00video\r\n"
    assert (asked.identity["uri"], asked.identity["size_bytes"], len(asked.video_id)) == (
        "upload:a.mp4",
        8,
        16,
    )


def test_a_form_without_the_file() -> None:
    request, _ = request_of(
        [form_body("video", b"x")], content_type="multipart/form-data; boundary=cut"
    )
    assert refusal(lambda: ended(read_form(request)))[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"\xff",
        b"[]",
        b'"s3://b/a.mp4"',
        b"{}",
        b'{"uri": 3}',
        b'{"uri": ""}',
        b'{"uri": "a\\u0000b"}',
        b"[" * 16000,
    ],
)
def test_read_uri_refuses(body: bytes) -> None:
    assert refusal(lambda: read_uri(body))[0] == 400


def test_read_uri() -> None:
    assert read_uri(b'{"uri": "s3://b/a b.mp4"}') == "s3://b/a b.mp4"


# ------------------------------------------------------------------------------- replicas, settings


@pytest.mark.ray
def test_deployment_options() -> None:
    from tsq_ray.serving.graph import deployment_options

    scaled = deployment_options(Pool("sampler", 2, 3, 5, 1.5, 0.5, 2**30), 32)
    scaling = {
        "min_replicas": 2,
        "initial_replicas": 3,
        "max_replicas": 5,
        "target_ongoing_requests": 16,
    }
    assert scaled["autoscaling_config"] == scaling
    assert scaled["ray_actor_options"] == {"num_cpus": 1.5, "num_gpus": 0.5, "memory": 2**30}
    assert "num_replicas" not in scaled
    fixed = deployment_options(Pool("decoder", 3, 3, 3, 0.25), 1, 7)
    assert (fixed["num_replicas"], fixed["max_ongoing_requests"], fixed["max_queued_requests"]) == (
        3,
        1,
        7,
    )
    assert "autoscaling_config" not in fixed


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
        (["serve.decoder.num_cpus=2"], Node(2), "need 2.6 CPUs, the cluster has 2"),
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
    own, other = (scoring._identity(content, digest, config, True).parts for config in configs)
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
