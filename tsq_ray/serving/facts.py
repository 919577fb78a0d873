"""Facts that the processes of an endpoint share, in the cluster's key-value store.

They record which stages of a version have loaded, and whether the endpoint is to end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("ray.serve")
_NAMESPACE = "tsq-serving"
_POLL_S, _WATCH_S = 0.2, 1.0
_STALE_S, _LOAD_WAIT_S = 5.0, 120.0
STAGES = ("Decoder", "Sampler", "Recognizer")


def _key(app: str, *parts: str) -> str:
    return "/".join((app, *parts))


def _store() -> Any:
    from ray.experimental import internal_kv

    return internal_kv


def _put(key: str, value: Any) -> None:
    _store()._internal_kv_put(key, json.dumps(value), namespace=_NAMESPACE)


def _get(key: str) -> Any:
    found = _store()._internal_kv_get(key, namespace=_NAMESPACE)
    return json.loads(found) if found is not None else None


def _keys_below(prefix: str) -> list[str]:
    return [key.decode() for key in _store()._internal_kv_list(prefix, namespace=_NAMESPACE)]


def _remove(key: str) -> None:
    _store()._internal_kv_del(key, namespace=_NAMESPACE)


def wait_for_stages(app: str, version: str, deployment: str) -> None:
    """Wait until every stage of a version has loaded, for at most two minutes.

    Serve replaces each stage as soon as it has started. Stages that wait for each other keep the
    old version complete until the new one is.
    """
    _put(_key(app, "loaded", version, deployment), time.time())
    deadline = time.monotonic() + _LOAD_WAIT_S
    while time.monotonic() < deadline:
        if all(_get(_key(app, "loaded", version, other)) for other in STAGES):
            break
        time.sleep(_POLL_S)
    # the keys of an older version would let its stages start one by one if it came back
    for key in _keys_below(_key(app, "loaded", "")):
        if not key.startswith(_key(app, "loaded", version, "")):
            _remove(key)


def loaded(app: str) -> set[str]:
    """Return the stages that have loaded what they need, of any version."""
    keys = _keys_below(_key(app, "loaded", ""))
    return {key.rpartition("/")[2] for key in keys} & set(STAGES)


def request_end(app: str) -> None:
    """Tell the ingress replicas to refuse new requests."""
    _put(_key(app, "ending"), time.time())


def forget(app: str) -> None:
    """Remove every fact about an application."""
    for key in _keys_below(_key(app, "")):
        _remove(key)


def is_end_requested(app: str) -> bool:
    """Return whether the endpoint is to end."""
    return _get(_key(app, "ending")) is not None


def report_unanswered(app: str, replica: str, count: int) -> None:
    """Report how many requests a draining ingress replica has yet to answer."""
    _put(_key(app, "in-hand", replica), [time.time(), count])


def wait_until_done(app: str, replicas: Callable[[], int], patience_s: float) -> bool:
    """Wait until all ingress replicas report that they have answered their requests.

    `replicas` counts the running ones. Return False if they have not within `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        reports = [_get(key) or [0.0, 0] for key in _keys_below(_key(app, "in-hand", ""))]
        # a killed replica no longer reports
        alive = [count for when, count in reports if time.time() - when < _STALE_S]
        if not any(alive) and len(alive) >= replicas():
            return True
        time.sleep(_POLL_S)
    return False


async def watch(app: str, replica: str, admission: Any) -> None:
    """Watch for the endpoint's end; then refuse new requests and report the unanswered ones."""
    while True:
        await asyncio.sleep(_POLL_S if admission.draining else _WATCH_S)
        try:
            if not admission.draining:
                admission.draining = await asyncio.to_thread(is_end_requested, app)
            if admission.draining:
                await asyncio.to_thread(report_unanswered, app, replica, admission.unanswered)
        except Exception as error:  # noqa: BLE001  the store may be back soon
            _log.warning("cannot read whether the endpoint is to end: %s", error)
