"""Tell a web server that a batch has ended, signed according to Standard Webhooks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp

from tsq_ray.errors import ConfigError, StorageError
from tsq_ray.serving.requests.fetching import PublicResolver
from tsq_ray.serving.requests.uris import WEB, check_uri, named_hosts

SECRET_VARIABLE = "TSQ_WEBHOOK_SECRET"
_SECRET_PREFIX, _KEY_BYTES = "whsec_", range(24, 65)
_WAITS_S = (0, 5, 30, 120)
_TIMEOUT_S = 20.0
_log = logging.getLogger("ray.serve")


def check_webhook(url: str, prefixes: Iterable[str]) -> str:
    """Return the URL. Raises RequestError 403 if it is not below an allowed prefix."""
    return check_uri(url, [prefix for prefix in prefixes if prefix.lower().startswith(WEB)])


def signing_key() -> bytes | None:
    """Return the signing key from the environment; None if it is not set.

    Raises ConfigError if it is not base64 of 24 to 64 bytes, as Standard Webhooks requires.
    """
    secret = os.environ.get(SECRET_VARIABLE, "").strip()
    if not secret:
        return None
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if len(key) not in _KEY_BYTES:
        raise ConfigError(
            f"environment variable {SECRET_VARIABLE}: not {_SECRET_PREFIX} and the base64 of "
            f'{_KEY_BYTES[0]} to {_KEY_BYTES[-1]} bytes; make one with: echo "{_SECRET_PREFIX}'
            '$(openssl rand -base64 32)"'
        )
    return key


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the header `webhook-signature`."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


async def call(
    url: str,
    message_id: str,
    content: Mapping[str, Any],
    prefixes: Iterable[str],
    key: bytes | None,
) -> bool:
    """Post `content` as JSON until it is accepted, a few times at most; return whether it was.

    `prefixes`: their hosts may have private addresses. `key`: to sign with.
    """
    body = json.dumps(content).encode()
    connector = aiohttp.TCPConnector(resolver=PublicResolver(named_hosts(prefixes)))
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        for wait_s in _WAITS_S:
            await asyncio.sleep(wait_s)
            stamp = int(time.time())
            headers = {"Content-Type": "application/json", "webhook-id": message_id}
            headers["webhook-timestamp"] = str(stamp)
            if key is not None:
                headers["webhook-signature"] = signature(key, message_id, stamp, body)
            try:
                async with session.post(
                    url, data=body, headers=headers, allow_redirects=False
                ) as response:
                    if response.status < 300:
                        return True
                    why = f"HTTP {response.status}"
            except (aiohttp.ClientError, TimeoutError, StorageError) as error:
                why = type(error).__name__
            _log.warning("webhook of %s: %s", message_id, why)
    return False
