"""An actor's mailbox, when a reply leaves; and what the engine's processes inherit from the actor."""

import asyncio
import os
import time

import msgspec
import pytest
import ray

from raylm.actors.engine_actor import EngineActor, Submission, _Client, _Work
from raylm.config import SimulatedConfig
from raylm.engines.child import child_environment
from raylm.messages import EngineStatistics, Request


def mailbox(monkeypatch: pytest.MonkeyPatch, num_requests: int, token_gap_s: float) -> _Client:
    """Return a mailbox with that many requests, each with a token every so often, whose latest reply has just left."""
    client = _Client()
    for key in range(num_requests):
        client.work[key] = _Work(client, key, stream=True)
    now = time.monotonic()
    for step in range(-20, 1):
        monkeypatch.setattr(time, "monotonic", lambda step=step: now + step * token_gap_s)
        client.collect(EngineStatistics(num_running=num_requests, num_tokens=(step + 21) * num_requests))
    monkeypatch.undo()
    return client


@pytest.mark.parametrize(
    ("num_requests", "token_gap_s", "rest_s"), [(1000, 0.1, 0.02), (1000, 0.02, 0.01), (100, 0.1, 0.008), (1, 0.1, 0)]
)
async def test_a_reply_waits_for_company(
    monkeypatch: pytest.MonkeyPatch, num_requests: int, token_gap_s: float, rest_s: float
) -> None:
    """Among hundreds of requests there are at most fifty replies a second, but two for each token of a request."""
    client = mailbox(monkeypatch, num_requests, token_gap_s)
    started_at = client.told_at
    await client.rest()
    assert time.monotonic() - started_at >= 0.98 * rest_s  # as exact as the loop's clock, and the mean


@pytest.mark.parametrize("num_requests", [1, 1000])
async def test_a_token_after_a_silence_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, num_requests: int) -> None:
    """However many requests there are, the first delta after a rest leaves at once."""
    client = mailbox(monkeypatch, num_requests, 0.1)
    await asyncio.sleep(0.04)
    with pytest.raises(StopIteration):
        client.rest().send(None)


@pytest.mark.usefixtures("cluster")
async def test_a_request_that_is_cancelled_before_it_begins_is_forgotten() -> None:
    """It leaves the mailbox, whose replies would wait for company that there is not."""
    actor = EngineActor(SimulatedConfig().model_dump_json())
    request = Request(request_id="1", prompt="hello")
    await actor.submit("client", msgspec.msgpack.encode(Submission([1], [request])))
    await actor.cancel("client", [1])
    await asyncio.gather(*(work.task for work in actor._clients["client"].work.values()), return_exceptions=True)
    assert actor._clients["client"].work == {}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("variables", "of_child"), [({}, None), ({"OMP_NUM_THREADS": "3"}, "3")])
def test_ray_does_not_tell_an_engine_how_many_threads_to_use(variables: dict[str, str], of_child: str | None) -> None:
    """What Ray sets in its workers is for code that runs in them; what the user has set holds."""

    @ray.remote(runtime_env={"env_vars": variables})
    def seen() -> tuple[str | None, str | None]:
        return os.environ.get("OMP_NUM_THREADS"), child_environment().get("OMP_NUM_THREADS")

    assert ray.get(seen.remote()) == (of_child or "1", of_child)
