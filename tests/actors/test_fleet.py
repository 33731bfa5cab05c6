"""The actors of a served model: scaled, updated, drained and given up, on real processes and under load."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import msgspec
import pytest
import ray
from pydantic import ValidationError

import raylm.served
from raylm import operate
from raylm.actors import manager_actor
from raylm.actors.cluster import actor_record
from raylm.actors.manager import named_actors
from raylm.actors.manager_actor import end, find, serve, told
from raylm.chatbot import AsyncServedModel
from raylm.config import ModelConfig
from raylm.engines.simulated import greedy_text
from raylm.errors import (
    EngineStartError,
    InvalidRequestError,
    ModelNotFoundError,
    NoActorError,
    PlacementError,
    RaylmError,
)
from raylm.messages import Completion, Message, Request
from raylm.operate import settled
from raylm.pool import Pool
from raylm.serve.run import _update
from raylm.served import ServedPool
from raylm.statistics import ModelState, SlotStatistics
from tests.conftest import ask

pytestmark = pytest.mark.timeout(600)

SIMULATED = {"kind": "simulated", "tokens_per_s": 100}
BROKEN = {"kind": "openvino", "path": "/nowhere/model.gguf"}

NO_ROOM = {**SIMULATED, "num_gpus": 1}
"""The cluster has no GPU."""

NAME = "fleet"

PATIENCE_S = 240.0
"""How long a busy machine may take for what takes seconds: to start some actors, one after the other."""


def config(*engines: dict[str, Any], **settings: Any) -> ModelConfig:
    """Return the settings of the model."""
    return ModelConfig.model_validate({"name": NAME, "engines": engines, **settings})


class Served:
    """A model that is served, and a pool on it."""

    def __init__(self, pool: ServedPool, stack: AsyncExitStack) -> None:
        self.pool = pool
        self.manager = find(NAME)
        self._stack = stack

    def load(self) -> Load:
        """Ask without a pause until the load is over, or the test."""
        load = Load(self.pool.pool)
        self._stack.push_async_callback(load.aclose)
        return load

    async def state(self) -> ModelState:
        """Return what its manager says."""
        state = msgspec.msgpack.decode(await told(self.manager.state.remote()), type=ModelState)
        assert isinstance(state, ModelState)
        return state

    async def slots(self, condition: Callable[[list[SlotStatistics]], object]) -> list[SlotStatistics]:
        """Return its slots as soon as they are as they should be, here and at the manager, which may be restarted."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with suppress(NoActorError):
                    slots = (await self.state()).slots
                    if condition(slots) and [slot.slot for slot in slots] == self.pool.pool.slots:
                        return slots
                await asyncio.sleep(0.05)

    async def are_up(self, num_slots: int) -> list[SlotStatistics]:
        """Wait until there are so many slots, all of them up."""
        return await self.slots(lambda slots: [slot.state for slot in slots] == ["up"] * num_slots)

    async def scale(self, replicas: int) -> None:
        """Have so many actors."""
        await told(self.manager.scale.remote(replicas, None))

    async def update(self, *engines: dict[str, Any]) -> None:
        """Have other engines."""
        await told(self.manager.update.remote(config(*engines).model_dump_json(), time.time_ns()))

    async def text(self, request: Request) -> str:
        """Return the answer to a request that nothing happens to."""
        return (await self.pool.pool.generate(request)).text


