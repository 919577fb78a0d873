"""README and docs/: generated pages are current; links, commands and settings exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generator.markdown import page
from support.order import ORDER

from tsq_ray import cli
from tsq_ray.config import Config, flatten
from tsq_ray.errors import ERROR_TYPES

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
PAGES = [REPO / "README.md", *sorted(DOCS.glob("*.md"))]
GENERATED = ("cli.md", "api.md", "configuration.md", "data-format.md")
SUFFIXES = {
    ".py",
    ".sh",
    ".toml",
    ".md",
    ".yaml",
    ".yml",
    ".txt",
    ".html",
    ".css",
    ".js",
    ".j2",
    "",
}


def page_name(path: Path) -> str:
    return str(path.relative_to(REPO))


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------- the life of one
# video


def walks() -> list[list[tuple[str, list[str]]]]:
    """The walks of architecture.md: each a list of (file, names in it)."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    found: list[list[tuple[str, list[str]]]] = []
    for number, names in re.findall(r"^(\d+)\. ((?:`[^`]+`,? ?)+):", text, re.MULTILINE):
        if number == "1":
            found.append([])
        file, *inside = re.findall(r"`([^`]+)`", names)
        found[-1].append((file, inside))
    return found


def test_the_walks_name_what_exists_and_visit_no_file_twice() -> None:
    assert len(walks()) == 3
    for walk in walks():
        assert len(walk) == len({file for file, _ in walk})
        for file, names in walk:
            text = (REPO / "tsq_ray" / file).read_text(encoding="utf-8")
            for name in names:
                last = name.rpartition(".")[2]
                assert re.search(rf"(?:def|class) {last}\b", text), f"{file} has no {name}"


# -------------------------------------------------------------------------------- the order of
# files


def test_the_documented_order_of_imports_is_the_tested_one() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"modules before it in this list:\n```\n(.*?)```", text, re.DOTALL)
    assert [name.strip("/ \n") for name in block.split(",")] == documented_order()


def test_the_readme_lists_the_modules_in_the_order_of_imports() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^tsq_ray/\n((?:  .*\n)+)", text, re.MULTILINE)
    columns = [re.match(r"((?: {2}\w+(?:\.py|/))+)", line) for line in tree.splitlines()]
    names = [name for found in columns if found for name in found[1].split()]
    assert [name.removesuffix(".py").strip("/") for name in names] == documented_order()


def documented_order() -> list[str]:
    return [name for name in ORDER if name != "__main__"]


# -------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_lines_fit_and_code_is_fenced(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert page(text) == text, "lines above 100 columns"
    fences = [line for line in text.splitlines() if "```" in line]
    assert all(line.lstrip().startswith("```") for line in fences), "code begins within a line"
    assert len(fences) % 2 == 0


# ---------------------------------------------------------------------------------- generated pages


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_fresh(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == generator().pages()[name], (
        "stale: run python docs/generate.py"
    )


def test_every_generated_page_is_checked() -> None:
    assert set(generator().pages()) == set(GENERATED)


def test_the_configuration_page_has_every_setting() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    missing = [
        key for key in flatten(Config().model_dump(mode="json")) if f"| `{key}` |" not in text
    ]
    assert missing == []


def test_the_operations_page_has_every_error_type() -> None:
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    assert [name for name in ERROR_TYPES if f"\n| `{name}` |" not in text] == []


# -------------------------------------------------------------------------------------------- links


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {
        slug(line.lstrip("#"))
        for line in without_code(page.read_text(encoding="utf-8")).splitlines()
        if line.startswith("#")
    }


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(REPO / link.partition("#")[0]).resolve() for link in links(REPO / "README.md")}
    assert [page_name(page) for page in PAGES[1:] if page.resolve() not in linked] == []


# ----------------------------------------------------------------------------- commands and options


@cache
def options() -> dict[str, set[str]]:
    """Command -> its options, as the generated page spells them."""
    found: dict[str, set[str]] = {}
    for section in generator().command_line().split("\n## tsq ")[1:]:
        name = section.split("\n", 1)[0]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        found[name] = {
            option for row in rows for option in re.findall(r"--[a-z-]+", row.split("|")[1])
        } | {"--help"}
    return found


