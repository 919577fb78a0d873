"""The command line in this process: exit codes, one-line errors, JSON. No test here starts Ray."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bundle import make_bundle

from tsq_ray import schema
from tsq_ray.cli import main
from tsq_ray.console import bare_retry
from tsq_ray.errors import ERROR_TYPES
from tsq_ray.manifest import read_manifest
from tsq_ray.results import Estimate, RunSummary
from tsq_ray.runs.bulk import accounting
from tsq_ray.runs.done import read_done
from tsq_ray.runs.folder import begin, finish, read_run, write_json, write_part
from tsq_ray.runs.identity import Identity
from tsq_ray.summaries import estimate_text, run_text

Answer = tuple[int, str, str]


@pytest.fixture
def tsq(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """tsq("index", ...) in tmp_path -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Answer:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two classes of two files each, which no test opens."""
    for name in ("cats/1.mp4", "cats/2.mp4", "big_dogs/3.mp4", "big_dogs/4.mp4"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "videos"


@pytest.fixture
def manifest(tsq: Callable[..., Answer], videos: Path, tmp_path: Path) -> Path:
    assert tsq("index", videos, "--out", "manifest.parquet")[0] == 0
    return tmp_path / "manifest.parquet"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def one_error(answer: Answer, code: int, message: str) -> None:
    """The answer is one line on stderr, nothing on stdout, and this exit code."""
    assert answer[0] == code, answer
    assert answer[1] == ""
    assert re.fullmatch(f"error: .*{message}.*\n", answer[2]), answer[2]


# -------------------------------------------------------------------------- the command line itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], r"No such command 'nosuch'.* \(see tsq --help\)"),
        (["index"], r"Missing argument .*\(see tsq index --help\)"),
        (["index", "videos"], r"Missing option '--out'.*\(see tsq index --help\)"),
        (["score", "--bogus"], r"No such option: --bogus.*\(see tsq score --help\)"),
        (["score", "m", "--model", "b", "--out", "o", "--limit", "0"], "--limit"),
        (["score", "m", "--model", "b", "--out", "o", "--max-failed", "2"], "--max-failed"),
        (["score", "m", "--model", "b", "--out", "o", "--scores", "some"], "--scores.*some"),
        (
            ["finetune", "m", "--role", "sampler", "--out", "o"],
            "--role.*sampler.*encoder.*recognizer",
        ),
        (["serve", "--model", "b", "--port", "none"], "--port"),
        (["report", "predictions", "--out"], "--out.* requires an argument"),
        (["info"], "info takes a bundle, manifest or run folder, or --cluster, or both"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    tsq: Callable[..., Answer], arguments: list[str], message: str
) -> None:
    one_error(tsq(*arguments), 2, message)


def test_version(tsq: Callable[..., Answer]) -> None:
    code, out, err = tsq("--version")
    assert (code, out, err) == (0, f"tsq_ray {importlib.metadata.version('tsq_ray')}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"]])
def test_help_is_no_error(tsq: Callable[..., Answer], arguments: list[str]) -> None:
    code, out, err = tsq(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: tsq")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("decode.frames=3", "unknown setting decode.frames; allowed: strategy, "),
        ("decode.num_frames", "expected section.key=value"),
        (
            "decode.num_frames=0",
            "setting decode.num_frames = 0: input should be greater than or equal to 1",
        ),
    ],
)
@pytest.mark.parametrize(
    "command",
    [["extract", "m", "--out", "o"], ["finetune", "m", "--role", "encoder", "--out", "o"]],
    ids=lambda c: c[0],
)
def test_a_wrong_setting_is_reported_before_anything_else(
    tsq: Callable[..., Answer], command: list[str], setting: str, message: str
) -> None:
    one_error(tsq(*command, "--set", setting), 2, message)


def test_debug_adds_the_traceback(tsq: Callable[..., Answer]) -> None:
    code, _, err = tsq("extract", "m", "--out", "o", "--set", "x.y=1", "--debug")
    assert code == 2
    assert err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1].startswith("error: unknown setting x")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["extract", "none.parquet", "--out", "o"],
            "manifest .*none.parquet: no such file; make one with tsq index",
        ),
        (
            ["extract", "videos", "--out", "o"],
            r"manifest .*videos: is a folder without \*\.parquet; name the file or the folder",
        ),
        (
            ["finetune", "none.parquet", "--role", "encoder", "--out", "o"],
            "manifest .*none.parquet: no such file",
        ),
        (
            ["train", "none", "--out", "o"],
            r"none: no run folder \(no _run.json\); name what extract or score wrote",
        ),
        (
            ["score", "none.parquet", "--model", "none", "--out", "o"],
            "none: has no bundle.json; name what tsq train wrote",
        ),
        (["predict", "v.mp4", "--model", "none"], "none: has no bundle.json"),
        (["serve", "--model", "none"], "none: has no bundle.json"),
        (["report", "none", "--out", "r.html"], "none: no run folder"),
        (["export", "none", "--out", "e"], "none: no run folder"),
        (["verify", "none"], "none: no run folder"),
        (["verify", "videos"], "videos: no run folder"),
        (["info", "none"], "info .*none: not a bundle, manifest or run folder"),
        (["info", "videos"], "info .*videos: not a bundle, manifest or run folder"),
        (["extract", "m", "--out", "o", "--config", "none.toml"], "--config: no file none.toml"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_missing_input_is_one_line_and_exit_code_2(
    tsq: Callable[..., Answer], videos: Path, command: list[str], message: str
) -> None:
    one_error(tsq(*command), 2, message)


# -------------------------------------------------------------------------------------------- index


def test_index_writes_the_manifest_and_reports_what_it_found(
    tsq: Callable[..., Answer], videos: Path
) -> None:
    (videos / "notes.txt").write_text("x")
    code, out, _ = tsq("index", videos, "--out", "manifest.parquet")
    assert code == 0
    assert out.splitlines() == [
        "4 videos, 2 classes, labels from class folders",
        "labelled 4, unlabelled 0; splits: (none) 4",
        "new 4, changed 0, deleted 0, unchanged 0",
        "left out, no video suffix: .txt 1",
        "out: manifest.parquet",
    ]
    assert read_manifest("manifest.parquet").classes == ["big dogs", "cats"]


def test_index_as_json(tsq: Callable[..., Answer], videos: Path) -> None:
    code, out, _ = tsq(
        "index", videos, "--out", "manifest.parquet", "--json", "--split-name", "train"
    )
    summary = json.loads(out)
    assert code == 0
    assert (summary["videos"], summary["splits"], summary["out"]) == (
        4,
        {"train": 4},
        "manifest.parquet",
    )


def test_index_does_not_overwrite_a_manifest_unasked(
    tsq: Callable[..., Answer], videos: Path, manifest: Path
) -> None:
    before = manifest.read_bytes()
    one_error(
        tsq("index", videos, "--out", manifest),
        2,
        "already exists; add --update to list again, or name another file",
    )
    assert manifest.read_bytes() == before


def test_index_update_lists_again(tsq: Callable[..., Answer], videos: Path, manifest: Path) -> None:
    (videos / "cats" / "5.mp4").write_bytes(b"new")
    (videos / "cats" / "1.mp4").write_bytes(b"another content")
    (videos / "cats" / "2.mp4").unlink()
    code, out, _ = tsq("index", videos, "--out", manifest, "--update")
    assert code == 0
    assert "new 1, changed 1, deleted 1, unchanged 2" in out


def test_index_update_does_not_overwrite_something_else(
    tsq: Callable[..., Answer], videos: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious.parquet").write_bytes(b"not a manifest")
    one_error(
        tsq("index", videos, "--out", "precious.parquet", "--update"), 2, "not a Parquet file"
    )
    assert (tmp_path / "precious.parquet").read_bytes() == b"not a manifest"


def test_index_names_labelled_videos_that_are_missing(
    tsq: Callable[..., Answer], videos: Path, tmp_path: Path
) -> None:
    lines = [
        "path,label",
        "videos/cats/1.mp4,cats",
        *(f"videos/gone{number}.mp4,cats" for number in range(7)),
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    code, out, _ = tsq("index", videos, "--out", "m.parquet", "--labels", "labels.csv")
    assert code == 0
    assert "missing, named by the labels but not found: 7: videos/gone0.mp4, " in out
    assert out.count("gone") == 5, "the first five are named"


# ---------------------------------------------------------------------- manifests, bundles, folders


def test_extract_refuses_a_split_without_videos(tsq: Callable[..., Answer], manifest: Path) -> None:
    one_error(
        tsq("extract", manifest, "--out", "o", "--split", "val"),
        2,
        r"--split val: no video has it; splits: \(none\) \(4\)",
    )


def test_extract_refuses_an_unknown_reason(tsq: Callable[..., Answer], manifest: Path) -> None:
    one_error(
        tsq("extract", manifest, "--out", "o", "--retry-failed", "bored"),
        2,
        "--retry-failed bored: no such reason; allowed: not_found",
    )


@pytest.mark.parametrize("role", ["encoder", "recognizer"])
def test_finetune_refuses_a_manifest_without_labels(
    tsq: Callable[..., Answer], videos: Path, role: str
) -> None:
    assert tsq("index", videos, "--out", "m.parquet", "--labels", "none")[0] == 0
    one_error(
        tsq("finetune", "m.parquet", "--role", role, "--out", "o"),
        2,
        "no labelled video; index it with labels",
    )


def test_score_refuses_more_frames_than_there_are(
    tsq: Callable[..., Answer], manifest: Path, bundle: str
) -> None:
    answer = tsq("score", manifest, "--model", bundle, "--out", "o", "--set", "sampler.budget=9")
    one_error(answer, 2, r"sampler.budget \(K\) is 9, above decode.num_frames \(T\) = 8")


def test_score_refuses_to_change_what_was_trained(
    tsq: Callable[..., Answer], manifest: Path, bundle: str
) -> None:
    answer = tsq(
        "score", manifest, "--model", bundle, "--out", "o", "--set", "decode.num_frames=16"
    )
    one_error(
        answer,
        2,
        r"scoring cannot change what the bundle was trained with \(decode.num_frames: 8 in the "
        r"bundle, 16 asked for\)",
    )


def test_score_refuses_a_bundle_without_a_recogniser(
    tsq: Callable[..., Answer], manifest: Path, tmp_path: Path
) -> None:
    uri = make_bundle(tmp_path / "bare", with_recognizer=False)
    one_error(
        tsq("score", manifest, "--model", uri, "--out", "o"),
        2,
        "the bundle has no recogniser; train it again with --recognizer URI",
    )


def test_info_describes_a_manifest_and_a_bundle(
    tsq: Callable[..., Answer], manifest: Path, bundle: str
) -> None:
    code, out, _ = tsq("info", manifest, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["kind"], found["videos"], found["videos_by_class"]) == (
        "manifest",
        4,
        {"big dogs": 2, "cats": 2},
    )
    code, out, _ = tsq("info", bundle, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["kind"], found["task"], len(found["sha256"])) == ("bundle", "single", 64)
    for counting in ("field", "true"):
        costs = dict(found["gflops"][counting])
        assert abs(costs.pop("total") - sum(costs.values())) < 1e-3
    code, out, _ = tsq("info", manifest)
    assert code == 0
    assert out.startswith("kind: manifest\n")


def finished_run(folder: Path, manifest_uri: str, status: str = "failed") -> Path:
    """A features folder whose four videos all failed, or have another `status`."""
    manifest = read_manifest(manifest_uri)
    begin(str(folder), "features", Identity.of(decode={}), manifest)
    rows = [
        {
            **vars(ref),
            "labels": list(ref.labels or ()),
            "status": status,
            "error_type": "not_video",
            "error_message": "no",
            "warnings": [],
        }
        for ref in manifest.rows
    ]
    write_part(
        str(folder),
        schema.table_from_rows(rows, schema.features_schema(2, 4, manifest.classes)),
        "zstd",
    )
    counts = accounting(read_done(str(folder), manifest), None)
    finish(str(folder), "features", "complete", manifest, counts, {})
    return folder


def test_verify_of_a_run_that_adds_up(
    tsq: Callable[..., Answer], manifest: Path, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path / "features", str(manifest))
    code, out, _ = tsq("verify", folder)
    assert code == 0
    assert out.splitlines() == [
        f"{folder}: features: 4 inputs = 0 ok + 4 failed + 0 skipped",
        "checked parts, rows, counts, manifest: adds up",
    ]
    code, out, _ = tsq("verify", folder, "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])


def test_verify_of_a_run_that_does_not_add_up(
    tsq: Callable[..., Answer], manifest: Path, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path / "features", str(manifest))
    next(folder.glob("part-*")).unlink()
    code, out, _ = tsq("verify", folder)
    assert code == 1
    assert "does not add up: " in out
    code, out, _ = tsq("verify", folder, "--json")
    assert code == 1
    assert json.loads(out)["problems"]


def test_train_refuses_features_without_an_ok_video(
    tsq: Callable[..., Answer], manifest: Path, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path / "features", str(manifest))
    run = read_run(str(folder))
    from tsq_ray.config import Config

    write_json(str(folder / "_run.json"), run | {"config": Config().model_dump(mode="json")})
    one_error(tsq("train", folder, "--out", "o"), 2, "no labelled video")


def test_report_refuses_features(
    tsq: Callable[..., Answer], manifest: Path, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path / "features", str(manifest))
    one_error(tsq("report", folder, "--out", "r.html"), 2, "holds features, expected predictions")


def test_predict_answers_for_a_file_that_is_not_there(
    tsq: Callable[..., Answer], bundle: str, tmp_path: Path
) -> None:
    code, out, _ = tsq("predict", tmp_path / "none.mp4", "--model", bundle, "--json")
    (row,) = json.loads(out)["videos"]
    assert code == 1  # the only row
    assert (row["status"], row["error_type"]) == ("failed", "not_found")


def test_no_secret_is_shown(tsq: Callable[..., Answer], bundle: str) -> None:
    for command in (
        ["verify", "gopher://h/x"],
        ["index", "http://127.0.0.1:9/v.mp4?sig=s3cret", "--out", "m.parquet"],
    ):
        code, out, err = tsq(*command)
        assert code == 2
        assert "s3cret" not in out + err


# --------------------------------------------------------------------- standard output of all kinds


def tsq_process(
    folder: Path, *argv: str | bytes, environment: dict[str, str] | None = None, **streams: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run `tsq ARGV` as a separate process, where stdout is what a shell provides."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    command = [sys.executable, "-m", "tsq_ray", *argv]
    own = {**os.environ, **(environment or {})}
    return subprocess.run(command, cwd=folder, env=own, timeout=120, check=False, **streams)


@pytest.mark.parametrize(
    ("encoding", "missing"),
    [
        ("ascii", b"videos/\\xfcn\\xef \\u732b.mp4"),
        ("latin-1", b"videos/\xfcn\xef \\u732b.mp4"),
        ("utf-8", "videos/ünï 猫.mp4".encode()),
    ],
)
def test_text_that_the_output_cannot_encode(videos: Path, encoding: str, missing: bytes) -> None:
    lines = "path,label\nvideos/cats/1.mp4,cats\nvideos/ünï 猫.mp4,x\n"
    (videos.parent / "labels.csv").write_text(lines)
    argv = ["index", "videos", "--labels", "labels.csv", "--out", "m.parquet"]
    done = tsq_process(videos.parent, *argv, environment={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"not found: 1: " + missing in done.stdout
    assert done.stdout.endswith(b"out: m.parquet\n")


def test_a_name_that_is_not_utf_8_is_shown(videos: Path) -> None:
    environment = {"PYTHONIOENCODING": "utf-8"}
    done = tsq_process(
        videos.parent, "index", "videos", "--out", b"m\xff.parquet", environment=environment
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"out: m\\udcff.parquet\n")
    assert os.path.exists(os.fsencode(videos.parent) + b"/m\xff.parquet")


def closed_pipe() -> int:
    """The write end of a pipe without a reader, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("argv", "code", "closed", "unbuffered"),
    [
        (["index", "videos", "--out", "m.parquet"], 0, "stdout", ""),
        (["index", "videos", "--out", "m.parquet"], 0, "both", "1"),
        (["verify", "features"], 1, "stdout", ""),
        (["--help"], 0, "stdout", ""),
        (["--help"], 0, "both", "1"),
        (["index"], 2, "both", ""),
    ],
    ids=str,
)
def test_an_output_without_a_reader(
    manifest: Path, argv: list[str], code: int, closed: str, unbuffered: str
) -> None:
    """The command ends with its own exit code, without a word about the pipe."""
    folder = finished_run(manifest.parent / "features", str(manifest))
    next(folder.glob("part-*")).unlink()
    pipe = closed_pipe()
    streams: dict[str, Any] = {"stdout": pipe} | ({"stderr": pipe} if closed == "both" else {})
    environment = {"PYTHONUNBUFFERED": unbuffered}
    done = tsq_process(folder.parent, *argv, environment=environment, **streams)
    os.close(pipe)
    assert (done.returncode, done.stderr or b"") == (code, b"")
    assert (folder.parent / "m.parquet").exists() == ("--out" in argv)


