"""docs/examples: each program does what its docstring says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import Chain, Chains

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def chain(chains: Chains) -> Chain:
    return chains("local")


def printed_by(example: str, *arguments: str) -> str:
    """What a program of docs/examples prints, run as a user runs it."""
    argv = [sys.executable, str(EXAMPLES / example), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_label_a_folder(chain: Chain, tmp_path: Path) -> None:
    printed = printed_by(
        "label_folder.py", str(chain.archive.root / "val"), chain.bundle, str(tmp_path)
    )
    assert re.search(r"^\d labelled, \d failed", printed, re.MULTILINE)
    labels = re.findall(r"^/.*/val/\S+\.mp4: (.+) 0\.\d{3}$", printed, re.MULTILINE)
    assert labels
    assert set(labels) <= set(chain.archive.labels.values())


def test_the_example_to_label_a_folder_is_short() -> None:
    text = (EXAMPLES / "label_folder.py").read_text()
    body = text[text.index("import sys") :].splitlines()
    assert sum(bool(line) for line in body) <= 16


def test_read_predictions_without_the_package(chain: Chain) -> None:
    printed = printed_by("read_predictions.py", chain.predictions)
    assert re.search(r"label +videos +score", printed)
    assert re.search(r"^not_video +2$", printed, re.MULTILINE)
    assert re.search(r"^\S+\.mp4: chosen frames at [\d., ]+ s$", printed, re.MULTILINE)


def test_a_custom_sampler_beside_tsqnet(chain: Chain) -> None:
    printed = printed_by("custom_sampler.py", chain.features, chain.bundle, "2")
    names = re.findall(
        r"^(.+): mAP \d\.\d{3}, top-1 \d\.\d{3}, 2\.0 frames$", printed, re.MULTILINE
    )
    assert names == ["uniform", "tsqnet", "change per part"]


def test_every_example_is_run_here_or_by_the_tests_of_the_endpoint() -> None:
    tests = [Path(__file__), Path(__file__).with_name("test_serve.py")]
    run = "".join(path.read_text() for path in tests)
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in run] == []
