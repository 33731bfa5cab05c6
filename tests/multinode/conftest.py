"""One cluster for the tests of a file, whole before each of them, and what must be true after each."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.multinode.driver import Driver
from tests.multinode.rig import Rig, start_rig

ENVIRONMENT = {
    # Ray takes a node for dead after eight checks of up to two seconds each, a second apart; by default it takes up to
    # a minute. A raylet of a busy machine may miss some.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "8",
    # So long Ray's processes do without a GCS before they end themselves.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "240",
}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A head and three nodes with four GPUs each."""
    with start_rig(environment=ENVIRONMENT) as rig:
        yield rig


@pytest.fixture
async def driver(rig: Rig) -> AsyncIterator[Driver]:
    """A program on the whole cluster, which has given all GPUs back after the test, and left no process."""
    await asyncio.to_thread(rig.restore)
    async with Driver.on(rig) as driver:
        yield driver
        await driver.ask("end")
        await asyncio.to_thread(rig.until_idle)
