"""An actor's mailbox: when a reply leaves."""

import asyncio
import time

import pytest

from raylm.actors.engine_actor import _Client, _Work
from raylm.messages import EngineStatistics


def mailbox(num_requests: int) -> _Client:
    """Return a mailbox with that many requests, whose latest reply has just left."""
    client = _Client()
    for key in range(num_requests):
        client.work[key] = _Work(client, key, stream=True)
    client.collect(EngineStatistics(num_running=num_requests, num_tokens=0))
    return client


async def test_a_reply_waits_for_company_among_many_requests() -> None:
    """With hundreds of requests there are at most a hundred replies a second."""
    client = mailbox(1000)
    started_at = client.told_at
    await client.rest()
    assert time.monotonic() - started_at >= 0.0099  # as exact as the loop's clock


@pytest.mark.parametrize("num_requests", [1, 1000])
async def test_a_token_after_a_silence_waits_for_nothing(num_requests: int) -> None:
    """However many requests there are, the first delta after a rest leaves at once."""
    client = mailbox(num_requests)
    await asyncio.sleep(0.02)
    with pytest.raises(StopIteration):
        client.rest().send(None)
