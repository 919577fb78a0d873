"""The folders of batches below `serve.batches_uri`.

A batch has a folder of its own: `batch.json` (what clients see), `input.json` (what to score),
`webhook.json` until its webhook has been called, `manifest.parquet` if it was sent as JSON lines or
is on a web server, `predictions/` (the run folder), and at the end `output.jsonl` and
`errors.jsonl`. `keys/` has a file per idempotency key. Nothing else is kept, so that a batch
resumes where it was when the endpoint starts again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from tsq_ray import storage
from tsq_ray.errors import StorageError
from tsq_ray.manifest import video_id
from tsq_ray.rows import plain_row
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.serving.requests.models import Batch, BatchLine

_CARD, _INPUT = "batch.json", "input.json"
WEBHOOK = "webhook.json"


class BatchInput(BaseModel):
    """What a batch is to score: the videos of a manifest, or of lines."""

    manifest: str
    lines: list[BatchLine] = []


class Claim(BaseModel):
    """The batch that has an idempotency key, and a hash of the request that asked for it."""

    batch: str
    request: str

    @classmethod
    def of(cls, batch: str, asked: Iterable[BaseModel | None]) -> Claim:
        """Return the claim of a request that asks for this."""
        content = [part.model_dump() if part is not None else None for part in asked]
        digest = storage.sha256_of(json.dumps(content, sort_keys=True).encode())
        return cls(batch=batch, request=digest)


class BatchFolders:
    """Reads and writes what is kept of batches. Raises StorageError."""

    def __init__(self, root: str) -> None:
        self._root = storage.normalize(root)

    def at(self, batch: str, *names: str) -> str:
        """Return a place in the folder of a batch."""
        return storage.join(self._root, batch, *names)

    def claim(self, key: str, wanted: Claim) -> Claim:
        """Return who has this idempotency key: `wanted`, or an earlier claim."""
        place = storage.join(self._root, "keys", storage.sha256_of(key.encode()))
        if storage.create_bytes(place, wanted.model_dump_json().encode()):
            return wanted
        return Claim.model_validate_json(storage.read_bytes(place))

    def create(self, card: Batch, given: BatchInput, webhook: str | None = None) -> None:
        """Write a new batch; it exists once its card does."""
        if webhook is not None:
            storage.write_bytes(self.at(card.id, WEBHOOK), json.dumps({"url": webhook}).encode())
        storage.write_bytes(self.at(card.id, _INPUT), given.model_dump_json().encode())
        self.save(card)

    def save(self, card: Batch) -> None:
        """Write what clients see of a batch."""
        storage.write_bytes(self.at(card.id, _CARD), card.model_dump_json().encode())

    def card(self, batch: str) -> Batch | None:
        """Return what clients see of a batch; None if it is unknown."""
        if not batch.startswith("batch_") or not batch.replace("_", "").isalnum():
            return None
        try:
            return Batch.model_validate_json(storage.read_bytes(self.at(batch, _CARD)))
        except StorageError as error:
            if error.error_type == "not_found":
                return None
            raise

    def input(self, batch: str) -> BatchInput:
        """Return what a batch is to score."""
        return BatchInput.model_validate_json(storage.read_bytes(self.at(batch, _INPUT)))

    def names(self, file: str = _CARD) -> list[str]:
        """Return the ids of all batches whose folder has this file, the newest first."""
        if not storage.is_folder(self._root):
            return []
        found = (entry.uri for entry in storage.walk(self._root))
        folders = (storage.parent_of(uri) for uri in found if storage.name_of(uri) == file)
        names = map(storage.name_of, folders)
        return sorted((name for name in names if name.startswith("batch_")), reverse=True)

    def webhook(self, batch: str) -> str | None:
        """Return the webhook of a batch; None if it has none, or it was called."""
        try:
            found: str = json.loads(storage.read_bytes(self.at(batch, WEBHOOK)))["url"]
        except StorageError as error:
            if error.error_type == "not_found":
                return None
            raise
        return found

    def forget_webhook(self, batch: str) -> None:
        """Note that the webhook of a batch was called."""
        storage.remove(self.at(batch, WEBHOOK))

    def write_answers(self, batch: str, lines: Sequence[BatchLine]) -> tuple[str, str]:
        """Write the answers and the failures as JSON lines, in the order of the parts.

        Return the places of both.
        """
        asked: dict[str, list[str]] = {}
        for line in lines:
            asked.setdefault(video_id(line.uri), []).append(line.custom_id)
        places = self.at(batch, "output.jsonl"), self.at(batch, "errors.jsonl")
        with storage.open_write(places[0]) as output, storage.open_write(places[1]) as errors:
            for row in _rows(self.at(batch, "predictions")):
                for custom_id in asked.get(row["video_id"], [row["video_id"]]):
                    answered = {"custom_id": custom_id, **row}
                    file = output if row["status"] == "ok" else errors
                    file.write(json.dumps(answered).encode() + b"\n")
        return places


def _rows(predictions_uri: str) -> Iterator[dict[str, Any]]:
    for part in list_parts(predictions_uri):
        for row in read_part(part.uri).to_pylist():
            yield plain_row({name: value for name, value in row.items() if value is not None})
