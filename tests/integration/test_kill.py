"""A run killed once or twice by SIGKILL, then restarted, gives the rows of an undisturbed run."""

from __future__ import annotations

import re
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from support.cluster import BUDGET, Chain, Chains, Driver, marked, read_rows, tsq, visible_parts
from support.features import same_features

from tsq_ray.bundle.weights import load_classifier

pytestmark = pytest.mark.ray
SLOW = pytest.mark.slow

ONE_AT_A_TIME = [
    "--set",
    "output.rows_per_file=2",
    "--set",
    "resources.batch_size=1",
    "--set",
    "resources.workers=1",
]
PARTS = 9  # of 18 videos
TIMES = ("decode_ms", "sample_ms", "recognize_ms")
NEAR = ("scores", "top_scores", "saliency_visual", "saliency_textual")


@pytest.fixture(scope="module")
def chain(chains: Chains) -> Chain:
    return chains("local")


def kill_and_finish(argv: list[str], out: str, folder: Path, kills: int) -> list[set[str]]:
    """The parts seen after each kill; no process of any run remains."""
    seen: list[set[str]] = []
    for attempt in range(kills):
        before = len(seen[-1]) if seen else 0
        with Driver(argv, folder / f"run{attempt}") as driver:
            driver.kill_when(
                lambda before=before: len(visible_parts(out)) > before,  # type: ignore[misc]
            )
            assert marked(driver.mark) == []
        seen.append(visible_parts(out))
        assert tsq("verify", out).code == 2, "a run that was killed is not finished"
    ended = tsq(*argv)
    assert ended.code == 0, ended.err
    assert re.search(r"^done in this run: \d+, in earlier runs: \d+$", ended.out, re.MULTILINE), (
        ended.out
    )
    return seen


def check_folder(out: str) -> None:
    """The run adds up and shows no trace of the killed runs."""
    found = tsq("verify", out, "--json").json
    assert (found["problems"], found["counts"]["inputs"]) == ([], 18)
    names = visible_parts(out)
    assert all(name.startswith("part-") and name.endswith(".parquet") for name in names), names
    assert (
        len({row["video_id"] for row in read_rows(out).to_pylist()})
        == read_rows(out).num_rows
        == 18
    )


def check_done(seen: list[set[str]], out: str) -> None:
    """Each run did part of the work, and none of it is done twice."""
    sizes = [0, *map(len, seen)]
    assert all(before < after for before, after in pairwise(sizes)), sizes
    assert sizes[-1] <= PARTS
    check_folder(out)
    assert seen[-1] <= visible_parts(out)


def columns(table: pa.Table, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return table.drop_columns([name for name in without if name in table.column_names]).to_pylist()


KILLS = pytest.mark.parametrize("kills", [1, pytest.param(2, marks=SLOW)])


@KILLS
def test_a_killed_extract(chain: Chain, tmp_path: Path, kills: int) -> None:
    whole, out = chain.features, str(tmp_path / "killed")
    argv = ["extract", chain.manifest, "--out", out, *chain.extract_options, *ONE_AT_A_TIME]
    seen = kill_and_finish(argv, out, tmp_path, kills)
    check_done(seen, out)
    same_features(read_rows(out), read_rows(whole), 2e-3)


@SLOW
@pytest.mark.parametrize("kills", [1, 2])
def test_a_killed_score(chain: Chain, tmp_path: Path, kills: int) -> None:
    whole, out = chain.predictions, str(tmp_path / "killed")
    argv = ["score", chain.manifest, "--model", chain.bundle, "--out", out, *ONE_AT_A_TIME]
    seen = kill_and_finish(argv, out, tmp_path, kills)
    check_done(seen, out)
    killed, undisturbed = read_rows(out), read_rows(whole)
    assert columns(killed, (*TIMES, *NEAR)) == columns(undisturbed, (*TIMES, *NEAR))
    for one, other in zip(killed.to_pylist(), undisturbed.to_pylist(), strict=True):
        for name in NEAR:  # the sampler's batches differ
            assert (one[name] is None) == (other[name] is None)
            assert one[name] is None or one[name] == pytest.approx(other[name], abs=1e-4)
        assert len(one["selected_slot"] or ()) <= BUDGET


@SLOW
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_resume(
    ray_cluster: Any, chain: Chain, tmp_path: Path, number: int
) -> None:
    """The same command then continues as after a kill."""
    out = str(tmp_path / "interrupted")
    argv = ["extract", chain.manifest, "--out", out, *chain.extract_options, *ONE_AT_A_TIME]
    argv += ["--address", ray_cluster.get_runtime_context().gcs_address]
    with Driver(argv, tmp_path / "run0") as driver:
        driver.wait_until(lambda: len(visible_parts(out)) > 0)
        driver.interrupt(number)
        ended = driver.ended()
    assert (ended.code, ended.out) == (1, "")
    assert (
        ended.err.splitlines()[-1]
        == "error: interrupted; run the same command again: saved work is not repeated"
    )


@SLOW
def test_a_killed_fit_of_a_head_keeps_its_features(chain: Chain, tmp_path: Path) -> None:
    out, whole = tmp_path / "encoder", chain.encoder
    features = out / "_finetune" / "features"
    argv = [
        "finetune",
        chain.manifest,
        "--role",
        "encoder",
        "--out",
        str(out),
        "--config",
        str(chain.settings),
        *ONE_AT_A_TIME,
    ]

    def made() -> dict[str, int]:
        return {name: (features / name).stat().st_mtime_ns for name in visible_parts(str(features))}

    with Driver(argv, tmp_path / "first") as driver:
        driver.kill_when(lambda: len(made()) > 0)
    before = made()
    with Driver(argv, tmp_path / "second") as driver:
        driver.wait_until(lambda: len(made()) > len(before))
        assert before.items() <= made().items()
        ended = driver.ended()
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in out.iterdir()) == ["finetune.json", "model.safetensors"]
    found, expected = (load_classifier(str(folder)).encoder.head for folder in (out, whole))
    assert isinstance(found, torch.nn.Linear)
    assert isinstance(expected, torch.nn.Linear)
    assert torch.allclose(found.weight, expected.weight, atol=1e-2)
