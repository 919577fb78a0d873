"""Requests to the endpoint without a server: URIs, uploads, options, tokens and admission."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.requests import Request

from tsq_ray import storage
from tsq_ray.config import ServeConfig, load_config
from tsq_ray.errors import ConfigError, DecoderKilled, DiskFull, VideoError
from tsq_ray.schema import PREDICTIONS, SERVER
from tsq_ray.serving import facts
from tsq_ray.serving.openapi import SCORE
from tsq_ray.serving.requests import parse
from tsq_ray.serving.requests.admission import Admission
from tsq_ray.serving.requests.models import (
    OMITTED,
    BatchLine,
    BatchRequest,
    Options,
    Prediction,
    Problem,
    UriRequest,
)
from tsq_ray.serving.requests.parse import read_batch_request, read_score_request, validate
from tsq_ray.serving.requests.problems import RequestError, problem
from tsq_ray.serving.requests.shares import WHOLE, Quota, Share
from tsq_ray.serving.requests.tokens import Access, add_token, new_token, read_tokens
from tsq_ray.serving.requests.uploads import LimitedBody
from tsq_ray.serving.requests.uris import check_uri, may_connect, named_hosts, shown


def refusal(run: Callable[[], Any]) -> RequestError:
    with pytest.raises(RequestError, match=r".") as caught:
        run()
    return caught.value


def ended(work: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await work

    return asyncio.run(wait())


# -------------------------------------------------------------------------------------------- URIs

S3 = ("s3://bucket/open",)
HTTP = ("https://host.example/videos/",)


@pytest.mark.parametrize(
    ("uri", "prefixes", "expected"),
    [
        ("s3://bucket/open/a.mp4", S3, "s3://bucket/open/a.mp4"),
        ("S3://bucket/open/a.mp4", S3, "s3://bucket/open/a.mp4"),
        ("s3a://bucket/open/a.mp4", S3, "s3://bucket/open/a.mp4"),
        ("s3://bucket/open/a.mp4", ("s3://other", "S3://bucket/open/"), "s3://bucket/open/a.mp4"),
        ("s3://bucket/open/a b?c.mp4", S3, "s3://bucket/open/a b?c.mp4"),
        ("s3://bucket/open/a.mp4", (), None),
        ("s3://bucket/open", S3, None),
        ("s3://bucket/opened/a.mp4", S3, None),
        ("s3://bucket/open/../closed/a.mp4", S3, None),
        ("s3://bucket/open/..", S3, None),
        ("s3://Bucket/open/a.mp4", S3, None),
        ("s3://key:secret@bucket/open/a.mp4", S3, None),
        ("gs://bucket/open/a.mp4", S3, None),
        # a plain key: no name is a chain of file systems
        ("s3://bucket/open/a.zip::/etc/passwd", S3, "s3://bucket/open/a.zip::/etc/passwd"),
        ("zip://a.mp4::s3://bucket/open/a.zip", S3, None),
        ("https://host.example/videos/a.mp4?s=1", HTTP, "https://host.example/videos/a.mp4?s=1"),
        ("HTTPS://Host.Example/videos/a.mp4", HTTP, "https://host.example/videos/a.mp4"),
        ("https://host.example/videos/%2e%2e/a.mp4", HTTP, None),
        ("https://host.example/videos/%252e%252e/a.mp4", HTTP, None),
        ("https://host.example/videos/..%2Fa.mp4", HTTP, None),
        ("https://host.example/videos/..;/a.mp4", HTTP, None),
        ("https://host.example/videos/..\\a.mp4", HTTP, None),
        ("https://host.example/videos/a%0d%0aX: y", HTTP, None),
        ("https://host.example.evil/videos/a.mp4", HTTP, None),
        ("https://host.example@evil/videos/a.mp4", HTTP, None),
        ("https://me@host.example/videos/a.mp4", HTTP, None),
        ("http://host.example/videos/a.mp4", HTTP, None),
        ("https://any.example/a.mp4", ("https://",), "https://any.example/a.mp4"),
        ("https://127.0.0.1/a.mp4", ("https://",), None),
        ("https://[::1]/a.mp4", ("https://",), None),
        ("https://2130706433/a.mp4", ("https://",), None),
        ("https://127.1/a.mp4", ("https://",), None),
        ("https://0x7f.0.0.0x1/a.mp4", ("https://",), None),
        ("https://a.example.:8443/a.mp4", ("https://",), "https://a.example.:8443/a.mp4"),
        ("https://[bad/a.mp4", ("https://",), None),
        ("https://169.254.169.254/latest", ("https://",), None),
        ("https://[64:ff9b::a9fe:a9fe]/latest", ("https://",), None),
        ("http://10.0.0.5/v/a.mp4", ("http://10.0.0.5/v",), "http://10.0.0.5/v/a.mp4"),
        ("~no-such-user/a.mp4", ("/",), None),
        ("videos/a.mp4", ("/",), None),
        ("/no/such/a.mp4", ("file:///no/such/",), "/no/such/a.mp4"),
        ("/no/other/a.mp4", ("file:///no/such/",), None),
        ("x" * 5000, S3, None),
        ("/a\0b", ("/",), None),
    ],
)
def test_check_uri(uri: str, prefixes: tuple[str, ...], expected: str | None) -> None:
    if expected is not None:
        assert check_uri(uri, prefixes) == expected
        return
    refused = refusal(lambda: check_uri(uri, prefixes))
    assert refused.status == 403
    assert "secret" not in str(refused)
    for prefix in prefixes:
        assert prefix not in str(refused).replace(repr(shown(uri)), ""), "an answer lists no prefix"


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        *(("open/a.mp4", True), ("open/deep/../a.mp4", True), ("./open//a.mp4", True)),
        *(("open/inner", True), ("alias/a.mp4", True)),
        *(("closed/a.mp4", False), ("open/../closed/a.mp4", False), ("open/link/a.mp4", False)),
        *(("open/link.mp4", False), ("opened/a.mp4", False), ("open", False)),
    ],
)
def test_check_uri_of_local_files(name: str, passes: bool, tmp_path: Path) -> None:
    for folder in ("open", "closed", "opened"):
        (tmp_path / folder).mkdir()
    (tmp_path / "closed" / "a.mp4").touch()
    (tmp_path / "open" / "link").symlink_to(tmp_path / "closed")
    (tmp_path / "open" / "link.mp4").symlink_to(tmp_path / "closed" / "a.mp4")
    (tmp_path / "open" / "inner").symlink_to(tmp_path / "open" / "a.mp4")
    (tmp_path / "alias").symlink_to(tmp_path / "open")
    prefixes = (f"{tmp_path}/open/",)
    if passes:
        assert check_uri(f"{tmp_path}/{name}", prefixes) == f"{tmp_path}/open/a.mp4"
    else:
        assert refusal(lambda: check_uri(f"{tmp_path}/{name}", prefixes)).status == 403


@pytest.mark.parametrize("scheme", ["file://", "FILE://", "local://"])
def test_a_local_file_has_no_scheme(scheme: str, tmp_path: Path) -> None:
    uri = f"{scheme}{tmp_path}/a.mp4"
    assert refusal(lambda: check_uri(uri, (str(tmp_path),))).status == 403


def test_a_relative_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    assert refusal(lambda: check_uri("a.mp4", (str(tmp_path),))).status == 403


@pytest.mark.parametrize(
    ("host", "address", "named", "expected"),
    [
        *(("a.example", "8.8.8.8", (), True), ("a.example", "2001:4860:4860::8888", (), True)),
        *(("a.example", "127.0.0.1", (), False), ("a.example", "10.1.2.3", (), False)),
        *(("a.example", "::ffff:10.1.2.3", (), False), ("a.example", "fd00::1", (), False)),
        *(("a.example", "0.0.0.0", (), False), ("a.example", "100.64.0.1", (), False)),
        *(("a.example", "10.1.2.3", ("a.example",), True), ("b", "10.1.2.3", ("a",), False)),
        # where clouds answer with the machine's own keys: only for the address itself
        ("a.example", "169.254.169.254", ("a.example",), False),
        ("a.example", "fe80::1%eth0", ("a.example",), False),
        ("169.254.169.254", "169.254.169.254", ("169.254.169.254",), True),
        # an IPv4 address within an IPv6 address counts too: NAT64, 6to4, Teredo, IPv4-compatible
        *(("a", "64:ff9b::8.8.8.8", (), True), ("a", "64:ff9b::10.1.2.3", (), False)),
        *(("a", "2002:808:808::1", (), True), ("a", "2002:a01:203::1", (), False)),
        *(("a", "::8.8.8.8", (), True), ("a", "::10.1.2.3", (), False)),
        *(("a", "64:ff9b::10.1.2.3", ("a",), True), ("::1", "::1", ("::1",), True)),
        ("a", "64:ff9b::169.254.169.254", ("a",), False),
        ("64:ff9b::a9fe:a9fe", "64:ff9b::a9fe:a9fe", ("64:ff9b::a9fe:a9fe",), True),
        *(("a", "2002:a9fe:a9fe::1", ("a",), False), ("a", "::169.254.169.254", ("a",), False)),
        ("a", "2001:0:808:808:0:0:5601:5601", ("a",), False),  # the Teredo client, inverted
        ("a", "2001:0:a9fe:a9fe:0:0:f7f7:f7f7", ("a",), False),  # the Teredo server
        ("a", "64:ff9b:1:a9fe:a9:fe00::", ("a",), False),  # prefixes of 48, 56, 64 and 96 bits
        ("a", "64:ff9b:1:a9:fe:a9fe::", ("a",), False),
        ("a", "64:ff9b:1::a9:fea9:fe00:0", ("a",), False),
        ("a", "64:ff9b:1::169.254.169.254", ("a",), False),
        ("a", "64:ff9b:1::10.1.2.3", (), False),
    ],
)
def test_may_ask(host: str, address: str, named: tuple[str, ...], expected: bool) -> None:
    assert may_connect(host, address, named) is expected


def test_named_hosts() -> None:
    prefixes = ("https://", "http://Inner.example:9000/v", "s3://bucket", "/mnt", "https://[::1]/x")
    assert named_hosts(prefixes) == {"inner.example", "::1"}


def test_what_an_answer_shows_of_a_uri() -> None:
    assert shown("s3://key:SECRET@bucket/a?X=SECRET") == "s3://bucket/a"
    assert shown("https://u:SECRET@h/v/a.mp4?sig=SECRET") == "https://h/v/a.mp4"
    assert shown("/mnt/a?b.mp4") == "/mnt/a?b.mp4"
    assert len(shown("x" * 5000)) == 200


def test_no_prefix_is_no_prefix() -> None:
    assert ServeConfig().allowed_uri_prefixes == ()
    with pytest.raises(ConfigError, match=r"setting serve\.allowed_uri_prefixes"):
        load_config(None, ['serve.allowed_uri_prefixes=[""]'])


# ---------------------------------------------------------------------------------- bodies, options


def request_of(
    parts: Sequence[bytes], query: str = "", **headers: str
) -> tuple[Request, list[int]]:
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
    scope = {"type": "http", "method": "POST", "path": "/", "headers": named}
    return Request(scope | {"query_string": query.encode()}, receive), taken


def test_a_body_is_cut_off_at_the_limit() -> None:
    request, taken = request_of([b"x" * 40] * 10)
    refused = refusal(lambda: ended(LimitedBody(request, 100).request.body()))
    assert refused.status == 413
    assert "larger than the limit of 100 bytes" in str(refused)
    assert len(taken) == 3  # the other seven were never requested


def test_a_body_announced_as_too_large_is_not_read() -> None:
    request, taken = request_of([b"x"], content_length="101")
    assert refusal(lambda: LimitedBody(request, 100)).status == 413
    assert taken == []


def test_a_body_of_the_limit_passes() -> None:
    request, _ = request_of([b"x" * 60, b"y" * 40], content_length="100")
    assert ended(LimitedBody(request, 100).request.body()) == b"x" * 60 + b"y" * 40


@pytest.mark.parametrize("announced", [True, False])
def test_the_bytes_in_hand_are_limited(announced: bool) -> None:
    budget = Quota(150)
    headers = {"content_length": "100"} if announced else {}
    first = LimitedBody(request_of([b"x" * 100], **headers)[0], 100, budget)
    ended(first.request.body())
    assert budget.used == 100
    second = request_of([b"x" * 100], **headers)[0]
    refused = refusal(lambda: ended(LimitedBody(second, 100, budget).request.body()))
    assert (refused.status, refused.retry_after_s) == (503, 5)
    first.give_back()
    assert budget.used == 0


def test_bytes_that_are_announced_only_keep_nobody_away() -> None:
    budget = Quota(150)
    announced = [LimitedBody(request_of([b"x"], content_length="100")[0], 100, budget)] * 4
    assert budget.used == 0
    body = LimitedBody(request_of([b"x" * 100], content_length="100")[0], 100, budget)
    assert len(ended(body.request.body())) == 100
    assert announced


def test_a_client_has_its_share_of_the_bytes() -> None:
    budget = Quota(150, minimum=80)

    def body(share: Share) -> LimitedBody:
        return LimitedBody(request_of([b"x" * 50], content_length="50")[0], 100, budget, share)

    ended(body(Share("a", 0.1)).request.body())
    refused = refusal(lambda: body(Share("a", 0.1)))
    assert "uploads of 50 bytes are in flight and the limit is 80" in str(refused)
    ended(body(Share("b", 0.5)).request.body())
    refused = refusal(lambda: body(Share("c", 0.5)) and body(Share("b", 0.5)))
    assert "uploads of 50 bytes are in flight and the limit is 80" in str(refused)


def test_a_batch_s_lines_count_as_bytes_in_flight_until_they_are_parsed() -> None:
    budget = Quota(200)
    line = b'{"custom_id": "a", "uri": "/v/a.mp4"}'
    settings = ServeConfig(allowed_uri_prefixes=("/v/",))

    async def parsed(others: int) -> int:
        budget.take(WHOLE, others)
        try:
            request, _ = request_of([line], content_type="application/jsonl")
            _, lines = await read_batch_request(request, settings, budget)
        finally:
            budget.give_back(WHOLE, others)
        return len(lines)

    assert asyncio.run(parsed(100)) == 1
    with pytest.raises(RequestError, match="uploads of 180 bytes are in flight") as caught:
        asyncio.run(parsed(180))
    assert caught.value.status == 503
    assert budget.used == 0


def test_a_local_prefix_is_not_looked_at_for_a_remote_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_: str) -> str:
        raise AssertionError("the prefix was looked at")

    monkeypatch.setattr(storage, "real_path", hang)
    assert check_uri("s3://b/a.mp4", ("/mnt/", "s3://b/")) == "s3://b/a.mp4"


def test_a_mount_that_is_away_holds_up_no_upload(
    node: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = threading.Event()

    def check(*_: object) -> str:
        back.wait(60)
        return "/mnt/a.mp4"

    monkeypatch.setattr(parse, "check_uri", check)

    async def ask_uri() -> None:
        async with read([b'{"uri": "/mnt/a.mp4"}'], content_type="application/json") as found:
            assert found.source.uri == "/mnt/a.mp4"

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        waiting = [asyncio.create_task(ask_uri()) for _ in range(8)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5), read([b"video"], content_type="video/mp4"):
            assert not any(task.done() for task in waiting)
        back.set()
        await asyncio.gather(*waiting)

    asyncio.run(run())


def form_body(name: str, content: bytes) -> bytes:
    head = f'--cut\r\nContent-Disposition: form-data; name="{name}"; filename="../a.mp4"\r\n\r\n'
    return head.encode() + content + b"\r\n--cut--\r\n"


FORM = "multipart/form-data; boundary=cut"


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node id without a cluster."""
    from tsq_ray.serving.requests import uploads

    monkeypatch.setattr(uploads, "_node_id", lambda: "this")


