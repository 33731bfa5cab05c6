"""SessionStore: what must survive an engine actor, which is each session's slot and transcript.

A turn is `claim`, generation, `append`. Claiming is atomic, so any number of pools agree on the slot, and it holds the
session for one turn at a time. A turn that fails gives it back with `release` and leaves no trace.

`SessionStore` is what the rest of raylm knows. Behind it is Redis (`redis_sessions.py`), or a `SessionActor`, which
keeps the sessions in memory. When that actor dies, Ray starts another, which knows nothing. How it gets whole again:

1.  A pool keeps every session that it has touched as it last saw it, a turn in progress included. What each operation
    leaves behind has a version, and later versions are higher, across all sessions and all lives of the store.
2.  Every call names the life of the store that the pool has told all this. In another life the call is refused; the
    pool registers what it holds, and calls again. A poll that is always open tells a pool that is idle of the death.
3.  Of two records of a session the one with the higher version wins.
4.  A store that was restarted answers nobody for `RECOVERY_S`, so that all pools have registered before any is served.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
import ray
import ray.exceptions

from raylm.config import SessionConfig
from raylm.errors import RaylmError, SessionBusyError, SessionNotFoundError, SessionStoreError
from raylm.messages import Message

_log = logging.getLogger(__name__)

RECOVERY_S = 3.0
"""How long pools have to register with a store that was restarted. They notice its death before it is back."""

_LOST_AFTER_S = 60.0
"""How long an operation waits for the store: Ray starts it again in seconds, on another node in a minute."""

_BACK_OFF_S = 0.1
"""Time between two attempts to reach the store."""

_WATCH_S = 30.0
"""How long a watch may go on after its pool is gone."""

_COUNT_TIMEOUT_S = 1.0
"""How long a store has to say how many sessions it has: who asks wants to know of everything else as well."""

_CHUNK_BYTES = 4 << 20
"""How much a pool registers in one call, or a little more."""


class SessionState(msgspec.Struct, frozen=True):
    """What is remembered of a session.

    Attributes:
        slot: The slot that it is pinned to.
        messages: The transcript so far; empty when the session begins.
    """

    slot: int
    messages: tuple[Message, ...]


class SessionStore(Protocol):
    """The sessions of all pools that share it. Any method may raise SessionStoreError: the store cannot be reached."""

    async def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionState:
        """Hold a session for one turn. Claiming once more with the same `turn_id` is the same claim.

        Args:
            session_id: The session.
            slot: Where to pin it, if it is not pinned yet.
            turn_id: Names the turn in `append` and `release`; unique.
            start: Begin the session, in place of one of that id. Otherwise it must exist.

        Raises:
            SessionNotFoundError: it was never started, has ended or has expired.
            SessionBusyError: another turn holds it.
        """
        ...

    async def append(self, session_id: str, turn_id: str, messages: Sequence[Message], slot: int) -> None:
        """End a turn: add its messages to the transcript and pin the session to the slot that answered.

        Ending it once more does nothing.

        Raises:
            SessionNotFoundError: the turn no longer holds the session.
        """
        ...

    async def renew(self, turns: Mapping[str, str]) -> None:
        """Go on holding sessions for another `turn_timeout_s` from now.

        Args:
            turns: The session of each turn, by the turn's id. One that no longer holds its session is passed over.
        """
        ...

    async def release(self, session_id: str, turn_id: str, *, end: bool = False) -> None:
        """Give up a turn, if it still holds the session.

        Args:
            session_id: The session.
            turn_id: The turn.
            end: Forget the session with it. One that was begun by this turn is forgotten in any case: its first message
                has not been answered.
        """
        ...

    async def load(self, session_id: str) -> SessionState:
        """Return a session's slot and transcript, without the turn that is running.

        Raises:
            SessionNotFoundError: it was never started, has ended or has expired.
        """
        ...

    async def end(self, session_id: str) -> None:
        """Forget a session, also in the middle of a turn.

        Raises:
            SessionNotFoundError: it was never started, has ended or has expired.
        """
        ...

    async def fork(self, session_id: str, new_session_id: str) -> None:
        """Begin a session, in place of one of that id, with the slot and the transcript of another.

        Raises:
            SessionNotFoundError: there is no session `session_id`.
            SessionBusyError: one of the two is in the middle of a turn.
        """
        ...

    async def pin(self, session_id: str, slot: int, *, moved_from: int | None = None) -> int:
        """Return the slot of a session that is a name alone: its transcript, if there is one, is its client's.

        Args:
            session_id: The session.
            slot: Where to pin it, if it is not pinned yet.
            moved_from: Where it was, if it had to leave: a session that is pinned there is pinned to `slot`. One that
                another pool has moved meanwhile stays where that has put it.
        """
        ...

    async def num_sessions(self) -> int:
        """Return how many sessions are remembered."""
        ...

    async def aclose(self) -> None:
        """Let go of the store. The sessions stay."""
        ...


def start_store(config: SessionConfig, options: Mapping[str, Any] = MappingProxyType({})) -> Any | None:
    """Start the actor that keeps sessions in memory; returns its handle, or None where the settings name a database.

    Args:
        config: Its settings.
        options: More of Ray's options, such as a name.

    Raises:
        SessionError: the client library of the database is not installed.
    """
    if config.url is not None:
        import raylm.actors.redis_sessions  # noqa: F401  # fails here, and not when the engines have started

        return None
    # Every turn that waits and every pool that watches is a call in progress.
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 100_000, **options}
    return ray.remote(SessionActor).options(**options).remote(config)


def connect_store(config: SessionConfig, actor: Any | None, prefix: str) -> SessionStore:
    """Return the session store that the settings name.

    Args:
        config: Its settings.
        actor: What `start_store` returned, here or in another process.
        prefix: Before the name of each key, in a database that others use too.

    Raises:
        SessionError: the client library of the database is not installed.
    """
    if config.url is not None:
        from raylm.actors.redis_sessions import RedisSessionStore  # an extra

        return RedisSessionStore(config.url, config, prefix)
    return ActorSessionStore(actor, config)


async def count_sessions(store: SessionStore) -> int | None:
    """Return how many sessions a store remembers; None where it does not say within a second, and the log says why."""
    try:
        async with asyncio.timeout(_COUNT_TIMEOUT_S):
            return await store.num_sessions()
    except (TimeoutError, SessionStoreError) as error:
        _log.warning("sessions are not counted: %s", str(error) or f"no answer within {_COUNT_TIMEOUT_S:g} s")
        return None


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A session as an operation left it.

    Attributes:
        session_id: The session.
        version: Higher than that of every record before it, of any session.
        slot: The slot that it is pinned to.
        messages: The transcript; None when the session has ended.
        turn_id: The turn in progress.
        turn_ids: The turns in the transcript.
        idle_s: How long ago it was used.
        turn_left_s: How much longer the turn in progress may hold it.
    """

    session_id: str
    version: int
    slot: int = 0
    messages: tuple[Message, ...] | None = None
    turn_id: str | None = None
    turn_ids: tuple[str, ...] = ()
    idle_s: float = 0
    turn_left_s: float = 0

    @property
    def state(self) -> SessionState:
        """What a user of the store sees."""
        return SessionState(self.slot, self.messages or ())


