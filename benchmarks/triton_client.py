"""What a client actor costs beside a bare client: CPU of one token from a real Triton server, and threads.

256 streams of 32 tokens at a real Triton server with a toy model behind its python back end, as fast as that goes. The
model speaks like vLLM's back end: one response a token, with text, counts and finish reason.

Subject. A pool with one EngineActor and its TritonEngine; one reader for each stream in this process.

Baseline, in the same run, on the same server, in a process of its own: `tritonclient.grpc.aio` alone, one connection,
one `stream_infer` for each stream, the same inputs, the text of each response read with `as_numpy` and decoded. It runs
on the event loop that Ray gives its actors, uvloop.

`triton_cpu_ratio`: CPU time (all threads, user and system) of the actor's process by token, divided by that of the
baseline's process. Stop words, whole characters, counts and the actor's half of the token plane are in the subject's.

`triton_cpu_ratio_unread`: the same against a loop that throws the responses away unread.

`triton_threads`: threads of the actor's process while 256 streams run.

Rounds of the three alternate; ratios are medians over the rounds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import ray
import uvloop
from harness import Figure, local_cluster, publish, quick_asked, say
from tritonclient.grpc.aio import InferenceServerClient, InferInput

from raylm.actors.engine_actor import EngineActor
from raylm.config import TritonConfig
from raylm.messages import GenerationConfig, Request
from raylm.pool import Pool, Stream

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.engines.triton_server import TritonServer, make_repository

NUM_STREAMS = 256
NUM_TOKENS = 32


class Measured(msgspec.Struct):
    """One round of one side.

    Attributes:
        num_tokens: That came.
        wall_s: Time for all of them.
        cpu_s: CPU time of the client's process.
        num_threads: Of that process, while the streams ran.
    """

    num_tokens: int
    wall_s: float
    cpu_s: float
    num_threads: int

    @property
    def us_per_token(self) -> float:
        """CPU microseconds for one token."""
        return 1e6 * self.cpu_s / self.num_tokens


def prompt_of(index: int) -> str:
    """Return the prompt of a stream."""
    return f"Story number {index}"


def num_threads() -> int:
    """Return the number of this process's threads, those that Python does not know of included."""
    return len(list(Path("/proc/self/task").iterdir()))


# The subject


class ProbedActor(EngineActor):
    """EngineActor, which also says what its process uses."""

    async def used(self) -> tuple[float, int]:
        """Return the CPU time of this process so far, and its threads."""
        return time.process_time(), num_threads()


async def read(stream: Stream) -> int:
    """Read one stream to its end."""
    async for delta in stream:
        num_tokens = delta.num_tokens
    return num_tokens


async def measure_actor(pool: Pool, actor: Any, num_tokens: int) -> Measured:
    """Run one round of the subject."""
    config = GenerationConfig(max_new_tokens=num_tokens, temperature=0, ignore_eos=True)
    before_s, _ = await actor.used.remote()
    started_at = time.monotonic()
    streams = [
        pool.stream(Request(request_id=str(index), prompt=prompt_of(index), config=config))
        for index in range(NUM_STREAMS)
    ]
    reading = asyncio.gather(*map(read, streams))
    num_threads = 0
    while not reading.done():
        await asyncio.wait([reading], timeout=0.5)
        used_s, threads = await actor.used.remote()
        num_threads = max(num_threads, threads)
    return Measured(sum(reading.result()), time.monotonic() - started_at, used_s - before_s, num_threads)


# The baseline


async def bare_stream(client: InferenceServerClient, index: int, num_tokens: int, *, reads: bool) -> int:
    """Run one stream as one writes it with tritonclient alone; return the number of responses."""
    parameters = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    values = {
        "text_input": ("BYTES", np.array([prompt_of(index).encode()], dtype=np.object_)),
        "sampling_parameters": ("BYTES", np.array([json.dumps(parameters).encode()], dtype=np.object_)),
        **{
            name: ("BOOL", np.array([True]))
            for name in (
                "stream",
                "exclude_input_in_output",
                "return_finish_reason",
                "return_num_input_tokens",
                "return_num_output_tokens",
            )
        },
    }
    inputs = []
    for name, (datatype, array) in values.items():
        inputs.append(InferInput(name, list(array.shape), datatype).set_data_from_numpy(array))

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "vllm", "inputs": inputs}

    count = 0
    texts = []
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            raise error
        count += 1
        if reads:
            texts.append(result.as_numpy("text_output")[0].decode())
    return count


