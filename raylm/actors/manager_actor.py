"""ManagerActor: the PoolManager of a served model as a named Ray actor, which outlives gateways.

    start(config, as_of, update)     has the actors created, or says with which settings they have been
    watch(client, version, report)   who is in which slot, as soon as that has changed; also tells the client's news
    replace(slot, pid)               has a hanging process ended, once
    cancel(request)                  asks every client to abort a request
    scale, update, drain             changes what is wanted; see `Fleet`
    state()                          what all clients have told, added up

A client is a pool: that of a gateway, or of a program that has called `raylm.connect`. Everything is named and
detached, so a manager that has died finds its actors again, and they have not noticed.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import ray
import ray.exceptions

from raylm.actors.cluster import actor_record
from raylm.actors.fleet import Fleet, Record, delete_record, in_charge, load_record, save_record
from raylm.actors.manager import NAMESPACE, PoolManager, end_all, named_actors
from raylm.config import ModelConfig
from raylm.errors import InvalidRequestError, ModelNotFoundError, NoActorError, RaylmError
from raylm.statistics import ModelState, PoolReport

WATCH_S = 1.0
"""A `watch` comes back after this long with nothing new, so that clients tell their figures this often."""

CLIENT_LEASE_S = 10.0
"""A client that has not watched for this long is gone."""

_EXPIRE_S = CLIENT_LEASE_S / 4
"""How often clients are looked at."""

MAX_SILENT = 1000
"""Clients that are gone without a word and may come back: with more, those that are gone for longest will not."""

POOL_LEASE_S = 120.0
"""A pool without clients ends its actors after this long: gateways that are replaced need it for a moment longer."""

_END_TIMEOUT_S = 30.0
"""How long a manager has to end its actors."""

ANSWER_TIMEOUT_S = 10.0
"""How long a manager has to answer what it need not wait for. Its process may stand still."""

_CREATION_S = 2.0
"""How long actors take to be created where there is room for them."""

_SUFFIX = ":manager"

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode_report = msgspec.msgpack.Decoder(PoolReport).decode


class Membership(msgspec.Struct):
    """The answer of `watch`.

    Attributes:
        version: To be given to the next `watch`.
        cancelled: Ids of requests to abort.
        actors: Handles of the engine actors, by slot; None when all that follows is as it was.
        draining: Slots that get no more requests.
        failed: Slots whose engine does not start, and its last words. Their actors are about to end.
    """

    version: int
    cancelled: list[str]
    actors: dict[int, Any] | None = None
    draining: list[int] = []
    failed: dict[int, str] = {}


class _Client:
    def __init__(self, report: PoolReport) -> None:
        self.report = report
        self.version = 0
        self.seen_at = time.monotonic()
        self.cancelled: list[str] = []
        self.news = asyncio.Event()


class _Clients:
    """The pools that use the model.

    Attributes:
        version: What they are to know.
    """

    def __init__(self, model: str) -> None:
        self.version = self._first = time.time_ns()  # differs from that of every earlier process
        self._departed = ModelState(name=model)  # what those have done that are gone for good
        self._clients: dict[str, _Client] = {}
        # By client, the last reports of those that have fallen silent. Reports count from a client's start, so one that
        # comes back tells all of it again.
        self._silent: dict[str, PoolReport] = {}
        self._heard = asyncio.Event()
        self._looked_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._clients)

    async def news(self, client_id: str, version: int, report: PoolReport) -> list[str]:
        """Take note of a report; return requests to abort, when there is something new or after `WATCH_S`."""
        client = self._clients.setdefault(client_id, _Client(report))
        self._silent.pop(client_id, None)
        client.report, client.seen_at = report, time.monotonic()
        client.version = version if self._first <= version <= self.version else 0  # else of an earlier process
        self._heard.set()
        if version == self.version:
            try:
                async with asyncio.timeout(WATCH_S):
                    await client.news.wait()
            except TimeoutError:
                pass
        client.news.clear()
        client.seen_at = time.monotonic()
        cancelled, client.cancelled = client.cancelled, []
        return cancelled

    def leave(self, client_id: str, report: PoolReport) -> None:
        """Take note of a client's last report."""
        if client_id in self._clients or client_id in self._silent:
            self._clients.pop(client_id, None)
            self._silent.pop(client_id, None)
            self._departed.count(report)
            self._heard.set()

    def expire(self) -> None:
        """Take those for gone that have not watched for long."""
        now = time.monotonic()
        if now - self._looked_at > 2 * _EXPIRE_S:  # this process stood still, and has heard nobody meanwhile
            for client in self._clients.values():
                client.seen_at = now
        self._looked_at = now
        for client_id, client in tuple(self._clients.items()):
            if now - client.seen_at > CLIENT_LEASE_S:
                del self._clients[client_id]
                self._silent[client_id] = client.report
                self._heard.set()
        while len(self._silent) > MAX_SILENT:
            self._departed.count(self._silent.pop(next(iter(self._silent))))

    def state(self) -> ModelState:
        """Return what all of them have done, and the load that those make that are there."""
        found = copy.deepcopy(self._departed)
        reports = self.reports()
        for report in (*self._silent.values(), *reports):
            found.count(report)
        found.watch(reports)
        return found

    def cancel(self, request_id: str) -> None:
        """Have a request aborted, wherever it is."""
        for client in self._clients.values():
            client.cancelled.append(request_id)
            client.news.set()

    # What a fleet asks

    def publish(self) -> int:
        """See `fleet.Clients`."""
        self.version += 1
        for client in self._clients.values():
            client.news.set()
        return self.version

    async def seen(self, version: int) -> None:
        """See `fleet.Clients`."""
        while any(client.version < version for client in self._clients.values()):
            await self.heard()

    async def heard(self) -> None:
        """See `fleet.Clients`."""
        self._heard.clear()
        await self._heard.wait()

    def reports(self) -> list[PoolReport]:
        """See `fleet.Clients`."""
        return [client.report for client in self._clients.values()]


