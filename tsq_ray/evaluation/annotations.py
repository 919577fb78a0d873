"""Known salient segments of videos, and the share of chosen frames that lie in them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tsq_ray import storage
from tsq_ray.errors import ManifestError
from tsq_ray.quality import salient_recall

Segment = tuple[float, float]


@dataclass(frozen=True)
class Annotations:
    """Salient segments in seconds, by normalised URI, relative path or file name without suffix."""

    by_name: Mapping[str, list[Segment]]
    sha256: str

    def of(self, uri: str) -> list[Segment]:
        """Return a video's segments; empty if it is unknown.

        It is looked up by its URI, then by the longest known end of its path, then by its file name
        without the suffix.
        """
        if uri in self.by_name:
            return self.by_name[uri]
        parts = uri.split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        stem = PurePosixPath(parts[-1]).stem
        return next(
            (
                self.by_name[name]
                for name in (*ends, stem, stem.removeprefix("v_"))
                if name in self.by_name
            ),
            [],
        )


def read_annotations(uri: str) -> Annotations:
    """Read known salient segments, in one of three formats recognised by content.

    - `{"videos": {path: {"segments": [[start_s, end_s], ...]}}}`, written by
      jobs/sample_archive.py; paths are relative to the file.
    - `{"videos": [{"path", "fps", "segments": [{"start_frame", "end_frame", "kind"}, ...]}]}`:
      `end_frame` is exclusive, and only segments of kind "sal" are salient.
    - ActivityNet's JSON, `{"database": {id: {"annotations": [{"segment": [start_s, end_s]}]}}}`;
      the video's file is `id.*` or `v_id.*`.

    Raises ManifestError if the file has none of these formats.
    """
    uri = storage.normalize(uri)
    data = storage.read_bytes(uri)
    try:
        by_name = _segments(json.loads(data), storage.parent_of(uri))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"--annotations {storage.redact(uri)}: not readable as salient segments "
            f"({type(error).__name__}: {error}); expected ActivityNet JSON ({{'database': ...}}) "
            "or {'videos': ...} (docs/evaluation.md)"
        ) from None
    return Annotations(by_name, storage.sha256_of(data))


def _segments(content: Any, folder: str) -> dict[str, list[Segment]]:
    if "database" in content:
        return {
            name: [_pair(note["segment"]) for note in video["annotations"]]
            for name, video in content["database"].items()
        }
    videos = content["videos"]
    if isinstance(videos, list):
        read = {video["path"]: _from_frames(video) for video in videos}
    else:
        read = {path: [_pair(pair) for pair in video["segments"]] for path, video in videos.items()}
    return read | {
        storage.normalize(storage.join(folder, path)): segments for path, segments in read.items()
    }


def _pair(pair: Sequence[float]) -> Segment:
    start, end = pair
    return float(start), float(end)


def _from_frames(video: Mapping[str, Any]) -> list[Segment]:
    # half a frame of slack, because a frame's time is a float32 and may differ slightly
    fps = float(video["fps"])
    salient = (part for part in video["segments"] if part["kind"] == "sal")
    return [
        ((part["start_frame"] - 0.5) / fps, (part["end_frame"] - 0.5) / fps) for part in salient
    ]


def on_evidence(chosen: Iterable[tuple[str, Sequence[float]]], annotations: Annotations) -> float:
    """Return the mean over the videos of `quality.salient_recall` of their chosen frames.

    `chosen`: URI and presentation times in seconds of each video's frames. Videos without a known
    segment are left out; nan if none remain.
    """
    total, count = 0.0, 0
    for uri, pts_s in chosen:
        share = salient_recall(pts_s, annotations.of(uri))
        if not math.isnan(share):
            total, count = total + share, count + 1
    return total / count if count else math.nan
