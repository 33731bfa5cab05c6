"""CPU and delay of carrying tokens from an engine's process to the streams' readers, against Ray's own way.

Subject. 1,024 streams of 50 tokens/s on one EngineActor with the simulated engine. This process holds the pool and one
`async for delta in stream` coroutine for each stream. As in raylm's own processes, its event loop is uvloop's and its
garbage collector is set by `raylm.heap.settle`.

Baseline, in the same run. The same engine in a Ray actor with an async generator method, called once per stream with
`num_returns="streaming"` and read with `async for ref in ...: await ref`. It runs at 32 streams, about what it can
carry on two cores; the subject runs at that number too, for a comparison of like with like.

`token_plane_us`: CPU time (all threads, user and system) of the actor's and of this process, from before the first
submission until the last reader is done, by number of tokens. The engine's own work and the readers' are in it.

`token_plane_p99_ms`: delay from a token's tick to its reader, for every token of 32 of the 1,024 streams. Token k is
due at start + k / rate on the engine's clock, which never slips. The actor stamps the tokens of those streams as the
engine emits them, and the earliest stamp of all gives `start`; so an engine that emits late because its event loop is
busy counts as delay. `token_plane_emit_p99_ms` is from each token's own stamp instead. Both processes read the same
CLOCK_MONOTONIC.

`token_plane_gain`: CPU per token of the baseline, divided by `token_plane_us`.

`ray_alone_us`: what of `token_plane_us` is Ray's own: a call that brings as many bytes once a tick, with no engine, no
pool and no readers.

Rounds of subject and baseline alternate; figures are medians over the rounds. CPU time and delay both rise when other
processes compete for the cores: `other_cpus` tells how many cores they, or other guests of the host, took meanwhile.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import psutil
import ray
import uvloop
from harness import Figure, local_cluster, publish, quick_asked, say

from raylm import heap
from raylm.actors.engine_actor import EngineActor
from raylm.actors.placement import shape
from raylm.config import SimulatedConfig
from raylm.engines.base import Emit
from raylm.engines.simulated import SimulatedEngine
from raylm.messages import Delta, GenerationConfig, Request
from raylm.pool import Pool
from raylm.stream import Stream

RATE = 50  # tokens per second of each stream
NUM_STREAMS = 1024
NUM_BASELINE_STREAMS = 32
NUM_PROBES = 32
NUM_ROUNDS = 3
BYTES_PER_DELTA = 18  # in a reply, with its key
CONFIG = SimulatedConfig(tokens_per_s=RATE, capacity=NUM_STREAMS)

Stamps = dict[str, list[tuple[int, float]]]
"""By request id: how many tokens there were, at what time on CLOCK_MONOTONIC."""


class StampingEngine(SimulatedEngine):
    """The simulated engine, which stamps what it emits for the probes."""

    def __init__(self, config: SimulatedConfig) -> None:
        super().__init__(config)
        self.stamps: Stamps = defaultdict(list)

    async def generate(self, request: Request, emit: Emit) -> None:
        """Run one stream."""
        if request.request_id.startswith("probe"):
            stamps = self.stamps[request.request_id]

            def stamp(delta: Delta) -> None:
                stamps.append((delta.num_tokens, time.monotonic()))
                emit(delta)

            await super().generate(request, stamp)
        else:
            await super().generate(request, emit)


class ProbedActor(EngineActor):
    """EngineActor on a StampingEngine."""

    def __init__(self, config: str) -> None:
        super().__init__(config)
        self._engine = self._stamping = StampingEngine(SimulatedConfig.model_validate_json(config))

    async def cpu_s(self) -> float:
        """Return the CPU time of this process so far."""
        return time.process_time()

    async def take_stamps(self) -> Stamps:
        """Return the stamps since the last call."""
        stamps, self._stamping.stamps = self._stamping.stamps, defaultdict(list)
        return stamps


class GeneratorActor:
    """The baseline: what one writes with Ray alone."""

    def __init__(self, config: str) -> None:
        self._engine = SimulatedEngine(SimulatedConfig.model_validate_json(config))

    async def start(self) -> None:
        """Start the engine's clock."""
        await self._engine.start()

    async def cpu_s(self) -> float:
        """Return the CPU time of this process so far."""
        return time.process_time()

    async def generate(self, prompt: str, num_tokens: int) -> AsyncIterator[str]:
        """Yield the text of one stream, token by token."""
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        request = Request(request_id=prompt, prompt=prompt, config=GenerationConfig(max_new_tokens=num_tokens))
        running = asyncio.create_task(self._engine.generate(request, deltas.put_nowait))
        finished = False
        while not finished:
            delta = await deltas.get()
            finished = delta.finish_reason is not None
            yield delta.text
        await running


