"""What is on a line of log: the request that it is about, and no other."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator

import pytest
import ray

from raylm.actors.sessions import connect_store, start_store
from raylm.config import PoolConfig, SessionConfig, SimulatedConfig
from raylm.conversation import Conversations
from raylm.errors import RequestTimeoutError
from raylm.messages import GenerationConfig, Message, Request
from raylm.serve.door import JSONLines, facts
from tests.conftest import StartPool, ask

_TIMEOUT_S = 60


class Lines(logging.Handler):
    """What has been logged, as the endpoint writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONLines())
        self._lines: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._lines.append(json.loads(self.format(record)))

    async def about(self, words: str) -> dict[str, object]:
        """Return the first line with these words, as soon as it is there."""
        async with asyncio.timeout(_TIMEOUT_S):
            while True:
                for line in self._lines:
                    if words in str(line["message"]):
                        return line
                await asyncio.sleep(0.01)


@pytest.fixture
async def lines() -> AsyncIterator[Lines]:
    """The lines of raylm, in the middle of a request."""
    handler, logger = Lines(), logging.getLogger("raylm")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


async def test_a_line_about_a_slot(start_pool: StartPool, lines: Lines) -> None:
    """It does not name the request that has had the slot's health checked."""
    config = PoolConfig(first_token_timeout_s=0.3, health_timeout_s=0.3)
    running = await start_pool(SimulatedConfig(), config=config)
    facts.set({"request_id": "mine"})
    os.kill(running.pid(0), signal.SIGSTOP)
    with pytest.raises(RequestTimeoutError):
        await running.pool.tokenize(ask("hello"))
    assert "request_id" not in await lines.about("fails its health check")


async def test_a_line_about_all_turns(start_pool: StartPool, lines: Lines) -> None:
    """It does not name the request whose turn was the first of them; the line about a request does."""
    running = await start_pool(SimulatedConfig())
    config = SessionConfig(turn_timeout_s=0.4)
    actor = start_store(config)
    store = connect_store(config, actor, "raylm:test:")
    conversations = Conversations(running.pool, store, config.turn_timeout_s)

    def request(messages: tuple[Message, ...]) -> Request:
        return Request(request_id="mine", messages=messages, config=GenerationConfig(max_new_tokens=8000))

    facts.set({"request_id": "mine"})
    async with conversations.turn("s", (Message("user", "hi"),), request, start=True, end=False) as stream:
        await anext(stream)
        ray.kill(actor)
        assert "request_id" not in await lines.about("turns were not renewed")
    assert (await lines.about("stays held by a turn"))["request_id"] == "mine"
    await store.aclose()
