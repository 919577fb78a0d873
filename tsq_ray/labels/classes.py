"""Class files: names, one per line, in the order of their ids."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from tsq_ray import storage
from tsq_ray.errors import ManifestError

_LINE_END = re.compile(r"\r\n|\n|\r")


def composed(name: str) -> str:
    """Return `name` in Unicode's composed form (NFC); macOS writes names decomposed."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def lines_of(text: str) -> list[str]:
    """Split into lines as editors do; str.splitlines would also split names at U+2028."""
    return _LINE_END.split(text)


@dataclass(frozen=True)
class Classes:
    """Class names from a class file; `first` is the class id of the first name."""

    uri: str
    names: list[str]
    first: int = 0

    def name_of(self, number: int, place: str) -> str:
        """Return the name of a class id. An unknown id raises ManifestError naming `place`."""
        if not 0 <= number - self.first < len(self.names):
            last = self.first + len(self.names) - 1
            raise ManifestError(
                f"{place}: class id {number} is out of range; {storage.redact(self.uri)} "
                f"has {len(self.names)} classes, {self.first} to {last}"
            )
        return self.names[number - self.first]


def read_classes(uri: str) -> Classes:
    """Read class names, one per line, in the order of their ids.

    Ids count from 0; if the file numbers its lines from 0 or 1, those numbers are the ids.
    """
    lines = lines_of(storage.read_text(storage.normalize(uri)))
    names = [composed(line.strip()) for line in lines if line.strip()]
    numbered = [re.match(r"(\d+)[\s,:;]+(\S.*)$", name) for name in names]
    first = 0
    if numbered and numbered[0] and numbered[0][1] in ("0", "1"):
        start = int(numbered[0][1])
        if all(match and int(match[1]) == number for number, match in enumerate(numbered, start)):
            names, first = [match[2] for match in numbered if match], start
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count != 1:
        problem = (
            f"class name {name!r} appears {count} times"
            if names
            else "no class names; expected one per line"
        )
        raise ManifestError(f"{storage.redact(uri)}: {problem}")
    return Classes(uri, names, first)
