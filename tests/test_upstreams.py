"""Pools with servers behind their actors, and pools of different engines: real servers, real losses."""

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import psutil
import pytest
from aiohttp import web
from tritonclient.grpc.aio import InferenceServerClient

from raylm import INTERNLM2_META, AsyncChatbot, Status
from raylm.config import HTTPConfig, PoolConfig, SimulatedConfig, TritonConfig
from raylm.engines.simulated import greedy_text as simulated_text
from raylm.engines.triton import TritonEngine
from raylm.messages import Completion
from raylm.pool import Pool
from raylm.stream import Stream

from .conftest import Running, StartPool, ask
from .engines.http_server import Toy, answer, chunk, sse, stream, tokenize
from .engines.triton_server import MODELS, TritonServer
from .ports import kept_port

sys.path.append(str(MODELS / "lib"))
from toy import greedy_text


async def until_state(pool: Pool, slot: int, state: str) -> None:
    """Return when a slot is in a state."""
    while pool.statistics().slots[slot].state != state:
        await asyncio.sleep(0.02)


async def until_tokens(stream: Stream, num_tokens: int) -> None:
    """Read a stream until it has that many tokens."""
    while stream.num_tokens < num_tokens:
        await anext(stream)


def running_slot(pool: Pool) -> int:
    """Return the slot that works on the pool's one request."""
    return next(slot.slot for slot in pool.statistics().slots if slot.num_running)


@asynccontextmanager
async def triton_server(**settings: Any) -> AsyncIterator[TritonServer]:
    """A Triton server with the model `vllm`, started and stopped beside the loop."""
    server = TritonServer(models=["vllm"], **settings)
    await asyncio.to_thread(server.start)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


def of_triton(server: TritonServer, **settings: Any) -> TritonConfig:
    """Return the settings of a client of a server."""
    return TritonConfig(address=server.address, model_name="vllm", **settings)


async def test_a_server_that_is_down_draws_no_requests(start_pool: StartPool) -> None:
    """While the server behind a slot is down, requests go elsewhere at once; when it is back, it is used again."""
    server = Toy()
    with kept_port() as port:
        async with server.running(port):
            running = await start_pool(
                HTTPConfig(url=server.url, capacity=4), SimulatedConfig(tokens_per_s=200, capacity=4)
            )
        pool = running.pool
        results = await pool.generate_many([ask(f"row {row}", 5) for row in range(40)])
        completions = [result for result in results if isinstance(result, Completion)]
        assert len(completions) == 40
        assert {completion.receipt.slot for completion in completions} == {1}
        assert sum(completion.receipt.attempts > 1 for completion in completions) <= 4
        await until_state(pool, 0, "suspected")
        async with server.running(port):
            await until_state(pool, 0, "up")
            results = await pool.generate_many([ask(f"row {row}", 5) for row in range(8)])
        assert {result.receipt.slot for result in results if isinstance(result, Completion)} == {0, 1}


async def test_requests_wait_for_the_one_server(start_pool: StartPool) -> None:
    """With nowhere else to go, a request waits until its server is back, and is then answered."""
    server = Toy()
    with kept_port() as port:
        async with server.running(port):
            running = await start_pool(HTTPConfig(url=server.url))
        waiting = asyncio.create_task(running.pool.generate(ask("hello", 5)))
        await until_state(running.pool, 0, "suspected")
        async with server.running(port):
            completion = await waiting
        assert completion.usage.completion_tokens == 5
        assert running.pool.statistics().slots[0].num_deaths == 0


async def test_a_full_server_is_left_alone_for_as_long_as_it_asks(start_pool: StartPool) -> None:
    """With nowhere else to go, a request waits for as long as the one server asks, and is then answered."""
    server = Toy()
    async with server.running():
        running = await start_pool(HTTPConfig(url=server.url))
        server.script = [answer(429, {}, Retry_After="5.1")]  # longer than the engine itself waits
        completion = await running.pool.generate(ask("hello", 5))
    assert (completion.receipt.attempts, completion.receipt.why) == (2, "moved:full")
    assert completion.receipt.queue_ms > 5000
    assert len(server.calls) == 2


