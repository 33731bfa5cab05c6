"""SessionStore: what must survive an engine actor, which is each session's slot and transcript.

A turn is `claim`, generation, `append`. Claiming is atomic, so any number of pools agree on the slot, and it holds the
session for one turn at a time. A turn that fails gives it back with `release` and leaves no trace.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from raylm.config import SessionConfig
from raylm.errors import SessionBusyError, SessionNotFoundError
from raylm.messages import Message


class Claim(msgspec.Struct, frozen=True):
    """A session that is held for one turn.

    Attributes:
        slot: The slot that it is pinned to.
        messages: The transcript so far; empty when the session begins.
    """

    slot: int
    messages: tuple[Message, ...]


class _Session:
    __slots__ = ("messages", "num_bytes", "slot", "turn_ends_at", "turn_id", "used_at")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.messages: tuple[Message, ...] = ()
        self.num_bytes = 0
        self.turn_id: str | None = None
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

    def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> Claim:
        """Hold a session for one turn.

        Args:
            session_id: The session.
            slot: Where to pin it, if it is not pinned yet.
            turn_id: Names the turn in `append` and `release`.
            start: Begin the session, in place of one of that id. Otherwise it must exist.

        Raises:
            SessionNotFoundError: it was never started, has ended or has expired.
            SessionBusyError: another turn holds it.
        """
        self._expire()
        session = self._sessions.get(session_id)
        if session is not None and self._busy(session):
            raise SessionBusyError(f"session {session_id} is in the middle of a turn; wait for its end")
        if start:
            self._remove(session_id)
            session = self._sessions[session_id] = _Session(slot)
        if session is None:
            raise SessionNotFoundError(f"there is no session {session_id}; begin one with sequence_start=True")
        session.turn_id = turn_id
        session.turn_ends_at = self._clock() + self._config.turn_timeout_s
        self._touch(session_id, session)
        self._shrink()
        return Claim(session.slot, session.messages)

    def append(self, session_id: str, turn_id: str, messages: Sequence[Message], slot: int) -> None:
        """End a turn: add its messages to the transcript and pin the session to the slot that answered.

        Raises:
            SessionNotFoundError: the turn no longer holds the session.
        """
        session = self._held(session_id, turn_id)
        if session is None:
            raise SessionNotFoundError(f"session {session_id} is no longer held by this turn; begin a new one")
        num_bytes = sum(len(message.content.encode()) for message in messages)
        session.messages += tuple(messages)
        session.num_bytes += num_bytes
        self._num_bytes += num_bytes
        session.slot = slot
        session.turn_id = None
        self._touch(session_id, session)
        self._shrink()

    def release(self, session_id: str, turn_id: str) -> None:
        """Give up a turn. A session that was begun by it is forgotten: its first message has not been answered."""
        session = self._held(session_id, turn_id)
        if session is not None:
            session.turn_id = None
            if not session.messages:
                self._remove(session_id)

    def load(self, session_id: str) -> tuple[Message, ...]:
        """Return a transcript.

        Raises:
            SessionNotFoundError: it was never started, has ended or has expired.
        """
        self._expire()
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionNotFoundError(f"there is no session {session_id}")
        return session.messages

    def end(self, session_id: str) -> None:
        """Forget a session, also in the middle of a turn.

        Raises:
            SessionNotFoundError: it was never started, has ended or has expired.
        """
        self._expire()
        if not self._remove(session_id):
            raise SessionNotFoundError(f"there is no session {session_id} to end")

    def num_sessions(self) -> int:
        """Return how many sessions are remembered."""
        self._expire()
        return len(self._sessions)

    def _busy(self, session: _Session) -> bool:
        return session.turn_id is not None and self._clock() < session.turn_ends_at

    def _held(self, session_id: str, turn_id: str) -> _Session | None:
        session = self._sessions.get(session_id)
        return session if session is not None and session.turn_id == turn_id else None

    def _touch(self, session_id: str, session: _Session) -> None:
        session.used_at = self._clock()
        self._sessions.move_to_end(session_id)

    def _remove(self, session_id: str) -> bool:
        session = self._sessions.pop(session_id, None)
        if session is None:
            return False
        self._num_bytes -= session.num_bytes
        return True

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
