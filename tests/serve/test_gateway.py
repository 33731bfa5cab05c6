"""A gateway alone, on real models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from raylm.actors.manager_actor import end
from raylm.config import ServeConfig
from raylm.errors import NoActorError
from raylm.serve.gateway import Gateway


async def until(condition: Callable[[], bool]) -> None:
    """Return once a condition holds that only asking tells."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)


async def test_health_of_what_is_still_served(cluster: str) -> None:
    """A model that was ended on purpose leaves the endpoint healthy, as long as another is served."""
    models = [{"name": name, "engines": [{"kind": "simulated"}]} for name in ("stays", "ends")]
    gateway = Gateway(ServeConfig.parse({"models": models}), time.time_ns())
    await gateway.start()
    try:
        await asyncio.gather(*(served.ready() for served in gateway._served.values()))
        await gateway.health()
        await end("ends")
        await until(lambda: len(gateway._still_served) == 1)
        await gateway.health()
        await end("stays")
        await until(lambda: not gateway._still_served)
        with pytest.raises(NoActorError, match="every model has been ended"):
            await gateway.health()
    finally:
        await gateway.aclose()
        for name in ("stays", "ends"):
            await end(name)