class Load:
    """Requests without a pause, each checked when it ends."""

    def __init__(self, pool: Pool, num_workers: int = 16) -> None:
        self.answers: list[Completion | RaylmError] = []
        self._pool = pool
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in range(num_workers)]
        self._ending = False

    async def _work(self, worker: int) -> None:
        number = 0
        while not self._ending:
            request = ask(f"worker {worker} request {number}", 30)
            try:
                answer = await self._pool.generate(request, timeout_s=PATIENCE_S)
            except RaylmError as error:
                self.answers.append(error)
                raise
            self.answers.append(answer)
            number += 1

    async def aclose(self) -> None:
        """Leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def over(self) -> list[Completion]:
        """Let the requests end, and return their answers: all of them, and whole."""
        self._ending = True
        await asyncio.gather(*self._tasks)
        completions = [answer for answer in self.answers if isinstance(answer, Completion)]
        assert completions
        assert {completion.usage.completion_tokens for completion in completions} == {30}
        assert len({completion.request_id for completion in completions}) == len(completions)
        return completions


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve_model(cluster: str) -> AsyncIterator[Serve]:
    """Serves the model, and ends it after the test."""
    async with AsyncExitStack() as stack:

        async def start(*engines: dict[str, Any], **settings: Any) -> Served:
            stack.push_async_callback(end, NAME)
            await serve(config(*engines, **settings))
            served = Served(await stack.enter_async_context(await ServedPool.open(NAME)), stack)
            await served.pool.ready()
            if served.pool.pool.slots:  # its report is on its way
                await served.slots(lambda slots: all(slot.state == "up" for slot in slots))
            return served

        yield start
    await _until(lambda: not _parts())  # Ray ends them without waiting for that


async def test_scale_under_load(serve_model: Serve) -> None:
    """1, 4, none, 2 actors: every request is answered, those that come while there is none too."""
    served = await serve_model(SIMULATED)
    load = served.load()
    await served.scale(4)
    await served.are_up(4)
    await served.scale(0)
    await served.are_up(0)
    assert served.pool.pool.statistics().num_running == 0
    await served.scale(2)
    await served.are_up(2)
    completions = await load.over()
    assert {completion.receipt.attempts for completion in completions} == {1}


async def test_update_under_load(serve_model: Serve) -> None:
    """The engines are replaced one by one, and no request notices."""
    served = await serve_model({**SIMULATED, "model_name": "old", "replicas": 2})
    load = served.load()
    fewest = 2
    await served.update({**SIMULATED, "model_name": "new", "replicas": 2})

    def watch(slots: list[SlotStatistics]) -> bool:
        nonlocal fewest
        fewest = min(fewest, sum(slot.state == "up" for slot in slots))
        return [(slot.state, slot.model) for slot in slots] == [("up", "new")] * 2

    slots = await served.slots(watch)
    assert fewest == 2
    assert [slot.slot for slot in slots] == [2, 3]
    completions = await load.over()
    assert {completion.receipt.attempts for completion in completions} == {1}
    assert {completion.receipt.model for completion in completions} == {"old", "new"}


async def test_update_that_does_not_start(serve_model: Serve) -> None:
    """The old engines go on, the state has the new one's own words, and the old settings bring it back to order."""
    served = await serve_model({**SIMULATED, "replicas": 2})
    load = served.load()
    await served.update({**BROKEN, "replicas": 2})
    slots = await served.slots(lambda slots: [slot.state for slot in slots] == ["up", "up", "failed"])
    assert "/nowhere/model.gguf" in slots[2].detail
    await served.update({**SIMULATED, "replicas": 2})
    slots = await served.are_up(2)
    assert [slot.slot for slot in slots] == [0, 1]
    await load.over()


async def test_a_drained_slot_finishes_what_it_has(serve_model: Serve) -> None:
    """A stream that runs there ends there, while a new actor takes its place."""
    served = await serve_model(SIMULATED)
    async with served.pool.pool.stream(ask("a long one", 200)) as stream:
        await anext(stream)
        await told(served.manager.drain.remote(0))
        completion = await stream.completion()
    assert (completion.receipt.slot, completion.receipt.attempts) == (0, 1)
    slots = await served.are_up(1)
    assert slots[0].slot == 1


