"""Fleet: the actors of a served model through their lives, from the first one's creation to the last one's end.

What is wanted (a configuration, and how many actors each of its groups has) and which slots there are stands in a
`Record` in Ray's own key-value store, so that the next process of a manager goes on with the same actors. It is
written before anything is done, so no actor is ever unknown.

Slots are numbered once and never again: an actor that takes the place of a drained one has a new number.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import msgspec
import ray
import ray.exceptions
from pydantic import TypeAdapter
from ray._private import state

from raylm.actors.cluster import actor_record, forget, remember, remembered
from raylm.actors.engine_actor import ActorInfo
from raylm.actors.lifecycle import Autoscaler, Member, Phase, match, steps
from raylm.actors.manager import PoolManager
from raylm.config import EngineConfig, ModelConfig
from raylm.errors import InvalidRequestError, PlacementError, UpstreamError, first_line
from raylm.statistics import PoolReport, SlotStatistics
from raylm.tasks import Tasks

_INTERVAL_S = 1.0
"""How often it is looked at whether something is to be done, when nothing has happened."""

_ROOM_INTERVAL_S = 5.0
"""How often it is looked at who has no room."""

_PATIENCE_S = 15.0
"""An actor that has room has a process by then, which is how it is known to have some: a busy machine takes ten."""

_HEALTH_INTERVAL_S = 5.0
_HEALTH_TIMEOUT_S = 10.0

_ALIVE_S = 8.0
"""An actor that is well has answered by then, also where the server that it is a client of has not."""

_MAX_UNHEALTHY = 2
"""An actor that fails this many health checks in a row is replaced."""

_MAX_START_FAILURES = 3
"""An actor that fails to start this many times in a row is given up."""

_MAX_BACKOFF_S = 60.0

_RETURN_S = 10.0
"""After a manager's restart nothing is changed for so long: its actors say again how they are, and pools come back."""

_log = logging.getLogger(__name__)
_engine_config: TypeAdapter[EngineConfig] = TypeAdapter(EngineConfig)
_decode_info = msgspec.msgpack.Decoder(ActorInfo).decode


class Record(msgspec.Struct):
    """What the next process of a manager has to know.

    Attributes:
        manager: Id of the manager's actor: another one begins anew.
        config: What is wanted, a `ModelConfig` as JSON.
        as_of: When that was said, in nanoseconds since 1970. What was said before is outdated.
        replicas: How many actors each of its groups is to have.
        next_slot: Number of the next new slot.
        engines: Settings of the engine of each slot that there is, as JSON.
        draining: Those of them that are to end.
        started: The first actors have come up. Until then a failure ends all of them, and what else is wanted begins
            anew.
    """

    manager: str
    config: str
    as_of: int
    replicas: list[int]
    next_slot: int = 0
    engines: dict[int, str] = {}
    draining: list[int] = []
    started: bool = False

    def number(self, engines: Iterable[str]) -> list[int]:
        """Give new slots their numbers, and return these."""
        slots = []
        for engine in engines:
            self.engines[self.next_slot] = engine
            slots.append(self.next_slot)
            self.next_slot += 1
        return slots

    def forget(self, slot: int) -> None:
        """Strike a slot out, unless that has been done."""
        self.engines.pop(slot, None)
        if slot in self.draining:
            self.draining.remove(slot)

    def configs(self) -> dict[int, EngineConfig]:
        """Return the settings of each slot's engine."""
        return {slot: _engine_config.validate_json(engine) for slot, engine in self.engines.items()}


def load_record(model: str, manager: str) -> Record | None:
    """Return what an earlier process of this manager has left; None when it is the first one. Blocks."""
    found = remembered(_key(model))
    record = None if found is None else msgspec.json.decode(found, type=Record)
    return record if record is not None and record.manager == manager else None


def save_record(model: str, record: bytes) -> None:
    """Keep a `Record`, as JSON. Blocks."""
    remember(_key(model), record)


def delete_record(model: str) -> None:
    """Forget a record. Blocks."""
    forget(_key(model))


