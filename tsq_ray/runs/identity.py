"""Everything that a result depends on, compared key by key with the record of an earlier run."""

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
    """Everything that a result depends on, as nested JSON values."""

    parts: Mapping[str, Any]

    @classmethod
    def of(cls, **parts: Any) -> Identity:
        """Build an identity; values that JSON cannot represent become text."""
        return cls(json.loads(json.dumps(parts, default=str)))

    def differences(
        self,
        before: Mapping[str, Any],
        *,
        words: tuple[str, str] = ("there", "now"),
        free: Callable[[str], bool] = lambda key: False,
    ) -> str:
        """Name at most five keys whose values differ in an earlier record; empty if none do.

        The record may predate a setting, so a key missing on one side has its default. `words`
        label the record's value and this one's; keys for which `free` is true may differ.
        """
        was, now = flatten(before), flatten(self.parts)
        differ = [key for key in differing(was, now) if not free(key)]
        theirs, ours = words
        named = (f"{key}: {was.get(key)!r} {theirs}, {now.get(key)!r} {ours}" for key in differ)
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        return "; ".join(islice(named, _SHOWN)) + more

    def refuse_other(self, before: Mapping[str, Any], uri: str, holds: str) -> None:
        """Raise RunError if `before`, the record in folder `uri`, describes other work.

        `holds` describes the folder in the message, such as "holds another training".
        """
        differences = self.differences(before)
        if differences:
            what = f"{storage.redact(uri)}: {holds} ({differences})"
            raise RunError(f"{what}; use the same settings or another --out")
