"""What breaks while 64 clients are being answered, and what they see of it: nothing, or an honest failure."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import psutil
import pytest

from raylm.messages import Message
from tests.chaos.clients import Ask, Conversation, Crowd, chat, completion
from tests.chaos.conftest import GATEWAY, MANAGER, STORE, Chaos
from tests.serve.command import GATEWAY_PORTS

pytestmark = pytest.mark.timeout(600)


async def test_engine_is_killed(chaos: Chaos) -> None:
    """No answer suffers from the death of an engine's process."""
    crowd, victim = await chaos.crowd(), await chaos.pid(1)
    chaos.strike(victim)
    recovered_s = await chaos.recovered(victim)
    await crowd.all_right()
    await chaos.note(recovered_s, crowd)


async def test_all_engines_are_killed(chaos: Chaos) -> None:
    """Answers wait for engines to come back when there are none, and then go on."""
    crowd, victims = await chaos.crowd(), [await chaos.pid(slot) for slot in range(4)]
    chaos.strike(*victims)
    recovered_s = await chaos.recovered(*victims)
    await crowd.all_right()
    await chaos.note(recovered_s, crowd)


async def test_engine_process_is_stopped(chaos: Chaos) -> None:
    """An engine's process that stands still is replaced, and no answer suffers."""
    crowd, victim = await chaos.crowd(), await chaos.pid(2)
    chaos.strike(victim, number=signal.SIGSTOP)
    recovered_s = await chaos.recovered(victim)
    await crowd.all_right()
    await chaos.note(recovered_s, crowd)


async def test_engine_hangs(chaos: Chaos) -> None:
    """An engine that gives no more tokens, in a process that still answers, is replaced, and no answer suffers."""
    talk = await _session_in_slot(chaos, 0)
    crowd, victim = await chaos.crowd(), await chaos.pid(0)
    hanging = asyncio.create_task(talk.turn("hang here").run(chaos.http))
    chaos.struck_at = time.monotonic()
    recovered_s = await chaos.recovered(victim)
    await crowd.all_right()
    assert (await hanging).outcome == "right", hanging.result()
    await talk.end(chaos.http)
    await chaos.note(recovered_s, crowd)


async def test_gateway_is_killed(chaos: Chaos) -> None:
    """The clients of a gateway that dies see it, and nobody else does. Its sessions go on at the other one."""
    crowd = await chaos.crowd(num_tokens=1500)
    victim, survivor = await chaos.pids(GATEWAY)
    at_victim, at_survivor = _num_connections(victim), _num_connections(survivor)
    chaos.strike(victim)
    await crowd.finish()
    broken = [ask for ask in crowd.asks if ask.outcome != "right"]
    print(f"{len(broken)} of {at_victim} connections broke, {at_survivor} were at the other gateway")
    assert {ask.outcome for ask in broken} == {"broken"}  # with their connections, and none was refused
    assert len(broken) <= at_victim
    assert len(crowd.asks) - len(broken) <= at_survivor
    await _settle_broken_turns(chaos, crowd)
    await crowd.sessions_go_on()
    await chaos.note(await chaos.recovered(victim), crowd)


async def test_manager_is_killed(chaos: Chaos) -> None:
    """Nobody notices the death of the managers, and afterwards all is as it was."""
    crowd, victims = await chaos.crowd(), await chaos.pids(MANAGER)
    chaos.strike(*victims)
    recovering = asyncio.create_task(chaos.recovered(*victims))
    while not recovering.done():
        async with chaos.http.post("/requests/unknown/cancel") as response:
            assert response.status in (202, 503), await response.text()
        await asyncio.sleep(0.1)
    await crowd.all_right()
    await chaos.note(recovering.result(), crowd)
    await (await chaos.crowd(8)).all_right()


