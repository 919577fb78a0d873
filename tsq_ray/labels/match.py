"""Which of the videos found do the label files name? Entries -> classes and split by URI, and what is missing."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from tsq_ray import storage
from tsq_ray.errors import ManifestError
from tsq_ray.labels.formats import (
    READERS,
    SPLITS,
    Classes,
    LabelFile,
    Reader,
    composed,
    recognise,
    split_named,
    stem_of,
)

ListedFile = tuple[str, str]
"""(source that was listed, URI of a file found below it)."""
Named = tuple[tuple[str, ...], str | None]
"""Class names and split of a video."""


@dataclass
class Labels:
    """Class names and split by URI; the videos that the files name and that were not found; which files these were."""

    by_uri: dict[str, Named] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    origin: str = "none"


def read_labels(
    labels: Sequence[str],
    files: Sequence[ListedFile],
    classes: Classes | None = None,
    layout: str | None = None,
) -> Labels:
    """The labels of `files` from label files; from class folders where none is given and every video lies in one.

    `labels`: label files, or one of "folders" and "none". `layout`: the name of their format; None: by each file's content.
    Raises ManifestError.
    """
    words = [word for word in ("none", "folders") if word in labels]
    if layout is not None and (words or not labels):
        raise ManifestError(
            f"--labels-format {layout}: there is no label file to read; name one with --labels FILE"
        )
    if words and len(labels) > 1:
        raise ManifestError(
            f"--labels {words[0]}: cannot be combined with other labels, got {', '.join(map(storage.redact, labels))}"
        )
    if words == ["none"]:
        return Labels(origin="none (--labels none)")
    if words or not labels:
        return _from_folders(files, asked_for=bool(words))
    videos, found, places, origins = _Videos(files), Labels(), dict[str, str](), []
    for uri in labels:
        file = LabelFile(storage.normalize(uri), storage.read_text(storage.normalize(uri)), classes)
        name = layout or recognise(file)
        if name not in READERS:
            raise ManifestError(
                f"--labels-format {name}: no such format; there is: {', '.join(READERS)}"
            )
        _join(file, READERS[name], videos, found, places)
        origins.append(f"{storage.redact(uri)} ({name})")
    found.origin = ", ".join(origins)
    return found


def _from_folders(files: Sequence[ListedFile], asked_for: bool) -> Labels:
    found, folders = (
        Labels(origin="class folders"),
        dict[Named, Named](),
    )  # one object for all videos of a folder
    for source, uri in files:
        parts = uri[len(source) :].strip("/").split("/") if uri.startswith(source) else []
        if len(parts) == 2:
            named: Named = ((_class_of(parts[0]),), None)
        elif len(parts) == 3 and parts[0].lower() in SPLITS:
            named = ((_class_of(parts[1]),), split_named(parts[0]))
        else:
            break
        found.by_uri[uri] = folders.setdefault(named, named)
    if len(found.by_uri) == len(files) and len({labels for labels, _ in found.by_uri.values()}) > 1:
        return found
    if asked_for:
        raise ManifestError(
            "--labels folders: some videos do not lie in a class folder (SOURCE/class/video or SOURCE/split/class/video), or all in one"
        )
    return Labels()


def _class_of(folder: str) -> str:
    return composed(folder.replace("_", " ").strip())


def _id_of(name: str) -> str:
    """ActivityNet's files are named v_ID.* or ID.*."""
    return stem_of(name).removeprefix("v_")