def test_the_command_line_page_knows_every_command() -> None:
    groups = {group.name for group in cli.app.registered_groups}
    assert {name.split()[0] for name in options()} - groups == {
        command.name for command in cli.app.registered_commands
    }
    assert {name.split()[0] for name in options() if " " in name} == groups


def code_of(text: str) -> Iterator[str]:
    """Every line of a code block, continued lines joined, and every piece of inline code."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", without_code(text))


def invocations(text: str) -> Iterator[list[str]]:
    """["score", "m", "--model", ...] of each `tsq score m --model ...` in the code.

    At the start of a line or after ; & | (.
    """
    for line in code_of(text):
        for match in re.finditer(r"(?:^|[;&|(])\s*(?:\$ )?tsq (?=[a-z])([^;&|#]*)", line):
            try:
                yield shlex.split(match.group(1))
            except ValueError:  # a quote that opens in the part that was cut off
                yield match.group(1).split()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_and_options_exist(page: Path) -> None:
    wrong = []
    for words in invocations(page.read_text(encoding="utf-8")):
        command = words[0] if words[0] in options() else " ".join(words[:2])
        if command not in options():
            wrong.append(f"tsq {command}")
            continue
        given = {
            word.partition("=")[0] for word in words[1:] if word.startswith("--") and len(word) > 2
        }
        wrong += [f"tsq {command} {option}" for option in sorted(given - options()[command])]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_options_named_alone_exist(page: Path) -> None:
    """`--limit` in the text is an option of some command.

    Unless the piece of code is another program's.
    """
    known = set().union(*options().values())
    alone = [
        piece
        for piece in re.findall(
            r"`(--[a-z][^`\n]*)`", without_code(page.read_text(encoding="utf-8"))
        )
    ]
    others = {"--working-dir", "--submission-id", "--no-wait", "--all"}
    assert [piece for piece in alone if re.split(r"[ =/]", piece)[0] not in known | others] == []


def settings() -> tuple[set[str], set[str]]:
    """Every setting, and every section."""
    keys = set(flatten(Config().model_dump(mode="json")))
    sections = {key.rpartition(".")[0] for key in keys} | {key.split(".")[0] for key in keys}
    return keys, sections


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_settings_that_are_named_exist(page: Path) -> None:
    keys, sections = settings()
    top = "|".join(sorted({key.split(".")[0] for key in keys}))
    named: list[str] = []
    for line in code_of(page.read_text(encoding="utf-8")):
        named += re.findall(rf"(?<![\w./-])((?:{top})\.[a-z_.]*[a-z_](?:\.?\*)?)(?![\w(/])", line)
    wrong = []
    for name in named:
        stem = name.rstrip("*").rstrip(".")
        fits = (
            name in keys
            or name in sections
            or (name.endswith("*") and any(key.startswith(stem) for key in keys))
        )
        if not fits and name.rpartition(".")[2] not in ("py", "json", "toml", "md", "safetensors"):
            wrong.append(name)
    assert wrong == []


# --------------------------------------------------------------------------------- what is not said


def texts() -> list[Path]:
    """Tracked text files outside tests/ (or, without git, the pages)."""
    done = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=False
    )
    tracked = [REPO / line for line in done.stdout.splitlines() if not line.startswith("tests/")]
    found = {
        path
        for path in (*tracked, *PAGES)
        if path.suffix in SUFFIXES and path.is_file() and path.name != "LICENSE"
    }
    return sorted(found)


FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:work|root|home|tmp/dev|Users)/\w",
    "talk about who wrote it": (
        r"(?i)\b(?:sub-?agents?|this session|another session|previous session|session \d|as an ai"
        r"|language model assistant)\b"
    ),
    "a package index's host": r"(?i)\b(?:pypi\.org|files\.pythonhosted\.org|index-url)\b",
    "something unfinished": r"\b(?:TODO|FIXME|XXX|TBD)\b",
}


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_no_text_has(what: str) -> None:
    found: list[Any] = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(FORBIDDEN[what], line):
                found.append(f"{page_name(path)}:{number}: {line.strip()[:100]}")
    assert found == []
