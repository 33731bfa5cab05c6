"""What a batch job costs beside the engines, and what a crash of it costs.

`batch_efficiency`: 1,000 different prompts (64 tokens each, greedy, past the end of sequence) as a job on
SmolLM2-135M-Instruct: file, ledger with fsync, output. Its tokens/s as a share of the bare
`openvino_genai.ContinuousBatchingPipeline` on the same prompts with the same number of sequences at a time. Both sides
are processes of their own that take turns every few seconds: while one works, every process of the other is stopped.

`batch_rows_per_s`: 100,000 rows of 8 to 16 tokens through `raylm batch` on the simulated engine, from the first row to
the last, start of Ray not included. `rss_growth_mb`: how much more memory the driver has when the job is done than when
a tenth of it was.

`resume_cost`: 20,000 rows of 50 tokens on a served pool of simulated engines (two of 64 streams). The driver is killed
with SIGKILL when half of them are answered, and started again. Tokens that the engines generated in all, by those of
the rows. `resume_cost_ray_data`: the same with a Ray Data job that writes Parquet, which begins anew.

`chat_ttft_ratio`: p99 of the time to first token of chat requests, one every 20 ms on average, on a served pool of two
simulated engines of 64 streams, while a batch job from another process fills the pool, by the same without the job.

`chat_ttft_real_steps`: the same question on SmolLM2-135M-Instruct, one OpenVINO engine with the default settings, short
chats one a second on average: how many steps more of the engine it takes to a chat's first token. Without the job it is
one, the chat's own, with its prefill. Beside the job a chat that goes first has to wait for the end of the step that is
in progress: one more. Two more would mean that it waited for a row to end, or that rows went before it.

Steps are counted by a stream that runs meanwhile, each of whose tokens is one; within a step, time is proportional. The
figure is the 99th percentile over the chats of the steps from sending to the first token, less one.
`chat_ttft_real_step_ms` is the mean duration of a step beside the job.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from harness import Figure, local_cluster, publish, quick_asked, say
from pool_efficiency import CONFIG, MODEL, NUM_TOKENS, SLICE_S, Generate, Side, be_side, direct_side, race

from raylm.actors.manager_actor import end, serve
from raylm.api import LMDeployPipeline
from raylm.batch import ledger_path, run_batch
from raylm.config import EngineGroup, ModelConfig, OpenVINOConfig, SimulatedConfig
from raylm.messages import GenerationConfig, Message, Request
from raylm.models import resolve
from raylm.pool import Pool
from raylm.served import ServedPool

RAYLM = str(Path(sys.executable).with_name("raylm"))
SERVED = "batch-benchmark"


# batch_efficiency


@contextmanager
def job_side() -> Iterator[Generate]:
    """The subject: a job over a file."""
    with (
        tempfile.TemporaryDirectory(prefix="raylm-benchmark-") as folder,
        local_cluster(),
        LMDeployPipeline(MODEL, backend="openvino", backend_config=CONFIG) as pipeline,
    ):

        def generate(work: Sequence[str]) -> int:
            source, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
            source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in work))
            tally = run_batch(
                pipeline,
                source,
                output,
                overwrite=True,
                max_new_tokens=NUM_TOKENS,
                temperature=0,
                ignore_eos=True,
            )
            return tally.num_tokens

        yield generate


SIDES = {"direct": functools.partial(direct_side, CONFIG.capacity), "job": job_side}


def measure_efficiency(num_prompts: int) -> list[Figure]:
    """Let the sides work in turns."""
    resolve(MODEL)
    with ExitStack() as stack:
        sides = {name: Side(name, __file__) for name in SIDES}
        for side in sides.values():
            stack.callback(side.close)
        took_s = race(sides, f"{num_prompts} 0", SLICE_S)
    rates = {name: num_prompts * NUM_TOKENS / each for name, each in took_s.items()}
    say(f"direct {rates['direct']:.0f} tok/s, job {rates['job']:.0f} tok/s")
    return [
        Figure("batch_efficiency", rates["job"] / rates["direct"], "", 0.95),
        Figure("batch_tokens_per_s", rates["job"], "tok/s"),
        Figure("batch_bare_tokens_per_s", rates["direct"], "tok/s"),
    ]


# batch_rows_per_s


def write_rows(path: Path, num_rows: int, num_tokens: Callable[[int], int], **more: Any) -> None:
    """Write rows that differ, with more parameters for each."""
    with path.open("w") as file:
        for number in range(num_rows):
            row = {"prompt": f"question {number} of many", "max_new_tokens": num_tokens(number), **more}
            file.write(json.dumps(row) + "\n")


def job_command(source: Path, output: Path, *more: str) -> list[str]:
    """Return the command of a job."""
    return [RAYLM, "batch", str(source), f"--output={output}", "--temperature=0", *more]


def num_lines(path: Path, seen: dict[str, int]) -> int:
    """Return how many lines a file that grows has, reading only what is new."""
    if path.exists():
        with path.open("rb") as file:
            file.seek(seen.get("place", 0))
            block = file.read()
        seen["place"] = seen.get("place", 0) + len(block)
        seen["lines"] = seen.get("lines", 0) + block.count(b"\n")
    return seen.get("lines", 0)


def measure_rate(folder: Path, num_rows: int) -> list[Figure]:
    """Run a large job and watch its driver."""
    source, output = folder / "rate.jsonl", folder / "rate.out"
    write_rows(source, num_rows, lambda number: 8 + number % 9)
    engine = '--engine-config={"kind": "simulated", "tokens_per_s": 400, "capacity": 512}'
    command = job_command(source, output, engine, "--address=local")
    early_mb = late_mb = 0.0
    seen: dict[str, int] = {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            done = num_lines(ledger_path(output), seen)
            rss_mb = driver.memory_info().rss / 2**20
            if done < num_rows:
                early_mb = rss_mb if done <= num_rows / 10 else early_mb
                late_mb = rss_mb
            time.sleep(0.05)
        said = process.stderr.read() if process.stderr is not None else ""
    if process.returncode:
        raise RuntimeError(said)
    found = re.search(r" in ([\d.]+) s, ([\d.]+) rows/s", said)
    if found is None:
        raise RuntimeError(f"the job did not say how fast it was: {said}")
    say(f"{num_rows} rows: {found[2]} rows/s, driver {early_mb:.0f} MiB at a tenth, {late_mb:.0f} MiB at the end")
    return [
        Figure("batch_rows_per_s", float(found[2]), "1/s", 2000),
        Figure("rss_growth_mb", late_mb - early_mb, "MiB", 20, "lower"),
    ]


# resume_cost


def served_model(name: str, tokens_per_s: float) -> ModelConfig:
    """Return two simulated engines as a served model."""
    engine = SimulatedConfig(tokens_per_s=tokens_per_s, capacity=64)
    return ModelConfig(name=name, engines=(EngineGroup(engine=engine, replicas=2),))


async def generated(name: str) -> int:
    """Return how many tokens the engines of a served model have generated, once they are idle."""
    async with await ServedPool.open(name) as served:
        await served.ready()
        while True:
            await asyncio.sleep(1.5)  # longer than an engine's figures are old
            engines = [slot.engine for slot in served.pool.statistics().slots]
            if all(engine is not None and not engine.num_running for engine in engines):
                return sum(engine.num_tokens for engine in engines if engine is not None)


def killed_half_way(command: list[str], half: Callable[[], bool], env: dict[str, str]) -> None:
    """Run a command, kill it when `half` says so, and run it again."""
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not half():
            if process.poll() is not None:
                raise RuntimeError(f"it ended before it could be killed: {command}")
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


RAY_DATA = """
import sys, ray, raylm.data
ray.init(address=sys.argv[1], logging_level="ERROR")
rows = ray.data.read_json(sys.argv[2]).repartition(int(sys.argv[5]))
stage = {"model": sys.argv[4], "prompt_column": "prompt", "temperature": 0, "parameter_columns": ["max_new_tokens"]}
answers = rows.map_batches(
    raylm.data.Generate,
    fn_constructor_kwargs=stage,
    batch_size=256,
    batch_format="pyarrow",
    compute=ray.data.ActorPoolStrategy(size=1),
)
answers.write_parquet(sys.argv[3])
"""


def half_of_ledger(path: Path, num_rows: int) -> Callable[[], bool]:
    """Return what tells whether half of the rows are in a ledger."""
    seen: dict[str, int] = {}
    return lambda: num_lines(path, seen) > num_rows / 2


def half_of_files(folder: Path, num_files: int) -> Callable[[], bool]:
    """Return what tells whether half of the files are there."""
    return lambda: folder.exists() and len(list(folder.glob("*.parquet"))) >= num_files / 2


def measure_resume(folder: Path, num_rows: int) -> list[Figure]:
    """Kill a job half way and run it again; then the same for Ray Data."""
    length = 50
    source = folder / "resume.jsonl"
    write_rows(source, num_rows, lambda _: length)
    address = ray.get_runtime_context().gcs_address
    env = {**os.environ, "RAY_ADDRESS": address}
    ideal = num_rows * length
    costs = {}
    for way in ("ledger", "ray data"):
        name = f"{SERVED}-{way.replace(' ', '-')}"
        asyncio.run(serve(served_model(name, 400)))
        try:
            if way == "ledger":
                command = job_command(source, folder / "resume.out", f"--pool={name}")
                half = half_of_ledger(ledger_path(folder / "resume.out"), num_rows)
            else:
                blocks, target = 40, folder / "parquet"
                command = [sys.executable, "-c", RAY_DATA, address, str(source), str(target), name, str(blocks)]
                half = half_of_files(target, blocks)
            killed_half_way(command, half, env)
            costs[way] = asyncio.run(generated(name)) / ideal
        finally:
            asyncio.run(end(name))
        say(f"{way}: {costs[way]:.3f} times the tokens of the rows")
    return [
        Figure("resume_cost", costs["ledger"], "", 1.02, "lower"),
        Figure("resume_cost_ray_data", costs["ray data"], "", better="lower"),
    ]


# chat_ttft_ratio


async def chat(name: str, num_requests: int) -> list[float]:
    """Return the seconds to the first token of requests that come at random."""
    rng = random.Random(1)
    async with await ServedPool.open(name) as served:
        await served.ready()

        async def one(number: int) -> float:
            config = GenerationConfig(max_new_tokens=4, temperature=0)
            request = Request(request_id=f"chat-{number}", prompt=f"hello {number}", config=config)
            started_at = time.perf_counter()
            async with served.pool.stream(request) as stream:
                await anext(stream)
                took_s = time.perf_counter() - started_at
                async for _ in stream:
                    pass
            return took_s

        tasks = []
        for number in range(num_requests):
            tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(rng.expovariate(50))
        return list(await asyncio.gather(*tasks))


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def measure_chat(folder: Path, num_requests: int) -> list[Figure]:
    """Chat with and without a job on the same pool."""
    name = f"{SERVED}-chat"
    source, output = folder / "chat.jsonl", folder / "chat.out"
    write_rows(source, 100_000, lambda _: 100)
    asyncio.run(serve(served_model(name, 50)))
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    try:
        asyncio.run(chat(name, 20))
        alone = asyncio.run(chat(name, num_requests))
        job = job_command(source, output, f"--pool={name}")
        with subprocess.Popen(job, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            seen: dict[str, int] = {}
            while num_lines(ledger_path(output), seen) < 100:
                time.sleep(0.1)
            beside = asyncio.run(chat(name, num_requests))
            process.send_signal(signal.SIGKILL)
    finally:
        asyncio.run(end(name))
    say(f"p99 to the first token: {p99(alone) * 1e3:.1f} ms alone, {p99(beside) * 1e3:.1f} ms beside a job")
    return [
        Figure("chat_ttft_ratio", p99(beside) / p99(alone), "", 2, "lower"),
        Figure("chat_ttft_p99_ms", p99(beside) * 1e3, "ms", better="lower"),
        Figure("chat_ttft_alone_p99_ms", p99(alone) * 1e3, "ms", better="lower"),
    ]


# chat_ttft_real_steps


class Steps:
    """A stream that runs all the time: each of its tokens is a step of its engine."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._counts: list[int] = []
        self._came = asyncio.Event()

    async def run(self, pool: Pool) -> None:
        """Count until cancelled."""
        config = GenerationConfig(max_new_tokens=4000, temperature=0, ignore_eos=True)
        async with pool.stream(Request(request_id="steps", prompt="Once upon a time", config=config)) as stream:
            async for delta in stream:
                self._times.append(time.perf_counter())
                self._counts.append(delta.num_tokens)
                self._came.set()
        raise RuntimeError("the stream that counts steps has ended before the chats")

    async def next(self) -> None:
        """Return when the step that is in progress has ended."""
        self._came.clear()
        await self._came.wait()

    def at(self, moment: float) -> float:
        """Return how many steps there had been at a moment between the first and the last."""
        after = min(max(bisect(self._times, moment), 1), len(self._times) - 1)
        (began_at, ended_at), (first, last) = self._times[after - 1 : after + 1], self._counts[after - 1 : after + 1]
        return first + (last - first) * (moment - began_at) / (ended_at - began_at)

    @property
    def mean_s(self) -> float:
        """The mean duration of a step."""
        return (self._times[-1] - self._times[0]) / (self._counts[-1] - self._counts[0])


