"""Each benchmark at a size too small to measure anything: it runs and prints its whole table."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.bundle import make_bundle
from support.video import write_video

from tsq_ray.manifest import assemble_manifest, read_manifest, write_manifest
from tsq_ray.runs.folder import begin, read_run
from tsq_ray.runs.identity import Identity

REPO = Path(__file__).resolve().parents[2]
NETWORKS = [
    f"encoders.{name}.{setting}"
    for number, name in enumerate(("visual", "objects"))
    for setting in ("model=test_efficientnet", f"weights=random:{number}", "size=32")
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight videos of 2.5 s with a keyframe every half second."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{number}.mp4", num_frames=60) for number in range(8)]


def first_cells(text: str) -> list[str]:
    """The first column of every table."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]


def cells(text: str, first: str) -> list[str]:
    """The other columns of a row."""
    return [
        cell.strip().strip("*x")
        for line in text.splitlines()
        if line.startswith(f"| {first} |")
        for cell in line.split("|")[2:-1]
    ]


def printed(name: str, *argv: str) -> str:
    """The output of a benchmark run as a separate process.

    Benchmarks that start an S3 server need one, because clients keep the server they first used.
    """
    command = [sys.executable, str(REPO / "jobs" / "benchmarks" / f"{name}.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("only", ["keyframe", "profile", "ffmpeg", "s3"])
def test_decode_prints_its_tables(videos: list[Path], only: str) -> None:
    if only == "ffmpeg" and shutil.which("ffmpeg") is None:
        pytest.skip("no program ffmpeg")
    options = ["--only", only, "--frames", "4", "--size", "32", "--rounds", "1"]
    text = printed("decode", *options, "--videos", str(videos[0]), str(videos[1]))
    assert "T = 4, 32 x 32, 1 rounds" in text
    name = {
        "keyframe": f"untrimmed/{videos[0].name}",
        "profile": f"{videos[0].parent.name}/{videos[0].name}, keyframe",
    }.get(only, videos[0].name)
    row = cells(text, name)
    if only == "keyframe":
        assert row[2] == "4 of 4"
        exact, keyframe, ratio = (float(row[column]) for column in (0, 1, 3))
        half, off = 0.0005, 0.05  # of the last digit printed, of times and of the ratio
        lowest = (exact - half) / (keyframe + half)
        highest = (exact + half) / max(keyframe - half, 1e-6)
        assert lowest - off <= ratio <= highest + off
    elif only == "profile":
        *parts, total = map(float, row)
        assert sum(parts) == pytest.approx(total, abs=0.4)
        assert min(parts) > 0
    elif only == "ffmpeg":
        assert row[2] in ("one pass", "seeks")
        assert row[4] == "<= 1.15"
    else:
        size = videos[0].stat().st_size
        assert [int(cell.replace(",", "")) >= size for cell in row[:3]] == [True] * 3, (
            "a small object is fetched whole"
        )


def test_ffmpeg_is_asked_for_the_frames_that_were_chosen(videos: list[Path]) -> None:
    from jobs.benchmarks import decode as benchmark

    options = argparse.Namespace(frames=4)
    _, video = benchmark._cpu_of_decode(videos[0], benchmark._settings(options, "uniform"), 32)
    one_pass, seeks = benchmark.ffmpeg_commands("ffmpeg", videos[0], video, 32)
    assert video.frame_index.tolist() == [7, 22, 37, 52]
    assert "eq(n,7)+eq(n,22)+eq(n,37)+eq(n,52)" in " ".join(one_pass)
    assert seeks.count("-ss") == 4


def test_a_missing_peer_says_how_to_install_it(videos: list[Path], monkeypatch: Any) -> None:
    from jobs.benchmarks import decode as benchmark

    monkeypatch.setenv("PYTHONPATH", "")
    options = benchmark._options(["--videos", str(videos[0]), "--frames", "4", "--size", "32"])
    side = benchmark.Side("daft", options, [videos[0]], 1)
    side.round()
    side.close()
    if not side.trouble:
        pytest.skip("daft is installed")
    assert side.trouble.startswith("not installed: ")
    assert "daft" in side.trouble


def test_a_side_does_rounds(videos: list[Path]) -> None:
    from jobs.benchmarks import decode as benchmark

    side = benchmark.Side(
        "exact", benchmark._options(["--frames", "4", "--size", "32"]), videos[:2], 1
    )
    side.round()
    side.round()
    side.close()
    assert (len(side.rounds), side.frames, side.trouble) == (2, 8, "")


@pytest.mark.ray
@pytest.mark.slow
def test_extract_prints_its_tables(videos: list[Path], tmp_path: Path) -> None:
    manifest, _ = assemble_manifest([str(videos[0].parent)], labels="none")
    write_manifest(manifest, str(tmp_path / "manifest.parquet"))
    sets = [word for value in ("decode.num_frames=4", *NETWORKS) for word in ("--set", value)]
    text = printed(
        "extract",
        str(tmp_path / "manifest.parquet"),
        "--videos",
        "8",
        "--rounds",
        "1",
        "--workers",
        "1",
        *sets,
    )
    ours, loop, folded = (
        float(cells(text, name)[1])
        for name in ("tsq extract", "loop by hand", "loop by hand, folded")
    )
    assert float(cells(text, "ratio (aim >= 0.95)")[-1]) == pytest.approx(ours / loop, rel=0.05)
    assert float(cells(text, "ratio to folded")[-1]) == pytest.approx(ours / folded, rel=0.05)
    assert len(cells(text, "limit")) == 3
    assert "failed 0" in text
    assert "--dry-run: " in text


@pytest.mark.ray
@pytest.mark.slow
def test_write_prints_its_table() -> None:
    text = printed(
        "write",
        "--writers",
        "1",
        "2",
        "--rows",
        "300",
        "--mb-s",
        "100",
        "--wait-ms",
        "1",
        "--turns",
        "1",
    )
    assert float(cells(text, "1")[-1]) == 1
    assert float(cells(text, "2")[0]) > 0
    assert "300 rows of 130700 bytes in parts of 256" in text


@pytest.mark.ray
@pytest.mark.slow
def test_scale_prints_its_tables() -> None:
    text = printed(
        "scale",
        "--rows",
        "300",
        "500",
        "--through-ray",
        "300",
        "--objects",
        "20",
        "--entries",
        "2500",
    )
    assert cells(text, "300")[6] == "3", "300 rows are parts of 128, 128 and 44"
    assert cells(text, "500")[3] == "-"
    assert all(float(cell) > 100 for cell in cells(text, "300")[-1].split(", ")), (
        "a process with torch and Ray"
    )
    assert [cells(text, name)[0] for name in ("S3 server (SeaweedFS)", "made-up pages")] == [
        "20",
        "2500",
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_serve_prints_its_table(videos: list[Path], tmp_path: Path) -> None:
    options = {"seconds": "2", "rounds": "1", "clients": "2", "bulk-videos": "40"}
    sized = [word for name, value in options.items() for word in (f"--{name}", value)]
    model = make_bundle(tmp_path / "bundle")
    text = printed("serve", "--model", model, *sized, *map(str, videos))
    http, bulk = float(cells(text, "2 clients")[0]), float(cells(text, "bulk")[0])
    assert float(text.partition("HTTP / bulk: ")[2].partition(";")[0]) == pytest.approx(
        http / bulk, abs=0.02
    )
    assert "right after: {'200': " in text
    total, around = map(float, cells(text, "1 client")[-2:])
    assert 0 < around < total
    assert "ms CPU per second" in text


def test_scale_makes_up_runs_that_add_up(tmp_path: Path) -> None:
    from jobs.benchmarks import scale as benchmark

    uri, out = str(tmp_path / "manifest.parquet"), str(tmp_path / "features")
    write_manifest(benchmark._manifest(benchmark.made_up_rows(0, 300)), uri)
    manifest = read_manifest(uri)
    begin(out, "features", Identity.of(), manifest)
    benchmark.write_parts(out, manifest.rows[:290], 300)
    with benchmark.enter(out, manifest, benchmark._config()) as run:
        assert run.todo == manifest.rows[290:]
        benchmark.write_parts(out, run.todo, 300)
        run.close({}, dict)
    assert read_run(out)["counts"]["ok"] == 300
