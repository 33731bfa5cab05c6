"""What the pool costs on a real model: its tokens/s through one actor, as a share of the engine's own.

256 different prompts, 64 tokens each, greedy, past the end of sequence, on SmolLM2-135M-Instruct.

Subject. `LMDeployPipeline.generate` with one replica on the OpenVINO engine: this process, Ray, the engine's actor and
the child that runs the model, all on the same cores.

Baseline. `openvino_genai.ContinuousBatchingPipeline` in one process: the same model file, scheduler settings and number
of threads, all prompts added at once, `step()` until nothing is left, texts decoded at the end. No other process runs.

`pool_efficiency`: median over the rounds of the subject's tokens/s by the baseline's. Each side of each round is a
fresh process, so no prefix is cached, and works through a few prompts before the clock starts. Sides alternate.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from harness import Figure, local_cluster, publish, quick_asked, say

from raylm import LMDeployPipeline
from raylm.config import OpenVINOConfig
from raylm.models import resolve

MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 64
NUM_THREADS = os.cpu_count()
CONFIG = OpenVINOConfig(num_threads=NUM_THREADS)

_WHO = ("a baker", "a clockmaker", "two sailors", "an old fox", "the night watch", "a young painter", "my neighbour")
_DID = ("found a letter", "lost a key", "crossed the river", "built a tower", "learnt to sing", "waited for the snow")
_WHERE = ("in Lisbon", "behind the mill", "at the edge of the sea", "on a slow train", "under the old bridge")


def prompts(count: int, seed: int) -> list[str]:
    """Return different prompts of about thirty tokens."""
    rng = random.Random(seed)
    return [
        f"Story {index}-{rng.randrange(10**6)}. One morning {rng.choice(_WHO)} {rng.choice(_DID)} "
        f"{rng.choice(_WHERE)}, and nobody knew why. This is what happened next:"
        for index in range(count)
    ]


def rate(generate: Callable[[Sequence[str]], int], num_prompts: int, seed: int) -> float:
    """Warm up, then return the tokens/s of a function that works through prompts and returns its number of tokens."""
    generate(prompts(CONFIG.capacity, seed=-1))
    work = prompts(num_prompts, seed)
    started_at = time.perf_counter()
    num_tokens = generate(work)
    took_s = time.perf_counter() - started_at
    if num_tokens != num_prompts * NUM_TOKENS:
        raise RuntimeError(f"{num_tokens} tokens came back for {num_prompts} prompts of {NUM_TOKENS} each")
    return num_tokens / took_s


def pool_rate(num_prompts: int, seed: int) -> float:
    """Return the subject's tokens/s."""
    with (
        local_cluster(),
        LMDeployPipeline(MODEL, backend="openvino", backend_config=CONFIG, max_new_tokens=NUM_TOKENS) as pipeline,
    ):

        def generate(work: Sequence[str]) -> int:
            answers = pipeline.generate(work, return_dict=True, temperature=0, ignore_eos=True)
            return sum(answer["usage"]["completion_tokens"] for answer in answers)

        return rate(generate, num_prompts, seed)


def direct_rate(num_prompts: int, seed: int) -> float:
    """Return the baseline's tokens/s."""
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CONFIG.cache_size_gb
    scheduler.enable_prefix_caching = True
    scheduler.max_num_seqs = CONFIG.capacity
    pipeline = genai.ContinuousBatchingPipeline(
        str(resolve(MODEL)), scheduler, "CPU", {"INFERENCE_NUM_THREADS": NUM_THREADS}
    )
    sampling = pipeline.get_config()
    sampling.max_new_tokens = NUM_TOKENS
    sampling.do_sample = False
    sampling.ignore_eos = True
    sampling.stop_token_ids = set()
    tokenizer = pipeline.get_tokenizer()

    def generate(work: Sequence[str]) -> int:
        handles = [pipeline.add_request(key, prompt, sampling) for key, prompt in enumerate(work)]
        while pipeline.has_non_finished_requests():
            pipeline.step()
        answers = [handle.read_all()[0].generated_ids for handle in handles]
        tokenizer.decode(answers)
        return sum(map(len, answers))

    return rate(generate, num_prompts, seed)


SIDES = {"direct": direct_rate, "pool": pool_rate}


def in_fresh_process(side: str, num_prompts: int, seed: int) -> float:
    """Return the tokens/s of one side."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, str(num_prompts), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def measure(num_prompts: int, num_rounds: int) -> list[Figure]:
    """Alternate the sides and return the figures."""
    resolve(MODEL)  # no download while the clock runs
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for seed in range(num_rounds):
        for side in SIDES if seed % 2 == 0 else reversed(SIDES):
            rates[side].append(in_fresh_process(side, num_prompts, seed))
        direct, pool = rates["direct"][-1], rates["pool"][-1]
        say(f"round {seed}: direct {direct:6.0f} tok/s, pool {pool:6.0f} tok/s, ratio {pool / direct:.3f}")
    ratios = [pool / direct for pool, direct in zip(rates["pool"], rates["direct"], strict=True)]
    return [
        Figure("pool_efficiency", statistics.median(ratios), "", 0.95),
        Figure("pool_tokens_per_s", statistics.median(rates["pool"]), "tok/s"),
        Figure("direct_tokens_per_s", statistics.median(rates["direct"]), "tok/s"),
    ]


def main() -> None:
    """Run the benchmark, or one side of it."""
    if "--side" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--side", nargs=3)
        side, num_prompts, seed = parser.parse_args().side
        print(SIDES[side](int(num_prompts), int(seed)))
        return
    publish("pool_efficiency", measure(96, 1) if quick_asked(__doc__) else measure(256, 5))


if __name__ == "__main__":
    main()