class ManagerActor:
    """Keeps the actors of one served model.

    Args:
        config: A `ModelConfig` as JSON.
        as_of: See `Record`.
    """

    def __init__(self, config: str, as_of: int) -> None:
        self._first = _new_record(config, as_of)
        self._name = ModelConfig.model_validate_json(config).name
        self._record: Record | None = None  # see `_recall`
        self._recalling = asyncio.Lock()
        self._clients = _Clients(self._name)
        self._starting: asyncio.Task[Fleet] | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._sessions: Any = None

    async def start(self, config: str, as_of: int, update: bool) -> str:
        """Have the actors created, where they are not; return the `ModelConfig` that they follow, as JSON.

        Args:
            config: What they are to be, a `ModelConfig` as JSON. Where none has come up yet, what was said last counts.
            as_of: When that was said, see `Record`.
            update: A first start with other settings that is under way, and was asked for before, is given up. Else it
                is waited for.

        Raises:
            PlacementError: they do not fit. The next call tries again.
            NoActorError: one of their processes died as it started.
        """
        record = await self._recall()
        if not record.started:
            pending = self._starting is not None and not self._starting.done()
            others = ModelConfig.model_validate_json(record.config) != ModelConfig.model_validate_json(config)
            if as_of > record.as_of:
                if not others:
                    record.as_of = as_of
                elif update or not pending:
                    record = _new_record(config, as_of, record.next_slot)
            if not pending or record is not self._record:
                self._begin(record)
        return await self.config()

    async def config(self) -> str:
        """Return the `ModelConfig` that the actors follow, as JSON, when they have been created.

        Raises:
            PlacementError: they did not fit.
            NoActorError: they have not been started, or one of their processes died as it started.
        """
        return (await self._fleet()).config

    async def watch(self, client_id: str, version: int, report: bytes) -> Membership:
        """Take note of a client's report, and return when there is news for it, or after `WATCH_S`."""
        fleet = await self._fleet()
        cancelled = await self._clients.news(client_id, version, _decode_report(report))
        if version == self._clients.version:
            return Membership(version, cancelled)
        slots = fleet.slots.values()
        return Membership(
            self._clients.version,
            cancelled,
            {slot.number: slot.actor for slot in slots},
            [slot.number for slot in slots if slot.phase == "draining"],
            {slot.number: slot.detail for slot in slots if slot.phase == "failed"},
        )

    async def leave(self, client_id: str, report: bytes) -> None:
        """Take note of a client's last report."""
        self._clients.leave(client_id, _decode_report(report))

    async def replace(self, slot: int, pid: int) -> None:
        """See `PoolManager.replace`."""
        await (await self._fleet()).replace(slot, pid)

    async def scale(self, replicas: int, group: int | None) -> None:
        """See `Fleet.scale`."""
        await (await self._fleet()).scale(replicas, group)

    async def update(self, config: str, as_of: int) -> None:
        """See `Fleet.update`.

        Args:
            config: A `ModelConfig` as JSON.
            as_of: See `Record`.
        """
        await (await self._fleet()).update(ModelConfig.model_validate_json(config), as_of)

    async def drain(self, slot: int) -> None:
        """See `Fleet.drain`."""
        await (await self._fleet()).drain(slot)

    async def sessions(self) -> Any:
        """Return the session store's handle."""
        await self._fleet()
        return self._sessions

    async def cancel(self, request_id: str) -> None:
        """Ask all clients to abort a request; one of them may have it."""
        self._clients.cancel(request_id)

    async def state(self) -> bytes:
        """Return a `ModelState`. While actors wait for room, it says so."""
        try:
            async with asyncio.timeout(_CREATION_S):
                fleet = await self._fleet()
        except TimeoutError:
            problem = "its actors are being created, which takes long where they wait for room: see `raylm plan`"
            return _encode(ModelState(name=self._name, problem=problem))
        found = self._clients.state()
        seen = {slot.slot: slot for slot in found.slots}
        found.slots = [slot.statistics(seen.get(number)) for number, slot in sorted(fleet.slots.items())]
        found.num_wanted = fleet.num_wanted
        found.outdated = fleet.outdated
        return _encode(found)

    async def close(self) -> None:
        """End all actors. This one is left to be killed."""
        if self._expiring is not None:
            self._expiring.cancel()
        if self._starting is not None:
            self._starting.cancel()  # does nothing to one that is over
            await asyncio.gather(self._starting, return_exceptions=True)
            if not self._starting.cancelled() and self._starting.exception() is None:
                await self._starting.result().aclose()

    async def _recall(self) -> Record:
        """Return what is wanted, and what there is of it; an earlier process may have left that."""
        async with self._recalling:
            if self._record is None:
                found = await asyncio.to_thread(load_record, self._name, self._first.manager)
                self._record = found or self._first
            return self._record

    async def _fleet(self) -> Fleet:
        """Return the actors, when they have been created. Only `start` begins that; others take over what there is.

        Raises:
            NoActorError: there are none, for nobody has begun that, or they are being ended.
            Exception: what the start has failed with.
        """
        record = await self._recall()
        if record.started and (self._starting is None or _has_failed(self._starting)):
            self._begin(record)
        while (starting := self._starting) is not None:
            await asyncio.wait([starting])
            if starting is not self._starting:  # it was given up for another one
                continue
            if starting.cancelled():
                raise NoActorError(f"model {self._name} is being ended")
            return starting.result()
        raise NoActorError(f"the actors of {self._name} have not been started; `raylm up` starts them")

    def _begin(self, record: Record) -> None:
        """Begin to create the actors, or to take them over; a start that is under way ends."""
        before = self._starting
        if before is not None:
            before.cancel()
        self._record = record
        self._starting = asyncio.create_task(self._start(record, before))

    async def _start(self, record: Record, before: asyncio.Task[Fleet] | None) -> Fleet:
        if before is not None:
            await asyncio.wait([before])  # its actors end, and what they hold is free
        taken_over = record.started
        config = ModelConfig.model_validate_json(record.config)
        if not taken_over:
            # What an earlier manager has left, or an earlier process of this one in the middle of this.
            record.next_slot = max(record.next_slot, await _to_its_end(end_all, self._name))
            record.engines = {}
            record.number(engine.model_dump_json() for engine in config.slots())
            await self._save(record)
        manager = await PoolManager.start(
            record.configs(),
            config.sessions,
            name=self._name,
            placement_timeout_s=config.pool.placement_timeout_s,
            taken_over=taken_over,
        )
        if not taken_over:
            record.started = True
            await self._save(record)
        self._sessions = manager.sessions
        self._expiring = asyncio.create_task(self._expire())
        return Fleet(record, manager, self._clients, taken_over=taken_over)

    async def _save(self, record: Record) -> None:
        await _to_its_end(save_record, self._name, msgspec.json.encode(record))

    async def _expire(self) -> None:
        """Forget clients that are gone, and end everything when none has been there for long."""
        left_at = time.monotonic()
        while True:
            await asyncio.sleep(_EXPIRE_S)
            self._clients.expire()
            if self._clients:
                left_at = time.monotonic()
            elif time.monotonic() - left_at > POOL_LEASE_S:
                if await in_charge():
                    _log.warning("nobody has used model %s for %.0f s: its actors end", self._name, POOL_LEASE_S)
                    await (await self._fleet()).aclose()
                ray.actor.exit_actor()


