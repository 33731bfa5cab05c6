"""The HTTP endpoint under load, against the usual way to put a model behind Ray Serve.

Subject. `raylm serve` in HAProxy mode: HAProxy, one gateway, one EngineActor.

Baseline, on the same Serve with the same HAProxy, in alternating rounds: a FastAPI ingress deployment that streams from
the handle of an engine deployment, one `StreamingResponse` a request, as Serve's own guide has it.

Serve's own defaults hold for the baseline's replicas. `raylm serve` sets `RAY_SERVE_THROUGHPUT_OPTIMIZED`, so a second
baseline has that too: the figures that end in `_optimized` are against it.

Both have the simulated engine (a clock, not a model) at 50 tokens/s a stream, and both write events of the same JSON:
the baseline one for each token, raylm one for what has come since its last. The load is wrk's, with 256 connections
that ask for streams of 100 tokens one after the other; streamed tokens/s are 256 * 100 / mean time of a stream.

`stream_gain`: the subject's streamed tokens/s by the baseline's, where neither is held up by the engine: it offers four
times as much, 200 tokens/s a stream.
`stream_gain_paced`: the same at 50 tokens/s a stream, of which raylm streams nearly all: the engine's 12,800 tokens/s
by those of the baseline are the most that any design can gain.
`ttft_added_ratio`: median time to the first token beside those 256 streams, less the engine's own, by the baseline's.
Requests of one token show it, for wrk knows only when a response is whole.
`cpu_per_token_ratio`: CPU of all of Ray's, Serve's and HAProxy's processes for one token, by the baseline's.
`stream_stretch`: median time of a stream by the engine's own, which is 2 s.
`added_p50_ms`: median time of a request for one token, one client and nothing else, less the engine's own. The engine
here ticks every 0.1 ms: a client that comes back a little later than a tick of 20 ms would wait for the next one all
the same, and hide what it took. Median of fifteen windows of 4 s: where other guests share the host, its speed changes
within a minute.
`http_efficiency`: SmolLM2 on CPU, tokens/s of the engine while 32 streams are read over HTTP, by those of the same
engine driven directly in a process of its own. Gateway, HAProxy, wrk and engine share the machine's cores. Both sides
take turns every few seconds: while one works, every process of the other is stopped.
`affinity`, `moved_healthy`, `moved_answered`: 200 sessions of 5 turns on 4 actors and 2 gateways. Share of turns on the
session's own actor; then one actor is killed: share of the other actors' sessions that move, and of the dead one's that
answer their next turn right.

The engine's own times are measured on the same engine, driven directly in this process. Needs wrk.
"""

import asyncio
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import requests
from harness import Figure, local_cluster, publish, quick_asked, say
from pool_efficiency import SLICE_S, Side, side_rates
from pydantic import BaseModel

from raylm.config import EngineConfig, OpenVINOConfig, ServeConfig, SimulatedConfig
from raylm.engines import build
from raylm.engines.simulated import greedy_text
from raylm.messages import Delta, GenerationConfig, Message, Request
from raylm.ports import free_port
from raylm.serve.run import Endpoint

RATE = 50  # tokens per second of each stream
PLENTY_RATE = 200  # more than either side streams to 256 clients
FAST_RATE = 10_000  # of an engine that adds next to nothing itself
NUM_STREAMS = 256
NUM_TOKENS = 100
NUM_PROBES = 4
MODEL = "smollm2-135m-instruct"
NUM_REAL_STREAMS = 32
LONG_S = 3600
NUM_SESSIONS, NUM_TURNS = 200, 5
BASELINES = ("baseline", "optimized")

LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local count = 0
function request()
  count = count + 1
  return wrk.format(nil, nil, nil, string.format(BODY, count))
end
function done(summary, latency)
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status
    + summary.errors.timeout
  io.write(string.format("RESULT %d %d %f %f\\n", summary.requests, failed, latency.mean, latency:percentile(50)))
