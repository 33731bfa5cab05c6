"""One local Ray cluster for all tests of a run, and pools on it."""

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from hypothesis import HealthCheck, settings
from ray._private import services

from raylm.actors.manager import PoolManager
from raylm.actors.sessions import connect_store
from raylm.config import EngineConfig, PoolConfig, SessionConfig
from raylm.conversation import Conversations
from raylm.messages import GenerationConfig, Request
from raylm.pool import Pool
from tests.multinode import rig

# Every cluster of the tests has these. Ray would start a process for each CPU that a test says its node has, and look
# for new logs twice a second, which takes longer with each actor that there has been.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "10")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # a busy machine takes longer than Ray's 30 s

# How long an example takes, or its data, says how busy the machine is.
settings.register_profile("busy", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

_get_node = services.get_node
_NODE_START_S = 200.0

SESSIONS = SessionConfig(turn_timeout_s=300)
"""Of the pools that are started here: a test that stands still for some time keeps the turns that it is in."""


def pytest_report_header() -> str:
    """Say what the nodes of tests/multinode are."""
    return f"multinode: {rig.how_here()}"


def _get_node_patiently(*arguments: Any) -> Any:
    """Return a node once it is known: Ray itself asks for half a minute, in which a busy machine may start none."""
    deadline = time.monotonic() + _NODE_START_S
    while True:
        try:
            return _get_node(*arguments)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A local Ray cluster with room for many small actors; yields its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "get_node", _get_node_patiently)
        ray.init(
            address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
        )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def ask(prompt: str, max_new_tokens: int = 20, **settings: Any) -> Request:
    """Return a greedy request."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=0, **settings)
    return Request(request_id=prompt, prompt=prompt, config=config)


@dataclass(frozen=True)
class Running:
    """A pool whose slots are up."""

    pool: Pool
    manager: PoolManager
    conversations: Conversations

    def pid(self, slot: int) -> int:
        """Return the process of a slot's actor."""
        pid = self.pool.statistics().slots[slot].pid
        assert pid is not None
        return pid


StartPool = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start_pool(cluster: str) -> AsyncIterator[StartPool]:
    """Starts pools of the given engines, and ends them after the test."""
    async with AsyncExitStack() as stack:

        async def start(*engines: EngineConfig, config: PoolConfig | None = None) -> Running:
            manager = await PoolManager.start(engines, SESSIONS)
            stack.push_async_callback(manager.aclose)
            pool = await stack.enter_async_context(Pool(config, replace=manager.replace))
            for ready in [pool.attach(slot, actor) for slot, actor in manager.actors.items()]:
                await ready
            store = connect_store(SESSIONS, manager.sessions, "raylm:test:")
            stack.push_async_callback(store.aclose)
            return Running(pool, manager, Conversations(pool, store, SESSIONS.turn_timeout_s))

        yield start
