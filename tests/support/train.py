"""For tests of training: made-up features as arrays and as a run folder, and its checkpoints."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsq_ray import schema, storage
from tsq_ray.bundle.weights import load_network
from tsq_ray.config import Config, TrainConfig, validate_config
from tsq_ray.errors import StorageError
from tsq_ray.model import TSQShape
from tsq_ray.rows import OBJECTS, RECOGNIZER, VISUAL
from tsq_ray.runs.folder import FORMAT, RUN_FILE, write_json, write_part

VIDEOS, FRAMES, DIM, CLASSES, TEXT_DIM = 22, 4, 6, 3, 5
ENCODER: dict[str, Any] = {"model": "test_efficientnet", "size": 32}
NAMES = ["cat", "dog", "bird"]
_WORDS = {
    word: np.random.default_rng(number).normal(size=TEXT_DIM)
    for number, word in enumerate([*NAMES, "fish", "bear", "house"])
}
SHAPE = TSQShape(
    CLASSES, visual_dim=DIM, text_dim=TEXT_DIM, dim_visual=8, dim_textual=8, dropout=0.1
)


def config_with(**settings: Any) -> TrainConfig:
    """Six steps per epoch, the last of two videos."""
    return TrainConfig(
        **(
            {"epochs": 4, "batch_size": 4, "dim_visual": 8, "dim_textual": 8, "checkpoint_every": 1}
            | settings
        )
    )


def make_arrays(dim: int = DIM) -> dict[str, np.ndarray]:
    """The input of a training; one frame of each video carries its class."""
    random = np.random.default_rng(5)
    labels = np.arange(VIDEOS) % CLASSES
    visual = random.normal(size=(VIDEOS, FRAMES, dim))
    visual[np.arange(VIDEOS), labels, labels] += 3
    return {
        "visual": visual.astype(np.float16),
        "object_ids": random.integers(0, 1000, (VIDEOS, FRAMES, 10)).astype(np.int16),
        "object_probs": random.dirichlet(np.ones(10), (VIDEOS, FRAMES)).astype(np.float16),
        "targets": np.eye(CLASSES, dtype=bool)[labels],
    }


def make_vocabulary() -> torch.Tensor:
    """[1000, Dt]."""
    return torch.randn(1000, TEXT_DIM, generator=torch.Generator().manual_seed(3))


def make_start() -> dict[str, torch.Tensor | None]:
    """Initial queries."""
    return {"visual": torch.eye(CLASSES, DIM), "textual": None}


def write_features(uri: str, arrays: dict[str, np.ndarray], words: Path) -> Config:
    """A finished extraction that holds these videos as its split `train`; returns its settings.

    In three parts, out of order, among rows that do not count. Its encoders are tiny random
    networks, its language model the word vectors written to `words`. The arrays may hold a
    recogniser's `recognizer_logits`, whose sha256 is then "teacher".
    """
    words.write_text(
        "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in _WORDS.items())
    )
    encoders = {
        name: ENCODER | {"weights": f"random:{seed}"}
        for seed, name in enumerate(("visual", "objects"))
    }
    encoders["text"] = {"weights": str(words)}
    config = validate_config({"decode": {"num_frames": FRAMES}, "encoders": encoders})
    tensors = {name: array for name, array in arrays.items() if name != "targets"}
    rows: list[dict[str, Any]] = []
    for number, target in enumerate(arrays["targets"]):
        values = {name: array[number] for name, array in tensors.items()}
        rows.append(_row(f"{number}") | {"labels": np.flatnonzero(target).tolist()} | values)
    spare = {name: np.ones_like(array[0]) for name, array in tensors.items()}
    rows += [_row("other") | {"labels": [0], "split": "val"} | spare, _row("bare") | spare]
    rows.append(_row("broken") | {"labels": [0], "status": "failed", "error_type": "corrupt"})
    np.random.default_rng(2).shuffle(rows)  # type: ignore[arg-type]
    logits = tensors.get("recognizer_logits")
    num_logits = logits.shape[2] if logits is not None else None
    arrow = schema.features_schema(FRAMES, arrays["visual"].shape[2], NAMES, num_logits=num_logits)
    for start in range(3):
        write_part(uri, schema.table_from_rows(rows[start::3], arrow), "none")
    weights = {
        VISUAL: load_network(config.encoders.visual, with_head=False).backbone_hash(),
        OBJECTS: load_network(config.encoders.objects, with_head=True).state_hash(),
        RECOGNIZER: "teacher" if logits is not None else None,
    }
    run = {
        "format": FORMAT,
        "kind": "features",
        "classes": NAMES,
        "config": config.model_dump(mode="json"),
        "weights": weights,
    }
    write_json(f"{uri}/{RUN_FILE}", run | {"identity": {}, "manifest": {"sha256": "0"}})
    return config


def video_id(name: str) -> str:
    """Id of the video that `write_features` writes for the row `name` of its arrays."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _row(name: str) -> dict[str, Any]:
    return {
        "video_id": video_id(name),
        "uri": f"/videos/{name}.mp4",
        "size_bytes": 1,
        "split": "train",
        "status": "ok",
        "warnings": [],
        "frame_index": np.arange(FRAMES, dtype=np.int32),
    }


def registered_checkpoints(work: str) -> set[str]:
    """Names of the checkpoints that Ray Train would resume the training in `work` from.

    A checkpoint's folder exists before it is registered.
    """
    try:
        content = json.loads(storage.read_text(f"{work}/run/checkpoint_manager_snapshot.json"))
    except (StorageError, ValueError):  # not there yet, or half written
        return set()
    return {found["checkpoint_dir_name"] for found in content["checkpoint_results"]}


def wait_for(ready: Callable[[], bool], patience_s: float = 900.0) -> None:
    """Poll until `ready` holds; fails after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while not ready():
        assert time.monotonic() < deadline, "never became ready"
        time.sleep(0.005)
