"""The endpoint in trouble: it ends, its processes are killed, clients and sources are slow."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.archive import Archive, make_archive
from support.bundle import make_bundle
from support.endpoint import (
    ANSWER_S,
    END_S,
    Endpoint,
    Load,
    is_ended,
    memory_of,
    private_memory_of,
    same_answer,
    serving,
)
from support.served import DRAIN_S, Served

from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.prediction import predict_rows

pytestmark = pytest.mark.ray

NAME = "train/1_1.mp4"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("served") / "videos")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def data(archive: Archive) -> bytes:
    return (archive.root / NAME).read_bytes()


@pytest.fixture(scope="module")
def row(archive: Archive, bundle: str) -> dict[str, Any]:
    return predict_rows([str(archive.root / NAME)], bundle, scoring_config(bundle))[0]


class SlowBody:
    """An upload that pauses in the middle until it is released, for at most `most_s`."""

    def __init__(self, data: bytes, most_s: float = ANSWER_S) -> None:
        self.data, self.most_s, self.go_on = data, most_s, threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        yield self.data[:100]
        self.go_on.wait(self.most_s)
        yield self.data[100:]


def in_hand(endpoint: Endpoint, pool: ThreadPoolExecutor, data: bytes, count: int) -> Any:
    """Requests that the endpoint has in hand, and a function that lets them go on."""
    bodies = [SlowBody(data) for _ in range(count)]
    uploads = f"{endpoint.folder}/tsq-upload-"
    before = open_files(endpoint, uploads)
    answers = [pool.submit(endpoint.score, content=body) for body in bodies]
    deadline = time.monotonic() + ANSWER_S
    while open_files(endpoint, uploads) < before + count:
        assert time.monotonic() < deadline, "the uploads did not begin"
        time.sleep(0.1)

    def go_on() -> list[httpx.Response]:
        for body in bodies:
            body.go_on.set()
        return [answer.result(ANSWER_S) for answer in answers]

    return go_on


def open_files(endpoint: Endpoint, prefix: str) -> int:
    """How many of the ingress replicas' open files are unnamed ones whose name began so."""
    found = 0
    for pid in endpoint.processes("Ingress"):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found += os.readlink(link).startswith(f"{endpoint.folder}/#") or os.readlink(
                    link
                ).startswith(prefix)
            except OSError:
                continue
    return found


