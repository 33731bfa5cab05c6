"""How long a batch of very unequal requests takes on unequal actors, against the least time it could take.

400 simulated requests, each asking for 10 to 500 tokens (uniform, fixed seed), over 4 actors of 8 streams each: three
of 250 tokens/s a stream and one of half that speed. The ideal is all tokens divided by the speed of all streams
together: nobody waits and nobody idles. Figures are times divided by that ideal.

`makespan_ratio`: one pool over the four actors, `Pool.generate_many`. It knows the lengths and starts with the longest.
`makespan_ratio_arrival_order`: the same pool, each request on its own by `Pool.generate` in random order, as when
lengths are not known: nothing but late binding helps.
`makespan_ratio_static`: the baseline, in the same run. Each actor gets every fourth request up front, as
`ray.util.ActorPool` over whole shards or a Ray Data job with one block an actor would do it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from harness import Figure, local_cluster, publish, quick_asked, say

from raylm.actors.manager import PoolManager
from raylm.config import SessionConfig, SimulatedConfig
from raylm.errors import RaylmError
from raylm.messages import Completion, GenerationConfig, Request
from raylm.pool import Pool

RATE = 250  # tokens per second of each stream
CAPACITY = 8
SPEEDS = (RATE, RATE, RATE, RATE / 2)
NUM_REQUESTS = 400


def requests_of(lengths: Sequence[int]) -> list[Request]:
    """Return one request for each length."""
    return [
        Request(request_id=str(index), prompt=f"prompt {index}", config=GenerationConfig(max_new_tokens=length))
        for index, length in enumerate(lengths)
    ]


async def attach(actors: Sequence[Any]) -> Pool:
    """Return a pool over some actors, once they are up."""
    pool = Pool()
    await asyncio.gather(*(pool.attach(slot, actor) for slot, actor in enumerate(actors)))
    return pool


async def seconds(work: Awaitable[list[Completion | RaylmError]], lengths: Sequence[int]) -> float:
    """Return how long some work takes, having checked that it gives every token asked for."""
    started_at = time.monotonic()
    results = await work
    took_s = time.monotonic() - started_at
    for result in results:
        if not isinstance(result, Completion):
            raise result
    if sum(result.usage.completion_tokens for result in results if isinstance(result, Completion)) != sum(lengths):
        raise AssertionError("unreachable: a simulated engine gives every token asked for")
    return took_s


async def one_by_one(pool: Pool, requests: Sequence[Request]) -> list[Completion | RaylmError]:
    """Submit every request on its own, in the order given."""
    return list(await asyncio.gather(*(pool.generate(request, lane="batch") for request in requests)))


async def split(pools: Sequence[Pool], requests: Sequence[Request]) -> list[Completion | RaylmError]:
    """The baseline: give every actor its share up front."""
    shares = await asyncio.gather(
        *(pool.generate_many(requests[start :: len(pools)]) for start, pool in enumerate(pools))
    )
    return list(itertools.chain.from_iterable(shares))


async def run(longest: int, num_rounds: int) -> list[Figure]:
    """Run all three ways, in turn, and return the figures."""
    rng = random.Random(0)
    lengths = [rng.randint(longest // 50, longest) for _ in range(NUM_REQUESTS)]
    requests = requests_of(lengths)
    ideal_s = sum(lengths) / (CAPACITY * sum(SPEEDS))
    say(f"{NUM_REQUESTS} requests of {min(lengths)} to {max(lengths)} tokens; ideal {ideal_s:.2f} s")

    engines = [SimulatedConfig(tokens_per_s=speed, capacity=CAPACITY) for speed in SPEEDS]
    manager = await PoolManager.start(engines, SessionConfig())
    pool = await attach(list(manager.actors.values()))
    pools = [await attach([actor]) for actor in manager.actors.values()]
    ratios: dict[str, list[float]] = {"pool": [], "arrival order": [], "static": []}
    try:
        await pool.generate_many(requests_of([10] * NUM_REQUESTS))  # warm-up
        for _ in range(num_rounds):
            ways = {
                "pool": pool.generate_many(requests),
                "arrival order": one_by_one(pool, requests),
                "static": split(pools, requests),
            }
            for name, work in ways.items():
                ratios[name].append(await seconds(work, lengths) / ideal_s)
                say(f"{name:<14} {ratios[name][-1] * ideal_s:6.2f} s, {ratios[name][-1]:.3f} of the ideal")
    finally:
        for each in [pool, *pools]:
            await each.aclose()
        await manager.aclose()
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return [
        Figure("makespan_ratio", medians["pool"], "", 1.05, "lower"),
        Figure("makespan_ratio_arrival_order", medians["arrival order"], "", better="lower"),
        Figure("makespan_ratio_static", medians["static"], "", better="lower"),
        Figure("makespan_ideal_s", ideal_s, "s", better="lower"),
    ]


def main() -> None:
    """Run the benchmark."""
    quick = quick_asked(__doc__)
    with local_cluster():
        figures = asyncio.run(run(250, 1) if quick else run(500, 2))
    publish("makespan", figures)


if __name__ == "__main__":
    main()
