"""ServedPool: a pool on the actors of a served model, whoever else uses them.

Its slots are those that the model's manager publishes, its sessions are in the store that all pools of the model share,
and a request may be cancelled from any of them. When the manager's process dies, or stands still, pool and streams go
on without it. When it has been ended for good the model is served no longer, and all that waits or comes is told so.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, Self

import msgspec
import ray
import ray.exceptions

from raylm.actors.manager_actor import ANSWER_TIMEOUT_S, Membership, find, has_ended, told
from raylm.actors.sessions import SessionStore, connect_store
from raylm.config import ModelConfig
from raylm.conversation import Conversations
from raylm.errors import EngineStartError, ModelNotFoundError, NoActorError
from raylm.pool import Pool
from raylm.statistics import ModelState
from raylm.tasks import Tasks
from raylm.template import MetaTemplate, named_template

_RETRY_S = 0.2
"""Pause between two calls of a manager that is being restarted."""

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode_state = msgspec.msgpack.Decoder(ModelState).decode


class ServedPool:
    """A pool, its sessions and its template. Use as an async context manager, or call `aclose`.

    Make it with `open`.

    Attributes:
        config: What is served.
        pool: The pool.
        conversations: Its sessions.
        template: How messages become a prompt; None: the model's own chat template.
        is_served: False once the model has been ended. Requests then fail with ModelNotFoundError.
    """

    def __init__(self, manager: Any, config: ModelConfig, pool: Pool, store: SessionStore) -> None:
        self.config = config
        self.pool = pool
        self.conversations = Conversations(pool, store, config.sessions.turn_timeout_s)
        self.template: MetaTemplate | None = named_template(config.meta_template)
        self.is_served = True
        self._manager = manager
        self._store = store
        self._version = 0
        self._tasks = Tasks("a served pool")

    @classmethod
    async def open(cls, model: str) -> Self:
        """Join the pools of a served model; returns once the slots are known, up or not.

        Raises:
            ModelNotFoundError: no model of that name is served on this cluster.
            PlacementError: its actors do not fit.
            NoActorError: its actors have not been started, or its manager is being restarted.
        """
        manager = await asyncio.to_thread(find, model)
        config = ModelConfig.model_validate_json(await told(manager.config.remote()))
        store = connect_store(config.sessions, await told(manager.sessions.remote()), f"raylm:{model}:")
        served: Self

        def replace(slot: int, pid: int) -> None:
            served._tasks.start(served._replace(slot, pid))

        pool = Pool(config.pool, replace=replace, guided=True)
        served = cls(manager, config, pool, store)
        try:
            await told(served._watch_once())
        except BaseException:
            await served.aclose()
            raise
        served._tasks.start(served._watch())
        return served

    async def ready(self) -> None:
        """Wait until every slot is up.

        Raises:
            EngineStartError: an engine did not start; the text says what to do.
            ModelNotFoundError: the model has been ended meanwhile.
        """
        await asyncio.gather(*self.pool.settled())

    async def answering(self) -> None:
        """Wait until some slot is up. There may be none to wait for, or others that have no room or do not start.

        Raises:
            EngineStartError: no engine could be started; the text says what to do.
            ModelNotFoundError: the model has been ended meanwhile.
        """
        pending = set(self.pool.settled())
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            errors = [error for each in done if (error := each.exception()) is not None]
            if len(errors) < len(done):
                return
            if not pending:
                raise errors[-1]

    @property
    def answers(self) -> bool:
        """Whether requests get answers: some slot is up, or the model has none until there is work."""
        scales_to_none = any(group.autoscaling and not group.autoscaling.min_replicas for group in self.config.engines)
        pool = self.pool
        return pool.can_work and (pool.num_up > 0 or not pool.slots or scales_to_none)

    async def state(self) -> ModelState:
        """Return what all pools of the model do.

        Raises:
            NoActorError: the manager is being restarted, or does not answer.
            ModelNotFoundError: the model has been ended.
        """
        self.pool.check_open()
        state = _decode_state(await told(self._manager.state.remote(), timeout_s=ANSWER_TIMEOUT_S))
        state.num_sessions = await self.conversations.num_sessions()
        return state

    def cancel(self, request_id: str) -> bool:
        """Abort the requests of that id in this pool, also those on their way to it; return whether there was one."""
        in_pool = self.pool.cancel(request_id)
        return self.conversations.cancel(request_id) or in_pool

    async def cancel_elsewhere(self, request_id: str) -> None:
        """Ask all other pools of the model to abort a request.

        Raises:
            NoActorError: the manager is being restarted, or does not answer.
        """
        if self.is_served:
            await told(self._manager.cancel.remote(request_id), timeout_s=ANSWER_TIMEOUT_S)

    async def aclose(self) -> None:
        """Leave. Requests of this pool that are still running fail; the actors go on for others."""
        await self._tasks.aclose()
        await self.pool.aclose()
        await self._store.aclose()
        leaving = self._manager.leave.remote(self.pool.pool_id, _encode(self.pool.report()))
        with suppress(NoActorError):
            await told(leaving, timeout_s=ANSWER_TIMEOUT_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _watch_once(self) -> None:
        report = _encode(self.pool.report())
        membership: Membership = await self._manager.watch.remote(self.pool.pool_id, self._version, report)
        self._version = membership.version
        if membership.actors is not None:
            for slot, actor in membership.actors.items():
                self.pool.attach(slot, actor)
            for slot in self.pool.slots:
                if slot not in membership.actors:
                    self.pool.detach(slot)
            for slot in membership.draining:
                self.pool.drain(slot)
            for slot, words in membership.failed.items():
                self.pool.fail(slot, EngineStartError(f"slot {slot} did not start: {words}"))
        for request_id in membership.cancelled:
            self.cancel(request_id)

    async def _watch(self) -> None:
        while self.is_served:
            try:
                await self._watch_once()
            except ray.exceptions.ActorDiedError:
                if await has_ended(self._manager):
                    self._end()
                await asyncio.sleep(_RETRY_S)
            except ray.exceptions.RayActorError:
                await asyncio.sleep(_RETRY_S)
            except ray.exceptions.RayTaskError as error:
                _log.warning("the manager of %s does not answer: %s", self.config.name, error.cause)
                await asyncio.sleep(_RETRY_S)

    def _end(self) -> None:
        name = self.config.name
        _log.warning("model %s has been ended: its requests are refused from now on", name)
        self.is_served = False
        self.pool.end(
            ModelNotFoundError(f"model {name!r} is served no longer: it has been ended; `raylm up` serves it again")
        )

    async def _replace(self, slot: int, pid: int) -> None:
        while self.is_served:
            try:
                await self._manager.replace.remote(slot, pid)
            except ray.exceptions.RayActorError:
                await asyncio.sleep(_RETRY_S)
            else:
                return
