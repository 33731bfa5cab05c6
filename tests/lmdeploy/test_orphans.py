"""What is left of lmdeploy where the actor above it is killed."""

from contextlib import suppress

import psutil
import pytest

from raylm import Pool
from raylm.actors.manager import PoolManager
from raylm.config import SessionConfig
from tests.engines.conftest import until
from tests.engines.test_api_server import gone

from .conftest import on_cpu

pytestmark = pytest.mark.timeout(300)


def workers() -> list[psutil.Process]:
    """Return lmdeploy's processes below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "raylm.engines.lmdeploy_worker" in process.cmdline():
                found.append(process)
    return found


async def test_actor_killed_while_its_engine_loads(cluster: str) -> None:
    """When an actor is killed with -9 in the middle of a start, lmdeploy's process is gone within five seconds."""
    before = workers()
    manager = await PoolManager.start([on_cpu()], SessionConfig())
    async with Pool(replace=manager.replace) as pool:
        started = pool.attach(0, manager.actors[0])
        await until(lambda: len(workers()) > len(before))
        (worker,) = (process for process in workers() if process not in before)
        actor = worker.parent()
        assert actor is not None
        assert "ray::EngineActor" in " ".join(actor.cmdline())
        await until(lambda: worker.memory_info().rss > 200 * 2**20)  # it has come as far as lmdeploy's libraries
        assert not started.done()
        actor.kill()
        await gone([worker.pid], within_s=5)
    await manager.aclose()