end
"""


Count = Callable[[], int]
"""Tells how many tokens an engine has generated."""


class Load(msgspec.Struct):
    """What wrk saw. Times in seconds."""

    num_requests: int
    mean_s: float
    p50_s: float


class Wrk:
    """A running wrk.

    Args:
        url: Where it sends.
        body: What, as Lua's `string.format` takes it, with one `%d` for a number that differs.
        connections: How many at a time.
        duration_s: For how long.
    """

    def __init__(self, url: str, body: str, connections: int, duration_s: float) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".lua", delete=False) as script:
            script.write(f"BODY = [[{body}]]\n{LUA}")
        self._script = Path(script.name)
        command = ["wrk", "-t1", f"-c{connections}", f"-d{duration_s:.0f}s", "--timeout", "60s", "-s", script.name, url]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def end(self) -> None:
        """End it before its time."""
        self._process.terminate()
        self._process.communicate()
        self._script.unlink()

    def result(self) -> Load:
        """Wait for its end."""
        printed, _ = self._process.communicate()
        self._script.unlink()
        _, requests, failed, mean_us, p50_us = next(
            line for line in printed.splitlines() if line.startswith("RESULT")
        ).split()
        if int(failed):
            raise RuntimeError(f"{failed} of {requests} requests failed:\n{printed}")
        return Load(int(requests), float(mean_us) / 1e6, float(p50_us) / 1e6)


def chat_body(model: str, max_tokens: int, *, stream: bool, prompt: str = "question %d") -> str:
    """Return the body of a chat request for wrk."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": stream, "temperature": 0}
    return json.dumps(body)


class BaselineBody(BaseModel):
    """What the baseline takes."""

    prompt: str
    max_tokens: int


def baseline_app(rate: float, *, optimized: bool) -> Any:
    """Return the usual design as a Serve application.

    Args:
        rate: Tokens per second of each stream in its engine.
        optimized: With Serve's settings for throughput.
    """
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from ray import serve

    from raylm.engines.simulated import SimulatedEngine

    environment = {"env_vars": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": str(int(optimized))}}
    options = {"num_cpus": 0, "runtime_env": environment}

    @serve.deployment(max_ongoing_requests=10_000, ray_actor_options=options)
    class Engine:
        def __init__(self) -> None:
            self._engine = SimulatedEngine(SimulatedConfig(tokens_per_s=rate))
            self._started = False

        async def generate(self, prompt: str, max_tokens: int) -> AsyncIterator[str]:
            if not self._started:
                self._started = True
                await self._engine.start()
            deltas: asyncio.Queue[Delta] = asyncio.Queue()
            config = GenerationConfig(max_new_tokens=max_tokens, temperature=0)
            request = Request(request_id=prompt, prompt=prompt, config=config)
            running = asyncio.create_task(self._engine.generate(request, deltas.put_nowait))
            while True:
                delta = await deltas.get()
                yield delta.text
                if delta.finish_reason is not None:
                    break
            await running

    app = FastAPI()

    @serve.deployment(max_ongoing_requests=10_000, ray_actor_options=options)
    @serve.ingress(app)
    class Ingress:
        def __init__(self, engine: Any) -> None:
            self._engine = engine.options(stream=True)

        @app.post("/stream")
        async def stream(self, body: BaselineBody) -> StreamingResponse:
            async def events() -> AsyncIterator[str]:
                async for text in self._engine.generate.remote(body.prompt, body.max_tokens):
                    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
                    chunk = {
                        "id": "chatcmpl-0",
                        "object": "chat.completion.chunk",
                        "created": 0,
                        "model": "sim",
                        "choices": [choice],
                    }
                    yield f"data: {json.dumps(chunk)}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")

    return Ingress.bind(Engine.bind())


