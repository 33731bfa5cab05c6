"""Stream: one request as its client sees it, and what the pool keeps of it meanwhile.

The attributes with an underscore belong to `pool.py` and `link.py`. They live here, and not in a table of the pool,
because every delta touches them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from raylm.errors import RaylmError
from raylm.messages import Completion, Delta, Details, Generated, Lane, Receipt, Request
from raylm.routing import Reservation

if TYPE_CHECKING:
    from raylm.link import Link
    from raylm.pool import Pool, _Silence

_ONE_READER = "a stream has one reader at a time"

_MAX_TOKENS = 1 << 20
"""What a request counts for at most: no context is longer, so a higher limit only means "until the end". The loads of
all requests of a slot add up to something that fits a message."""


class Stream:
    """The deltas of one request, in order: an async iterator, and an async context manager that aborts on exit.

    Attributes:
        request: The request.
    """

    __slots__ = (
        "_acquit_at",
        "_attempts",
        "_avoid",
        "_deadline",
        "_deltas",
        "_ended",
        "_enqueued_at",
        "_error",
        "_first_token_at",
        "_fruitless",
        "_heard_at",
        "_key",
        "_lane",
        "_link",
        "_moved",
        "_num_read",
        "_on_trial",
        "_pool",
        "_queue_s",
        "_receipt",
        "_reservation",
        "_session_id",
        "_silence",
        "_spoke",
        "_started_at",
        "_suspect",
        "_tokens",
        "_waiter",
        "_watched",
        "_work_s",
        "request",
    )

    def __init__(self, pool: Pool, request: Request, lane: Lane, session_id: str | None) -> None:
        self.request = request
        self._pool = pool
        self._lane: Lane = lane
        self._session_id = session_id
        # What the slot has to do for it. Four characters a token: good enough to compare loads.
        length = len(request.prompt or "") + sum(len(message.content) for message in request.messages or ())
        self._tokens = (
            length // 4 + len(request.prompt_token_ids or ()) + min(request.config.max_new_tokens, _MAX_TOKENS)
        )
        self._deltas: list[Delta] = []  # of all attempts; what an attempt of its own has to continue
        self._num_read = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: RaylmError | None = None
        self._receipt: Receipt | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._silence: _Silence | None = None
        self._ended: Callable[[], None] | None = None  # called once, when it is done
        # The current attempt:
        self._link: Link | None = None
        self._key = 0
        self._reservation: Reservation | None = None
        self._spoke = False  # it has produced a token
        self._watched = True  # it has not, or it is on trial
        self._acquit_at = 0.0
        self._on_trial = False
        self._heard_at = 0.0
        # All attempts:
        self._started_at = pool.loop.time()
        self._first_token_at = 0.0
        self._attempts = 0
        self._fruitless = 0  # in a row, without a new token
        self._avoid: set[int] = set()
        self._work_s: float | None = None  # limit, from its first attempt on
        self._suspect = False
        self._moved = ""
        self._enqueued_at = 0.0
        self._queue_s = 0.0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """Return the next delta.

        Raises:
            RaylmError: the request failed; deltas that came before the failure were returned first.
        """
        # Once a token: the wait is spelled out here, for a call of `_news` would cost as much as the rest.
        deltas, index = self._deltas, self._num_read
        while index == len(deltas):
            if self._receipt is not None:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            if self._waiter is not None:
                raise RuntimeError(_ONE_READER)
            waiter = self._waiter = self._pool.loop.create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        self._num_read = index + 1
        return deltas[index]

    async def news(self) -> Delta:
        """Wait for something to tell, and return all of it in one delta.

        Returns:
            Everything that has come since the last call: one delta when it is called often enough, and fewer and
            fuller ones for a slow reader. The one with a finish reason is the last: ask for no more after it.

        Raises:
            RaylmError: the request failed; what came before the failure was returned first.
        """
        deltas, index = self._deltas, self._num_read
        if index == len(deltas):
            if not self.done:
                await self._news()
            if self._error is not None and index == len(deltas):
                raise self._error
        end = self._num_read = len(deltas)
        if end == index + 1:
            return deltas[index]
        delta = msgspec.structs.replace(deltas[index])
        for later in deltas[index + 1 : end]:
            delta.extend(later)
        return delta

    @property
    def receipt(self) -> Receipt | None:
        """How the answer came about, once it is whole."""
        return self._receipt

    @property
    def attempt(self) -> dict[str, str]:
        """How it goes, or went: `slot`, `actor`, `why`, `queue_ms` and `attempts`; empty while it waits."""
        link, reservation = self._link, self._reservation
        if (receipt := self._receipt) is not None:
            slot, actor, why = receipt.slot, receipt.actor, receipt.why
        elif link is None or link.info is None or reservation is None:
            return {}
        else:
            slot, actor = link.number, link.info.actor
            why = f"moved:{self._moved}" if self._moved else reservation.why
        return {
            "slot": str(slot),
            "actor": actor,
            "why": why,
            "queue-ms": f"{self._queue_s * 1e3:.3f}",
            "attempts": str(self._attempts),
        }

    @property
    def error(self) -> RaylmError | None:
        """What it failed with, if it did."""
        return self._error

    @property
    def slot(self) -> int | None:
        """The slot that works on it; None while it waits, and once it is done."""
        return None if self._link is None else self._link.number

    @property
    def done(self) -> bool:
        """True once the request has been answered or has failed."""
        return self._receipt is not None or self._error is not None

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return self._deltas[-1].num_tokens if self._deltas else 0

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join([delta.text for delta in self._deltas])

    async def completion(self) -> Completion:
        """Wait for the end and return the whole answer.

        Raises:
            RaylmError: the request failed.
        """
        while not self.done:
            await self._news()
        return self.result()

    def result(self) -> Completion:
        """Return the whole answer of a stream that is done.

        Raises:
            RaylmError: the request failed.
        """
        if self._error is not None:
            raise self._error
        last = self._deltas[-1]
        if self._receipt is None or last.finish_reason is None:
            raise AssertionError("unreachable: a stream that is done has a receipt and a last delta")
        return Completion(
            request_id=self.request.request_id,
            text=self.text,
            finish_reason=last.finish_reason,
            usage=self._receipt.usage,
            receipt=self._receipt,
            token_ids=[token for delta in self._deltas for token in delta.token_ids],
            logprobs=[logprob for delta in self._deltas for logprob in delta.logprobs],
            details=self._details(),
        )

    def _details(self) -> Details | None:
        told = [delta.details for delta in self._deltas if delta.details is not None]
        if not told:
            return None
        # Column by column: adding one to the next would take the square of their number.
        columns = zip(*map(msgspec.structs.astuple, told), strict=True)
        return Details(*(tuple(itertools.chain.from_iterable(column)) for column in columns))

    def abort(self) -> None:
        """End the request now, also inside the engine. Does nothing once it is done."""
        self._pool._abandon(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    async def _news(self) -> None:
        if self._waiter is not None:
            raise RuntimeError(_ONE_READER)
        waiter = self._waiter = self._pool.loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _generated(self) -> Generated | None:
        if not self._deltas:
            return self.request.generated
        before = self.request.generated
        text, token_ids = self.text, [token for delta in self._deltas for token in delta.token_ids]
        if before is not None:
            text, token_ids = before.text + text, before.token_ids + token_ids
        # Ids that do not cover the whole text are of no use to an engine.
        return Generated(text, token_ids if len(token_ids) == self.num_tokens else [], self.num_tokens)