async def test_a_full_server_draws_no_requests(start_pool: StartPool) -> None:
    """While a server is full, requests go to the others at once."""
    server = Toy(script=[answer(429, {}, Retry_After="60")] * 99)
    async with server.running():
        running = await start_pool(
            HTTPConfig(url=server.url, capacity=4), SimulatedConfig(tokens_per_s=200, capacity=4)
        )
        results = await running.pool.generate_many([ask(f"row {row}", 5) for row in range(40)])
        assert {result.receipt.slot for result in results if isinstance(result, Completion)} == {1}
        assert len(server.calls) <= 4
    assert len(results) == 40
    assert running.pool.statistics().num_failed == 0


async def test_a_request_may_wait_its_turn_inside_a_busy_engine(start_pool: StartPool) -> None:
    """A request without a token is left where it is for longer than the bound while others of its slot get theirs."""
    server = Toy(max_context=100_000, tokens_per_s=50)
    async with server.running():
        # Longer than a busy machine makes the others wait for their tokens.
        config = PoolConfig(first_token_timeout_s=15)
        running = await start_pool(HTTPConfig(url=server.url), HTTPConfig(url=server.url), config=config)
        async with running.pool.stream(ask("go on", 90_000, ignore_eos=True)) as busy:
            await anext(busy)
            # Both streams are in one slot: a session goes where its pin says.
            slot = next(slot.slot for slot in running.pool.statistics().slots if slot.num_running)
            running.pool.router.pin("here", slot)
            turn = asyncio.Event()

            async def wait(request: web.Request) -> web.StreamResponse:
                await turn.wait()
                return await server.answer_well(request)

            server.script.append(wait)
            waiting = asyncio.create_task(running.pool.generate(ask("wait", 5), session_id="here"))
            loop = asyncio.get_running_loop()
            began_at = loop.time()
            while loop.time() < began_at + 1.2 * running.pool.statistics().first_token_timeout_s:
                await anext(busy)
            turn.set()
            completion = await waiting
        assert (completion.receipt.attempts, completion.receipt.slot) == (1, slot)


async def test_a_mixed_pool_survives_each_member(start_pool: StartPool) -> None:
    """One pool over three kinds of engines answers every row once, though each member is lost in turn."""
    server = Toy()
    async with AsyncExitStack() as up:
        port = up.enter_context(kept_port())
        triton = await asyncio.to_thread(TritonServer(models=["vllm"]).start)
        up.push_async_callback(asyncio.to_thread, triton.stop)
        site = await up.enter_async_context(AsyncExitStack())
        await site.enter_async_context(server.running(port))
        running = await start_pool(
            SimulatedConfig(tokens_per_s=100, capacity=4),
            HTTPConfig(url=server.url, capacity=4),
            TritonConfig(address=triton.address, model_name="vllm", capacity=4),
            config=PoolConfig(max_attempts=9),  # a row may be at each member that is lost
        )
        pool = running.pool
        rows: dict[int, Completion] = {}

        async def lose_simulated() -> None:
            os.kill(running.pid(0), signal.SIGKILL)

        async def lose_triton() -> None:
            await site.enter_async_context(server.running(port))
            os.kill(triton.pid, signal.SIGKILL)

        # Each at a number of rows, and once the member has answered one: they are not equally quick.
        losses = deque([(20, "simulated", lose_simulated), (50, "http", site.aclose), (80, "triton", lose_triton)])
        answered = set()
        async for row, result in pool.as_completed([ask(f"row {row}", 20, ignore_eos=True) for row in range(120)]):
            assert isinstance(result, Completion), result
            assert row not in rows
            rows[row] = result
            answered.add(result.receipt.engine)
            if losses and len(rows) >= losses[0][0] and losses[0][1] in answered:
                *_, lose = losses.popleft()
                await lose()
        assert not losses
        assert len(rows) == 120
        assert all(completion.text and completion.usage.completion_tokens == 20 for completion in rows.values())
        assert answered == {"simulated", "http", "triton"}


