"""Bearer tokens: one from the environment, or a file of named ones with a rate and a share each.

The file is TOML, with one table per token, made by `tsq token new NAME`. It holds only hashes and
is read again when it changes:

    [[token]]
    name = "team-a"
    sha256 = "..."
    rate = "60/minute"      # optional: requests per second, minute, hour or day
    share = 0.5             # optional: the part of requests, bytes and fetches it may hold
"""

from __future__ import annotations

import hmac
import logging
import math
import os
import secrets
import time
import tomllib
from dataclasses import dataclass
from typing import Any

from limits import RateLimitItem, parse, parse_many
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tsq_ray.errors import ConfigError
from tsq_ray.serving.requests.problems import RequestError
from tsq_ray.serving.requests.shares import Share
from tsq_ray.storage import sha256_of

_log = logging.getLogger("ray.serve")
_REQUIRED = "a valid token is required: send the header Authorization: Bearer TOKEN"


class AboveRate(RequestError):
    """A request above its token's rate, even if the endpoint has room."""


class Token(BaseModel):
    """A client of the endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    rate: str | None = None
    """Requests per second, minute, hour or day, for example "60/minute"."""
    share: float = Field(default=1.0, gt=0, le=1)
    """The part of each quota that it may hold: requests in flight, bytes, fetches."""

    @field_validator("rate")
    @classmethod
    def _parses(cls, rate: str | None) -> str | None:
        if rate is not None:
            found = parse_many(rate)
            if len(found) != 1 or found[0].amount < 1:
                raise ValueError(f"{rate!r} is not one rate of at least 1, such as 60/minute")
        return rate

    @property
    def client_share(self) -> Share:
        """The client and the part of each quota that it may hold."""
        return Share(self.name, self.share)

    @property
    def limit(self) -> RateLimitItem | None:
        return parse(self.rate) if self.rate else None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    token: list[Token] = []


ANYBODY = Token(name="anonymous", sha256="0" * 64)


def new_token(name: str, rate: str | None = None, share: float = 1.0) -> tuple[str, str]:
    """Return a new secret token and its table for the tokens file. Raises ConfigError."""
    secret = secrets.token_urlsafe(32)
    content: dict[str, Any] = {"name": name, "sha256": sha256_of(secret.encode()), "share": share}
    if rate is not None:
        content["rate"] = rate
    try:
        token = Token.model_validate(content)
    except (ValidationError, ValueError) as error:
        raise ConfigError(f"token {name!r}: {_first_problem(error)}") from None
    table = f'[[token]]\nname = "{_escaped(token.name)}"\nsha256 = "{token.sha256}"\n'
    table += f'rate = "{token.rate}"\n' if token.rate else ""
    table += f"share = {token.share:g}\n" if token.share < 1 else ""
    return secret, table


def add_token(path: str, name: str, entry: str) -> None:
    """Append a token's table to the file. Raises ConfigError if the file has that name already."""
    if os.path.exists(path) and name in (token.name for token in read_tokens(path)):
        raise ConfigError(f"{path}: has a token {name!r} already; remove its table first")
    try:
        with open(path, "a", encoding="utf-8", opener=_open_private) as file:
            file.write(f"\n{entry}")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read_tokens(path: str) -> list[Token]:
    """Read a tokens file. Raises ConfigError if it is missing or invalid."""
    try:
        with open(path, "rb") as file:
            found = _File.model_validate(tomllib.load(file)).token
    except OSError as error:
        raise ConfigError(f"serve.tokens_file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(f"serve.tokens_file {path}: {_first_problem(error)}") from None
    names = [token.name for token in found]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"serve.tokens_file {path}: the name {duplicates[0]!r} occurs twice")
    return found


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        return f"{'.'.join(map(str, first['loc']))}: {message}"
    return str(error)


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"')


@dataclass
class Access:
    """Identifies a request's client and decides whether it is within that client's rate.

    `replicas`: the largest number of ingress replicas, each of which grants its part of a rate.
    """

    token: str | None
    path: str = ""
    replicas: int = 1

    def __post_init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._read: tuple[float, int] | None = None
        self._tokens: list[Token] = []
        if self.path:
            self._tokens = read_tokens(self.path)
            self._read = self._stamp()
        if self.token:
            own = Token(name="TSQ_TOKEN", sha256=sha256_of(self.token.encode()))
            self._own = [own]
        else:
            self._own = []

    def client(self, secret: str | None) -> Token:
        """Return the token with this secret. Raises RequestError 401 if it is unknown."""
        self._refresh()
        known = [*self._own, *self._tokens]
        if not known and not self.path:
            return ANYBODY
        digest = sha256_of((secret or "").encode())
        found = None
        for token in known:  # all of them, so that timing reveals nothing
            if hmac.compare_digest(token.sha256, digest):
                found = token
        if found is None:
            raise RequestError(401, _REQUIRED)
        return found

    def spend(self, token: Token) -> tuple[dict[str, str], RequestError | None]:
        """Count a request against the client's rate.

        Return the RateLimit headers, and the error if the request is above the rate.
        """
        limit = token.limit
        if limit is None:
            return {}, None
        # a rate below one per replica is granted over a longer window
        windows = math.ceil(self.replicas / limit.amount)
        amount = max(1, limit.amount // self.replicas)
        mine = type(limit)(amount, limit.multiples * windows)
        passes = self._limiter.hit(mine, token.name)
        window = self._limiter.get_window_stats(mine, token.name)
        left_s = max(0.0, window.reset_time - time.time())
        refused = f"token {token.name!r} is limited to {token.rate}; try again later"
        return {
            "RateLimit-Limit": str(limit.amount),
            "RateLimit-Remaining": str(min(limit.amount, window.remaining * self.replicas)),
            "RateLimit-Reset": str(round(left_s)),
        }, None if passes else AboveRate(429, refused, None, left_s)

    def _stamp(self) -> tuple[float, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _refresh(self) -> None:
        if not self.path or (stamp := self._stamp()) == self._read:
            return
        self._read = stamp
        try:
            self._tokens = read_tokens(self.path)
        except ConfigError as error:
            _log.error("%s; the tokens read before stay valid", error)
