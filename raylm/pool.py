"""Pool: the one client of engine actors. Plain asyncio, in whatever process needs answers.

A `Pool` has a `Link` to the actor of each slot and a `Stream` for each request.

The life of a request. It waits in a queue of the pool, not at an actor, until a slot has room (`_dispatch`). It travels
to the slot's actor together with everything else dispatched in the same loop tick (`Link.flush`). Its deltas come back
in the replies of the link's one long poll (`Link.on_reply`), and its end releases the room (`_settle`).

What can go wrong with an attempt, and what follows:

1.  The actor dies (`Link.lost`). Every request there goes back to the head of the queue and continues elsewhere after
    the tokens it already has. Any of them may be what killed the actor, so each is under suspicion until its next
    attempt has got past the point where the last one was lost, and a slot has one request on trial at a time. If an
    actor dies with a request on trial, that request is what kills actors, and it alone fails.
2.  The engine raises. A wrong request fails; anything that may work elsewhere goes back to the queue.
3.  Nothing is heard for too long (`_watch`). The attempt is cancelled and the request goes elsewhere. The actor gets a
    health check, and is replaced if it does not pass.
4.  The slot is to end (`drain`, then `detach`). It gets nothing new, and what it has not finished by then moves.
5.  The server behind a client actor fails. The request goes elsewhere, and the slot waits until the server is back.
6.  That server is full. The same, and the slot waits for as long as the server asks. If there is no other slot, so does
    the request.

Deltas carry the key of their attempt, and a key is forgotten with its attempt, so late deltas of a lost attempt find
nobody. All state belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec
import ray
import ray.exceptions

from raylm.actors.engine_actor import PROGRESS_S
from raylm.config import PoolConfig
from raylm.errors import (
    ActorLostError,
    ErrorMessage,
    InvalidRequestError,
    NoActorError,
    PoisonRequestError,
    PoolSaturatedError,
    RaylmError,
    RequestCancelledError,
    RequestTimeoutError,
    UpstreamError,
    from_message,
)
from raylm.link import Link, unwrap
from raylm.messages import Completion, Delta, EngineInfo, Lane, Receipt, Request, Usage, is_part
from raylm.routing import Reservation, Router
from raylm.statistics import MAX_FAILURES, FailedRequest, Histogram, PoolReport, PoolStatistics, SlotStatistics
from raylm.stream import Stream
from raylm.tasks import Tasks

_STREAM_TRIAL_S = 0.1
"""A stream on trial is acquitted by its first delta this long after its first new token. An actor that dies takes the
tokens of its last poll with it, and the attempt has to get past those: several polls, and still short beside a prefill.
A delta has to show it, for the death of an actor is known only a second later."""

_TRIAL_S = 0.8 * PROGRESS_S
"""The same for a request that is not streamed: by then its second progress is told, and what was lost is behind it."""

_TRIALS_IN_A_ROW = 16
"""With more suspects than this for each slot, several are on trial at once, so that the last one does not wait for
minutes."""

_ALONE = 10
"""A request that is silent while others of its slot go on is given this many times the bound."""

_UPSTREAM_PROBE_S = 1.0
"""How often a server that failed is asked whether it is back."""

_MAX_REST_S = 60.0
"""A server that asks to be left alone for longer is asked again then."""

_HISTORY = 512
"""First-token times that the watchdog's bound is learnt from."""

_HISTORY_FACTOR = 8
"""The bound is this many times the slowest of them."""

_MOST_GIVEN_UP = 1000
"""Requests that were given up while they waited are kept in their queues up to this number, and that of the others."""

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode


def _new_lanes() -> dict[Lane, deque[Stream]]:
    return {"interactive": deque(), "batch": deque()}


class _Silence:
    """Fails requests when nothing has happened to any of them for too long.

    Attributes:
        broken_at: When something happened last that their own clocks do not tell.
    """

    def __init__(self, pool: Pool, streams: Collection[Stream], limit_s: float) -> None:
        self._pool = pool
        self._streams = streams
        self._limit_s = limit_s
        self.broken_at = pool.loop.time()
        self._timer = pool.loop.call_later(limit_s, self._check)

    def stop(self) -> None:
        """Leave them alone from now on."""
        self._timer.cancel()

    def _check(self) -> None:
        self.broken_at = max([self.broken_at, *(stream._heard_at for stream in self._streams)])
        left_s = self.broken_at + self._limit_s - self._pool.loop.time()
        if left_s > 0:
            self._timer = self._pool.loop.call_later(left_s, self._check)
        else:
            for stream in tuple(self._streams):
                self._pool._expire(stream, f"nothing came for {self._limit_s:g} s")


