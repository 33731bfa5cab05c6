"""Endpoints for the tests: one with the simulated engine and one with the real small model, each started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.command import ServeCommand, serve_command

SIMULATED = {"kind": "simulated", "tokens_per_s": 200, "replicas": 2}


@pytest.fixture(scope="session")
def simulated_endpoint() -> Iterator[ServeCommand]:
    """`raylm serve` with two actors of the simulated engine and two gateways behind HAProxy."""
    config = {"models": [{"name": "sim", "engines": [SIMULATED]}], "gateway": {"replicas": 2}}
    with serve_command(config) as command:
        yield command


@pytest.fixture(scope="session")
def real_endpoint() -> Iterator[ServeCommand]:
    """`raylm serve` as the README starts it: the built-in model on CPU."""
    with serve_command({}) as command:
        yield command