@contextlib.asynccontextmanager
async def read(
    parts: Sequence[bytes], budget: Quota | None = None, query: str = "", **headers: str
) -> AsyncIterator[Any]:
    request, _ = request_of(parts, query, **headers)
    async with read_score_request(request, ServeConfig(), budget or Quota(2**20)) as found:
        yield found


@pytest.mark.parametrize(
    ("parts", "headers", "uri"),
    [
        ([b"\x00vi", b"deo\r\n"], {"content_type": "video/mp4"}, "upload"),
        ([b"\x00video\r\n"], {}, "upload"),
        (
            [form_body("file", b"\x00video\r\n")[:30], form_body("file", b"\x00video\r\n")[30:]],
            {"content_type": FORM},
            "upload:a.mp4",
        ),
    ],
)
def test_an_upload_becomes_a_file(
    parts: list[bytes], headers: dict[str, str], uri: str, node: None
) -> None:
    budget = Quota(2**20)

    async def check() -> None:
        async with read(parts, budget, **headers) as found:
            assert Path(found.upload.path).read_bytes() == b"\x00video\r\n"
            assert found.upload.sha256 == sha256(b"\x00video\r\n").hexdigest()
            assert (found.identity["uri"], found.identity["size_bytes"]) == (uri, 8)
            assert found.video_id == found.upload.sha256[:16]
            assert budget.used > 0
        assert not os.path.exists(found.upload.path)
        assert budget.used == 0

    asyncio.run(check())


