"""One turn of a session: claim it, answer with the whole transcript, append.

Engines keep no state between turns, so the transcript is sent again each time. A session sticks to one actor because
that actor's prefix cache makes the replay cheap.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec

from raylm.actors.sessions import SessionState, SessionStore, count_sessions
from raylm.errors import RaylmError, RequestCancelledError, SessionError, SessionNotFoundError, SessionStoreError
from raylm.messages import Completion, Lane, Message, Request, is_part
from raylm.pool import Pool
from raylm.stream import Stream
from raylm.tasks import Tasks

_KNOWN_PIN_TIMEOUT_S = 0.5
"""How long the store has to confirm what this pool knows already: where a session is that is a name alone."""

_log = logging.getLogger(__name__)


class _Arrival:
    """Requests that the pool does not have yet, for the store is asked about their session first.

    Attributes:
        request_ids: Their ids.
        cancelled: Whether they are to go no further.
    """

    def __init__(self, *request_ids: str) -> None:
        self.request_ids = request_ids
        self.cancelled = False

    def check(self) -> None:
        """Raise RequestCancelledError if they were cancelled."""
        if self.cancelled:
            raise RequestCancelledError("the request was cancelled")


class Conversations:
    """The sessions of a pool.

    Args:
        pool: Answers the turns.
        store: Keeps the sessions.
        turn_timeout_s: As in the store's `SessionConfig`; turns are renewed well before.
    """

    def __init__(self, pool: Pool, store: SessionStore, turn_timeout_s: float) -> None:
        self._pool = pool
        self._store = store
        self._renew_s = turn_timeout_s / 4
        self._turns: dict[str, str] = {}  # those in progress: the session of each
        self._tasks = Tasks("the sessions of a pool")
        self._renewing: asyncio.Task[None] | None = None  # while there are any
        self._arrivals: set[_Arrival] = set()

    @asynccontextmanager
    async def turn(
        self,
        session_id: str,
        messages: tuple[Message, ...],
        make_request: Callable[[tuple[Message, ...]], Request],
        *,
        start: bool,
        end: bool,
        timeout_s: float | None = None,
        silence_s: float | None = None,
    ) -> AsyncIterator[Stream]:
        """Run one turn; the transcript grows when the block is left with the stream at its end.

        Args:
            session_id: The session.
            messages: What is new in this turn.
            make_request: Makes the request of a whole transcript. It is first called with what is new alone, to see
                whether it can.
            start: Begin the session, in place of one of that id.
            end: Forget the session when the turn is over.
            timeout_s: As in `Pool.stream`.
            silence_s: As in `Pool.stream`.

        Raises:
            SessionNotFoundError: `start` is False and there is no such session.
            SessionBusyError: another turn of it is running.
            SessionStoreError: the store cannot be reached. When that is at the end, the turn is not in the transcript,
                and a session that was to end has not.
            RequestCancelledError: `cancel` was called before the pool had the request.
            RaylmError: whatever the generation raised.

        A turn that fails, or is left before its end, leaves the session as it was. With `start` there is none then: one
        of that id ends when the turn begins.
        """
        self._pool.check_open()  # the store may have ended with it
        arrival = _Arrival(make_request(messages).request_id)  # what is wrong is told before a session is touched
        turn_id = uuid.uuid4().hex
        router = self._pool.router
        candidate = router.pinned(session_id)
        if candidate is None:
            candidate = router.candidate()
            router.pin(session_id, candidate)  # now, so that the next new session has another candidate
        claiming = asyncio.create_task(self._store.claim(session_id, candidate, turn_id, start=start))
        self._arrivals.add(arrival)
        try:
            state = await asyncio.shield(claiming)
        except SessionNotFoundError:
            router.unpin(session_id)
            raise
        except asyncio.CancelledError:
            with suppress(SessionError):
                await claiming  # to its end, because a claim that overtakes its own release would stay
                await self._give_back(session_id, turn_id)
            raise
        finally:
            self._arrivals.remove(arrival)
        kept = False
        self._begin(session_id, turn_id)
        try:
            arrival.check()
            router.pin(session_id, state.slot)
            transcript = state.messages + messages
            request = msgspec.structs.replace(make_request(transcript), session_id=session_id, session_end=end)
            async with self._pool.stream(
                request, session_id=session_id, timeout_s=timeout_s, silence_s=silence_s
            ) as stream:
                yield stream
                if stream.done:
                    completion = await stream.completion()
                    if end:
                        router.unpin(session_id)
                        await self._store.release(session_id, turn_id, end=True)
                    else:
                        answer = Message("assistant", completion.text)
                        slot = completion.receipt.slot
                        await self._store.append(session_id, turn_id, [*messages, answer], slot)
                    kept = True
        finally:
            self._over(turn_id)
            if not kept:
                await self._give_back(session_id, turn_id)

    @asynccontextmanager
    async def pinned(
        self,
        request: Request,
        session_id: str,
        *,
        lane: Lane = "interactive",
        timeout_s: float | None = None,
        silence_s: float | None = None,
    ) -> AsyncIterator[Stream]:
        """Run a request of a session that is a name alone, in the slot that all pools agree on.

        Args:
            request: The request.
            session_id: The session.
            lane: As in `Pool.stream`.
            timeout_s: As in `Pool.stream`.
            silence_s: As in `Pool.stream`.

        Raises:
            RequestCancelledError: `cancel` was called before the pool had the request.
            RaylmError: as in `Pool.stream`.
        """
        slot = await self._slot(session_id, request.request_id)
        async with self._pool.stream(
            request, lane=lane, session_id=session_id, timeout_s=timeout_s, silence_s=silence_s
        ) as stream:
            yield stream
        if stream.receipt is not None:
            await self._follow(session_id, slot, stream.receipt.slot)

    async def pinned_many(
        self,
        requests: Sequence[Request],
        session_id: str,
        *,
        timeout_s: float | None = None,
        silence_s: float | None = None,
    ) -> list[Completion | RaylmError]:
        """Run many requests of a session that is a name alone. The rest is as in `Pool.generate_many`.

        Raises:
            RequestCancelledError: `cancel` was called before the pool had the requests.
            RaylmError: as in `Pool.generate_many`.
        """
        slot = await self._slot(session_id, *(request.request_id for request in requests))
        results = await self._pool.generate_many(
            requests, session_id=session_id, timeout_s=timeout_s, silence_s=silence_s
        )
        slots = [result.receipt.slot for result in results if isinstance(result, Completion)]
        if slots:
            await self._follow(session_id, slot, slots[-1])
        return results

    def cancel(self, request_id: str) -> bool:
        """Stop the requests of that id which the pool does not have yet; return whether there was one.

        The parts of a request are those of `Pool.cancel`.
        """
        found = [
            arrival for arrival in self._arrivals if any(is_part(each, request_id) for each in arrival.request_ids)
        ]
        for arrival in found:
            arrival.cancelled = True
        return bool(found)

    async def _slot(self, session_id: str, *request_ids: str) -> int:
        """Return the slot of a session that is a name alone, once all pools agree on it."""
        arrival = _Arrival(*request_ids)
        router = self._pool.router
        candidate = router.pinned(session_id)
        timeout_s = None if candidate is None else _KNOWN_PIN_TIMEOUT_S
        if candidate is None:
            candidate = router.candidate()
            router.pin(session_id, candidate)
        self._arrivals.add(arrival)
        try:
            slot = await self._pin(session_id, candidate, timeout_s=timeout_s)
        finally:
            self._arrivals.remove(arrival)
        router.pin(session_id, slot)
        arrival.check()
        return slot

    async def _follow(self, session_id: str, slot: int, answered: int) -> None:
        """Pin such a session to the slot that answered, where it had to leave its own."""
        if answered != slot:
            pinned = await self._pin(session_id, answered, moved_from=slot, timeout_s=_KNOWN_PIN_TIMEOUT_S)
            self._pool.router.pin(session_id, pinned)

    async def _pin(self, session_id: str, slot: int, *, moved_from: int | None = None, timeout_s: float | None) -> int:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._store.pin(session_id, slot, moved_from=moved_from)
        except (TimeoutError, SessionStoreError) as error:
            # A cache is lost at worst, which is no reason to refuse the request.
            why = str(error) or "the store is silent"
            _log.warning("session %s is pinned by this pool alone: %s", session_id, why)
            return slot

    async def num_sessions(self) -> int | None:
        """Return how many sessions are remembered; None where their store does not say."""
        return await count_sessions(self._store)

    async def end(self, session_id: str) -> None:
        """Forget a session.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._pool.router.unpin(session_id)
        await self._store.end(session_id)

    async def fork(self, session_id: str, new_session_id: str) -> None:
        """Begin a session, in place of one of that id, with the slot and the transcript of another.

        Raises:
            SessionNotFoundError: there is no session `session_id`.
            SessionBusyError: one of the two is in the middle of a turn.
        """
        await self._store.fork(session_id, new_session_id)
        self._pool.router.unpin(new_session_id)  # the store knows better

    async def load(self, session_id: str) -> SessionState:
        """Return a session's slot and transcript.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        return await self._store.load(session_id)

    def _begin(self, session_id: str, turn_id: str) -> None:
        self._turns[turn_id] = session_id
        if self._renewing is None:
            self._renewing = self._tasks.start(self._renew())

    def _over(self, turn_id: str) -> None:
        del self._turns[turn_id]
        if not self._turns and self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None

    async def _renew(self) -> None:
        """Hold the sessions of all turns in progress: the store frees those of a process that is gone."""
        while True:
            await asyncio.sleep(self._renew_s)
            try:
                await self._store.renew(dict(self._turns))
            except SessionStoreError as error:
                _log.warning("%d turns were not renewed: %s", len(self._turns), error)

    async def _give_back(self, session_id: str, turn_id: str) -> None:
        """End a turn that is not to be remembered. Its own failure is what the caller must see, not the store's."""
        try:
            await self._store.release(session_id, turn_id)
        except SessionStoreError as error:
            _log.warning("session %s stays held by a turn that is over, until that times out: %s", session_id, error)