class ActorSessionStore:
    """The sessions in a `SessionActor`, and a copy of those that this pool has touched, for when that dies.

    Args:
        actor: Its handle.
        config: Limits of the copy.
    """

    def __init__(self, actor: Any, config: SessionConfig) -> None:
        self._actor = actor
        self._held = MemorySessionStore(config)
        self._life: str | None = None  # the store's life that has been told all that is held
        self._reachable = False  # what is known of the store's life is up to date
        self._registering = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None

    async def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionState:
        """See `SessionStore.claim`."""
        record = await self._ask(lambda life: self._actor.claim.remote(life, session_id, slot, turn_id, start=start))
        return self._hold(record).state

    async def append(self, session_id: str, turn_id: str, messages: Sequence[Message], slot: int) -> None:
        """See `SessionStore.append`."""
        self._hold(
            await self._ask(lambda life: self._actor.append.remote(life, session_id, turn_id, tuple(messages), slot))
        )

    async def renew(self, turns: Mapping[str, str]) -> None:
        """See `SessionStore.renew`."""
        await self._ask(lambda life: self._actor.renew.remote(life, turns))
        self._held.renew(turns)

    async def release(self, session_id: str, turn_id: str, *, end: bool = False) -> None:
        """See `SessionStore.release`."""
        record = await self._ask(lambda life: self._actor.release.remote(life, session_id, turn_id, end=end))
        if record is not None:
            self._hold(record)

    async def load(self, session_id: str) -> SessionState:
        """See `SessionStore.load`."""
        record: SessionRecord = await self._ask(lambda life: self._actor.load.remote(life, session_id))
        return record.state

    async def end(self, session_id: str) -> None:
        """See `SessionStore.end`."""
        self._hold(await self._ask(lambda life: self._actor.end.remote(life, session_id)))

    async def fork(self, session_id: str, new_session_id: str) -> None:
        """See `SessionStore.fork`."""
        self._hold(await self._ask(lambda life: self._actor.fork.remote(life, session_id, new_session_id)))

    async def pin(self, session_id: str, slot: int, *, moved_from: int | None = None) -> int:
        """See `SessionStore.pin`."""
        pinned: int = await self._ask(
            lambda life: self._actor.pin.remote(life, session_id, slot, moved_from=moved_from)
        )
        return pinned

    async def num_sessions(self) -> int:
        """See `SessionStore.num_sessions`."""
        number: int = await self._ask(lambda life: self._actor.num_sessions.remote(life))
        return number

    async def aclose(self) -> None:
        """See `SessionStore.aclose`."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None

    def _hold(self, record: SessionRecord) -> SessionRecord:
        self._held.restore([record])
        return record

    async def _ask(self, call: Callable[[str], Any]) -> Any:
        """Call the store, in its next life if need be."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(_LOST_AFTER_S):
                return await self._insist(call)
        except TimeoutError:
            raise SessionStoreError(
                f"the session store's actor has not come back within {_LOST_AFTER_S:g} s; `ray list actors` says why",
                retry_after_s=_LOST_AFTER_S,
            ) from None

    async def _insist(self, call: Callable[[str], Any]) -> Any:
        while True:
            life = self._life
            try:
                life = await self._register()
                return await call(life)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RaylmError):
                    raise error.cause from None
                if not isinstance(error.cause, _AnotherLifeError):
                    raise
            except ray.exceptions.ActorUnavailableError:
                pass  # Ray starts it again
            except ray.exceptions.RayError as error:
                reason = str(error).partition("\n")[0]
                raise SessionStoreError(f"the session store is gone; start another pool: {reason}") from error
            if life == self._life:
                self._reachable = False
                await asyncio.sleep(_BACK_OFF_S)

    async def _register(self) -> str:
        """Return the store's life, once that knows all that is held here."""
        async with self._registering:
            if self._life is None or not self._reachable:
                life: str = await self._actor.life.remote()
                if life != self._life:
                    for records, more in _chunks(list(self._held.records())):
                        await self._actor.restore.remote(life, records, more=more)
                    self._life = life
                self._reachable = True
            return self._life

    async def _watch(self) -> None:
        """Register with the store's next life as soon as there is one."""
        while True:
            try:
                await self._insist(lambda life: self._actor.watch.remote(life))
            except SessionStoreError:
                return  # for good, as the next operation will say


