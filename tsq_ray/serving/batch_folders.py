"""The folders of batches below `serve.batches_uri`.

Each batch has its own folder: `batch.json` (what clients see), `input.json` (what to score),
`webhook.json` until its webhook has been called, `manifest.parquet` if it was sent as JSON lines or
is on a web server, `predictions/` (the run folder; after an update of the endpoint a further one,
`predictions-...`), and at the end `output.jsonl` and `errors.jsonl`. `keys/` has a file per
idempotency key. No other state exists, so a batch resumes where it stopped when the endpoint
restarts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from pydantic import BaseModel

from tsq_ray import storage
from tsq_ray.errors import StorageError
from tsq_ray.manifest import video_id
from tsq_ray.rows import Row, plain_row
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.serving.requests.models import Batch, BatchLine

_CARD, _INPUT = "batch.json", "input.json"
WEBHOOK = "webhook.json"


class BatchInput(BaseModel):
    """The videos that a batch scores: those of a manifest or of JSON lines."""

    manifest: str
    lines: list[BatchLine] = []
    version: str = ""
    """That of the graph that scores them; empty in folders from before this field existed."""


class Claim(BaseModel):
    """The batch that owns an idempotency key, and a hash of the request that created it."""

    batch: str
    request: str

    @classmethod
    def of(cls, batch: str, request_parts: Iterable[BaseModel | None]) -> Claim:
        """Return the claim of a request with these parts."""
        content = [part.model_dump() if part is not None else None for part in request_parts]
        digest = storage.sha256_of(json.dumps(content, sort_keys=True).encode())
        return cls(batch=batch, request=digest)


class BatchFolders:
    """Reads and writes the state of batches. Raises StorageError."""

    def __init__(self, root: str) -> None:
        self._root = storage.normalize(root)

    def at(self, batch: str, *names: str) -> str:
        """Return a path in the folder of a batch."""
        return storage.join(self._root, batch, *names)

    def claim(self, key: str, new: Claim) -> Claim:
        """Return the claim that owns this idempotency key: `new`, or an earlier one."""
        place = storage.join(self._root, "keys", storage.sha256_of(key.encode()))
        if storage.create_bytes(place, new.model_dump_json().encode()):
            return new
        return Claim.model_validate_json(storage.read_bytes(place))

    def create(self, card: Batch, videos: BatchInput, webhook: str | None = None) -> None:
        """Write a new batch; it exists once its card does."""
        if webhook is not None:
            storage.write_bytes(self.at(card.id, WEBHOOK), json.dumps({"url": webhook}).encode())
        self.save_input(card.id, videos)
        self.save(card)

    def save_input(self, batch: str, videos: BatchInput) -> None:
        """Write the videos that a batch scores."""
        storage.write_bytes(self.at(batch, _INPUT), videos.model_dump_json().encode())

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
        """Return the videos that a batch scores."""
        return BatchInput.model_validate_json(storage.read_bytes(self.at(batch, _INPUT)))

    def names(self, file: str = _CARD) -> list[str]:
        """Return the ids of all batches whose folder has this file, newest first."""
        if not storage.is_folder(self._root):
            return []
        uris = (entry.uri for entry in storage.walk(self._root))
        folders = (storage.parent_of(uri) for uri in uris if storage.name_of(uri) == file)
        names = map(storage.name_of, folders)
        return sorted((name for name in names if name.startswith("batch_")), reverse=True)

    def webhook(self, batch: str) -> str | None:
        """Return the webhook of a batch; None if it has none or it has been called."""
        try:
            url: str = json.loads(storage.read_bytes(self.at(batch, WEBHOOK)))["url"]
        except StorageError as error:
            if error.error_type == "not_found":
                return None
            raise
        return url

    def forget_webhook(self, batch: str) -> None:
        """Record that the webhook of a batch has been called."""
        storage.remove(self.at(batch, WEBHOOK))

    def write_answers(self, card: Batch, lines: Sequence[BatchLine]) -> tuple[str, str]:
        """Write the answers and the failures as JSON lines, in the order of the parts.

        Return the paths of both files.
        """
        custom_ids: dict[str, list[str]] = {}
        for line in lines:
            custom_ids.setdefault(video_id(line.uri), []).append(line.custom_id)
        places = self.at(card.id, "output.jsonl"), self.at(card.id, "errors.jsonl")
        with storage.open_write(places[0]) as output, storage.open_write(places[1]) as errors:
            for row in _rows(card.predictions_uri):
                for custom_id in custom_ids.get(row["video_id"], [row["video_id"]]):
                    record = {"custom_id": custom_id, "model": card.model, **row}
                    file = output if row["status"] == "ok" else errors
                    file.write(json.dumps(record).encode() + b"\n")
        return places


def _rows(predictions_uri: str) -> Iterator[Row]:
    for part in list_parts(predictions_uri):
        for row in read_part(part.uri).to_pylist():
            yield plain_row({name: value for name, value in row.items() if value is not None})