async def test_what_is_not_done_in_time_moves(serve_model: Serve) -> None:
    """When the bound is over, a stream goes on at another actor, and its text is what it would have been."""
    served = await serve_model({**SIMULATED, "replicas": 2}, drain_timeout_s=0.5)
    undisturbed = greedy_text("a long one", 2000)
    async with served.pool.pool.stream(ask("a long one", 2000)) as stream:
        await anext(stream)
        slot = stream.slot
        await told(served.manager.drain.remote(slot))
        completion = await stream.completion()
    assert completion.text == undisturbed
    assert completion.receipt.slot != slot
    assert (completion.receipt.why, completion.receipt.attempts) == ("moved:drained", 2)


async def test_sessions_of_a_drained_slot(serve_model: Serve) -> None:
    """A session goes on elsewhere with its transcript; those of other slots stay."""
    served = await serve_model({**SIMULATED, "replicas": 2})

    async def turn(session: str, words: str, *, start: bool) -> Completion:
        make = lambda messages: msgspec.structs.replace(ask(words), prompt=None, messages=messages)  # noqa: E731
        message = (Message("user", words),)
        async with served.pool.conversations.turn(session, message, make, start=start, end=False) as stream:
            return await stream.completion()

    first = {session: await turn(session, "hello", start=True) for session in ("a", "b", "c", "d")}
    drained = first["a"].receipt.slot
    await told(served.manager.drain.remote(drained))
    await served.slots(lambda slots: drained not in [slot.slot for slot in slots])
    for session, before in first.items():
        after = await turn(session, "again", start=False)
        if before.receipt.slot == drained:
            assert after.receipt.why == "moved:drained"
        else:
            assert (after.receipt.slot, after.receipt.why) == (before.receipt.slot, "pinned")
        messages = (await served.pool.conversations.load(session)).messages
        assert [message.content for message in messages[::2]] == ["hello", "again"]


async def test_the_manager_is_killed_in_an_update(serve_model: Serve) -> None:
    """The next process takes the same actors over, and goes on with the update; never do fewer serve."""
    served = await serve_model({**SIMULATED, "model_name": "old", "replicas": 3})
    load = served.load()
    await served.update({**SIMULATED, "model_name": "new", "replicas": 3})
    await served.slots(lambda slots: any(slot.slot == 3 for slot in slots))
    os.kill(await _pid(served.manager), signal.SIGKILL)

    async def done() -> bool:
        try:
            slots = (await served.state()).slots
        except RaylmError:
            return False
        return [(slot.state, slot.model) for slot in slots] == [("up", "new")] * 3

    async with asyncio.timeout(PATIENCE_S):
        while not await done():
            assert served.pool.pool.num_up >= 3
            await asyncio.sleep(0.1)
    slots = await served.are_up(3)
    assert [slot.slot for slot in slots] == [3, 4, 5]
    completions = await load.over()
    assert {completion.receipt.attempts for completion in completions} == {1}


async def test_an_actor_hangs_when_the_manager_is_restarted(serve_model: Serve) -> None:
    """The next process of the manager, which has never heard of the actor, has its process replaced."""
    served = await serve_model(SIMULATED)
    (slot,) = (await served.state()).slots
    assert slot.pid is not None
    os.kill(slot.pid, signal.SIGSTOP)
    os.kill(await _pid(served.manager), signal.SIGKILL)
    await served.slots(lambda slots: [found.state for found in slots] == ["up"] and slots[0].pid != slot.pid)
    assert (await served.pool.pool.generate(ask("hello"))).text == greedy_text("hello", 20)


