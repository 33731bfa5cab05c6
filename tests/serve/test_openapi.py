"""Requests at random against the document: every answer is one that it declares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.command import ServeCommand

ROUTES = {
    "chat_completions",
    "completions",
    "models",
    "model",
    "create_file",
    "list_files",
    "show_file",
    "file_content",
    "delete_file",
    "create_batch",
    "list_batches",
    "show_batch",
    "cancel_batch",
    "generate",
    "stream_chat",
    "tokenize",
    "show_session",
    "end_session",
    "fork_session",
    "cancel_request",
    "health",
    "state",
    "metrics",
}
"""By the names in the document."""

WITHOUT_INPUT = {"models", "health", "state", "metrics"}
"""Nothing can be wrong with a request to these."""


@pytest.fixture(scope="module")
def document(simulated_endpoint: ServeCommand) -> Any:
    """The document, as the endpoint publishes it."""
    return schemathesis.openapi.from_url(f"{simulated_endpoint.url}/openapi.json")


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """One connection for all of it."""
    with requests.Session() as session:
        yield session


def test_every_route_is_tried(document: Any) -> None:
    """No route is left out here."""
    operations = [operation.ok().definition.raw["operationId"] for operation in document.get_all_operations()]
    assert set(operations) == ROUTES


def _shorten(route: str, body: Any) -> None:
    """Have an answer end soon: hundreds are asked for."""
    limit = {
        "chat_completions": "max_tokens",
        "completions": "max_tokens",
        "generate": "max_new_tokens",
        "stream_chat": "max_new_tokens",
    }.get(route)
    if limit is None or not isinstance(body, dict):
        return
    body.pop("max_completion_tokens", None)
    body.pop("timeout", None)  # which may well be too short
    if body.get(limit) is None or (isinstance(body[limit], int) and body[limit] > 4):
        body[limit] = 4


@pytest.mark.parametrize(
    ("route", "mode"),
    [
        *((route, GenerationMode.POSITIVE) for route in sorted(ROUTES)),
        *((route, GenerationMode.NEGATIVE) for route in sorted(ROUTES - WITHOUT_INPUT)),
    ],
)
def test_declared(document: Any, session: requests.Session, route: str, mode: GenerationMode) -> None:
    """Whatever is sent, right or wrong, no answer is a failure of the server, and each is as the document says."""
    operation = document.find_operation_by_id(route)

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: Any) -> None:
        _shorten(route, case.body)
        response = case.call(session=session, timeout=60)
        assert response.status_code < 500, response.text
        checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
        case.validate_response(response, checks=checks)

    send()
