"""PoolManager: owns the actors of one pool, from their creation to their end."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

import ray
import ray.exceptions
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raylm.actors.cluster import nodes, placed
from raylm.actors.engine_actor import EngineActor
from raylm.actors.placement import Plan, Replica, plan, require, shape
from raylm.actors.sessions import start_store
from raylm.config import EngineConfig, SessionConfig
from raylm.errors import NoActorError, PlacementError

_START_TIMEOUT_S = 120.0
"""How long the processes of actors that fit may take to come up: a busy machine starts one in ten seconds."""

SERVED_PLACEMENT_TIMEOUT_S = 300.0
"""How long a served model waits for nodes to join: an autoscaler starts one in some minutes."""

_LOOK_INTERVAL_S = 5.0
"""How often it is looked at who still has no room."""

_GROUP_TIMEOUT_S = 10.0
"""How long Ray may take to choose the nodes of a placement group that fits."""

_CLOSE_TIMEOUT_S = 10.0
"""How long an engine has to close before its process is killed."""

NAMESPACE = "raylm"
"""Ray namespace of the actors that have names."""

_log = logging.getLogger(__name__)


class PoolManager:
    """Creates one `EngineActor` a slot and one session store, and ends them all with `aclose`.

    Args:
        name: Of the pool, for actors that outlive this process.

    Attributes:
        actors: The engine actors' handles, by slot.
        sessions: The session store's handle; None where a database keeps them.
    """

    def __init__(self, name: str | None = None) -> None:
        self.actors: dict[int, Any] = {}
        self.sessions: Any = None
        self._name = name
        self._replicas: dict[int, Replica] = {}
        self._groups: dict[int, Any] = {}  # by slot, the placement groups of the actors that have one
        self._replaced: dict[int, int] = {}  # by slot, the process that was ended last

    @classmethod
    async def start(
        cls,
        engines: Sequence[EngineConfig] | Mapping[int, EngineConfig],
        sessions: SessionConfig,
        *,
        name: str | None = None,
        placement_timeout_s: float | None = None,
        taken_over: bool = False,
    ) -> Self:
        """Create the actors; returns when their processes are up. Their engines start when a pool attaches to them.

        Args:
            engines: Settings of each slot's engine; a sequence is numbered from 0.
            sessions: Where sessions are kept, and their limits.
            name: Of the pool, for actors that outlive this process.
            placement_timeout_s: See `PoolConfig`.
            taken_over: An earlier process has started the pool of this name. What there is of it is taken over as it
                is, be it well, hanging, or in the middle of a restart, and stays whatever fails here.

        Raises:
            PlacementError: they do not fit, or the cluster is too busy to take them.
            NoActorError: one of their processes died, or the whole cluster did.
        """
        if not isinstance(engines, Mapping):
            engines = dict(enumerate(engines))
        if placement_timeout_s is None:
            placement_timeout_s = 0 if name is None else SERVED_PLACEMENT_TIMEOUT_S
        manager = cls(name)
        replicas = manager._replicas_of(engines)
        planned = await asyncio.to_thread(_plan, replicas)
        if not placement_timeout_s and not taken_over:
            require(_on_idle_nodes(planned))
        try:
            await manager._create(engines, planned, taken_over=taken_over)
            manager.sessions = start_store(sessions, _named(name, "sessions"))
            if not taken_over:  # else pools see to each slot by itself, and one that is down must not end the others
                await manager._wait_until_up(replicas, placement_timeout_s)
        except BaseException as error:
            if not taken_over:
                await manager.aclose()
            if isinstance(error, ray.exceptions.RayActorError):
                raise NoActorError(f"an actor's process died as it started: {error}") from error
            raise
        return manager

    async def add(self, engines: Mapping[int, EngineConfig]) -> set[int]:
        """Create the actors of new slots, beside those that there are; return those that have room.

        The others come up when they have some.
        """
        planned = await asyncio.to_thread(_plan, self._replicas_of(engines))
        await self._create(engines, planned, taken_over=False)
        return {replica.slot for replica, places in zip(planned.replicas, planned.places, strict=True) if places}

    async def remove(self, slot: int) -> None:
        """End the actor of a slot, and give back what it holds."""
        actor = self.actors.pop(slot)
        try:
            await self._close(actor)
        finally:
            ray.kill(actor, no_restart=True)
            if (group := self._groups.pop(slot, None)) is not None:
                remove_placement_group(group)
            self._replaced.pop(slot, None)
            del self._replicas[slot]

    def waiting(self, slots: Iterable[int]) -> dict[int, tuple[str, bool]]:
        """Return which of these slots have no room: why, and whether they would fit if the nodes were idle. Blocks."""
        replicas = dict(self._replicas)  # the loop may change them meanwhile
        now = self._plan_waiting(replicas[slot] for slot in slots if slot in replicas)
        if now.fits:
            return {}
        why, idle = now.refusal(), _on_idle_nodes(now)
        return {
            replica.slot: (why, bool(could))
            for replica, places, could in zip(now.replicas, now.places, idle.places, strict=True)
            if not places
        }

    def check_group(self, slot: int) -> None:
        """See that lmdeploy's rank 0 can be where it takes it to be: on the node of its actor. Blocks.

        Raises:
            PlacementError: Ray has put the actor of a replica on a node without a rank of it.
        """
        if (group := self._groups.get(slot)) is None:
            return
        places = placement_group_table(group)["bundles_to_node_id"]
        if places[0] not in [node for bundle, node in places.items() if bundle]:
            raise PlacementError(
                "Ray has placed the ranks of a replica, and its actor on another node: the node of its first rank "
                "has no CPU free. Free one there"
            )

    def _replicas_of(self, engines: Mapping[int, EngineConfig]) -> list[Replica]:
        return [Replica(slot, shape(config), self._name or "") for slot, config in engines.items()]

    async def _create(self, engines: Mapping[int, EngineConfig], planned: Plan, *, taken_over: bool) -> None:
        """Ask Ray for actors, each where it is planned to go.

        What has no room is asked for all the same: Ray's autoscaler, if there is one, sees it.
        """
        new = range(len(planned.replicas))
        spanning = [index for index in new if planned.replicas[index].shape.spans(planned.nodes)]
        for index in spanning:
            self._groups[planned.replicas[index].slot] = _group(planned, index, self._name)
        if spanning and not taken_over:
            planned = await asyncio.to_thread(self._plan_around_groups, planned, spanning)
        create = ray.remote(EngineActor)
        for index in new:
            replica, places = planned.replicas[index], planned.places[index]
            slot, wanted = replica.slot, replica.shape
            options = wanted.actor_options() | _named(self._name, f"slot-{slot}")
            if wanted.grouped:
                # The group outlives the actor's process: Ray starts the next one in its place.
                if slot not in self._groups:
                    self._groups[slot] = _group(planned, index, self._name)
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    self._groups[slot], placement_group_bundle_index=0, placement_group_capture_child_tasks=True
                )
            elif places:
                # Elsewhere when the node is gone, or is taken by somebody else by now.
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                    planned.nodes[places[0]].id, soft=True, _spill_on_unavailable=True
                )
            self._replicas[slot] = replica
            self.actors[slot] = create.options(**options).remote(engines[slot].model_dump_json())

    def _plan_around_groups(self, planned: Plan, spanning: Sequence[int]) -> Plan:
        """Plan the rest anew once Ray itself has chosen the nodes of the groups that go over several."""
        by_id = {node.id: dict(node.held) for node in planned.nodes}
        for index in spanning:
            replica = planned.replicas[index]
            group = self._groups[replica.slot]
            if planned.places[index] and group.wait(_GROUP_TIMEOUT_S):
                wanted = replica.shape
                for bundle, node_id in placement_group_table(group)["bundles_to_node_id"].items():
                    for resource, amount in wanted.bundles()[bundle].items():
                        held = by_id.setdefault(node_id, {})
                        held[resource] = held.get(resource, 0) + amount
        left = [replace(node, held=by_id[node.id]) for node in planned.nodes]
        rest = [replica for index, replica in enumerate(planned.replicas) if index not in spanning]
        again = iter(plan(left, rest).places)
        places = [() if index in spanning else next(again) for index in range(len(planned.replicas))]
        return replace(planned, places=tuple(places))

    async def _wait_until_up(self, replicas: Sequence[Replica], placement_timeout_s: float) -> None:
        """Return when every actor's process is up.

        Raises:
            PlacementError: they got no room, or their processes did not come up.
        """
        ready = asyncio.gather(*(actor.__ray_ready__.remote() for actor in self._all()))
        loop = asyncio.get_running_loop()
        began_at = could_fit_at = loop.time()
        told = False
        try:
            while True:
                try:
                    async with asyncio.timeout(_LOOK_INTERVAL_S):
                        await asyncio.shield(ready)
                    break
                except TimeoutError:
                    pass
                problem, could_fit = await asyncio.to_thread(self._look, replicas)
                now = loop.time()
                if not could_fit:
                    could_fit_at = now
                if now - could_fit_at >= _START_TIMEOUT_S or (not could_fit and now - began_at >= placement_timeout_s):
                    raise PlacementError(
                        f"the actors are not up after {now - began_at:.0f} s: "
                        + (problem or "they have room, but their processes do not start; see the logs of Ray's nodes")
                    )
                if problem and not told:
                    told = True
                    _log.warning("waiting for room in the cluster. %s", problem)
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)
        for slot in tuple(self._groups):
            await asyncio.to_thread(self.check_group, slot)

    def _look(self, replicas: Sequence[Replica]) -> tuple[str, bool]:
        """Return why those that still have no room have none, and whether all would fit if the nodes were idle."""
        now = self._plan_waiting(replicas)
        return "" if now.fits else now.refusal(), _on_idle_nodes(replace(now, replicas=tuple(replicas))).fits

    def _plan_waiting(self, replicas: Iterable[Replica]) -> Plan:
        """Return the plan of those that have no room yet."""
        replicas, groups, actors = list(replicas), dict(self._groups), dict(self.actors)  # the loop may change them
        waiting = {
            replica.slot
            for replica in replicas
            if replica.slot in groups and placement_group_table(groups[replica.slot])["state"] != "CREATED"
        }
        alone = {replica.slot: actors[replica.slot] for replica in replicas if replica.slot in actors.keys() - groups}
        waiting |= alone.keys() - placed(alone)
        return _plan([replica for replica in replicas if replica.slot in waiting])

    def replace(self, slot: int, pid: int) -> None:
        """End the process of a slot's actor; Ray starts a new one in its place.

        Args:
            slot: The slot.
            pid: The process that is to be replaced. When that has been done, this does nothing: of several pools that
                find the same actor hanging, only the first has it replaced.
        """
        if self._replaced.get(slot) == pid:
            return
        self._replaced[slot] = pid
        _log.warning("the actor of slot %d, process %d, is replaced", slot, pid)
        ray.kill(self.actors[slot], no_restart=False)

    async def aclose(self) -> None:
        """End all actors. Engines that do not close in time are killed."""
        await asyncio.gather(*(self._close(actor) for actor in self.actors.values()))
        for actor in self._all():
            ray.kill(actor, no_restart=True)
        for group in self._groups.values():
            remove_placement_group(group)
        self.actors = {}
        self._groups = {}

    def _all(self) -> list[Any]:
        actors = list(self.actors.values())
        return actors if self.sessions is None else [*actors, self.sessions]

    async def _close(self, actor: Any) -> None:
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await actor.close.remote()
        except (TimeoutError, ray.exceptions.RayError) as error:
            _log.warning(
                "an engine did not close in order and is killed: %s", str(error).partition("\n")[0] or "silent"
            )


def _named(pool: str | None, part: str) -> dict[str, Any]:
    """Return the options of an actor that outlives its maker and is taken over by the next one; none without a name."""
    if pool is None:
        return {}
    return {"name": f"{pool}:{part}", "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}


def named_actors() -> list[str]:
    """Return the names of raylm's actors on this cluster that have one. Blocks for some milliseconds."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]


