"""Call the webhooks of batches that have ended, including those that ended before a restart."""

from __future__ import annotations

import asyncio
import logging

from tsq_ray import storage
from tsq_ray.config import Config
from tsq_ray.errors import StorageError
from tsq_ray.serving.batch_folders import BatchFolders
from tsq_ray.serving.requests.models import Batch
from tsq_ray.serving.requests.webhooks import call, signing_key

_log = logging.getLogger("ray.serve")


class BatchWebhooks:
    """Calls each webhook until it is accepted, a few times at most, then forgets it."""

    def __init__(self, folders: BatchFolders, config: Config) -> None:
        self._folders, self._prefixes = folders, config.serve.webhook_prefixes
        self._key = signing_key()
        self._called: set[str] = set()

    async def call(self, card: Batch) -> None:
        """Call the webhook of a batch that has ended, unless it has none or it has been called."""
        if card.id in self._called:
            return
        self._called.add(card.id)
        try:
            url = await asyncio.to_thread(self._folders.webhook, card.id)
            if url is not None:
                content = {"type": f"batch.{card.status}", "data": card.model_dump(mode="json")}
                await call(url, card.id, content, self._prefixes, self._key)
                await asyncio.to_thread(self._folders.forget_webhook, card.id)
        except StorageError as error:
            _log.warning("webhook of %s: %s", card.id, storage.redact(str(error)))
