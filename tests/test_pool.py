"""Queueing, limits and aborting: one pool on real actors with the simulated engine."""

import asyncio
import gc
import time
from contextlib import suppress
from itertools import product
from typing import Any

import msgspec
import pytest
import ray

from raylm.actors.engine_actor import LEASE_S
from raylm.config import PoolConfig, SimulatedConfig
from raylm.engines.simulated import candidates, greedy_text
from raylm.errors import (
    ContextLengthError,
    InvalidRequestError,
    NoActorError,
    PlacementError,
    PoolSaturatedError,
    RaylmError,
    RequestCancelledError,
    RequestTimeoutError,
)
from raylm.messages import Completion, GenerationConfig, Message, Request
from raylm.pool import Pool
from raylm.stream import Stream

from .conftest import Running, StartPool, ask

FAST = SimulatedConfig(tokens_per_s=200, max_context=10**9)
ONE_AT_A_TIME = FAST.model_copy(update={"capacity": 1})
SLOW = SimulatedConfig(tokens_per_s=20)
ENDLESS = 10**8
"""Tokens of a request that is to be running still, whatever the test waits for."""


async def until_idle(running: Running) -> None:
    """Wait until no engine works on anything; the test's own timeout ends a wait in vain."""
    for actor in running.manager.actors.values():
        while (await actor.statistics.remote()).num_running:
            await asyncio.sleep(0.02)


async def test_deltas_join_to_the_completion(start_pool: StartPool) -> None:
    """A stream's texts join to its completion's, and its token counts rise to its usage."""
    running = await start_pool(FAST)
    async with running.pool.stream(ask("tell me")) as stream:
        deltas = [delta async for delta in stream]
        completion = await stream.completion()
    assert "".join(delta.text for delta in deltas) == completion.text == greedy_text("tell me", 20)
    counts = [delta.num_tokens for delta in deltas]
    assert counts == sorted(counts)
    assert counts[-1] == completion.usage.completion_tokens == 20
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]


async def test_details_cross_the_pool(start_pool: StartPool) -> None:
    """A completion has all that the deltas told of the prompt's tokens and of the new ones."""
    running = await start_pool(FAST)
    config = GenerationConfig(temperature=0, max_new_tokens=3, echo=True, logprobs=True, top_logprobs=2)
    request = Request(request_id="1", prompt_token_ids=(4, 7), config=config)
    for done in (await running.pool.generate(request), await running.pool.stream(request).completion()):
        details = done.details
        assert details is not None
        assert details.prompt_token_ids == (4, 7)
        assert details.prompt_logprobs == (0.0, -1.0)
        assert details.prompt_top_logprobs == ((), candidates(7, "7 ", 2))
        assert "".join(details.token_texts) == done.text
        assert len(details.top_logprobs) == len(done.logprobs) == 3
    assert (await running.pool.generate(ask("tell me"))).details is None


WRONG: tuple[dict[str, Any], ...] = (
    {"prompt": "\ud800"},
    {"prompt_token_ids": (2**70,)},
    {"messages": (Message("user", "\udfff"),)},
    {"prompt_token_ids": (object(),)},
)
"""Requests that msgpack cannot hold."""


async def test_a_request_that_cannot_be_sent_fails_alone(start_pool: StartPool) -> None:
    """Of requests that leave in one call exactly the wrong ones fail, wherever they are, and say why."""
    running = await start_pool(FAST)
    for are_wrong in product((False, True), repeat=len(WRONG)):
        requests = [
            Request(request_id=f"wrong {place}", **WRONG[place]) if is_wrong else ask(f"right {place}", 3)
            for place, is_wrong in enumerate(are_wrong)
        ]
        results = await running.pool.generate_many(requests)
        for place, (is_wrong, result) in enumerate(zip(are_wrong, results, strict=True)):
            if is_wrong:
                assert isinstance(result, InvalidRequestError)
                assert str(result).startswith("the request cannot be sent: ")
            else:
                assert isinstance(result, Completion)
                assert result.text == greedy_text(f"right {place}", 3)
    assert running.pool.statistics().slots[0].num_running == 0