class EmptyPlane:
    """Nothing but Ray: a call that comes back once a tick, with as many bytes as the plane's replies."""

    def __init__(self) -> None:
        self._reply = bytes(BYTES_PER_DELTA * NUM_STREAMS)
        self._due = time.monotonic()

    async def cpu_s(self) -> float:
        """Return the CPU time of this process so far."""
        return time.process_time()

    async def poll(self) -> bytes:
        """Return at the next tick."""
        now = time.monotonic()
        self._due = max(self._due + 1 / RATE, now)
        await asyncio.sleep(self._due - now)
        return self._reply


class Measured(msgspec.Struct):
    """One round of one side.

    Attributes:
        num_tokens: Delivered.
        wall_s: From submission to the last token at its reader.
        actor_cpu_s: CPU time of the actor's process.
        reader_cpu_s: CPU time of this process.
        other_cpus: Cores that all other processes kept busy, or that the host gave to other guests.
        due_delays_s: For each token of the probes, from its tick to its reader.
        emit_delays_s: The same, from the moment the engine emitted it.
        rate: Tokens per second; those of the plane from the first token at its reader to the last one.
    """

    num_tokens: int
    wall_s: float
    actor_cpu_s: float
    reader_cpu_s: float
    other_cpus: float
    due_delays_s: list[float] = []
    emit_delays_s: list[float] = []
    rate: float = 0.0

    @property
    def us_per_token(self) -> float:
        """CPU microseconds of both processes for one token."""
        return 1e6 * (self.actor_cpu_s + self.reader_cpu_s) / self.num_tokens


