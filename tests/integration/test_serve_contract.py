"""The OpenAPI document against the endpoint: requests that schemathesis makes up from it.

No answer is a fault of the endpoint, and every answer is one that the document describes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
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
from support.bundle import make_bundle
from support.endpoint import TOKEN, Endpoint, serving

pytestmark = pytest.mark.ray

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


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("contract")
    bundle = make_bundle(folder / "bundle")
    sets = (f"serve.batches_uri={folder}/batches", f'serve.allowed_uri_prefixes=["{folder}/open"]')
    with serving(bundle, folder / "run", *sets, token=TOKEN) as found:
        yield found


def check_document(endpoint: Endpoint, examples: int) -> int:
    """Send up to `examples` made-up requests, right and wrong ones, for each operation.

    Returns how many were sent.
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


def test_the_document_is_kept(endpoint: Endpoint) -> None:
    assert check_document(endpoint, 16) > 60


@pytest.mark.slow
def test_the_document_is_kept_2000_times(endpoint: Endpoint) -> None:
    assert check_document(endpoint, 400) >= 2000