async def test_tokenize(start_pool: StartPool) -> None:
    """Any engine of the pool tells the tokens of a prompt, or why it cannot."""
    running = await start_pool(FAST)
    assert len(await running.pool.tokenize(ask("tell me more"))) == 3
    with pytest.raises(InvalidRequestError, match="empty"):
        await running.pool.tokenize(ask(""))
    await running.pool.aclose()
    with pytest.raises(NoActorError):
        await running.pool.tokenize(ask("tell me more"))


async def test_the_receipt_tells_who_and_why(start_pool: StartPool) -> None:
    """A completion says which slot, node, engine and model answered, and why that slot."""
    running = await start_pool(FAST)
    receipt = (await running.pool.generate(ask("tell me"))).receipt
    assert (receipt.slot, receipt.why, receipt.attempts) == (0, "least-loaded", 1)
    assert (receipt.engine, receipt.model) == ("simulated", "simulated")
    assert receipt.actor
    assert receipt.node
    assert receipt.queue_ms >= 0


async def test_rows_come_back_in_order(start_pool: StartPool) -> None:
    """`generate_many` returns rows in the order of the requests, however long each takes."""
    running = await start_pool(FAST, FAST)
    lengths = [1 + row * 7 % 40 for row in range(200)]
    results = await running.pool.generate_many([ask(f"row {row}", n) for row, n in enumerate(lengths)])
    texts = [result.text for result in results if isinstance(result, Completion)]
    assert texts == [greedy_text(f"row {row}", n) for row, n in enumerate(lengths)]


async def test_a_bad_row_fails_alone(start_pool: StartPool) -> None:
    """In `generate_many` a row that is too long has its error in its place, and the others their answers."""
    running = await start_pool(FAST.model_copy(update={"max_context": 50}))
    results = await running.pool.generate_many([ask("fine"), ask("word " * 60), ask("fine too")])
    assert isinstance(results[1], ContextLengthError)
    assert [result.text for result in results if isinstance(result, Completion)] == [
        greedy_text("fine", 20),
        greedy_text("fine too", 20),
    ]


async def test_requests_of_one_name_are_different_requests(start_pool: StartPool) -> None:
    """A request id that is used again, even by requests that run at the same time, mixes nothing up."""
    running = await start_pool(FAST)
    prompts = [f"prompt {number}" for number in range(16)]
    requests = [msgspec.structs.replace(ask(prompt, 12), request_id="same") for prompt in prompts]
    completions = await asyncio.gather(*(running.pool.generate(request) for request in requests))
    assert [completion.text for completion in completions] == [greedy_text(prompt, 12) for prompt in prompts]


async def test_no_rows_no_answers(start_pool: StartPool) -> None:
    """An empty list of requests has an empty list of results."""
    assert await (await start_pool(FAST)).pool.generate_many([]) == []


async def test_a_deadline_covers_the_queue(start_pool: StartPool) -> None:
    """A request whose deadline passes while it waits raises RequestTimeoutError and never reaches an engine."""
    running = await start_pool(ONE_AT_A_TIME)
    first = running.pool.stream(ask("long", ENDLESS))
    with pytest.raises(RequestTimeoutError, match=r"0\.3 s"):
        await running.pool.generate(ask("waits"), timeout_s=0.3)
    first.abort()
    await until_idle(running)
    assert "0 running, 0 waiting" in repr(running.pool)


async def test_a_deadline_covers_the_generation(start_pool: StartPool) -> None:
    """A request whose deadline passes while it runs raises RequestTimeoutError and is aborted in the engine."""
    running = await start_pool(FAST)
    with pytest.raises(RequestTimeoutError):
        await running.pool.generate(ask("long", ENDLESS), timeout_s=0.3)
    await until_idle(running)


async def test_a_full_queue_refuses_at_once(start_pool: StartPool) -> None:
    """With `max_queued` requests waiting, one more raises PoolSaturatedError that says when to try again."""
    running = await start_pool(ONE_AT_A_TIME, config=PoolConfig(max_queued=2))
    streams = [running.pool.stream(ask("first", ENDLESS))]
    await anext(streams[0])
    streams += [running.pool.stream(ask("waits")) for _ in range(2)]
    with pytest.raises(PoolSaturatedError) as raised:
        running.pool.stream(ask("too many"))
    assert raised.value.retry_after_s is not None
    for stream in streams:
        stream.abort()


