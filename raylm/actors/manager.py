"""PoolManager: owns the actors of one pool, from their creation to their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Self

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylm.actors.cluster import nodes
from raylm.actors.engine_actor import EngineActor
from raylm.actors.placement import Shape, plan
from raylm.actors.sessions import MemorySessionStore
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
        sessions: The session store's handle.
    """

    def __init__(self, actors: list[Any], sessions: Any, groups: list[Any]) -> None:
        self.actors = actors
        self.sessions = sessions
        self._groups = groups  # placement groups of the actors that have one

    @classmethod
    async def start(cls, engines: Sequence[EngineConfig], sessions: SessionConfig) -> Self:
        """Create the actors; returns when their processes are up. Their engines start when a pool attaches to them.

        Args:
            engines: Settings of each slot's engine.
            sessions: Limits of the session store.

        Raises:
            PlacementError: they do not fit, or the cluster is too busy to take them.
            NoActorError: one of their processes died, or the whole cluster did.
        """
        for kind in {shape(config) for config in engines}:
            plan(nodes(), kind, sum(shape(config) == kind for config in engines))
        create = ray.remote(EngineActor)
        actors, groups = [], []
        for config in engines:
            options = shape(config).actor_options()
            if shape(config).grouped:
                # The group outlives the actor's process: Ray starts the next one in its place.
                groups.append(placement_group(shape(config).bundles(), strategy="STRICT_PACK"))
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    groups[-1], placement_group_bundle_index=0, placement_group_capture_child_tasks=True
                )
            actors.append(create.options(**options).remote(config.model_dump_json()))
        store = ray.remote(MemorySessionStore).options(num_cpus=0, max_restarts=-1).remote(sessions)
        manager = cls(actors, store, groups)
        try:
            async with asyncio.timeout(_PLACEMENT_TIMEOUT_S):
                await asyncio.gather(*(actor.__ray_ready__.remote() for actor in [*actors, store]))
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

    def replace(self, slot: int) -> None:
        """End the process of a slot's actor; Ray starts a new one in its place."""
        _log.warning("the actor of slot %d is replaced", slot)
        ray.kill(self.actors[slot], no_restart=False)

    async def aclose(self) -> None:
        """End all actors. Engines that do not close in time are killed."""
        await asyncio.gather(*(self._close(actor) for actor in self.actors))
        for actor in [*self.actors, self.sessions]:
            ray.kill(actor, no_restart=True)
        for group in self._groups:
            remove_placement_group(group)
        self.actors = []
        self._groups = []

    async def _close(self, actor: Any) -> None:
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await actor.close.remote()
        except (TimeoutError, ray.exceptions.RayError) as error:
            _log.warning(
                "an engine did not close in order and is killed: %s", str(error).partition("\n")[0] or "silent"
            )
