"""The lmdeploy engine on GPUs: make test-gpu. Not named like a test, for there is no GPU where the others run.

The model is a small one of random weights in float16, so nothing has to be downloaded. A backend that does not support
it here is skipped with its own words.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from raylm.config import LMDeployConfig
from raylm.engines.lmdeploy import LMDeployEngine
from raylm.errors import ContextLengthError, EngineStartError
from tests.engines.conftest import Record, make_request, run, run_all, until

from .conftest import make_tiny_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

STORY = "Once upon a time"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["turbomind", "pytorch"])
async def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LMDeployEngine]:
    """An engine of each backend, started once."""
    folder = make_tiny_model("llama-gpu", Path(tmp_path_factory.mktemp("model")))
    engine = LMDeployEngine(
        LMDeployConfig(
            path=folder, backend=request.param, dtype="float16", session_len=1024, max_batch_size=8, start_attempts=1
        )
    )
    try:
        info = await engine.start()
    except EngineStartError as error:
        pytest.skip(str(error))
    assert info.device == f"{request.param} on cuda"
    yield engine
    await engine.close()


async def test_greedy(engine: LMDeployEngine) -> None:
    """Greedy requests end at their limit, and the same one alone gives the same tokens."""
    requests = [make_request(f"{STORY} {n}", max_new_tokens=16, ignore_eos=True) for n in range(4)]
    records = await run_all(engine, requests)
    assert [record.usage.completion_tokens for record in records] == [16] * 4
    assert (await run(engine, requests[0])).token_ids == records[0].token_ids


async def test_cancellation(engine: LMDeployEngine) -> None:
    """A cancelled request leaves the engine."""
    record = Record()
    task = asyncio.create_task(engine.generate(make_request(STORY, max_new_tokens=900, ignore_eos=True), record.emit))
    await record.wait()
    task.cancel()
    await asyncio.wait([task])
    await until(lambda: engine.statistics().num_running == 0)


async def test_logprobs(engine: LMDeployEngine) -> None:
    """Each token has a log-probability when asked for."""
    record = await run(engine, make_request(STORY, max_new_tokens=8, logprobs=True, ignore_eos=True))
    assert sum(len(delta.logprobs) for delta in record.deltas) == 8


async def test_context(engine: LMDeployEngine) -> None:
    """A prompt that is too long is refused."""
    with pytest.raises(ContextLengthError):
        await run(engine, make_request("word " * 1100))


async def test_health(engine: LMDeployEngine) -> None:
    """A health check passes while a request runs."""
    record = Record()
    task = asyncio.create_task(engine.generate(make_request(STORY, max_new_tokens=200, ignore_eos=True), record.emit))
    await record.wait()
    await engine.check_health()
    await task
