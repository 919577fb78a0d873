"""Manifests: one row per video, in one Parquet file or a folder of shards."""

from __future__ import annotations

from tsq_ray.manifest.build import build_manifest
from tsq_ray.manifest.files import MANIFEST_FILE, find_old, read_manifest, write_manifest
from tsq_ray.manifest.listing import Findings, assemble_manifest, list_sources, video_id
from tsq_ray.manifest.videos import (
    Manifest,
    VideoRef,
    VideoRows,
    choose_split,
    describe_splits,
    same_contents,
)

__all__ = [
    "MANIFEST_FILE",
    "Findings",
    "Manifest",
    "VideoRef",
    "VideoRows",
    "assemble_manifest",
    "build_manifest",
    "choose_split",
    "describe_splits",
    "find_old",
    "list_sources",
    "read_manifest",
    "same_contents",
    "video_id",
    "write_manifest",
]
