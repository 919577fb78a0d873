"""Match the entries of label files with the listed videos: classes and split by URI."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from tsq_ray import storage
from tsq_ray.errors import ManifestError
from tsq_ray.labels.classes import Classes, composed
from tsq_ray.labels.entries import SPLITS, LabelFile, canonical_split, stem_of
from tsq_ray.labels.formats import READERS, Reader, recognise

ListedFile = tuple[str, str]
"""(listed source, URI of a file found below it)."""
VideoLabels = tuple[tuple[str, ...], str | None]
"""(class names, split) of a video."""


@dataclass
class Labels:
    """Class names and split by URI, labelled videos that were not found, origin of the labels."""

    by_uri: dict[str, VideoLabels] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    origin: str = "none"


def read_labels(
    labels: Sequence[str],
    files: Sequence[ListedFile],
    classes: Classes | None = None,
    format_name: str | None = None,
) -> Labels:
    """Label `files` from label files, or from class folders.

    `labels`: label files, or one of "folders" and "none"; if empty, class folders are used if
    every video lies in one. `format_name`: the files' format; None: recognised from each file's
    content. Raises ManifestError.
    """
    keywords = [word for word in ("none", "folders") if word in labels]
    if format_name is not None and (keywords or not labels):
        raise ManifestError(
            f"--labels-format {format_name}: no label file to read; name one with --labels FILE"
        )
    if keywords and len(labels) > 1:
        raise ManifestError(
            f"--labels {keywords[0]}: cannot be combined with other labels, "
            f"got {', '.join(map(storage.redact, labels))}"
        )
    if keywords == ["none"]:
        return Labels(origin="none (--labels none)")
    if keywords or not labels:
        return _from_folders(files, asked_for=bool(keywords))
    videos, found, places, origins = _Videos(files), Labels(), dict[str, str](), []
    for uri in labels:
        file = LabelFile(storage.normalize(uri), storage.read_text(storage.normalize(uri)), classes)
        name = format_name or recognise(file)
        if name not in READERS:
            raise ManifestError(
                f"--labels-format {name}: no such format; allowed: {', '.join(READERS)}"
            )
        _join(file, READERS[name], videos, found, places)
        origins.append(f"{storage.redact(uri)} ({name})")
    found.origin = ", ".join(origins)
    return found


def _from_folders(files: Sequence[ListedFile], asked_for: bool) -> Labels:
    found = Labels(origin="class folders")
    folders = dict[VideoLabels, VideoLabels]()  # shares one object among all videos of a folder
    for source, uri in files:
        parts = uri[len(source) :].strip("/").split("/") if uri.startswith(source) else []
        if len(parts) == 2:
            label: VideoLabels = ((_class_of(parts[0]),), None)
        elif len(parts) == 3 and parts[0].lower() in SPLITS:
            label = ((_class_of(parts[1]),), canonical_split(parts[0]))
        else:
            break
        found.by_uri[uri] = folders.setdefault(label, label)
    if len(found.by_uri) == len(files) and len({labels for labels, _ in found.by_uri.values()}) > 1:
        return found
    if asked_for:
        raise ManifestError(
            "--labels folders: some videos are not in a class folder "
            "(SOURCE/class/video or SOURCE/split/class/video), or all are in the same one"
        )
    return Labels()


def _class_of(folder: str) -> str:
    """Return the class that a folder names: each `_` between words is a blank.

    A `_` at the start or the end belongs to the name: `_other` and `other` are two classes.
    """
    return composed(re.sub(r"(?<=[^_])_+(?=[^_])", lambda gap: " " * len(gap[0]), folder.strip()))


def id_of(name: str) -> str:
    """Return the id in a file name; ActivityNet names files v_ID.* or ID.*."""
    return stem_of(name).removeprefix("v_")


class _Names:
    """URIs by name: an exact match, else names that are equal in Unicode's composed form."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._exact: dict[str, list[str]] = {}
        self._composed: dict[str, list[str]] = {}
        for name, uri in pairs:
            self._exact.setdefault(name, []).append(uri)
            if not name.isascii():
                self._composed.setdefault(composed(name), []).append(uri)

    def find(self, name: str) -> list[str]:
        """Return the URIs of this name; empty if no video has it."""
        return self._exact.get(name) or self._composed.get(composed(name), [])


