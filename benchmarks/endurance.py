"""What is left behind by 100,000 short requests: memory, open files and threads of an actor and of a pool's process.

One engine after the other, each with a third of the requests: the simulated one; HTTPEngine on the scripted server of
`http_client.py`; TritonEngine on a real Triton server with a toy model. An EngineActor of its own hosts each; this
process holds the pool, and 128 readers, each of which asks for two tokens, waits for the answer and asks again. Every
answer is checked for its tokens.

After a tenth of the requests and after all of them both processes are looked at, at rest: idle connections have had the
time to close, and garbage is collected. A figure is the growth from one look to the other. At a tenth, what is made
once has been made; what grows after that would grow for ever.

`endurance_rss_mb`, `endurance_fds` (sockets among them), `endurance_threads`: the worst growth of any of the six. Ray
and gRPC have pools of threads and connections that may grow by one late, so the bars are not 0.

`endurance_ENGINE_rate`: requests/s. `endurance_ENGINE_actor_rss_mb` and so on: each growth on its own.

There is no baseline: the first look is.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import ray
from harness import Figure, local_cluster, publish, quick_asked, say
from triton_client import server as triton_server

from raylm.actors.engine_actor import EngineActor
from raylm.actors.placement import shape
from raylm.config import EngineConfig, HTTPConfig, SimulatedConfig, TritonConfig
from raylm.messages import GenerationConfig, Request
from raylm.pool import Pool

NUM_READERS = 128
NUM_TOKENS = 2
SETTLE_S = 10.0  # HTTPEngine keeps an idle connection for 4 s, and looks for such every 4 s
CONFIG = GenerationConfig(max_new_tokens=NUM_TOKENS, temperature=0)


class Used(msgspec.Struct):
    """What a process uses.

    Attributes:
        rss_mb: Resident memory, in MiB.
        fds: Open file descriptors.
        sockets: Those of them that are sockets.
        threads: Threads, those that Python does not know of included.
    """

    rss_mb: float
    fds: int
    sockets: int
    threads: int

    def since(self, before: Used) -> Used:
        """Return the growth."""
        return Used(*(getattr(self, name) - getattr(before, name) for name in self.__struct_fields__))

    def __str__(self) -> str:
        return f"{self.rss_mb:.1f} MiB, {self.fds} files, {self.sockets} of them sockets, {self.threads} threads"


def look() -> tuple[float, int, int, int]:
    """Return the fields of `Used`, of this process."""
    gc.collect()
    process = psutil.Process()
    sockets = sum(map(is_socket, Path("/proc/self/fd").iterdir()))
    return process.memory_info().rss / 2**20, process.num_fds(), sockets, process.num_threads()


def is_socket(entry: Path) -> bool:
    """Return whether an open file is a socket."""
    try:
        return str(entry.readlink()).startswith("socket:")
    except FileNotFoundError:  # closed since it was listed
        return False


class ProbedActor(EngineActor):
    """EngineActor, which also says what its process uses."""

    async def used(self) -> tuple[float, int, int, int]:
        """Return what this process uses now."""
        return look()


class Grown(msgspec.Struct):
    """What one engine's requests left behind.

    Attributes:
        rate: Requests/s, after the first tenth.
        actor: Growth of the actor's process.
        pool: Growth of this one.
    """

    rate: float
    actor: Used
    pool: Used


@contextmanager
def http_server() -> Iterator[str]:
    """Run the scripted server; yield its URL."""
    script = str(Path(__file__).with_name("http_client.py"))
    process = subprocess.Popen([sys.executable, script, "serve"], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise AssertionError("unreachable: it is a pipe")
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.communicate()


async def ask(pool: Pool, num_requests: int) -> None:
    """Send requests, as many at a time as there are readers, and check the answers."""
    numbers = iter(range(num_requests))

    async def read() -> None:
        for number in numbers:
            # A prompt after which the toy model does not end its sequence.
            request = Request(request_id=str(number), prompt=f"[[endless]] story {number}", config=CONFIG)
            completion = await pool.generate(request)
            if completion.usage.completion_tokens != NUM_TOKENS or not completion.text:
                raise RuntimeError(f"request {number} was answered with {completion}")

    await asyncio.gather(*(read() for _ in range(NUM_READERS)))


async def measure(config: EngineConfig, num_requests: int) -> Grown:
    """Send all requests to one engine."""
    actor: Any = ray.remote(ProbedActor).options(**shape(config).actor_options()).remote(config.model_dump_json())
    async with Pool() as pool:
        await pool.attach(0, actor)
        looks = []
        for part in (num_requests // 10, num_requests - num_requests // 10):
            started_at = time.monotonic()
            await ask(pool, part)
            rate = part / (time.monotonic() - started_at)
            if isinstance(config, HTTPConfig):
                await asyncio.sleep(SETTLE_S)
            looks.append((Used(*await actor.used.remote()), Used(*look())))
            say(f"{config.kind:<10} {rate:7,.0f} requests/s; actor {looks[-1][0]}; pool {looks[-1][1]}")
        if pool.statistics().num_finished != num_requests:
            raise RuntimeError(f"{num_requests} were asked for: {pool.statistics()}")
    await actor.close.remote()
    ray.kill(actor)
    (actor_before, pool_before), (actor_after, pool_after) = looks
    return Grown(rate, actor_after.since(actor_before), pool_after.since(pool_before))


async def run(configs: list[EngineConfig], num_requests: int) -> list[Figure]:
    """Ask each engine for its share, and return the figures."""
    grown = {config.kind: await measure(config, num_requests // len(configs)) for config in configs}
    each = list(itertools.chain.from_iterable((one.actor, one.pool) for one in grown.values()))
    figures = [
        Figure("endurance_rss_mb", max(one.rss_mb for one in each), "MiB", 20, "lower"),
        Figure("endurance_fds", max(one.fds for one in each), "files", 4, "lower"),
        Figure("endurance_threads", max(one.threads for one in each), "threads", 4, "lower"),
    ]
    for name, one in grown.items():
        figures.append(Figure(f"endurance_{name}_rate", one.rate, "requests/s"))
        for process, used in (("actor", one.actor), ("pool", one.pool)):
            figures += [
                Figure(f"endurance_{name}_{process}_{what}", getattr(used, what), unit, better="lower")
                for what, unit in (("rss_mb", "MiB"), ("fds", "files"), ("sockets", "sockets"), ("threads", "threads"))
            ]
    return figures


def main() -> None:
    """Run the benchmark."""
    quick = quick_asked(__doc__)
    with ExitStack() as stack:
        url, address = stack.enter_context(http_server()), stack.enter_context(triton_server())
        stack.enter_context(local_cluster())
        configs: list[EngineConfig] = [
            SimulatedConfig(tokens_per_s=1000, capacity=NUM_READERS),
            HTTPConfig(url=url, capacity=NUM_READERS),
            TritonConfig(address=address, model_name="vllm", capacity=NUM_READERS),
        ]
        figures = asyncio.run(run(configs, 4500 if quick else 100_000))
    publish("endurance", figures)


if __name__ == "__main__":
    main()
