"""`tsq index`: list videos, join their labels and write the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from tsq_ray import storage
from tsq_ray.manifest.files import find_old, write_manifest
from tsq_ray.manifest.listing import assemble_manifest
from tsq_ray.results import IndexSummary


def build_manifest(
    sources: str | Sequence[str],
    out: str,
    *,
    labels: str | Sequence[str] = (),
    labels_format: str | None = None,
    classes: str | None = None,
    split_name: str | None = None,
    update: bool = False,
) -> IndexSummary:
    """List videos, join their labels and write the manifest to `out`.

    Raises ManifestError for invalid input, StorageError if a source cannot be listed.

    Args:
        sources: folders, `s3://` prefixes or video files.
        out: a Parquet file, or a folder of shards if it ends in `/`. A new manifest of over a
            million videos is always a folder; an update keeps the existing kind.
        labels: label files, "folders" or "none"; by default class folders, if every video lies in
            one.
        labels_format: format of the label files, by default recognised from their content
            (docs/data-format.md).
        classes: file of class names, one per line, in the order to use; by default, the order is
            alphabetical.
        split_name: split of all videos, overriding that of the labels.
        update: replace an existing manifest and count the changes since.
    """
    sources = [sources] if isinstance(sources, str) else sources
    old = find_old(out, update)
    manifest, found = assemble_manifest(sources, labels, classes, split_name, old, labels_format)
    write_manifest(manifest, out)
    examples = {reason: tuple(names) for reason, names in found.left_out_examples.items()}
    frozen = asdict(found) | {"left_out_examples": examples, "missing": tuple(found.missing)}
    return IndexSummary(out=storage.redact(out), **frozen)
