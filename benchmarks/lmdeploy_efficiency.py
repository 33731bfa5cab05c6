"""What an actor and a pool cost on lmdeploy: tokens/s through them, as a share of lmdeploy's own, and the health check.

16 different prompts, 64 tokens each, greedy, no end of sequence, on SmolLM2-135M-Instruct. Where torch sees no GPU,
lmdeploy's PyTorch engine runs on CPU through `raylm.engines.lmdeploy_cpu`. Where it sees some, each of TurboMind and
PyTorch runs that can load the model, with 1 GPU and with all of them; figures are named after both, and the first ones
have their plain names too. LMDEPLOY_BENCHMARK_MODEL names another model.

Subject. `LMDeployEngine` in an `EngineActor`, behind a `Pool`: this process, Ray, the actor and the child that runs
lmdeploy, all on the same machine.

Baseline. `lmdeploy.pipeline().infer` in one process: same folder, same engine config.

Each side is a process of its own, loaded and warmed up before the first round. They take turns, and while one works
every process of the other is stopped (SIGSTOP). Prompts are new in every round.

`lmdeploy_efficiency`: median over the rounds of the subject's tokens/s by the baseline's.
`health_ms`: 95th percentile of what a health check of the actor takes while it generates all of that.
`ttft_added_ms`: median time to the first token of one streamed request, less that of `stream_infer`.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from harness import Figure, local_cluster, publish, quick_asked, say
from pool_efficiency import NUM_TOKENS, Side, prompts

from raylm import Pool, SessionConfig
from raylm.actors.manager import PoolManager
from raylm.config import LMDeployConfig
from raylm.messages import GenerationConfig, Request

MODEL = os.environ.get("LMDEPLOY_BENCHMARK_MODEL", "smollm2-135m-instruct")
NUM_PROMPTS = 16
HEALTH_EVERY_S = 0.05
_SESSION_LEN = 1024
_CPU_BLOCKS = 160  # of the KV cache, 64 tokens each


class Work(Protocol):
    """One side's work."""

    def generate(self, work: Sequence[str]) -> int:
        """Work through prompts; return the number of tokens that came."""
        ...

    def first_token_s(self, prompt: str) -> float:
        """Return the time to the first token of a stream."""
        ...

    def health_ms(self, work: Sequence[str]) -> list[float]:
        """Return what health checks take while prompts are worked through."""
        ...


def settings(backend: str, tp: int, device: str) -> LMDeployConfig:
    """Return the settings of the subject, which the baseline takes over."""
    return LMDeployConfig(
        path=MODEL,
        backend=backend,
        device=device,
        tp=tp,
        session_len=_SESSION_LEN,
        max_batch_size=NUM_PROMPTS,
        prefix_caching=False,
        options={"num_gpu_blocks": _CPU_BLOCKS} if device == "cpu" else {},
        start_attempts=1,
    )


class ActorSide:
    """The subject."""

    def __init__(self, runner: asyncio.Runner, pool: Pool, actor: Any) -> None:
        self._runner = runner
        self._pool = pool
        self._actor = actor

    def generate(self, work: Sequence[str]) -> int:
        """See `Work`."""
        return self._runner.run(self._generate(work))

    async def _generate(self, work: Sequence[str]) -> int:
        answers = await asyncio.gather(*(self._pool.generate(_request(prompt, stream=False)) for prompt in work))
        return sum(answer.usage.completion_tokens for answer in answers)

    def first_token_s(self, prompt: str) -> float:
        """See `Work`."""

        async def first() -> float:
            started_at = time.perf_counter()
            async with self._pool.stream(_request(prompt, stream=True)) as stream:
                await anext(stream)
                return time.perf_counter() - started_at

        return self._runner.run(first())

    def health_ms(self, work: Sequence[str]) -> list[float]:
        """See `Work`."""

        async def check() -> list[float]:
            took = []
            generation = asyncio.create_task(self._generate(work))
            while not generation.done():
                started_at = time.perf_counter()
                await self._actor.check_health.remote()
                took.append((time.perf_counter() - started_at) * 1000)
                await asyncio.sleep(HEALTH_EVERY_S)
            await generation
            return took

        return self._runner.run(check())