def cluster_cpu_s() -> float:
    """Return the CPU time so far of everything that this process has started but wrk, in seconds."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name() != "wrk":
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


class Round(msgspec.Struct):
    """One round of the load on one of the two."""

    tokens_per_s: float
    stream_s: float
    ttft_s: float
    cpu_us: float


def load_round(url: str, stream_body: str, probe_url: str, probe_body: str, duration_s: float) -> Round:
    """Run 256 streams and, beside them, the probes."""
    before_s = cluster_cpu_s()
    streams = Wrk(url, stream_body, NUM_STREAMS, duration_s)
    time.sleep(1)  # until the streams have begun; the probes are to meet them
    probes = Wrk(probe_url, probe_body, NUM_PROBES, duration_s - 2)
    probed, streamed = probes.result(), streams.result()
    cpu_s = cluster_cpu_s() - before_s
    num_tokens = duration_s * NUM_STREAMS * NUM_TOKENS / streamed.mean_s + probed.num_requests
    return Round(
        tokens_per_s=NUM_STREAMS * NUM_TOKENS / streamed.mean_s,
        stream_s=streamed.p50_s,
        ttft_s=probed.p50_s,
        cpu_us=cpu_s / num_tokens * 1e6,
    )


async def engine_alone(tokens_per_s: float, num_streams: int) -> float:
    """Return the engine's own median time to one token beside that many streams, in seconds."""
    engine = build(SimulatedConfig(tokens_per_s=tokens_per_s))
    await engine.start()

    async def once(num_tokens: int) -> float:
        began = time.perf_counter()
        config = GenerationConfig(max_new_tokens=num_tokens, temperature=0)
        await engine.generate(Request(request_id="x", prompt="question", config=config), lambda _: None)
        return time.perf_counter() - began

    others = [asyncio.create_task(once(500)) for _ in range(num_streams)]
    times = []
    for index in range(50):
        await asyncio.sleep(0.0031 * (index % 7))  # at all phases of the engine's clock
        times.append(await once(1))
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await engine.close()
    return statistics.median(times)


@contextmanager
def serving(engines: list[EngineConfig], name: str, gateways: int = 1) -> Iterator[str]:
    """Serve a model on a cluster of its own, and yield its URL."""
    config = ServeConfig.parse(
        {
            "models": [{"name": name, "engines": [engine.model_dump() for engine in engines]}],
            "gateway": {"replicas": gateways},
        }
    )
    endpoint = Endpoint(config, "127.0.0.1", free_port(), "haproxy", None)
    with local_cluster():
        endpoint.connect()
        try:
            endpoint.start()
            yield endpoint.url
        finally:
            endpoint.stop()


def measure_single(*, quick: bool) -> list[Figure]:
    """Measure a request for one token, with one client and nothing else, in windows of some seconds."""
    alone_s = asyncio.run(engine_alone(FAST_RATE, 0))
    with serving([SimulatedConfig(tokens_per_s=FAST_RATE)], "fast") as url:
        chat, body = f"{url}/v1/chat/completions", chat_body("fast", 1, stream=False)
        Wrk(chat, body, 1, 2).result()
        added_ms = [(Wrk(chat, body, 1, 4).result().p50_s - alone_s) * 1e3 for _ in range(1 if quick else 15)]
    say(f"added to {alone_s * 1e3:.2f} ms: {', '.join(f'{ms:.1f}' for ms in added_ms)} ms")
    return [Figure("added_p50_ms", statistics.median(added_ms), "ms", 2.5, "lower")]


def stream_rounds(rate: float, *, quick: bool) -> dict[str, list[Round]]:
    """Run rounds of the load on subject and baselines, in turns, with an engine of so many tokens/s a stream."""
    rounds, duration_s = (1, 8) if quick else (3, 15)
    found: dict[str, list[Round]] = {"raylm": [], "baseline": [], "optimized": []}
    with serving([SimulatedConfig(tokens_per_s=rate)], "sim") as url:
        from ray import serve

        for name in BASELINES:
            serve.run(baseline_app(rate, optimized=name == "optimized"), name=name, route_prefix=f"/{name}")
        chat, body = f"{url}/v1/chat/completions", '{"prompt": "question %%d", "max_tokens": %d}'
        stream_body, probe_body = chat_body("sim", NUM_TOKENS, stream=True), chat_body("sim", 1, stream=True)
        loads = {
            "raylm": (chat, stream_body, chat, probe_body, duration_s),
            **{
                name: (f"{url}/{name}/stream", body % NUM_TOKENS, f"{url}/{name}/stream", body % 1, 2 * duration_s)
                for name in BASELINES
            },
        }
        for load in loads.values():
            Wrk(load[2], load[3], 32, 2).result()  # so that everything is imported
        for number in range(rounds):
            for name, load in loads.items():
                found[name].append(load_round(*load))
                say(f"{rate} tokens/s a stream, round {number}, {name}: {found[name][-1]}")
        for name in BASELINES:
            serve.delete(name)  # else the endpoint leaves Serve to them, and Serve would take it for the next cluster's
    return found


