"""Is it the same work? Everything that a result depends on, compared key by key with a record."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tsq_ray import storage
from tsq_ray.config import differing, flatten
from tsq_ray.errors import RunError

_SHOWN = 5


@dataclass(frozen=True)
class Identity:
    """Everything that a result depends on, nested, as JSON gives it back."""

    parts: Mapping[str, Any]

    @classmethod
    def of(cls, **parts: Any) -> Identity:
        """Make the identity of these parts; what JSON does not know becomes text."""
        return cls(json.loads(json.dumps(parts, default=str)))

    def differences(
        self,
        before: Mapping[str, Any],
        *,
        words: tuple[str, str] = ("there", "now"),
        free: Callable[[str], bool] = lambda key: False,
    ) -> str:
        """Name at most five of the keys that an earlier record has otherwise; empty if none does.

        The record may be older than a setting: a key that one side lacks counts with its default.
        `words` say whose value is whose; `free` keys may differ.
        """
        was, now = flatten(before), flatten(self.parts)
        differ = [key for key in differing(was, now) if not free(key)]
        theirs, ours = words
        named = (f"{key}: {was.get(key)!r} {theirs}, {now.get(key)!r} {ours}" for key in differ)
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        return "; ".join(islice(named, _SHOWN)) + more

    def refuse_other(self, before: Mapping[str, Any], uri: str, holds: str) -> None:
        """Raise RunError if the folder `uri` has the record of other work.

        `holds`: what it then holds, for the message, such as "holds another training".
        """
        differences = self.differences(before)
        if differences:
            what = f"{storage.redact(uri)}: {holds} ({differences})"
            raise RunError(f"{what}; use the same settings or another --out")