async def test_a_model_that_is_ended(serve_model: Serve) -> None:
    """Its pools ask no more: what waits fails, what comes is refused, and both say that it is served no longer."""
    served = await serve_model({**SIMULATED, "capacity": 1})
    pool = served.pool.pool
    async with pool.stream(ask("runs", 8000)) as running, pool.stream(ask("waits")) as waiting:
        await anext(running)
        await end(NAME)
        for stream in (running, waiting):
            with pytest.raises(ModelNotFoundError, match="model 'fleet' is served no longer"):
                await stream.completion()
    with pytest.raises(ModelNotFoundError, match="served no longer"):
        await pool.generate(ask("comes"))
    with pytest.raises(ModelNotFoundError, match="served no longer"):
        async with served.pool.conversations.turn("a", (), lambda _: ask("comes"), start=True, end=True):
            pass
    with pytest.raises(ModelNotFoundError, match="served no longer"):
        await served.pool.state()
    assert (served.pool.is_served, served.pool.answers) == (False, False)
    async with asyncio.timeout(PATIENCE_S):
        while len(served.pool._tasks):
            await asyncio.sleep(0.05)


async def test_a_model_that_is_ended_while_it_starts(serve_model: Serve) -> None:
    """Who waits for it to be up is told that it is served no longer."""
    served = await serve_model(SIMULATED)
    await served.scale(0)
    await served.are_up(0)
    await served.update(NO_ROOM)  # for one that starts and fails would end the wait
    await served.slots(lambda slots: len(slots) == 1)
    waiting = asyncio.create_task(served.pool.ready())
    await asyncio.sleep(0)
    await end(NAME)
    with pytest.raises(ModelNotFoundError, match="served no longer"):
        await waiting


async def test_a_manager_that_is_restarted_is_waited_for(serve_model: Serve) -> None:
    """However often its process is killed, the pool comes back to the next one, and answers meanwhile."""
    served = await serve_model(SIMULATED)
    load = served.load()
    for _ in range(3):
        before = await _pid(served.manager)
        os.kill(before, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while await _pid(served.manager) in (before, 0) or not await _knows(served):
                await asyncio.sleep(0.05)
    assert served.pool.is_served
    completions = await load.over()
    assert {completion.receipt.attempts for completion in completions} == {1}


def test_whose_actors_are_whose() -> None:
    """Two groups with one engine cannot be told apart, so the one that scales itself would not know its own load."""
    scaling = {"min_replicas": 0, "max_replicas": 2, "target_outstanding_tokens": 100}
    with pytest.raises(ValidationError, match="make one group of both"):
        config({**SIMULATED, "replicas": 2}, {**SIMULATED, "autoscaling": scaling})


async def test_scales_by_the_work(serve_model: Serve) -> None:
    """From none to the most there may be while there is work, and back when it is done."""
    scaling = {
        "min_replicas": 0,
        "max_replicas": 3,
        "target_outstanding_tokens": 50,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
    }
    served = await serve_model({**SIMULATED, "autoscaling": scaling})
    assert (await served.state()).slots == []
    load = served.load()
    await served.are_up(3)
    completions = await load.over()
    assert {completion.receipt.attempts for completion in completions} == {1}
    await served.are_up(0)
    answer = await served.pool.pool.generate(ask("after a while"), timeout_s=PATIENCE_S)
    assert answer.usage.completion_tokens == 20


async def test_an_engine_that_does_not_start(serve_model: Serve) -> None:
    """It is given up after some attempts with its own words, what it held is free, and a drain tries again."""
    served = await serve_model(SIMULATED)
    await served.update({**BROKEN, "replicas": 1}, SIMULATED)
    slots = await served.slots(lambda slots: sorted(slot.state for slot in slots) == ["failed", "up"])
    failed = next(slot for slot in slots if slot.state == "failed")
    assert "/nowhere/model.gguf" in failed.detail
    assert await served.text(ask("still there")) != ""
    await told(served.manager.drain.remote(failed.slot))
    slots = await served.slots(lambda slots: sorted(slot.state for slot in slots) == ["failed", "up"] and slots)
    assert max(slot.slot for slot in slots) > failed.slot


@pytest.mark.parametrize(("other", "state"), [(BROKEN, "failed"), (NO_ROOM, "waiting")])
async def test_a_slot_that_does_not_come_up(serve_model: Serve, other: dict[str, Any], state: str) -> None:
    """Whoever connects meanwhile is answered by those that are up."""
    served = await serve_model(SIMULATED)
    await served.update(SIMULATED, {**other, "replicas": 1})
    await served.slots(lambda slots: sorted(slot.state for slot in slots) == sorted(["up", state]))
    async with AsyncServedModel(NAME) as model:
        assert await model.generate("hello", max_new_tokens=4) != ""


async def test_an_actor_that_is_ended_for_good(serve_model: Serve) -> None:
    """Another one takes its place."""
    served = await serve_model(SIMULATED)
    ray.kill(ray.get_actor(f"{NAME}:slot-0", namespace="raylm"), no_restart=True)
    slots = await served.slots(lambda slots: [(slot.slot, slot.state) for slot in slots] == [(1, "up")])
    assert slots
    assert await served.text(ask("hello")) != ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("scale", -1, None), "replicas: must be 0 or more, got -1"),
        (("scale", 1, 1), "group: fleet has 1, numbered from 0; got 1"),
        (("drain", 7), "slot: fleet has no slot 7; there are: 0"),
    ],
)
async def test_wrong_wishes(serve_model: Serve, call: tuple[Any, ...], message: str) -> None:
    """What cannot be is refused by name, and changes nothing."""
    served = await serve_model(SIMULATED)
    name, *arguments = call
    with pytest.raises(InvalidRequestError, match=message):
        await told(getattr(served.manager, name).remote(*arguments))
    await served.are_up(1)


