"""Jobs on two OpenVINO actors: what is done for speed changes no answer. Texts are compared in `deterministic` mode."""

import asyncio
import json
import math
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from raylm import AsyncLMDeployPipeline, OpenVINOConfig, PoolConfig
from raylm.batch import Tally, run_batch_async
from raylm.messages import EngineStatistics

pytestmark = pytest.mark.asyncio(loop_scope="module")

STORY_TOKENS = 400


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(cluster: str) -> AsyncIterator[AsyncLMDeployPipeline]:
    """Two replicas, whose silence nobody but a job minds for some time."""
    async with AsyncLMDeployPipeline(
        "smollm2-135m-instruct",
        replicas=2,
        temperature=0,
        backend_config=OpenVINOConfig(deterministic=True, num_threads=1),
        pool_config=PoolConfig(token_gap_timeout_s=120, first_token_timeout_s=120),
    ) as pipeline:
        yield pipeline


def texts_in(path: Path) -> list[str]:
    """Return the texts of an output."""
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` is true. The test's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.005)


async def engine_of(pipeline: AsyncLMDeployPipeline, slot: int) -> EngineStatistics:
    """Return what the engine in a slot says of itself."""
    assert pipeline._manager is not None
    statistics: EngineStatistics = await pipeline._manager.actors[slot].statistics.remote()
    return statistics


async def test_a_shared_prefix_that_is_seen_first_changes_no_answer(
    pipeline: AsyncLMDeployPipeline, tmp_path: Path, nums_before_the_rest: list[tuple[int, int]]
) -> None:
    """Of prompts that begin with the same 2,000 characters each actor gets one first; texts are as without that."""
    log = "The keeper of the lighthouse wrote into his log that the night was calm. " * 28
    prompts = [f"{log}\nQuestion: what is {number} plus {number}?\nAnswer:" for number in range(6)]
    undisturbed = await pipeline.generate(prompts, max_new_tokens=6, timeout=None)
    rows = [{"prompt": prompt} for prompt in prompts]
    await run_batch_async(pipeline, rows, tmp_path / "out", max_new_tokens=6)
    assert max(nums_before_the_rest) == (len(rows), 2)
    assert texts_in(tmp_path / "out") == undisturbed


async def test_a_row_that_was_sent_to_two_is_given_up_by_the_slower_one(
    pipeline: AsyncLMDeployPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of a row whose first engine stands still is as without that; the engine drops it in the middle."""
    questions = [f"Question {number}: what is {number} plus {number}? Answer:" for number in range(4)]
    story = "A story of a lighthouse keeper and a whale, told at length:"
    long: dict[str, Any] = {"max_new_tokens": STORY_TOKENS, "ignore_eos": True}
    undisturbed = [
        *await pipeline.generate(questions, max_new_tokens=6, timeout=None),
        await pipeline.generate(story, timeout=None, **long),
    ]
    rows = [*({"prompt": question, "max_new_tokens": 6} for question in questions), {"prompt": story, **long}]
    tallies: list[Tally] = []
    monkeypatch.setattr("raylm.batch.job._MIN_SLOW_S", math.inf)  # of an engine that stands still by itself
    running = asyncio.ensure_future(run_batch_async(pipeline, rows, tmp_path / "out", begun=tallies.append))
    await until(lambda: bool(tallies) and tallies[0].num_answered == len(questions))
    (slow,) = (slot for slot in pipeline.statistics().slots if slot.num_running)
    (worker,) = (
        process
        for process in psutil.Process(slow.pid).children(recursive=True)
        if "raylm.engines.openvino_worker" in process.cmdline()
    )
    worker.send_signal(signal.SIGSTOP)
    monkeypatch.undo()
    try:
        num_before = (await engine_of(pipeline, slow.slot)).num_tokens
        tally = await running
        assert (await engine_of(pipeline, slow.slot)).num_running == 1
    finally:
        worker.send_signal(signal.SIGCONT)
    while (engine := await engine_of(pipeline, slow.slot)).num_running:
        await asyncio.sleep(0.02)
    assert (tally.num_hedged, tally.num_failed) == (1, 0)
    assert texts_in(tmp_path / "out") == undisturbed
    assert engine.num_tokens < num_before + STORY_TOKENS / 2
