"""Odd names and odd buckets against a real S3 server.

Also odd names given to tsq predict, which answers one by one.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote

import fsspec
import pytest
from support.archive import CLASSES, write_clip
from support.bundle import make_bundle
from support.cluster import SETTINGS, read_rows, tsq
from support.proxy import ARCHIVED, S3Proxy

from jobs.benchmarks.support.s3 import PUBLIC_BUCKET, S3Server
from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.config import DecodeConfig
from tsq_ray.decode import FrameSpec, VideoSource, decode_video
from tsq_ray.errors import StorageError
from tsq_ray.manifest import Findings, Manifest, assemble_manifest
from tsq_ray.prediction import predict_rows

ROOT = "s3://tsq-other/odd"
NAMES = (
    *("a b.mp4", "#1.mp4", "50%20off%.mp4", "a+b.mp4", "a&b.mp4", "~c.mp4", "🎬.mp4", "é.mp4"),
    *(
        "std::vec.mp4",
        "What is it?.mp4",
        "q?versionId=abc.mp4",
        "Why? Because/x.mp4",
        "[x]*.mp4",
        "_id.mp4",
        "_f/a.mp4",
    ),
    *(
        "two\nlines.mp4",
        "x.mp4/in.mp4",
        "=cmd().mp4",
        "'q\".mp4",
        "a=b@c,d;e.mp4",
        "lost+found/a.mp4",
        "n" * 250 + ".mp4",
    ),
)
SLASHES = (
    "dir//d.mp4",
    "back\\slash.mp4",
    "//front.mp4",
    "x.mp4/in.mp4",
    "x.mp4//in.mp4",
    "x?versionId=1/?versionId=2.mp4",
)
"""SeaweedFS treats keys as file paths and thereby changes them."""
MARKS = ("folder.mp4/", "x.mp4/")
HIDDEN = "hidden (name begins with .)"
HIDDEN_KEYS = (".d/1.mp4", ".d/2.mp4", ".d/in/.e/3.mp4", ".h.mp4", "dir/.d/4.mp4", "dir/.h.mp4")
LEFT_OUT = {HIDDEN: [".d", ".h.mp4", "dir/.d", "dir/.h.mp4"], ".txt": ["t.txt"]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "v.mp4", CLASSES[0], seed=0, num_frames=12)


@pytest.fixture(scope="module")
def bucket(s3: S3Server, clip: Path) -> str:
    """A prefix with every kind of odd key, written without this package."""
    fs, data = fsspec.filesystem("s3", use_listings_cache=False), clip.read_bytes()
    contents = {name: data for name in (*NAMES, "t.txt", *HIDDEN_KEYS)} | dict.fromkeys(MARKS, b"")
    for name, content in contents.items():
        fs.call_s3("put_object", Bucket="tsq-other", Key=f"odd/{name}", Body=content)
    return ROOT


@pytest.fixture(scope="module")
def listed(bucket: str) -> tuple[Manifest, Findings]:
    return assemble_manifest([bucket])


def decode(uri: str, strategy: str = "uniform") -> int:
    settings = DecodeConfig.model_validate({"strategy": strategy, "num_frames": 4})
    return decode_video(VideoSource(uri), settings, {"wide": FrameSpec(32)}).source_num_frames


def clear() -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()


# --------------------------------------------------------------------------------------------- keys


def test_every_key_is_a_row_or_is_counted(listed: tuple[Manifest, Findings], clip: Path) -> None:
    manifest, summary = listed
    assert {row.uri.removeprefix(f"{ROOT}/") for row in manifest.rows} == set(NAMES)
    assert {row.size_bytes for row in manifest.rows} == {clip.stat().st_size}
    assert summary.left_out == {reason: len(keys) for reason, keys in LEFT_OUT.items()}
    assert summary.left_out_examples == {
        reason: [f"{ROOT}/{key}" for key in keys[:3]] for reason, keys in LEFT_OUT.items()
    }


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_every_key_decodes_and_is_itself(listed: tuple[Manifest, Findings], name: str) -> None:
    row = next(row for row in listed[0].rows if row.uri == f"{ROOT}/{name}")
    assert decode(row.uri) == 12
    assert storage.stat(row.uri) == storage.StoredFile(
        row.uri, row.size_bytes, row.etag, row.modified
    )
    assert [one.video_id for one in assemble_manifest([row.uri])[0].rows] == [row.video_id]


@pytest.mark.parametrize("source", ["s3a://tsq-other/odd/", "S3://tsq-other/odd", f"{ROOT}//"])
def test_a_prefix_has_one_spelling(listed: tuple[Manifest, Findings], source: str) -> None:
    assert assemble_manifest([source])[0].rows == listed[0].rows
    assert assemble_manifest([source, ROOT, f"{ROOT}/Why? Because"])[0].rows == listed[0].rows


class _FlatStore(BaseHTTPRequestHandler):
    """The part of S3 that reading needs; any text is a key."""

    protocol_version = "HTTP/1.1"
    contents: ClassVar[dict[str, bytes]] = {}

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        key, asked = (
            unquote(path).removeprefix("/flat").removeprefix("/"),
            parse_qs(query, keep_blank_values=True),
        )
        if "list-type" in asked:
            found = [name for name in sorted(self.contents) if name.startswith(asked["prefix"][0])]
            items = (
                f"<Contents><Key>{quote(name)}</Key><Size>{len(self.contents[name])}</Size>"
                "<ETag>x</ETag>"
                "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                for name in found
            )
            self._answer(
                (
                    "<ListBucketResult><EncodingType>url</EncodingType>"
                    f"<KeyCount>{len(found)}</KeyCount>{''.join(items)}</ListBucketResult>"
                ).encode()
            )
        elif key not in self.contents and path.rstrip("/") != "/flat":
            self._answer(b"<Error><Code>NoSuchKey</Code></Error>", 404)
        else:
            self._answer(self.contents.get(key, b""))

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def test_keys_are_not_file_paths(s3: S3Server, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*SLASHES, "n" * 600 + ".mp4")
    _FlatStore.contents = {f"v/{name}": clip.read_bytes() for name in (*names, "full.mp4/")} | {
        f"v/{name}": b"" for name in MARKS
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), _FlatStore) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        clear()
        manifest, summary = assemble_manifest(["s3://flat/v"])
        assert {row.uri for row in manifest.rows} == {f"s3://flat/v/{name}" for name in names}
        assert summary.left_out == {"name ends in /": 1}
        assert [decode(row.uri) for row in manifest.rows] == [12] * len(names)
        assert [row.uri for row in assemble_manifest(["s3://flat/v//"])[0].rows] == [
            row.uri for row in manifest.rows
        ]
        server.shutdown()
    clear()


def test_a_key_is_never_a_pattern_or_a_version(s3: S3Server) -> None:
    work = "s3://tsq-other/work"
    for name in ("a*/x", "a1/x", "a[1]/x", "a?/x", "a1?versionId=2/x", "a1?versionId=3/x"):
        storage.write_bytes(f"{work}/{name}", name.encode())
        assert storage.read_bytes(f"{work}/{name}") == name.encode()
    for name in ("a*", "a[1]", "a?", "a1?versionId=2", "nowhere"):
        storage.remove_folder(f"{work}/{name}")
        assert not storage.exists(f"{work}/{name}")
    assert [file.uri.removeprefix(f"{work}/") for file in storage.walk(work)] == [
        "a1/x",
        "a1?versionId=3/x",
    ]
    storage.remove(f"{work}/a1?versionId=3/x")
    assert [file.uri for file in storage.list_folder(f"{work}/a1")] == [f"{work}/a1/x"]


def test_the_file_system_is_made_once_and_can_be_pickled(bucket: str) -> None:
    fs, path = storage.filesystem(f"{ROOT}/q?versionId=abc.mp4")
    assert storage.filesystem(ROOT)[0] is fs
    again = pickle.loads(pickle.dumps(fs))
    assert again.info(path)["name"] == path
    clear()
    assert storage.filesystem(ROOT)[0] is not fs, "whoever clears fsspec's instances clears these"


# ------------------------------------------------------------------------------------------- rights


@pytest.fixture
def proxy(bucket: str, s3_proxy: S3Proxy) -> S3Proxy:
    """A proxy between this process and the server with the odd keys."""
    return s3_proxy


@pytest.fixture
def no_keys(proxy: S3Proxy, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Proxy:
    """A public bucket with one video, and no credentials."""
    storage.write_bytes(f"s3://{PUBLIC_BUCKET}/videos/v.mp4", clip.read_bytes())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    clear()
    proxy.heal()
    return proxy


def use_public(uri: str) -> int:
    assert [row.uri for row in assemble_manifest([f"s3://{PUBLIC_BUCKET}/videos"])[0].rows] == [uri]
    assert storage.exists(uri)
    return decode(uri) + decode(uri, "keyframe")


@pytest.mark.parametrize("word", ["true", "YES"])
def test_a_public_bucket_is_read_without_keys(
    no_keys: S3Proxy, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", word)
    assert use_public(f"s3://{PUBLIC_BUCKET}/videos/v.mp4") == 24
    assert no_keys.headers
    assert not any("authorization" in headers for headers in no_keys.headers)
    with pytest.raises(StorageError, match="access denied") as caught:
        assemble_manifest([ROOT])
    assert caught.value.error_type == "access_denied"


def test_missing_keys_are_reported_with_the_setting(no_keys: S3Proxy) -> None:
    with pytest.raises(
        StorageError,
        match=r"access denied; check the keys .* without keys, set AWS_NO_SIGN_REQUEST=true",
    ):
        assemble_manifest([f"s3://{PUBLIC_BUCKET}/videos"])


@pytest.mark.parametrize("payer", ["requester", None])
def test_every_request_says_who_pays(
    proxy: S3Proxy, payer: str | None, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if payer:
        monkeypatch.setenv("AWS_REQUEST_PAYER", payer)
    uri = "s3://tsq-other/paid/v.mp4"
    storage.write_bytes(uri, clip.read_bytes())
    proxy.heal()
    assert len(assemble_manifest(["s3://tsq-other/paid"])[0].rows) == 1
    assert storage.read_bytes(uri) == clip.read_bytes()
    assert decode(uri) + decode(uri, "keyframe") == 24
    asked = [headers.get("x-amz-request-payer") for headers in proxy.headers]
    assert set(asked) == {payer}, asked
    assert all("authorization" in headers for headers in proxy.headers)


@pytest.mark.parametrize("healthy", [0, 1], ids=["at once", "after its head"])
def test_an_archived_object_is_reported(proxy: S3Proxy, healthy: int) -> None:
    proxy.trouble(ARCHIVED, after=healthy)
    with pytest.raises(StorageError) as caught:
        decode(f"{ROOT}/a b.mp4")
    assert caught.value.error_type == "access_denied"
    if healthy:  # the answer to a HEAD carries no error code
        assert str(caught.value) == (
            f"cannot fetch {ROOT}/a b.mp4: the object is archived (InvalidObjectState); "
            "restore it first, then run again"
        )
        proxy.trouble(ARCHIVED, after=1)
        with pytest.raises(StorageError, match=r"is archived \(InvalidObjectState\)"):
            storage.read_bytes(f"{ROOT}/a b.mp4")


# ------------------------------------------------------------------------------------------ predict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle")


def test_one_bad_uri_affects_only_its_own_answer(
    bucket: str, model: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.mp4")
    os.symlink("loop.mp4", "loop.mp4")
    os.mkdir("folder.mp4")
    Path("file").write_bytes(b"x")
    odd = os.fsdecode(b"caf\xe9.mp4")
    for name in ("std::vec.mp4", odd):
        Path(name).write_bytes(clip.read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as held:
        dead = f"http://127.0.0.1:{held.getsockname()[1]}/x.mp4"
    expected = {
        "std::vec.mp4": "ok",
        "": "not_found",
        "a\0b": "not_found",
        "a" * 300: "not_found",
        "loop.mp4": "not_found",
        "file/x.mp4": "not_found",
        "fifo.mp4": "not_video",
        "folder.mp4": "not_video",
        odd: "unsupported",
        "foo://x/y.mp4": "unsupported",
        "ftp://x/y.mp4": "unsupported",
        "s3://": "not_found",
        "s3://tsq-other": "not_found",
        "s3://NO_BUCKET/x.mp4": "not_found",
        "s3://tsq-other/nothing\udce9.mp4": "unsupported",
        dead: "unavailable",
        "http://": "(unavailable|internal|not_found)",
        f"{ROOT}/std::vec.mp4": "ok",
    }
    rows: list[dict[str, Any]] = [
        row for row in predict_rows(list(expected), model, scoring_config(model))
    ]
    found = [row["error_type"] if row["status"] == "failed" else "ok" for row in rows]
    for name, row, kind, wanted in zip(expected, rows, found, expected.values(), strict=True):
        assert kind in wanted.strip("()").split("|"), (name, row)
        if kind != "ok":
            assert "\n" not in row["error_message"]
    json.dumps(rows, ensure_ascii=False).encode()
    assert len({row["video_id"] for row in rows}) == len(rows)


def test_a_defect_in_a_lookup_is_a_row_too(
    model: str, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = storage.stat

    def stat(uri: str) -> storage.StoredFile:
        if uri.endswith("bad.mp4"):
            raise KeyError("a defect\nof two lines")
        return plain(uri)

    monkeypatch.setattr(storage, "stat", stat)
    bad, good = predict_rows(["/x/bad.mp4", str(clip)], model, scoring_config(model))
    assert (bad["uri"], bad["status"], bad["error_type"], good["status"]) == (
        "/x/bad.mp4",
        "failed",
        "internal",
        "ok",
    )
    assert bad["error_message"].startswith("/x/bad.mp4: unexpected KeyError: ")


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_over_links_and_odd_names_finishes(
    ray_cluster: Any, clip: Path, tmp_path: Path
) -> None:
    """Each entry has its row, in a folder with every odd character in its name."""
    videos, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    videos.mkdir()
    elsewhere.mkdir()
    for name in ("std::vec.mp4", "_1W44j2lpIA.mp4", "What is it?.mp4", "#1 50%20.mp4", "-dash.mp4"):
        (videos / name).write_bytes(clip.read_bytes())
    (elsewhere / "far.mp4").write_bytes(clip.read_bytes())
    (videos / "favourite.mp4").symlink_to(videos / "std::vec.mp4")
    (videos / "linked").symlink_to(elsewhere)
    os.mkfifo(videos / "pipe.mp4")
    settings, manifest = tmp_path / "settings.toml", str(tmp_path / "m::1.parquet")
    settings.write_text(SETTINGS)
    index = tsq("index", videos, "--out", manifest, "--json").json
    assert (index["videos"], index["left_out"]) == (7, {"not a regular file (FIFO)": 1})
    out = str(tmp_path / "out dir #1/50%20? k=v [x]*/ünï::1")
    ended = tsq("extract", manifest, "--out", out, "--config", settings, "--json")
    assert ended.json["counts"]["ok"] == 7
    assert tsq("verify", out, "--json").json["problems"] == []
    assert sorted(read_rows(out)["uri"].to_pylist()) == sorted(
        [
            *(str(path) for path in videos.glob("*.mp4") if not path.is_fifo()),
            str(videos / "linked/far.mp4"),
        ]
    )
    assert not (tmp_path / "m").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_network_proxy_is_not_used_for_local_requests(
    clip: Path, model: str, tmp_path: Path
) -> None:
    """Score through Serve on this machine while HTTP_PROXY leads nowhere."""
    manifest, out = str(tmp_path / "m.parquet"), str(tmp_path / "predictions")
    assert tsq("index", clip, "--out", manifest).code == 0
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    nowhere = dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9"
    )
    argv = [sys.executable, "-m", "tsq_ray", "score", manifest, "--model", model, "--out", out]
    done = subprocess.run(
        argv, env=own | nowhere, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert read_rows(out)["status"].to_pylist() == ["ok"]