class Meter:
    """CPU time of everything, from its start on.

    Args:
        actor: Whose CPU time to ask for.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def start(self) -> None:
        """Begin."""
        self._actor_s = await self._actor.cpu_s.remote()
        self._machine_s, self._reader_s, self._started_at = machine_cpu_s(), time.process_time(), time.monotonic()

    async def stop(self, num_tokens: int) -> Measured:
        """End."""
        wall_s = time.monotonic() - self._started_at
        reader_s, machine_s = time.process_time() - self._reader_s, machine_cpu_s() - self._machine_s
        actor_s = await self._actor.cpu_s.remote() - self._actor_s
        other_cpus = max(0.0, machine_s - reader_s - actor_s) / wall_s
        return Measured(num_tokens, wall_s, actor_s, reader_s, other_cpus, rate=num_tokens / wall_s)


def machine_cpu_s() -> float:
    """Return the CPU time that this machine's processes, and its host's other guests, have taken from it so far."""
    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "steal", 0.0)


async def read(stream: Stream) -> int:
    """Read one stream to its end."""
    async for delta in stream:
        num_tokens = delta.num_tokens
    return num_tokens


async def read_probe(stream: Stream, stamps: list[tuple[int, float]]) -> int:
    """Read one stream to its end and stamp its deltas."""
    async for delta in stream:
        stamps.append((delta.num_tokens, time.monotonic()))
        num_tokens = delta.num_tokens
    return num_tokens


async def measure_plane(pool: Pool, actor: Any, num_streams: int, num_tokens: int) -> Measured:
    """Run one round of the subject."""
    config = GenerationConfig(max_new_tokens=num_tokens)
    received: Stamps = defaultdict(list)
    readers = []
    meter = Meter(actor)
    await meter.start()
    for index in range(num_streams):
        probed = index % max(1, num_streams // NUM_PROBES) == 0
        request_id = f"{'probe' if probed else 'plain'}-{index}"
        stream = pool.stream(Request(request_id=request_id, prompt=f"prompt {index}", config=config))
        readers.append(read_probe(stream, received[request_id]) if probed else read(stream))
    measured = await meter.stop(sum(await asyncio.gather(*readers)))

    emitted: Stamps = await actor.take_stamps.remote()
    start = min(at - count / RATE for stamps in emitted.values() for count, at in stamps)
    first = min(stamps[0][1] for stamps in received.values())
    last = max(stamps[-1][1] for stamps in received.values())
    measured.rate = num_streams * (num_tokens - 1) / (last - first)
    for request_id, stamps in received.items():
        receipts = per_token(stamps)
        measured.due_delays_s += [at - start - count / RATE for count, at in enumerate(receipts, 1)]
        measured.emit_delays_s += [
            receipt - at for receipt, at in zip(receipts, per_token(emitted[request_id]), strict=True)
        ]
    return measured


def per_token(stamps: list[tuple[int, float]]) -> list[float]:
    """Return the time of each token, where several may have come at once."""
    times: list[float] = []
    for count, at in stamps:
        times += [at] * (count - len(times))
    return times


async def measure_generators(actor: Any, num_streams: int, num_tokens: int) -> Measured:
    """Run one round of the baseline."""

    async def read_generator(index: int) -> int:
        count = 0
        async for reference in actor.generate.options(num_returns="streaming").remote(f"prompt {index}", num_tokens):
            await reference
            count += 1
        return count

    meter = Meter(actor)
    await meter.start()
    return await meter.stop(sum(await asyncio.gather(*(read_generator(index) for index in range(num_streams)))))


async def measure_empty(actor: Any, num_ticks: int) -> Measured:
    """Run one round of Ray alone, as if each reply held a token of every stream."""
    meter = Meter(actor)
    await meter.start()
    for _ in range(num_ticks):
        await actor.poll.remote()
    return await meter.stop(num_ticks * NUM_STREAMS)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def show(name: str, num_streams: int, measured: Measured) -> None:
    """Tell people about one round."""
    text = (
        f"{name:<10} {num_streams:>5} streams: {measured.us_per_token:7.2f} us/token "
        f"(actor {1e6 * measured.actor_cpu_s / measured.num_tokens:.2f}, "
        f"reader {1e6 * measured.reader_cpu_s / measured.num_tokens:.2f}), "
        f"{measured.rate:,.0f} tok/s of {num_streams * RATE:,}, others {measured.other_cpus:.1f} cores"
    )
    if delays := measured.due_delays_s:
        text += f", delay p50 {1e3 * quantile(delays, 0.5):.1f} ms, p99 {1e3 * quantile(delays, 0.99):.1f} ms"
    say(text)


async def run(num_tokens: int) -> list[Figure]:
    """Alternate the rounds and return the figures."""
    heap.settle()
    probed = ray.remote(ProbedActor).options(**shape(CONFIG).actor_options()).remote(CONFIG.model_dump_json())
    generators = ray.remote(GeneratorActor).options(num_cpus=0).remote(CONFIG.model_dump_json())
    empty = ray.remote(EmptyPlane).options(num_cpus=0).remote()
    await generators.start.remote()
    full, same, baseline, floor = [], [], [], []
    async with Pool() as pool:
        await pool.attach(0, probed)
        await measure_plane(pool, probed, NUM_BASELINE_STREAMS, RATE // 2)  # warm-up, as is the next
        await measure_generators(generators, NUM_BASELINE_STREAMS, RATE // 2)
        for _ in range(NUM_ROUNDS):
            full.append(await measure_plane(pool, probed, NUM_STREAMS, num_tokens))
            show("raylm", NUM_STREAMS, full[-1])
            same.append(await measure_plane(pool, probed, NUM_BASELINE_STREAMS, num_tokens))
            show("raylm", NUM_BASELINE_STREAMS, same[-1])
            baseline.append(await measure_generators(generators, NUM_BASELINE_STREAMS, num_tokens))
            show("generators", NUM_BASELINE_STREAMS, baseline[-1])
            floor.append(await measure_empty(empty, num_tokens))
            show("ray alone", NUM_STREAMS, floor[-1])

    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    ideal = NUM_STREAMS * RATE
    rate = median([measured.rate for measured in full])
    if abs(rate / ideal - 1) > 0.02:
        say(f"NOTE: {rate:,.0f} tok/s were delivered, more than 2 % off the ideal {ideal:,}: the machine was busy")
    pairs = list(zip(full, same, baseline, strict=True))
    return [
        Figure("token_plane_us", median([a.us_per_token for a in full]), "us/token", 10, "lower"),
        Figure("token_plane_p99_ms", median([1e3 * quantile(a.due_delays_s, 0.99) for a in full]), "ms", 20, "lower"),
        Figure("token_plane_gain", median([c.us_per_token / a.us_per_token for a, _, c in pairs]), "", 20),
        Figure(
            f"token_plane_gain_at_{NUM_BASELINE_STREAMS}",
            median([c.us_per_token / b.us_per_token for _, b, c in pairs]),
            "",
        ),
        Figure(
            "token_plane_emit_p99_ms",
            median([1e3 * quantile(a.emit_delays_s, 0.99) for a in full]),
            "ms",
            better="lower",
        ),
        Figure("token_plane_p50_ms", median([1e3 * quantile(a.due_delays_s, 0.5) for a in full]), "ms", better="lower"),
        Figure("token_plane_rate", rate, "tok/s"),
        Figure("token_plane_rate_ideal", ideal, "tok/s"),
        Figure("other_cpus", median([a.other_cpus for a in full]), "cores", better="lower"),
        Figure("ray_alone_us", median([d.us_per_token for d in floor]), "us/token", better="lower"),
        Figure("generator_us", median([c.us_per_token for c in baseline]), "us/token", better="lower"),
        Figure("generator_rate", median([c.rate for c in baseline]), "tok/s"),
        Figure("generator_rate_ideal", NUM_BASELINE_STREAMS * RATE, "tok/s"),
    ]


def main() -> None:
    """Run the benchmark."""
    quick = quick_asked(__doc__)
    with local_cluster():
        figures = uvloop.run(run(100 if quick else 250))
    publish("token_plane", figures)


if __name__ == "__main__":
    main()