def check_update(served: ModelConfig, wanted: ModelConfig) -> None:
    """See that a model that is served can be brought to other settings in service.

    Raises:
        InvalidRequestError: it cannot.
    """
    if wanted.sessions != served.sessions:
        raise InvalidRequestError(
            f"sessions: those of {wanted.name} are kept as they were begun; end the model first (`raylm down`) to "
            "change that"
        )


def _key(model: str) -> str:
    return f"model:{model}"


class Clients(Protocol):
    """What a fleet knows of the pools that use it."""

    def publish(self) -> int:
        """Tell all of them that something is new; return what `seen` is to be asked for."""
        ...

    async def seen(self, version: int) -> None:
        """Return when all of them know of it, or are gone."""
        ...

    async def heard(self) -> None:
        """Return when one of them has reported, or is gone."""
        ...

    def reports(self) -> list[PoolReport]:
        """Return what each has reported last."""
        ...


class Slot:
    """An actor of the fleet.

    Attributes:
        number: Its slot.
        engine: Settings of its engine, as JSON.
        actor: Its handle.
        phase: Where it is in its life.
        detail: Why it is not up, for people.
        may_fit: While it waits for room: it would have some if others made it.
        room_made: Another has ended for it, since it was up last.
        patient_until: When to look whether it has room, on the monotonic clock.
        num_silent: How many times in a row its process, which is there, has not answered.
        info: What it last said of itself.
        tending: Watches over it until it is drained.
    """

    def __init__(self, number: int, engine: str, actor: Any) -> None:
        self.number = number
        self.engine = engine
        self.actor = actor
        self.phase: Phase = "starting"
        self.detail = ""
        self.may_fit = False
        self.room_made = False
        self.patient_until = time.monotonic() + _PATIENCE_S
        self.num_silent = 0
        self.info: ActorInfo | None = None
        self.tending: asyncio.Task[None] | None = None

    def statistics(self, seen: SlotStatistics | None) -> SlotStatistics:
        """Return its figures.

        Args:
            seen: What pools see of it; None when none does.
        """
        info = self.info
        told = seen or SlotStatistics(
            slot=self.number,
            state=self.phase,
            detail=self.detail,
            model=info.engine.model if info else "",
            device=info.engine.device if info else "",
            num_running=0,
            capacity=info.engine.capacity if info else 0,
            outstanding_tokens=0,
            num_deaths=0,
            actor=self.actor._actor_id.hex(),
            node=info.node if info else "",
            pid=info.pid if info else None,
            gpus=info.gpus if info else [],
            engine=None,
        )
        # Pools know best how one is that is up, and may know of it first. The others they see through their own
        # failures to reach it.
        state = told.state if self.phase == "up" or (self.phase == "starting" and told.state == "up") else self.phase
        return msgspec.structs.replace(told, state=state, detail=self.detail, actor=self.actor._actor_id.hex())


