"""An archive, a run over it that suffers a fault, and what must hold afterwards."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.archive import Archive, make_archive
from support.cluster import SETTINGS, Ended, read_rows, tsq, upload, visible_parts

ONE_AT_A_TIME = [
    "--set",
    "output.rows_per_file=2",
    "--set",
    "resources.batch_size=1",
    "--set",
    "resources.workers=1",
]
INPUTS = 18
BAD = {"not_video": 2, "truncated": 1}
"""The files of the archive that are bad in any case."""
PATIENCE_S = 600.0


@dataclass
class Site:
    """18 videos, 3 of them bad, their manifest, and the output of the features."""

    archive: Archive
    manifest: str
    out: str
    settings: Path
    options: list[str] = field(default_factory=lambda: list(ONE_AT_A_TIME))

    @property
    def argv(self) -> list[str]:
        """The command, the same before and after the fault."""
        return [
            "extract",
            self.manifest,
            "--out",
            self.out,
            "--config",
            str(self.settings),
            *self.options,
        ]

    @property
    def parts(self) -> set[str]:
        """Names that a reader of the output sees."""
        return visible_parts(self.out)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Video's name in the archive -> its row; fails if a video has two."""
        rows = read_rows(self.out).to_pylist()
        found = {row["uri"].partition("/videos/")[2]: row for row in rows}
        assert len(found) == len(rows), "a video has two rows"
        return found


def make_site(folder: Path, base: str | None = None, out: str | None = None) -> Site:
    """Make the site.

    `base`: the place of the archive and the manifest, e.g. an s3:// prefix (default: `folder`).
    """
    archive = make_archive(folder / "videos")
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS)
    if base is not None:
        upload(archive.root, f"{base}/videos")
    base = base or str(folder)
    site = Site(archive, f"{base}/manifest.parquet", out or f"{base}/features", settings)
    index(site, base)
    return site


def index(site: Site, base: str, *options: str) -> Any:
    """Run `tsq index` over the site's videos."""
    return tsq("index", f"{base}/videos", "--out", site.manifest, "--json", *options).json


def adds_up(site: Site, failed: Mapping[str, int] = BAD) -> None:
    """Check that inputs = ok + failed + skipped with these failures.

    One row per video, and no partial file is visible.
    """
    found = tsq("verify", site.out, "--json").json
    counts = found["counts"]
    assert found["problems"] == []
    unexpected = {
        name: row["error_message"]
        for name, row in site.rows().items()
        if row["error_type"] not in {*failed, None}
    }
    assert (counts["failed_by_type"], unexpected) == (failed, {})
    assert (counts["inputs"], counts["failed"], counts["skipped"]) == (
        INPUTS,
        sum(failed.values()),
        0,
    )
    assert counts["inputs"] == counts["ok"] + counts["failed"] + counts["skipped"]
    assert len(site.rows()) == INPUTS
    assert all(name.startswith("part-") and name.endswith(".parquet") for name in site.parts), (
        site.parts
    )


def one_line(ended: Ended) -> str:
    """The error of a failed run: one line without a traceback."""
    assert ended.code == 1, (ended.code, ended.err)
    assert ended.out == ""
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.err
    assert "Traceback" not in ended.err
    return errors[0]


class Started:
    """Run `tsq ARGV` in a thread of this process, on the session's Ray."""

    def __init__(self, argv: list[str]) -> None:
        self._ended: list[Ended] = []
        self._thread = threading.Thread(target=lambda: self._ended.append(tsq(*argv)), daemon=True)
        self._thread.start()

    def wait_until(self, ready: Callable[[], Any]) -> None:
        """Wait for `ready`; fails if the command ends first."""
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert self._thread.is_alive(), f"ended too early: {self._ended}"
            assert time.monotonic() < deadline, "never became ready"
            time.sleep(0.002)

    def ended(self) -> Ended:
        self._thread.join(PATIENCE_S)
        assert self._ended, "the command does not end"
        return self._ended[0]


def readers_of(path: Path) -> list[int]:
    """The processes that hold this file open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            if any(os.readlink(link) == str(path) for link in folder.iterdir()):
                found.append(int(folder.parent.name))
    return found


def mounted(folder: Path, size: str) -> str | None:
    """Mount a small file system; return why that is impossible here, or None."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stderr.strip() or "mount failed") if done.returncode else None