@pytest.mark.parametrize(
    ("parts", "headers", "status", "message"),
    [
        ([b""], {}, 400, "the file is empty"),
        ([form_body("video", b"x")], {"content_type": FORM}, 400, "the form has no `file`"),
        ([form_body("file", b"x")[:-20]], {"content_type": FORM}, 400, "the form has no `file`"),
        ([b"no form"], {"content_type": FORM}, 400, "the form cannot be read"),
        (
            [form_body("file", b"x")[:-9] + b"--cut" + form_body("file", b"y")[5:]],
            {"content_type": FORM},
            400,
            "the form has two files",
        ),
        ([b"x"], {"content_type": "multipart/form-data"}, 400, "boundary"),
        ([b"x"], {"content_type": "text/plain"}, 415, "Content-Type 'text/plain'"),
        (
            [b"x"],
            {"content_type": "application/x-www-form-urlencoded"},
            415,
            "is not supported; send",
        ),
        ([b"x"], {"content_type": "application/vnd.api+json"}, 415, "is not supported"),
        ([b"x"], {"content_encoding": "gzip"}, 415, "Content-Encoding"),
    ],
)
def test_a_body_that_is_refused(
    parts: list[bytes], headers: dict[str, str], status: int, message: str, node: None
) -> None:
    async def run() -> None:
        async with read(parts, **headers):
            raise AssertionError("the request passed")

    refused = refusal(lambda: asyncio.run(run()))
    assert refused.status == status
    assert message in str(refused)


