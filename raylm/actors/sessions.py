"""SessionStore: what must survive an engine actor, which is each session's slot and transcript.

A turn is `claim`, generation, `append`. Claiming is atomic, so any number of pools agree on the slot, and it holds the
session for one turn at a time. A turn that fails gives it back with `release` and leaves no trace.

`SessionStore` is what the rest of raylm knows. Behind it is a `MemorySessionStore` in a Ray actor.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import ray.exceptions

from raylm.config import SessionConfig
from raylm.errors import RaylmError, SessionBusyError, SessionNotFoundError, SessionStoreError
from raylm.messages import Message


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

        Once is as good as twice, as long as no other turn has ended in between.

        Raises:
            SessionNotFoundError: the turn no longer holds the session.
        """
        ...

    async def release(self, session_id: str, turn_id: str) -> None:
        """Give up a turn, if it still holds the session.

        A session that was begun by it is forgotten: its first message has not been answered.
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


def connect_store(config: SessionConfig, actor: Any | None, prefix: str) -> SessionStore:  # noqa: ARG001
    """Return the session store that the settings name.

    Args:
        config: Its settings.
        actor: Handle of the actor that keeps sessions in memory.
        prefix: Before the name of each key, in a database that others use too.
    """
    return ActorSessionStore(actor)


class ActorSessionStore:
    """The sessions in a `MemorySessionStore` that runs as a Ray actor.

    Args:
        actor: Its handle.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionState:
        """See `SessionStore.claim`."""
        claim: SessionState = await _ask(self._actor.claim.remote(session_id, slot, turn_id, start=start))
        return claim

    async def append(self, session_id: str, turn_id: str, messages: Sequence[Message], slot: int) -> None:
        """See `SessionStore.append`."""
        await _ask(self._actor.append.remote(session_id, turn_id, messages, slot))

    async def release(self, session_id: str, turn_id: str) -> None:
        """See `SessionStore.release`."""
        await _ask(self._actor.release.remote(session_id, turn_id))

    async def load(self, session_id: str) -> SessionState:
        """See `SessionStore.load`."""
        state: SessionState = await _ask(self._actor.load.remote(session_id))
        return state

    async def end(self, session_id: str) -> None:
        """See `SessionStore.end`."""
        await _ask(self._actor.end.remote(session_id))

    async def fork(self, session_id: str, new_session_id: str) -> None:
        """See `SessionStore.fork`."""
        await _ask(self._actor.fork.remote(session_id, new_session_id))

    async def pin(self, session_id: str, slot: int, *, moved_from: int | None = None) -> int:
        """See `SessionStore.pin`."""
        pinned: int = await _ask(self._actor.pin.remote(session_id, slot, moved_from=moved_from))
        return pinned

    async def num_sessions(self) -> int:
        """See `SessionStore.num_sessions`."""
        number: int = await _ask(self._actor.num_sessions.remote())
        return number

    async def aclose(self) -> None:
        """See `SessionStore.aclose`."""


async def _ask(call: Any) -> Any:
    """Await a call of the store's actor and raise its own errors as they are."""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaylmError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        reason = str(error).partition("\n")[0]
        raise SessionStoreError(f"the session store was lost; begin a new session: {reason}") from error


class _Session:
    __slots__ = ("last_turn_id", "messages", "num_bytes", "slot", "turn_ends_at", "turn_id", "used_at")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.messages: tuple[Message, ...] = ()
        self.num_bytes = 0
        self.turn_id: str | None = None
        self.last_turn_id: str | None = None  # of the last turn that is in the transcript
        self.turn_ends_at = 0.0
        self.used_at = 0.0


class MemorySessionStore:
    """Sessions in the memory of one process; run it as a Ray actor to share them.

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

    def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionState:
        """See `SessionStore.claim`."""
        self._expire()
        session = self._sessions.get(session_id)
        if session is None or not (self._busy(session) and session.turn_id == turn_id):
            self._check_idle(session_id)
            session = self._begin(session_id, slot) if start else self._find(session_id)
        session.turn_id = turn_id
        session.turn_ends_at = self._clock() + self._config.turn_timeout_s
        self._touch(session_id, session)
        self._shrink()
        return SessionState(session.slot, session.messages)

    def append(self, session_id: str, turn_id: str, messages: Sequence[Message], slot: int) -> None:
        """See `SessionStore.append`."""
        self._expire()
        session = self._sessions.get(session_id)
        if session is None or turn_id not in (session.turn_id, session.last_turn_id):
            raise SessionNotFoundError(f"session {session_id} is no longer held by this turn; begin a new one")
        if session.turn_id != turn_id:
            return  # appended before
        num_bytes = sum(len(message.content.encode()) for message in messages)
        session.messages += tuple(messages)
        session.num_bytes += num_bytes
        self._num_bytes += num_bytes
        session.slot = slot
        session.turn_id = None
        session.last_turn_id = turn_id
        self._touch(session_id, session)
        self._shrink()

    def release(self, session_id: str, turn_id: str) -> None:
        """See `SessionStore.release`."""
        self._expire()
        session = self._sessions.get(session_id)
        if session is None or session.turn_id != turn_id:
            return
        session.turn_id = None
        self._touch(session_id, session)
        if not session.messages:
            self._remove(session_id)

    def load(self, session_id: str) -> SessionState:
        """See `SessionStore.load`."""
        self._expire()
        session = self._find(session_id)
        return SessionState(session.slot, session.messages)

    def end(self, session_id: str) -> None:
        """See `SessionStore.end`."""
        self._expire()
        self._find(session_id)
        self._remove(session_id)

    def fork(self, session_id: str, new_session_id: str) -> None:
        """See `SessionStore.fork`."""
        self._expire()
        session = self._find(session_id)
        self._check_idle(session_id)
        self._check_idle(new_session_id)
        copy = self._begin(new_session_id, session.slot)
        copy.messages = session.messages
        copy.num_bytes = session.num_bytes
        self._num_bytes += copy.num_bytes
        self._touch(new_session_id, copy)
        self._shrink()

    def pin(self, session_id: str, slot: int, *, moved_from: int | None = None) -> int:
        """See `SessionStore.pin`."""
        now = self._clock()
        while self._pins and next(iter(self._pins.values()))[1] <= now - self._config.ttl_s:
            self._pins.popitem(last=False)
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
        session = self._sessions[session_id] = _Session(slot)
        return session

    def _busy(self, session: _Session) -> bool:
        return session.turn_id is not None and self._clock() < session.turn_ends_at

    def _touch(self, session_id: str, session: _Session) -> None:
        session.used_at = self._clock()
        self._sessions.move_to_end(session_id)

    def _remove(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._num_bytes -= session.num_bytes

    def _expire(self) -> None:
        oldest = self._clock() - self._config.ttl_s
        while (found := self._least_recent()) is not None and found[1].used_at <= oldest:
            self._remove(found[0])

    def _shrink(self) -> None:
        while len(self._sessions) > self._config.max_sessions or self._num_bytes > self._config.max_bytes:
            found = self._least_recent()
            if found is None:
                return  # what is left is in the middle of a turn
            self._remove(found[0])

    def _least_recent(self) -> tuple[str, _Session] | None:
        """Return the idle session that was not used for the longest time."""
        return next((item for item in self._sessions.items() if not self._busy(item[1])), None)