def test_a_reader_may_stop_after_the_first_line(tmp_path: Path) -> None:
    """More text than a pipe holds, of which the reader takes one line."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v/1.mp4").touch()
    names = "\n".join(f"v/gone{number:0200}.mp4,x" for number in range(4000))
    (tmp_path / "labels.csv").write_text(f"path,label\nv/1.mp4,x\n{names}\n")
    command = [sys.executable, "-m", "tsq_ray", "index", "v", "--labels", "labels.csv", "--json"]
    command += ["--out", "m.parquet"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"{\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_threads_wait_without_spinning() -> None:
    """libgomp reads the variable while torch is loaded, so it must be set before."""
    code = "import os, sys, tsq_ray; print(os.getenv('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    for given, expected in ((None, "PASSIVE False"), ("ACTIVE", "ACTIVE False")):
        own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment = own | ({"OMP_WAIT_POLICY": given} if given else {})
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


# ------------------------------------------------------------------------------------------ helpers


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--retry-failed"], ["--retry-failed", "all"]),
        (["--retry-failed", "--json"], ["--retry-failed", "all", "--json"]),
        (["--retry-failed", "timeout", "--json"], ["--retry-failed", "timeout", "--json"]),
        (["--retry-failed", "all"], ["--retry-failed", "all"]),
        (["--retry-failed", "bored"], ["--retry-failed", "bored"]),
        (["--json"], ["--json"]),
    ],
)
def test_a_bare_retry_means_all(given: list[str], expected: list[str]) -> None:
    assert bare_retry(["extract", *given]) == ["extract", *expected]


def test_retry_reasons_are_the_error_types() -> None:
    for name in ERROR_TYPES:
        assert bare_retry(["--retry-failed", name]) == ["--retry-failed", name]


def run_summary(**counts: Any) -> dict[str, Any]:
    zero = {
        "inputs": 10,
        "ok": 0,
        "failed": 0,
        "skipped": 0,
        "skipped_by": {},
        "failed_by_type": {},
        "with_warnings": 0,
    }
    return {
        "kind": "features",
        "counts": zero | counts,
        "stage_seconds": {},
        "slowest_stage": None,
        "wall_seconds": 1.0,
        "videos_done_now": 10,
    }


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"videos_done_now": 0, "already_done": True}, "\nalready done: nothing to do\n"),
        ({"videos_done_now": 0}, "\ndone in this run: 0, in earlier runs: 10\n"),
        ({"videos_done_now": 4}, "\ndone in this run: 4, in earlier runs: 6\n"),
        ({"videos_done_now": 10}, None),
    ],
    ids=["nothing", "labels only", "some", "all"],
)
def test_the_summary_reports_what_was_there_before(how: dict[str, Any], said: str | None) -> None:
    text = run_text(RunSummary.of("out", run_summary(ok=9, failed=1) | how))
    assert (said in text) if said else ("done" not in text)


def test_a_dry_run_is_described_in_words() -> None:
    estimate = Estimate(
        **{
            "videos": 30,
            "inputs": 40,
            "bytes_in": 12_345_678,
            "probed": ("a", "b"),
            "probed_failed": 1,
            "nodes": 2,
            "cpus": 4.0,
            "workers": 4,
        },
        **{
            "seconds_a_video": 0.5,
            "wall_seconds": 34.6,
            "gpu_hours": 0.0,
            "cpu_hours": 0.008,
            "video_hours": 1.5,
            "bytes_out": 250_000,
            "dense": 3.1,
            "cost": {"total": 2.0, "per_video": 0.07, "per_video_hour": 1.3, "dense_total": 6.2},
        },
    )
    assert estimate_text(estimate).splitlines() == [
        "to do: 30 of 40 videos, 12.3 MB to read",
        "would take 35 s on 2 nodes (4 CPUs), including start-up: 0.5 s per video with 4 workers",
        "would use 0.008 CPU hours, 0.0 GPU hours for 1.5 hours of video; "
        "cost 2 (0.07 a video, 1.3 an hour of video); "
        "recognising all frames: about 3.1 times as much (6.2)",
        "would write 0.2 MB",
        "based on a probe of 2 videos, 1 of which failed (--json names all of them)",
    ]


@pytest.mark.parametrize(
    ("failed", "allowed", "code"),
    [(1, 0.1, 0), (2, 0.1, 1), (0, 0.0, 0), (1, 0.0, 1), (5, None, 0)],
)
def test_more_failures_than_max_failed_are_an_error(
    capfd: pytest.CaptureFixture[str], failed: int, allowed: float | None, code: int
) -> None:
    from tsq_ray.console import end_run, guarded

    run = run_summary(
        ok=10 - failed, failed=failed, failed_by_type={"timeout": failed} if failed else {}
    )
    assert guarded(lambda: end_run(RunSummary.of("out", run), False, allowed), debug=False) == code
    out, err = capfd.readouterr()
    assert f"10 inputs = {10 - failed} ok + {failed} failed + 0 skipped" in out
    assert (f"{failed} of 10 videos failed, above --max-failed {allowed}" in err) == bool(code)
