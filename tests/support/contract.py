"""The OpenAPI document against an endpoint: requests that schemathesis makes up from it."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from support.endpoint import TOKEN, Endpoint

load_all_checks()
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
RULES = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}


@schemathesis.serializer("application/jsonl", "video/*", "application/octet-stream")
def as_it_is(_: Any, value: Any) -> bytes:
    """The bytes of a body, of whatever kind it was made up."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


def check_document(endpoint: Endpoint, examples: int) -> int:
    """Send up to `examples` made-up requests, right and wrong ones, for each operation.

    No answer is a fault of the endpoint, and each is one that the document describes. Returns how
    many were sent.
    """
    sent = 0
    document = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 7
    for operation, mode in itertools.product(operations, GenerationMode):

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=examples // 2, **RULES)
        def run(case: schemathesis.Case) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(headers=headers, checks=CHECKS)

        with contextlib.suppress(Unsatisfiable):  # nothing about it can be wrong
            run()
    return sent
