"""One endpoint for all cases, and what they do to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.actors.redis_server import RedisServer
from tests.chaos.clients import LONG, Crowd, connect
from tests.serve.command import ServeCommand, serve_command

RESULTS = Path(__file__).parents[2] / "results" / "chaos.json"
"""Where the recovery times are kept."""

GATEWAY = "ServeReplica:raylm:gateway"
MANAGER = "ray::ManagerActor"
STORE = "ray::SessionActor"

_NUM_GATEWAYS = 2
_HEALTHY_TIMEOUT_S = 240.0

_ENGINE = {"kind": "simulated", "tokens_per_s": 50}
_HANGING = {**_ENGINE, "faults": [{"match": "hang here", "at_token": 20, "action": "hang"}]}
_POOL = {"first_token_timeout_s": 3, "token_gap_timeout_s": 2, "health_timeout_s": 3}


class Chaos:
    """The endpoint, and everything that may be done to it.

    Attributes:
        command: The endpoint.
        redis: The database of the model `kept`.
        http: A client of it.
        struck_at: When it was done, of `time.monotonic`.
    """

    def __init__(self, command: ServeCommand, redis: RedisServer, http: aiohttp.ClientSession, name: str) -> None:
        self.command = command
        self.redis = redis
        self.http = http
        self._name = name
        self._crowds: list[Crowd] = []
        self.struck_at = 0.0

    async def crowd(self, size: int = 64, *, model: str = "sim", num_tokens: int = LONG) -> Crowd:
        """Return a crowd whose long answers are on their way."""
        crowd = Crowd(self.http, model, f"{self._name}-{len(self._crowds)}", num_tokens)
        crowd.moves = (await self.state(model))["moves"]
        self._crowds.append(crowd)
        await crowd.start(size)
        return crowd

    async def state(self, model: str = "sim") -> dict[str, Any]:
        """Return what `/state` says of a model, as soon as it says something."""
        while True:
            with suppress(aiohttp.ClientError, ConnectionError):
                async with self.http.get("/state") as response:
                    if response.status == 200:
                        models: list[dict[str, Any]] = (await response.json())["models"]
                        return next(found for found in models if found["name"] == model)
            await asyncio.sleep(0.1)

    async def pid(self, slot: int) -> int:
        """Return the process of a slot's actor."""
        pid: int = (await self.state())["slots"][slot]["pid"]
        return pid

    async def pids(self, title: str) -> list[int]:
        """Return the processes of that title; see `ServeCommand.processes`."""
        return [process.pid for process in await asyncio.to_thread(self.command.processes, title)]

    def strike(self, *pids: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to processes of the endpoint, at once."""
        assert pids
        self.struck_at = time.monotonic()
        for pid in pids:
            os.kill(pid, number)

    async def recovered(self, *pids: int) -> float:
        """Wait until these processes are gone and everything is up again; return the seconds since the strike."""
        await until(lambda: not any(map(_alive, pids)), f"the end of {pids}")
        deadline = time.monotonic() + _HEALTHY_TIMEOUT_S
        while problem := await self._problem(pids):
            assert time.monotonic() < deadline, problem
            await asyncio.sleep(0.2)
        return time.monotonic() - self.struck_at

    async def _problem(self, gone: tuple[int, ...]) -> str:
        """Return what is not up."""
        for title, number in ((GATEWAY, _NUM_GATEWAYS), (MANAGER, 3), (STORE, 2)):
            if len(await self.pids(title)) != number:
                return f"not {number} of {title}"
        try:
            async with self.http.get("/health") as response:
                if response.status != 200:
                    return f"/health: {response.status}"
        except (aiohttp.ClientError, ConnectionError) as error:  # of a gateway that dies or starts
            return f"/health: {error!r}"
        for model in ("sim", "small", "kept"):
            state = await self.state(model)
            down = [slot for slot in state["slots"] if slot["state"] != "up" or slot["pid"] in gone]
            if down or not state["slots"] or state["num_clients"] != _NUM_GATEWAYS:
                return f"{model}: {state}"
        return ""

    async def idle(self) -> None:
        """Wait until no engine has a request and no queue has one."""
        deadline = time.monotonic() + _HEALTHY_TIMEOUT_S
        while True:
            states = [await self.state(model) for model in ("sim", "small", "kept")]
            running = [slot["num_running"] for state in states for slot in state["slots"]]
            waiting = [state["num_waiting"] for state in states]
            if not any(running) and not any(waiting):
                return
            assert time.monotonic() < deadline, f"leaked: running {running}, waiting {waiting}"
            await asyncio.sleep(0.2)

    async def note(self, recovered_s: float, crowd: Crowd) -> None:
        """Take down, and print, how long it took until all was up, and what of it reached the crowd's clients.

        Args:
            recovered_s: Seconds until everything was up.
            crowd: Its answers have ended.
        """
        outcomes = Counter(ask.outcome for ask in crowd.asks)
        moves = Counter((await self.state(crowd.model))["moves"])
        moves.subtract(crowd.moves)
        figures = {
            "recovered_s": round(recovered_s, 2),
            "longest_silence_s": round(crowd.stall_s(self.struck_at), 2),
            "answers": dict(outcomes),
            "moves": {cause: number for cause, number in moves.items() if number > 0},
        }
        print(f"{self._name}: {figures}")
        RESULTS.parent.mkdir(exist_ok=True)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, self._name: figures}, indent=2) + "\n")

    async def aclose(self) -> None:
        """Have the crowds leave."""
        for crowd in self._crowds:
            await crowd.leave()


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something."""
    deadline = time.monotonic() + _HEALTHY_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A redis-server that keeps what it has confirmed."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def endpoint(database: RedisServer) -> Iterator[ServeCommand]:
    """Two gateways behind HAProxy, and three models.

    `sim` has four actors, of which slot 0 can be made to hang; `small` has little room and a short queue; `kept` has
    its sessions in the database.
    """
    config = {
        "models": [
            {"name": "sim", "engines": [_HANGING, {**_ENGINE, "replicas": 3}], "pool": _POOL},
            {"name": "small", "engines": [{**_ENGINE, "capacity": 4}], "pool": {"max_queued": 8}},
            {"name": "kept", "engines": [{**_ENGINE, "replicas": 2}], "sessions": {"url": database.url}},
        ],
        "gateway": {"replicas": _NUM_GATEWAYS},
    }
    # A client that has sent nothing for ten seconds is refused; on a busy machine these may stand still for longer.
    with serve_command(config, env={"RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "600"}) as command:
        yield command


@pytest.fixture
async def chaos(endpoint: ServeCommand, database: RedisServer, request: pytest.FixtureRequest) -> AsyncIterator[Chaos]:
    """The endpoint, healthy and idle before the test and after it."""
    async with connect(endpoint.url) as http:
        chaos = Chaos(endpoint, database, http, request.node.name.removeprefix("test_"))
        await chaos.recovered()
        yield chaos
        await chaos.aclose()
        await chaos.recovered()
        await chaos.idle()
