"""Endpoints for the tests: with the simulated engine, and with the real small model. Each lasts as long as a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.command import ServeCommand, serve_command

TOKENS_PER_S = 200

SIMULATED = {"kind": "simulated", "tokens_per_s": TOKENS_PER_S, "replicas": 2}

EXPIRES_AFTER_S = 20
"""Of the batches of `strict_endpoint`."""

KEYS = ("key-of-the-environment", "another-key", "key-of-the-file")
"""What opens `strict_endpoint`."""


@pytest.fixture(scope="module")
def simulated_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeCommand]:
    """`raylm serve` with two actors of the simulated engine and two gateways behind HAProxy."""
    failing = SIMULATED | {"faults": [{"match": "FAIL", "at_token": 3, "action": "fail"}]}
    config = {
        "models": [{"name": "sim", "engines": [failing]}],
        "gateway": {"replicas": 2},
        "batches": {"folder": str(tmp_path_factory.mktemp("batches"))},
    }
    with serve_command(config) as command:
        yield command


@pytest.fixture(scope="module")
def real_endpoint() -> Iterator[ServeCommand]:
    """`raylm serve` as the README starts it: the built-in model on CPU."""
    with serve_command(None) as command:
        yield command


@pytest.fixture(scope="module")
def strict_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeCommand]:
    """`raylm serve` with keys and low limits: one gateway, and `slow`, which answers one request and queues one more.

    `none` is there to be left without an actor. What may be waited for, and what has to last, is longer than a busy
    machine stands still.
    """
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"\n{KEYS[2]}\n")
    slow = {"kind": "simulated", "capacity": 1, "tokens_per_s": 50, "first_token_s": 1}
    faults = [{"match": "FAIL", "at_token": 3, "action": "fail"}]
    config = {
        "models": [
            {"name": "slow", "engines": [slow | {"faults": faults}], "pool": {"max_queued": 1, "max_attempts": 1}},
            {"name": "none", "engines": [{"kind": "simulated"}]},
        ],
        "gateway": {
            "api_keys_env": "RAYLM_TEST_KEYS",
            "api_keys_file": str(file),
            "max_body_bytes": 100_000,
            "body_timeout_s": 10,
            "max_prompts": 4,
            "request_timeout_s": 25,
            "heartbeat_s": 0.2,
            "cors_origins": ["https://page.example"],
        },
        "batches": {
            "folder": str(tmp_path_factory.mktemp("batches")),
            "max_file_bytes": 200_000,
            "max_running": 1,
            "expires_after_s": EXPIRES_AFTER_S,
        },
    }
    with serve_command(config, env={"RAYLM_TEST_KEYS": f"{KEYS[0]}, {KEYS[1]}"}) as command:
        yield command
