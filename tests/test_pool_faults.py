"""What a caller sees when something breaks: real actors, real kills, simulated engines."""

import asyncio
import os
import signal

import pytest

from raylm.config import Fault, PoolConfig, SimulatedConfig
from raylm.engines.simulated import greedy_text, prompt_text
from raylm.errors import EngineError, PoisonRequestError, RequestTimeoutError
from raylm.messages import Completion, GenerationConfig, Message, Request
from raylm.pool import Pool
from raylm.stream import Stream

from .conftest import StartPool, ask

FAST = SimulatedConfig(tokens_per_s=200)
SLOW = SimulatedConfig(tokens_per_s=3)
"""An engine that is in the middle of a request still, whenever the test gets round to breaking it."""


async def until_tokens(stream: Stream, num_tokens: int) -> None:
    """Read a stream until it has so many tokens."""
    while stream.num_tokens < num_tokens:
        await anext(stream)


async def test_kill_in_mid_batch_keeps_every_row_once_in_order(start_pool: StartPool) -> None:
    """Kill -9 of one of two actors in mid-batch loses no row, doubles none, and keeps their order."""
    running = await start_pool(SimulatedConfig(capacity=16), SimulatedConfig(capacity=16))
    prompts = [f"row {row}" for row in range(100)]
    results: dict[int, Completion] = {}
    async for index, result in running.pool.as_completed([ask(prompt) for prompt in prompts]):
        if not results:
            os.kill(running.pid(0), signal.SIGKILL)
        assert index not in results
        assert isinstance(result, Completion), result
        results[index] = result
    assert [results[row].text for row in range(100)] == [greedy_text(prompt, 20) for prompt in prompts]
    assert running.pool.statistics().slots[0].num_deaths == 1
    assert any(result.receipt.why == "moved:died" for result in results.values())


async def test_kill_in_mid_stream_continues_the_text(start_pool: StartPool) -> None:
    """Kill -9 in mid-stream: the text equals the undisturbed one and the receipt says moved."""
    running = await start_pool(SLOW, SimulatedConfig())
    async with running.pool.stream(ask("tell me", 60), avoid=[1]) as stream:
        await until_tokens(stream, 5)
        assert stream.slot == 0
        os.kill(running.pid(0), signal.SIGKILL)
        async for _ in stream:
            pass
        completion = await stream.completion()
    assert completion.text == greedy_text("tell me", 60)
    assert completion.usage.completion_tokens == 60
    assert completion.receipt.why == "moved:died"
    assert completion.receipt.attempts == 2


async def test_many_streams_survive_a_kill(start_pool: StartPool) -> None:
    """64 streams over two actors all end with their undisturbed text when one actor is killed."""
    running = await start_pool(SimulatedConfig(), SimulatedConfig())
    streams = [running.pool.stream(ask(f"stream {index}", 100)) for index in range(64)]
    await until_tokens(streams[0], 10)
    os.kill(running.pid(0), signal.SIGKILL)
    texts = [(await stream.completion()).text for stream in streams]
    assert texts == [greedy_text(f"stream {index}", 100) for index in range(64)]


async def test_the_only_actor_comes_back(start_pool: StartPool) -> None:
    """With one actor, a killed one's requests wait for its restart and then finish."""
    running = await start_pool(SimulatedConfig())
    async with running.pool.stream(ask("alone", 60)) as stream:
        await until_tokens(stream, 5)
        os.kill(running.pid(0), signal.SIGKILL)
        assert (await stream.completion()).text == greedy_text("alone", 60)


async def test_a_hung_actor_is_rescued_by_the_watchdog(start_pool: StartPool) -> None:
    """A request whose actor goes silent is finished by another one, and the silent actor is replaced."""
    hangs = FAST.model_copy(update={"faults": (Fault(at_token=3, action="hang"),)})
    # The actor that does not hang has a minute for its first token.
    config = PoolConfig(token_gap_timeout_s=2, health_timeout_s=2)
    running = await start_pool(hangs, FAST, config=config)
    first = running.pid(0)
    results = await running.pool.generate_many([ask(f"row {row}") for row in range(8)])
    assert [result.text for result in results if isinstance(result, Completion)] == [
        greedy_text(f"row {row}", 20) for row in range(8)
    ]
    while running.pool.statistics().slots[0].pid == first:
        await asyncio.sleep(0.05)


async def test_a_stopped_process_is_rescued_by_the_watchdog(start_pool: StartPool) -> None:
    """An actor whose whole process stands still (SIGSTOP) costs its requests the bound, and is replaced."""
    # The other actor has a minute for its first token, and is then done.
    config = PoolConfig(token_gap_timeout_s=5, health_timeout_s=2)
    running = await start_pool(SLOW, SimulatedConfig(tokens_per_s=1000), config=config)
    async with running.pool.stream(ask("tell me", 60), avoid=[1]) as stream:
        await until_tokens(stream, 5)
        os.kill(running.pid(0), signal.SIGSTOP)
        completion = await stream.completion()
    assert completion.text == greedy_text("tell me", 60)
    assert completion.receipt.why == "moved:silent"