def measure_streams(*, quick: bool) -> list[Figure]:
    """Measure subject and baselines with the simulated engine."""
    beside_s = asyncio.run(engine_alone(RATE, NUM_STREAMS))
    paced, plenty = (stream_rounds(rate, quick=quick) for rate in (RATE, PLENTY_RATE))

    def median(rounds: list[Round], what: str) -> float:
        return statistics.median(getattr(measured, what) for measured in rounds)

    def streamed(rounds: list[Round]) -> float:
        return median(rounds, "tokens_per_s")

    def added_s(name: str) -> float:
        return max(1e-4, median(paced[name], "ttft_s") - beside_s)

    figures = [
        Figure("stream_stretch", median(paced["raylm"], "stream_s") / (NUM_TOKENS / RATE), "", 1.1, "lower"),
        Figure("stream_rate", streamed(plenty["raylm"]), "tokens/s"),
        Figure("stream_rate_paced", streamed(paced["raylm"]), "tokens/s"),
        Figure("stream_rate_paced_ideal", NUM_STREAMS * RATE, "tokens/s"),
        Figure("ttft_added_ms", added_s("raylm") * 1e3, "ms", None, "lower"),
        Figure("cpu_per_token_us", median(paced["raylm"], "cpu_us"), "us", None, "lower"),
    ]
    for name, suffix, bars in (("baseline", "", (3.0, 0.5, 0.33)), ("optimized", "_optimized", (None, None, None))):
        added = added_s("raylm") / added_s(name)
        cpu = median(paced["raylm"], "cpu_us") / median(paced[name], "cpu_us")
        figures += [
            Figure(f"stream_gain{suffix}", streamed(plenty["raylm"]) / streamed(plenty[name]), "", bars[0]),
            Figure(f"stream_gain_paced{suffix}", streamed(paced["raylm"]) / streamed(paced[name]), ""),
            Figure(f"ttft_added_ratio{suffix}", added, "", bars[1], "lower"),
            Figure(f"cpu_per_token_ratio{suffix}", cpu, "", bars[2], "lower"),
            Figure(f"{name}_stream_rate", streamed(plenty[name]), "tokens/s"),
            Figure(f"{name}_stream_rate_paced", streamed(paced[name]), "tokens/s"),
            Figure(f"{name}_ttft_added_ms", added_s(name) * 1e3, "ms", None, "lower"),
            Figure(f"{name}_cpu_per_token_us", median(paced[name], "cpu_us"), "us", None, "lower"),
        ]
    return figures


@contextmanager
def http_side() -> Iterator[Count]:
    """The real model over HTTP, under load."""
    with serving([OpenVINOConfig(path=MODEL)], MODEL) as url:
        body = json.loads(chat_body(MODEL, NUM_TOKENS, stream=True, prompt="Tell me story %d."))
        body["ignore_eos"] = True
        load = Wrk(f"{url}/v1/chat/completions", json.dumps(body), NUM_REAL_STREAMS, LONG_S)

        def count() -> int:
            state = requests.get(f"{url}/state", timeout=30).json()
            engine = state["models"][0]["slots"][0]["engine"]  # None until a gateway has heard of it
            return int(engine["num_tokens"]) if engine else 0

        try:
            yield count
        finally:
            load.end()


