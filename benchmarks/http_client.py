"""CPU, delay and threads of carrying 256 streams from an HTTP server to their readers, through an actor and a pool.

Subject. A scripted server in a process of its own sends 256 streams of 50 tokens/s as server-sent events, one event a
token. One EngineActor runs HTTPEngine on it. This process holds the pool and one `async for delta in stream` coroutine
for each stream. Plain asyncio.

Baseline, in the same run and against the same server: 256 coroutines in one process, each reading one response of
aiohttp line by line and parsing it with `json.loads`. No Ray, no pool, no checks.

`http_lag_p99_ms`: delay from the moment a token is due at the server to its reader, for every token of 32 of the 256
streams. The server writes that moment, on CLOCK_MONOTONIC, into the token's text, and its schedule never slips: if it
sends late, or what carries the token is late, that counts.

`http_us_per_token`: CPU time (all threads, user and system) of the actor's and of this process, by number of tokens.
The server's is not in it. `http_us_ratio` is that by the baseline's.

`http_threads`: the most threads that the actor's process had while the streams ran, Ray's own among them;
`http_threads_idle`, how many it had before.

Rounds of both alternate; figures are medians over the rounds. `other_cpus` tells how many cores other processes, the
server among them, kept busy.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import aiohttp
import psutil
import ray
from harness import Figure, local_cluster, publish, quick_asked, say
from token_plane import machine_cpu_s, quantile

from raylm.actors.engine_actor import EngineActor
from raylm.actors.placement import shape
from raylm.config import HTTPConfig
from raylm.messages import GenerationConfig, Request
from raylm.pool import Pool, Stream

RATE = 50  # tokens per second of each stream
NUM_STREAMS = 256
NUM_PROBES = 32
NUM_ROUNDS = 3
STAMP = 17  # characters: microseconds on CLOCK_MONOTONIC


def event(data: str) -> bytes:
    """Return one event as a chunk of an HTTP body."""
    line = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(line), line)


class Connection(asyncio.Protocol):
    """One client of the server: answers `/v1/models`, and streams for whatever it posts."""

    def __init__(self, streams: dict[Connection, list[int]]) -> None:
        self._streams = streams
        self._received = b""
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        """End its stream."""
        self._streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is whole."""
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        length = next(
            (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0
        )
        if len(body) < length:
            return
        self._received = b""
        if head.startswith(b"POST"):
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            self._streams[self] = [0, json.loads(body)["max_tokens"]]
        elif b"/v1/models" in head.partition(b"\r\n")[0]:
            models = json.dumps({"data": [{"id": "scripted", "owned_by": "lmdeploy"}]}).encode()
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(models), models)
            )
        else:
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


async def serve() -> None:
    """Be the server: print the port, and send every stream a token at each tick."""
    loop = asyncio.get_running_loop()
    streams: dict[Connection, list[int]] = {}
    server = await loop.create_server(lambda: Connection(streams), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    due = time.monotonic()
    while True:
        due += 1 / RATE
        await asyncio.sleep(due - time.monotonic())
        choice = {"index": 0, "text": f"{due * 1e6:0{STAMP}.0f}", "finish_reason": None}
        shown = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "scripted", "choices": [choice]}
        token = event(json.dumps(shown))
        for connection, counts in tuple(streams.items()):
            counts[0] += 1
            if counts[0] <= counts[1]:
                connection.transport.write(token)
                continue
            del streams[connection]
            usage = {"prompt_tokens": 1, "completion_tokens": counts[1]}
            last = event(json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}))
            last += event(json.dumps({"choices": [], "usage": usage}))
            connection.transport.write(last + event("[DONE]") + b"0\r\n\r\n")


class MeasuredActor(EngineActor):
    """EngineActor that tells what its process costs."""

    async def cost(self) -> tuple[float, int]:
        """Return the CPU time of this process so far, in seconds, and its number of threads."""
        return time.process_time(), psutil.Process().num_threads()


class Round:
    """What one round of one side cost."""

    def __init__(self) -> None:
        self.lags_s: list[float] = []
        self.num_tokens = 0
        self.cpu_s = 0.0
        self.wall_s = 0.0
        self.other_cpus = 0.0
        self.num_threads = 0

    @property
    def us_per_token(self) -> float:
        """CPU microseconds for one token."""
        return 1e6 * self.cpu_s / self.num_tokens

    @property
    def lag_p99_ms(self) -> float:
        """The lag that one token in a hundred exceeds."""
        return 1e3 * quantile(self.lags_s, 0.99)

    def note(self, text: str) -> None:
        """Take the stamps of tokens that a reader has just got."""
        now = time.monotonic()
        self.lags_s += [now - int(text[at : at + STAMP]) / 1e6 for at in range(0, len(text), STAMP)]

    def __str__(self) -> str:
        lag = f"lag p50 {1e3 * quantile(self.lags_s, 0.5):.1f} ms, p99 {self.lag_p99_ms:.1f} ms"
        rate = self.num_tokens / self.wall_s
        return (
            f"{self.us_per_token:7.2f} us/token, {lag}, {rate:,.0f} tok/s of {NUM_STREAMS * RATE:,}, "
            f"others {self.other_cpus:.1f} cores"
        )