@pytest.mark.parametrize("form", [False, True])
def test_a_full_disk_is_507(form: bool, node: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's device that has no room for a single byte."""
    from tsq_ray.serving.requests import uploads

    monkeypatch.setattr(uploads, "_unnamed", partial(open, "/dev/full", "wb", buffering=0))

    async def run() -> None:
        async with read(
            [form_body("file", b"x" * 10)] if form else [b"x" * 10],
            content_type=FORM if form else "video/mp4",
        ):
            raise AssertionError("the request passed")

    refused = refusal(lambda: asyncio.run(run()))
    assert (refused.status, refused.error_type) == (507, "unavailable")
    assert refused.retry_after_s == 30


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *((b"", "Invalid JSON"), (b"x", "Invalid JSON"), (b"\xff", "Invalid JSON")),
        *((b"[]", "the body"), (b'"s3://b/a.mp4"', "the body"), (b"{}", "uri: Field required")),
        *((b'{"uri": 3}', "uri"), (b'{"uri": ""}', "uri"), (b"[" * 16000, "Invalid JSON")),
        (b'{"uri": "s3://b/a", "kk": 2}', "kk: Extra inputs are not permitted; allowed: k, top"),
        (b'{"uri": "s3://b/a", "k": 0}', "k: Input should be greater than or equal to 1"),
        (b'{"uri": "s3://b/a", "scores": "perhaps"}', "scores: "),
    ],
)
def test_json_that_is_refused(body: bytes, message: str) -> None:
    refused = refusal(lambda: validate(UriRequest, body))
    assert refused.status == 400
    assert message in str(refused)
    assert len(str(refused)) < 300


