"""The chosen frames as requests to a batch service: the input files of OpenAI's Batch API."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from tsq_ray import chat, storage
from tsq_ray.errors import RunError
from tsq_ray.reporting.tables import csv_writer

MAX_BYTES, MAX_REQUESTS = 200_000_000, 50_000
"""Limits of an input file (OpenAI's API reference, batches)."""
VIDEOS_FILE = "openai_batch_videos.csv"
VIDEOS_FIELDS = ("custom_id", "file", "uri", "selected_slot", "selected_pts_s")


def batch_file(number: int) -> str:
    """Return the name of the input file `number`, from 1."""
    return f"openai_batch_{number:04d}.jsonl"


@dataclass(frozen=True)
class BatchQuestion:
    """The question about every video; `prompt` is a template with `chat.FIELDS`."""

    model: str
    prompt: str
    classes: Sequence[str]
    multi: bool


class BatchWriter:
    """Writes one request per video into numbered files; created by `batch_writer`."""

    def __init__(
        self,
        out: str,
        question: BatchQuestion,
        add_video: Callable[[Mapping[str, Any]], None],
        max_bytes: int,
        max_requests: int,
    ) -> None:
        self.files = self.requests = 0
        self.open_file = contextlib.ExitStack()
        """Holds the file being written, which is published when this closes."""
        self._out, self._question, self._add_video = out, question, add_video
        self._max_bytes, self._max_requests = max_bytes, max_requests
        self._bytes = self._requests_in_file = 0
        self._file: BinaryIO | None = None

    def add(
        self, row: Mapping[str, Any], slots: Sequence[int], frames_jpeg: Sequence[bytes | str]
    ) -> None:
        """Add a video's request: its chosen `slots` and their frames, as JPEG or URLs.

        Raises RunError if the request alone exceeds the size limit of a file.
        """
        times = [float(row["frame_pts_s"][slot]) for slot in slots]
        question = self._question
        body = chat.request_body(
            question.model,
            question.prompt,
            question.classes,
            frames_jpeg,
            times,
            multi=question.multi,
        )
        request = {
            "custom_id": row["video_id"],
            "method": "POST",
            "url": chat.ENDPOINT,
            "body": body,
        }
        uri = storage.redact(row["uri"])
        file = self._file_for(json.dumps(request).encode() + b"\n", uri)
        self._add_video(
            {
                "custom_id": row["video_id"],
                "file": file,
                "uri": uri,
                "selected_slot": "|".join(map(str, slots)),
                "selected_pts_s": "|".join(f"{time:.3f}" for time in times),
            }
        )

    def _file_for(self, line: bytes, uri: str) -> str:
        """Write a line, into the next file if this one is full; return the file's name."""
        if len(line) > self._max_bytes:
            raise RunError(
                f"{uri}: its request has {len(line)} bytes; a batch file may have at most "
                f"{self._max_bytes}; export smaller frames (--size) or their URLs (--frame-urls)"
            )
        full = self._bytes + len(line) > self._max_bytes
        if self._file is None or full or self._requests_in_file == self._max_requests:
            self.open_file.close()
            self.files += 1
            self._bytes = self._requests_in_file = 0
            place = storage.join(self._out, batch_file(self.files))
            self._file = self.open_file.enter_context(storage.open_write(place))
        self._file.write(line)
        self._bytes += len(line)
        self._requests_in_file += 1
        self.requests += 1
        return batch_file(self.files)


@contextlib.contextmanager
def batch_writer(
    out: str, question: BatchQuestion, max_bytes: int = MAX_BYTES, max_requests: int = MAX_REQUESTS
) -> Iterator[BatchWriter]:
    """Write numbered files of requests below `out`, and a CSV of the videos.

    A file is published once it is complete. Higher-numbered files of an earlier export are removed.
    """
    place = storage.join(out, VIDEOS_FILE)
    with storage.open_write(place) as file:
        writer = BatchWriter(
            out, question, csv_writer(file, VIDEOS_FIELDS), max_bytes, max_requests
        )
        with writer.open_file:
            yield writer
    stale = writer.files + 1
    while storage.exists(place := storage.join(out, batch_file(stale))):
        storage.remove(place)
        stale += 1
