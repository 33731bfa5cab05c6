"""lmdeploy's PyTorch engine with tp = 2: two ranks as Ray actors, on two logical GPUs."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import ray

from raylm import Pool
from raylm.actors.manager import PoolManager
from raylm.config import SessionConfig
from raylm.engines.lmdeploy import LMDeployEngine
from raylm.messages import Request
from tests.engines.conftest import make_request, run, until

from .conftest import make_tiny_model, on_cpu

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

SMALL = {"max_batch_size": 4, "options": {"num_gpu_blocks": 40}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose heads can be shared by two."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpus() -> Iterator[None]:
    """A Ray cluster with two logical GPUs. Where another one runs in this process it is ended first."""
    ray.shutdown()
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    yield
    ray.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(gpus: None, model: str) -> AsyncIterator[Pool]:
    """A pool of one replica of two ranks."""
    manager = await PoolManager.start([on_cpu(model, tp=2, **SMALL)], SessionConfig())
    async with Pool(replace=manager.replace) as pool:
        await pool.attach(0, manager.actors[0])
        yield pool
    await manager.aclose()
    await until(lambda: ray.available_resources().get("GPU") == 2)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Some work."""
    return [make_request(f"Chapter {n} begins", max_new_tokens=16, ignore_eos=True) for n in range(6)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(model: str, requests: list[Request]) -> list[list[int]]:
    """What one rank generates."""
    engine = LMDeployEngine(on_cpu(model, **SMALL))
    await engine.start()
    tokens = [(await run(engine, request)).token_ids for request in requests]
    await engine.close()
    return tokens


async def generate(pool: Pool, requests: list[Request]) -> list[list[int]]:
    """Return what a pool generates."""
    return [done.token_ids for done in await asyncio.gather(*(pool.generate(request) for request in requests))]


async def test_greedy_tokens_are_those_of_one_rank(
    pool: Pool, requests: list[Request], expected: list[list[int]]
) -> None:
    """Two ranks generate what one does, each on a GPU of the replica's placement group."""
    assert await generate(pool, requests) == expected
    free = ray.available_resources()
    assert free.get("GPU", 0) == 0
    ranks = [name for name in free if name.startswith(("GPU_group_1_", "GPU_group_2_"))]
    assert len(ranks) == 2
    assert all(0 < free[name] < 1 for name in ranks)


async def test_a_killed_actor_comes_back_with_all_ranks(
    pool: Pool, requests: list[Request], expected: list[list[int]]
) -> None:
    """After kill -9 of the actor the replica comes back in its placement group and answers as before."""
    (slot,) = pool.statistics().slots
    assert slot.pid is not None
    os.kill(slot.pid, signal.SIGKILL)
    assert await generate(pool, requests) == expected
    (again,) = pool.statistics().slots
    assert (again.num_deaths, again.pid == slot.pid) == (1, False)