async def real_chats(name: str, num_requests: int, steps: Steps | None) -> list[tuple[float, float]]:
    """Return when requests that come at random were sent, and when each had its first token. `steps` runs meanwhile."""
    rng = random.Random(2)
    async with await ServedPool.open(name) as served, asyncio.TaskGroup() as group:
        await served.ready()

        async def one(number: int) -> tuple[float, float]:
            messages = (Message("user", f"Hello, what is {number} plus {number}?"),)
            config = GenerationConfig(max_new_tokens=4, temperature=0)
            sent_at = time.perf_counter()
            async with served.pool.stream(Request(request_id=f"c{number}", messages=messages, config=config)) as stream:
                await anext(stream)
                first_at = time.perf_counter()
                async for _ in stream:
                    pass
            return sent_at, first_at

        counting = None
        if steps is not None:
            counting = group.create_task(steps.run(served.pool))
            await steps.next()
        chats = []
        for number in range(num_requests):
            await asyncio.sleep(rng.expovariate(1))
            chats.append(group.create_task(one(number)))
        times = await asyncio.gather(*chats)
        if steps is not None and counting is not None:
            await steps.next()
            counting.cancel()
        return list(times)


def measure_real_chat(folder: Path, num_requests: int) -> list[Figure]:
    """Chat with a real model, with and without a job on it."""
    name = f"{SERVED}-real"
    source, output = folder / "real.jsonl", folder / "real.out"
    write_rows(source, 20_000, lambda number: 40 + number % 61, ignore_eos=True)
    resolve(MODEL)
    asyncio.run(serve(ModelConfig(name=name, engines=(EngineGroup(engine=OpenVINOConfig(path=MODEL)),))))
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    steps = Steps()
    try:
        asyncio.run(real_chats(name, 3, None))
        alone = [first_at - sent_at for sent_at, first_at in asyncio.run(real_chats(name, num_requests, None))]
        job = job_command(source, output, f"--pool={name}")
        with subprocess.Popen(job, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            seen: dict[str, int] = {}
            while num_lines(ledger_path(output), seen) < 100:
                if process.poll() is not None:
                    raise RuntimeError("the job ended before the chats began")
                time.sleep(0.1)
            beside = asyncio.run(real_chats(name, num_requests, steps))
            process.send_signal(signal.SIGKILL)
    finally:
        asyncio.run(end(name))
    num_steps = [steps.at(first_at) - steps.at(sent_at) for sent_at, first_at in beside]
    beside_ms = p99([first_at - sent_at for sent_at, first_at in beside]) * 1e3
    step_ms = steps.mean_s * 1e3
    say(
        f"real model, p99 to the first token: {p99(alone) * 1e3:.0f} ms alone, {beside_ms:.0f} ms beside a job, of "
        f"steps of {step_ms:.0f} ms"
    )
    return [
        Figure("chat_ttft_real_steps", p99(num_steps) - 1, "", 1, "lower"),
        Figure("chat_ttft_real_step_ms", step_ms, "ms", better="lower"),
        Figure("chat_ttft_real_p99_ms", beside_ms, "ms", better="lower"),
        Figure("chat_ttft_real_alone_p99_ms", p99(alone) * 1e3, "ms", better="lower"),
    ]


def measure(quick: bool) -> list[Figure]:
    """Return all figures."""
    figures: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="raylm-benchmark-") as name:
        folder = Path(name)
        figures += measure_rate(folder, 20_000 if quick else 100_000)
        with local_cluster():
            figures += measure_resume(folder, 10_000 if quick else 20_000)
            figures += measure_chat(folder, 500 if quick else 2_000)
            figures += measure_real_chat(folder, 10 if quick else 30)
    figures += measure_efficiency(200 if quick else 1_000)
    return figures


def main() -> None:
    """Run the benchmark, or one side of it."""
    if sys.argv[1:2] == ["--side"]:
        be_side(SIDES[sys.argv[2]]())
    else:
        publish("batch", measure(quick_asked(__doc__)))


if __name__ == "__main__":
    main()
