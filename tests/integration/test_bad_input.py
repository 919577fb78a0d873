"""Every bad input is a clear error of one line, or a row with the right error type."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from support.archive import CLASSES, make_archive, write_clip
from support.cluster import BUDGET, Chain, Chains, Ended, read_rows, refused, tsq

from tsq_ray.runs.folder import RUN_FILE, write_json, write_part
from tsq_ray.runs.lease import Lease

pytestmark = pytest.mark.ray

BAD_FILES = {
    # an AAC track without video
    "bad_audio_only.mp4": "not_video",
    # damaged pictures in an intact container: what decodes is used, with a warning
    "bad_bitflips_mdat.mp4": "ok",
    "bad_random.mp4": "not_video",
    "bad_text.mp4": "not_video",
    # the index is at the front: the frames before the cut are used, with a warning
    "bad_truncated_faststart.mp4": "ok",
    # the index was at the end, and is gone
    "bad_truncated_no_moov.mp4": "truncated",
    "bad_zero_bytes.mp4": "not_video",
    # the header claims 143,165 s; only the frames that exist count
    "sample_fragmented_sei.mp4": "ok",
}


@pytest.fixture(scope="module")
def chain(chains: Chains) -> Chain:
    return chains("local")


@pytest.fixture(scope="module")
def labels(
    chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """labels(kind) -> a manifest of a few clips, and features.

    `kind`: "none" for no labels, "one" for a single class.
    """
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            for seed in range(2):
                write_clip(folder / f"videos/{seed}.mp4", CLASSES[0], seed)
            write_csv(
                folder / "videos/labels.csv",
                [["path", "label"], ["0.mp4", CLASSES[0]], ["1.mp4", CLASSES[0]]],
            )
            given = "none" if kind == "none" else str(folder / "videos/labels.csv")
            manifest, features = folder / "m.parquet", folder / "features"
            assert tsq("index", folder / "videos", "--labels", given, "--out", manifest).code == 0
            relabel(chain.features, features, [] if kind == "none" else CLASSES[:1])
            made[kind] = (manifest, features)
        return made[kind]

    return make


def relabel(features: str, out: Path, classes: list[str]) -> None:
    """Copy an extraction; all its videos have the first of these classes, or no label."""
    table = read_rows(features)
    number, labels = table.schema.get_field_index("labels"), [0] if classes else None
    column = pa.array([labels] * table.num_rows, table.schema.field(number).type)
    table = table.set_column(number, table.schema.field(number), column)
    named = table.schema.metadata | {b"tsq.classes": json.dumps(classes).encode()}
    write_part(str(out), table.replace_schema_metadata(named), "none")
    run = json.loads(Path(features, RUN_FILE).read_text())
    write_json(f"{out}/{RUN_FILE}", run | {"classes": classes})


def write_csv(path: Path, lines: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


@pytest.mark.parametrize(
    "command", [pytest.param("finetune", marks=pytest.mark.slow), "extract", "train", "score"]
)
def test_a_folder_that_another_run_writes_to(chain: Chain, command: str, tmp_path: Path) -> None:
    out, config = str(tmp_path / "out"), ["--config", str(chain.settings)]
    argv = {
        "finetune": ["finetune", chain.manifest, "--role", "encoder", *config],
        "extract": ["extract", chain.manifest, *config],
        "train": ["train", chain.features, "--encoder", chain.encoder, *config],
        "score": ["score", chain.manifest, "--model", chain.bundle],
    }[command]
    with Lease(out) as lease:
        said = refused(tsq(*argv, "--out", out))
    assert said.startswith(f"{out}: {lease.holder} writes to this folder; ")
    assert said.endswith("take over the folder with --take-over")
    assert not Path(out).exists(), "the folder that only the lease needed"


@pytest.mark.slow
@pytest.mark.data
def test_bad_files(chain: Chain, data_dir: Path, tmp_path: Path) -> None:
    manifest, out = tmp_path / "m.parquet", tmp_path / "features"
    index = tsq("index", data_dir / "bad", "--out", manifest, "--json").json
    assert (index["videos"], index["labelled"]) == (len(BAD_FILES), 0)
    run = tsq("extract", manifest, "--out", out, "--config", chain.settings, "--json").json
    rows = {Path(row["uri"]).name: row for row in read_rows(str(out)).to_pylist()}
    assert {name: row["error_type"] or row["status"] for name, row in rows.items()} == BAD_FILES
    assert tsq("verify", out, "--json").json["problems"] == []
    assert run["counts"]["with_warnings"] == sum(
        bool(row["warnings"]) for row in rows.values() if row["status"] == "ok"
    )
    for name, row in rows.items():
        if row["status"] == "failed":
            assert name in row["error_message"]
            assert "\n" not in row["error_message"]
    for name in ("bad_bitflips_mdat.mp4", "bad_truncated_faststart.mp4"):
        assert rows[name]["warnings"], "what was missing is said"
    assert rows["sample_fragmented_sei.mp4"]["duration_s"] < 60


def test_one_frame_and_another_aspect_are_scored(chain: Chain) -> None:
    rows = {Path(row["uri"]).name: row for row in read_rows(chain.predictions).to_pylist()}
    one, tall = rows["one_frame.mp4"], rows["portrait.mp4"]
    assert (
        one["status"],
        one["selected_slot"],
        one["selected_index"],
        one["source_num_frames"],
    ) == ("ok", [0], [0], 1)
    assert (tall["status"], tall["width"], tall["height"], len(tall["selected_slot"])) == (
        "ok",
        48,
        128,
        BUDGET,
    )


@pytest.mark.parametrize(
    "kind", ["empty folder", "no folder", "no videos", "no bucket", "empty prefix"]
)
def test_a_source_that_matches_nothing(chain: Chain, kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/notes.txt").write_text("no video")
    source, said = {
        "empty folder": (
            str(tmp_path / "empty"),
            "no video found; name a folder, an s3:// prefix or a file",
        ),
        "no folder": (str(tmp_path / "nowhere"), "no such file, folder, bucket or prefix"),
        "no videos": (str(tmp_path / "texts"), "no video found; it holds 1 other files"),
        "no bucket": ("s3://tsq-no-such-bucket/videos", "no such file, folder, bucket or prefix"),
        "empty prefix": ("s3://tsq-other/nothing/here", "no such file, folder, bucket or prefix"),
    }[kind]
    error = refused(tsq("index", source, "--out", tmp_path / "m.parquet"))
    assert error.startswith(source)
    assert said in error
    assert not (tmp_path / "m.parquet").exists()


@pytest.mark.parametrize("command", ["index", "extract", "finetune", "report"])
def test_a_missing_output_bucket(chain: Chain, command: str) -> None:
    out = "s3://tsq-no-such-bucket/out"
    argv = {
        "index": ["index", chain.at("videos"), "--out", out],
        "extract": ["extract", chain.manifest, "--out", out, *chain.extract_options],
        "finetune": [
            "finetune",
            chain.manifest,
            "--role",
            "encoder",
            "--out",
            out,
            "--config",
            str(chain.settings),
            "--limit",
            "2",
        ],
        "report": ["report", chain.predictions, "--out", out, "--max-videos", "0"],
    }[command]
    assert re.match(
        f"cannot .* {out}.*no such file, folder or bucket; check the name", refused(tsq(*argv))
    )


@pytest.fixture
def set_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """set_key(NAME, value): this process has another key until the end of the test."""
    clear = fsspec.get_filesystem_class("s3").clear_instance_cache

    def set_and_forget(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        clear()

    yield set_and_forget
    clear()


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
@pytest.mark.parametrize("command", ["index", "extract"])
def test_wrong_keys(
    chains: Chains,
    command: str,
    wrong: str,
    set_key: Callable[[str, str], None],
    tmp_path: Path,
) -> None:
    chain = chains("s3")
    argv = {
        "index": ["index", chain.at("videos"), "--out", str(tmp_path / "m.parquet")],
        "extract": [
            "extract",
            chain.manifest,
            "--out",
            str(tmp_path / "f"),
            "--config",
            str(chain.settings),
        ],
    }[command]
    bad = "0123456789abcdefghij"
    set_key(wrong, bad)
    error = refused(tsq(*argv))
    assert "access denied; check the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)" in error
    assert bad not in error


def alone(argv: list[str], environment: dict[str, str] | None = None) -> Ended:
    """Run `tsq` as a separate process, to see what it really writes to its outputs."""
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(
        [sys.executable, "-m", "tsq_ray", *argv],
        capture_output=True,
        text=True,
        timeout=200,
        env=env,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_video_that_may_not_be_read_is_a_row(chains: Chains) -> None:
    argv = [
        "predict",
        chains("s3").at("videos/train/0_0.mp4"),
        "--model",
        chains("local").bundle,
        "--json",
    ]
    ended = alone(argv, {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert ended.code == 1, "there is no other row"
    (row,) = json.loads(ended.out)["videos"]
    assert (row["status"], row["error_type"]) == ("failed", "access_denied")


@pytest.mark.parametrize("kind", ["none", pytest.param("one", marks=pytest.mark.slow)])
def test_nothing_to_learn_from(
    chain: Chain, labels: Callable[[str], tuple[Path, Path]], kind: str, tmp_path: Path
) -> None:
    manifest, features = labels(kind)
    said = (
        "no labelled video; index it with labels"
        if kind == "none"
        else rf"1 class \({CLASSES[0]}\); training needs at least two"
    )
    tune = tsq(
        "finetune",
        manifest,
        "--role",
        "recognizer",
        "--out",
        tmp_path / "r",
        "--config",
        chain.settings,
    )
    learn = ("train", features, "--encoder", chain.encoder, "--config", chain.settings)
    train = tsq(*learn, "--out", tmp_path / "b")
    for ended, what in ((tune, f"manifest {manifest}: "), (train, f"features {features}: ")):
        error = refused(ended)
        assert error.startswith(what)
        assert re.search(said, error)


@pytest.mark.slow
def test_two_classes_are_enough(chain: Chain, tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "videos", train=2, val=1, odd=False)
    for path, label in list(archive.labels.items()):
        if label == CLASSES[2]:
            (archive.root / path).unlink()
            del archive.labels[path]
    archive.write_labels()
    at = {
        name: tmp_path / name
        for name in ("m.parquet", "recognizer", "features", "bundle", "predictions")
    }
    settings = [
        "--config",
        chain.settings,
        "--set",
        "train.modules=visual",
        "--set",
        "train.epochs=1",
    ]
    assert (
        tsq(
            "index", archive.root, "--labels", archive.root / "labels.csv", "--out", at["m.parquet"]
        ).code
        == 0
    )
    assert (
        tsq(
            "finetune",
            at["m.parquet"],
            "--role",
            "recognizer",
            "--out",
            at["recognizer"],
            *settings,
        ).code
        == 0
    )
    assert tsq("extract", at["m.parquet"], "--out", at["features"], *settings).code == 0
    assert (
        tsq(
            "train",
            at["features"],
            "--recognizer",
            at["recognizer"],
            "--out",
            at["bundle"],
            *settings,
        ).code
        == 0
    )
    videos = [archive.root / path for path in archive.paths]
    rows = tsq("predict", *videos, "--model", at["bundle"], "--json").json["videos"]
    assert len(rows) == 6
    for row in rows:
        assert (row["status"], len(row["scores"]), sorted(row["top_labels"])) == (
            "ok",
            2,
            CLASSES[:2],
        )
        assert set(row["selected_by"]) == {"visual"}
        assert row["saliency_textual"] is None


@pytest.fixture(scope="module")
def mute(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle as `tsq train` writes it without --recognizer."""
    from tsq_ray.bundle.weights import load_bundle, save_bundle

    place = str(tmp_path_factory.mktemp("mute") / "bundle")
    save_bundle(dataclasses.replace(load_bundle(chain.bundle), recognizer=None), place)
    return place


