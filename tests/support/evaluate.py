"""Made-up features with the recogniser's logits, for tests of evaluation.

A bundle of random networks, and videos in which two frames show the class.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.archive import CLASSES
from support.bundle import NUM_FRAMES, make_bundle
from tsq_ray import schema
from tsq_ray.bundle.weights import Bundle, load_bundle
from tsq_ray.config import Config
from tsq_ray.runs.folder import FORMAT, RUN_FILE, write_json, write_part

TRAIN, VAL = 12, 9
FPS = 10.0


@dataclass(frozen=True)
class Case:
    """A bundle, features made with it, and the file of their salient segments."""

    model: str
    features: str
    annotations: str
    bundle: Bundle


def make_case(
    folder: Path, with_logits: bool = True, labelled: bool = True, **changes: Any
) -> Case:
    """Features of a video whose frames 2 and 5 show its class.

    It shows in the visual feature and in the recogniser's logits. Frame i of T is at i / 10 s.
    """
    model = make_bundle(folder / "bundle")
    bundle = load_bundle(model)
    options = {"with_logits": with_logits, "labelled": labelled}
    features = write_features(folder / "features", bundle, **options, **changes)
    videos = {f"{name}.mp4": {"segments": [[0.15, 0.25], [0.45, 0.55]]} for name, _, _ in rows_of()}
    (folder / "annotations.json").write_text(json.dumps({"videos": videos}))
    return Case(model, features, str(folder / "annotations.json"), bundle)


def rows_of() -> list[tuple[str, str, int]]:
    """(name, split, label) of each ok and labelled video."""
    numbered = [("train", n) for n in range(TRAIN)] + [("val", n) for n in range(VAL)]
    return [(f"{split}_{n}", split, n % len(CLASSES)) for split, n in numbered]


def feature_row(
    name: str, split: str | None, label: int | None, dim: int, seed: int
) -> dict[str, Any]:
    """One video.

    In every third video, slots 6 and 7 of `frame_index` repeat the frames of 0 and 1.
    """
    rng = np.random.default_rng(seed)
    visual = rng.normal(size=(NUM_FRAMES, dim))
    logits = rng.normal(scale=0.3, size=(NUM_FRAMES, len(CLASSES)))
    if label is not None:
        for frame in (2, 5):
            visual[frame, label :: len(CLASSES)] += 2
            logits[frame, label] += 4
    index = np.arange(NUM_FRAMES) % (NUM_FRAMES - 2 if seed % 3 == 0 else NUM_FRAMES)
    return {
        "video_id": f"{seed:016x}",
        "uri": f"/videos/{name}.mp4",
        "size_bytes": 100,
        "labels": None if label is None else [label],
        "split": split,
        "status": "ok",
        "warnings": [],
        "duration_s": NUM_FRAMES / FPS,
        "fps": FPS,
        "frame_index": index.astype(np.int32),
        "frame_pts_s": (index / FPS).astype(np.float32),
        "visual": visual[index].astype(np.float16),
        "object_ids": rng.integers(0, 1000, (NUM_FRAMES, 10)).astype(np.int16),
        "object_probs": rng.dirichlet(np.ones(10), NUM_FRAMES).astype(np.float16),
        "recognizer_logits": logits[index].astype(np.float16),
    }


def write_features(
    folder: Path,
    bundle: Bundle,
    with_logits: bool = True,
    splits: bool = True,
    labelled: bool = True,
    **changes: Any,
) -> str:
    """A finished run folder of 21 good videos, an unlabelled one and a failed one.

    `changes` replaces keys of `_run.json`.
    """
    dim = bundle.encoder.dim
    rows = [
        feature_row(name, split if splits else None, label, dim, seed)
        for seed, (name, split, label) in enumerate(rows_of(), 1)
    ]
    rows.append(feature_row("unlabelled", "val" if splits else None, None, dim, 90))
    rows.append(
        {
            "video_id": f"{91:016x}",
            "uri": "/videos/bad.mp4",
            "size_bytes": 1,
            "split": "val" if splits else None,
            "labels": [0],
        }
        | {"status": "failed", "error_type": "corrupt", "error_message": "bad", "warnings": []}
    )
    classes = CLASSES if labelled else []
    rows = [row if labelled else row | {"labels": None} for row in rows]
    made = schema.features_schema(NUM_FRAMES, dim, classes, len(CLASSES) if with_logits else None)
    for part in (rows[:10], rows[10:]):
        write_part(str(folder), schema.table_from_rows(part, made), "zstd")
    assert bundle.recognizer is not None
    weights = {
        "visual": bundle.encoder.backbone_hash(),
        "recognizer": bundle.recognizer.state_hash(),
    }
    config = Config(decode=bundle.decode, encoders=bundle.encoders, sampler=bundle.sampler_defaults)
    run = {
        "format": FORMAT,
        "kind": "features",
        "status": "complete",
        "counts": {"inputs": len(rows), "ok": len(rows) - 1, "failed": 1, "skipped": 0},
        "manifest": {"uri": "/manifest.parquet", "id": "m", "sha256": "0" * 64},
        "classes": classes,
        "identity": {"weights": weights},
        "weights": weights,
        "config": config.model_dump(mode="json"),
        "versions": {"av": "15"},
        "stage_seconds": {"decode": 23.0, "encode": 46.0},
        "videos_done_now": len(rows),
    } | changes
    write_json(str(folder / RUN_FILE), run)
    return str(folder)