def test_an_endpoint_that_is_told_to_end_answers_what_it_has_in_hand(
    served: Served, data: bytes, row: dict[str, Any]
) -> None:
    endpoint = served.endpoint
    with contextlib.closing(served), ThreadPoolExecutor(4) as pool:
        go_on = in_hand(endpoint, pool, data, 4)
        endpoint.driver.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + END_S
        while (refused := endpoint.score(content=data)).status_code != 503:
            assert refused.status_code == 200
            assert time.monotonic() < deadline, "new requests are still accepted"
        assert refused.headers["Retry-After"] == "5"
        assert "the endpoint is ending" in refused.json()["detail"]
        while endpoint.client.get("/readyz").status_code != 503:
            assert time.monotonic() < deadline, "an ingress replica still accepts requests"
        assert endpoint.client.get("/healthz").status_code == 200
        for answer in go_on():
            assert answer.status_code == 200
            same_answer(answer.json(), row)
        ended = endpoint.driver.ended(END_S)
        assert ended.code == 0, ended
        shown = ended.err.strip().splitlines()
        assert shown[-2:] == [
            f"ending: answering the requests in flight, for at most {DRAIN_S} s",
            "stopped",
        ]
        starting = "starting: the {} has loaded".format
        loaded = [line for line in shown if line.endswith(" has loaded")]
        assert set(loaded) <= set(map(starting, ("decoder", "sampler", "recognizer")))
        assert starting("decoder") in loaded, "the first, long before the last"
        lines = [line for line in shown if line.startswith(("starting", "metrics", "serving"))]
        assert lines == [
            "starting: Ray",
            "starting: loading the model in each replica",
            *loaded,
            f"metrics on {endpoint.metrics_url}",
            f"serving {served.bundle} on {endpoint.url} (stop with Ctrl-C)",
        ]
        assert "Traceback" not in ended.out + ended.err
        # of a process that another test has killed, Ray tells in colour
        own = [line for line in shown if "(raylet)" not in line]
        assert "\x1b[" not in "".join(own), "no colours in a file"
        is_ended(endpoint)
        left = [path.name for path in endpoint.folder.iterdir()]
        assert [name for name in left if name.startswith(("tsq-", "pymp-"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(
    bundle: str, data: bytes, number: int, tmp_path: Path
) -> None:
    with serving(bundle, tmp_path, "serve.drain_s=600") as endpoint, ThreadPoolExecutor(1) as pool:
        go_on = in_hand(endpoint, pool, data, 1)
        endpoint.driver.process.send_signal(number)
        deadline = time.monotonic() + END_S
        while endpoint.client.get("/readyz").status_code != 503:
            assert time.monotonic() < deadline, "the first signal had no effect"
        endpoint.driver.process.send_signal(number)
        assert endpoint.driver.ended(END_S).code == 0
        is_ended(endpoint)
        with contextlib.suppress(httpx.TransportError):
            assert go_on()[0].status_code in (502, 503)


@pytest.mark.slow
def test_ctrl_c_drops_only_what_takes_longer_than_the_drain(
    bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    drain_s = 15
    setting = f"serve.drain_s={drain_s}"
    with serving(bundle, tmp_path, setting) as endpoint, ThreadPoolExecutor(2) as pool:
        go_on = in_hand(endpoint, pool, data, 1)
        go_on_too_late = in_hand(endpoint, pool, data, 1)
        os.killpg(endpoint.driver.process.pid, signal.SIGINT)  # as a terminal sends it
        deadline = time.monotonic() + END_S
        while endpoint.client.get("/readyz").status_code != 503:
            assert time.monotonic() < deadline, "the signal had no effect"
        (answer,) = go_on()
        same_answer(answer.json(), row)
        ended = endpoint.driver.ended(END_S)
        assert ended.code == 0, ended
        assert ended.err.strip().splitlines()[-3:] == [
            f"ending: answering the requests in flight, for at most {drain_s} s",
            f"ending: requests still in flight after {drain_s} s are dropped",
            "stopped",
        ]
        is_ended(endpoint)
        with contextlib.suppress(httpx.TransportError):
            assert go_on_too_late()[0].status_code in (502, 503)


STAGES = ("ServeReplica:tsq:Decoder", "ServeReplica:tsq:Sampler", "ServeReplica:tsq:Recognizer")
OTHERS = ("ServeReplica:tsq:Ingress", "ProxyActor", "ServeController")


@pytest.mark.slow
def test_processes_are_killed_under_load(
    bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    """No answer is lost with a stage; every answer is JSON whatever is killed."""
    with serving(bundle, tmp_path) as endpoint:
        for title in (*STAGES, *OTHERS):
            load = Load(lambda: endpoint.score(content=data), 4)
            load.wait_for(4)
            os.kill(endpoint.processes(title)[0], signal.SIGKILL)
            killed = time.monotonic()
            load.wait_for(8)
            answers = load.ended()
            for answer in answers:
                assert answer is not None, f"{title}: a connection was closed without an answer"
                if answer.status_code == 200:
                    same_answer(answer.json(), row)
                else:
                    assert title in OTHERS, f"{title}: {answer.status_code} {answer.text}"
                    assert answer.status_code in (502, 503)
                    assert answer.json()["status"] == answer.status_code
                    assert answer.headers["Retry-After"]
            same_answer(endpoint.answers_again(content=data).json(), row)
            answered = [
                when
                for when, answer in load.answers
                if when > killed and answer is not None and answer.status_code == 200
            ]
            times = [killed, *answered, time.monotonic()]
            silence = max(later - earlier for earlier, later in pairwise(times))
            lost = sum(answer is not None and answer.status_code != 200 for answer in answers)
            print(f"{title}: {silence:.1f} s without a prediction, {lost} answers 502 or 503")


@pytest.mark.slow
def test_a_killed_front_is_started_again(
    bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    with serving(bundle, tmp_path) as endpoint:
        (killed,) = endpoint.processes("haproxy")
        os.kill(killed, signal.SIGKILL)
        same_answer(endpoint.answers_again(content=data).json(), row)
        assert killed not in endpoint.processes("haproxy")
        endpoint.driver.process.send_signal(signal.SIGTERM)
        ended = endpoint.driver.ended(END_S)
        assert ended.code == 0, ended
        assert "the HTTP front has ended (signal 9); starting it again" in ended.err
        is_ended(endpoint)


@pytest.mark.slow
def test_a_killed_decoding_process_is_not_the_videos_fault(
    bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    with serving(bundle, tmp_path) as endpoint, ThreadPoolExecutor(1) as pool:
        endpoint.score(content=data)
        answers = []
        for _ in range(10):
            waiting = pool.submit(endpoint.score, content=data)
            for pid in decoding_processes(endpoint):
                os.kill(pid, signal.SIGKILL)
            answers.append(waiting.result(ANSWER_S))
        for answer in answers:
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                same_answer(answer.json(), row)
        assert sum(answer.status_code == 200 for answer in answers) >= 5
        deadline = time.monotonic() + END_S  # exported every few seconds
        while not metric(endpoint, "ray_tsq_decoders_restarted_total"):
            assert time.monotonic() < deadline, "the lost children were not counted"
            time.sleep(1)


def metric(endpoint: Endpoint, name: str) -> float:
    """The sum of a metric over the replicas."""
    lines = httpx.get(endpoint.metrics_url, trust_env=False).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def decoding_processes(endpoint: Endpoint) -> list[int]:
    """The decoder's children: those of its fork server."""
    parents = {pid: parent_of(pid) for pid in endpoint.processes("")}
    (decoder,) = endpoint.processes("ServeReplica:tsq:Decoder")
    servers = [pid for pid, parent in parents.items() if parent == decoder]
    return [pid for pid, parent in parents.items() if parent in servers]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


# ------------------------------------------------------------------------------ slow and odd
# sources


class Stalling(http.server.BaseHTTPRequestHandler):
    """/open/V serves the video, /slow stalls in mid-body, /move redirects, /NUMBER is a status."""

    data = b""
    released = threading.Event()

    def do_GET(self) -> None:
        what = self.path.rpartition("/")[2]
        if what.isdecimal():
            self.send_response(int(what))
            self.end_headers()
            return
        if what == "move":
            self.send_response(302)
            self.send_header("Location", "/closed/secret")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("ETag", '"of-this-version"')
        self.end_headers()
        self.wfile.write(self.data[:100])
        if what == "slow":
            self.released.wait(ANSWER_S)
        self.wfile.write(self.data[100:])

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def web(data: bytes) -> Iterator[str]:
    """A web server on loopback, at http://127.0.0.1:PORT."""
    Stalling.data = data
    Stalling.released.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Stalling.released.set()
        server.shutdown()


@pytest.fixture
def silent_s3() -> Iterator[dict[str, str]]:
    """The environment of an S3 server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }


@pytest.mark.slow
def test_slow_and_odd_sources(
    bundle: str,
    data: bytes,
    row: dict[str, Any],
    web: str,
    silent_s3: dict[str, str],
    tmp_path: Path,
) -> None:
    """Eight sources that stall hold up no upload; redirects and statuses are told as they are."""
    fifo = tmp_path / "open" / "fifo.mp4"
    fifo.parent.mkdir()
    os.mkfifo(fifo)
    prefixes = json.dumps([f"{web}/open", "s3://silent/open", str(fifo.parent)])
    settings = (f"serve.allowed_uri_prefixes={prefixes}", "serve.fetch_timeout_s=6")
    with (
        serving(bundle, tmp_path / "run", *settings, **silent_s3) as endpoint,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(name: str) -> httpx.Response:
            return ask_uri(f"{web}/open/{name}")

        def ask_uri(uri: str) -> httpx.Response:
            return endpoint.score(json={"uri": uri})

        assert ask_uri(str(fifo)).json()["error_type"] == "not_video"
        stalling = (f"{web}/open/slow", "s3://silent/open/a.mp4")
        slow = [pool.submit(ask_uri, stalling[number % 2]) for number in range(8)]
        time.sleep(1)
        same_answer(endpoint.score(content=data).json(), row)
        found = ask("video.mp4").json()
        same_answer(found, row)
        assert (found["size_bytes"], found["etag"]) == (len(data), "of-this-version")
        assert not any(waiting.done() for waiting in slow), "the upload waited for them"
        for waiting in slow:
            late = waiting.result(ANSWER_S)
            assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
            assert "serve.fetch_timeout_s = 6 s" in late.json()["detail"]
        for name, status, error_type in (
            ("move", 422, "unsupported"),
            ("404", 404, "not_found"),
            ("403", 502, "access_denied"),
            ("500", 503, "unavailable"),
            ("429", 503, "unavailable"),
        ):
            answer = ask(name)
            assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
        assert endpoint.score(json={"uri": f"{web}/closed/secret"}).status_code == 403


@pytest.mark.slow
def test_more_stalling_sources_than_fetches_hold_up_no_upload(
    bundle: str, data: bytes, row: dict[str, Any], web: str, tmp_path: Path
) -> None:
    settings = (
        f'serve.allowed_uri_prefixes=["{web}/open"]',
        "serve.fetch_timeout_s=20",
        "serve.max_fetches=2",
        "serve.decoder.max_ongoing_requests=2",
        "serve.decoder.max_replicas=1",
    )
    with serving(bundle, tmp_path, *settings) as endpoint, ThreadPoolExecutor(8) as pool:

        def seconds_of_upload() -> float:
            start = time.monotonic()
            same_answer(endpoint.score(content=data).json(), row)
            return time.monotonic() - start

        ask = {"json": {"uri": f"{web}/open/slow"}}
        alone = seconds_of_upload()
        slow = [pool.submit(endpoint.score, **ask) for _ in range(8)]
        time.sleep(2)
        beside = [seconds_of_upload() for _ in range(3)]
        print(f"an upload took {alone:.1f} s alone, at most {max(beside):.1f} s beside 8 sources")
        assert not any(waiting.done() for waiting in slow), "the uploads waited for them"
        Stalling.released.set()
        for waiting in slow:
            same_answer(waiting.result(ANSWER_S).json(), row)


# ----------------------------------------------------------------------------- limits and the
# memory


@pytest.mark.slow
def test_limits(bundle: str, data: bytes, row: dict[str, Any], tmp_path: Path) -> None:
    settings = (
        "serve.max_queued_requests=2",
        "serve.request_timeout_s=12",
        "serve.ingress.min_replicas=1",
        "serve.ingress.max_replicas=1",
        "serve.header_timeout_s=2",
    )
    with serving(bundle, tmp_path, *settings) as endpoint, ThreadPoolExecutor(2) as pool:
        same_answer(endpoint.score(content=data).json(), row)  # loopback needs no token
        go_on = in_hand(endpoint, pool, data, 2)
        full = endpoint.score(content=data)
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) >= 1
        assert "2 requests are in flight" in full.json()["detail"]
        assert endpoint.client.get("/healthz").status_code == 200
        assert endpoint.is_ready()
        assert [answer.status_code for answer in go_on()] == [200, 200]

        late = endpoint.score(content=SlowBody(data, 20))
        assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
        assert "serve.request_timeout_s = 12 s" in late.json()["detail"]
        assert endpoint.score(content=data).status_code == 200
        assert headers_that_never_end(endpoint) == 408

        load = Load(lambda: endpoint.score(content=data), 40)  # above Serve's own limit too
        load.wait_for(40)
        assert endpoint.client.get("/healthz").status_code == 200
        for answer in load.ended():
            assert answer is not None
            assert answer.status_code in (200, 429), answer.text
            assert answer.status_code == 200 or int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["status"] in ("ok", 429)


@pytest.mark.slow
def test_a_flood_leaves_no_work_behind(
    bundle: str, archive: Archive, data: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    """Far above saturation predictions go on, the rest is refused, and no late work is left.

    A URI is not refused: it becomes a batch of one.
    """
    settings = (
        "serve.request_timeout_s=2",
        f"serve.batches_uri={tmp_path}/batches",
        f'serve.allowed_uri_prefixes=["{archive.root}"]',
    )
    with serving(bundle, tmp_path, *settings) as endpoint:
        rates = []
        for clients in (4, 4, 48):  # the first warms up
            load = Load(lambda: endpoint.score(content=data), clients)
            time.sleep(20)
            if clients == 48:
                uri = {"uri": str(archive.root / NAME)}
                batch = endpoint.answers_again(202, json=uri).json()["id"]
            answers = load.ended()
            good = [when for when, one in load.answers if one is not None and one.is_success]
            rates.append((len(good) - 1) / (good[-1] - good[0]))
        print("predictions per second:", *(f"{rate:.1f}" for rate in rates))
        assert rates[-1] > 0.7 * rates[-2]
        statuses = Counter(answer.status_code for answer in answers if answer is not None)
        assert statuses.total() == len(answers)
        assert statuses.keys() <= {200, 429, 504}
        assert statuses[200] > statuses[504]
        for answer in answers:
            assert answer is not None
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.json()["status"] == 429
        lone = endpoint.score(content=data)
        assert lone.status_code == 200, lone.text
        same_answer(lone.json(), row)
        deadline = time.monotonic() + END_S
        while endpoint.client.get(f"/v1/batches/{batch}").json()["status"] != "completed":
            assert time.monotonic() < deadline, "the batch does not end"
            time.sleep(0.5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told(
    bundle: str, data: bytes, row: dict[str, Any], small_disk: Path, tmp_path: Path
) -> None:
    with serving(bundle, tmp_path / "run", TMPDIR=str(small_disk)) as endpoint:
        full = endpoint.score(content=bytes(20 * 2**20))
        assert (full.status_code, full.json()["error_type"]) == (507, "unavailable")
        assert "disk is full" in full.json()["detail"]
        assert int(full.headers["Retry-After"]) >= 1
        same_answer(endpoint.score(content=data).json(), row)


def headers_that_never_end(endpoint: Endpoint) -> int:
    """The status for a client that does not send its headers to the end."""
    port = int(endpoint.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as client:
        client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: a\r\n")
        return int(client.recv(1000).split()[1])


@pytest.mark.slow
def test_large_uploads_cost_no_memory(bundle: str, data: bytes, tmp_path: Path) -> None:
    """Four uploads of 150 MB at a time: each is a file, and the memory is given back.

    Except for the pages of Ray's object store, which the next uploads use again.
    """
    with serving(bundle, tmp_path) as endpoint, ThreadPoolExecutor(4) as pool:

        def ask(content: bytes) -> httpx.Response:
            return endpoint.score(content=content)

        # every process has worked once, so that only the uploads are new
        assert {answer.status_code for answer in pool.map(ask, [data] * 12)} == {200}
        most: dict[int, int] = {}
        before = memory_of(endpoint.processes(""))
        private = sum(private_memory_of(endpoint.processes("")).values())

        def upload(_: int) -> int:
            chunk = bytes(2**20)
            return endpoint.score(content=(chunk for _ in range(150))).status_code

        waiting = [pool.submit(upload, number) for number in range(4)]
        while not all(one.done() for one in waiting):
            for pid, size in memory_of(endpoint.processes("")).items():
                most[pid] = max(size, most.get(pid, 0))
            time.sleep(0.1)
        assert [one.result() for one in waiting] == [422] * 4
        grown = sum(size - before.get(pid, 0) for pid, size in most.items())
        assert grown < 400 * 2**20, f"{grown / 2**20:.0f} MiB"
        kept = sum(private_memory_of(endpoint.processes("")).values()) - private
        assert kept < 100 * 2**20, f"{kept / 2**20:.0f} MiB"
        print(f"at most {grown / 2**20:.0f} MiB more, {kept / 2**20:.0f} MiB after")


@pytest.mark.slow
def test_memory_stays_flat(bundle: str, data: bytes, tmp_path: Path) -> None:
    """2,000 requests: the second thousand takes at most a tenth more memory than the first."""
    with serving(bundle, tmp_path) as endpoint, ThreadPoolExecutor(4) as pool:

        def ask(_: int) -> int:
            return endpoint.score(content=data).status_code

        totals = []
        for _ in range(2):
            assert set(pool.map(ask, range(1000))) <= {200}
            totals.append(sum(memory_of(endpoint.processes("")).values()))
        first, second = (total / 2**20 for total in totals)
        print(f"after 1,000 requests {first:.0f} MiB, after 2,000 {second:.0f} MiB")
        assert second < 1.1 * first
