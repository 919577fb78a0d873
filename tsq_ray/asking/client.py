"""A client of an OpenAI-compatible server: limits and retries requests, never shows its key."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.request import getproxies

import aiohttp
import numpy as np

from tsq_ray.asking.answers import Completion, UnusableAnswer, read_answer, tokens_of
from tsq_ray.config import RecognizerConfig
from tsq_ray.errors import ModelError, VideoError

KEY_VARIABLE = "OPENAI_API_KEY"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_CHECK_S = 10.0
"""Less than the limit of a replica's health check."""
_BUSY = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
_MAX_UNUSABLE = 3
"""Unusable answers after which a request is abandoned; each one costs tokens."""
_SHOWN = 200


@dataclass
class Reply:
    """The server's answer, with the tokens of all tries."""

    scores: np.ndarray | None = None
    """float32 [C]; None after an error."""
    caption: str | None = None
    error: VideoError | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    """For which its tries were in flight."""

    def count(self, tokens_in: int, tokens_out: int) -> None:
        """Add the tokens of a try."""
        self.tokens_in, self.tokens_out = self.tokens_in + tokens_in, self.tokens_out + tokens_out


class _TryAgain(Exception):
    """This try failed; another may succeed, after `wait_s` seconds at the earliest."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Client:
    """Asks a server, with at most `limit` requests in flight; use it in one event loop only."""

    def __init__(
        self, settings: RecognizerConfig, classes: Sequence[str], multi: bool, limit: int
    ) -> None:
        self.settings, self.classes, self.multi = settings, classes, multi
        self.url = settings.url.rstrip("/")
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._free = asyncio.Semaphore(limit)
        self._not_before = 0.0
        """Earliest time of the next request, by the monotonic clock."""
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def check(self) -> None:
        """Raise ModelError if the server refuses the key; an unreachable server is no error yet."""
        try:
            limit = aiohttp.ClientTimeout(total=_CHECK_S)
            async with self._get_session().get(f"{self.url}/models", timeout=limit) as reply:
                if reply.status in (401, 403):
                    raise ModelError(self._refused(reply.status))
        except (aiohttp.ClientError, TimeoutError, OSError):
            pass

    async def ask(self, body: dict[str, Any]) -> Reply:
        """Return the answer to a request body.

        Retries with growing waits, or those that the server asks for, until `patience_s` after the
        first try; then the reply has an error `unavailable`, as it does after a refusal.
        """
        reply, unusable, deadline, wait_s = Reply(), 0, math.inf, _FIRST_WAIT_S
        why: Exception
        for tries in itertools.count(1):
            try:
                async with self._free:
                    deadline = min(deadline, time.monotonic() + self.settings.patience_s)
                    completion = await self._timed_request(body, reply)
                reply.count(*tokens_of(completion))
                reply.scores, reply.caption = read_answer(completion, self.classes, self.multi)
                return reply
            except VideoError as error:
                reply.error = error
                return reply
            except UnusableAnswer as error:
                why, pause, unusable = error, 0.0, unusable + 1
            except _TryAgain as error:
                why, pause = error, max(error.wait_s, wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            if unusable == _MAX_UNUSABLE or time.monotonic() + pause > deadline:
                reply.error = self._unavailable(f"{why} (tried {tries} times)")
                return reply
            await asyncio.sleep(pause)
        raise AssertionError("the loop above returns")

    async def _timed_request(self, body: dict[str, Any], reply: Reply) -> Completion:
        """Return the completion, and add its seconds to the reply. Raises as `_request` does."""
        started = time.monotonic()
        try:
            return await self._request(body)
        finally:
            reply.seconds += time.monotonic() - started

    async def _request(self, body: dict[str, Any]) -> Completion:
        """Return the completion. Raises _TryAgain, or VideoError for a refusal."""
        limit = aiohttp.ClientTimeout(total=self.settings.timeout_s)
        await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
        try:
            async with self._get_session().post(
                f"{self.url}/chat/completions", json=body, timeout=limit, allow_redirects=False
            ) as reply:
                status, retry_after = reply.status, reply.headers.get("Retry-After", "")
                content = await reply.read()
        except TimeoutError:
            raise _TryAgain(f"no answer within {self.settings.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from None
        if status in _BUSY or status >= 500:
            wait_s = _seconds(retry_after)
            self._not_before = max(
                self._not_before, time.monotonic() + min(wait_s, _LONGEST_WAIT_S)
            )
            raise _TryAgain(f"HTTP {status}{_message(content)}", wait_s)
        if status in (401, 403):  # its message may repeat the key
            raise VideoError("unavailable", self._refused(status))
        if status != 200:
            raise self._unavailable(f"HTTP {status}{_message(content)}")
        return _completion_of(content)

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._session = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=self.settings.timeout_s),
                trust_env=bool(getproxies()),
            )
        return self._session

    def _refused(self, status: int) -> str:
        what = "refuses the key in" if self._key else "requires a key, to be set in"
        return f"{self.url} answered {status}: it {what} the environment variable {KEY_VARIABLE}"

    def _unavailable(self, why: str) -> VideoError:
        shown = why.replace(self._key, "***") if self._key else why
        return VideoError("unavailable", f"{self.url}: {shown}")


def _completion_of(content: bytes) -> Completion:
    """Return the completion in an answer of status 200. Raises _TryAgain if it is an error."""
    try:
        found = json.loads(content)
    except ValueError:
        raise _TryAgain("its answer is not JSON") from None
    found = found if isinstance(found, dict) else {}
    if found.get("error") and not found.get("choices"):
        raise _TryAgain(f"HTTP 200{_message(content)}")
    return found


def _message(content: bytes) -> str:
    """Return a server's error message, shortened, with a colon before it."""
    try:
        found = json.loads(content)["error"]
        text = found["message"] if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError):
        text = content.decode(errors="replace")
    text = " ".join(str(text).split())[:_SHOWN]
    return f": {text}" if text else ""


def _seconds(header: str) -> float:
    """Return the seconds of a Retry-After header, a number or a date; 0 for anything else."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