async def test_manager_is_stopped(chaos: Chaos) -> None:
    """While the managers stand still, answers go on and new ones begin. What they alone know is refused in time."""
    crowd, managers = await chaos.crowd(), await chaos.pids(MANAGER)
    chaos.strike(*managers, number=signal.SIGSTOP)
    try:
        new = asyncio.create_task(chat("sim", "new while no manager answers", 20).run(chaos.http))
        asked = [("GET", "/state"), ("GET", "/metrics"), ("POST", "/requests/unknown/cancel")]
        async with asyncio.timeout(60):
            assert await asyncio.gather(*(_status(chaos, *request) for request in asked)) == [503] * 3
        assert (await new).outcome == "right", new.result()
    finally:
        chaos.strike(*managers, number=signal.SIGCONT)
    recovered_s = await chaos.recovered()
    await crowd.all_right()
    await chaos.note(recovered_s, crowd)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
async def test_manager_and_engine_at_once(chaos: Chaos, number: signal.Signals) -> None:
    """The death of the managers, while an engine dies or hangs, costs no other engine and no answer."""
    before = [slot["pid"] for slot in (await chaos.state())["slots"]]
    crowd, victims = await chaos.crowd(), [before[3], *await chaos.pids(MANAGER)]
    chaos.strike(before[3], number=number)
    chaos.strike(*victims[1:])
    recovered_s = await chaos.recovered(*victims)
    await crowd.all_right()
    after = [slot["pid"] for slot in (await chaos.state())["slots"]]
    assert after[:3] == before[:3]
    await chaos.note(recovered_s, crowd)


async def test_session_store_is_killed(chaos: Chaos) -> None:
    """The death of the session store, in the middle of some turns and between others, costs no word of a session."""
    crowd, victims = await chaos.crowd(), await chaos.pids(STORE)
    chaos.strike(*victims)
    fresh = Conversation("sim", "fresh")
    await fresh.say(chaos.http, "begun while there is no store")
    idle = crowd.conversations[-1]  # between two turns
    await idle.say(chaos.http, "went on while there was no store")
    recovered_s = await chaos.recovered(*victims)
    await crowd.all_right()
    await fresh.say(chaos.http, "and then?")
    await fresh.end(chaos.http)
    await chaos.note(recovered_s, crowd)


async def test_redis_is_killed(chaos: Chaos) -> None:
    """While the sessions' database is away a turn is refused, and no more; when it is back it has every word."""
    crowd = await chaos.crowd(model="kept", num_tokens=1500)
    began = time.monotonic()
    chaos.redis.kill()
    try:
        refused = await crowd.conversations[-1].turn("is there a database?").run(chaos.http)
        assert (await chaos.state("kept"))["num_sessions"] is None
        while (await chaos.state("sim"))["num_sessions"] is None:  # its store has a second to say it
            await asyncio.sleep(0.1)
    finally:
        await asyncio.to_thread(chaos.redis.start)
    away_s = time.monotonic() - began
    assert (refused.outcome, refused.status) == ("refused", 503), refused
    assert int(refused.headers["retry-after"]) >= 1
    await crowd.all_right()
    print(f"the database was away for {away_s:.1f} s")
    await chaos.note(away_s, crowd)


async def test_queue_is_full(chaos: Chaos) -> None:
    """What a queue has no room for is refused at once, what it takes is answered, and nobody else notices."""
    crowd = await chaos.crowd(num_tokens=2200)
    asks = [chat("small", f"crowded {number}", 400) for number in range(64)]
    chaos.struck_at = time.monotonic()
    running = [asyncio.create_task(ask.run(chaos.http)) for ask in asks]
    for ended in asyncio.as_completed(running):
        if (await ended).outcome == "right":
            break
    recovered_s = await _taken_again(chaos, "small")
    assert not [ask for ask in crowd.asks if ask.outcome is not None], "over before the queue had room again"
    await asyncio.gather(*running)
    accepted = [ask for ask in asks if ask.outcome == "right"]
    refused = [ask for ask in asks if ask.outcome != "right"]
    assert {ask.status for ask in refused} == {429}, refused
    assert all(int(ask.headers["retry-after"]) >= 1 for ask in refused)
    assert len(accepted) >= 2 * (4 + 8)  # two gateways, each with room for 4 and a queue of 8
    assert max(ask.elapsed_s for ask in refused) < min(ask.elapsed_s for ask in accepted)
    await crowd.all_right()
    await chaos.note(recovered_s, crowd)


