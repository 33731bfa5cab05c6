"""One turn of a session: claim it, answer with the whole transcript, append.

Engines keep no state between turns, so the transcript is sent again each time. A session sticks to one actor because
that actor's prefix cache makes the replay cheap.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import ray.exceptions

from raylm.actors.sessions import Claim
from raylm.errors import RaylmError, SessionError, SessionNotFoundError
from raylm.messages import Message, Request
from raylm.pool import Pool
from raylm.stream import Stream


class Conversations:
    """The sessions of a pool.

    Args:
        pool: Answers the turns.
        store: Handle of the session store.
    """

    def __init__(self, pool: Pool, store: Any) -> None:
        self._pool = pool
        self._store = store

    @asynccontextmanager
    async def turn(
        self,
        session_id: str,
        messages: tuple[Message, ...],
        make_request: Callable[[tuple[Message, ...]], Request],
        *,
        start: bool,
        end: bool,
        silence_s: float | None = None,
    ) -> AsyncIterator[Stream]:
        """Run one turn; the transcript grows when the block is left with the stream at its end.

        Args:
            session_id: The session.
            messages: What is new in this turn.
            make_request: Makes the request of a whole transcript.
            start: Begin the session, in place of one of that id.
            end: Forget the session when the turn is over.
            silence_s: As in `Pool.stream`.

        Raises:
            SessionNotFoundError: `start` is False and there is no such session.
            SessionBusyError: another turn of it is running.
            RaylmError: whatever the generation raised. The session is as it was before the turn.
        """
        turn_id = uuid.uuid4().hex
        router = self._pool.router
        candidate = router.pinned(session_id)
        if candidate is None:
            candidate = router.candidate()
            router.pin(session_id, candidate)  # now, so that the next new session has another candidate
        try:
            claim: Claim = await _ask(self._store.claim.remote(session_id, candidate, turn_id, start=start))
        except SessionNotFoundError:
            router.unpin(session_id)
            raise
        try:
            router.pin(session_id, claim.slot)
            transcript = claim.messages + messages
            request = msgspec.structs.replace(make_request(transcript), session_id=session_id, session_end=end)
            async with self._pool.stream(request, session_id=session_id, silence_s=silence_s) as stream:
                yield stream
                if stream.done:
                    completion = await stream.completion()
                    answer = Message("assistant", completion.text)
                    slot = completion.receipt.slot
                    await _ask(self._store.append.remote(session_id, turn_id, [*messages, answer], slot))
        finally:
            # After `append` the turn no longer holds the session, and this does nothing.
            await _ask(self._store.release.remote(session_id, turn_id))
        if end:
            await self.end(session_id)

    async def end(self, session_id: str) -> None:
        """Forget a session.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._pool.router.unpin(session_id)
        await _ask(self._store.end.remote(session_id))

    async def load(self, session_id: str) -> tuple[Message, ...]:
        """Return a session's transcript.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        transcript: tuple[Message, ...] = await _ask(self._store.load.remote(session_id))
        return transcript


async def _ask(call: Any) -> Any:
    """Await a call of the store and raise its own errors as they are."""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaylmError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        reason = str(error).partition("\n")[0]
        raise SessionError(f"the session store was lost and is started again; begin a new session: {reason}") from error