def test_options() -> None:
    wanted = validate(UriRequest, b'{"uri": "s3://b/a b.mp4", "k": 3, "frames": true}')
    assert (wanted.uri, wanted.k, wanted.top, wanted.scores, wanted.frames) == (
        "s3://b/a b.mp4",
        3,
        5,
        True,
        True,
    )
    found = validate(Options, {"k": "2", "scores": "false"})
    assert (found.k, found.scores, found.frames) == (2, False, False)
    assert refusal(lambda: validate(Options, {"k": "two"})).status == 400


# -------------------------------------------------------------------------------- models, problems


def test_the_answer_has_the_columns_of_predictions() -> None:
    columns = {column.name for column in (*PREDICTIONS, *SERVER)} - OMITTED
    fields = Prediction.model_fields
    assert set(fields) == columns | {"model", "frames"}
    documented = Prediction.model_json_schema()["properties"]
    for column in (*PREDICTIONS, *SERVER):
        if column.name in columns - {"status"}:
            assert documented[column.name]["description"].startswith(column.doc)


@pytest.mark.parametrize("model", [Prediction, Problem, UriRequest, BatchRequest, BatchLine])
def test_the_document_has_an_example_of_each(model: type[BaseModel]) -> None:
    (example,) = model.model_json_schema()["examples"]
    assert model.model_validate(example).model_dump(mode="json").items() >= example.items()


