"""What the pool costs on a real model: its tokens/s through one actor, as a share of the engine's own.

256 different prompts, 64 tokens each, greedy, past the end of sequence, on SmolLM2-135M-Instruct.

Subject. `LMDeployPipeline.generate` with one replica on the OpenVINO engine: the calling process, Ray, the engine's
actor and the child that runs the model, all on the same cores.

Baseline. `openvino_genai.ContinuousBatchingPipeline` in one process: the same model file, scheduler settings and number
of threads, all prompts added at once, `step()` until nothing is left, texts decoded at the end.

Each side is a process of its own, loaded and warmed up before the first round. They take turns, and while one works
every process of the other is stopped (SIGSTOP), so that an idle Ray takes nothing from the baseline. Prompts are new in
every round: no prefix is cached.

`pool_efficiency`: median over the rounds of the subject's tokens/s by the baseline's.
"""

from __future__ import annotations

import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import psutil
from harness import Figure, local_cluster, publish, quick_asked, say

from raylm import LMDeployPipeline, OpenVINOConfig
from raylm.models import resolve

MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 64
SLICE_S = 4.0  # of sides that take turns; shorter than an actor waits for a pool that does not poll
NUM_THREADS = os.cpu_count()
CONFIG = OpenVINOConfig(num_threads=NUM_THREADS)

_WHO = ("a baker", "a clockmaker", "two sailors", "an old fox", "the night watch", "a young painter", "my neighbour")
_DID = ("found a letter", "lost a key", "crossed the river", "built a tower", "learnt to sing", "waited for the snow")
_WHERE = ("in Lisbon", "behind the mill", "at the edge of the sea", "on a slow train", "under the old bridge")

Generate = Callable[[Sequence[str]], int]
"""Works through prompts; returns the number of tokens that came."""


def prompts(count: int, seed: int) -> list[str]:
    """Return different prompts of about thirty tokens."""
    rng = random.Random(seed)
    return [
        f"Story {rng.randrange(10**9)}. One morning {rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHERE)}, and "
        "nobody knew why. This is what happened next:"
        for _ in range(count)
    ]


@contextmanager
def pool_side() -> Iterator[Generate]:
    """The subject."""
    with local_cluster(), LMDeployPipeline(MODEL, backend="openvino", backend_config=CONFIG) as pipeline:

        def generate(work: Sequence[str]) -> int:
            answers = pipeline.generate(
                work, return_dict=True, max_new_tokens=NUM_TOKENS, temperature=0, ignore_eos=True
            )
            return sum(answer["usage"]["completion_tokens"] for answer in answers)

        yield generate


@contextmanager
def direct_side(num_at_once: int | None = None) -> Iterator[Generate]:
    """The baseline.

    Args:
        num_at_once: Sequences that it decodes at a time; None: all, for OpenVINO GenAI does not heed `max_num_seqs`.
    """
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

    def generate(work: Sequence[str]) -> int:
        handles = []
        running: list[Any] = []
        while running or len(handles) < len(work):
            room = (num_at_once or len(work)) - len(running)
            for prompt in work[len(handles) : len(handles) + room]:
                handles.append(pipeline.add_request(len(handles), prompt, sampling))
                running.append(handles[-1])
            pipeline.step()
            running = [handle for handle in running if handle.get_status() == genai.GenerationStatus.RUNNING]
        answers = [handle.read_all()[0].generated_ids for handle in handles]
        pipeline.get_tokenizer().decode(answers)
        return sum(map(len, answers))

    yield generate


SIDES = {"direct": direct_side, "pool": pool_side}


def be_side(side: AbstractContextManager[Generate]) -> None:
    """Be one side: read `num_prompts seed` lines, answer each with the seconds that the work took."""
    with side as generate:
        generate(prompts(8, seed=-1))
        print("ready", flush=True)
        for line in sys.stdin:
            num_prompts, seed = map(int, line.split())
            work = prompts(num_prompts, seed)
            started_at = time.perf_counter()
            num_tokens = generate(work)
            took_s = time.perf_counter() - started_at
            if num_tokens != num_prompts * NUM_TOKENS:
                raise RuntimeError(f"{num_tokens} tokens came back for {num_prompts} prompts of {NUM_TOKENS} each")
            print(took_s, flush=True)


