"""The lmdeploy engine on GPUs: make test-gpu. Not named like a test, for there is no GPU where the others run.

The model is a small one of random weights in float16, so nothing has to be downloaded. A backend that does not support
it here is skipped with its own words.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from raylm import Pool
from raylm.actors.manager import PoolManager
from raylm.config import LMDeployConfig, SessionConfig
from raylm.engines.lmdeploy import LMDeployEngine
from raylm.errors import ContextLengthError, EngineStartError
from tests.engines.conftest import Record, make_request, run, run_all, until

from .conftest import make_tiny_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

STORY = "Once upon a time"
SESSION_LEN = 1024


def on_gpu(folder: str, backend: str) -> LMDeployConfig:
    """Return settings of a small engine that leaves room for another one."""
    return LMDeployConfig(
        path=folder,
        backend=backend,
        dtype="float16",
        session_len=SESSION_LEN,
        max_batch_size=8,
        cache_max_entry_count=0.2,
        start_attempts=1,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model's folder."""
    return make_tiny_model("llama-gpu", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["turbomind", "pytorch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend."""
    return request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: str, backend: str) -> AsyncIterator[LMDeployEngine]:
    """An engine of each backend, started once."""
    engine = LMDeployEngine(on_gpu(model, backend))
    try:
        info = await engine.start()
    except EngineStartError as error:
        pytest.skip(str(error))
    assert info.device == f"{backend} on cuda"
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


async def test_answer_fills_the_context(engine: LMDeployEngine) -> None:
    """An answer that would be longer than the context ends with it."""
    record = await run(engine, make_request(STORY, max_new_tokens=2000, ignore_eos=True))
    assert record.finish_reason == "length"
    assert record.usage.prompt_tokens + record.usage.completion_tokens == SESSION_LEN


async def test_health(engine: LMDeployEngine) -> None:
    """A health check passes while a request runs."""
    record = Record()
    task = asyncio.create_task(engine.generate(make_request(STORY, max_new_tokens=200, ignore_eos=True), record.emit))
    await record.wait()
    await engine.check_health()
    await task


async def test_actor(cluster: str, engine: LMDeployEngine, model: str, backend: str) -> None:
    """An actor, which Ray gives a GPU, generates what the engine here does."""
    requests = [make_request(f"{STORY} {n}", max_new_tokens=16, ignore_eos=True) for n in range(4)]
    expected = [record.token_ids for record in await run_all(engine, requests)]
    manager = await PoolManager.start([on_gpu(model, backend)], SessionConfig())
    async with Pool(replace=manager.replace) as pool:
        await pool.attach(0, manager.actors[0])
        answers = await asyncio.gather(*(pool.generate(request) for request in requests))
        (slot,) = pool.statistics().slots
    await manager.aclose()
    assert [list(answer.token_ids) for answer in answers] == expected
    assert len(slot.gpus) == 1