async def test_clients_leave(chaos: Chaos) -> None:
    """Clients that close their sockets free the engines at once, and disturb nobody."""
    aborted = (await chaos.state())["num_aborted"]
    crowd = await chaos.crowd(num_tokens=1500)
    whole = [_whole(chaos, f"whole {number}") for number in range(8)]
    await _running(chaos, at_least=len(crowd.asks) + len(whole))
    sockets = [*zip(crowd.tasks, crowd.asks, strict=True)]
    leaving = random.Random(0).sample(sockets, 30)
    for task in (*(task for task, _ in leaving), *whole):
        task.cancel()
    await asyncio.gather(*(task for task, _ in leaving), *whole, return_exceptions=True)
    chaos.struck_at = time.monotonic()
    await _running(chaos, at_most=len(crowd.asks) - len(leaving))
    aborted_s = time.monotonic() - chaos.struck_at
    gone = {id(ask) for _, ask in leaving}
    crowd.tasks = [task for task, ask in sockets if id(ask) not in gone]
    crowd.asks = [ask for ask in crowd.asks if id(ask) not in gone]
    assert not [ask for ask in crowd.asks if ask.outcome is not None], "over before the engines were seen to be free"
    await crowd.all_right()
    await chaos.idle()
    aborted += len(leaving) + len(whole)
    while (told := (await chaos.state())["num_aborted"]) < aborted:  # gateways tell it once a second
        await asyncio.sleep(0.1)
    assert told == aborted
    await chaos.note(aborted_s, crowd)


async def _session_in_slot(chaos: Chaos, slot: int) -> Conversation:
    """Return a session that is pinned to a slot."""
    for number in range(100):
        talk = Conversation("sim", f"in-slot-{slot}-{number}")
        ask = await talk.say(chaos.http, "hello")
        if ask.headers["x-raylm-slot"] == str(slot):
            return talk
        await talk.end(chaos.http)
    pytest.fail(f"no session gets to slot {slot}")


async def _settle_broken_turns(chaos: Chaos, crowd: Crowd) -> None:
    """Have each session know whether the turn that broke is in its transcript: all of it, or nothing."""
    for talk, ask in crowd.turns:
        if ask.outcome != "right":
            stored = await talk.stored(chaos.http)
            turn = [Message("user", ask.body["inputs"]), Message("assistant", ask.expected)]
            assert stored in (talk.transcript, talk.transcript + turn)
            talk.transcript = stored


async def _taken_again(chaos: Chaos, model: str) -> float:
    """Ask until a queue that was full has room; return the seconds from the strike to the answer."""
    while (ask := await chat(model, "is there room?", 1).run(chaos.http)).outcome != "right":
        assert ask.status == 429, ask
        await asyncio.sleep(0.1)
    return time.monotonic() - chaos.struck_at


async def _status(chaos: Chaos, method: str, path: str) -> int:
    """Return the status of an answer without a stream."""
    async with chaos.http.request(method, path) as response:
        await response.read()
        return response.status


def _num_connections(pid: int) -> int:
    """Return how many connections a gateway has taken and not closed."""
    connections = psutil.Process(pid).net_connections("tcp")
    listening = {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
    ports = listening.intersection(GATEWAY_PORTS)
    return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port in ports for one in connections)


def _whole(chaos: Chaos, prompt: str) -> asyncio.Task[Ask]:
    """Start a request whose answer comes in one piece."""
    ask = completion("sim", prompt, 2000)
    ask.body["stream"] = False
    return asyncio.create_task(ask.run(chaos.http))


async def _running(chaos: Chaos, *, at_least: int = 0, at_most: int = 10**9) -> None:
    """Wait until so many requests are in the engines."""
    while True:
        running = sum(slot["num_running"] for slot in (await chaos.state())["slots"])
        if at_least <= running <= at_most:
            return
        await asyncio.sleep(0.05)