async def test_an_old_wish(serve_model: Serve) -> None:
    """What was said before that which is in force changes nothing: a gateway that comes late is outdated."""
    served = await serve_model(SIMULATED)
    before = time.time_ns()
    await served.update({**SIMULATED, "model_name": "new"})
    await told(served.manager.update.remote(config(SIMULATED).model_dump_json(), before))
    await served.slots(lambda slots: [(slot.state, slot.model) for slot in slots] == [("up", "new")])


async def test_sessions_cannot_be_changed_in_service(serve_model: Serve) -> None:
    """Settings that an update cannot bring about are refused."""
    served = await serve_model(SIMULATED)
    changed = config(SIMULATED, sessions={"ttl_s": 1}).model_dump_json()
    with pytest.raises(InvalidRequestError, match="sessions: "):
        await told(served.manager.update.remote(changed, time.time_ns()))


async def test_outdated_are_told_until_they_have_ended(serve_model: Serve) -> None:
    """At every moment of an update it is known that it is not over, and at its end that it is."""
    served = await serve_model({**SIMULATED, "model_name": "old", "replicas": 2})
    assert (await served.state()).outdated == []
    await served.update({**SIMULATED, "model_name": "new", "replicas": 2})
    async with asyncio.timeout(PATIENCE_S):
        while (state := await served.state()).outdated:
            assert {slot.slot for slot in state.slots if slot.model == "old"} <= set(state.outdated)
    assert [(slot.slot, slot.model) for slot in state.slots] == [(2, "new"), (3, "new")]


