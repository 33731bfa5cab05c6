"""Link: a pool's connection to the actor in one slot, and its end of the token plane.

What leaves for the actor in one loop tick leaves in one call (`Link.flush`); what comes back comes in the replies of
one long poll (`Link.on_reply`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import ray.exceptions

from raylm.actors.engine_actor import ActorInfo, PollReply, Submission
from raylm.errors import ActorLostError, EngineStartError, InvalidRequestError, RaylmError, first_line
from raylm.messages import EngineStatistics, Request
from raylm.stream import Stream

if TYPE_CHECKING:
    from raylm.pool import Pool

_MAX_START_FAILURES = 3
"""A slot whose engine fails to start this often in a row counts as failed. It is tried again all the same."""

_MAX_BACKOFF_S = 60.0
"""The longest pause between two attempts to start an engine."""

_CANNOT_BE_ENCODED = (TypeError, ValueError, OverflowError)
"""What msgspec raises for a value of no type that it knows, for text that is not valid Unicode, and for a number out of
msgpack's range."""

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode_reply = msgspec.msgpack.Decoder(PollReply).decode
_decode_info = msgspec.msgpack.Decoder(ActorInfo).decode


class Link:
    """A pool's connection to the actor in one slot, across the actor's restarts.

    Args:
        pool: Whose connection it is.
        number: The slot's number.
        actor: Handle of its `EngineActor`.
    """

    def __init__(self, pool: Pool, number: int, actor: Any) -> None:
        self.pool = pool
        self.number = number
        self.actor = actor
        self.state = "starting"
        self.draining = False  # it gets no more requests, and no new actor when this one dies
        self.info: ActorInfo | None = None
        self.statistics: EngineStatistics | None = None
        self.num_deaths = 0
        self.heard_at = 0.0  # when the latest delta came
        self.streams: dict[int, Stream] = {}  # by key of their attempt
        self.client_id = ""
        self.outbox: list[Stream] = []
        self.unsent: set[int] = set()  # keys of attempts that the actor cannot have seen
        self.submitting: set[int] = set()  # keys in calls that have not returned
        self.given_up: set[int] = set()  # those among them that are to be aborted then
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # up once, failed, or gone
        self.error: RaylmError | None = None  # why it is not up
        self.task: asyncio.Task[None] | None = None  # that of `run`

    async def run(self) -> None:
        """Connect, poll until the actor is lost, and again."""
        connections = itertools.count()
        num_failures = 0
        while not self.draining:
            try:
                info = _decode_info(await self.actor.describe.remote())
            except ray.exceptions.ActorDiedError as error:
                if self.pool.guided:
                    self.state = "down"
                    return
                self.fail(EngineStartError(f"the actor of slot {self.number} is gone: {first_line(error)}"))
                return
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.1)  # it is being restarted
                continue
            except ray.exceptions.RayTaskError as error:
                cause = unwrap(error)
                num_failures += 1
                if not self.pool.guided and (num_failures >= _MAX_START_FAILURES or not self.settled.done()):
                    self.fail(cause)
                _log.warning("slot %d did not start (%d): %s", self.number, num_failures, cause)
                await asyncio.sleep(min(2.0**num_failures, _MAX_BACKOFF_S))
                continue
            num_failures = 0
            # A new name for every connection: what the actor still does for the old one is aborted by its lease.
            self.client_id = f"{self.pool.pool_id}-{self.number}.{next(connections)}"
            self.info = info
            self.state = "up"
            self.error = None
            self.pool._slot_up(self)
            if not self.settled.done():
                self.settled.set_result(None)
            poll = self.actor.poll.remote
            try:
                while self.state != "down":
                    self.on_reply(_decode_reply(await poll(self.client_id)))
            except ray.exceptions.RayActorError as error:
                self.lost(first_line(error))
            except ray.exceptions.RayTaskError as error:
                self.lost(str(unwrap(error)), died=False)

    def on_reply(self, reply: PollReply) -> None:
        """Hand every delta to its stream."""
        now = self.pool.loop.time()
        self.statistics = reply.statistics
        if reply.deltas:
            self.heard_at = now
        streams = self.streams
        for key, delta in zip(reply.keys, reply.deltas, strict=True):
            stream = streams.get(key)
            if stream is None:
                continue  # of an attempt that was given up
            stream._deltas.append(delta)
            if stream._watched:
                self.pool._hear(stream, now)
            stream._heard_at = now
            if delta.finish_reason is not None:
                self.pool._finish(stream, delta)
            waiter = stream._waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        for key, failure in reply.failures:
            if (stream := streams.get(key)) is not None:
                self.pool._attempt_failed(stream, failure)

    def send(self, stream: Stream) -> None:
        """Put a stream into the call that leaves at the end of this loop tick."""
        if not self.outbox:
            self.pool.loop.call_soon(self.flush)
        self.outbox.append(stream)

    async def send_to_living(self, stream: Stream, key: int) -> None:
        """Send a stream on trial once the actor has shown that it is alive, so that no earlier death is laid to it."""
        try:
            await self.actor.check_health.remote()  # an actor whose engine has died before says so, and ends
        except ray.exceptions.RayActorError:
            return  # the poll in flight tells
        except ray.exceptions.RayTaskError:
            pass  # of a server, say: the request meets it in its turn
        if stream._link is self and stream._key == key:
            self.send(stream)

    def flush(self) -> None:
        """Submit the outbox in one call."""
        batch = [(stream._key, stream) for stream in self.outbox if stream._link is self]
        self.outbox = []
        if not batch:
            return
        requests = []
        for key, stream in batch:
            self.unsent.discard(key)
            request = stream.request
            if stream._attempts > 1:
                request = msgspec.structs.replace(request, generated=stream._generated())
            requests.append(request)
        try:
            submission = _encode(Submission([key for key, _ in batch], requests))
        except _CANNOT_BE_ENCODED:
            batch, submission = self._without_wrong(batch, requests)
            if not batch:
                return
        self.submitting.update(key for key, _ in batch)
        call = self.actor.submit.remote(self.client_id, submission)
        self.pool._tasks.start(self._await_submit(call, self.client_id, batch))

    def _without_wrong(
        self, batch: list[tuple[int, Stream]], requests: list[Request]
    ) -> tuple[list[tuple[int, Stream]], bytes]:
        """Fail the requests that cannot be encoded; return the others, and their submission."""
        rest: list[tuple[int, Stream]] = []
        keys, good = [], []
        for (key, stream), request in zip(batch, requests, strict=True):
            try:
                _encode(request)
            except _CANNOT_BE_ENCODED as error:
                self.pool._settle(stream, error=InvalidRequestError(f"the request cannot be sent: {error}"))
                continue
            rest.append((key, stream))
            keys.append(key)
            good.append(request)
        return rest, _encode(Submission(keys, good))

    async def _await_submit(self, call: Any, client_id: str, batch: list[tuple[int, Stream]]) -> None:
        try:
            await call
        except ray.exceptions.RayActorError as error:
            if self.client_id == client_id:  # else the poll has told before, and the slot is up again
                self.lost(first_line(error))
        except ray.exceptions.RayTaskError as error:
            for key, stream in batch:
                if self.streams.get(key) is stream:
                    self.pool._move(stream, "failed", ActorLostError(f"slot {self.number}: {first_line(error)}"))
        keys = {key for key, _ in batch}
        self.submitting -= keys
        if given_up := self.given_up & keys:
            self.given_up -= given_up
            if self.client_id == client_id:
                self._abort(list(given_up))

    def cancel(self, keys: list[int]) -> None:
        """Abort attempts at the actor.

        An actor of coroutines starts Ray's calls in any order: what is being submitted is aborted when it has been.
        """
        self.given_up.update(self.submitting.intersection(keys))
        if known := [key for key in keys if key not in self.submitting and key not in self.unsent]:
            self._abort(known)

    def _abort(self, keys: list[int]) -> None:
        self.pool._tasks.start(self._quietly(self.actor.cancel.remote(self.client_id, keys)))

    async def forget(self) -> None:
        """Have the actor abort all that it does for this connection."""
        await self._quietly(self.actor.forget.remote(self.client_id))

    async def _quietly(self, call: Any) -> None:
        with suppress(ray.exceptions.RayActorError):  # a dead actor has nothing left to abort
            await call

    def lost(self, why: str, *, died: bool = True) -> None:
        """Close the slot and move everything that was in it. Does nothing when that is done."""
        if self.state in {"down", "gone"}:
            return
        self.state = "down"
        self.num_deaths += died
        self.statistics = None
        _log.warning("slot %d lost its actor with %d requests in it: %s", self.number, len(self.streams), why)
        self.pool._slot_down(self, why, died=died)

    def fail(self, error: RaylmError) -> None:
        """Take note that the engine does not start."""
        self.state = "failed"
        self.error = error
        if not self.settled.done():
            self.settled.set_exception(error)
        self.pool._slot_failed(error)


def unwrap(error: ray.exceptions.RayTaskError) -> RaylmError:
    """Return the error that the actor raised, without Ray's wrapping."""
    cause = error.cause
    return cause if isinstance(cause, RaylmError) else EngineStartError(f"{type(cause).__name__}: {cause}")