def _request(prompt: str, *, stream: bool) -> Request:
    config = GenerationConfig(max_new_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    return Request(request_id=prompt, prompt=prompt, config=config, stream=stream)


@contextmanager
def actor_side(config: LMDeployConfig) -> Iterator[Work]:
    """Start the subject."""
    with local_cluster(), asyncio.Runner() as runner:
        manager = runner.run(PoolManager.start([config], SessionConfig()))
        pool = runner.run(_attach(manager))
        try:
            yield ActorSide(runner, pool, manager.actors[0])
        finally:
            runner.run(pool.aclose())
            runner.run(manager.aclose())


async def _attach(manager: PoolManager) -> Pool:
    pool = await Pool(replace=manager.replace).__aenter__()
    await pool.attach(0, manager.actors[0])
    return pool


class BareSide:
    """The baseline."""

    def __init__(self, pipeline: Any, gen_config: Any) -> None:
        self._pipeline = pipeline
        self._options = {"gen_config": gen_config, "do_preprocess": False}

    def generate(self, work: Sequence[str]) -> int:
        """See `Work`."""
        answers = self._pipeline.infer(list(work), **self._options)
        return sum(answer.generate_token_len for answer in answers)

    def first_token_s(self, prompt: str) -> float:
        """See `Work`."""
        started_at = time.perf_counter()
        took = None
        for answer in self._pipeline.stream_infer([prompt], **self._options):
            if took is None and answer.generate_token_len:
                took = time.perf_counter() - started_at
        if took is None:
            raise RuntimeError("no token came")
        return took

    def health_ms(self, work: Sequence[str]) -> list[float]:
        """See `Work`."""
        raise NotImplementedError("the baseline has no actor")


@contextmanager
def bare_side(config: LMDeployConfig) -> Iterator[Work]:
    """Start the baseline."""
    import lmdeploy

    from raylm.engines import lmdeploy_cpu
    from raylm.engines.gguf import to_folder
    from raylm.models import resolve

    if config.device == "cpu":
        lmdeploy_cpu.install()
    path = resolve(config.path)
    kind = lmdeploy.TurbomindEngineConfig if config.backend == "turbomind" else lmdeploy.PytorchEngineConfig
    engine_config = kind(
        tp=config.tp, session_len=config.session_len, max_batch_size=config.max_batch_size, **config.options
    )
    pipeline = lmdeploy.pipeline(str(to_folder(path) if path.is_file() else path), backend_config=engine_config)
    try:
        yield BareSide(pipeline, lmdeploy.GenerationConfig(max_new_tokens=NUM_TOKENS, ignore_eos=True))
    finally:
        pipeline.close()


def serve(side: str, backend: str, tp: str, device: str) -> None:
    """Be one side: obey the lines on stdin, and answer each with one line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # lmdeploy logs on stdout
    config = settings(backend, int(tp), device)
    with (actor_side if side == "actor" else bare_side)(config) as work:
        work.generate(prompts(NUM_PROMPTS, seed=-1))  # as many as in a round: each batch size is prepared once
        print("ready", file=answers)
        for line in sys.stdin:
            match line.split():
                case ["first-token", seed]:
                    print(work.first_token_s(prompts(1, int(seed))[0]), file=answers)
                case ["health", num_prompts, seed]:
                    took = work.health_ms(prompts(int(num_prompts), int(seed)))
                    print(*took, file=answers)
                case [num_prompts, seed]:
                    texts = prompts(int(num_prompts), int(seed))
                    started_at = time.perf_counter()
                    num_tokens = work.generate(texts)
                    took_s = time.perf_counter() - started_at
                    if num_tokens != len(texts) * NUM_TOKENS:
                        raise RuntimeError(f"{num_tokens} tokens came back for {len(texts)} prompts of {NUM_TOKENS}")
                    print(took_s, file=answers)


def measure(backend: str, tp: int, device: str, num_prompts: int, num_rounds: int) -> list[Figure]:
    """Alternate the sides and return the figures."""
    rates: dict[str, list[float]] = {"bare": [], "actor": []}
    firsts: dict[str, list[float]] = {"bare": [], "actor": []}
    health: list[float] = []
    with ExitStack() as stack:
        sides = {}
        for name in rates:
            sides[name] = Side(f"{name} {backend} {tp} {device}", __file__)
            stack.callback(sides[name].close)
        for seed in range(num_rounds):
            for name in rates if seed % 2 == 0 else reversed(rates):
                rates[name].append(sides[name].rate(num_prompts, seed))
                firsts[name].append(float(sides[name].ask(f"first-token {1000 + seed}")))
            health += map(float, sides["actor"].ask(f"health {num_prompts} {2000 + seed}").split())
            bare, actor = rates["bare"][-1], rates["actor"][-1]
            say(f"{backend} tp {tp} round {seed}: bare {bare:.0f} tok/s, actor {actor:.0f} tok/s: {actor / bare:.3f}")
    ratios = [actor / bare for actor, bare in zip(rates["actor"], rates["bare"], strict=True)]
    added = [actor - bare for actor, bare in zip(firsts["actor"], firsts["bare"], strict=True)]
    return [
        Figure("lmdeploy_efficiency", statistics.median(ratios), "", 0.95),
        Figure("health_ms", statistics.quantiles(health, n=20)[-1], "ms", 200, "lower"),
        Figure("ttft_added_ms", statistics.median(added) * 1000, "ms", None, "lower"),
        Figure("actor_tokens_per_s", statistics.median(rates["actor"]), "tok/s"),
        Figure("bare_tokens_per_s", statistics.median(rates["bare"]), "tok/s"),
    ]


def num_gpus() -> int:
    """Return how many GPUs torch sees. Asked in a process of its own, for this one shall not hold any."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run the benchmark, or one side of it."""
    if sys.argv[1:2] == ["--side"]:
        serve(*sys.argv[2].split())
        return
    num_prompts, num_rounds = (4, 1) if quick_asked(__doc__) else (NUM_PROMPTS, 5)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the engine's child has it
    gpus = num_gpus()
    if not gpus:
        say("torch sees no GPU on this machine: lmdeploy's PyTorch engine is measured on CPU, and nothing else is")
        publish("lmdeploy", measure("pytorch", 1, "cpu", num_prompts, num_rounds))
        return
    figures: list[Figure] = []
    for backend in ("turbomind", "pytorch"):
        for tp in sorted({1, gpus}):
            try:
                measured = measure(backend, tp, "cuda", num_prompts, num_rounds)
            except (RuntimeError, OSError) as error:
                say(f"{backend} with tp {tp} could not be measured: {error}")
                continue
            if not figures:
                figures += measured
            figures += [Figure(f"{f.name}_{backend}_tp{tp}", f.value, f.unit, f.bar, f.better) for f in measured]
    publish("lmdeploy", figures)


if __name__ == "__main__":
    main()
