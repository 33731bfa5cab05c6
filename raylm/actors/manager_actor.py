"""ManagerActor: the PoolManager of a served model as a named Ray actor, which outlives gateways.

    watch(client, version, report)   who is in which slot, as soon as that has changed; also tells the client's news
    replace(slot, pid)               has a hanging process ended, once
    cancel(request)                  asks every client to abort a request
    state()                          what all clients have told, added up

A client is a pool: that of a gateway, or of a program that has called `raylm.connect`. Everything is named and
detached, so a manager that has died finds its actors again, and they have not noticed.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from typing import Any

import msgspec
import ray
import ray.exceptions

from raylm.actors.engine_actor import ActorInfo
from raylm.actors.manager import NAMESPACE, PoolManager
from raylm.config import ModelConfig
from raylm.errors import InvalidRequestError, ModelNotFoundError, RaylmError, UpstreamError
from raylm.statistics import ModelState, PoolReport

WATCH_S = 1.0
"""A `watch` comes back after this long with nothing new, so that clients tell their figures this often."""

CLIENT_LEASE_S = 10.0
"""A client that has not watched for this long is gone."""

POOL_LEASE_S = 120.0
"""A pool without clients ends its actors after this long: gateways that are replaced need it for a moment longer."""

_END_TIMEOUT_S = 30.0
"""How long a manager has to end its actors."""

_HEALTH_INTERVAL_S = 5.0
_HEALTH_TIMEOUT_S = 10.0

_SUFFIX = ":manager"

_MAX_UNHEALTHY = 2
"""An actor that fails this many health checks in a row is replaced."""

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode_report = msgspec.msgpack.Decoder(PoolReport).decode
_decode_info = msgspec.msgpack.Decoder(ActorInfo).decode


class _Client:
    def __init__(self) -> None:
        self.report = b""
        self.seen_at = time.monotonic()
        self.cancelled: list[str] = []
        self.news = asyncio.Event()


class Membership:
    """The answer of `watch`.

    Attributes:
        version: To be given to the next `watch`.
        actors: Handles of the engine actors, by slot.
        cancelled: Ids of requests to abort.
    """

    def __init__(self, version: int, actors: dict[int, Any], cancelled: list[str]) -> None:
        self.version = version
        self.actors = actors
        self.cancelled = cancelled


class ManagerActor:
    """Keeps the actors of one served model.

    Args:
        config: A `ModelConfig` as JSON.
    """

    def __init__(self, config: str) -> None:
        self._json = config
        self._config = ModelConfig.model_validate_json(config)
        self._manager: PoolManager | None = None
        self._starting: asyncio.Task[PoolManager] | None = None
        self._version = time.time_ns()  # differs from that of every earlier process
        self._clients: dict[str, _Client] = {}
        self._departed = ModelState(name=self._config.name)  # what clients that are gone have done
        self._tasks: list[asyncio.Task[None]] = []
        self._pids: dict[int, int] = {}  # by slot, the process that was there when it was last asked

    async def start(self) -> str:
        """Create the actors, or take them over; return the `ModelConfig` they were made from, as JSON.

        Raises:
            PlacementError: they do not fit. The next call tries again.
            NoActorError: one of their processes died as it started.
        """
        if self._starting is None:
            config = self._config
            self._starting = asyncio.create_task(
                PoolManager.start(
                    config.slots(),
                    config.sessions,
                    name=config.name,
                    placement_timeout_s=config.pool.placement_timeout_s,
                )
            )
        try:
            self._manager = await asyncio.shield(self._starting)
        except Exception:
            self._starting = None
            raise
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._tend(slot)) for slot in range(len(self._manager.actors))]
            self._tasks.append(asyncio.create_task(self._expire()))
        return self._json

    async def watch(self, client_id: str, version: int, report: bytes) -> Membership:
        """Take note of a client's report, and return when there is news for it, or after `WATCH_S`."""
        await self.start()
        client = self._clients.setdefault(client_id, _Client())
        client.report = report
        client.seen_at = time.monotonic()
        if version == self._version:
            try:
                async with asyncio.timeout(WATCH_S):
                    await client.news.wait()
            except TimeoutError:
                pass
        client.news.clear()
        client.seen_at = time.monotonic()
        cancelled, client.cancelled = client.cancelled, []
        actors = dict(enumerate(self._manager.actors)) if self._manager and version != self._version else {}
        return Membership(self._version, actors, cancelled)

    async def leave(self, client_id: str, report: bytes) -> None:
        """Take note of a client's last report."""
        if self._clients.pop(client_id, None) is not None:
            self._departed.count(_decode_report(report))

    async def replace(self, slot: int, pid: int) -> None:
        """See `PoolManager.replace`."""
        await self.start()
        if self._manager is not None and self._pids.get(slot, pid) == pid:
            self._manager.replace(slot, pid)

    async def sessions(self) -> Any:
        """Return the session store's handle."""
        await self.start()
        return self._manager.sessions if self._manager else None

    async def cancel(self, request_id: str) -> None:
        """Ask all clients to abort a request; one of them may have it."""
        for client in self._clients.values():
            client.cancelled.append(request_id)
            client.news.set()

    async def state(self) -> bytes:
        """Return a `ModelState`."""
        reports = [_decode_report(client.report) for client in self._clients.values()]
        state = copy.deepcopy(self._departed)
        for report in reports:
            state.count(report)
        state.watch(reports)
        return _encode(state)

    async def close(self) -> None:
        """End all actors. This one is left to be killed."""
        for task in self._tasks:
            task.cancel()
        if self._starting is not None:
            manager = await self._starting
            await manager.aclose()

    async def _tend(self, slot: int) -> None:
        """Have the engine of a slot started, and its actor replaced when it is not well."""
        if self._manager is None:
            raise AssertionError("unreachable: slots are tended once they exist")
        actor = self._manager.actors[slot]
        while True:
            try:
                pid = self._pids[slot] = await self._pid(actor)
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.2)  # it is being restarted
                continue
            except ray.exceptions.RayTaskError:
                await asyncio.sleep(_HEALTH_INTERVAL_S)  # its engine does not start; pools say why
                continue
            num_unhealthy = 0
            while num_unhealthy < _MAX_UNHEALTHY:
                await asyncio.sleep(_HEALTH_INTERVAL_S)
                try:
                    async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                        await actor.check_health.remote()
                except ray.exceptions.RayActorError:
                    break
                except (TimeoutError, ray.exceptions.RayTaskError) as error:
                    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                    if isinstance(cause, UpstreamError):  # another actor would meet the same server
                        continue
                    num_unhealthy += 1
                    _log.warning("slot %d is not well (%d): %s", slot, num_unhealthy, cause or "no answer")
                else:
                    num_unhealthy = 0
            else:
                self._manager.replace(slot, pid)

    async def _pid(self, actor: Any) -> int:
        return _decode_info(await actor.describe.remote()).pid

    async def _expire(self) -> None:
        """Forget clients that are gone, and end everything when none has been there for long."""
        left_at = time.monotonic()
        while True:
            await asyncio.sleep(CLIENT_LEASE_S / 4)
            now = time.monotonic()
            for client_id, client in tuple(self._clients.items()):
                if now - client.seen_at > CLIENT_LEASE_S:
                    await self.leave(client_id, client.report)
            if self._clients:
                left_at = now
            elif now - left_at > POOL_LEASE_S:
                _log.warning("nobody has used model %s for %.0f s: its actors end", self._config.name, POOL_LEASE_S)
                if self._manager is not None:
                    await self._manager.aclose()
                ray.actor.exit_actor()