class _Videos:
    """Index of the listed videos by the names that label files use."""

    def __init__(self, files: Sequence[ListedFile]) -> None:
        self.uris = {uri for _, uri in files}
        self.folders = list(dict.fromkeys(source for source, _ in files))
        ordered = sorted(self.uris)
        self._composed: dict[str, list[str]] = {}
        for uri in ordered:
            if not uri.isascii():
                self._composed.setdefault(composed(uri), []).append(uri)
        self._by_name = _Names(
            (key, uri)
            for uri in ordered
            for key in dict.fromkeys((storage.name_of(uri), stem_of(storage.name_of(uri))))
        )
        self._real_path = lru_cache(maxsize=4096)(os.path.realpath)
        self._by_id = _Names((id_of(storage.name_of(uri)), uri) for uri in ordered)

    def _uris_of(self, uri: str) -> list[str]:
        return [uri] if uri in self.uris else self._composed.get(composed(uri), [])

    @cached_property
    def _by_real_folder(self) -> _Names:
        """Local videos listed through symlinks, by real folder path and name."""
        real = (
            (self._in_real_folder(uri), uri) for uri in sorted(self.uris) if storage.is_local(uri)
        )
        return _Names((path, uri) for path, uri in real if path != uri)

    def _in_real_folder(self, path: str) -> str:
        folder, name = posixpath.split(path)
        return storage.join(self._real_path(folder), name)

    def at(self, path: str, folder: str) -> list[str]:
        """Return the video at a path relative to `folder`, or at a URI."""
        # join keeps absolute paths; ~ may be a home folder, but file names can begin with it too
        place = storage.join(folder, path) if storage.is_local(path) else path
        home = [storage.normalize(path)] if path.startswith("~") else []
        for spelling in (place, storage.normalize(place), *home):
            if found := self._uris_of(spelling):
                return found
        if not storage.is_local(place) or "\0" in place:
            return []
        # the listing may use a symlink's path and the label file the real one, or vice versa
        real = self._in_real_folder(storage.normalize(place))
        return self._uris_of(real) or self._by_real_folder.find(real)

    def by_ids(self, keys: Sequence[str]) -> list[str]:
        """Return the videos, in any folder, named after the first of these ids that matches."""
        return next((found for key in keys if (found := self._by_id.find(id_of(key)))), [])

    def matching(self, path: str, folder: str) -> list[str]:
        """Return the video at a path relative to `folder` or to a source.

        Otherwise return the videos whose own paths end with it, with any suffix or none.
        """
        if not storage.is_local(path) or path.startswith(("/", "~")):
            return self.at(path, folder)
        path = posixpath.normpath(path)
        for base in (folder, *self.folders):
            place = storage.join(base, path)
            if path.startswith("../"):
                scheme, separator, rest = place.rpartition("://")
                place = f"{scheme}{separator}{posixpath.normpath(rest)}"
            if found := self._uris_of(place):
                return found
        parent, name = posixpath.split(path)
        end = composed(f"/{parent}") if parent else ""
        for candidates in (
            self._by_name.find(name),
            self._by_name.find(stem_of(name)),
            self._by_id.find(id_of(name)),
        ):
            found = [uri for uri in candidates if composed(storage.parent_of(uri)).endswith(end)]
            if found:
                return found
        return []


def _first(found: Iterable[list[str]]) -> list[str]:
    """Return the first list that is not empty; empty if all are."""
    return next(filter(None, found), [])


def _join(
    file: LabelFile, reader: Reader, videos: _Videos, found: Labels, places: dict[str, str]
) -> None:
    """Add the entries of one file to `found` under the URIs of their videos.

    `places` records which line labelled each video.
    """
    entries = reader.read(file)
    find = videos.matching if reader.searches_sources else videos.at
    missing = []
    for entry in entries:
        place = f"{file.shown} {entry.line}"
        uris = (
            videos.by_ids(entry.keys)
            if entry.keys
            else _first(
                find(spelling, file.folder) for spelling in (entry.name, *entry.alternatives)
            )
        )
        name = storage.redact(entry.name)
        shown = name if name.isprintable() else repr(name)
        if not uris:
            missing.append(name)
        elif len(uris) > 1 and not entry.keys:
            raise ManifestError(
                f"{place}: {shown} matches {len(uris)} videos, {uris[0]} and {uris[1]}; "
                "add its folder to the name"
            )
        for uri in uris:
            now = (tuple(dict.fromkeys(map(composed, entry.labels))), entry.split)
            before = found.by_uri.setdefault(uri, now)
            if (set(before[0]), before[1]) != (set(now[0]), now[1]):
                raise ManifestError(
                    f"{place}: {shown} has other labels or another split than in "
                    f"{places[uri]}; keep one of the two"
                )
            places.setdefault(uri, place)
    if len(missing) == len(entries):
        raise ManifestError(
            f"{file.shown}: none of its {len(entries)} videos is among the {len(videos.uris)} "
            f"videos found (first: {missing[:1]}); a path is relative to the folder of the label "
            "file (in a list also to a source), an ID stands for ID.* or v_ID.*"
        )
    found.missing += missing
