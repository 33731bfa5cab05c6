"""PoolManager: owns the actors of one pool, from their creation to their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Self

import ray
import ray.exceptions
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylm.actors.cluster import nodes
from raylm.actors.engine_actor import EngineActor
from raylm.actors.placement import Shape, plan
from raylm.actors.sessions import start_store
from raylm.config import (
    APIServerConfig,
    EngineConfig,
    HTTPConfig,
    LMDeployConfig,
    OpenVINOConfig,
    SessionConfig,
    TritonConfig,
)
from raylm.errors import NoActorError, PlacementError

_PLACEMENT_TIMEOUT_S = 120.0
"""How long the processes of actors that fit may take to come up: a busy machine starts one in ten seconds."""

_CLOSE_TIMEOUT_S = 10.0
"""How long an engine has to close before its process is killed."""

NAMESPACE = "raylm"
"""Ray namespace of the actors that have names."""

_log = logging.getLogger(__name__)


def shape(config: EngineConfig) -> Shape:
    """Return what one replica of an engine takes of its node."""
    if isinstance(config, LMDeployConfig) and config.backend == "pytorch" and config.tp > 1:
        return Shape(num_cpus=1, num_gpus=config.tp, grouped=True)  # on CPU, these GPUs are logical ones
    if isinstance(config, LMDeployConfig | APIServerConfig):
        return Shape(num_cpus=1, num_gpus=config.tp if config.device == "cuda" else 0)
    if isinstance(config, HTTPConfig | TritonConfig):
        return Shape(num_cpus=0.01)
    if isinstance(config, OpenVINOConfig):
        return Shape(num_cpus=1)
    return Shape(num_cpus=0, num_gpus=config.num_gpus)


class PoolManager:
    """Creates one `EngineActor` a slot and one session store, and ends them all with `aclose`.

    Attributes:
        actors: The engine actors' handles, by slot.
        sessions: The session store's handle; None where a database keeps them.
    """

    def __init__(self, actors: list[Any], sessions: Any, groups: list[Any]) -> None:
        self.actors = actors
        self.sessions = sessions
        self._groups = groups  # placement groups of the actors that have one
        self._replaced: dict[int, int] = {}  # by slot, the process that was ended last

    @classmethod
    async def start(cls, engines: Sequence[EngineConfig], sessions: SessionConfig, *, name: str | None = None) -> Self:
        """Create the actors; returns when their processes are up. Their engines start when a pool attaches to them.

        Args:
            engines: Settings of each slot's engine.
            sessions: Where sessions are kept, and their limits.
            name: Of the pool, for actors that outlive this process. Those that exist under it are taken over as they
                are, be they well, hanging, or in the middle of a restart.

        Raises:
            PlacementError: they do not fit, or the cluster is too busy to take them.
            NoActorError: one of their processes died, or the whole cluster did.
        """
        taken_over = name is not None and _exist(name)
        for kind in () if taken_over else {shape(config) for config in engines}:
            plan(nodes(), kind, sum(shape(config) == kind for config in engines))
        create = ray.remote(EngineActor)
        actors, groups = [], []
        for slot, config in enumerate(engines):
            options = shape(config).actor_options() | _named(name, f"slot-{slot}")
            if shape(config).grouped:
                # The group outlives the actor's process: Ray starts the next one in its place.
                groups.append(_group(shape(config), name and f"raylm:{name}:slot-{slot}"))
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    groups[-1], placement_group_bundle_index=0, placement_group_capture_child_tasks=True
                )
            actors.append(create.options(**options).remote(config.model_dump_json()))
        store = start_store(sessions, _named(name, "sessions"))
        manager = cls(actors, store, groups)
        if taken_over:
            return manager  # pools see to each slot by itself, and one that is down must not end the others
        try:
            async with asyncio.timeout(_PLACEMENT_TIMEOUT_S):
                await asyncio.gather(*(actor.__ray_ready__.remote() for actor in manager._all()))
        except TimeoutError:
            await manager.aclose()
            raise PlacementError(
                f"the cluster did not start {len(actors)} actors within {_PLACEMENT_TIMEOUT_S:g} s though they fit; "
                f"free at present: {ray.available_resources()}. See `ray status` for what holds the rest"
            ) from None
        except ray.exceptions.RayActorError as error:
            await manager.aclose()
            raise NoActorError(f"an actor's process died as it started: {error}") from error
        except BaseException:
            await manager.aclose()
            raise
        return manager

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
        for group in self._groups:
            remove_placement_group(group)
        self.actors = []
        self._groups = []

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


def _group(wanted: Shape, name: str | None) -> Any:
    if name is None:
        return placement_group(wanted.bundles(), strategy="STRICT_PACK")
    try:
        return get_placement_group(name)
    except ValueError:  # there is none
        return placement_group(wanted.bundles(), strategy="STRICT_PACK", name=name, lifetime="detached")