def test_the_document_tells_of_the_header_prefer() -> None:
    headers = [one["name"] for one in SCORE["openapi_extra"]["parameters"] if one["in"] == "header"]
    assert headers == ["Prefer"]


@pytest.mark.parametrize(
    ("failure", "status", "retry"),
    [
        (VideoError("truncated", "cut"), 422, None),
        (VideoError("not_found", "no such video"), 404, None),
        (VideoError("access_denied", "keys"), 502, None),
        (VideoError("unavailable", "storage"), 503, "5"),
        (VideoError("decoder_crash", "SIGSEGV"), 422, None),
        (DecoderKilled("decoder_crash", "SIGKILL"), 503, "5"),
        (DiskFull("unavailable", "full"), 507, "30"),
        (VideoError("timeout", "late"), 504, None),
        (VideoError("too_large", "huge"), 413, None),
    ],
)
def test_the_answer_for_a_failed_video(failure: VideoError, status: int, retry: str | None) -> None:
    answer = problem(RequestError.of(failure, {"uri": "a"}, "0123"), "id-1")
    assert answer.headers["X-TSQ-Model"] == "0123"
    assert answer.status_code == status
    assert answer.media_type == "application/problem+json"
    assert answer.headers.get("Retry-After") == retry
    told = str(answer.body)
    assert failure.error_type in told
    assert "id-1" in told


