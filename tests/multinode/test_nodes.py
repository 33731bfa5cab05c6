"""What happens to machines, under 64 streams: nothing is lost, nothing is there twice, nothing is cut off."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import Any

import pytest

from tests.multinode.driver import Driver, OrderError
from tests.multinode.rig import NamespaceRig, Node, Rig

pytestmark = pytest.mark.timeout(600)

SIMULATED = {"kind": "simulated", "num_gpus": 1, "tokens_per_s": 50}
POOL = {"first_token_timeout_s": 3, "token_gap_timeout_s": 2, "health_timeout_s": 3}
"""For tests in which something stops: an actor that stands still because the machine is busy is suspected as well."""

NUM_STREAMS = 64
_KILLED = re.compile(r"kill\w*.*memory|memory.*kill", re.IGNORECASE)
"""How a raylet logs that it has killed a process for its memory."""


async def served(rig: Rig, driver: Driver, replicas: int = 6) -> tuple[Node, list[int]]:
    """Serve a model; return a node with most of its actors, and their processes."""
    await driver.ask("serve", engines=[{**SIMULATED, "replicas": replicas}], pool=POOL)
    slots = await driver.ask("up")
    (busiest, _), *_ = Counter(slot["node"] for slot in slots).most_common()
    print(f"the busiest node is {busiest}; others are at {await driver.ask('where')}")
    return rig.node(busiest), [slot["pid"] for slot in slots if slot["node"] == busiest]


async def started(rig: Rig, driver: Driver, num_tokens: int, replicas: int = 6) -> tuple[Node, list[int]]:
    """Do the same, and have 64 streams on their way."""
    found = await served(rig, driver, replicas)
    await driver.ask("crowd", size=NUM_STREAMS, num_tokens=num_tokens)
    return found


def all_right(outcome: dict[str, Any], *, moved: str) -> None:
    """See that every stream has ended with its undisturbed text, and that some have moved."""
    print(outcome)
    assert outcome["failed"] == []
    assert outcome["right"] == NUM_STREAMS
    assert outcome["moves"].get(f"moved:{moved}", 0) > 0


async def test_node_dies(rig: Rig, driver: Driver) -> None:
    """The death of a node moves its streams; its actors are started again on the GPUs that are left."""
    victim, pids = await started(rig, driver, 1500)
    await asyncio.to_thread(rig.kill_node, victim)
    slots = await driver.ask("up", gone=pids)
    assert victim.id not in {slot["node"] for slot in slots}
    all_right(await driver.ask("finish"), moved="died")
    await driver.ask("accounts", num_gpus=6)


async def test_memory_of_a_node_is_full(rig: Rig, driver: Driver) -> None:
    """Streams of an actor that Ray kills because its node has no memory left go on elsewhere."""
    node = await asyncio.to_thread(rig.add_node, 2, "small", 3 << 30)
    assert isinstance(rig, NamespaceRig)
    try:
        small = {**SIMULATED, "label_selector": {"kind": "small"}, "replicas": 2}
        await driver.ask("serve", engines=[small, {**SIMULATED, "replicas": 2}], pool=POOL)
        pids = [slot["pid"] for slot in await driver.ask("up") if slot["node"] == node.id]
        await driver.ask("crowd", size=NUM_STREAMS, num_tokens=1500)
        filler = await asyncio.to_thread(rig.fill_memory, node, 0.97)
        try:
            print("killed:", await driver.ask("lost", pids=pids))
        finally:
            filler.communicate()
        await driver.ask("up")
        all_right(await driver.ask("finish"), moved="died")
        await driver.ask("accounts", num_gpus=4)
        await driver.ask("end")
        told = [line for line in rig.logs(node).splitlines() if _KILLED.search(line)]
        print(told[:3])
        assert told, "it was not Ray's memory monitor that killed the actor"
    finally:
        await asyncio.to_thread(rig.kill_node, node)


async def test_node_joins_while_requests_wait(rig: Rig, driver: Driver) -> None:
    """What waits for room gets it from a node that joins: actors as they start, and requests whose node has died."""
    big = {**SIMULATED, "num_gpus": 6}
    starting = driver.begin("own", engines=[big], placement_timeout_s=200)
    first = await asyncio.to_thread(rig.add_node, 6)
    await starting
    slots = await driver.ask("up")
    assert [slot["node"] for slot in slots] == [first.id]
    answering = driver.begin("answer", size=16, num_tokens=1000)
    await driver.ask("running", at_least=16)
    await asyncio.to_thread(rig.kill_node, first)
    await driver.ask("lost", pids=[slots[0]["pid"]])
    waiting = driver.begin("answer", size=16)
    second = await asyncio.to_thread(rig.add_node, 6)
    await answering
    await waiting
    assert [slot["node"] for slot in await driver.ask("up")] == [second.id]
    await driver.ask("accounts", num_gpus=6)
    await driver.ask("end")
    await asyncio.to_thread(rig.kill_node, second)
    await driver.ask("until_dead", node=second.id)


async def refused(driver: Driver, engine: dict[str, Any]) -> str:
    """Return why a pool of an engine is refused, which has to be for the lack of room."""
    with pytest.raises(OrderError) as refusal:
        await driver.ask("own", engines=[engine])
    assert refusal.value.kind == "PlacementError"
    return str(refusal.value)


async def test_what_no_node_holds_is_refused(driver: Driver) -> None:
    """Eight GPUs on nodes of four, and GPUs that nobody has, are refused at once in the words of the plan."""
    refusal = await refused(driver, {"kind": "lmdeploy", "path": "any", "tp": 8})
    assert "no such node has 8 GPUs: the most is 4. What would fit: tp 4" in refusal
    refusal = await refused(driver, {**SIMULATED, "accelerator_type": "H100"})
    print(refusal)
    assert "H100" in refusal
    await driver.ask("accounts", num_gpus=0)


async def test_two_pools_want_the_same_gpus(driver: Driver) -> None:
    """The second pool waits until the first has ended, which does not notice."""
    all_of_a_node = {**SIMULATED, "num_gpus": 4}
    first = await driver.ask("own", engines=[all_of_a_node] * 3)
    second = driver.begin("own", engines=[all_of_a_node])
    await driver.ask("crowd", size=NUM_STREAMS, num_tokens=1000)
    outcome = await driver.ask("finish")
    print(outcome)
    assert outcome["right"] == NUM_STREAMS
    assert outcome["moves"] == {}
    assert not second.done()
    await driver.ask("accounts", num_gpus=12)
    await driver.ask("close_pool", number=first)
    await driver.ask("answer", size=16, pool=await second)
    await driver.ask("accounts", num_gpus=4)


async def test_scale_under_load(driver: Driver) -> None:
    """1, 4, none, 2 actors: no stream is cut or moved, and what comes while there is none waits."""
    await driver.ask("serve", engines=[SIMULATED])
    await driver.ask("crowd", size=NUM_STREAMS, num_tokens=1000)
    await driver.ask("scale", replicas=4)
    await driver.ask("settled", replicas=4)
    await driver.ask("accounts", num_gpus=4)
    await driver.ask("answer", size=16)
    await driver.ask("scale", replicas=0)
    outcome = await driver.ask("finish_streams")
    print(outcome)
    assert outcome["right"] == NUM_STREAMS
    assert outcome["moves"] == {}
    await driver.ask("settled", replicas=0)
    waiting = driver.begin("answer", size=16)
    await driver.ask("accounts", num_gpus=0)
    assert not waiting.done()
    await driver.ask("scale", replicas=2)
    await waiting
    await driver.ask("settled", replicas=2)
    await driver.ask("accounts", num_gpus=2)
    await driver.ask("finish")


async def test_update_under_load(driver: Driver) -> None:
    """On a full cluster an update makes room for itself, one actor at a time: what it takes away moves."""
    engine = {**SIMULATED, "num_gpus": 4, "replicas": 3}
    await driver.ask("serve", engines=[engine], drain_timeout_s=1)
    await driver.ask("crowd", size=NUM_STREAMS, num_tokens=1000)
    await driver.ask("update", engines=[{**engine, "model_name": "new"}], drain_timeout_s=1)
    assert await driver.ask("settled", replicas=3, model_name="new") == 2
    all_right(await driver.ask("finish"), moved="drained")
    await driver.ask("accounts", num_gpus=12)


async def test_update_where_one_more_has_room(driver: Driver) -> None:
    """Never do fewer serve than are wanted, however long the process of a new one takes to come up."""
    engine = {**SIMULATED, "num_gpus": 4, "replicas": 2}
    await driver.ask("serve", engines=[engine])
    await driver.ask("update", engines=[{**engine, "model_name": "new"}])
    assert await driver.ask("settled", replicas=2, model_name="new") == 2
    await driver.ask("accounts", num_gpus=8)
