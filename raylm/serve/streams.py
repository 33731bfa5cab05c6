"""Server-sent events: an answer on its way to a client.

A failure before the first event is an ordinary HTTP error, for nothing has been sent. After it, it is an `error` event:
a stream never just ends. A comment that breaks a long silence counts as an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from raylm.errors import RaylmError, RequestTimeoutError
from raylm.messages import Usage
from raylm.serve.door import facts, note
from raylm.serve.schema import HEARTBEAT, Wire, error_event
from raylm.stream import Stream

Turn = AbstractAsyncContextManager[Stream]
"""What makes a stream, and ends what has to end with it."""

MAX_STALL_S = 60.0
"""A client that takes nothing of what waits for it has its request aborted after this long: its session would be held
as long. What it has to take is some tens of kilobytes, what server and kernel keep for it aside."""

_PIECE_BYTES = 2**14
"""More is sent piece by piece, so that a slow client is seen to read."""

_log = logging.getLogger(__name__)

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """The answer of one or several requests, as it is generated.

    What is new since the last write goes out in one, so a slow client gets fewer and fuller events and holds up nobody.

    Args:
        turns: One for each choice.
        wire: How it is written.
        heartbeat_s: A comment is sent after so many seconds of silence.
    """

    def __init__(self, turns: Sequence[Turn], wire: Wire, heartbeat_s: float) -> None:
        super().__init__()
        self._turns = turns
        self._wire = wire
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send all of it."""
        writer = _Writer(send)
        limit = asyncio.timeout(None)
        try:
            async with limit:
                with _Heart(writer, self._heartbeat_s, limit):
                    await self._respond(writer)
        except TimeoutError:
            if not limit.expired():
                raise
            # Left without its end, so that the server cuts the connection.
            facts.get()["error"] = RequestTimeoutError.__name__
            _log.warning("the client has read nothing for %g s: its request is aborted", MAX_STALL_S)

    async def _respond(self, writer: _Writer) -> None:
        try:
            if len(self._turns) == 1:
                usages = [await self._answer(0, self._turns[0], writer)]
            else:
                usages = await self._answer_all(writer)
        except Exception as error:
            if not writer.started:
                raise
            facts.get()["error"] = type(error).__name__
            if not isinstance(error, RaylmError):
                _log.exception("a stream met an error of the gateway itself")
            await writer.write(self._last_words(error), last=True)
        else:
            await writer.write(self._wire.close(usages), last=True)

    def _last_words(self, error: Exception) -> bytes:
        """Return what ends a stream that has begun and cannot go on."""
        return error_event(error)

    async def _answer(self, index: int, turn: Turn, writer: _Writer) -> Usage:
        wire = self._wire
        async with turn as stream:
            writer.stream = stream
            delta = await stream.news()
            writer.stream = stream  # of several choices, the first that is heard of
            head = wire.begin(index)
            while True:
                data = wire.delta(index, delta)
                if data or head:
                    await writer.write(head + data)
                    head = b""
                if delta.finish_reason is not None:
                    break
                delta = await stream.news()
        # After the block, which adds a turn to its session: who sees the end may go on with the next turn.
        if stream.receipt is None:
            raise AssertionError("unreachable: the last delta comes with the receipt")
        note(stream.receipt, delta.finish_reason)
        await writer.write(wire.end(index, delta.finish_reason, stream.receipt))
        return stream.receipt.usage

    async def _answer_all(self, writer: _Writer) -> list[Usage]:
        try:
            async with asyncio.TaskGroup() as group:
                answers = [group.create_task(self._answer(*numbered, writer)) for numbered in enumerate(self._turns)]
        except* RaylmError as errors:
            first = errors.exceptions[0]
        else:
            return [answer.result() for answer in answers]
        raise first


class _Writer:
    """Sends the parts of one response, of which each is whole events.

    Attributes:
        started: Status and headers have been sent, or are about to be.
        stream: Whose attempt the headers tell of; None: of none yet.
        written_at: When the latest write began, of the loop's time.
    """

    def __init__(self, send: Send) -> None:
        self.started = False
        self.stream: Stream | None = None
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()  # choices and heartbeats write, and each waits while the client does not read
        self.written_at = self._loop.time()
        self._ended = False
        self._rest = b""  # of a part that was begun

    @property
    def is_writing(self) -> bool:
        """Whether a write is on its way."""
        return self._turn.locked()

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a part of the body, and before the first one status and headers."""
        async with self._turn:
            await self._write(data, last=last)

    async def beat(self, interval_s: float) -> None:
        """Send a comment, unless there has been something else meanwhile."""
        async with self._turn:
            if not self._ended and self._loop.time() >= self.written_at + interval_s:
                await self._write(HEARTBEAT)

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        self._ended = last
        self.written_at = self._loop.time()
        if not self.started:
            self.started = True
            attempt = {} if self.stream is None else self.stream.attempt
            raw = [(f"x-raylm-{name}".encode(), value.encode()) for name, value in attempt.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS + raw})
        data, self._rest = self._rest + data, b""
        start = 0
        try:
            while len(data) - start > _PIECE_BYTES:
                piece = data[start : start + _PIECE_BYTES]
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                start += _PIECE_BYTES
                self.written_at = self._loop.time()
            await self._send({"type": "http.response.body", "body": data[start:], "more_body": not last})
        except asyncio.CancelledError:
            if start:
                self._rest = data[start:]  # a choice ends because another one has failed, which is told after this
            raise


class _Heart:
    """Sends a comment when the client has heard nothing for too long, and ends the response of one that does not read.

    Args:
        writer: Sends the response.
        interval_s: The silence before a comment.
        limit: Expires when a write has got nowhere for `MAX_STALL_S`.
    """

    def __init__(self, writer: _Writer, interval_s: float, limit: asyncio.Timeout) -> None:
        self._writer = writer
        self._interval_s = interval_s
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(min(self._interval_s, MAX_STALL_S), self._beat)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._beating is not None:
            self._beating.cancel()

    def _beat(self) -> None:
        now = self._loop.time()
        silent_s = now - self._writer.written_at
        next_s = self._interval_s - silent_s
        if self._writer.is_writing:
            if silent_s >= MAX_STALL_S:
                self._limit.reschedule(now)
                return
            next_s = min(self._interval_s, MAX_STALL_S - silent_s)
        elif next_s <= 0:
            # A task of its own: the response's may be waiting for its session's store.
            self._beating = self._loop.create_task(self._writer.beat(self._interval_s))
            next_s = self._interval_s
        self._timer = self._loop.call_later(min(next_s, MAX_STALL_S), self._beat)