# ---------------------------------------------------------------------------------------- admission


def test_admission_counts_what_is_in_hand() -> None:
    admission = Admission(2, 60)
    with admission.admitted(), admission.admitted():
        refused = refusal(lambda: admission.admitted().__enter__())
        assert (refused.status, refused.retry_after_s) == (429, 1)
        assert "2 requests are in flight" in str(refused)
    assert admission.in_flight == 0


def test_admission_refuses_what_would_be_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    admission = Admission(100, 10)
    with admission.admitted(), admission.measured():
        now[0] += 2  # one request in 2 s: 3.5 of them in 0.7 x 10 s
    assert admission.pace_s == 2
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(admission.admitted())
        refused = refusal(lambda: admission.admitted().__enter__())
        assert refused.status == 429
        assert refused.retry_after_s == pytest.approx(1.0)
    with admission.admitted():
        pass


def test_one_slow_video_does_not_close_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    admission = Admission(100, 60)
    for seconds in [0.5] * 10 + [55.0]:
        with admission.admitted(), admission.measured():
            now[0] += seconds
    assert admission.pace_s == 0.5


A, B = Share("a", 0.5), Share("b", 0.5)


def test_a_share_is_one_of_what_can_be_answered_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    admission = Admission(256, 10)
    with admission.admitted(), admission.measured():
        now[0] += 0.5  # 14 requests in 0.7 x 10 s
    small = Share("small", 0.1)
    with admission.admitted(small):
        refused = refusal(lambda: admission.admitted(small).__enter__())
        assert (refused.status, refused.retry_after_s) == (429, 1)
        assert "1 requests are in flight" in str(refused)
        with contextlib.ExitStack() as stack:
            for _ in range(7):
                stack.enter_context(admission.admitted(A))
            assert refusal(lambda: admission.admitted(A).__enter__()).status == 429
            with admission.admitted(B):
                assert admission.in_flight == 9


def test_a_client_has_its_share() -> None:
    admission = Admission(4, 60)
    with admission.admitted(A), admission.admitted(A):
        assert refusal(lambda: admission.admitted(A).__enter__()).status == 429
        with admission.admitted(B):
            assert admission.in_flight == 3


def test_an_ending_endpoint_refuses() -> None:
    admission = Admission(4, 60)
    admission.draining = True
    refused = refusal(lambda: admission.admitted().__enter__())
    assert (refused.status, refused.retry_after_s) == (503, 5)


def test_a_request_of_any_kind_is_waited_for_unless_it_came_too_late() -> None:
    admission = Admission(4, 60)
    with admission.answering():
        admission.draining = True
        with admission.answering():
            assert admission.unanswered == 1
    assert admission.unanswered == 0


def test_an_end_is_seen_after_a_look_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, reports = iter([ConnectionError("the store is away"), False, True]), []

    def look(app: str) -> bool:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    def report(*told: Any) -> None:
        reports.append(told)
        if len(reports) == 1:
            raise ConnectionError("the store is away")

    monkeypatch.setattr(facts, "is_end_requested", look)
    monkeypatch.setattr(facts, "report_unanswered", report)
    monkeypatch.setattr(facts, "_WATCH_S", 0.01)
    monkeypatch.setattr(facts, "_POLL_S", 0.01)
    admission = Admission(4, 60)

    async def run() -> None:
        with admission.answering():
            watching = asyncio.create_task(facts.watch("app", "replica", admission))
            while len(reports) < 2:
                assert not watching.done(), watching
                await asyncio.sleep(0.01)
            watching.cancel()

    ended(asyncio.wait_for(run(), 10))
    assert reports == [("app", "replica", 1)] * 2


# ------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[tuple[Path, str, str]]:
    """A file of two tokens, and their secrets."""
    first, table_a = new_token("team a", "2/minute", 0.5)
    second, table_b = new_token('te"am b')
    path = tmp_path / "tokens.toml"
    path.write_text(table_a + table_b)
    return path, first, second


