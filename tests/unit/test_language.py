"""Phrases that make a reader of English stumble stay out of code and pages (see also codespell)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BANNED = (
    r"\bhangs? on\b",
    r"\b(is|are|be) told\b",
    r"\bgoes on where\b",
    r"\bso many\b",
    r"\banew\b",
    r"\bthe border\b",
    r"\bthere is\b",
    r"\b(go|goes|went|gone) on where\b",
    r"\btold to\b",
    r"\ba like share\b",
    r"\bat like cost\b",
    r"\bto be had\b",
    r"\bbefalls?\b",
    r"\bas it comes\b",
)
SUFFIXES = (".py", ".md", ".sh", ".toml", ".yaml", ".j2", ".js", ".html", ".css")
FILES = sorted(
    path
    for top in ("tsq_ray", "jobs", "docs", "cluster", ".github", "README.md")
    for path in [REPO / top, *(REPO / top).rglob("*")]
    if path.is_file() and path.suffix in SUFFIXES
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_plain_english(path: Path) -> None:
    text = " ".join(path.read_text().split())
    found = [found.group() for pattern in BANNED for found in re.finditer(pattern, text, re.I)]
    assert found == []