class _Names:
    """Which URIs go by a name. Where none has its exact spelling: those that look the same."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._exact: dict[str, list[str]] = {}
        self._composed: dict[str, list[str]] = {}
        for name, uri in pairs:
            self._exact.setdefault(name, []).append(uri)
            if not name.isascii():
                self._composed.setdefault(composed(name), []).append(uri)

    def find(self, name: str) -> list[str]:
        """The URIs, none where no video goes by that name."""
        return self._exact.get(name) or self._composed.get(composed(name), [])


class _Videos:
    """The videos found, looked up as label files name them."""

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
        self._by_id = _Names((_id_of(storage.name_of(uri)), uri) for uri in ordered)

    def _spelled(self, uri: str) -> list[str]:
        return [uri] if uri in self.uris else self._composed.get(composed(uri), [])

    @cached_property
    def _by_real_folder(self) -> _Names:
        """Local videos listed through links, by their folders' real paths."""
        real = (
            (self._in_real_folder(uri), uri) for uri in sorted(self.uris) if storage.is_local(uri)
        )
        return _Names((path, uri) for path, uri in real if path != uri)

    def _in_real_folder(self, path: str) -> str:
        folder, name = posixpath.split(path)
        return storage.join(self._real_path(folder), name)

    def at(self, path: str, folder: str) -> list[str]:
        """The video at a path relative to `folder`, or at a URI."""
        # join leaves an absolute path alone; a file's name may begin with ~, too
        place = storage.join(folder, path) if storage.is_local(path) else path
        home = [storage.normalize(path)] if path.startswith("~") else []
        for spelling in (place, storage.normalize(place), *home):
            if found := self._spelled(spelling):
                return found
        if not storage.is_local(place) or "\0" in place:
            return []
        # a folder may be listed under a link's name and be written by its own, or the other way
        real = self._in_real_folder(storage.normalize(place))
        return self._spelled(real) or self._by_real_folder.find(real)

    def named(self, keys: Sequence[str]) -> list[str]:
        """The videos, in whatever folders, that have the first of these ids that some have."""
        return next((found for key in keys if (found := self._by_id.find(_id_of(key)))), [])

    def like(self, path: str, folder: str) -> list[str]:
        """The video at a path relative to `folder` or to a source, else those whose own paths end so, with any suffix or none."""
        if not storage.is_local(path) or path.startswith(("/", "~")):
            return self.at(path, folder)
        path = posixpath.normpath(path)
        for base in (folder, *self.folders):
            if found := self._spelled(storage.join(base, path)):
                return found
        parent, name = posixpath.split(path)
        end = composed(f"/{parent}") if parent else ""
        for same in (
            self._by_name.find(name),
            self._by_name.find(stem_of(name)),
            self._by_id.find(_id_of(name)),
        ):
            found = [uri for uri in same if composed(storage.parent_of(uri)).endswith(end)]
            if found:
                return found
        return []


def _join(
    file: LabelFile, reader: Reader, videos: _Videos, found: Labels, places: dict[str, str]
) -> None:
    """Put the entries of one file under the URIs of their videos. `places`: which line labelled a video."""
    entries = reader.read(file)
    find = videos.like if reader.anywhere else videos.at
    missing = []
    for entry in entries:
        place = f"{file.shown} {entry.line}"
        uris = videos.named(entry.keys) if entry.keys else find(entry.name, file.folder)
        if not uris:
            missing.append(entry.name)
        elif len(uris) > 1 and not entry.keys:
            raise ManifestError(
                f"{place}: {entry.name} is {len(uris)} of the videos found, {uris[0]} and {uris[1]}; name its folder too"
            )
        for uri in uris:
            now = (tuple(dict.fromkeys(map(composed, entry.labels))), entry.split)
            before = found.by_uri.setdefault(uri, now)
            if (set(before[0]), before[1]) != (set(now[0]), now[1]):
                raise ManifestError(
                    f"{place}: {entry.name} has other labels or another split than in {places[uri]}; keep one of the two"
                )
            places.setdefault(uri, place)
    if len(missing) == len(entries):
        raise ManifestError(
            f"{file.shown}: none of its {len(entries)} videos is among the {len(videos.uris)} videos found (first: {missing[:1]}); "
            "a path is relative to the folder of the label file (in a list also to a source), an ID stands for ID.* or v_ID.*"
        )
    found.missing += missing