async def test_a_crowd_that_comes_at_once_is_counted(start_pool: StartPool) -> None:
    """Of many requests in one moment, those are accepted that have room, and `max_queued` more."""
    running = await start_pool(SimulatedConfig(capacity=4), config=PoolConfig(max_queued=8))
    accepted = []
    for number in range(64):
        with suppress(PoolSaturatedError):
            accepted.append(running.pool.stream(ask(str(number), 5000)))
    assert len(accepted) == 4 + 8
    for stream in accepted:
        stream.abort()


async def test_a_list_is_let_in_as_a_whole(start_pool: StartPool) -> None:
    """Many requests in one call wait their turn, also where they are more than the queue holds."""
    running = await start_pool(ONE_AT_A_TIME, config=PoolConfig(max_queued=2))
    results = await running.pool.generate_many([ask(f"row {row}", 3) for row in range(8)])
    assert [getattr(result, "text", result) for result in results] == [greedy_text(f"row {row}", 3) for row in range(8)]


async def test_a_full_queue_refuses_a_list(start_pool: StartPool) -> None:
    """Where not even one of many requests finds room, none is begun; those that somebody waits for still are."""
    running = await start_pool(ONE_AT_A_TIME, config=PoolConfig(max_queued=1))
    streams = [running.pool.stream(ask("first", ENDLESS))]
    await anext(streams[0])
    streams.append(running.pool.stream(ask("waits"), lane="batch"))
    with pytest.raises(PoolSaturatedError):
        await running.pool.generate_many([ask("a"), ask("b")])
    assert running.pool.statistics().num_waiting == 1
    streams.append(running.pool.stream(ask("is not refused for the list")))
    for stream in streams:
        stream.abort()


async def test_the_reserve_is_no_room_for_a_list(start_pool: StartPool) -> None:
    """A list that waits because only the reserve is free is counted like any other that waits."""
    config = PoolConfig(max_queued=1, interactive_reserve=0.5)
    running = await start_pool(SimulatedConfig(capacity=2), config=config)
    streams = [running.pool.stream(ask("first", 5000), lane="batch")]
    await anext(streams[0])
    streams.append(running.pool.stream(ask("waits"), lane="batch"))
    with pytest.raises(PoolSaturatedError):
        await running.pool.generate_many([ask("a"), ask("b")])
    streams.append(running.pool.stream(ask("has room")))
    await anext(streams[-1])
    for stream in streams:
        stream.abort()


async def test_the_room_of_another_slot_is_none_for_a_session(start_pool: StartPool) -> None:
    """A session's request that waits for its own slot is counted, however empty the others are."""
    running = await start_pool(ONE_AT_A_TIME, ONE_AT_A_TIME, config=PoolConfig(max_queued=1))
    streams = [running.pool.stream(ask("first", ENDLESS), session_id="a")]
    await anext(streams[0])
    streams.append(running.pool.stream(ask("waits"), session_id="a"))
    with pytest.raises(PoolSaturatedError):
        running.pool.stream(ask("too many"), session_id="a")
    streams.append(running.pool.stream(ask("has room"), session_id="b"))
    await anext(streams[-1])
    for stream in streams:
        stream.abort()


async def test_a_list_of_a_session_lets_others_pass(start_pool: StartPool) -> None:
    """A turn does not wait for the list of another session, which has the same slot."""
    running = await start_pool(ONE_AT_A_TIME)
    for session in ("list", "chat"):
        await running.pool.generate(ask("hello", 1), session_id=session)
    rows = running.pool.as_completed([ask(f"row {row}", 10) for row in range(20)], session_id="list")
    await anext(rows)
    await running.pool.generate(ask("how are you", 1), session_id="chat")
    assert running.pool.statistics().num_waiting > 10
    await rows.aclose()