class Side:
    """One side's process and all that it starts, stopped unless it works.

    Args:
        name: Which side.
        script: The benchmark that it is a side of.
    """

    def __init__(self, name: str, script: str = __file__) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, "--side", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._hear("ready")
        self._tree = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        self._stop()

    def rate(self, num_prompts: int, seed: int) -> float:
        """Work through prompts and return the tokens/s."""
        return num_prompts * NUM_TOKENS / float(self.ask(f"{num_prompts} {seed}"))

    def ask(self, line: str) -> str:
        """Let it work on a line and return its answer."""
        self.begin(line)
        self._go_on()
        answer = self._hear()
        self._stop()
        return answer

    def begin(self, line: str) -> None:
        """Give it a line to work on with `work_for`."""
        if self._process.stdin is None:
            raise AssertionError("unreachable: it is a pipe")
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def work_for(self, limit_s: float) -> tuple[float, bool]:
        """Let it work for so long; return for how long it has worked, and whether it is done."""
        began_at = time.perf_counter()
        self._go_on()
        done = bool(select.select([self._process.stdout], [], [], limit_s)[0])
        worked_s = time.perf_counter() - began_at
        self._stop()
        if done:
            self._hear()
        return worked_s, done

    def count_after(self, slice_s: float) -> tuple[float, int]:
        """Let it go on for so long; return for how long it has worked, and the number that it then answers."""
        began_at = time.perf_counter()
        self._go_on()
        time.sleep(slice_s)
        self.begin("")
        answer = self._hear()
        worked_s = time.perf_counter() - began_at
        self._stop()
        return worked_s, int(answer)

    def close(self) -> None:
        """Let the process end in order."""
        self._go_on()
        self._process.communicate()

    def _hear(self, expected: str | None = None) -> str:
        if self._process.stdout is None:
            raise AssertionError("unreachable: it is a pipe")
        line = self._process.stdout.readline().strip()
        if not line or expected not in (None, line):
            raise RuntimeError(f"a side of the benchmark broke; its last words are above ({line!r})")
        return line

    def _stop(self) -> None:
        for process in self._tree:
            if process.is_running():
                process.suspend()

    def _go_on(self) -> None:
        for process in self._tree:
            if process.is_running():
                process.resume()


def race(sides: Mapping[str, Side], line: str, slice_s: float) -> dict[str, float]:
    """Let sides work on the same line in short slices of time, in turns; return how long each has worked.

    A machine whose speed drifts within minutes is the same for all of them then.
    """
    for side in sides.values():
        side.begin(line)
    took_s = dict.fromkeys(sides, 0.0)
    left = list(sides)
    while left:
        for name in tuple(left):
            worked_s, done = sides[name].work_for(slice_s)
            took_s[name] += worked_s
            if done:
                left.remove(name)
    return took_s


def side_rates(sides: Mapping[str, Side], slice_s: float, num_warm: int, num_slices: int) -> dict[str, float]:
    """Let sides that never are done work in slices of time, in turns; return by how much each counts up in a second.

    Args:
        sides: They tell a number for every line.
        slice_s: How long a slice is.
        num_warm: Slices that do not count, one at least.
        num_slices: Slices that do.
    """
    worked_s, first, last = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0), dict.fromkeys(sides, 0)
    for number in range(num_warm + num_slices):
        for name, side in sides.items():
            slice_worked_s, last[name] = side.count_after(slice_s)
            if number < num_warm:
                first[name] = last[name]
            else:
                worked_s[name] += slice_worked_s
    return {name: (last[name] - first[name]) / worked_s[name] for name in sides}


def measure(num_prompts: int, num_rounds: int) -> list[Figure]:
    """Alternate the sides and return the figures."""
    resolve(MODEL)  # no download while a side starts
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        sides = {}
        for name in SIDES:
            sides[name] = Side(name)
            stack.callback(sides[name].close)
        for seed in range(num_rounds):
            for name in SIDES if seed % 2 == 0 else reversed(SIDES):
                rates[name].append(sides[name].rate(num_prompts, seed))
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
    if sys.argv[1:2] == ["--side"]:
        be_side(SIDES[sys.argv[2]]())
    else:
        publish("pool_efficiency", measure(64, 3) if quick_asked(__doc__) else measure(256, 5))


if __name__ == "__main__":
    main()