def test_tokens_are_named_and_hashed(tokens: tuple[Path, str, str]) -> None:
    path, first, second = tokens
    assert first not in path.read_text()
    access = Access(None, str(path))
    assert (access.client(first).name, access.client(first).share) == ("team a", 0.5)
    assert access.client(second).name == 'te"am b'
    for wrong in (None, "", first + "x", "0" * 64):
        assert refusal(lambda given=wrong: access.client(given)).status == 401


def test_the_file_of_tokens_is_read_again(tokens: tuple[Path, str, str]) -> None:
    path, first, second = tokens
    access = Access(None, str(path))
    third, table = new_token("third")
    path.write_text(table)
    assert access.client(third).name == "third"
    assert refusal(lambda: access.client(first)).status == 401
    path.write_text("[[token]]\nname = 3")
    assert access.client(third).name == "third", "a damaged file takes no token away"
    assert second


def test_a_rate_is_kept(tokens: tuple[Path, str, str]) -> None:
    path, first, second = tokens
    access = Access(None, str(path))
    mine = access.client(first)
    headers, refused = access.spend(mine)
    assert (headers["RateLimit-Limit"], headers["RateLimit-Remaining"]) == ("2", "1")
    assert refused is None
    access.spend(mine)
    headers, refused = access.spend(mine)
    assert refused is not None
    assert refused.status == 429
    assert 0 < (refused.retry_after_s or 0) <= 60
    assert headers["RateLimit-Remaining"] == "0"
    assert 0 < int(headers["RateLimit-Reset"]) <= 60
    assert access.spend(access.client(second)) == ({}, None), "no rate, no limit"


@pytest.mark.parametrize(
    ("replicas", "passed", "per_s"), [(1, 2, 60), (2, 1, 60), (3, 1, 120), (4, 1, 120), (5, 1, 180)]
)
def test_replicas_share_a_rate(
    tokens: tuple[Path, str, str], replicas: int, passed: int, per_s: int
) -> None:
    """Of 2 a minute; all of them together never grant more than that on average."""
    path, first, _ = tokens
    access = Access(None, str(path), replicas)
    mine = access.client(first)
    spent = [access.spend(mine) for _ in range(4)]
    assert [refused is None for _, refused in spent] == [True] * passed + [False] * (4 - passed)
    assert per_s - 5 < int(spent[-1][0]["RateLimit-Reset"]) <= per_s


def test_one_token_of_the_environment_and_none() -> None:
    assert Access("secret").client("secret").name == "TSQ_TOKEN"
    assert refusal(lambda: Access("secret").client("Secret")).status == 401
    assert Access(None).client(None).name == "anonymous"
    assert Access(None).client("whatever").name == "anonymous"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[token]]\nname = 3", r"token\.0\.name"),
        ("x", "tokens.toml: "),
        ('[[token]]\nname = "a"\nsha256 = "12"', r"token\.0\.sha256"),
        (f'[[token]]\nname = "a"\nsha256 = "{"0" * 64}"\nrate = "often"', r"token\.0\.rate"),
        (f'[[token]]\nname = "a"\nsha256 = "{"0" * 64}"\nrate = "0/minute"', "is not one rate"),
        (f'[[token]]\nname = "a"\nsha256 = "{"0" * 64}"\nrate = "9/second;9/day"', "not one rate"),
        (f'[[token]]\nname = "a"\nsha256 = "{"0" * 64}"\n' * 2, "the name 'a' occurs twice"),
        (f'[[token]]\nname = "a"\nsha256 = "{"0" * 64}"\nshare = 2', r"token\.0\.share"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_of_tokens(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_tokens(str(path))


def test_a_token_is_added_to_a_file_without_a_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(new_token("a", share=0.5)[1].rstrip())
    add_token(str(path), "b", new_token("b", rate="60/minute")[1])
    assert [(token.name, token.share) for token in read_tokens(str(path))] == [("a", 0.5), ("b", 1)]