async def test_settled_after_the_manager_was_killed(serve_model: Serve) -> None:
    """While the next process changes nothing yet, an update that has been asked for is not over."""
    served = await serve_model({**SIMULATED, "model_name": "old"})
    new = config({**SIMULATED, "model_name": "new"})
    await serve(new, time.time_ns())
    os.kill(await _pid(served.manager), signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        await settled([new])
    assert [(slot.slot, slot.model) for slot in (await served.state()).slots] == [(1, "new")]


async def test_settled_when_a_failed_update_is_corrected(serve_model: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an engine that is wanted fails an update: one that is about to go does not fail the next."""
    served = await serve_model({**SIMULATED, "model_name": "old"})
    await served.update(BROKEN)
    await served.slots(lambda slots: [slot.state for slot in slots] == ["up", "failed"])
    with pytest.raises(EngineStartError, match="slot 1 of fleet did not start"):
        await settled([config(BROKEN)])
    seen = await served.state()
    assert (seen.slots[1].state, seen.outdated) == ("failed", [0])
    seen.outdated = [0, 1]  # of the moment when something else is wanted, and nothing has been done for it
    looks = [seen]
    new = config({**SIMULATED, "model_name": "new"})
    await serve(new, time.time_ns())
    look = operate._state

    async def first_look(model: str) -> ModelState:
        return looks.pop() if looks else await look(model)

    monkeypatch.setattr(operate, "_state", first_look)
    async with asyncio.timeout(PATIENCE_S):
        await settled([new])
    assert [slot.model for slot in (await served.state()).slots] == ["new"]


async def test_up_while_the_manager_does_not_answer(serve_model: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose present settings cannot be learned is updated too."""
    await serve_model(SIMULATED)
    monkeypatch.setattr(manager_actor, "ANSWER_TIMEOUT_S", 0)
    new = config({**SIMULATED, "model_name": "new"})
    await _update((new,), time.time_ns())
    assert ModelConfig.model_validate_json(await told(find(NAME).config.remote())) == new


async def test_up_while_the_manager_is_restarted(serve_model: Serve) -> None:
    """Either the model is updated, or it is said that it has to be tried again."""
    served = await serve_model(SIMULATED)
    new = config({**SIMULATED, "model_name": "new"})
    os.kill(await _pid(served.manager), signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await _update((new,), time.time_ns())
                break
            except NoActorError as error:
                assert "try again" in str(error)  # noqa: PT017 - it need not come
                await asyncio.sleep(0.1)
    assert ModelConfig.model_validate_json(await told(served.manager.config.remote())) == new


@pytest.fixture
async def unstarted(cluster: str) -> AsyncIterator[None]:
    """For tests of a model that has not started: ends it after the test."""
    yield
    await end(NAME)


@pytest.mark.usefixtures("unstarted")
async def test_a_first_start_under_way_is_corrected() -> None:
    """What waits for room ends, other settings take its place at once, and who has waited is told."""
    waiting = asyncio.create_task(serve(config(NO_ROOM)))
    await _until(lambda: "slot-0" in _parts())
    async with asyncio.timeout(PATIENCE_S):
        await serve(config(SIMULATED), time.time_ns())
        with pytest.raises(InvalidRequestError, match="served with other settings"):
            await waiting
    async with await ServedPool.open(NAME) as pool:
        assert (await pool.pool.generate(ask("hello"))).receipt.slot == 1
    assert _parts() == {"manager", "sessions", "slot-1"}


@pytest.mark.usefixtures("unstarted")
async def test_a_first_start_that_has_failed_is_corrected() -> None:
    """Also by who allows no update: nothing is served yet."""
    with pytest.raises(PlacementError):
        await serve(config(NO_ROOM, pool={"placement_timeout_s": 0}))
    await serve(config(SIMULATED, sessions={"ttl_s": 60}))
    async with await ServedPool.open(NAME) as pool:
        assert (await pool.pool.generate(ask("hello"))).text


@pytest.mark.usefixtures("unstarted")
async def test_a_look_at_a_model_that_has_not_started_starts_nothing() -> None:
    """It tells why that failed."""
    with pytest.raises(PlacementError):
        await serve(config(NO_ROOM, pool={"placement_timeout_s": 0.1}))
    await _until(lambda: _parts() == {"manager"})  # Ray ends the others without waiting for that
    before = _num_created()
    for _ in range(2):
        (state,) = await operate.states()
        assert "the actors are not up" in state.problem
    for look in ("state", "config", "sessions"):
        with pytest.raises(PlacementError):
            await told(getattr(find(NAME), look).remote())
    assert (_parts(), _num_created()) == ({"manager"}, before)


@pytest.mark.usefixtures("unstarted")
async def test_a_look_at_a_model_that_waits_for_room() -> None:
    """It tells that, and does not wait with it."""
    first = asyncio.create_task(serve(config(NO_ROOM)))
    await _until(lambda: "slot-0" in _parts())
    (state,) = await operate.states()
    assert (state.slots, "are being created" in state.problem) == ([], True)
    await end(NAME)
    with pytest.raises(NoActorError):
        await first


@pytest.mark.usefixtures("unstarted")
async def test_a_corrected_first_start_survives_the_manager() -> None:
    """The next process is made with the settings that were wrong, and goes on from those that were said last."""
    refused, said_at = config(NO_ROOM, pool={"placement_timeout_s": 0}), time.time_ns()
    with pytest.raises(PlacementError):
        await serve(refused, said_at)
    first = asyncio.create_task(serve(config(NO_ROOM), time.time_ns()))
    await _until(lambda: "slot-1" in _parts())
    os.kill(await _pid(find(NAME)), signal.SIGKILL)
    with pytest.raises(NoActorError, match="try again"):
        await first
    late = asyncio.create_task(_persist(refused, said_at))  # as a gateway that was told so, and starts again and again
    await _until(lambda: "slot-2" in _parts())
    await serve(config(SIMULATED), time.time_ns())
    await late
    async with await ServedPool.open(NAME) as pool:
        assert (await pool.pool.generate(ask("hello"))).receipt.slot == 3


async def test_the_manager_is_killed_while_there_are_no_actors(serve_model: Serve) -> None:
    """The next process takes the model over as it is: a session store that is slow to answer is left alone."""
    served = await serve_model(SIMULATED)
    await served.scale(0)
    await served.are_up(0)
    store = await _pid(ray.get_actor(f"{NAME}:sessions", namespace="raylm"))
    before = await _pid(served.manager)
    os.kill(store, signal.SIGSTOP)
    try:
        os.kill(before, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while await _pid(served.manager) in (before, 0) or not await _answers(served):
                await asyncio.sleep(0.05)
    finally:
        os.kill(store, signal.SIGCONT)
    assert await _pid(ray.get_actor(f"{NAME}:sessions", namespace="raylm")) == store
    await served.scale(1)
    await served.are_up(1)


async def _answers(served: Served) -> bool:
    try:
        await served.state()
    except NoActorError:
        return False
    return True


async def _persist(model: ModelConfig, as_of: int) -> None:
    """Have a model served, however often its manager is being restarted."""
    while True:
        with suppress(NoActorError):
            await serve(model, as_of)
            return
        await asyncio.sleep(0.1)


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)


def _parts() -> set[str]:
    """Return which actors of the model there are."""
    return {name.removeprefix(f"{NAME}:") for name in named_actors() if name.startswith(f"{NAME}:")}


def _num_created() -> int:
    """Return how many actors Ray has ever been asked for."""
    return len(ray._private.state.actors())


async def _knows(served: Served) -> bool:
    """Return whether the manager has heard of the pool, of which an earlier process knew."""
    try:
        return [slot.state for slot in (await served.state()).slots if slot.capacity] == ["up"]
    except RaylmError:
        return False


async def _pid(actor: Any) -> int:
    """Return the process of an actor."""
    return int((await asyncio.to_thread(actor_record, actor))["Pid"])


async def test_a_manager_that_stands_still(serve_model: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered without it; what it alone knows is refused in time, and told when it goes on."""
    monkeypatch.setattr(raylm.served, "ANSWER_TIMEOUT_S", 0.5)
    served = await serve_model(SIMULATED)
    load = served.load()
    pid: int = await served.manager.__ray_call__.remote(lambda _: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(PATIENCE_S):
            for refused in (served.pool.state(), served.pool.cancel_elsewhere("unknown")):
                with pytest.raises(NoActorError, match="has not answered within"):
                    await refused
            assert (await served.pool.pool.generate(ask("without it", 5))).text == greedy_text("without it", 5)
            await load.over()
            await served.pool.aclose()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await served.state()).num_wanted == 1