async def test_room_that_is_for_neither_lane(start_pool: StartPool) -> None:
    """Requests of both lanes that avoid the one slot with room wait for another, and the pool goes on meanwhile."""
    running = await start_pool(ONE_AT_A_TIME, FAST)
    first = running.pool.stream(ask("first", ENDLESS), avoid=[1])
    await anext(first)
    waiting = [running.pool.stream(ask("waits", 3), lane=lane, avoid=[1]) for lane in ("interactive", "batch")]
    assert (await running.pool.generate(ask("passes", 3))).receipt.slot == 1
    first.abort()
    for stream in waiting:
        assert (await stream.completion()).receipt.slot == 0


async def test_a_list_has_a_deadline(start_pool: StartPool) -> None:
    """Of many requests those that are not done in time have an error in their place, running or waiting."""
    running = await start_pool(ONE_AT_A_TIME)
    results = await running.pool.generate_many([ask("long", ENDLESS), ask("waits")], timeout_s=0.3)
    assert [type(result) for result in results] == [RequestTimeoutError, RequestTimeoutError]
    await until_idle(running)


async def test_aborting_a_stream_aborts_in_the_engine(start_pool: StartPool) -> None:
    """Leaving a stream early stops the engine's work on it and frees its room."""
    running = await start_pool(FAST)
    async with running.pool.stream(ask("long", ENDLESS)) as stream:
        await anext(stream)
    await until_idle(running)
    assert running.pool.statistics().num_running == 0
    assert running.pool.router.load(0) == 0


@pytest.mark.parametrize("gap_s", [0, 0.0005, 0.002, 0.005])
async def test_aborting_at_once_aborts_in_the_engine(start_pool: StartPool, gap_s: float) -> None:
    """A request that is given up while it is on its way to its actor is not left in the engine."""
    running = await start_pool(SimulatedConfig(capacity=1000, tokens_per_s=1))
    for number in range(200):
        stream = running.pool.stream(ask(str(number), 8000))
        await asyncio.sleep(gap_s)
        stream.abort()
    await until_idle(running)