@contextmanager
def direct_side() -> Iterator[Count]:
    """The engine of the real model with the same load, in this process."""
    engine = build(OpenVINOConfig(path=MODEL))
    config = GenerationConfig(max_new_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    numbers = itertools.count(1)

    async def client() -> None:
        for number in numbers:
            words = f"Tell me story {number}."
            request = Request(request_id=words, messages=(Message("user", words),), config=config)
            await engine.generate(request, lambda _: None)

    async def load() -> None:
        await engine.start()
        async with asyncio.TaskGroup() as clients:
            for _ in range(NUM_REAL_STREAMS):
                clients.create_task(client())

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.run_until_complete(engine.close())

    loop = asyncio.new_event_loop()
    task = loop.create_task(load())
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lambda: engine.statistics().num_tokens
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


REAL_SIDES = {"direct": direct_side, "http": http_side}


def be_real_side(side: AbstractContextManager[Count]) -> None:
    """Be one side: answer every line with the number of tokens so far."""
    with side as count:
        while not count():
            time.sleep(0.1)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(count(), flush=True)


def measure_real(*, quick: bool) -> list[Figure]:
    """Measure the real model over HTTP and directly, in turns of some seconds, for a machine's speed drifts."""
    warm_s, window_s = (4, 16) if quick else (10, 80)
    with ExitStack() as stack:
        sides = {name: Side(name, __file__) for name in REAL_SIDES}
        for side in sides.values():
            stack.callback(side.close)
        rates = side_rates(sides, SLICE_S, round(warm_s / SLICE_S), round(window_s / SLICE_S))
    say(f"direct {rates['direct']:.0f} tokens/s, over HTTP {rates['http']:.0f}")
    return [
        Figure("http_efficiency", rates["http"] / rates["direct"], "", 0.85),
        Figure("http_tokens_per_s", rates["http"], "tokens/s"),
        Figure("direct_tokens_per_s", rates["direct"], "tokens/s"),
    ]


def measure_affinity(*, quick: bool) -> list[Figure]:
    """Measure where the turns of sessions go, before and after the death of an actor."""
    num_sessions = NUM_SESSIONS // (4 if quick else 1)
    with serving([SimulatedConfig(tokens_per_s=1000)] * 4, "sim", gateways=2) as url:
        return asyncio.run(_affinity(url, num_sessions))


async def _affinity(url: str, num_sessions: int) -> list[Figure]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=32, force_close=True)) as client:

        async def turn(session: int, number: int) -> tuple[int, str]:
            body = {
                "inputs": f"session {session} turn {number}",
                "session_id": session,
                "sequence_start": number == 0,
                "sequence_end": False,
                "max_new_tokens": 8,
                "temperature": 0,
            }
            async with client.post(f"{url}/stream_chat", json=body) as response:
                last = [line async for line in response.content if line.startswith(b"data: ")][-1]
            event = json.loads(last.removeprefix(b"data: "))
            if event.get("status") != 0:
                raise RuntimeError(f"turn {number} of session {session} ended with {event}")
            return event["receipt"]["slot"], event["text"]

        async def conversation(session: int) -> list[int]:
            return [(await turn(session, number))[0] for number in range(NUM_TURNS)]

        slots = await asyncio.gather(*(conversation(session) for session in range(num_sessions)))
        affinity = statistics.mean(slot == found[0] for found in slots for slot in found[1:])
        async with client.get(f"{url}/state") as response:
            state = await response.json()
        dead = state["models"][0]["slots"][0]
        os.kill(dead["pid"], signal.SIGKILL)
        after = await asyncio.gather(*(turn(session, NUM_TURNS) for session in range(num_sessions)))

        async def right(session: int) -> bool:
            async with client.get(f"{url}/sessions/{session}") as response:
                messages = (await response.json())["messages"]
            prompt = "".join(f"{message['role']}: {message['content']}\n" for message in messages[:-1])
            return len(messages) == 2 * (NUM_TURNS + 1) and after[session][1] == greedy_text(prompt, 8)

        healthy = [session for session in range(num_sessions) if slots[session][-1] != dead["slot"]]
        orphans = [session for session in range(num_sessions) if slots[session][-1] == dead["slot"]]
        moved = statistics.mean(after[session][0] != slots[session][-1] for session in healthy)
        answered = statistics.mean([await right(session) for session in orphans])
    say(f"{len(orphans)} of {num_sessions} sessions were on the actor that was killed")
    return [
        Figure("affinity", affinity, "", 1),
        Figure("moved_healthy", moved, "", 0, "lower"),
        Figure("moved_answered", answered, "", 1),
    ]


def main() -> None:
    """Measure all of it, or be one side of it."""
    if sys.argv[1:2] == ["--side"]:
        be_real_side(REAL_SIDES[sys.argv[2]]())
        return
    quick = quick_asked(__doc__)
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed; `make system-deps` brings it")
    parts = (measure_single, measure_streams, measure_affinity, measure_real)
    figures = [figure for measure in parts for figure in measure(quick=quick)]
    publish("serving", figures)


if __name__ == "__main__":
    main()
