"""The report's figures, its choice of videos, its curves and its page.

integration/test_report_browser.py tests the page in a browser.
"""

from __future__ import annotations

import base64
import colorsys
import html.parser
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import escape
from PIL import Image
from support.report import (
    BUDGET,
    CLASSES,
    HOSTILE_NAME,
    NUM_FRAMES,
    Case,
    failed_row,
    make_case,
    make_video,
    ok_row,
    video_id,
    write_run,
)

from tsq_ray.errors import RunError
from tsq_ray.quality import FAILED, RIGHT, WRONG
from tsq_ray.reporting import build_report
from tsq_ray.reporting.agreement import agreement_svg, verdict
from tsq_ray.reporting.choice import best_candidates, choose_shown
from tsq_ray.reporting.curves import Mark, saliency_svg, time_text
from tsq_ray.reporting.losses import losses_svg
from tsq_ray.reporting.pictures import uniform_slots
from tsq_ray.reporting.predictions import read_predictions
from tsq_ray.reporting.summary import summarize
from tsq_ray.results import ReportSummary

VOID = {"meta", "link", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """The page as a flat list of elements with their attributes, and the text of each card."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cards: dict[str, str] = {}
        self.open: list[str] = []
        self._card: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self._card = str(dict(attrs)["id"]).removeprefix("v-")
            self.cards[self._card] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "article":
            self._card = None

    def handle_data(self, data: str) -> None:
        if self._card is not None:
            self.cards[self._card] += " ".join(data.split()) + " "

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def built(case: Case) -> tuple[ReportSummary, str]:
    out = case.folder.parent / "report.html"
    summary = build_report(str(case.folder), str(out))
    return summary, out.read_text("utf-8")


@pytest.fixture(scope="module")
def page(built: tuple[ReportSummary, str]) -> Page:
    return Page(built[1])


def test_summary_has_the_figures(built: tuple[ReportSummary, str], case: Case) -> None:
    summary = built[0]
    assert summary.out == str(case.folder.parent / "report.html")
    assert {
        key: getattr(summary, key) for key in ("inputs", "ok", "failed", "skipped", "shown")
    } == {
        "inputs": 9,
        "ok": 7,
        "failed": 2,
        "skipped": 0,
        "shown": 9,
    }
    assert summary.failures == {"not_video": 1, "access_denied": 1}
    assert summary.adds_up is True
    assert summary.warned == 2
    assert summary.without_pictures == 1


def test_quality_over_the_labelled_videos_that_the_bundle_can_judge(
    built: tuple[ReportSummary, str],
) -> None:
    summary = built[0]
    assert summary.judged == 5
    assert summary.top1 == pytest.approx(3 / 5)
    # by hand, equal scores entering together; cook: 1, 1, 3/5; swim: 1, 1, 3/4
    assert summary.map == pytest.approx(((1 + 1 + 3 / 5) / 3 + (1 + 1 + 3 / 4) / 3) / 2)
    assert summary.map_interpolated == pytest.approx(summary.map)
    assert summary.unknown_labels == {"juggle": 1}


def test_details_of_the_quality(case: Case) -> None:
    figures = summarize(read_predictions(str(case.folder)), 0).quality
    assert [(row["name"], row["videos"], row["predicted"]) for row in figures["per_class"]] == [
        ("cook", 3, 1),
        ("swim", 3, 2),
        (CLASSES[2], 0, 1),
        (CLASSES[3], 0, 1),
    ]
    assert figures["per_class"][2]["ap"] is None
    assert figures["confusions"] == [
        ("cook", CLASSES[2], 1),
        ("cook", CLASSES[3], 1),
        ("swim", CLASSES[3], 1),
    ]


def test_verdicts(case: Case) -> None:
    summary = summarize(read_predictions(str(case.folder)), 60)
    by_place = sorted(summary.shown)
    assert [place for place, _ in by_place] == [
        *((0, row) for row in range(5)),
        *((1, row) for row in range(4)),
    ]
    assert [verdict for _, verdict in by_place] == [
        "right",
        "wrong",
        "wrong",
        "right",
        "right",
        "unlabelled",
        "unlabelled",
        "failed",
        "failed",
    ]
    assert summary.classes == [("swim", 3), ("cook", 2), ("</script><img src=x>", 1), ("=1+1", 1)]


def test_warnings_are_counted_by_kind(case: Case) -> None:
    assert summarize(read_predictions(str(case.folder)), 0).totals["warnings"] == {
        "… of … frames missing": 2
    }


def test_every_video_has_a_well_formed_card(page: Page) -> None:
    # wrong ones by certainty, the others by turns of their class, failed ones by turns of their
    # reason
    assert list(page.cards) == [video_id(number) for number in (2, 3, 4, 1, 6, 5, 7, 9, 8)]
    assert page.open == []
    assert {attributes["data-verdict"] for attributes in page.attributes("article")} == {
        "right",
        "wrong",
        "unlabelled",
        "failed",
    }


def test_nothing_is_requested_or_run_from_outside(
    built: tuple[ReportSummary, str], page: Page
) -> None:
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"an event handler: {name}"
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert str(value).startswith("data:"), f"{name}={value!r} is a request"
    assert len(page.attributes("script")) == 1
    assert page.attributes("script")[0] == {}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", built[1])
    policy = next(
        a["content"]
        for a in page.attributes("meta")
        if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_hostile_names_are_text(built: tuple[ReportSummary, str], page: Page) -> None:
    assert HOSTILE_NAME in page.cards[video_id(2)]
    assert CLASSES[2] in page.cards[video_id(2)]
    assert HOSTILE_NAME not in built[1]
    assert CLASSES[2] not in built[1]


def test_no_secret_of_a_presigned_url(built: tuple[ReportSummary, str], page: Page) -> None:
    assert "X-Amz-Signature" not in built[1]
    assert "https://store.example/v.mp4?..." in page.cards[video_id(9)]


def test_the_run_is_described(built: tuple[ReportSummary, str]) -> None:
    for text in (
        "/models/kitchen",
        "torch 2.9",
        "2026-01-02 03:04:05 UTC",
        "sampler.lambda_visual",
        "3 of 8",
    ):
        assert text in built[1]


def test_a_video_that_is_gone_has_a_note_and_its_answer(page: Page) -> None:
    card = page.cards[video_id(5)]
    assert "No pictures: not_found" in card
    assert "swim" in card
    assert "visual module" in card


def test_failed_videos_have_their_reason(page: Page) -> None:
    assert "not_video no video stream in notes.txt" in page.cards[video_id(8)]


def test_a_short_video_shows_each_frame_once(page: Page) -> None:
    card = page.cards[video_id(4)]
    assert "Chosen by the sampler 2 frames " in card
    assert "Uniform 2 frames " in card


def test_pictures_are_those_of_their_slots(built: tuple[ReportSummary, str], case: Case) -> None:
    text = built[1][built[1].index(f'id="v-{video_id(1)}"') :]
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="Frame at ([0-9.]+) s"', text)[
        : 2 * BUDGET
    ]
    row = case.rows[0]
    uniform = [float(row["frame_pts_s"][slot]) for slot in uniform_slots(NUM_FRAMES, BUDGET)]
    times = [*row["selected_pts_s"], *uniform]
    assert [float(time) for _, time in pictures] == pytest.approx(times, abs=0.051)
    for (picture, _), time in zip(pictures, times, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert image.size == (160, 120)
        red, green, blue = np.median(np.asarray(image).reshape(-1, 3), axis=0) / 255
        hue = colorsys.rgb_to_hsv(red, green, blue)[0]
        assert abs((hue - time / row["duration_s"] + 0.5) % 1 - 0.5) < 0.03


def test_a_changed_video_is_not_shown_for_the_scored_one(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4", 20)
    folder = write_run(tmp_path / "run", [ok_row(1, video, [0.7, 0.1, 0.1, 0.1])])
    make_video(video, 30)
    assert build_report(str(folder), str(tmp_path / "r.html")).without_pictures == 1
    assert (
        "No pictures: source_changed"
        in Page((tmp_path / "r.html").read_text("utf-8")).cards[video_id(1)]
    )


def test_without_scores_there_is_top1_but_no_map(tmp_path: Path) -> None:
    case = make_case(tmp_path, with_scores=False)
    summary = build_report(str(case.folder), str(tmp_path / "r.html"), max_videos=0)
    assert summary.top1 == pytest.approx(3 / 5)
    assert summary.map is None
    assert summary.shown == 0
    assert "No mAP: these predictions do not hold the score of every class." in (
        tmp_path / "r.html"
    ).read_text("utf-8")


def test_what_run_json_does_not_say_is_left_out(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4", 20)
    left_out = dict.fromkeys(("config", "bundle_classes", "counts", "model", "ended", "versions"))
    folder = write_run(
        tmp_path / "run", [ok_row(1, video, [0.7, 0.1, 0.1, 0.1], ["cook"])], **left_out
    )
    summary = build_report(str(folder), str(tmp_path / "r.html"))
    assert (summary.top1, summary.map, summary.adds_up) == (1.0, None, True)
    assert "Lambda" not in (tmp_path / "r.html").read_text("utf-8")


def test_a_run_of_failures_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [failed_row(1, "/a/b.mp4", "truncated", "too short")])
    summary = build_report(str(folder), str(tmp_path / "r.html"))
    assert (summary.ok, summary.failed, summary.top1) == (0, 1, None)
    assert "No video was labelled." in (tmp_path / "r.html").read_text("utf-8")


def test_a_card_shows_what_the_server_said(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "v.mp4", 8)
    rows = [
        ok_row(1, clip, [0.1, 0.7, 0.1, 0.1], caption="<b>A bar</b> moves"),
        ok_row(2, clip, [0.1, 0.7, 0.1, 0.1]),
    ]
    folder = write_run(tmp_path / "predictions", rows, from_server=True)
    build_report(str(folder), str(tmp_path / "r.html"))
    cards = Page((tmp_path / "r.html").read_text("utf-8")).cards
    assert "<b>A bar</b> moves" in cards[video_id(1)], "as text"
    assert "A bar" not in cards[video_id(2)]


def test_a_baseline_has_no_curves(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4", 20)
    chosen = ["random"] * BUDGET
    row = ok_row(
        1,
        video,
        [0.7, 0.1, 0.1, 0.1],
        saliency_visual=None,
        saliency_textual=None,
        selected_by=chosen,
    )
    folder = write_run(
        tmp_path / "run", [row], config={"sampler": {"mode": "random", "budget": BUDGET}}
    )
    build_report(str(folder), str(tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "Chosen by the baseline random" in text
    assert "<polyline" not in text
    assert text.count('class="chosen random"') == BUDGET


def test_an_accounting_that_does_not_add_up_is_reported(tmp_path: Path) -> None:
    rows = [failed_row(1, "/a/b.mp4", "truncated", "too short")]
    folder = write_run(
        tmp_path / "run", rows, counts={"inputs": 5, "ok": 1, "failed": 1, "skipped": 2}
    )
    assert build_report(str(folder), str(tmp_path / "r.html")).adds_up is False
    assert "The rows do not add up" in (tmp_path / "r.html").read_text("utf-8")


def test_progress_counts_the_decoded_videos(tmp_path: Path) -> None:
    rows = [
        ok_row(i, make_video(tmp_path / f"{i}.mp4", 10), [0.7, 0.1, 0.1, 0.1]) for i in range(3)
    ]
    calls: list[tuple[int, int]] = []
    folder = write_run(tmp_path / "run", rows)
    build_report(
        str(folder),
        str(tmp_path / "r.html"),
        num_processes=1,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"kind": "features"}, "holds features, expected predictions"),
        ({"format": 99}, "made by a newer version of tsq_ray"),
        ({"bundle_classes": ["a", "b"]}, r"scores of 4 classes, but _run.json names 2"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, run: dict, message: str) -> None:
    folder = write_run(
        tmp_path / "run", [failed_row(1, "/a/b.mp4", "truncated", "too short")], **run
    )
    with pytest.raises(RunError, match=message):
        build_report(str(folder), str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def test_a_folder_without_a_run_or_without_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        build_report(str(tmp_path), str(tmp_path / "r.html"))
    folder = write_run(tmp_path / "run", [])
    with pytest.raises(RunError, match=r"no part-\*\.parquet here"):
        build_report(str(folder), str(tmp_path / "r.html"))


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [failed_row(1, "/a/b.mp4", "truncated", "too short")])
    (folder / "part-0000.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RunError, match=r"part-0000\.parquet: not readable as Parquet"):
        build_report(str(folder), str(tmp_path / "r.html"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda part: part.drop_columns(["top_labels"]),
            r"part-0001\.parquet: these are not predictions, top_labels is missing",
        ),
        (
            lambda part: part.set_column(
                part.column_names.index("error_type"), "error_type", pa.nulls(len(part), pa.int32())
            ),
            r"part-0001\.parquet: error_type is int32, but string in the first part; were two "
            r"runs mixed\?",
        ),
    ],
    ids=["a column missing", "another type"],
)
def test_parts_of_another_run_are_refused(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    folder = write_run(
        tmp_path / "run",
        [failed_row(number, "/a/b.mp4", "truncated", "too short") for number in (1, 2)],
    )
    part = folder / "part-0001.parquet"
    pq.write_table(change(pq.read_table(part)), part)
    with pytest.raises(RunError, match=message):
        build_report(str(folder), str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def candidates(wrong: int = 0, right: int = 0, failed: int = 0) -> pa.Table:
    """Rows as `choose_shown` takes them, numbered from 0."""
    rows = [(WRONG, "y", i / 1000) for i in range(wrong)]
    rows += [(RIGHT, f"class {i % 3}", 0.5) for i in range(wrong, wrong + right)]
    rows += [
        (FAILED, "corrupt" if i % 5 else "timeout", 0.0)
        for i in range(wrong + right, wrong + right + failed)
    ]
    verdicts, keys, scores = zip(*rows, strict=True)
    numbers = pa.array(range(len(rows)), pa.int32())
    ids = [video_id(number) for number in range(len(rows))]
    names = ["part", "row", "video_id", "verdict", "key", "top_score"]
    return pa.table(
        [
            numbers,
            numbers,
            ids,
            pa.array(verdicts, pa.int8()),
            keys,
            pa.array(scores, pa.float32()),
        ],
        names=names,
    )


@pytest.mark.parametrize(
    ("counts", "max_videos", "expected"),
    [
        ((3, 4, 2), 60, (3, 4, 2)),
        ((50, 50, 50), 12, (6, 4, 2)),
        ((2, 50, 0), 12, (2, 10, 0)),
        ((50, 0, 0), 12, (12, 0, 0)),
        ((50, 3, 0), 12, (9, 3, 0)),
        ((0, 0, 50), 12, (0, 0, 12)),
        ((1, 1, 50), 12, (1, 1, 10)),
        ((50, 50, 50), 0, (0, 0, 0)),
    ],
)
def test_which_videos_get_a_card(
    counts: tuple[int, int, int], max_videos: int, expected: tuple[int, int, int]
) -> None:
    shown = choose_shown(candidates(*counts), max_videos)
    assert (
        tuple(shown["verdict"].to_pylist().count(verdict) for verdict in (WRONG, RIGHT, FAILED))
        == expected
    )
    assert len(set(shown["video_id"].to_pylist())) == len(shown)


def test_the_choice_depends_neither_on_the_order_of_rows_nor_on_their_blocks() -> None:
    found = candidates(20, 20, 20)
    shown = choose_shown(found, 18)
    assert choose_shown(found.take(list(range(60))[::-1]), 18) == shown
    assert shown["top_score"].to_pylist()[:9] == pytest.approx(
        [(19 - i) / 1000 for i in range(9)]
    ), "the most confident mistakes first"
    assert shown["key"].to_pylist()[9:15] == ["class 0", "class 1", "class 2"] * 2, (
        "the classes by turns"
    )
    assert set(shown["key"].to_pylist()[15:]) == {"corrupt", "timeout"}
    mixed = found.take(np.random.default_rng(0).permutation(60))
    kept = mixed.slice(0, 0)
    for start in range(0, 60, 7):
        kept = best_candidates(pa.concat_tables([kept, mixed.slice(start, 7)]), 18)
    assert len(kept) == 54
    assert choose_shown(kept, 18) == shown


@pytest.mark.parametrize(
    ("num_frames", "budget", "slots"),
    [(16, 5, [1, 4, 8, 11, 14]), (8, 3, [1, 4, 6]), (4, 4, [0, 1, 2, 3]), (5, 1, [2])],
)
def test_uniform_slots(num_frames: int, budget: int, slots: list[int]) -> None:
    assert uniform_slots(num_frames, budget) == slots


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (12.34, "12.3 s"),
        (119.9, "119.9 s"),
        (125, "2:05"),
        (3600 * 2 + 61, "2:01:01"),
    ],
)
def test_time_text(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


CURVE = [
    {"epoch": 1.0, "loss": 4.0, "visual": 2.0, "t2v": 1.5},
    {"epoch": 2.0, "loss": 2.0, "visual": 0.5, "t2v": 1.0},
]


def test_losses_of_the_training(tmp_path: Path) -> None:
    svg = losses_svg(CURVE)
    lines = re.findall(r'<polyline class="line (\w+)" points="([^"]*)"', svg)
    assert lines == [("visual", "0.00,0.00 1000.00,105.00"), ("t2v", "0.00,35.00 1000.00,70.00")]
    assert re.findall(r"<text[^>]*>([^<]*)</text>", svg) == ["highest 2", "epoch 1", "2"]
    case = make_case(tmp_path, training_curve=CURVE)
    build_report(str(case.folder), str(tmp_path / "with.html"), 0)
    page = (tmp_path / "with.html").read_text()
    assert svg in page
    assert re.findall(
        r'</span>(\w+)</td><td class="num">([0-9.]+)</td><td class="num">([0-9.]+)', page
    ) == [
        ("loss", "4.000", "2.000"),
        ("visual", "2.000", "0.500"),
        ("t2v", "1.500", "1.000"),
    ]


def agreed(mode: str, budget: int, top1: float, cost: float) -> dict[str, Any]:
    ends = {"low": top1 - 0.05, "high": min(1.0, top1 + 0.05)}
    return {"mode": mode, "budget": budget, "frames": budget, "map": top1} | {
        "top1": top1,
        "cost": cost,
        **ends,
    }


def test_agreement_with_the_recogniser(tmp_path: Path) -> None:
    curve = [
        *(agreed("both", 1, 0.8, 0.35), agreed("both", 2, 0.9, 0.4)),
        *(agreed("uniform", 1, 0.6, 0.25), agreed("uniform", 2, 0.7, 0.5)),
        *(agreed("uniform", 4, 1.0, 1.0), agreed("maxconf", 2, 1.0, 1.0)),
    ]
    found = {"videos": 40, "asked": 0.85, "curve": curve, "chosen": curve[1]}
    svg = agreement_svg(found)
    lines = re.findall(r'<polyline class="line ?(\w*)" points="([^"]*)"', svg)
    assert lines == [
        ("visual", "350.00,80.00 400.00,40.00"),
        ("", "250.00,160.00 500.00,120.00 1000.00,0.00"),
    ]
    assert 'y1="60.0"' in svg, "85 % was asked for"
    assert 'cx="40.00%" cy="40.0"' in svg
    case = make_case(tmp_path, agreement=found)
    build_report(str(case.folder), str(tmp_path / "with.html"), 0)
    page = (tmp_path / "with.html").read_text()
    assert svg in page
    assert "Share of 40 held-out videos" in page
    assert "80.0 % <span" in page
    assert f"<p>{escape(verdict(found))}.</p>" in page
    assert re.findall(r'<tr class="chosen"><td class="num">([^<]*)<', page) == ["2, chosen"]
    build_report(str(make_case(tmp_path / "other").folder), str(tmp_path / "without.html"), 0)
    assert "Agreement with the recogniser" not in (tmp_path / "without.html").read_text()


@pytest.mark.parametrize(
    ("count", "epochs"),
    [(1, ["epoch 1"]), (4, ["epoch 1", "4"]), (100, ["epoch 1", "25", "50", "75", "100"])],
)
def test_losses_name_their_epochs(count: int, epochs: list[str]) -> None:
    svg = losses_svg([{"epoch": number, "visual": 1.0} for number in range(count)])
    assert re.findall(r"<text[^>]*>([^<]*)</text>", svg)[1:] == epochs


def test_curves_place_frames_by_time() -> None:
    marks = [Mark(2.0, "visual"), Mark(8.0, "textual")]
    svg = saliency_svg(
        [0.0, 2.0, 8.0],
        10.0,
        (("visual", [0.0, 0.5, 0.25]), ("textual", [0.1, 0.1, 0.4])),
        marks,
        [5.0],
    )
    lines = re.findall(r'<polyline class="line" points="([^"]*)"', svg)
    assert lines == ["0.00,44.00 200.00,0.00 800.00,22.00", "0.00,33.00 200.00,33.00 800.00,0.00"]
    assert re.findall(r'class="chosen (\w+)" cx="([0-9.]+)%"', svg) == [
        ("visual", "20.00"),
        ("textual", "80.00"),
    ]
    assert re.findall(r'class="uniform" x="([0-9.]+)%"', svg) == ["50.00"]
    assert svg.count('class="point"') == 6, "few frames are drawn as points"
    assert [text for text in re.findall(r">(\d+ s)</text>", svg)] == [
        "0 s",
        "2 s",
        "4 s",
        "6 s",
        "8 s",
        "10 s",
    ]


def test_curves_of_many_frames_have_no_points_and_repeated_frames_count_once() -> None:
    many = saliency_svg(range(50), 50.0, (("visual", [0.02] * 50), ("textual", None)), [], [])
    assert 'class="point"' not in many
    assert many.count("<polyline") == 1
    short = saliency_svg([0.0, 0.1, 0.0, 0.1], 0.2, (("visual", [0.1, 0.2, 0.3, 0.4]),), [], [])
    assert re.findall(r'class="line" points="([^"]*)"', short) == ["0.00,22.00 500.00,0.00"]


@pytest.mark.parametrize(
    ("pts_s", "duration_s", "values"),
    [
        ([0.0], 0.0, [0.0]),
        ([0.0], 0.04, [1.0]),
        ([5.0, 9.0], 0.0, [float("nan"), 0.1]),
        ([-0.5, 1.0], 1.5, [0.1, -0.1]),
        ([0.0], 90_000.0, [0.1]),
    ],
)
def test_curves_of_odd_videos_stay_inside(
    pts_s: list[float], duration_s: float, values: list[float]
) -> None:
    svg = saliency_svg(pts_s, duration_s, (("visual", values),), [Mark(pts_s[0], "visual")], pts_s)
    assert "nan" not in svg
    assert all(0 <= float(value) <= 100 for value in re.findall(r'"(-?[0-9.]+)%"', svg))
    assert 1 <= len(re.findall(r'class="tick"', svg)) <= 30
