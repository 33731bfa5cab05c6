"""Thousands of short requests leave nothing behind: no thread, no connection, no entry in any table."""

import asyncio
import threading
from typing import Any

import psutil
import pytest

from raylm.config import HTTPConfig, SimulatedConfig, TritonConfig
from raylm.messages import Completion

from .conftest import Running, StartPool, ask
from .engines.http_server import Toy
from .engines.triton_server import TritonServer

NUM_REQUESTS = 2000
NUM_READERS = 48
IDLE = {"clients": 1}


async def answer(running: Running, num_requests: int) -> list[Completion]:
    """Ask for that many short answers, some at a time; every fifth reader leaves its stream early."""
    numbers = iter(range(num_requests))
    completions: list[Completion] = []

    async def read() -> None:
        for number in numbers:
            request = ask(f"request {number}", 2, ignore_eos=True)
            if number % 5:
                completions.append(await running.pool.generate(request))
            else:
                async with running.pool.stream(request) as stream:
                    await anext(stream)

    await asyncio.gather(*(read() for _ in range(NUM_READERS)))
    return completions


async def left_in(actor: Any) -> dict[str, int]:
    """Return what an actor has of requests: entries in its tables, and tasks of its engine."""

    def count(self: Any) -> dict[str, int]:
        tasks = map(repr, asyncio.all_tasks(self._reaper.get_loop()))
        return {
            "clients": len(self._clients),
            "work": sum(len(client.work) for client in self._clients.values()),
            "undelivered": sum(
                len(client.dirty) + len(client.quiet) + len(client.failures) for client in self._clients.values()
            ),
            "running": self._engine.statistics().num_running,
            # Ray has tasks there, too, and the simulated engine's clock is one.
            "tasks": sum("_AioCall" in task or ("raylm/engines" in task and "._tick" not in task) for task in tasks),
        }

    return await actor.__ray_call__.remote(count)  # type: ignore[no-any-return]


def connections(pid: int, port: int) -> int:
    """Return the number of a process's connections to a port."""
    return sum(bool(each.raddr) and each.raddr.port == port for each in psutil.Process(pid).net_connections("tcp"))


@pytest.mark.timeout(600)
async def test_short_requests_leave_nothing_behind(start_pool: StartPool) -> None:
    """After 2,000 requests, a fifth of them left early, everything is as after the first 200."""
    with Toy().in_thread() as http, TritonServer(models=["vllm"], journals=False) as triton:
        running = await start_pool(
            SimulatedConfig(tokens_per_s=500, capacity=16),
            HTTPConfig(url=http.url, capacity=16),
            TritonConfig(address=triton.address, model_name="vllm", capacity=16),
        )
        pool, pids = running.pool, [running.pid(slot) for slot in range(3)]
        http_port, triton_port = int(http.url.rpartition(":")[2]), triton.port

        async def rest() -> dict[str, Any]:
            """Return what there is, once the HTTP server's idle connections are closed."""
            while connections(pids[1], http_port):
                await asyncio.sleep(0.1)
            # A request that was left ends at its server a moment later.
            for actor in running.manager.actors.values():
                while {name: number for name, number in (await left_in(actor)).items() if number} != IDLE:
                    await asyncio.sleep(0.05)
            return {
                "threads": [psutil.Process(pid).num_threads() for pid in pids],
                "pool's threads": threading.active_count(),
                "connections": connections(pids[2], triton_port),
                "actors": [await left_in(actor) for actor in running.manager.actors.values()],
                "pool's tasks": len(pool._tasks),
                "links": [(len(link.streams), len(link.unsent), len(link.outbox)) for link in pool._links.values()],
                "waiting": (pool.statistics().num_waiting, len(list(pool._waiting())), len(pool._suspects)),
            }

        await answer(running, NUM_REQUESTS // 10)
        before = await rest()
        completions = await answer(running, NUM_REQUESTS - NUM_REQUESTS // 10)
        after = await rest()
    assert {completion.receipt.engine for completion in completions} == {"simulated", "http", "triton"}
    assert all(completion.text for completion in completions)
    assert after["connections"] == 1
    assert after["links"] == [(0, 0, 0)] * 3
    assert after["waiting"] == (0, 0, 0)
    for left in after["actors"]:
        assert left["clients"] == 1
    # The pools of threads of Ray and gRPC may grow by one late.
    assert all(after <= before + 2 for before, after in zip(before.pop("threads"), after.pop("threads"), strict=True))
    assert after == before