class Pool:
    """Chooses an actor for every request, sends, collects, retries and fails over.

    Use as an async context manager, or call `aclose`.

    Args:
        config: Limits and bounds.
        replace: Called with a slot's number and its actor's process when that fails a health check. It ends the
            process; where the actor is restarted, the pool finds the new one by itself.
        guided: Somebody else attaches, drains, detaches and fails slots as their actors come and go. Requests wait for
            that whatever happens to an actor.
    """

    def __init__(
        self,
        config: PoolConfig | None = None,
        replace: Callable[[int, int], None] | None = None,
        *,
        guided: bool = False,
    ) -> None:
        self.config = config or PoolConfig()
        self.loop = asyncio.get_running_loop()
        self.pool_id = uuid.uuid4().hex[:12]
        self.router = Router(self.config.max_pins, self.config.interactive_reserve)
        self.guided = guided
        self._replace = replace
        self._links: dict[int, Link] = {}
        self._tasks = Tasks("a pool")
        self._suspects: deque[Stream] = deque()
        self._trials_at_once = 1  # in each slot
        self._lanes = _new_lanes()
        # Waiting for the one slot they are pinned to, which is up and full; no slot is kept with two empty lanes. Only
        # those of slots that have since got room, or one more to wait, are looked at: there may be very many slots.
        self._pinned: dict[int, dict[Lane, deque[Stream]]] = {}
        self._pinned_due: set[int] = set()
        self._num_waiting: Counter[Lane] = Counter()
        self._num_given_up = 0  # while they waited, since the last sweep
        self._batch_credit = 0.0
        self._dispatch_due = False
        self._keys = itertools.count(1)
        self._first_tokens: deque[float] = deque(maxlen=_HISTORY)  # seconds
        self._first_token_timeout_s = self.config.first_token_timeout_s
        self._last_start_error: RaylmError | None = None
        self._hopeless = False  # no slot will ever be up
        self._num_finished = self._num_failed = self._num_aborted = self._num_tokens = self._num_attempts = 0
        self._moves: Counter[str] = Counter()
        self._failures: deque[FailedRequest] = deque(maxlen=MAX_FAILURES)
        self._first_token_s, self._token_gap_s, self._queue_s = Histogram(), Histogram(), Histogram()
        self._closed = False
        self._ended: RaylmError | None = None
        self._tasks.start(self._watch())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # The slots

    def attach(self, number: int, actor: Any) -> asyncio.Future[None]:
        """Give a slot its actor.

        Args:
            number: The slot's number; stable across restarts of its actor.
            actor: Handle of an `EngineActor`. One that is in the slot already stays as it is.

        Returns:
            A future that is done when the slot is up, or carries the EngineStartError that kept it down.
        """
        known = self._links.get(number)
        if known is not None and known.actor == actor:
            return known.settled
        link = self._links[number] = Link(self, number, actor)
        link.task = self._tasks.start(link.run())
        self._look_for_hope()
        return link.settled

    def drain(self, number: int) -> None:
        """Give a slot no more requests. What runs there runs on; its sessions go elsewhere with their next turns."""
        link = self._links[number]
        if not link.draining:
            link.draining = True
            self.router.drain(number)
            self._look_for_hope()
            self._scatter(number)

    def fail(self, number: int, error: RaylmError) -> None:
        """Take note that the engine of a slot does not start, and is not tried again."""
        link = self._links[number]
        if link.state == "failed":
            return
        if link.task is not None:
            link.task.cancel()
        if link.state in {"up", "suspected"}:
            link.lost(str(error), died=False)
        link.fail(error)

    def detach(self, number: int) -> None:
        """Let go of a slot whose actor is about to end. What runs there moves to another, and goes on."""
        link = self._links.pop(number)
        link.draining = True
        self.router.drain(number)
        if link.task is not None:
            link.task.cancel()
        if link.state in {"up", "suspected"}:
            self._tasks.start(link.forget())
        link.state = "gone"
        link.outbox = []
        for stream in reversed(list(link.streams.values())):
            self._move(stream, "drained", NoActorError(f"slot {number} has ended, and no other took the request"))
        self._scatter(number)
        self.router.remove(number)
        if not link.settled.done():
            link.settled.set_result(None)
        self._look_for_hope()
        self._dispatch_soon()

    @property
    def slots(self) -> list[int]:
        """Numbers of its slots."""
        return sorted(self._links)

    def settled(self) -> list[asyncio.Future[None]]:
        """Return for each slot what `attach` returned."""
        return [link.settled for link in self._links.values()]

    def end(self, error: RaylmError) -> None:
        """Take no requests any more. Those that wait fail, those that run do when their actor does.

        Args:
            error: What they fail with, every request that comes, and whoever waits for a slot.
        """
        self._ended = error
        for stream in self._waiting():
            self._settle(stream, error=error)
        for link in self._links.values():
            if not link.settled.done():
                link.settled.set_exception(error)
                link.settled.exception()  # there may be nobody who waits for it

    def check_open(self) -> None:
        """Do nothing while the pool takes requests.

        Raises:
            NoActorError: it is closed.
            RaylmError: it has ended; see `end`.
        """
        if self._closed:
            raise NoActorError("the pool was closed")
        if self._ended is not None:
            raise copy.copy(self._ended)

    async def aclose(self) -> None:
        """Fail what is still waiting or running, and leave the actors. Ends every task of this pool."""
        if self._closed:
            return
        self._closed = True
        error = NoActorError("the pool was closed")
        running = [stream for link in self._links.values() for stream in link.streams.values()]
        for stream in [*self._waiting(), *running]:
            self._settle(stream, error=error)
        links = [link for link in self._links.values() if link.state in {"up", "suspected"}]
        await self._tasks.aclose()
        try:
            async with asyncio.timeout(self.config.health_timeout_s):
                await asyncio.gather(*(link.forget() for link in links))
        except TimeoutError:
            _log.warning("not every actor took note that the pool was closed; its lease ends what is left")

    # Requests

    def stream(
        self,
        request: Request,
        *,
        lane: Lane = "interactive",
        session_id: str | None = None,
        timeout_s: float | None = None,
        silence_s: float | None = None,
        work_s: float | None = None,
        avoid: Iterable[int] = (),
        ended: Callable[[], None] | None = None,
    ) -> Stream:
        """Start a request and return its deltas as they come.

        Args:
            request: The request.
            lane: Which queue it waits in.
            session_id: Keeps requests of one name in one slot.
            timeout_s: Limit on queue and generation together, in seconds; None: no limit.
            silence_s: Limit on the time in which it neither gets to an actor nor gets a token; None: no limit.
            work_s: Limit on the time since an actor first got it; None: no limit.
            avoid: Slots that take it only when all others are down.
            ended: Called once, when it is done, in the middle of the pool's work: it must not raise, nor call the pool.

        Raises:
            PoolSaturatedError: the queue is full.
            NoActorError: the pool is closed, or none of its slots can be started.
            RaylmError: it has ended; see `end`.
        """
        self._admit(lane, session_id)
        return self._begin(
            request,
            lane=lane,
            session_id=session_id,
            timeout_s=timeout_s,
            silence_s=silence_s,
            work_s=work_s,
            avoid=avoid,
            ended=ended,
        )

    def _admit(self, lane: Lane, session_id: str | None) -> None:
        """Do nothing where there is room for one more request. Raises what `stream` does."""
        self.check_open()
        limit = self.config.max_queued
        if limit is not None and self._num_waiting[lane] >= limit:
            if self._dispatch_due:
                self._dispatch()  # of many that come in one loop tick, only those that find no room wait
            has_room = self.router.has_room(session_id, spare=lane == "batch")
            if self._num_waiting[lane] >= limit and not has_room:
                raise PoolSaturatedError(f"{limit} requests wait already; try again later", retry_after_s=1.0)
        if self._hopeless:
            raise NoActorError(f"no engine could be started; the last one said: {self._last_start_error}")

    def _begin(
        self,
        request: Request,
        *,
        lane: Lane,
        session_id: str | None,
        timeout_s: float | None,
        silence_s: float | None = None,
        work_s: float | None = None,
        avoid: Iterable[int] = (),
        ended: Callable[[], None] | None,
    ) -> Stream:
        stream = Stream(self, request, lane, session_id)
        if timeout_s is not None:
            stream._deadline = self.loop.call_later(timeout_s, self._expire, stream, f"not done within {timeout_s:g} s")
        if silence_s is not None:
            stream._silence = _Silence(self, [stream], silence_s)
        stream._work_s = work_s
        stream._avoid.update(avoid)
        stream._ended = ended
        self._enqueue(stream)
        return stream

    def cancel(self, request_id: str) -> bool:
        """Abort the requests of that id, also inside the engine; return whether there was one.

        The parts of a request are aborted with it; see `messages.is_part`.
        """
        running = [stream for link in self._links.values() for stream in link.streams.values()]
        found = [stream for stream in [*self._waiting(), *running] if is_part(stream.request.request_id, request_id)]
        for stream in found:
            stream.abort()
        return bool(found)

    async def generate(
        self,
        request: Request,
        *,
        lane: Lane = "interactive",
        session_id: str | None = None,
        timeout_s: float | None = None,
        silence_s: float | None = None,
    ) -> Completion:
        """Run a request to its end. Arguments and errors are those of `stream`."""
        request = msgspec.structs.replace(request, stream=False)
        async with self.stream(
            request, lane=lane, session_id=session_id, timeout_s=timeout_s, silence_s=silence_s
        ) as stream:
            return await stream.completion()

    async def generate_many(
        self,
        requests: Sequence[Request],
        *,
        lane: Lane = "batch",
        session_id: str | None = None,
        timeout_s: float | None = None,
        silence_s: float | None = None,
    ) -> list[Completion | RaylmError]:
        """Run many requests, the longest first, so that no long one is left for the end.

        Args:
            requests: The requests.
            lane: Which queue they wait in.
            session_id: Keeps all of them in the slot of that name.
            timeout_s: Those that are not done by then, in seconds, fail with RequestTimeoutError. None: no limit.
            silence_s: When none of them has got to an actor or got a token for this long, those that are left fail
                with RequestTimeoutError. None: no limit.

        Returns:
            One entry for each request, in the order of `requests`: its completion or the error it ended with.

        Raises:
            PoolSaturatedError: the queue is full, and none of them has begun. They are let in together, by the room for
                one: otherwise many would never find room.
            NoActorError: as in `stream`.
            RaylmError: as in `stream`.
        """
        results: list[Completion | RaylmError | None] = [None] * len(requests)
        async for index, result in self.as_completed(
            requests, lane=lane, session_id=session_id, timeout_s=timeout_s, silence_s=silence_s
        ):
            results[index] = result
        return [result for result in results if result is not None]

    async def as_completed(
        self,
        requests: Sequence[Request],
        *,
        lane: Lane = "batch",
        session_id: str | None = None,
        timeout_s: float | None = None,
        silence_s: float | None = None,
    ) -> AsyncGenerator[tuple[int, Completion | RaylmError], None]:
        """Run many requests and yield `(index, completion or error)` as each ends. Leaving early aborts the others.

        Args:
            requests: The requests.
            lane: Which queue they wait in.
            session_id: As in `generate_many`.
            timeout_s: As in `generate_many`.
            silence_s: As in `generate_many`.

        Raises:
            RaylmError: as in `generate_many`.
        """
        ended: asyncio.Queue[int] = asyncio.Queue()
        streams: dict[int, Stream] = {}
        silence: _Silence | None = None
        if requests:
            self._admit(lane, session_id)
        try:
            for index in sorted(range(len(requests)), key=lambda index: -requests[index].config.max_new_tokens):
                request = msgspec.structs.replace(requests[index], stream=False)
                streams[index] = self._begin(
                    request,
                    lane=lane,
                    session_id=session_id,
                    timeout_s=timeout_s,
                    ended=partial(ended.put_nowait, index),
                )
            if silence_s is not None:
                silence = _Silence(self, streams.values(), silence_s)
            for _ in requests:
                index = await ended.get()
                stream = streams.pop(index)
                if silence is not None:
                    silence.broken_at = self.loop.time()
                yield index, stream._error or stream.result()
        finally:
            if silence is not None:
                silence.stop()
            for stream in streams.values():
                stream.abort()

    async def tokenize(self, request: Request) -> list[int]:
        """Return the ids of the prompt's tokens, as an engine of this pool would read it. Generates nothing.

        Raises:
            InvalidRequestError: the engines cannot tell, or cannot take that prompt.
            NoActorError: the pool is closed, or none of its slots is up.
            RequestTimeoutError: the actor that was asked is silent for as long as a first token may take.
            RaylmError: it has ended; see `end`.
        """
        self.check_open()
        message = _encode(request)
        timeout_s = self._first_token_timeout_s
        for link in sorted(self._links.values(), key=lambda link: len(link.streams)):
            if link.state != "up":
                continue
            try:
                async with asyncio.timeout(timeout_s):
                    token_ids: list[int] = await link.actor.tokenize.remote(message)
            except ray.exceptions.RayActorError:
                continue  # the poll in flight tells too
            except ray.exceptions.RayTaskError as error:
                raise unwrap(error) from None
            except TimeoutError:
                self._suspect(link)
                raise RequestTimeoutError(
                    f"slot {link.number} has not answered within {timeout_s:g} s; try again, and another is asked"
                ) from None
            return token_ids
        raise NoActorError("no slot of the pool is up; any request has one start, or waits for it: then try again")

    # What the pool says of itself

    def statistics(self) -> PoolStatistics:
        """Return counts and loads at this moment."""
        slots = tuple(
            SlotStatistics(
                slot=number,
                state="draining" if link.draining else link.state,
                detail=str(link.error or ""),
                model=link.info.engine.model if link.info else "",
                device=link.info.engine.device if link.info else "",
                num_running=len(link.streams),
                capacity=link.info.engine.capacity if link.info else 0,
                outstanding_tokens=self.router.load(number) if link.info else 0,
                num_deaths=link.num_deaths,
                actor=link.info.actor if link.info else "",
                node=link.info.node if link.info else "",
                pid=link.info.pid if link.info else None,
                gpus=link.info.gpus if link.info else [],
                engine=link.statistics,
            )
            for number, link in sorted(self._links.items())
        )
        return PoolStatistics(
            slots=slots,
            num_waiting=self._num_waiting.total(),
            waiting_tokens=sum(stream._tokens for stream in self._waiting()),
            num_running=sum(len(link.streams) for link in self._links.values()),
            num_finished=self._num_finished,
            num_failed=self._num_failed,
            num_aborted=self._num_aborted,
            num_attempts=self._num_attempts,
            num_moved=self._moves.total(),
            moves=dict(self._moves),
            num_tokens=self._num_tokens,
            first_token_timeout_s=self._first_token_timeout_s,
        )

    def report(self) -> PoolReport:
        """Return everything that is to be known of this pool from outside."""
        return PoolReport(
            statistics=self.statistics(),
            first_token_s=self._first_token_s,
            token_gap_s=self._token_gap_s,
            queue_s=self._queue_s,
            failures=list(self._failures),
        )

    def engines(self) -> list[EngineInfo]:
        """Return what the engines of the slots say of themselves, each kind once."""
        found = {link.info.engine: None for link in self._links.values() if link.info}
        return sorted(found, key=lambda engine: (engine.engine, engine.model))

    @property
    def num_up(self) -> int:
        """Slots whose actor can work."""
        return sum(link.state == "up" and not link.draining for link in self._links.values())

    @property
    def can_work(self) -> bool:
        """Whether any slot may ever be up: False once the pool is closed or ended, or no engine could be started.

        A pool without slots waits for some.
        """
        return not self._closed and not self._hopeless and self._ended is None

    @property
    def max_context(self) -> int | None:
        """Prompt and generated tokens together that every slot takes; None as long as none has been up."""
        return min((link.info.engine.max_context for link in self._links.values() if link.info), default=None)

    def __repr__(self) -> str:
        now = self.statistics()
        up = [slot for slot in now.slots if slot.state == "up"]
        models = ", ".join(sorted({slot.model for slot in now.slots if slot.model})) or "no model"
        return (
            f"<Pool {models}: {len(up)} of {len(now.slots)} slots up, {now.num_running} running, "
            f"{now.num_waiting} waiting, {now.num_finished} finished, {now.num_moved} moved, {now.num_failed} failed>"
        )

    # Queue and dispatch

    def _queues(self) -> list[deque[Stream]]:
        return [self._suspects, *(queue for lanes in (self._lanes, *self._pinned.values()) for queue in lanes.values())]

    def _waiting(self) -> Iterable[Stream]:
        return [stream for queue in self._queues() for stream in queue if not stream.done]

    def _queue_of(self, stream: Stream) -> deque[Stream]:
        if stream._suspect:
            return self._suspects
        number = None if stream._session_id is None else self.router.pinned(stream._session_id)
        if number is not None and number not in stream._avoid:
            self._pinned_due.add(number)
            if number not in self._pinned:
                self._pinned[number] = _new_lanes()
            return self._pinned[number][stream._lane]
        return self._lanes[stream._lane]

    def _scatter(self, number: int) -> None:
        """Let what waits for a slot that takes nothing now go to any other."""
        for queue in self._pinned.pop(number, {}).values():
            for stream in queue:
                if not stream.done:
                    self._queue_of(stream).append(stream)
        self._dispatch_soon()

    def _enqueue(self, stream: Stream, *, first: bool = False) -> None:
        stream._enqueued_at = self.loop.time()
        queue = self._queue_of(stream)
        if first:
            queue.appendleft(stream)
        else:
            queue.append(stream)
        self._num_waiting[stream._lane] += 1
        self._dispatch_soon()

    def _dispatch_soon(self) -> None:
        if not self._dispatch_due:
            self._dispatch_due = True
            self.loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Send as much as fits: sessions to their own slots, then suspects, then the lanes."""
        self._dispatch_due = False
        due, self._pinned_due = self._pinned_due, set()
        for number in due:
            if (lanes := self._pinned.get(number)) is not None:
                self._drain_lanes(lanes, slot=number)
                if not any(lanes.values()):
                    del self._pinned[number]
        self._drain(self._suspects)
        self._drain_lanes(self._lanes)

    def _drain_lanes(self, lanes: Mapping[Lane, deque[Stream]], *, slot: int | None = None) -> None:
        """Send from both lanes, and from that of requests in no hurry no more than its share. See `_drain`."""
        interactive, batch = lanes["interactive"], lanes["batch"]
        while interactive and batch and self.router.has_room(spare=True):
            self._batch_credit += self.config.batch_share
            if self._batch_credit >= 1:
                self._batch_credit -= 1
                sent = self._drain(batch, most=1, slot=slot, spare=True)
            else:
                sent = self._drain(interactive, most=1, slot=slot)
            if not sent:
                break  # the room that there is is not for these
        self._drain(interactive, slot=slot)
        self._drain(batch, slot=slot, spare=True)

    def _drain(
        self, queue: deque[Stream], *, most: int | None = None, slot: int | None = None, spare: bool = False
    ) -> int:
        """Send from the head of a queue until it is empty, or nothing has room, or `most` are sent; return how many.

        Args:
            queue: The queue.
            most: How many to send at most; None: no limit.
            slot: The one that all of the queue wait for, so that none is sent past one that has to wait. Those whose
                session has another slot by now go to the queue of that.
            spare: Leave the reserve of each slot alone.
        """
        kept = []  # have to wait for a slot that is not among those with room
        sent = 0
        while queue and sent != most and self.router.has_room(spare=spare):
            stream = queue.popleft()
            if stream.done:
                continue
            if slot is not None and (other := self._queue_of(stream)) is not queue:
                other.append(stream)
                self._dispatch_soon()
                continue
            trial = self._trials_at_once if stream._suspect else None
            reservation = self.router.choose(
                stream._tokens, stream._session_id, stream._avoid, trial=trial, spare=spare
            )
            if reservation is None:
                kept.append(stream)
                if slot is not None:
                    break
                continue
            self._num_waiting[stream._lane] -= 1
            self._start(stream, reservation)
            sent += 1
        queue.extendleft(reversed(kept))
        return sent

    def _start(self, stream: Stream, reservation: Reservation) -> None:
        now = self.loop.time()
        link = self._links[reservation.slot]
        stream._queue_s += now - stream._enqueued_at
        stream._reservation = reservation
        stream._link = link
        stream._key = next(self._keys)
        stream._attempts += 1
        stream._spoke = False
        stream._watched = True
        stream._on_trial = stream._suspect
        stream._heard_at = now
        self._num_attempts += 1
        if stream._work_s is not None:
            what = f"not done within {stream._work_s:g} s of work"
            stream._deadline = self.loop.call_later(stream._work_s, self._expire, stream, what)
            stream._work_s = None
        link.streams[stream._key] = stream
        link.unsent.add(stream._key)
        if stream._on_trial:
            self._tasks.start(link.send_to_living(stream, stream._key))
        else:
            link.send(stream)

    # The end of an attempt

    def _leave(self, stream: Stream) -> None:
        """Take a stream off its slot. The one place where room is released."""
        link, reservation = stream._link, stream._reservation
        if link is None or reservation is None:
            return
        del link.streams[stream._key]
        link.unsent.discard(stream._key)
        self.router.release(reservation)
        if link.number in self._pinned:
            self._pinned_due.add(link.number)
        stream._link = None
        stream._reservation = None
        stream._on_trial = False
        self._dispatch_soon()

    def _settle(self, stream: Stream, *, receipt: Receipt | None = None, error: RaylmError | None = None) -> None:
        """End a request. The one place where it becomes done."""
        waits = stream._link is None
        if waits:
            self._num_waiting[stream._lane] -= 1  # it is still in a queue, which passes over what is done
        self._leave(stream)
        stream._receipt = receipt
        stream._error = error
        if stream._deadline is not None:
            stream._deadline.cancel()
        if stream._silence is not None:
            stream._silence.stop()
        if isinstance(error, RequestCancelledError):
            self._num_aborted += 1
        elif error is not None:
            self._num_failed += 1
            failed = FailedRequest(time.time(), type(error).__name__, error.message, stream.request.request_id)
            self._failures.append(failed)
        stream._wake()
        if stream._ended is not None:
            stream._ended()
        if waits:
            self._num_given_up += 1
            if self._num_given_up > _MOST_GIVEN_UP + self._num_waiting.total():
                self._sweep()

    def _sweep(self) -> None:
        """Take what is done out of the queues: these may not move for hours, while clients come and go."""
        self._num_given_up = 0
        for queue in self._queues():
            waiting = [stream for stream in queue if not stream.done]
            queue.clear()
            queue.extend(waiting)

    def _finish(self, stream: Stream, last: Delta) -> None:
        link, reservation = stream._link, stream._reservation
        if link is None or link.info is None or reservation is None:
            raise AssertionError("unreachable: only a running stream has deltas")
        info = link.info
        now = self.loop.time()
        self._queue_s.observe(stream._queue_s)
        if stream.request.stream:  # else the actor has held its tokens back
            self._first_token_s.observe(stream._first_token_at - stream._started_at)
            if last.num_tokens > 1:
                self._token_gap_s.observe((now - stream._first_token_at) / (last.num_tokens - 1))
        self._num_finished += 1
        self._num_tokens += last.num_tokens
        receipt = Receipt(
            slot=link.number,
            actor=info.actor,
            node=info.node,
            why=f"moved:{stream._moved}" if stream._moved else reservation.why,
            queue_ms=round(stream._queue_s * 1e3, 3),
            attempts=stream._attempts,
            usage=last.usage or Usage(0, last.num_tokens),
            engine=info.engine.engine,
            engine_version=info.engine.engine_version,
            model=info.engine.model,
            fingerprint=info.engine.fingerprint,
        )
        self._settle(stream, receipt=receipt)

    def _attempt_failed(self, stream: Stream, failure: ErrorMessage) -> None:
        error = from_message(failure)
        link = stream._link
        full = isinstance(error, PoolSaturatedError)
        if not error.retryable or isinstance(error, InvalidRequestError):
            self._settle(stream, error=error)
        else:
            # One that does not say until when it is full may never have room: those attempts are counted.
            self._move(stream, "full" if full and error.retry_after_s is not None else "failed", error)
        if (full or isinstance(error, UpstreamError)) and link is not None:
            # A slot that fails at once has always room, and would draw all requests to it.
            self._suspect(link, rest_s=error.retry_after_s or (_UPSTREAM_PROBE_S if full else 0))

    def _move(self, stream: Stream, cause: str, error: RaylmError, *, tried: bool = True) -> None:
        """Give up the current attempt and queue the next one, or fail with `error` when none is left.

        Args:
            stream: What is moved.
            cause: Why.
            error: What it fails with.
            tried: It has reached its actor.
        """
        link = stream._link
        if link is None:
            return
        if stream._spoke:
            stream._fruitless = 0
        elif tried and cause not in ("drained", "full"):  # else nothing has failed
            stream._fruitless += 1
        if self._ended is not None or stream._fruitless >= self.config.max_attempts:
            self._settle(stream, error=self._ended or error)
            return
        self._leave(stream)
        if cause not in ("died", "full"):
            stream._avoid.add(link.number)
        stream._moved = cause
        self._moves[cause] += 1
        self._enqueue(stream, first=True)

    def _abandon(self, stream: Stream) -> None:
        """Abort a request that nobody waits for any more."""
        if stream.done:
            return
        if stream._link is not None:
            stream._link.cancel([stream._key])
        self._settle(stream, error=RequestCancelledError("the request was cancelled"))

    def _expire(self, stream: Stream, what: str) -> None:
        if stream.done:
            return
        if stream._link is not None:
            stream._link.cancel([stream._key])
        if any(link.state in {"up", "suspected"} for link in self._links.values()):
            error: RaylmError = RequestTimeoutError(
                f"{what} ({stream.num_tokens} of its own so far); allow a longer timeout, or ask for less"
            )
        else:
            error = NoActorError(f"{what}: no actor came up", retry_after_s=5.0)
        self._settle(stream, error=error)

    # The state of slots

    def _slot_up(self, link: Link) -> None:
        if link.info is None:
            raise AssertionError("unreachable: a slot comes up with its description")
        self.router.up(link.number, link.info.engine.capacity)
        self._hopeless = False
        self._dispatch_soon()

    def _slot_down(self, link: Link, why: str, *, died: bool) -> None:
        self.router.down(link.number)
        streams = list(link.streams.values())
        unsent, link.unsent = link.unsent, set()
        link.outbox = []
        sent = [stream for stream in streams if stream._key not in unsent]
        on_trial = [stream for stream in sent if stream._on_trial] if died else []
        culprit = on_trial[0] if len(on_trial) == 1 else None
        if culprit is not None:
            error = PoisonRequestError(
                f"two actors died while they worked on request {culprit.request.request_id}; "
                "it is not tried on a third. Look into the actors' logs for what it does to the engine"
            )
            self._settle(culprit, error=error)
        # From the last to the first, each to the head of its queue: order is kept.
        for stream in reversed(streams):
            if stream is not culprit:
                tried = stream._key not in unsent
                if tried:
                    stream._suspect = died and culprit is None and (stream._on_trial or not on_trial)
                lost = ActorLostError(f"slot {link.number}: {why}")
                self._move(stream, "died" if died else "lease", lost, tried=tried)
        # One at a time is certain: who is on trial at a second death is the culprit. Of several, each is tried again.
        num_slots = max(1, self.num_up)
        num_waves = math.ceil(len(self._suspects) / num_slots / _TRIALS_IN_A_ROW)
        self._trials_at_once = 1 if on_trial else max(1, num_waves)
        self._scatter(link.number)

    def _slot_failed(self, error: RaylmError) -> None:
        self._last_start_error = error
        self._look_for_hope()

    def _look_for_hope(self) -> None:
        """Find out whether any slot may ever be up; fail what waits when none will."""
        staying = [link for link in self._links.values() if not link.draining]
        self._hopeless = bool(staying) and all(link.state == "failed" for link in staying)
        if self._hopeless:
            error = self._last_start_error
            for stream in self._waiting():
                self._settle(stream, error=NoActorError(f"no engine could be started; the last one said: {error}"))

    def _hear(self, stream: Stream, now: float) -> None:
        """Take note of a delta of an attempt that has just begun or is on trial."""
        if not stream._spoke:
            stream._spoke = True
            self._first_tokens.append(now - stream._heard_at)
            if not stream._first_token_at:
                stream._first_token_at = now
            stream._acquit_at = now + (_STREAM_TRIAL_S if stream.request.stream else _TRIAL_S)
        elif now >= stream._acquit_at and stream._reservation is not None:
            stream._on_trial = stream._suspect = False
            self.router.acquit(stream._reservation)
            self._dispatch_soon()
        stream._watched = stream._on_trial

    async def _watch(self) -> None:
        """Move requests that nothing is heard of, and have their actors' health checked."""
        gap_s = self.config.token_gap_timeout_s
        interval_s = min(1.0, gap_s / 4, self.config.first_token_timeout_s / 4)
        while True:
            await asyncio.sleep(interval_s)
            now = self.loop.time()
            slowest = max(self._first_tokens, default=0)
            self._first_token_timeout_s = max(self.config.first_token_timeout_s, _HISTORY_FACTOR * slowest)
            for link in self._links.values():
                silent = []
                for stream in link.streams.values():
                    bound_s = gap_s if stream._spoke else self._first_token_timeout_s
                    if not stream.request.stream:
                        bound_s += PROGRESS_S
                    # While others there get tokens, it most likely waits for its turn inside the engine.
                    silence_s = now - stream._heard_at
                    if silence_s > bound_s and (now - link.heard_at > bound_s or silence_s > _ALONE * bound_s):
                        silent.append(stream)
                if not silent:
                    continue
                _log.warning("slot %d is silent about %d requests: they move", link.number, len(silent))
                link.cancel([stream._key for stream in silent])
                for stream in silent:
                    error = RequestTimeoutError(
                        f"{self.config.max_attempts} actors in a row gave no token within {bound_s:.1f} s; "
                        "look at their health, or raise first_token_timeout_s or token_gap_timeout_s"
                    )
                    self._move(stream, "silent", error)
                self._suspect(link)

    def _suspect(self, link: Link, rest_s: float = 0) -> None:
        """Give a slot no new work until its actor has passed a health check; have the actor replaced if it does not.

        Args:
            link: The slot's.
            rest_s: For how long the server behind it wants no requests, whatever its health is.
        """
        if link.state == "up":
            link.state = "suspected"
            self.router.suspend(link.number, suspended=True)
            self._scatter(link.number)
            self._tasks.start(self._examine(link, min(rest_s, _MAX_REST_S)))

    async def _examine(self, link: Link, rest_s: float) -> None:
        client_id = link.client_id
        await asyncio.sleep(rest_s)
        while link.client_id == client_id and link.state == "suspected":
            try:
                async with asyncio.timeout(self.config.health_timeout_s):
                    await link.actor.check_health.remote()
            except ray.exceptions.RayActorError:
                return  # the poll in flight tells too
            except (TimeoutError, ray.exceptions.RayTaskError) as error:
                cause = unwrap(error) if isinstance(error, ray.exceptions.RayTaskError) else error
                if isinstance(cause, UpstreamError):  # another actor would meet the same server
                    await asyncio.sleep(_UPSTREAM_PROBE_S)
                    continue
                _log.warning("slot %d fails its health check: %s", link.number, cause or "no answer")
                if self._replace is not None and link.info is not None:
                    self._replace(link.number, link.info.pid)  # which leaves it alone where it is well by then
                await asyncio.sleep(self.config.health_timeout_s)
            else:
                break
        if link.client_id == client_id and link.state == "suspected":
            link.state = "up"
            self.router.suspend(link.number, suspended=False)
            self._dispatch_soon()
