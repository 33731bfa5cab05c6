"""Pools with servers behind their actors, and pools of different engines: real servers, real losses."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack

from aiohttp import web

from raylm.config import HTTPConfig, PoolConfig, SimulatedConfig, TritonConfig
from raylm.messages import Completion
from raylm.pool import Pool

from .conftest import StartPool, ask
from .engines.http_server import Toy
from .engines.triton_server import TritonServer


async def until_state(pool: Pool, slot: int, state: str) -> None:
    """Return when a slot is in a state."""
    while pool.statistics().slots[slot].state != state:
        await asyncio.sleep(0.02)


async def test_a_server_that_is_down_draws_no_requests(start_pool: StartPool) -> None:
    """While the server behind a slot is down, requests go elsewhere at once; when it is back, it is used again."""
    server = Toy()
    async with AsyncExitStack() as up:
        await up.enter_async_context(server.running())
        running = await start_pool(
            HTTPConfig(url=server.url, capacity=4), SimulatedConfig(tokens_per_s=200, capacity=4)
        )
        pool = running.pool
        await up.aclose()
        results = await pool.generate_many([ask(f"row {row}", 5) for row in range(40)])
        completions = [result for result in results if isinstance(result, Completion)]
        assert len(completions) == 40
        assert {completion.receipt.slot for completion in completions} == {1}
        assert sum(completion.receipt.attempts > 1 for completion in completions) <= 4
        await until_state(pool, 0, "suspected")
        await up.enter_async_context(server.running(port=int(server.url.rpartition(":")[2])))
        await until_state(pool, 0, "up")
        results = await pool.generate_many([ask(f"row {row}", 5) for row in range(8)])
        assert {result.receipt.slot for result in results if isinstance(result, Completion)} == {0, 1}


async def test_requests_wait_for_the_one_server(start_pool: StartPool) -> None:
    """With nowhere else to go, a request waits until its server is back, and is then answered."""
    server = Toy()
    async with AsyncExitStack() as up:
        await up.enter_async_context(server.running())
        running = await start_pool(HTTPConfig(url=server.url))
        await up.aclose()
        waiting = asyncio.create_task(running.pool.generate(ask("hello", 5)))
        await until_state(running.pool, 0, "suspected")
        await up.enter_async_context(server.running(port=int(server.url.rpartition(":")[2])))
        completion = await waiting
        assert completion.usage.completion_tokens == 5
        assert running.pool.statistics().slots[0].num_deaths == 0


async def test_a_request_may_wait_its_turn_inside_a_busy_engine(start_pool: StartPool) -> None:
    """A request without a token is left where it is for longer than the bound while others of its slot get theirs."""
    server = Toy(max_context=100_000)
    async with server.running():
        config = PoolConfig(first_token_timeout_s=0.2)
        running = await start_pool(HTTPConfig(url=server.url), HTTPConfig(url=server.url), config=config)
        async with running.pool.stream(ask("go on", 3000, ignore_eos=True)) as busy:
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
            started_at = busy.num_tokens
            while busy.num_tokens < started_at + 300:  # 0.6 s at 500 tokens/s
                await anext(busy)
            turn.set()
            completion = await waiting
        assert (completion.receipt.attempts, completion.receipt.slot) == (1, slot)


async def test_a_mixed_pool_survives_each_member(start_pool: StartPool) -> None:
    """One pool over three kinds of engines answers every row once, though each member is lost in turn."""
    server = Toy()
    async with AsyncExitStack() as up:
        triton = await asyncio.to_thread(TritonServer(models=["vllm"]).start)
        up.push_async_callback(asyncio.to_thread, triton.stop)
        site = await up.enter_async_context(AsyncExitStack())
        await site.enter_async_context(server.running())
        running = await start_pool(
            SimulatedConfig(tokens_per_s=100, capacity=4),
            HTTPConfig(url=server.url, capacity=4),
            TritonConfig(address=triton.address, model_name="vllm", capacity=4),
        )
        pool = running.pool
        rows: dict[int, Completion] = {}
        async for row, result in pool.as_completed([ask(f"row {row}", 20, ignore_eos=True) for row in range(120)]):
            assert isinstance(result, Completion), result
            assert row not in rows
            rows[row] = result
            if len(rows) == 20:
                os.kill(running.pid(0), signal.SIGKILL)
            elif len(rows) == 50:
                await site.aclose()
            elif len(rows) == 80:
                await site.enter_async_context(server.running(port=int(server.url.rpartition(":")[2])))
                os.kill(triton.pid, signal.SIGKILL)
        assert len(rows) == 120
        assert all(completion.text and completion.usage.completion_tokens == 20 for completion in rows.values())
        assert {completion.receipt.engine for completion in rows.values()} == {"simulated", "http", "triton"}