def end_all(pool: str) -> int:
    """End whatever there is of a pool with a name: actors and placement groups. Blocks for some milliseconds.

    Returns:
        A number above that of each of its slots.
    """
    next_slot = 0
    for name in named_actors():
        slot = re.fullmatch(re.escape(pool) + r":slot-(\d+)", name)
        if not slot and name != f"{pool}:sessions":
            continue
        if slot:
            next_slot = max(next_slot, int(slot[1]) + 1)
        with suppress(ValueError):  # it has just ended
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    for group in placement_group_table().values():
        if group["name"].startswith(f"raylm:{pool}:slot-") and group["state"] != "REMOVED":
            with suppress(ValueError):
                remove_placement_group(get_placement_group(group["name"]))
    return next_slot


def _plan(replicas: Sequence[Replica]) -> Plan:
    return plan(nodes(), replicas)


def _on_idle_nodes(planned: Plan) -> Plan:
    """Return the plan for the same nodes if nothing were taken of them."""
    return plan([replace(node, held={}) for node in planned.nodes], planned.replicas)


def _group(planned: Plan, index: int, name: str | None) -> Any:
    """Return the placement group of a planned replica: the one that an earlier manager made, or a new one."""
    replica, places = planned.replicas[index], planned.places[index]
    group_name = "" if name is None else f"raylm:{name}:slot-{replica.slot}"
    if group_name:
        try:
            return get_placement_group(group_name)
        except ValueError:  # there is none
            pass
    wanted = replica.shape
    spans = wanted.spans(planned.nodes)
    return placement_group(
        wanted.bundles(),
        strategy="PACK" if spans else "STRICT_PACK",
        name=group_name,
        lifetime="detached" if group_name else None,
        _soft_target_node_id=planned.nodes[places[0]].id if places and not spans else None,
        bundle_label_selector=wanted.bundle_labels() or None,
    )
