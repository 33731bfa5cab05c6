"""What goes on when the head's GCS has died. `docs/guides/cluster.md` says it to users."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from tests.multinode.conftest import ENVIRONMENT
from tests.multinode.driver import Driver, OrderError
from tests.multinode.rig import start_rig
from tests.multinode.test_nodes import POOL, SIMULATED

pytestmark = pytest.mark.timeout(600)

RECONNECT_S = 60
"""How long Ray's processes do without a GCS before they end themselves, which is Ray's default.

Long enough for streams that have just begun to move and to end, also where a process stands still for some time.
"""

MOVED = {"moved:died", "moved:silent"}
"""Without a GCS Ray knows no death: a broken connection tells of it, or the watchdog."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own, which outlive a node that ends for the lack of a GCS (2.60)."""


async def test_gcs_dies_and_comes_back_with_redis() -> None:
    """With Redis nothing of the cluster is lost: what runs goes on, and what was asked for meanwhile is done later."""
    with await asyncio.to_thread(start_rig, 2, ENVIRONMENT, redis=True) as rig:
        async with Driver.on(rig) as driver:
            await driver.ask("serve", engines=[{**SIMULATED, "replicas": 4}], pool=POOL)
            before = await driver.ask("up")
            await driver.ask("crowd", size=64, num_tokens=1500)
            await asyncio.to_thread(rig.kill_gcs)
            killed_at = time.monotonic()
            await driver.ask("answer", size=16)
            print(f"answered {time.monotonic() - killed_at:.1f} s after the death of the GCS")
            victim = before[0]["pid"]
            os.kill(victim, signal.SIGKILL)
            await driver.ask("answer", size=16)
            print(f"answered again {time.monotonic() - killed_at:.1f} s after")
            await asyncio.to_thread(rig.restart_gcs)
            after = await driver.ask("up", gone=[victim])
            print(f"all up {time.monotonic() - killed_at:.1f} s after")
            assert [slot["pid"] for slot in after[1:]] == [slot["pid"] for slot in before[1:]]
            outcome = await driver.ask("finish")
            print(outcome)
            assert outcome["failed"] == []
            assert outcome["right"] == 64
            assert outcome["moves"].keys() & MOVED
            await driver.ask("accounts", num_gpus=4)
            await driver.ask("end")


@pytest.mark.parametrize("redis", [False, True])
async def test_gcs_stays_dead(redis: bool) -> None:
    """What runs goes on for as long as Ray waits for a GCS; then the whole cluster ends, in order, Redis or not."""
    environment = {**ENVIRONMENT, "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S)}
    with await asyncio.to_thread(start_rig, 2, environment, redis=redis) as rig:
        async with Driver.on(rig) as driver:
            await driver.ask("serve", engines=[{**SIMULATED, "replicas": 4}], pool=POOL)
            slots = await driver.ask("up")
            await driver.ask("crowd", size=64, num_tokens=1000)
            await asyncio.to_thread(rig.kill_gcs)
            killed_at = time.monotonic()
            await driver.ask("answer", size=16)
            print(f"answered {time.monotonic() - killed_at:.1f} s after the death of the GCS")
            os.kill(slots[0]["pid"], signal.SIGKILL)
            outcome = await driver.ask("finish")
            print(outcome)
            assert outcome["failed"] == []
            assert outcome["right"] == 64
            assert outcome["moves"].keys() & MOVED
            code = await driver.ended()
            print(f"the program ended with {code} {time.monotonic() - killed_at:.1f} s after")
            for node in rig.nodes[:0:-1]:
                await asyncio.to_thread(rig.gone, node, but=AGENTS)
            print(f"the cluster ended {time.monotonic() - killed_at:.1f} s after")


async def test_gcs_comes_back_without_redis() -> None:
    """A new GCS without the old one's memory: what runs goes on, and whoever asks it anything is ended by Ray."""
    with await asyncio.to_thread(start_rig, 2, ENVIRONMENT) as rig:
        async with Driver.on(rig) as driver:
            await driver.ask("serve", engines=[{**SIMULATED, "replicas": 4}], pool=POOL)
            await driver.ask("up")
            await driver.ask("crowd", size=64, num_tokens=1000)
            await asyncio.to_thread(rig.kill_gcs)
            killed_at = time.monotonic()
            await driver.ask("answer", size=16)
            print(f"answered {time.monotonic() - killed_at:.1f} s after the death of the GCS")
            await asyncio.to_thread(rig.restart_gcs)
            outcome = await driver.ask("finish")
            print(outcome)
            assert outcome["failed"] == []
            assert outcome["right"] == 64
            await driver.ask("answer", size=16)
            with pytest.raises(OrderError, match="the program has ended"):
                await driver.ask("alive")
            # Ray's own check (2.60): `WrongClusterID`, at the first answer of the GCS to whoever asks it anything.
            assert await driver.ended() != 0
