"""A recogniser behind a server: from import to labelled rows, with one key that nobody sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.archive import CLASSES, make_archive
from support.bundle import make_bundle
from support.chat_server import MODEL, PICTURE_TOKENS, ChatServer, Trouble
from support.cluster import SETTINGS, Driver, Ended, read_rows, refused, tsq
from support.endpoint import CLOSE, same_answer, serving

from tsq_ray import read_features
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import read_server
from tsq_ray.bundle.weights import load_bundle
from tsq_ray.prediction import predict_rows

pytestmark = pytest.mark.ray
KEY = "sk-correct-horse-battery"


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    """Without a key: the cluster that the tests share is older than any that a test would set."""
    with ChatServer() as running:
        yield running


@pytest.fixture
def recognizer(server: ChatServer, tmp_path: Path) -> str:
    names, out = tmp_path / "classes.txt", str(tmp_path / "recognizer")
    names.write_text("\n".join(CLASSES))
    sets = ("recognizer.kind=openai", f"recognizer.url={server.url}", "recognizer.size=64")
    more = [word for item in (*sets, "recognizer.caption=true") for word in ("--set", item)]
    done(tsq("import", MODEL, "--out", out, "--classes", str(names), *more))
    server.trouble.clear()
    server.bodies.clear()
    return out


def done(ended: Ended) -> str:
    assert ended.code == 0, ended.err
    return ended.out


@pytest.mark.slow
def test_bulk_http_and_predict_answer_the_same(
    server: ChatServer, recognizer: str, ray_cluster: Any, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", imported=read_server(recognizer))
    archive = make_archive(tmp_path / "videos")
    manifest, out = str(tmp_path / "manifest.parquet"), str(tmp_path / "predictions")
    done(tsq("index", str(archive.root), "--out", manifest))
    server.trouble = [Trouble("429", {"Retry-After": "1"}), Trouble("cut"), Trouble("503")]
    prices = ("--set", "recognizer.price_in=1000", "--set", "recognizer.price_out=1000")
    score = ("score", manifest, "--model", bundle, "--out", out, *prices)
    record = json.loads(done(tsq(*score, "--json")))
    table = read_rows(out)
    bulk = {row["uri"]: row for row in table.to_pylist()}
    tokens = sum((row["tokens_in"] or 0) + (row["tokens_out"] or 0) for row in bulk.values())
    assert record["used"]["tokens_in"] + record["used"]["tokens_out"] == tokens
    assert record["cost"]["tokens"] == pytest.approx(tokens / 1000, rel=1e-3)
    rows = predict_rows(sorted(bulk), bundle, scoring_config(bundle))
    good = [row for row in rows if row["status"] == "ok"]
    assert len({tuple(row["scores"]) for row in good}) > 1
    assert len(good) + len(archive.bad) == len(rows) == len(bulk)
    for row in good:
        assert bulk[row["uri"]]["scores"] == pytest.approx(row["scores"], abs=CLOSE)
        assert bulk[row["uri"]]["top_labels"] == row["top_labels"]
        assert bulk[row["uri"]]["tokens_in"] == row["tokens_in"] > PICTURE_TOKENS
        assert bulk[row["uri"]]["caption"] == row["caption"]
    with serving(bundle, tmp_path / "run") as endpoint:
        for row in good[:3]:
            answer = endpoint.score(content=Path(row["uri"]).read_bytes())
            assert answer.status_code == 200, answer.text
            same_answer(answer.json(), row)
        server.trouble = [Trouble("400")]
        answer = endpoint.score(content=Path(good[0]["uri"]).read_bytes())
        assert (answer.status_code, answer.json()["error_type"]) == (503, "unavailable")
        frames = endpoint.score(
            content=Path(good[0]["uri"]).read_bytes(), params={"frames": True}
        ).json()["frames"]
        assert len(frames) == len(good[0]["selected_slot"])


@pytest.mark.slow
def test_the_server_teaches_a_sampler(
    server: ChatServer, recognizer: str, ray_cluster: Any, tmp_path: Path
) -> None:
    archive = make_archive(tmp_path / "videos", odd=False)
    at = {name: str(tmp_path / name) for name in ("manifest.parquet", "features", "bundle", "out")}
    manifest, features, bundle, out = at.values()
    done(tsq("index", str(archive.root), "--out", manifest, "--labels", "none"))
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS)
    config = ("--recognizer", recognizer, "--config", str(settings))
    price = ("--set", "recognizer.price_in=1000")
    extract = ("extract", manifest, "--out", features, *config, *price)
    estimate = json.loads(done(tsq(*extract, "--dry-run", "--json")))
    assert estimate["tokens_in"] > 0
    assert estimate["cost"]["tokens"] > 0
    record = json.loads(done(tsq(*extract, "--json")))
    assert record["cost"]["tokens"] == pytest.approx(estimate["cost"]["tokens"], rel=0.2)
    table = read_features(features, ["status", "tokens_in", "recognizer_logits"])
    assert table["recognizer_logits"].null_count == 0
    assert min(table["tokens_in"].to_pylist()) > PICTURE_TOKENS
    teach = ("--set", "train.target=teacher", "--set", "train.teacher_min_videos=1")
    done(tsq("train", features, "--out", bundle, *config, *teach))
    assert load_bundle(bundle).recognizer is not None
    adaptive = ("--set", "sampler.budget=adaptive", "--set", "sampler.max_budget=6")
    done(tsq("score", manifest, "--model", bundle, "--out", out, *adaptive))
    rows = read_rows(out).to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert {len(row["selected_slot"]) for row in rows} <= {3, 6}
    line = refused(
        tsq("score", manifest, "--model", bundle, "--out", out, "--set", "sampler.mode=maxconf")
    )
    assert "'maxconf': the recogniser is a server" in line


@pytest.mark.slow
def test_the_server_labels_an_archive(
    server: ChatServer, recognizer: str, ray_cluster: Any, tmp_path: Path
) -> None:
    archive = make_archive(tmp_path / "videos", odd=False)
    settings, out = tmp_path / "settings.toml", str(tmp_path / "out")
    settings.write_text(SETTINGS)
    teach = ("--set", "train.teacher_min_videos=1", "--set", "recognizer.price_in=1000")
    given = ("--recognizer", recognizer, "--config", str(settings), *teach)
    found = json.loads(
        done(tsq("label", str(archive.root), *given, "--sample", "12", "--out", out, "--json"))
    )
    assert "held-out videos" in found["verdict"]
    assert {choice["mode"] for choice in found["curve"]} == {"both", "uniform"}
    assert found["used"]["tokens_in"] > 12 * 8 * PICTURE_TOKENS
    assert found["cost"]["tokens"] > 0
    rows = read_rows(f"{out}/predictions").to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert {len(row["selected_slot"]) for row in rows} == {found["chosen"]["budget"]}
    assert min(row["tokens_in"] for row in rows) > PICTURE_TOKENS


@pytest.mark.slow
def test_a_wrong_key_ends_the_run_and_is_not_shown(recognizer: str, tmp_path: Path) -> None:
    """In a cluster of its own, which has the key from the driver's environment."""
    with ChatServer(key="sk-another") as strict:
        bundle = make_bundle(tmp_path / "bundle", imported=read_server(recognizer))
        archive = make_archive(tmp_path / "videos", train=1, val=0, odd=False)
        manifest, out = str(tmp_path / "manifest.parquet"), str(tmp_path / "predictions")
        done(tsq("index", str(archive.root), "--out", manifest))
        moved = ("--set", f"recognizer.url={strict.url}")
        argv = ("score", manifest, "--model", bundle, "--out", out, *moved)
        with Driver(argv, tmp_path / "score", {"OPENAI_API_KEY": KEY}) as driver:
            ended = driver.ended(600.0)
    assert ended.code == 1
    assert "answered 401: it refuses the key in the environment variable" in ended.err
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in content for content in written)
