"""Generate the pages that come from the code: `python docs/generate.py`.

generator/ has a module for each page. tests/unit/test_docs.py fails if one of them is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

from generator.command_line import command_line
from generator.configuration import configuration
from generator.data_format import data_format
from generator.markdown import page
from generator.python_api import python_api

DOCS = Path(__file__).resolve().parent


def pages() -> dict[str, str]:
    """Return the text of every generated page by file name."""
    texts = {
        "data-format.md": data_format(),
        "configuration.md": configuration(),
        "cli.md": command_line(),
        "api.md": python_api(),
    }
    return {name: page(text) for name, text in texts.items()}


def main() -> None:
    """Write the pages next to this file."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{DOCS.name}/{name}\n")


if __name__ == "__main__":
    main()