@pytest.mark.parametrize("steps", range(8))
async def test_cancelling_at_any_await_leaves_nothing(start_pool: StartPool, steps: int) -> None:
    """A task that is cancelled while it waits for an answer leaves no request, whenever that is."""
    running = await start_pool(FAST)
    task = asyncio.create_task(running.pool.generate(ask("long", ENDLESS)))
    for _ in range(steps * steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(running)
    assert running.pool.statistics().num_running == running.pool.statistics().num_waiting == 0


async def test_interactive_goes_before_batch(start_pool: StartPool) -> None:
    """A chat request overtakes a waiting batch."""
    running = await start_pool(ONE_AT_A_TIME)
    ended: list[str] = []

    async def run(name: str, **lane: Any) -> None:
        await running.pool.generate(ask(name, 10), **lane)
        ended.append(name)

    async with asyncio.TaskGroup() as group:
        for row in range(6):
            group.create_task(run(f"row {row}", lane="batch"))
        group.create_task(run("chat"))
    assert ended.index("chat") <= 1


async def test_batch_keeps_its_share(start_pool: StartPool) -> None:
    """While interactive requests wait, the batch lane still gets `batch_share` of the dispatches."""
    running = await start_pool(ONE_AT_A_TIME, config=PoolConfig(batch_share=0.25))
    ended: list[str] = []

    async def run(name: str, **lane: Any) -> None:
        await running.pool.generate(ask(name, 2), **lane)
        ended.append(name)

    async with asyncio.TaskGroup() as group:
        for row in range(10):
            group.create_task(run(f"row {row}", lane="batch"))
        for row in range(40):
            group.create_task(run(f"chat {row}"))
    assert sum(name.startswith("row") for name in ended[:20]) == pytest.approx(5, abs=1)


async def test_a_pinned_session_waits_for_its_slot(start_pool: StartPool) -> None:
    """A session goes to its full slot, not to an empty one, and blocks nobody else meanwhile."""
    running = await start_pool(ONE_AT_A_TIME, ONE_AT_A_TIME)
    running.pool.router.pin("s", 0)
    first = running.pool.stream(ask("first", ENDLESS), session_id="s")
    second = running.pool.stream(ask("second", 2), session_id="s")
    other = await running.pool.generate(ask("other", 2))
    assert other.receipt.slot == 1
    assert not second.done
    assert first.attempt["why"] == "pinned"
    first.abort()
    assert ((await second.completion()).receipt.slot, (await second.completion()).receipt.why) == (0, "pinned")


async def test_a_session_that_has_another_slot_by_now_blocks_nobody(start_pool: StartPool) -> None:
    """Behind its requests others wait for the slot that it had, and get that as soon as it has room."""
    running = await start_pool(ONE_AT_A_TIME, ONE_AT_A_TIME)
    pin = running.pool.router.pin
    for session, slot in (("moves", 0), ("stays", 0), ("there", 1)):
        pin(session, slot)
    here = running.pool.stream(ask("here", ENDLESS), session_id="stays")
    there = running.pool.stream(ask("there", ENDLESS), session_id="there")
    await asyncio.gather(anext(here), anext(there))
    moved = running.pool.stream(ask("moved", 2), session_id="moves")
    behind = running.pool.stream(ask("behind", 2), session_id="stays")
    pin("moves", 1)
    here.abort()
    assert (await behind.completion()).receipt.slot == 0
    assert not moved.done
    there.abort()
    assert (await moved.completion()).receipt.slot == 1


async def test_a_session_leaves_a_slot_that_is_drained(start_pool: StartPool) -> None:
    """What waits for a full slot goes to another as soon as that one is drained."""
    running = await start_pool(ONE_AT_A_TIME, ONE_AT_A_TIME)
    running.pool.router.pin("s", 0)
    first = running.pool.stream(ask("first", ENDLESS), session_id="s")
    await anext(first)
    second = running.pool.stream(ask("second", 2), session_id="s")
    running.pool.drain(0)
    receipt = (await second.completion()).receipt
    assert (receipt.slot, receipt.why) == (1, "moved:drained")
    assert first.slot == 0
    first.abort()


async def test_two_turns_of_one_session_do_not_mix(start_pool: StartPool) -> None:
    """A second turn while one is running raises SessionBusyError, and the first ends well."""
    running = await start_pool(SLOW)

    def request(messages: tuple[Message, ...]) -> Request:
        return Request(request_id="turn", messages=messages, config=GenerationConfig(max_new_tokens=10))

    question = (Message("user", "hi"),)
    async with running.conversations.turn("s", question, request, start=True, end=False) as stream:
        await anext(stream)
        with pytest.raises(RaylmError, match="middle of a turn"):
            async with running.conversations.turn("s", question, request, start=False, end=False):
                pass
        await stream.completion()
    assert len((await running.conversations.load("s")).messages) == 2


@pytest.mark.parametrize("kind", ["turn", "pinned", "pinned_many"])
async def test_a_request_cancelled_before_the_pool_has_it(
    start_pool: StartPool, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A request that is cancelled while the store is asked about its session never runs, and holds no session."""
    running = await start_pool(FAST)
    conversations, store = running.conversations, running.conversations._store
    asked, answered = asyncio.Event(), asyncio.Event()

    def held(method: Any) -> Any:
        async def wait(*args: Any, **settings: Any) -> Any:
            asked.set()
            await answered.wait()
            return await method(*args, **settings)

        return wait

    monkeypatch.setattr(store, "claim", held(store.claim))
    monkeypatch.setattr(store, "pin", held(store.pin))
    request = ask("hello")

    async def run() -> None:
        if kind == "turn":
            async with conversations.turn("s", (), lambda _: request, start=True, end=False) as stream:
                await stream.completion()
        elif kind == "pinned":
            async with conversations.pinned(request, "s") as stream:
                await stream.completion()
        else:
            part = msgspec.structs.replace(request, request_id=f"{request.request_id}/0")
            await conversations.pinned_many([part], "s")

    task = asyncio.create_task(run())
    await asked.wait()
    assert not conversations.cancel("another")
    assert conversations.cancel(request.request_id)
    answered.set()
    with pytest.raises(RequestCancelledError):
        await task
    assert running.pool.statistics().num_attempts == 0
    assert not conversations.cancel(request.request_id)
    async with conversations.turn("s", (), lambda _: request, start=True, end=True) as stream:
        await stream.completion()


async def test_a_turn_left_early_leaves_the_session_as_it_was(start_pool: StartPool) -> None:
    """A client that goes away in mid-turn leaves no trace of it, in the transcript or in the engine."""
    running = await start_pool(FAST)

    for start, limit in ((True, 5), (False, ENDLESS)):
        config = GenerationConfig(max_new_tokens=limit)

        def request(messages: tuple[Message, ...], config: GenerationConfig = config) -> Request:
            return Request(request_id="turn", messages=messages, config=config)

        async with running.conversations.turn("s", (Message("user", "hi"),), request, start=start, end=False) as stream:
            while stream.num_tokens < 5:
                await anext(stream)
    await until_idle(running)
    assert len((await running.conversations.load("s")).messages) == 2


async def test_a_lost_client_is_aborted_by_its_lease(start_pool: StartPool) -> None:
    """Requests of a client that stops polling are aborted in the engine."""
    running = await start_pool(FAST)
    stream = running.pool.stream(ask("long", ENDLESS))
    await anext(stream)
    for task in tuple(running.pool._tasks):  # a pool whose process is gone
        task.cancel()
    await until_idle(running)


async def test_a_client_that_was_taken_for_lost_goes_on(start_pool: StartPool) -> None:
    """A pool whose loop stood still for longer than the lease takes its requests up again, and none is lost."""
    running = await start_pool(SimulatedConfig())
    num_tokens = 50 * int(LEASE_S * 2.5)  # the actor needs more than the lease to take note, and they take longer
    async with running.pool.stream(ask("long", num_tokens)) as stream:
        await anext(stream)
        while ray.get(running.manager.actors[0].statistics.remote()).num_running:
            time.sleep(0.1)  # noqa: ASYNC251  # the point of this test
        completion = await stream.completion()
    assert completion.text == greedy_text("long", num_tokens)
    assert completion.receipt.why == "moved:lease"


async def test_a_closed_pool_fails_what_is_left(start_pool: StartPool) -> None:
    """Closing a pool fails waiting and running requests with NoActorError and frees the engine."""
    running = await start_pool(ONE_AT_A_TIME)
    streams = [running.pool.stream(ask("long", ENDLESS)) for _ in range(3)]
    await anext(streams[0])
    await running.pool.aclose()
    for stream in streams:
        with pytest.raises(NoActorError):
            await stream.completion()
    with pytest.raises(NoActorError):
        running.pool.stream(ask("late"))
    await until_idle(running)


async def test_what_does_not_fit_is_refused(start_pool: StartPool) -> None:
    """More replicas than the cluster has CPUs for raise PlacementError that says how many fit."""
    from raylm.config import OpenVINOConfig

    with pytest.raises(PlacementError, match="room for 8"):
        await start_pool(*[OpenVINOConfig(path="any")] * 9)


async def test_no_pool_no_room() -> None:
    """A pool without slots queues a request until its deadline and then raises NoActorError."""
    async with Pool() as pool:
        with pytest.raises(NoActorError):
            await pool.generate(ask("hi"), timeout_s=0.05)


async def test_what_was_given_up_is_let_go() -> None:
    """Requests that are aborted while nothing has room do not stay in memory; those that still wait do."""
    async with Pool() as pool:
        waiting = pool.stream(ask("waiting"))
        for number in range(3000):
            pool.stream(ask(f"given up {number}")).abort()
        gc.collect()
        assert sum(isinstance(left, Stream) and left.done for left in gc.get_objects()) < 1500
        assert (pool.statistics().num_waiting, waiting.done) == (1, False)


async def test_times_of_tokens_are_those_of_streams(start_pool: StartPool) -> None:
    """A request whose tokens the actor holds back says nothing of when they were produced, and is not counted there."""
    running = await start_pool(FAST)
    await running.pool.generate(ask("held back", 5))
    report = running.pool.report()
    assert (report.statistics.num_finished, sum(report.queue_s.counts)) == (1, 1)
    assert sum(report.first_token_s.counts) == sum(report.token_gap_s.counts) == 0
    async with running.pool.stream(ask("as they come", 5)) as stream:
        await stream.completion()
    report = running.pool.report()
    assert sum(report.first_token_s.counts) == sum(report.token_gap_s.counts) == 1
    assert report.token_gap_s.total_s > 0