class Fleet:
    """Keeps as many actors as are wanted, with the engines that are wanted.

    Args:
        record: What is wanted, and the slots that there are.
        manager: Has created them.
        clients: The pools that use them.
        taken_over: An earlier process has begun all this.
    """

    def __init__(self, record: Record, manager: PoolManager, clients: Clients, *, taken_over: bool) -> None:
        self.slots: dict[int, Slot] = {}
        self._record = record
        self._manager = manager
        self._clients = clients
        self._changed = asyncio.Event()
        self._room_due = 0.0
        self._freed_at = -math.inf
        self._saving = asyncio.Lock()
        self._tasks = Tasks("a fleet")
        self._follow(ModelConfig.model_validate_json(record.config))
        for number, engine in record.engines.items():
            slot = Slot(number, engine, manager.actors[number])
            if number in record.draining:
                slot.phase = "draining"
                self.slots[number] = slot
            else:
                self._watch_over(slot)
        self._tasks.start(self._keep(_RETURN_S if taken_over else 0))

    @property
    def num_wanted(self) -> int:
        """How many actors there should be."""
        return sum(self._record.replicas)

    @property
    def outdated(self) -> list[int]:
        """The slots whose actors are not wanted, or no longer; each until its actor has ended."""
        wanted = self._wanted()
        others = match(wanted, [member for member in self._members(wanted) if member.phase != "draining"])[1]
        return sorted({*self._record.draining, *(member.slot for member in others)})

    @property
    def config(self) -> str:
        """What is wanted, a `ModelConfig` as JSON."""
        return self._record.config

    async def scale(self, replicas: int, group: int | None) -> None:
        """Have a group consist of so many actors.

        Raises:
            InvalidRequestError: there is no such group, or it scales itself.
        """
        groups = self._config.engines
        if group is None:
            if len(groups) > 1:
                kinds = ", ".join(f"{index} is {each.engine.kind}" for index, each in enumerate(groups))
                raise InvalidRequestError(f"group: {self._config.name} has several groups of actors, name one: {kinds}")
            group = 0
        if not 0 <= group < len(groups):
            raise InvalidRequestError(f"group: {self._config.name} has {len(groups)}, numbered from 0; got {group}")
        if replicas < 0:
            raise InvalidRequestError(f"replicas: must be 0 or more, got {replicas}")
        if groups[group].autoscaling is not None:
            raise InvalidRequestError(
                f"replicas: this group of {self._config.name} scales itself; change its bounds in the configuration"
            )
        await self._want(replicas, group)

    async def update(self, config: ModelConfig, as_of: int) -> None:
        """Have all actors replaced, one by one, whose engines are not those of a new configuration.

        Args:
            config: What is wanted.
            as_of: See `Record`. Nothing happens when something later is in force.

        Raises:
            InvalidRequestError: it changes what cannot be changed in service.
        """
        if as_of <= self._record.as_of:
            return
        check_update(self._config, config)
        replicas = []
        for index, group in enumerate(config.engines):
            bounds = group.autoscaling
            if bounds is not None and index < len(self._record.replicas):
                now = self._record.replicas[index]
                replicas.append(min(max(now, bounds.min_replicas), bounds.max_replicas))
            else:
                replicas.append(group.replicas)
        self._record.config, self._record.replicas, self._record.as_of = config.model_dump_json(), replicas, as_of
        self._follow(config)
        await self._save()
        self._changed.set()

    async def drain(self, number: int) -> None:
        """Have the actor of a slot finish what it has, and end; another one takes its place.

        Raises:
            InvalidRequestError: there is no such slot.
        """
        slot = self.slots.get(number)
        if slot is None:
            there_are = ", ".join(map(str, sorted(self.slots))) or "none"
            raise InvalidRequestError(f"slot: {self._config.name} has no slot {number}; there are: {there_are}")
        self._retire(slot)

    async def replace(self, number: int, pid: int) -> None:
        """Have the process of a slot ended, and started anew; see `PoolManager.replace`.

        A pool that was cut off asks for it late, of an actor that is well: that is left alone.
        """
        slot = self.slots.get(number)
        if slot is None or number not in self._manager.actors:
            return
        if slot.info is not None and slot.info.pid != pid:  # it has been replaced; one that has not answered may hang
            return
        try:
            async with asyncio.timeout(_ALIVE_S):
                await slot.actor.check_health.remote()
        except (TimeoutError, ray.exceptions.RayError) as error:
            if _is_of_server(error):
                return
        else:
            return
        if number in self._manager.actors and await in_charge():
            self._manager.replace(number, pid)

    async def aclose(self) -> None:
        """End all actors."""
        await self._tasks.aclose()
        await self._manager.aclose()
        await asyncio.to_thread(delete_record, self._config.name)

    # What is wanted

    def _follow(self, config: ModelConfig) -> None:
        """Take a configuration for what is wanted."""
        self._config = config
        self._engines = [group.engine.model_dump_json() for group in config.engines]
        scaling = [group.autoscaling for group in config.engines if group.autoscaling is not None]
        self._autoscaler = Autoscaler(scaling[0]) if scaling else None

    def _wanted(self) -> list[str]:
        """Return the engine settings of each actor that there should be, as JSON."""
        each = zip(self._engines, self._record.replicas, strict=True)
        return [engine for engine, replicas in each for _ in range(replicas)]

    async def _keep(self, pause_s: float) -> None:
        draining = [slot for slot in self.slots.values() if slot.phase == "draining"]
        await asyncio.sleep(pause_s)
        for slot in draining:
            self._tasks.start(self._see_off(slot, works=True))
        while True:
            self._changed.clear()
            try:
                if not await in_charge():
                    return
                await self._autoscale()
                await self._step()
            except Exception:  # noqa: BLE001 - whatever went wrong, it must go on to look after the actors
                _log.exception("the actors of %s stay as they are for now", self._config.name)
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _step(self) -> None:
        """Do what brings the actors closer to those that are wanted."""
        await self._look_for_room()
        wanted = self._wanted()
        todo = steps(wanted, self._members(wanted))
        if todo.room_for is not None:
            self.slots[todo.room_for].room_made = True
        for number in todo.drain:
            self._retire(self.slots[number])
        if todo.create:
            numbers = self._record.number(todo.create)
            _log.info("%s gets slots %s", self._config.name, numbers)
            have_room: set[int] = set()
            try:
                await self._save()
                configs = self._record.configs()
                have_room = await self._manager.add({number: configs[number] for number in numbers})
            finally:
                for number in numbers:
                    if number in self._manager.actors:
                        slot = Slot(number, self._record.engines[number], self._manager.actors[number])
                        if number not in have_room:
                            slot.patient_until = 0
                        self._watch_over(slot)
                    else:
                        self._record.forget(number)
            self._room_due = 0
            self._clients.publish()

    def _members(self, wanted: Collection[str]) -> list[Member]:
        loads = self._loads()
        # What has just ended may be what others wait for, though it still seems to hold its room.
        may_make_room = time.monotonic() - self._freed_at >= _PATIENCE_S
        return [
            Member(
                slot.number,
                slot.engine,
                self._phase(slot, wanted),
                loads.get(slot.number, 0),
                slot.may_fit and may_make_room,
                slot.room_made,
            )
            for slot in self.slots.values()
        ]

    def _phase(self, slot: Slot, wanted: Collection[str]) -> Phase:
        """Return where an actor is in its life, as those see it that it works for.

        One that is to stay is up when it is for every pool, for others make way for it. One that is to go is up as long
        as it is for any.
        """
        if slot.phase not in ("starting", "up"):
            return slot.phase
        seen = [
            any(each.slot == slot.number and each.state == "up" for each in report.statistics.slots)
            for report in self._clients.reports()
        ]
        if not seen:
            return slot.phase
        serves = all(seen) if slot.engine in wanted else slot.phase == "up" or any(seen)
        return "up" if serves else "starting"

    async def _look_for_room(self) -> None:
        """Find out which of the actors that are not up wait for room in the cluster."""
        now = time.monotonic()
        starting = [
            slot
            for slot in self.slots.values()
            if slot.phase == "waiting" or (slot.phase == "starting" and now >= slot.patient_until)
        ]
        if not starting or now < self._room_due:
            return
        waiting = await asyncio.to_thread(self._manager.waiting, [slot.number for slot in starting])
        self._room_due = time.monotonic() + (_ROOM_INTERVAL_S if waiting else _INTERVAL_S)
        for slot in starting:
            if slot.number in waiting and slot.phase in ("starting", "waiting"):
                was, slot.phase = slot.phase, "waiting"
                slot.detail, slot.may_fit = waiting[slot.number]
                if was == "starting":
                    _log.warning("slot %d of %s waits for room: %s", slot.number, self._config.name, slot.detail)
            elif slot.phase == "waiting":
                self._has_room(slot)
                slot.phase, slot.detail = "starting", ""

    def _has_room(self, slot: Slot) -> None:
        """Take note that a slot has got room: where it was made for another, that one may be given some again."""
        if not slot.room_made:
            for other in self.slots.values():
                other.room_made = False

    async def _want(self, replicas: int, group: int) -> None:
        self._record.replicas[group] = replicas
        await self._save()
        self._changed.set()

    async def _save(self) -> None:
        async with self._saving:  # the last to be written is the latest
            await asyncio.to_thread(save_record, self._config.name, msgspec.json.encode(self._record))

    # How many, by the work

    async def _autoscale(self) -> None:
        if self._autoscaler is None:
            return
        group = next(index for index, each in enumerate(self._config.engines) if each.autoscaling is not None)
        others = {engine for index, engine in enumerate(self._engines) if index != group}
        loads = self._loads()
        outstanding = sum(
            loads.get(slot.number, 0)
            for slot in self.slots.values()
            if slot.engine not in others and slot.phase != "draining"
        )
        outstanding += sum(report.statistics.waiting_tokens for report in self._clients.reports())
        replicas = self._record.replicas[group]
        decided = self._autoscaler.decide(time.monotonic(), outstanding, replicas)
        if decided != replicas:
            _log.info("%s: %d to %d actors for %d tokens", self._config.name, replicas, decided, outstanding)
            await self._want(decided, group)

    def _loads(self) -> dict[int, int]:
        loads: dict[int, int] = {}
        for report in self._clients.reports():
            for slot in report.statistics.slots:
                loads[slot.slot] = loads.get(slot.slot, 0) + slot.outstanding_tokens
        return loads

    # One actor

    def _watch_over(self, slot: Slot) -> None:
        self.slots[slot.number] = slot
        slot.tending = self._tasks.start(self._tend(slot))

    async def _tend(self, slot: Slot) -> None:
        """Have a slot's engine started, and its actor replaced when it is not well."""
        num_restarts = await asyncio.to_thread(_num_restarts, slot.actor)
        while True:
            try:
                info = await self._description(slot)
            except ray.exceptions.ActorDiedError as error:
                if slot.info is None:
                    await self._give_up(slot, f"its actor is gone: {first_line(error)}")
                else:  # somebody has ended it for good
                    self._retire(slot)
                return
            except PlacementError as error:
                await self._give_up(slot, str(error))
                return
            except ray.exceptions.RayTaskError as error:
                failures = await self._start_failures(slot) or [first_line(error)]
                slot.detail = failures[-1]
                if len(failures) >= _MAX_START_FAILURES:
                    await self._give_up(slot, slot.detail)
                    return
                await asyncio.sleep(min(2.0 ** (len(failures) - 1), _MAX_BACKOFF_S))
                continue
            except ray.exceptions.RayError as error:
                slot.detail = first_line(error)
                deaths = await asyncio.to_thread(_num_restarts, slot.actor) - num_restarts
                if deaths > _MAX_START_FAILURES:  # the first one may have been that of a process that was up
                    await self._give_up(slot, f"its process died {deaths} times in a row before the engine was up")
                    return
                await asyncio.sleep(0.2)
                continue
            num_restarts = await asyncio.to_thread(_num_restarts, slot.actor)
            if slot.info is None:
                self._has_room(slot)
            slot.info = info
            slot.phase, slot.detail, slot.room_made = "up", "", False
            self._changed.set()
            if not await self._is_well(slot) and await in_charge():
                self._manager.replace(slot.number, info.pid)
            slot.phase, slot.patient_until = "starting", time.monotonic() + _PATIENCE_S

    async def _description(self, slot: Slot) -> ActorInfo:
        """Return what an actor says of itself once its engine is up. Its process is replaced when it hangs meanwhile.

        Raises:
            RayError: its engine does not start, or its process has ended.
            PlacementError: see `PoolManager.check_group`.
        """

        async def describe() -> bytes:
            await slot.actor.__ray_ready__.remote()
            await asyncio.to_thread(self._manager.check_group, slot.number)
            description: bytes = await slot.actor.describe.remote()
            return description

        call = asyncio.create_task(describe())
        try:
            while not (await asyncio.wait([call], timeout=_HEALTH_INTERVAL_S))[0]:
                record = await asyncio.to_thread(actor_record, slot.actor)
                waits = record.get("State") != "ALIVE"  # for room, or for its process
                slot.num_silent = 0 if waits or await self._hears(slot) else slot.num_silent + 1
                if slot.num_silent >= _MAX_UNHEALTHY and await in_charge():
                    self._manager.replace(slot.number, record["Pid"])
            slot.num_silent = 0
            return _decode_info(call.result())
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    async def _hears(self, slot: Slot) -> bool:
        """Return whether an actor's process answers; its engine is not asked."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await slot.actor.start_failures.remote()
        except (TimeoutError, ray.exceptions.RayActorError):  # Ray gives up connecting to a process that hangs
            return False
        return True

    async def _start_failures(self, slot: Slot) -> list[str]:
        try:
            failures: list[str] = await slot.actor.start_failures.remote()
        except ray.exceptions.RayError:
            return []
        return failures

    async def _is_well(self, slot: Slot) -> bool:
        """Return True when its process has ended, and False when it has to."""
        num_unhealthy = 0
        while num_unhealthy < _MAX_UNHEALTHY:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            try:
                async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                    await slot.actor.check_health.remote()
            except ray.exceptions.RayActorError:
                return True
            except (TimeoutError, ray.exceptions.RayError) as error:
                if _is_of_server(error):
                    continue
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                num_unhealthy += 1
                _log.warning("slot %d is not well (%d): %s", slot.number, num_unhealthy, cause or "no answer")
            else:
                num_unhealthy = 0
        return False

    async def _give_up(self, slot: Slot, words: str) -> None:
        """End an actor whose engine does not start: what it holds is free for others, and its words stay."""
        _log.error("slot %d of %s is given up: %s", slot.number, self._config.name, words)
        slot.phase, slot.detail = "failed", words
        self._changed.set()
        await self._clients.seen(self._clients.publish())
        if await in_charge():
            await self._manager.remove(slot.number)
            self._freed_at = time.monotonic()

    def _retire(self, slot: Slot) -> None:
        """Begin to drain a slot, once."""
        if slot.phase == "draining":
            return
        works = slot.phase not in ("waiting", "failed")
        slot.phase, slot.detail = "draining", ""
        if slot.tending is not None:
            slot.tending.cancel()
        self._record.draining.append(slot.number)
        self._changed.set()
        self._tasks.start(self._see_off(slot, works=works))

    async def _see_off(self, slot: Slot, *, works: bool) -> None:
        """End an actor when it has done what it has, or when its time is over."""
        _log.info("slot %d of %s is drained", slot.number, self._config.name)
        while True:
            try:
                await self._end(slot, works=works)
            except Exception:  # noqa: BLE001 - such as Ray's head, which is away for a while
                _log.exception("slot %d of %s does not end yet", slot.number, self._config.name)
                await asyncio.sleep(_INTERVAL_S)
            else:
                return

    async def _end(self, slot: Slot, *, works: bool) -> None:
        await self._save()
        version = self._clients.publish()
        if works:
            try:
                async with asyncio.timeout(self._config.drain_timeout_s):
                    await self._clients.seen(version)
                    while self._is_busy(slot):
                        await self._clients.heard()
            except TimeoutError:
                _log.warning("slot %d of %s is still busy: what it has moves", slot.number, self._config.name)
        if not await in_charge():
            return
        self.slots.pop(slot.number, None)
        await self._clients.seen(self._clients.publish())
        if slot.number in self._manager.actors:
            await self._manager.remove(slot.number)
            self._freed_at = time.monotonic()
        self._record.forget(slot.number)
        await self._save()
        self._changed.set()

    def _is_busy(self, slot: Slot) -> bool:
        return any(
            seen.slot == slot.number and seen.num_running
            for report in self._clients.reports()
            for seen in report.statistics.slots
        )


async def in_charge() -> bool:
    """Return whether Ray takes this process for the manager that it is.

    On a node that is cut off everybody else is silent, and Ray starts the manager elsewhere. What this process asks of
    Ray then would be carried out when the network is back, on actors that are well and in use. This answers no sooner.
    """
    context = ray.get_runtime_context()
    known = await asyncio.to_thread(state.actors, context.get_actor_id())
    return bool(known) and (known["Address"]["NodeID"], known["Pid"]) == (context.get_node_id(), os.getpid())


def _is_of_server(error: Exception) -> bool:
    """Return whether a health check failed for the server that an actor is a client of: another would meet the same."""
    return isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, UpstreamError)


def _num_restarts(actor: Any) -> int:
    return int(actor_record(actor)["NumRestarts"])