async def serve_baseline(address: str, *, reads: bool) -> None:
    """Be the baseline's process: read a number of tokens a line, answer each with a `Measured`."""
    async with InferenceServerClient(address) as client:
        print(flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            num_tokens = int(line)
            cpu_s, started_at = time.process_time(), time.monotonic()
            streams = (bare_stream(client, index, num_tokens, reads=reads) for index in range(NUM_STREAMS))
            total = sum(await asyncio.gather(*streams))
            wall_s, cpu_s = time.monotonic() - started_at, time.process_time() - cpu_s
            measured = Measured(total, wall_s, cpu_s, num_threads())
            print(msgspec.json.encode(measured).decode(), flush=True)


class Baseline:
    """A process that runs the baseline.

    Args:
        address: The server's.
        reads: Whether it reads the responses.
    """

    def __init__(self, address: str, *, reads: bool) -> None:
        command = [sys.executable, __file__, "--baseline", address, str(int(reads))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def measure(self, num_tokens: int) -> Measured:
        """Run one round."""
        if self._process.stdin is None:
            raise AssertionError("unreachable: it is a pipe")
        self._process.stdin.write(f"{num_tokens}\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._line(), type=Measured)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _line(self) -> str:
        if self._process.stdout is None:
            raise AssertionError("unreachable: it is a pipe")
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("the baseline broke; its last words are above")
        return line


# Both


@contextmanager
def server() -> Iterator[str]:
    """Run a server whose model does not wait between tokens; yield its address."""
    pace = 'parameters { key: "pace" value: { string_value: "0" } }\n'
    with tempfile.TemporaryDirectory() as folder:
        models = {"vllm": ("vllm", {"instance_group": f"{pace}instance_group"})}
        with TritonServer(make_repository(Path(folder, "models"), models), journals=False) as running:
            yield running.address


def show(name: str, measured: Measured) -> None:
    """Tell people about one round."""
    say(
        f"{name:<8} {measured.us_per_token:7.1f} us/token, {measured.num_tokens / measured.wall_s:7,.0f} tok/s, "
        f"{measured.num_threads} threads"
    )


async def run(address: str, num_rounds: int, num_tokens: int) -> list[Figure]:
    """Alternate the rounds and return the figures."""
    config = TritonConfig(address=address, model_name="vllm", capacity=NUM_STREAMS)
    actor = ray.remote(ProbedActor).options(num_cpus=0, max_concurrency=1000).remote(config.model_dump_json())
    bare, unread = Baseline(address, reads=True), Baseline(address, reads=False)
    rounds = []
    async with Pool() as pool:
        await pool.attach(0, actor)
        await measure_actor(pool, actor, 8)  # warm-up, as are the next two
        bare.measure(8)
        unread.measure(8)
        for _ in range(num_rounds):
            sides = (
                await measure_actor(pool, actor, num_tokens),
                await asyncio.to_thread(bare.measure, num_tokens),
                await asyncio.to_thread(unread.measure, num_tokens),
            )
            for name, measured in zip(("raylm", "bare", "unread"), sides, strict=True):
                if measured.num_tokens != NUM_STREAMS * num_tokens:
                    raise RuntimeError(f"{name} got {measured.num_tokens} of {NUM_STREAMS * num_tokens} tokens")
                show(name, measured)
            rounds.append(sides)
    bare.close()
    unread.close()

    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    return [
        Figure("triton_cpu_ratio", median(a.us_per_token / b.us_per_token for a, b, _ in rounds), "", 1.2, "lower"),
        Figure("triton_threads", max(a.num_threads for a, _, _ in rounds), "threads", 50, "lower"),
        Figure(
            "triton_cpu_ratio_unread", median(a.us_per_token / c.us_per_token for a, _, c in rounds), "", better="lower"
        ),
        Figure("triton_us", median(a.us_per_token for a, _, _ in rounds), "us/token", better="lower"),
        Figure("triton_bare_us", median(b.us_per_token for _, b, _ in rounds), "us/token", better="lower"),
        Figure("triton_rate", median(a.num_tokens / a.wall_s for a, _, _ in rounds), "tok/s"),
        Figure("triton_bare_rate", median(b.num_tokens / b.wall_s for _, b, _ in rounds), "tok/s"),
    ]


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--baseline"]:
        uvloop.run(serve_baseline(sys.argv[2], reads=sys.argv[3] == "1"))
        return
    quick = quick_asked(__doc__)
    with server() as address, local_cluster():
        figures = asyncio.run(run(address, 1 if quick else 9, NUM_TOKENS))
    publish("triton_client", figures)


if __name__ == "__main__":
    main()
