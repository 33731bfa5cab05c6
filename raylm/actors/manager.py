"""PoolManager: owns the actors of one pool, from their creation to their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import ray
import ray.exceptions
from ray._private import state
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raylm.actors.cluster import nodes
from raylm.actors.engine_actor import EngineActor
from raylm.actors.placement import Plan, Replica, plan, require, shape
from raylm.actors.sessions import start_store
from raylm.config import EngineConfig, SessionConfig
from raylm.errors import NoActorError, PlacementError

_START_TIMEOUT_S = 120.0
"""How long the processes of actors that fit may take to come up: a busy machine starts one in ten seconds."""

_SERVED_PLACEMENT_TIMEOUT_S = 300.0
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

    Attributes:
        actors: The engine actors' handles, by slot.
        sessions: The session store's handle; None where a database keeps them.
    """

    def __init__(self) -> None:
        self.actors: list[Any] = []
        self.sessions: Any = None
        self._groups: dict[int, Any] = {}  # by slot, the placement groups of the actors that have one
        self._replaced: dict[int, int] = {}  # by slot, the process that was ended last

    @classmethod
    async def start(
        cls,
        engines: Sequence[EngineConfig],
        sessions: SessionConfig,
        *,
        name: str | None = None,
        placement_timeout_s: float | None = None,
    ) -> Self:
        """Create the actors; returns when their processes are up. Their engines start when a pool attaches to them.

        Args:
            engines: Settings of each slot's engine.
            sessions: Where sessions are kept, and their limits.
            name: Of the pool, for actors that outlive this process. Those that exist under it are taken over as they
                are, be they well, hanging, or in the middle of a restart.
            placement_timeout_s: See `PoolConfig`.

        Raises:
            PlacementError: they do not fit, or the cluster is too busy to take them.
            NoActorError: one of their processes died, or the whole cluster did.
        """
        taken_over = name is not None and _exist(name)
        if placement_timeout_s is None:
            placement_timeout_s = 0 if name is None else _SERVED_PLACEMENT_TIMEOUT_S
        replicas = [Replica(slot, shape(config), name or "") for slot, config in enumerate(engines)]
        planned = await asyncio.to_thread(_plan, replicas)
        if not placement_timeout_s and not taken_over:
            require(_on_idle_nodes(planned))
        manager = cls()
        try:
            await manager._create(engines, planned, name, taken_over=taken_over)
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

    async def _create(
        self, engines: Sequence[EngineConfig], planned: Plan, name: str | None, *, taken_over: bool
    ) -> None:
        """Ask Ray for all actors, each where it is planned to go.

        What has no room is asked for all the same: Ray's autoscaler, if there is one, sees it.
        """
        for slot in [replica.slot for replica in planned.replicas if replica.shape.spans(planned.nodes)]:
            self._groups[slot] = _group(planned, slot, name)
        if self._groups and not taken_over:
            planned = await asyncio.to_thread(self._plan_around_groups, planned)
        create = ray.remote(EngineActor)
        for slot, config in enumerate(engines):
            wanted = planned.replicas[slot].shape
            places = planned.places[slot]
            options = wanted.actor_options() | _named(name, f"slot-{slot}")
            if wanted.grouped:
                # The group outlives the actor's process: Ray starts the next one in its place.
                if slot not in self._groups:
                    self._groups[slot] = _group(planned, slot, name)
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    self._groups[slot], placement_group_bundle_index=0, placement_group_capture_child_tasks=True
                )
            elif places:
                # Elsewhere when the node is gone, or is taken by somebody else by now.
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                    planned.nodes[places[0]].id, soft=True, _spill_on_unavailable=True
                )
            self.actors.append(create.options(**options).remote(config.model_dump_json()))

    def _plan_around_groups(self, planned: Plan) -> Plan:
        """Plan the rest anew once Ray itself has chosen the nodes of the groups that go over several."""
        by_id = {node.id: dict(node.held) for node in planned.nodes}
        for slot, group in self._groups.items():
            if planned.places[slot] and group.wait(_GROUP_TIMEOUT_S):
                wanted = planned.replicas[slot].shape
                for bundle, node_id in placement_group_table(group)["bundles_to_node_id"].items():
                    for resource, amount in wanted.bundles()[bundle].items():
                        held = by_id.setdefault(node_id, {})
                        held[resource] = held.get(resource, 0) + amount
        left = [replace(node, held=by_id[node.id]) for node in planned.nodes]
        rest = [replica for replica in planned.replicas if replica.slot not in self._groups]
        again = iter(plan(left, rest).places)
        places = [() if replica.slot in self._groups else next(again) for replica in planned.replicas]
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
        await asyncio.to_thread(self._check_groups)

    def _look(self, replicas: Sequence[Replica]) -> tuple[str, bool]:
        """Return why those that still have no room have none, and whether all would fit if the nodes were idle."""
        waiting = []
        for replica, actor in zip(replicas, self.actors, strict=True):
            if replica.slot in self._groups:
                has_room = placement_group_table(self._groups[replica.slot])["state"] == "CREATED"
            else:
                # A process is chosen once its room is taken, long before it answers. The address has a node before
                # that: of who looks for one.
                has_room = bool(state.actors(actor._actor_id.hex())["Address"]["Port"])
            if not has_room:
                waiting.append(replica)
        now = _plan(waiting)
        return "" if now.fits else now.refusal(), _on_idle_nodes(replace(now, replicas=tuple(replicas))).fits

    def _check_groups(self) -> None:
        """See that lmdeploy's rank 0 can be where it takes it to be: on the node of its actor.

        Raises:
            PlacementError: Ray has put the actor of a replica on a node without a rank of it.
        """
        for group in self._groups.values():
            places = placement_group_table(group)["bundles_to_node_id"]
            if places[0] not in [node for bundle, node in places.items() if bundle]:
                raise PlacementError(
                    "Ray has placed the ranks of a replica, and its actor on another node: the node of its first rank "
                    "has no CPU free. Free one there"
                )

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
        await asyncio.gather(*(self._close(actor) for actor in self.actors))
        for actor in self._all():
            ray.kill(actor, no_restart=True)
        for group in self._groups.values():
            remove_placement_group(group)
        self.actors = []
        self._groups = {}

    def _all(self) -> list[Any]:
        return self.actors if self.sessions is None else [*self.actors, self.sessions]

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


def _exist(pool: str) -> bool:
    """Return whether an earlier process has left actors of that pool."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{pool}:slot-") for actor in actors)


def _plan(replicas: Sequence[Replica]) -> Plan:
    return plan(nodes(), replicas)


def _on_idle_nodes(planned: Plan) -> Plan:
    """Return the plan for the same nodes if nothing were taken of them."""
    return plan([replace(node, held={}) for node in planned.nodes], planned.replicas)


def _group(planned: Plan, slot: int, name: str | None) -> Any:
    """Return the placement group of a slot: the one that an earlier manager made, or a new one."""
    group_name = "" if name is None else f"raylm:{name}:slot-{slot}"
    if group_name:
        try:
            return get_placement_group(group_name)
        except ValueError:  # there is none
            pass
    wanted, places = planned.replicas[slot].shape, planned.places[slot]
    spans = wanted.spans(planned.nodes)
    return placement_group(
        wanted.bundles(),
        strategy="PACK" if spans else "STRICT_PACK",
        name=group_name,
        lifetime="detached" if group_name else None,
        _soft_target_node_id=planned.nodes[places[0]].id if places and not spans else None,
        bundle_label_selector=wanted.bundle_labels() or None,
    )
