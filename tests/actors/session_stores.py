"""Session stores of every kind, whose time the tests can pass."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ray
import redis.asyncio as redis

from raylm.actors.redis_sessions import RedisSessionStore
from raylm.actors.sessions import (
    ActorSessionStore,
    MemorySessionStore,
    SessionActor,
    SessionState,
    SessionStore,
)
from raylm.config import SessionConfig
from raylm.messages import Message

PREFIX = "raylm:test:"


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class PlainSessionStore:
    """A `MemorySessionStore` in this process as a `SessionStore`."""

    def __init__(self, store: MemorySessionStore) -> None:
        self._store = store

    async def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionState:
        return self._store.claim(session_id, slot, turn_id, start=start).state

    async def append(self, session_id: str, turn_id: str, messages: Sequence[Message], slot: int) -> None:
        self._store.append(session_id, turn_id, messages, slot)

    async def renew(self, turns: Mapping[str, str]) -> None:
        self._store.renew(turns)

    async def release(self, session_id: str, turn_id: str, *, end: bool = False) -> None:
        self._store.release(session_id, turn_id, end=end)

    async def load(self, session_id: str) -> SessionState:
        return self._store.load(session_id).state

    async def end(self, session_id: str) -> None:
        self._store.end(session_id)

    async def fork(self, session_id: str, new_session_id: str) -> None:
        self._store.fork(session_id, new_session_id)

    async def pin(self, session_id: str, slot: int, *, moved_from: int | None = None) -> int:
        return self._store.pin(session_id, slot, moved_from=moved_from)

    async def num_sessions(self) -> int:
        return self._store.num_sessions()

    async def aclose(self) -> None:
        pass


class Sessions(Protocol):
    """An empty store and its clock."""

    @abstractmethod
    def connect(self) -> SessionStore:
        """Return one more client of the store."""
        ...

    @abstractmethod
    async def wait(self, seconds: float) -> None:
        """Let time pass."""
        ...


class PlainSessions(Sessions):
    """In this process."""

    def __init__(self, config: SessionConfig) -> None:
        self._clock = Clock()
        self.store = MemorySessionStore(config, self._clock)

    def connect(self) -> SessionStore:
        return PlainSessionStore(self.store)

    async def wait(self, seconds: float) -> None:
        self._clock.now += seconds


class ClockedSessionActor(SessionActor):
    """A `SessionActor` that a test can empty, and whose time it can pass."""

    async def reset(self, config: SessionConfig) -> None:
        self._clock = Clock()
        self._store = MemorySessionStore(config, self._clock)

    async def wait(self, seconds: float) -> None:
        self._clock.now += seconds


class PatientSessionActor(SessionActor):
    """A `SessionActor` that gives pools a long time to register when it was restarted, which a test can cut short."""

    def __init__(self, config: SessionConfig) -> None:
        super().__init__(config)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._opens_at += 120

    async def open(self, life: str) -> None:
        """Answer from now on: all pools have registered with this life."""
        self._check(life)
        self._opens_at = time.monotonic()

    async def _open(self, life: str) -> None:
        self._check(life)
        while time.monotonic() < self._opens_at:  # the end moves
            await asyncio.sleep(0.02)


class ActorSessions(Sessions):
    """In a Ray actor."""

    def __init__(self, config: SessionConfig, actor: Any) -> None:
        self._config = config
        self._actor = actor
        ray.get(actor.reset.remote(config))

    def connect(self) -> SessionStore:
        return ActorSessionStore(self._actor, self._config)

    async def wait(self, seconds: float) -> None:
        await self._actor.wait.remote(seconds)


class RedisSessions(Sessions):
    """In Redis. Its clock cannot be set; instead, all times in the database are set back."""

    def __init__(self, config: SessionConfig, url: str) -> None:
        self._config = config
        self._url = url

    def connect(self) -> SessionStore:
        return RedisSessionStore(self._url, self._config, PREFIX)

    async def clear(self) -> None:
        """Empty the database."""
        async with redis.Redis.from_url(self._url) as database:
            await database.flushall()

    async def wait(self, seconds: float) -> None:
        ms = int(seconds * 1000)
        async with redis.Redis.from_url(self._url) as database:
            async for key in database.scan_iter():
                if await database.type(key) == b"zset":
                    for member in await database.zrange(key, 0, -1):
                        await database.zincrby(key, -ms, member)
                    continue
                if await database.type(key) == b"hash" and await database.hexists(key, "ends"):
                    await database.hincrby(key, "ends", -ms)
                await database.pexpire(key, await database.pttl(key) - ms)