def find(model: str) -> Any:
    """Return the handle of a served model's manager.

    Raises:
        ModelNotFoundError: no model of that name is served on this cluster.
    """
    try:
        return ray.get_actor(_name(model), namespace=NAMESPACE)
    except ValueError:
        served = ", ".join(sorted(served_models())) or "none"
        raise ModelNotFoundError(f"no model {model!r} is served on this cluster; served are: {served}") from None


def served_models() -> list[str]:
    """Return the names of the models that are served on this cluster."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]


async def served_config(model: str) -> ModelConfig | None:
    """Return the settings of a served model, or None where its manager does not answer.

    Raises:
        ModelNotFoundError: no model of that name is served on this cluster.
    """
    manager = await asyncio.to_thread(find, model)
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S):
            return ModelConfig.model_validate_json(await manager.start.remote())
    except (TimeoutError, ray.exceptions.RayError):
        return None


async def serve(config: ModelConfig) -> Any:
    """Return the handle of a model's manager, which is made where there is none.

    Raises:
        InvalidRequestError: the model is being served with other settings.
        PlacementError: its actors do not fit.
    """
    manager = (
        ray.remote(ManagerActor)
        .options(
            name=_name(config.name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=10_000,
        )
        .remote(config.model_dump_json())
    )
    try:
        served = ModelConfig.model_validate_json(await manager.start.remote())
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, RaylmError) else error) from None
    if served != config:
        raise InvalidRequestError(
            f"model {config.name!r} is served with other settings already; end it first, or give this one another name"
        )
    return manager


async def end(model: str) -> None:
    """End a served model: its manager and all of its actors. Does nothing when it is not served."""
    try:
        manager = find(model)
    except ModelNotFoundError:
        return
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            await manager.close.remote()
    except (TimeoutError, ray.exceptions.RayError) as error:
        _log.warning("model %s did not end in order: %s", model, str(error).partition("\n")[0] or "no answer")
    ray.kill(manager, no_restart=True)


def _name(model: str) -> str:
    return model + _SUFFIX