async def test_an_actor_that_comes_to_itself(start_pool: StartPool) -> None:
    """An actor that fails its health check, and that nobody replaces, gets work again once it passes one."""
    running = await start_pool(SimulatedConfig(max_context=10**9))
    replaced = asyncio.Event()
    config = PoolConfig(token_gap_timeout_s=1, health_timeout_s=1)
    async with Pool(config, replace=lambda _slot, _pid: replaced.set()) as pool:
        await pool.attach(0, running.manager.actors[0])
        async with pool.stream(ask("tell me", 10**8)) as stream:  # it is not done before its actor stands still
            await until_tokens(stream, 5)
            os.kill(running.pid(0), signal.SIGSTOP)
            await replaced.wait()
            num_before = stream.num_tokens
            os.kill(running.pid(0), signal.SIGCONT)
            await until_tokens(stream, num_before + 55)
            assert stream.text == greedy_text("tell me", stream.num_tokens)
            assert stream.attempt["why"] == "moved:silent"
            assert pool.statistics().slots[0].state == "up"


async def test_silence_everywhere_ends_in_an_error(start_pool: StartPool) -> None:
    """A request that no actor answers fails with RequestTimeoutError once its attempts are used up."""
    hangs = SimulatedConfig(faults=(Fault(action="hang"),))
    config = PoolConfig(first_token_timeout_s=0.5, token_gap_timeout_s=0.5, health_timeout_s=1, max_attempts=2)
    running = await start_pool(hangs, hangs, config=config)
    with pytest.raises(RequestTimeoutError, match="2 actors in a row"):
        await running.pool.generate(ask("tell me"))


@pytest.mark.parametrize("at_token", [1, 7])
async def test_a_poison_prompt_fails_alone(start_pool: StartPool, at_token: int) -> None:
    """A prompt that kills its engine fails after two deaths; all others finish."""
    dies = SimulatedConfig(capacity=8, faults=(Fault(match="poison", at_token=at_token, action="die"),))
    running = await start_pool(dies, dies)
    prompts = [f"row {row}" for row in range(24)]
    prompts[5] = "poison"
    results = await running.pool.generate_many([ask(prompt) for prompt in prompts])
    assert isinstance(results[5], PoisonRequestError)
    for prompt, result in zip(prompts, results, strict=True):
        if prompt != "poison":
            assert isinstance(result, Completion), result
            assert result.text == greedy_text(prompt, 20)
    assert sum(slot.num_deaths for slot in running.pool.statistics().slots) == 2


async def test_a_failing_engine_is_avoided(start_pool: StartPool) -> None:
    """A generation that fails in one engine is continued by another, from the token where it failed."""
    fails = FAST.model_copy(update={"faults": (Fault(at_token=5, action="fail"),)})
    running = await start_pool(fails, FAST)
    completion = await running.pool.generate(ask("tell me"))
    assert completion.text == greedy_text("tell me", 20)


async def test_failure_everywhere_is_raised(start_pool: StartPool) -> None:
    """A generation that fails in every engine ends with the engine's own error."""
    fails = FAST.model_copy(update={"faults": (Fault(match="bad", action="fail"),)})
    running = await start_pool(fails, fails)
    with pytest.raises(EngineError, match="simulated failure"):
        await running.pool.generate(ask("bad"))
    assert (await running.pool.generate(ask("good"))).text == greedy_text("good", 20)


async def test_session_survives_its_actor(start_pool: StartPool) -> None:
    """A session whose actor is killed between two turns goes on elsewhere with its whole transcript."""
    running = await start_pool(FAST, FAST)

    def request(messages: tuple[Message, ...]) -> Request:
        return Request(request_id="turn", messages=messages, config=GenerationConfig(max_new_tokens=5, temperature=0))

    transcript: tuple[Message, ...] = ()
    for turn in range(3):
        question = Message("user", f"question {turn}")
        async with running.conversations.turn("s", (question,), request, start=turn == 0, end=False) as stream:
            completion = await stream.completion()
        transcript += (question,)
        assert completion.text == greedy_text(prompt_text(request(transcript)), 5)
        transcript += (Message("assistant", completion.text),)
        if turn == 1:
            assert completion.receipt.why == "pinned"
            os.kill(running.pid(completion.receipt.slot), signal.SIGKILL)
        if turn == 2:
            assert completion.receipt.why == "moved:died"
    assert (await running.conversations.load("s")).messages == transcript


async def test_tokenize_at_a_process_that_stands_still(start_pool: StartPool) -> None:
    """It is an error after the bound, and another actor is asked from then on."""
    running = await start_pool(FAST, FAST, config=PoolConfig(first_token_timeout_s=0.5, health_timeout_s=30))
    os.kill(running.pid(0), signal.SIGSTOP)
    with pytest.raises(RequestTimeoutError, match="slot 0"):
        await running.pool.tokenize(ask("tell me more"))
    # The other one may be slow.
    running.pool.config = PoolConfig(health_timeout_s=30)
    while running.pool.statistics().first_token_timeout_s < running.pool.config.first_token_timeout_s:
        await asyncio.sleep(0.05)
    assert len(await running.pool.tokenize(ask("tell me more"))) == 3
    os.kill(running.pid(0), signal.SIGCONT)
