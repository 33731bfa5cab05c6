"""How long streams stand still when the process of an engine is killed, against Ray Serve's own way.

Both have two replicas of the simulated engine (a clock, not a model) at 20 tokens/s a stream, and 32 streams on each.
The process of one is killed with SIGKILL; time runs from there to the next token of each of its streams.

Subject. A pool on two EngineActors. A stream goes on after the tokens that it has, on the other actor or on the first
one, started again; each is checked to be the same as one that nothing happened to, so no token is lost and none comes
twice.

Baseline, in the same run and in turns with the subject: a Serve deployment of two replicas that streams from a handle,
with Serve's own defaults. There the stream is lost with its replica, and all its tokens; the client starts it again at
once, and what is measured is the time to the first token of that new stream. Each replica takes 32 requests, as many as
run on it, so the client waits until Serve has replaced the replica.

`failover_ratio`: median over the streams of all kills, subject by baseline. `failover_ratio_p99`: 99th percentiles.
`failover_p50_s`, `failover_p99_s`: the subject's own; `replacement_p50_s`, `replacement_p99_s`: the baseline's.
`retry_p50_s`, `retry_p99_s`: for comparison, the time to the first token of the new stream where Serve's other replica
has room for all clients, and takes them before the replacement is there.

A pool's streams wait for two things: Ray takes a second to tell that an actor which is to be restarted has died, and
the streams it had are tried two at a time, for one of them may be what killed it.

Serve finds out about a dead replica with its health check, every 10 s, so it matters when in that time the kill comes:
some kills are faster than others. The next one waits until what was killed is up again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import ray.exceptions
import uvloop
from harness import Figure, local_cluster, publish, quick_asked, say

from raylm import heap
from raylm.actors.manager import PoolManager
from raylm.config import SessionConfig, SimulatedConfig
from raylm.engines.simulated import greedy_text
from raylm.errors import RequestCancelledError
from raylm.messages import Delta, GenerationConfig, Request
from raylm.pool import Pool
from raylm.stream import Stream

NUM_REPLICAS = 2
NUM_STREAMS = 32  # on each
CONFIG = SimulatedConfig(tokens_per_s=20)
NUM_TOKENS = 8000  # more than any stream gets to


def request(prompt: str) -> Request:
    """Return a request for a long greedy stream."""
    return Request(request_id=prompt, prompt=prompt, config=GenerationConfig(max_new_tokens=NUM_TOKENS, temperature=0))


async def moved_at(stream: Stream) -> float:
    """Read a stream until the first token of its second attempt, and return its time."""
    async for _ in stream:
        if stream.attempt.get("attempts", "1") != "1":
            return time.monotonic()
    raise RuntimeError(f"{stream.request.request_id} ended without having lost its actor")


async def read(stream: Stream) -> None:
    """Read a stream until it is aborted."""
    with suppress(RequestCancelledError):
        async for _ in stream:
            pass


async def kill_actor(pool: Pool, slot: int) -> list[float]:
    """Kill the process of a slot's actor; return the seconds to the next token of each of its streams."""
    streams = [pool.stream(request(f"story {number}")) for number in range(NUM_REPLICAS * NUM_STREAMS)]
    for stream in streams:
        await anext(stream)
    pid = next(seen.pid for seen in pool.statistics().slots if seen.slot == slot)
    victims = [stream for stream in streams if stream.slot == slot]
    if pid is None or len(victims) != NUM_STREAMS:
        raise RuntimeError(f"{len(victims)} streams are on slot {slot}, process {pid}")
    reading = [asyncio.create_task(moved_at(stream)) for stream in victims]
    others = [asyncio.create_task(read(stream)) for stream in streams if stream not in victims]
    await asyncio.sleep(1)
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    waits = [at - killed_at for at in await asyncio.gather(*reading)]
    for stream in streams:
        if stream.text != greedy_text(stream.request.request_id, stream.num_tokens):
            raise RuntimeError(f"{stream.request.request_id} is not the text it should be")
        stream.abort()
    await asyncio.gather(*others)
    return waits


def deploy(name: str, room: int) -> Any:
    """Deploy the baseline.

    Args:
        name: Of the application.
        room: Requests that a replica takes.

    Returns:
        Its handle.
    """
    from ray import serve

    from raylm.engines.simulated import SimulatedEngine

    @serve.deployment(num_replicas=NUM_REPLICAS, max_ongoing_requests=room, ray_actor_options={"num_cpus": 0})
    class Engine:
        def __init__(self) -> None:
            self._engine = SimulatedEngine(CONFIG)
            self._started: asyncio.Task[Any] | None = None

        async def generate(self, prompt: str) -> AsyncIterator[tuple[int, str]]:
            if self._started is None:
                self._started = asyncio.create_task(self._engine.start())
            await self._started
            deltas: asyncio.Queue[Delta] = asyncio.Queue()
            running = asyncio.create_task(self._engine.generate(request(prompt), deltas.put_nowait))
            try:
                while True:
                    delta = await deltas.get()
                    yield os.getpid(), delta.text
                    if delta.finish_reason is not None:
                        break
            finally:
                running.cancel()

    return serve.run(Engine.bind(), name=name, route_prefix=None).options(stream=True).generate


