"""Tables of results as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tsq_ray import storage
from tsq_ray.evaluation.measures import MeanOverSeeds

Cell = str | int | MeanOverSeeds | None
Unit = Literal["", "%", "G", "s", "n"]


@dataclass(frozen=True)
class TableColumn:
    """A column; `unit`: "%" for fractions, "G" GFLOPs, "s" seconds, "n" mean counts, "" text."""

    title: str
    unit: Unit = ""

    def format(self, cell: Cell) -> str:
        """Format a cell for display: mean ± half the 95 % interval over the seeds."""
        if not isinstance(cell, MeanOverSeeds):
            return "-" if cell is None else str(cell)
        if math.isnan(cell.mean):
            return "-"
        scale, digits = {"%": (100, 1), "G": (1, 2), "s": (1, 3), "n": (1, 2), "": (1, 3)}[
            self.unit
        ]
        if self.unit == "G" and cell.mean < 1:
            digits = 4
        half = cell.half
        return f"{cell.mean * scale:.{digits}f}" + (
            f" ± {half * scale:.{digits}f}" if half is not None else ""
        )


@dataclass
class Table:
    """A table, written as one Markdown and one CSV file."""

    name: str
    """File name without suffix."""
    title: str
    columns: list[TableColumn]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    """Lines below the table."""
    pictures: list[str] = field(default_factory=list)
    """Names of image files in the same folder."""

    @property
    def titles(self) -> list[str]:
        """The titles of the columns."""
        return [column.title for column in self.columns]

    def formatted_rows(self) -> list[list[str]]:
        """Return the cells as displayed, row by row."""
        return [
            [column.format(cell) for column, cell in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def markdown(self, header: Sequence[str]) -> str:
        """Return the Markdown page; `header` lines say what was measured and how."""
        lines = [self.titles, ["---"] * len(self.columns), *self.formatted_rows()]
        table = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        ]
        pictures = [f"![{self.title}]({name})" for name in self.pictures]
        parts = [f"# {self.title}", "\n".join(f"- {line}" for line in header), "\n".join(table)]
        parts += ["\n".join(f"- {note}" for note in self.notes)] * bool(self.notes) + pictures
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """Return the unrounded values as CSV.

        A column measured over seeds becomes three: the mean, half the 95 % interval, and the
        individual values joined by `;`.
        """
        text = io.StringIO()
        writer = csv.writer(text)
        measured = [
            any(isinstance(row[i], MeanOverSeeds) for row in self.rows)
            for i in range(len(self.columns))
        ]
        head: list[str] = []
        for column, figures in zip(self.columns, measured, strict=True):
            head += [
                column.title,
                *(f"{column.title} {what}" for what in ("±", "values") * figures),
            ]
        writer.writerow(head)
        for row in self.rows:
            line: list[str] = []
            for cell, figures in zip(row, measured, strict=True):
                if isinstance(cell, MeanOverSeeds):
                    half = "" if cell.half is None else repr(cell.half)
                    line += [repr(cell.mean), half, ";".join(map(repr, cell.values))]
                else:
                    line += ["" if cell is None else str(cell)] + [""] * (2 * figures)
            writer.writerow(line)
        return text.getvalue()

    def write(self, out: str, header: Sequence[str]) -> list[str]:
        """Write both files below `out` and return their names."""
        storage.write_bytes(storage.join(out, f"{self.name}.md"), self.markdown(header).encode())
        storage.write_bytes(storage.join(out, f"{self.name}.csv"), self.csv().encode())
        return [f"{self.name}.md", f"{self.name}.csv"]


def verdict(better: Cell, worse: Cell) -> str:
    """Say whether a trend of the paper held here, and by how many points.

    It holds if the mean difference is positive; "within the interval" marks a difference whose
    95 % interval includes zero.
    """
    if not isinstance(better, MeanOverSeeds) or not isinstance(worse, MeanOverSeeds):
        return "not measured"
    difference = better.minus(worse)
    mean, half = difference.mean * 100, difference.half
    if half is None:
        return f"{'held' if mean > 0 else 'not held'} ({mean:+.1f})"
    sure = "" if abs(mean) > half * 100 else ", within the interval"
    return f"{'held' if mean > 0 else 'not held'} ({mean:+.1f} ± {half * 100:.1f}{sure})"


def single(value: float | None) -> MeanOverSeeds | None:
    """Wrap a figure that was measured once."""
    return None if value is None else MeanOverSeeds((value,))


def trend_notes(pairs: Sequence[tuple[str, str, Cell, Cell]]) -> list[str]:
    """Say whether each of the paper's trends holds here.

    `pairs`: names of the better and the worse, then their cells.
    """
    return [
        f"trend in the paper: {better} above {worse}; here {verdict(first, second)}"
        for better, worse, first, second in pairs
    ]