def probed(index: int) -> bool:
    """Whether the lag of a stream is measured."""
    return index % (NUM_STREAMS // NUM_PROBES) == 0


async def measure_pool(pool: Pool, actor: Any, num_tokens: int) -> Round:
    """Run one round of the subject."""
    measured = Round()
    config = GenerationConfig(temperature=0, max_new_tokens=num_tokens)

    async def read(stream: Stream, *, stamps: bool) -> int:
        async for delta in stream:
            if stamps and delta.text:
                measured.note(delta.text)
        return delta.num_tokens

    async def watch_threads() -> None:
        while True:
            measured.num_threads = max(measured.num_threads, (await actor.cost.remote())[1])
            await asyncio.sleep(0.2)

    actor_s, _ = await actor.cost.remote()
    watching = asyncio.create_task(watch_threads())
    machine_s, reader_s, started_at = machine_cpu_s(), time.process_time(), time.monotonic()
    streams = [
        pool.stream(Request(request_id=str(index), prompt=f"prompt {index}", config=config))
        for index in range(NUM_STREAMS)
    ]
    counts = await asyncio.gather(*(read(stream, stamps=probed(index)) for index, stream in enumerate(streams)))
    measured.num_tokens = sum(counts)
    measured.wall_s = time.monotonic() - started_at
    measured.cpu_s = time.process_time() - reader_s + (await actor.cost.remote())[0] - actor_s
    measured.other_cpus = max(0.0, machine_cpu_s() - machine_s - measured.cpu_s) / measured.wall_s
    watching.cancel()
    await asyncio.wait([watching])
    return measured


async def measure_bare(url: str, num_tokens: int) -> Round:
    """Run one round of the baseline."""
    measured = Round()

    async def read(session: aiohttp.ClientSession, index: int) -> int:
        count, stamps = 0, probed(index)
        body = {"model": "scripted", "prompt": f"prompt {index}", "max_tokens": num_tokens, "stream": True}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                choices = json.loads(line[6:])["choices"]
                if choices and (text := choices[0]["text"]):
                    count += 1
                    if stamps:
                        measured.note(text)
        return count

    machine_s, reader_s, started_at = machine_cpu_s(), time.process_time(), time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=NUM_STREAMS)) as session:
        measured.num_tokens = sum(await asyncio.gather(*(read(session, index) for index in range(NUM_STREAMS))))
    measured.wall_s = time.monotonic() - started_at
    measured.cpu_s = time.process_time() - reader_s
    measured.other_cpus = max(0.0, machine_cpu_s() - machine_s - measured.cpu_s) / measured.wall_s
    return measured


async def run(url: str, num_tokens: int) -> list[Figure]:
    """Alternate the rounds and return the figures."""
    config = HTTPConfig(url=url, capacity=NUM_STREAMS)
    actor = ray.remote(MeasuredActor).options(**shape(config).actor_options()).remote(config.model_dump_json())
    subject, baseline = [], []
    async with Pool() as pool:
        await pool.attach(0, actor)
        _, num_idle = await actor.cost.remote()
        await measure_pool(pool, actor, RATE // 2)  # warm-up, as is the next
        await measure_bare(url, RATE // 2)
        for _ in range(NUM_ROUNDS):
            subject.append(await measure_pool(pool, actor, num_tokens))
            say(f"raylm {subject[-1]}, {subject[-1].num_threads} threads")
            baseline.append(await measure_bare(url, num_tokens))
            say(f"bare  {baseline[-1]}")

    median = statistics.median
    return [
        Figure("http_lag_p99_ms", median([one.lag_p99_ms for one in subject]), "ms", 50, "lower"),
        Figure("http_us_per_token", median([one.us_per_token for one in subject]), "us/token", 100, "lower"),
        Figure("http_threads", max(one.num_threads for one in subject), "threads", 50, "lower"),
        Figure("http_threads_idle", num_idle, "threads", better="lower"),
        Figure(
            "http_us_ratio",
            median([one.us_per_token / bare.us_per_token for one, bare in zip(subject, baseline, strict=True)]),
            "",
            better="lower",
        ),
        Figure("bare_lag_p99_ms", median([one.lag_p99_ms for one in baseline]), "ms", better="lower"),
        Figure("bare_us_per_token", median([one.us_per_token for one in baseline]), "us/token", better="lower"),
        Figure("http_rate", median([one.num_tokens / one.wall_s for one in subject]), "tok/s"),
        Figure("http_rate_ideal", NUM_STREAMS * RATE, "tok/s"),
        Figure("other_cpus", median([one.other_cpus for one in subject]), "cores", better="lower"),
    ]


def main() -> None:
    """Run the benchmark, or its server."""
    if sys.argv[1:] == ["serve"]:
        asyncio.run(serve())
        return
    quick = quick_asked(__doc__)
    server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
    try:
        if server.stdout is None:
            raise AssertionError("unreachable: it is a pipe")
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        with local_cluster():
            figures = asyncio.run(run(url, 150 if quick else 400))
    finally:
        server.kill()
        server.wait()
    publish("http_client", figures)


if __name__ == "__main__":
    main()
