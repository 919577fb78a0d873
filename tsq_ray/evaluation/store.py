"""Finished trainings in an evaluation's output folder, so that a killed evaluation can resume.

A training is keyed by a hash of everything its result depends on, so one folder can hold several
configurations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from tsq_ray import provenance, storage
from tsq_ray.errors import RunError
from tsq_ray.evaluation.trainings import Learned, TrainingSpec
from tsq_ray.runs.folder import read_json, write_json

FOLDER = "trainings"
FORMAT = 1


class Store:
    """The trainings below one output folder, on the data identified by `data`."""

    def __init__(self, out: str, data: Mapping[str, Any]) -> None:
        self.folder, self.data = storage.join(out, FOLDER), data

    def key(self, spec: TrainingSpec) -> str:
        """Return the name under which a training is stored."""
        content = {"format": FORMAT, "data": self.data, **spec.identity()}
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, default=str).encode()
        ).hexdigest()[:20]

    def read(self, spec: TrainingSpec) -> Learned | None:
        """Return a finished training, or None. Raises RunError if its arrays are damaged."""
        path = storage.join(self.folder, self.key(spec))
        record = read_json(f"{path}.json")
        if record is None:
            return None
        data = storage.read_bytes(f"{path}.safetensors")
        if storage.sha256_of(data) != record["sha256"]:
            raise RunError(
                f"{storage.redact(path)}.safetensors: its content is not what was written "
                f"(sha256 differs); delete {path}.json and run again"
            )
        return Learned(load_arrays(data), record["losses"], record["seconds"], record["diverged"])

    def write(self, spec: TrainingSpec, learned: Learned) -> None:
        """Store a finished training; its JSON is written last and marks it as complete."""
        path = storage.join(self.folder, self.key(spec))
        data = save_arrays(learned.arrays)
        storage.write_bytes(f"{path}.safetensors", data)
        record = {
            "losses": learned.losses,
            "seconds": learned.seconds,
            "diverged": learned.diverged,
            "sha256": storage.sha256_of(data),
        }
        write_json(
            f"{path}.json",
            {
                **spec.identity(),
                "data": self.data,
                **record,
                **provenance.of_this_run(),
            },
        )