@pytest.mark.parametrize("command", ["score", "predict"])
def test_a_bundle_without_a_recognizer(
    chain: Chain, mute: str, command: str, tmp_path: Path
) -> None:
    video = chain.at("videos/train/0_0.mp4")
    argv = (
        ["score", chain.manifest, "--out", str(tmp_path / "p")]
        if command == "score"
        else ["predict", video]
    )
    assert "the bundle has no recogniser; train it again with --recognizer URI" in refused(
        tsq(*argv, "--model", mute)
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["score", "MANIFEST", "--model", "NOWHERE", "--out", "OUT"],
            "NOWHERE: has no bundle.json; name what tsq train wrote with --out",
        ),
        (
            ["predict", "VIDEO", "--model", "NOWHERE"],
            "NOWHERE: has no bundle.json; name what tsq train wrote with --out",
        ),
        (
            ["serve", "--model", "NOWHERE"],
            "NOWHERE: has no bundle.json; name what tsq train wrote with --out",
        ),
        (
            ["score", "MANIFEST", "--model", "RECOGNIZER", "--out", "OUT"],
            "RECOGNIZER: has no bundle.json; name what tsq train wrote",
        ),
        (
            ["extract", "MANIFEST", "--out", "OUT", "--encoder", "NOWHERE"],
            "NOWHERE: has no finetune.json; name what tsq finetune or import wrote",
        ),
        (
            ["train", "FEATURES", "--out", "OUT", "--recognizer", "BUNDLE"],
            "BUNDLE: has no finetune.json; name what tsq finetune or import wrote",
        ),
        (
            ["train", "FEATURES", "--out", "OUT", "--encoder", "RECOGNIZER"],
            "FEATURES: the features were made with other settings (encoders.visual.",
        ),
        (
            ["train", "FEATURES", "--out", "OUT", "--set", "encoders.visual.weights=random:5"],
            "are not those that made the features",
        ),
        (
            ["extract", "NOWHERE", "--out", "OUT"],
            "manifest NOWHERE: no such file; make one with tsq index SOURCE --out NOWHERE",
        ),
        (
            ["extract", "FOLDER", "--out", "OUT"],
            "manifest FOLDER: is a folder without *.parquet; name the file or the folder that "
            "tsq index wrote",
        ),
        (
            ["extract", "VIDEO", "--out", "OUT"],
            "manifest VIDEO: not a Parquet file; make one with tsq index",
        ),
        (
            ["extract", "PART", "--out", "OUT"],
            "manifest PART: holds features or predictions; name the manifest",
        ),
        (["extract", "MANIFEST", "--out", "FOLDER/parquet"], "holds files that are not a run's"),
        (
            ["extract", "MANIFEST", "--out", "PREDICTIONS"],
            "PREDICTIONS: holds predictions, not features; use another --out",
        ),
        (
            ["extract", "MANIFEST", "--out", "VIDEO"],
            "VIDEO: is a file; name a folder, a new one or that of an earlier run",
        ),
        (
            ["finetune", "MANIFEST", "--role", "encoder", "--out", "OUT", "--split", "tset"],
            "no row of split 'tset'; splits: ",
        ),
        (
            ["train", "FEATURES", "--out", "OUT", "--split", "tset"],
            "no row of split 'tset'; splits: (none) (1), train (12), val (5)",
        ),
        (
            ["train", "PREDICTIONS", "--out", "OUT"],
            "PREDICTIONS: holds predictions, expected features",
        ),
        (
            ["train", "NOWHERE", "--out", "OUT"],
            "NOWHERE: no run folder (no _run.json); name what extract or score wrote with --out",
        ),
        (["report", "FEATURES", "--out", "OUT"], "FEATURES: holds features, expected predictions"),
        (["export", "FEATURES", "--out", "OUT"], "FEATURES: holds features, expected predictions"),
        (["report", "NOWHERE", "--out", "OUT"], "NOWHERE: no run folder (no _run.json)"),
        (["verify", "NOWHERE"], "NOWHERE: no run folder (no _run.json)"),
        (["info", "NOWHERE"], "info NOWHERE: not a bundle, manifest or run folder"),
        (["info"], "info takes a bundle, manifest or run folder, or --cluster, or both"),
        (
            ["score", "MANIFEST", "--model", "BUNDLE", "--out", "OUT", "--set", "sampler.budget=9"],
            "(K) is 9, above decode.num_frames (T) = 8",
        ),
        (
            ["train", "FEATURES", "--out", "OUT", "--set", "sampler.budget=9"],
            "(K) is 9, above decode.num_frames (T) = 8",
        ),
        (
            ["predict", "VIDEO", "--model", "BUNDLE", "--set", "sampler.budget=9"],
            "(K) is 9, above decode.num_frames (T) = 8",
        ),
        (
            ["extract", "MANIFEST", "--out", "OUT", "--set", "decode.frames=8"],
            "unknown setting decode.frames; allowed: strategy, ",
        ),
        (
            ["extract", "MANIFEST", "--out", "OUT", "--set", "decode.num_frames=many"],
            "setting decode.num_frames = 'many': ",
        ),
        (
            ["extract", "MANIFEST", "--out", "OUT", "--set", "decode.num_frames"],
            "expected section.key=value",
        ),
        (
            [
                "score",
                "MANIFEST",
                "--model",
                "BUNDLE",
                "--out",
                "OUT",
                "--set",
                "sampler.mode=best",
            ],
            "setting sampler.mode = 'best': ",
        ),
        (
            ["extract", "MANIFEST", "--out", "OUT", "--config", "NOWHERE"],
            "--config: no file NOWHERE; name an existing TOML file",
        ),
        (
            ["extract", "MANIFEST", "--out", "OUT", "--config", "VIDEO"],
            "--config VIDEO: not readable as TOML",
        ),
        (
            [
                "extract",
                "MANIFEST",
                "--out",
                "OUT",
                "--set",
                "encoders.visual.model=resnet_of_mine",
            ],
            "timm has no model of this name",
        ),
        (
            ["extract", "MANIFEST", "--out", "OUT", "--set", "encoders.visual.weights=VIDEO"],
            "not readable as safetensors",
        ),
        (["finetune", "MANIFEST", "--role", "judge", "--out", "OUT"], "--role"),
        (["extract", "MANIFEST"], "--out"),
        (["index", "FOLDER", "--labels", "VIDEO", "--out", "OUT"], "VIDEO"),
        (["index", "FOLDER", "--classes", "NOWHERE", "--out", "OUT"], "NOWHERE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(chain: Chain, argv: list[str], said: str, tmp_path: Path) -> None:
    places = {
        "MANIFEST": chain.manifest,
        "FEATURES": chain.features,
        "PREDICTIONS": chain.predictions,
        "BUNDLE": chain.bundle,
        "RECOGNIZER": chain.recognizer,
        "VIDEO": chain.at("videos/train/0_0.mp4"),
        "PART": str(next(Path(chain.features).glob("part-*.parquet"))),
        "FOLDER": str(chain.archive.root),
        "NOWHERE": str(tmp_path / "nowhere"),
        "OUT": str(tmp_path / "out"),
    }
    if "FOLDER/parquet" in argv:
        places["FOLDER/parquet"] = str(tmp_path / "parquet")
        (tmp_path / "parquet").mkdir()
        (tmp_path / "parquet/other.parquet").write_bytes(b"PAR1")
    pattern = re.compile("|".join(sorted(places, key=len, reverse=True)))
    command = [pattern.sub(lambda found: places[found[0]], item) for item in argv]
    if argv[0] in ("extract", "finetune") and "--config" not in argv:
        command += ["--config", str(chain.settings)]
    assert pattern.sub(lambda found: places[found[0]], said) in refused(tsq(*command))
    assert not (tmp_path / "out").exists()


def test_on_a_terminal_too_it_is_one_line(chain: Chain, tmp_path: Path) -> None:
    """A separate process, to check that nothing below Python adds output."""
    ended = alone(["score", chain.manifest, "--model", str(tmp_path), "--out", str(tmp_path / "p")])
    assert "has no bundle.json" in refused(ended)


def test_debug_shows_where(chain: Chain, tmp_path: Path) -> None:
    ended = tsq("score", chain.manifest, "--model", tmp_path, "--out", tmp_path / "p", "--debug")
    assert ended.code == 2
    assert "Traceback (most recent call last):" in ended.err
    assert ended.err.strip().splitlines()[-1].startswith("error: ")


def test_a_damaged_bundle(chain: Chain, tmp_path: Path) -> None:
    for path in Path(chain.bundle).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    argv = ["predict", chain.at("videos/train/0_0.mp4"), "--model", str(tmp_path)]
    settings = json.loads((tmp_path / "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps(settings | {"format": 99}))
    assert (
        "bundle.json: made by a newer version of tsq_ray (format 99; this version reads 3)"
        in refused(tsq(*argv))
    )
    (tmp_path / "bundle.json").write_text("{")
    assert "bundle.json: not JSON; the file is damaged" in refused(tsq(*argv))
    (tmp_path / "bundle.json").write_text(json.dumps(settings))
    whole = (tmp_path / "sampler.safetensors").read_bytes()
    (tmp_path / "sampler.safetensors").write_bytes(whole[:-1])
    assert "its content is not what was written (sha256 differs)" in refused(tsq(*argv))
    (tmp_path / "sampler.safetensors").unlink()
    assert "sampler.safetensors: missing; the folder is incomplete" in refused(tsq(*argv))