def _new_record(config: str, as_of: int, next_slot: int = 0) -> Record:
    """Return the record of a model that nothing has been done for yet."""
    groups = ModelConfig.model_validate_json(config).engines
    manager = ray.get_runtime_context().get_actor_id()
    return Record(manager, config, as_of, [group.replicas for group in groups], next_slot)


async def _to_its_end(blocking: Callable[..., Any], *arguments: Any) -> Any:
    """Call what blocks in a thread. Who is cancelled meanwhile ends after it: what comes next would cross it."""
    running = asyncio.create_task(asyncio.to_thread(blocking, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


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


async def has_ended(manager: Any) -> bool:
    """Return whether a manager has been ended for good. One that is being restarted has not.

    Ray's word for it is asked for, because a call that was under way fails alike in both cases, and no answer is none.
    """
    known = await asyncio.to_thread(actor_record, manager)
    return bool(known.get("State") == "DEAD")


def served_models() -> list[str]:
    """Return the names of the models that are served on this cluster."""
    return [name.removesuffix(_SUFFIX) for name in named_actors() if name.endswith(_SUFFIX)]


async def served_config(model: str) -> ModelConfig | None:
    """Return the settings of a served model; None where they are not known: its manager does not answer, or has failed.

    Raises:
        ModelNotFoundError: no model of that name is served on this cluster.
    """
    manager = await asyncio.to_thread(find, model)
    try:
        config = await told(manager.config.remote(), timeout_s=ANSWER_TIMEOUT_S)
    except (RaylmError, ray.exceptions.RayError):
        return None
    return ModelConfig.model_validate_json(config)


async def serve(config: ModelConfig, as_of: int | None = None) -> Any:
    """Return the handle of a model's manager, which is made where there is none.

    Args:
        config: What is to be served.
        as_of: When that was said, in nanoseconds since 1970. A model that is served with settings from before is
            updated, its actors replaced one by one, or started anew where none has come up yet; one with settings from
            later stays as it is. None: others are an error.

    Raises:
        InvalidRequestError: the model is served with other settings, and is not to be updated or cannot be in service.
        PlacementError: its actors do not fit.
        NoActorError: one of their processes died as it started, or the manager is being restarted.
    """
    wanted, said_at = config.model_dump_json(), time.time_ns() if as_of is None else as_of
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
        .remote(wanted, said_at)
    )
    served = await told(manager.start.remote(wanted, said_at, as_of is not None))
    if ModelConfig.model_validate_json(served) != config:
        if as_of is None:
            raise InvalidRequestError(
                f"model {config.name!r} is served with other settings already; end it first, or give this one another "
                "name"
            )
        await told(manager.update.remote(wanted, said_at))
    return manager


async def told(call: Any, *, timeout_s: float | None = None) -> Any:
    """Return what a manager answers.

    Args:
        call: The call.
        timeout_s: How long it may take; None: as long as it likes.

    Raises:
        RaylmError: what it has raised.
        NoActorError: it is being restarted, or has not answered in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, RaylmError) else error) from None
    except ray.exceptions.RayActorError as error:
        raise NoActorError("the manager is being restarted; try again", retry_after_s=1.0) from error
    except TimeoutError:
        raise NoActorError(
            f"the manager has not answered within {timeout_s:g} s; try again, or look at its process",
            retry_after_s=timeout_s,
        ) from None


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
    await asyncio.to_thread(end_all, model)  # what it had no time for
    await asyncio.to_thread(delete_record, model)


def _name(model: str) -> str:
    return model + _SUFFIX
