"""The OpenAPI document against the endpoint: requests that schemathesis makes up from it.

No answer is a fault of the endpoint, and every answer is one that the document describes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import load_all_checks, not_a_server_error
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


def check_document(endpoint: Endpoint, examples: int) -> None:
    """Send `examples` made-up requests for each operation of the document."""
    document = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=examples, **RULES)
        def run(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=headers, checks=CHECKS)

        run()


def test_the_document_is_kept(endpoint: Endpoint) -> None:
    check_document(endpoint, 15)


@pytest.mark.slow
def test_the_document_is_kept_2000_times(endpoint: Endpoint) -> None:
    check_document(endpoint, 300)