@pytest.fixture
async def mixed(cluster: str) -> AsyncIterator[tuple[AsyncChatbot, list[Callable[[], Awaitable[None]]]]]:
    """A chatbot over three kinds of engines, and how each of them is lost."""
    server = Toy(tokens_per_s=100, max_context=10_000)
    async with AsyncExitStack() as up:
        triton = await up.enter_async_context(triton_server())
        site = await up.enter_async_context(AsyncExitStack())
        await site.enter_async_context(server.running())
        engines = [SimulatedConfig(tokens_per_s=100), HTTPConfig(url=server.url), of_triton(triton)]
        settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40, "meta_template": INTERNLM2_META}
        chatbot = await up.enter_async_context(AsyncChatbot(engines, address=cluster, **settings))

        async def lose_simulated() -> None:
            pid = chatbot.statistics().slots[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

        async def lose_triton() -> None:
            os.kill(triton.pid, signal.SIGKILL)

        yield chatbot, [lose_simulated, site.aclose, lose_triton]


async def test_sessions_survive_each_member(
    mixed: tuple[AsyncChatbot, list[Callable[[], Awaitable[None]]]],
) -> None:
    """A session on each member goes on though that is lost in its turn: the turn is whole, and the transcript too."""
    chatbot, losses = mixed
    words = "[[pace=0.01]] tell me more"
    for slot, lose in enumerate(losses):
        session = f"on {slot}"
        chatbot.pool.router.pin(session, slot)
        texts = []
        for turn in range(3):
            limit = 500 if turn == 1 else 40  # that turn is to be in its middle still
            steps = chatbot.stream_chat(
                words,
                session,
                sequence_start=not turn,
                sequence_end=False,
                ignore_eos=True,
                timeout=None,
                max_new_tokens=limit,
            )
            _, begun, _ = await anext(steps)
            if turn == 1:
                await lose()
            *_, (status, text, num_tokens) = [step async for step in steps]
            assert (status, num_tokens) == (Status.END, limit)
            assert text.startswith(begun)
            texts.append(text)
        expected = [content for text in texts for content in (words, text)]
        assert [message["content"] for message in await chatbot.history(session)] == expected
    assert chatbot.statistics().num_failed == 0
    assert chatbot.statistics().num_moved >= 3


async def test_a_request_id_may_be_used_at_once_on_all_members(
    mixed: tuple[AsyncChatbot, list[Callable[[], Awaitable[None]]]],
) -> None:
    """Requests of one id, two at each member, are as many requests."""
    chatbot, _ = mixed
    answers = []
    for number in range(6):
        session = f"{number} of one id"
        chatbot.pool.router.pin(session, number % 3)
        answers.append(
            chatbot.generate(
                f"[[endless]] {number}", session, "same", ignore_eos=True, return_dict=True, max_new_tokens=10
            )
        )
    told = await asyncio.gather(*answers)
    assert [said["receipt"]["engine"] for said in told] == ["simulated", "http", "triton"] * 2
    for number, said in enumerate(told):
        assert said["usage"]["completion_tokens"] == 10
        if number % 3 != 1:
            text = simulated_text if number % 3 == 0 else greedy_text
            assert said["text"] == text(f"[[endless]] {number}", 10)
    assert len({said["text"] for said in told}) == 6


@pytest.mark.parametrize("loss", ["server", "back end"])
async def test_a_text_is_whole_when_triton_dies_in_the_middle(start_pool: StartPool, loss: str) -> None:
    """A Triton server that is killed in mid-stream, or whose back end is, costs no character: another one goes on."""
    async with triton_server() as first, triton_server() as second:
        servers = (first, second)
        running = await start_pool(*(of_triton(server, idle_timeout_s=5) for server in servers))
        prompt = "[[endless]] [[pace=0.1]] 😀 你好"
        async with running.pool.stream(ask(prompt, 60)) as stream:
            await until_tokens(stream, 5)
            slot = running_slot(running.pool)
            if loss == "server":
                os.kill(servers[slot].pid, signal.SIGKILL)
            else:
                for child in psutil.Process(servers[slot].pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):  # it has gone with another one
                        child.kill()
            completion = await stream.completion()
    assert completion.text == greedy_text(prompt, 60)
    assert (completion.usage.completion_tokens, completion.receipt.slot) == (60, 1 - slot)
    assert (completion.receipt.why, completion.receipt.attempts) == ("moved:failed", 2)


async def test_a_text_is_whole_when_an_http_server_breaks_off(start_pool: StartPool) -> None:
    """A connection that an HTTP server resets in mid-stream costs no character: another server goes on."""
    async with Toy("vllm").running() as first, Toy("vllm").running() as second:
        running = await start_pool(HTTPConfig(url=first.url), HTTPConfig(url=second.url))
        request = ask("😀 你好", 60, ignore_eos=True)
        whole = await running.pool.generate(request)
        part = whole.text[: whole.text.index(" ", 40)]
        counts = {"prompt_tokens": whole.usage.prompt_tokens, "completion_tokens": len(tokenize(part))}
        first.script = second.script = [stream(sse(chunk(part, usage=counts)), then="reset")]  # whoever is asked first
        completion = await running.pool.generate(request)
    assert (completion.text, completion.usage) == (whole.text, whole.usage)
    assert (completion.receipt.why, completion.receipt.attempts) == ("moved:failed", 2)


async def test_triton_that_was_down_for_half_a_minute(start_pool: StartPool) -> None:
    """Two seconds after the server is back, pools have answers from it: one that has lost it, and one that starts.

    The machine may be busy: ten times what a client needs that was started just now is allowed on top.
    """
    prompt = "[[endless]] go on"
    async with triton_server() as server:
        running = await start_pool(of_triton(server))
        await asyncio.to_thread(server.stop)
        waiting = asyncio.create_task(running.pool.generate(ask(prompt, 2)))
        starting = asyncio.create_task(start_pool(of_triton(server, start_timeout_s=240)))
        # Long enough for gRPC's pauses between two tries to have grown, had they not been limited.
        done, _ = await asyncio.wait([waiting, starting], timeout=30)
        assert not done
        await asyncio.to_thread(server.start)
        back_at = time.monotonic()
        late = asyncio.create_task(_ask_later(starting, prompt))
        engine = TritonEngine(of_triton(server))
        await engine.start()
        await engine.generate(ask(prompt, 2), lambda _: None)
        first_s = time.monotonic() - back_at
        await engine.close()
        completions = await asyncio.gather(waiting, late)
        assert time.monotonic() - back_at < 2 + 10 * first_s
    assert [completion.text for completion in completions] == [greedy_text(prompt, 2)] * 2


async def _ask_later(starting: asyncio.Task[Running], prompt: str) -> Completion:
    """Ask a pool as soon as it is up."""
    return await (await starting).pool.generate(ask(prompt, 2))


async def test_a_model_that_is_unloaded_under_load(start_pool: StartPool) -> None:
    """Every row is answered while the model goes, and its server is used again when the model is back."""
    async with triton_server() as server, InferenceServerClient(server.address) as control:
        running = await start_pool(of_triton(server, capacity=8), SimulatedConfig(tokens_per_s=100, capacity=8))
        pool = running.pool
        rows: dict[int, Completion] = {}
        requests = [ask(f"[[endless]] [[pace=0.02]] row {row}", 10) for row in range(80)]
        async for row, result in pool.as_completed(requests):
            assert isinstance(result, Completion), result
            assert row not in rows
            rows[row] = result
            if len(rows) == 20:
                await control.unload_model("vllm")
        assert len(rows) == 80
        for row, completion in rows.items():
            if completion.receipt.attempts == 1:
                text = greedy_text if completion.receipt.engine == "triton" else simulated_text
                assert completion.text == text(requests[row].prompt, 10)
        await control.load_model("vllm")
        await until_state(pool, 0, "up")
        results = await pool.generate_many([ask(f"[[endless]] row {row}", 5) for row in range(8)])
        assert {result.receipt.slot for result in results if isinstance(result, Completion)} == {0, 1}