class Client:
    """One who reads a stream from Serve, and starts it again whenever it is lost.

    Args:
        generate: The deployment's method.
        prompt: What it sends.

    Attributes:
        pid: Process of the replica that answers; 0 before the first token.
        since: When that one's first token came.
    """

    def __init__(self, generate: Any, prompt: str) -> None:
        self.pid = 0
        self.since = 0.0
        self._generate = generate
        self._prompt = prompt
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Read for ever."""
        from ray.serve.exceptions import RayServeException

        while True:
            response = self._generate.remote(self._prompt)
            try:
                async for pid, _ in response:
                    if pid != self.pid:
                        self.pid, self.since = pid, time.monotonic()
                        self._changed.set()
            except (ray.exceptions.RayError, RayServeException):
                continue  # its replica has died
            finally:
                response.cancel()

    async def leaves(self, pid: int) -> float:
        """Return when the first token came from another process than this one."""
        while self.pid == pid:
            self._changed.clear()
            await self._changed.wait()
        return self.since


async def kill_replica(generate: Any, *, replaced: bool) -> list[float]:
    """Kill the process of a replica; return the seconds to the first new token of each client that read from it.

    Args:
        generate: The deployment's method.
        replaced: Whether only the replacement may have answered.
    """
    clients = [Client(generate, f"story {number}") for number in range(NUM_REPLICAS * NUM_STREAMS)]
    running = [asyncio.create_task(client.run()) for client in clients]
    try:
        for client in clients:
            await client.leaves(0)
        before = {client.pid for client in clients}
        pid = clients[0].pid
        victims = [client for client in clients if client.pid == pid]
        if replaced and len(victims) != NUM_STREAMS:
            raise RuntimeError(f"{len(victims)} streams are on the replica to be killed")
        await asyncio.sleep(1)
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        waits = [at - killed_at for at in await asyncio.gather(*(client.leaves(pid) for client in victims))]
        if replaced and (old := before & {client.pid for client in victims}):
            raise RuntimeError(f"{old} answered, which was full")
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return waits


async def until_up(pool: Pool) -> None:
    """Wait until all that was killed is up again."""
    from ray import serve

    num_up = 0
    while num_up < NUM_REPLICAS:
        await asyncio.sleep(0.2)
        applications = (await asyncio.to_thread(serve.status)).applications.values()
        states = [each.replica_states for application in applications for each in application.deployments.values()]
        num_up = min(pool.num_up, *(state.get("RUNNING", 0) for state in states))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(generators: dict[str, Any], kills: Sequence[str]) -> list[Figure]:
    """Kill one after the other, and return the figures."""
    heap.settle()
    waits: dict[str, list[float]] = {"failover": [], "replacement": [], "retry": []}
    manager = await PoolManager.start([CONFIG] * NUM_REPLICAS, SessionConfig())
    try:
        async with Pool(replace=manager.replace) as pool:
            await asyncio.gather(*(pool.attach(slot, actor) for slot, actor in manager.actors.items()))
            for number, name in enumerate(kills):
                await until_up(pool)
                if name == "failover":
                    latest = await kill_actor(pool, number % NUM_REPLICAS)
                else:
                    latest = await kill_replica(generators[name], replaced=name == "replacement")
                waits[name] += latest
                say(f"{name}: {min(latest):.2f} to {max(latest):.2f} s")
    finally:
        await manager.aclose()
    middle = {name: statistics.median(found) for name, found in waits.items()}
    late = {name: quantile(found, 0.99) for name, found in waits.items()}
    figures = [
        Figure("failover_ratio", middle["failover"] / middle["replacement"], "", 0.5, "lower"),
        Figure("failover_ratio_p99", late["failover"] / late["replacement"], "", 0.5, "lower"),
    ]
    for name in waits:
        figures += [
            Figure(f"{name}_p50_s", middle[name], "s", None, "lower"),
            Figure(f"{name}_p99_s", late[name], "s", None, "lower"),
        ]
    return figures


def main() -> None:
    """Run the benchmark."""
    quick = quick_asked(__doc__)
    with local_cluster():
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells of each request that a death has hit
        serve.start(proxy_location="Disabled")
        try:
            generators = {
                "replacement": deploy("replacement", NUM_STREAMS),
                "retry": deploy("retry", NUM_REPLICAS * NUM_STREAMS),
            }
            both = ("failover", "replacement")
            figures = uvloop.run(measure(generators, (*both, *both, "retry") if quick else (*both, "retry") * 5))
        finally:
            serve.shutdown()
    publish("failover", figures)


if __name__ == "__main__":
    main()
