"""Which of the videos found do the label files name? Entries -> classes and split by URI, and what is missing."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field

from tsq_ray import storage
from tsq_ray.errors import ManifestError
from tsq_ray.labels.formats import READERS, SPLITS, Classes, LabelFile, Reader, recognise, stem_of

Source = tuple[str, str]
"""(source that was listed, URI of a file found below it)."""


@dataclass
class Labels:
    """Class names and split by URI; the videos that the files name and that were not found; which files these were."""

    by_uri: dict[str, tuple[tuple[str, ...], str | None]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    origin: str = "none"


def read_labels(labels: Sequence[str], files: Sequence[Source], classes: Classes | None = None, layout: str | None = None) -> Labels:
    """The labels of `files` from label files; from class folders where none is given and every video lies in one.

    `labels`: label files, or one of "folders" and "none". `layout`: the name of their format; None: by each file's content.
    Raises ManifestError.
    """
    words = [word for word in ("none", "folders") if word in labels]
    if layout is not None and (words or not labels):
        raise ManifestError(f"--labels-format {layout}: there is no label file to read; name one with --labels FILE")
    if words and len(labels) > 1:
        raise ManifestError(f"--labels {words[0]}: cannot be combined with other labels, got {', '.join(map(storage.redact, labels))}")
    if words == ["none"]:
        return Labels(origin="none (--labels none)")
    if words or not labels:
        return _from_folders(files, asked_for=bool(words))
    videos, found, places, origins = _Videos(files), Labels(), dict[str, str](), []
    for uri in labels:
        file = LabelFile(storage.normalize(uri), storage.read_text(storage.normalize(uri)), classes)
        name = layout or recognise(file)
        if name not in READERS:
            raise ManifestError(f"--labels-format {name}: no such format; there is: {', '.join(READERS)}")
        _join(file, READERS[name], videos, found, places)
        origins.append(f"{storage.redact(uri)} ({name})")
    found.origin = ", ".join(origins)
    return found


def _from_folders(files: Sequence[Source], asked_for: bool) -> Labels:
    found = Labels(origin="class folders")
    for source, uri in files:
        parts = uri[len(source) :].strip("/").split("/") if uri.startswith(source) else []
        if len(parts) == 2:
            found.by_uri[uri] = ((_spaces(parts[0]),), None)
        elif len(parts) == 3 and parts[0].lower() in SPLITS:
            found.by_uri[uri] = ((_spaces(parts[1]),), parts[0])
        else:
            break
    if len(found.by_uri) == len(files) and len({labels for labels, _ in found.by_uri.values()}) > 1:
        return found
    if asked_for:
        raise ManifestError(
            "--labels folders: some videos do not lie in a class folder (SOURCE/class/video or SOURCE/split/class/video), or all in one"
        )
    return Labels()


def _spaces(folder: str) -> str:
    return folder.replace("_", " ").strip()


def _id_of(name: str) -> str:
    """ActivityNet's files are named v_ID.* or ID.*."""
    return stem_of(name).removeprefix("v_")


class _Videos:
    """The videos found, looked up as label files name them."""

    def __init__(self, files: Sequence[Source]) -> None:
        self.uris = {uri for _, uri in files}
        self.folders = list(dict.fromkeys(source for source, _ in files))
        self._by_name: dict[str, list[str]] = {}
        self._by_id: dict[str, list[str]] = {}
        for uri in sorted(self.uris):
            name = storage.name_of(uri)
            for key in dict.fromkeys((name, stem_of(name))):
                self._by_name.setdefault(key, []).append(uri)
            self._by_id.setdefault(_id_of(name), []).append(uri)

    def at(self, path: str, folder: str) -> list[str]:
        """The video at a path relative to `folder`, or at a URI."""
        place = path if not storage.is_local(path) or path.startswith(("/", "~")) else storage.join(folder, path)
        # a link to a video is listed under its own name, a link to a folder under the folder's
        return [uri for uri in dict.fromkeys((place, storage.normalize(place))) if uri in self.uris][:1]

    def named(self, keys: Sequence[str]) -> list[str]:
        """The videos, in whatever folders, that have the first of these ids that some have."""
        return next((self._by_id[_id_of(key)] for key in keys if _id_of(key) in self._by_id), [])

    def like(self, path: str, folder: str) -> list[str]:
        """The video at a path relative to `folder` or to a source, else those whose own paths end so, with any suffix or none."""
        if not storage.is_local(path) or path.startswith(("/", "~")):
            return self.at(path, folder)
        path = posixpath.normpath(path)
        for base in (folder, *self.folders):
            if (place := storage.join(base, path)) in self.uris:
                return [place]
        parent, name = posixpath.split(path)
        for same in (self._by_name.get(name), self._by_name.get(stem_of(name)), self._by_id.get(_id_of(name))):
            found = [uri for uri in same or () if not parent or storage.parent_of(uri).endswith("/" + parent)]
            if found:
                return found
        return []


def _join(file: LabelFile, reader: Reader, videos: _Videos, found: Labels, places: dict[str, str]) -> None:
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
            raise ManifestError(f"{place}: {entry.name} is {len(uris)} of the videos found, {uris[0]} and {uris[1]}; name its folder too")
        for uri in uris:
            now = (entry.labels, entry.split)
            before = found.by_uri.setdefault(uri, now)
            if (set(before[0]), before[1]) != (set(now[0]), now[1]):
                raise ManifestError(f"{place}: {entry.name} has other labels or another split than in {places[uri]}; keep one of the two")
            places.setdefault(uri, place)
    if len(missing) == len(entries):
        raise ManifestError(
            f"{file.shown}: none of its {len(entries)} videos is among the {len(videos.uris)} videos found (first: {missing[:1]}); "
            "a path is relative to the folder of the label file (in a list also to a source), an ID stands for ID.* or v_ID.*"
        )
    found.missing += missing