class SessionActor:
    """Keeps sessions in memory for all pools; a Ray actor. The module's docstring has the rules of its restart.

    Args:
        config: Limits.
    """

    def __init__(self, config: SessionConfig) -> None:
        self._store = MemorySessionStore(config)
        self._life = uuid.uuid4().hex
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._opens_at = time.monotonic() + (RECOVERY_S if restarted else 0)

    async def life(self) -> str:
        """Return the name of this life."""
        return self._life

    async def watch(self, life: str) -> None:
        """Return after a while; what matters is that this raises when the actor dies."""
        self._check(life)
        await asyncio.sleep(_WATCH_S)

    async def restore(self, life: str, records: Sequence[SessionRecord], *, more: bool) -> None:
        """Take over what a pool holds.

        Args:
            life: The life that the pool means.
            records: Some of it.
            more: More follows, and is waited for.
        """
        self._check(life)
        self._store.restore(records)
        if more:
            self._opens_at = max(self._opens_at, time.monotonic() + RECOVERY_S)

    async def claim(self, life: str, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionRecord:
        """See `SessionStore.claim`."""
        await self._open(life)
        return self._store.claim(session_id, slot, turn_id, start=start)

    async def append(
        self, life: str, session_id: str, turn_id: str, messages: Sequence[Message], slot: int
    ) -> SessionRecord:
        """See `SessionStore.append`."""
        await self._open(life)
        return self._store.append(session_id, turn_id, messages, slot)

    async def renew(self, life: str, turns: Mapping[str, str]) -> None:
        """See `SessionStore.renew`."""
        await self._open(life)
        self._store.renew(turns)

    async def release(self, life: str, session_id: str, turn_id: str, *, end: bool) -> SessionRecord | None:
        """See `SessionStore.release`."""
        await self._open(life)
        return self._store.release(session_id, turn_id, end=end)

    async def load(self, life: str, session_id: str) -> SessionRecord:
        """See `SessionStore.load`."""
        await self._open(life)
        return self._store.load(session_id)

    async def end(self, life: str, session_id: str) -> SessionRecord:
        """See `SessionStore.end`."""
        await self._open(life)
        return self._store.end(session_id)

    async def fork(self, life: str, session_id: str, new_session_id: str) -> SessionRecord:
        """See `SessionStore.fork`."""
        await self._open(life)
        return self._store.fork(session_id, new_session_id)

    async def pin(self, life: str, session_id: str, slot: int, *, moved_from: int | None) -> int:
        """See `SessionStore.pin`. Pools remember where such a session is and ask for it again, so none is restored."""
        self._check(life)
        return self._store.pin(session_id, slot, moved_from=moved_from)

    async def num_sessions(self, life: str) -> int:
        """See `SessionStore.num_sessions`."""
        await self._open(life)
        return self._store.num_sessions()

    def _check(self, life: str) -> None:
        if life != self._life:
            raise _AnotherLifeError

    async def _open(self, life: str) -> None:
        self._check(life)
        while (seconds := self._opens_at - time.monotonic()) > 0:  # noqa: ASYNC110  # the end moves
            await asyncio.sleep(seconds)


class _AnotherLifeError(Exception):
    """The call was meant for a store that has died. Never leaves this file."""


class _Session:
    __slots__ = ("messages", "num_bytes", "slot", "turn_ends_at", "turn_id", "turn_ids", "used_at", "version")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.messages: tuple[Message, ...] = ()
        self.num_bytes = 0
        self.turn_id: str | None = None
        self.turn_ids: tuple[str, ...] = ()
        self.turn_ends_at = 0.0
        self.used_at = 0.0
        self.version = 0


class MemorySessionStore:
    """Sessions in the memory of one process. Its methods return what they leave behind.

    Args:
        config: Limits. Above them the least recently used idle sessions are forgotten.
        clock: Seconds, monotonic.
    """

    def __init__(self, config: SessionConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # in order of use, the least recent first
        self._num_bytes = 0
        # Slot and time of use of sessions that are a name alone, the least recently used first.
        self._pins: OrderedDict[str, tuple[int, float]] = OrderedDict()
        # Versions at which sessions ended, in that order, so that an older record does not bring one back.
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._version = 0

    def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionRecord:
        """See `SessionStore.claim`."""
        self._expire()
        session = self._sessions.get(session_id)
        if session is None or not (self._busy(session) and session.turn_id == turn_id):
            self._check_idle(session_id)
            session = self._begin(session_id, slot) if start else self._find(session_id)
        session.turn_id = turn_id
        session.turn_ends_at = self._clock() + self._config.turn_timeout_s
        return self._touch(session_id, session)

    def append(self, session_id: str, turn_id: str, messages: Sequence[Message], slot: int) -> SessionRecord:
        """See `SessionStore.append`."""
        self._expire()
        session = self._sessions.get(session_id)
        if session is not None and session.turn_id != turn_id and turn_id in session.turn_ids:
            return self._record(session_id, session, self._clock())  # appended before
        if session is None or session.turn_id != turn_id:
            raise SessionNotFoundError(f"session {session_id} is no longer held by this turn; begin a new one")
        self._fill(session, session.messages + tuple(messages))
        session.slot = slot
        session.turn_id = None
        session.turn_ids += (turn_id,)
        return self._touch(session_id, session)

    def renew(self, turns: Mapping[str, str]) -> None:
        """See `SessionStore.renew`. Makes no new versions: pools renew what they hold as well."""
        self._expire()
        now = self._clock()
        for turn_id, session_id in turns.items():
            session = self._sessions.get(session_id)
            if session is not None and session.turn_id == turn_id:
                session.turn_ends_at = now + self._config.turn_timeout_s
                session.used_at = now
                self._sessions.move_to_end(session_id)

    def release(self, session_id: str, turn_id: str, *, end: bool = False) -> SessionRecord | None:
        """See `SessionStore.release`. Returns None when the turn does not hold the session."""
        self._expire()
        session = self._sessions.get(session_id)
        if session is None or session.turn_id != turn_id:
            return None
        if end or not session.messages:
            return self._bury(session_id)
        session.turn_id = None
        return self._touch(session_id, session)

    def load(self, session_id: str) -> SessionRecord:
        """See `SessionStore.load`."""
        self._expire()
        return self._record(session_id, self._find(session_id), self._clock())

    def end(self, session_id: str) -> SessionRecord:
        """See `SessionStore.end`."""
        self._expire()
        self._find(session_id)
        return self._bury(session_id)

    def fork(self, session_id: str, new_session_id: str) -> SessionRecord:
        """See `SessionStore.fork`."""
        self._expire()
        session = self._find(session_id)
        self._check_idle(session_id)
        self._check_idle(new_session_id)
        copy = self._begin(new_session_id, session.slot)
        self._fill(copy, session.messages)
        copy.turn_ids = session.turn_ids
        return self._touch(new_session_id, copy)

    def records(self) -> Iterator[SessionRecord]:
        """Yield everything that is known, ended sessions included."""
        self._expire()
        now = self._clock()
        for session_id, session in self._sessions.items():
            yield self._record(session_id, session, now)
        for session_id, version in self._ended.items():
            yield SessionRecord(session_id=session_id, version=version)

    def restore(self, records: Sequence[SessionRecord]) -> None:
        """Take over records that are newer than what is known."""
        now = self._clock()
        in_order = True
        for record in records:
            session = self._sessions.get(record.session_id)
            known = self._ended.get(record.session_id, 0) if session is None else session.version
            if record.version <= known:
                continue
            self._version = max(self._version, record.version)
            if record.messages is None:
                self._bury(record.session_id, record.version)
                continue
            session = self._begin(record.session_id, record.slot)
            self._fill(session, record.messages)
            session.version = record.version
            session.turn_id = record.turn_id
            session.turn_ids = record.turn_ids
            session.turn_ends_at = now + record.turn_left_s
            session.used_at = now - record.idle_s
            in_order = in_order and record.idle_s == 0
        if not in_order:
            self._sessions = OrderedDict(sorted(self._sessions.items(), key=lambda item: item[1].used_at))
        self._shrink()

    def pin(self, session_id: str, slot: int, *, moved_from: int | None = None) -> int:
        """See `SessionStore.pin`."""
        self._expire_pins()
        now = self._clock()
        pinned, _ = self._pins.get(session_id, (slot, now))
        if pinned == moved_from:
            pinned = slot
        self._pins[session_id] = (pinned, now)
        self._pins.move_to_end(session_id)
        if len(self._pins) > self._config.max_sessions:
            self._pins.popitem(last=False)
        return pinned

    def num_sessions(self) -> int:
        """See `SessionStore.num_sessions`."""
        self._expire()
        self._expire_pins()
        return len(self._sessions) + len(self._pins)

    def _find(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionNotFoundError(f"there is no session {session_id}; begin one with sequence_start=True")
        return session

    def _check_idle(self, session_id: str) -> None:
        session = self._sessions.get(session_id)
        if session is not None and self._busy(session):
            raise SessionBusyError(f"session {session_id} is in the middle of a turn; wait for its end")

    def _begin(self, session_id: str, slot: int) -> _Session:
        self._remove(session_id)
        self._ended.pop(session_id, None)
        session = self._sessions[session_id] = _Session(slot)
        return session

    def _busy(self, session: _Session) -> bool:
        return session.turn_id is not None and self._clock() < session.turn_ends_at

    def _fill(self, session: _Session, messages: tuple[Message, ...]) -> None:
        num_bytes = sum(len(message.content.encode()) for message in messages[len(session.messages) :])
        session.messages = messages
        session.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def _touch(self, session_id: str, session: _Session) -> SessionRecord:
        session.version = self._next_version()
        session.used_at = now = self._clock()
        self._sessions.move_to_end(session_id)
        self._shrink()
        return self._record(session_id, session, now)

    def _next_version(self) -> int:
        # The clock makes it higher than those of a life whose records have not all been seen.
        self._version = max(self._version + 1, time.time_ns())
        return self._version

    def _record(self, session_id: str, session: _Session, now: float) -> SessionRecord:
        return SessionRecord(
            session_id=session_id,
            version=session.version,
            slot=session.slot,
            messages=session.messages,
            turn_id=session.turn_id,
            turn_ids=session.turn_ids,
            idle_s=now - session.used_at,
            turn_left_s=session.turn_ends_at - now,
        )

    def _bury(self, session_id: str, version: int | None = None) -> SessionRecord:
        self._remove(session_id)
        self._ended[session_id] = self._next_version() if version is None else version
        self._ended.move_to_end(session_id)
        if len(self._ended) > self._config.max_sessions:
            self._ended.popitem(last=False)
        return SessionRecord(session_id=session_id, version=self._version)

    def _remove(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._num_bytes -= session.num_bytes

    def _expire(self) -> None:
        oldest = self._clock() - self._config.ttl_s
        while (found := self._least_recent()) is not None and found[1].used_at <= oldest:
            self._remove(found[0])

    def _expire_pins(self) -> None:
        oldest = self._clock() - self._config.ttl_s
        while self._pins and next(iter(self._pins.values()))[1] <= oldest:
            self._pins.popitem(last=False)

    def _shrink(self) -> None:
        while len(self._sessions) > self._config.max_sessions or self._num_bytes > self._config.max_bytes:
            found = self._least_recent()
            if found is None:
                return  # what is left is in the middle of a turn
            self._remove(found[0])

    def _least_recent(self) -> tuple[str, _Session] | None:
        """Return the idle session that was not used for the longest time."""
        return next((item for item in self._sessions.items() if not self._busy(item[1])), None)


def _chunks(records: Sequence[SessionRecord]) -> Iterator[tuple[list[SessionRecord], bool]]:
    """Yield lists of records that are small enough to send, and whether more follow."""
    chunk: list[SessionRecord] = []
    num_bytes = 0
    for record in records:
        if num_bytes > _CHUNK_BYTES:
            yield chunk, True
            chunk, num_bytes = [], 0
        chunk.append(record)
        num_bytes += 100 + sum(len(message.content) for message in record.messages or ())
    if chunk:
        yield chunk, False
