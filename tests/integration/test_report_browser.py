"""The report in a real, headless browser.

Its script runs, every picture loads, and the page is drawn.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import chromium_path
from support.report import BUDGET, Case, make_case, video_id

from tsq_ray.reporting import build_report

FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    ),
)


@pytest.fixture(scope="module")
def chromium() -> str:
    return chromium_path()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = make_case(tmp_path_factory.mktemp("browser"))
    out = case.folder.parent / "report.html"
    build_report(str(case.folder), str(out))
    return case, out


def browse(chromium: str, profile: Path, url: str, *flags: str) -> str:
    """The browser's output; `profile` is an empty folder of its own."""
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def shown_cards(dom: str) -> list[str]:
    """The ids of the visible cards, in the page's order."""
    return [
        match["id"]
        for match in re.finditer(
            r'<article class="card \w+" id="v-(?P<id>\w+)"(?P<rest>[^>]*)>', dom
        )
        if " hidden=" not in match["rest"]
    ]


def test_script_ran_and_every_picture_loaded(
    chromium: str, report: tuple[Case, Path], tmp_path: Path
) -> None:
    dom = browse(chromium, tmp_path, report[1].as_uri(), "--dump-dom")
    assert len(shown_cards(dom)) == 9
    pictures = 5 * (BUDGET + BUDGET) + (
        2 + 2
    )  # chosen and uniform: five whole videos, one of two frames; one is gone, two failed
    assert f'data-pictures="{pictures}/{pictures}"' in dom
    assert '<span id="count" aria-live="polite">9 videos</span>' in dom


@pytest.mark.parametrize(
    ("view", "numbers", "count"),
    [
        ("show=failed", [8, 9], "2 of 9 videos"),
        ("show=wrong", [2, 3], "2 of 9 videos"),
        ("find=gone", [5], "1 of 9 videos"),
        ("find=juggle", [7], "1 of 9 videos"),
        ("find=nothing-has-this-name", [], "0 of 9 videos"),
    ],
)
def test_filters(
    chromium: str,
    report: tuple[Case, Path],
    tmp_path: Path,
    view: str,
    numbers: list[int],
    count: str,
) -> None:
    dom = browse(chromium, tmp_path, f"{report[1].as_uri()}#{view}", "--dump-dom")
    assert sorted(shown_cards(dom)) == [video_id(number) for number in numbers]
    assert f">{count}</span>" in dom
    assert ('<p id="none" class="quiet" hidden="">' in dom) == bool(numbers)


def test_sorting(chromium: str, report: tuple[Case, Path], tmp_path: Path) -> None:
    dom = browse(chromium, tmp_path, f"{report[1].as_uri()}#sort=high", "--dump-dom")
    assert shown_cards(dom)[:3] == [video_id(number) for number in (6, 2, 1)]


@pytest.mark.parametrize(("width", "height"), [(1280, 1600), (400, 1600)])
def test_screenshot_is_drawn(
    chromium: str, report: tuple[Case, Path], tmp_path: Path, width: int, height: int
) -> None:
    picture = tmp_path / "shot.png"
    browse(
        chromium,
        tmp_path / "profile",
        report[1].as_uri(),
        f"--screenshot={picture}",
        f"--window-size={width},{height}",
    )
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (width, height))
        pixels = np.asarray(image.convert("RGB"))
    tones = np.unique(pixels.reshape(-1, 3), axis=0)
    assert len(tones) > 100, "text, bars and pictures have many tones"
    written = (np.abs(pixels.astype(int) - pixels[0, 0]).sum(axis=2) > 60).any(axis=1)
    assert written[: height // 2].mean() > 0.3, "the upper half holds text"


def test_page_fits_a_phone(chromium: str, report: tuple[Case, Path], tmp_path: Path) -> None:
    """Nothing is cut off at the right: the page's background covers the whole edge."""
    picture = tmp_path / "shot.png"
    browse(
        chromium,
        tmp_path / "profile",
        report[1].as_uri(),
        f"--screenshot={picture}",
        "--window-size=400,4000",
    )
    with Image.open(picture) as image:
        edge = np.asarray(image.convert("RGB"))[:, -6:].reshape(-1, 3)
    assert len(np.unique(edge, axis=0)) == 1
