"""EngineActor: the one Ray actor class for engines, and its end of the token plane.

    submit(client, requests)   starts requests, many in one call
    poll(client)               everything produced for that client since its last poll; waits while there is nothing
    cancel(client, keys)       aborts requests

One poll is in flight per client. While it is on its way, each request's deltas are merged into one, so under load calls
get fewer and fuller by themselves, and idle a token waits for nothing. With hundreds of requests a reply waits some
milliseconds for company (`_MAX_REST_S`). Messages are msgpack bytes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time

import msgspec
import ray
from pydantic import TypeAdapter

from raylm import heap
from raylm.actors.janitor import SWEEP_S, gpus_free, mark, sweep
from raylm.config import EngineConfig
from raylm.engines import build
from raylm.engines.lmdeploy_worker import PLACEMENT_GROUP_VARIABLE
from raylm.errors import (
    ActorLostError,
    EngineError,
    EngineStartError,
    ErrorMessage,
    NoActorError,
    RaylmError,
    to_message,
)
from raylm.messages import Delta, EngineInfo, EngineStatistics, Request

HEARTBEAT_S = 5.0
"""A poll comes back after this long, empty, when there is nothing to tell."""

PROGRESS_S = 0.25
"""A request that is not wanted as a stream tells its progress this often, so that a watchdog sees it live and a lost
actor costs no more than this."""

LEASE_S = 10.0
"""A client that has not polled for this long is gone; its requests are aborted."""

_REST_PER_REQUEST_S = 80e-6
_MAX_REST_S = 0.02
"""Between two replies to a client there is at least this much time for each of its requests, up to that much.

A reply costs about 0.6 ms of CPU in this process whatever is in it, nearly all of it Ray's. Of an engine whose requests
have each a pace of their own, more would go to replies than to tokens. With few requests the wait is next to nothing.
It is never more than half of the time between two tokens of a request: a delta would wait for most of the next one.
"""

_GAP_WINDOW_S = 0.1
"""What that time is told by: longer than most engines' steps, for tokens come in bursts."""

_MAX_BACKOFF_S = 60.0
"""The longest pause between two attempts to start the engine; the first one is 1 s, and each is twice as long."""

_MAX_EXPIRED = 1000
"""Clients that are still told that they were taken for lost, should they come back."""

_log = logging.getLogger(__name__)


class Submission(msgspec.Struct, array_like=True):
    """The argument of `submit`.

    Attributes:
        keys: One number for each request, never used before by this client.
        requests: The requests.
    """

    keys: list[int]
    requests: list[Request]


class PollReply(msgspec.Struct, array_like=True):
    """The answer of `poll`.

    Attributes:
        keys: Which request each of `deltas` belongs to.
        deltas: At most one for each request.
        failures: Requests that ended with an error.
        statistics: The engine's load.
    """

    keys: list[int]
    deltas: list[Delta]
    failures: list[tuple[int, ErrorMessage]]
    statistics: EngineStatistics


class ActorInfo(msgspec.Struct, frozen=True):
    """The answer of `describe`.

    Attributes:
        engine: What the engine says of itself.
        actor: Id of this actor.
        node: Host name of its node.
        pid: Its process.
        gpus: The GPUs that Ray gave it, by their number on the node.
    """

    engine: EngineInfo
    actor: str
    node: str
    pid: int
    gpus: list[int]


_encode = msgspec.msgpack.Encoder().encode
_decode_submission = msgspec.msgpack.Decoder(Submission).decode
_decode_request = msgspec.msgpack.Decoder(Request).decode
_engine_config: TypeAdapter[EngineConfig] = TypeAdapter(EngineConfig)


class _Client:
    """The mailbox of one pool."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.work: dict[int, _Work] = {}
        self.dirty: list[_Work] = []  # has a delta to send now
        self.quiet: list[_Work] = []  # has one that can wait for `progress_due`
        self.progress_due: asyncio.TimerHandle | None = None
        self.failures: list[tuple[int, ErrorMessage]] = []
        self.num_polls = 0  # in flight; the lease runs while there is none
        self.seen_at = time.monotonic()
        self.told_at = 0.0  # when the latest delta left
        self._token_gap_s = 0.0  # between two tokens of a request
        self._counted = 0.0, 0  # when there were new tokens last, and how many there were by then

    def collect(self, statistics: EngineStatistics) -> bytes:
        """Empty the mailbox into one message."""
        self.told_at = time.monotonic()
        counted_at, num_tokens = self._counted
        window_s, num_new = self.told_at - counted_at, statistics.num_tokens - num_tokens
        if window_s > _GAP_WINDOW_S and num_new:
            self._token_gap_s = window_s * statistics.num_running / num_new
            self._counted = self.told_at, statistics.num_tokens
        reply = PollReply([], [], self.failures, statistics)
        for work in self.dirty:
            if work.pending is not None:  # it may be here twice, once for its progress and once for its end
                reply.keys.append(work.key)
                reply.deltas.append(work.pending)
                work.pending = None
        self.dirty = []
        self.failures = []
        self.ready.clear()
        return _encode(reply)

    async def rest(self) -> None:
        """Return when it is time for another reply."""
        due_at = self.told_at + min(_MAX_REST_S, self._token_gap_s / 2, _REST_PER_REQUEST_S * len(self.work))
        if (left_s := due_at - time.monotonic()) > 0:
            await asyncio.sleep(left_s)

    def send(self, work: _Work) -> None:
        """Have the next poll take a delta along."""
        if not self.dirty:
            self.ready.set()
        self.dirty.append(work)

    def hold_back(self, work: _Work) -> None:
        """Keep a delta until the next progress is due."""
        self.quiet.append(work)
        if self.progress_due is None:
            self.progress_due = asyncio.get_running_loop().call_later(PROGRESS_S, self._tell_progress)

    def _tell_progress(self) -> None:
        self.progress_due = None
        self.dirty += self.quiet
        self.quiet = []
        self.ready.set()


class _Work:
    """One request of one client."""

    __slots__ = ("client", "finished", "key", "pending", "stream", "task")

    def __init__(self, client: _Client, key: int, *, stream: bool) -> None:
        self.client = client
        self.key = key
        self.stream = stream
        self.pending: Delta | None = None
        self.finished = False
        self.task: asyncio.Task[None] | None = None

    def emit(self, delta: Delta) -> None:
        """Take the next delta from the engine."""
        first = self.pending is None
        if self.pending is None:
            self.pending = delta
        else:
            self.pending.extend(delta)
        if delta.finish_reason is not None:
            self.finished = True
            self.client.send(self)
        elif first:
            if self.stream:
                self.client.send(self)
            else:
                self.client.hold_back(self)

    def leave(self, _task: asyncio.Task[None]) -> None:
        """Be none of the client's any more: it has ended."""
        del self.client.work[self.key]


class EngineActor:
    """Hosts one engine.

    Args:
        config: An `EngineConfig` as JSON.
    """

    def __init__(self, config: str) -> None:
        if (group := ray.util.get_current_placement_group()) is not None:
            # For an engine in a child process whose ranks are Ray actors.
            os.environ[PLACEMENT_GROUP_VARIABLE] = group.id.hex()
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        mark()
        checked = _engine_config.validate_json(config)
        self._engine = build(checked)
        self._on_gpus = getattr(checked, "device", "") == "cuda"
        self._clients: dict[str, _Client] = {}
        self._expired: dict[str, None] = {}  # clients that were taken for lost, the latest last
        self._starting: asyncio.Task[EngineInfo] | None = None
        self._start_failures: list[RaylmError] = []  # in a row
        self._start_again_at = 0.0
        self._reaper: asyncio.Task[None] | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def describe(self) -> bytes:
        """Return an `ActorInfo`, once the engine has started. The first call starts it.

        Raises:
            EngineStartError: it did not start. Calls try again once in a while, ever more seldom.
        """
        if self._starting is None:
            if self._start_failures and time.monotonic() < self._start_again_at:
                raise self._start_failures[-1].with_traceback(None)
            self._starting = asyncio.create_task(self._start())
        info = await asyncio.shield(self._starting)
        if self._reaper is None:
            self._reaper = asyncio.create_task(self._abort_lost_clients())
            heap.settle()
        actor = ray.get_runtime_context().get_actor_id()
        gpus = [int(gpu) for gpu in ray.get_gpu_ids()]
        return _encode(ActorInfo(info, actor, socket.gethostname(), os.getpid(), gpus))

    async def start_failures(self) -> list[str]:
        """Return what each attempt to start said, since the engine was last up."""
        return [str(error) for error in self._start_failures]

    async def submit(self, client_id: str, submission: bytes) -> None:
        """Start the requests of a `Submission`, and return at once. A key that is known is not started again."""
        client = self._client(client_id)
        batch = _decode_submission(submission)
        for key, request in zip(batch.keys, batch.requests, strict=True):
            if key not in client.work:
                work = _Work(client, key, stream=request.stream)
                client.work[key] = work
                work.task = asyncio.create_task(self._run(work, request))
                work.task.add_done_callback(work.leave)  # one that is cancelled before it has begun ends nowhere else

    async def poll(self, client_id: str) -> bytes:
        """Return a `PollReply` for a client, as soon as there is something in it or a heartbeat is due.

        Raises:
            NoActorError: the client has not polled for so long that its requests were aborted. Told once.
        """
        if client_id in self._expired:
            del self._expired[client_id]
            await self.forget(client_id)
            raise NoActorError(f"nobody polled for {LEASE_S:g} s, so the requests were aborted")
        client = self._client(client_id)
        client.num_polls += 1
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await client.ready.wait()
            await client.rest()
        except TimeoutError:
            pass
        finally:
            client.num_polls -= 1
            client.seen_at = time.monotonic()
        return client.collect(self._engine.statistics())

    async def cancel(self, client_id: str, keys: list[int]) -> None:
        """Abort requests of a client. Keys that are unknown or done are passed over."""
        client = self._client(client_id)
        for key in keys:
            if (work := client.work.get(key)) is not None and work.task is not None:
                work.task.cancel()

    async def forget(self, client_id: str) -> None:
        """Abort all requests of a client and free its mailbox."""
        if (client := self._clients.pop(client_id, None)) is not None:
            if client.progress_due is not None:
                client.progress_due.cancel()
            for work in client.work.values():
                if work.task is not None:
                    work.task.cancel()

    async def tokenize(self, request: bytes) -> list[int]:
        """Return the ids of the prompt's tokens of a `Request`.

        Raises:
            InvalidRequestError: the engine cannot tell, or cannot take that prompt.
        """
        try:
            return list(await self._engine.tokenize(_decode_request(request)))
        except ActorLostError as error:
            self._die(error)
            raise

    async def check_health(self) -> None:
        """Raise the engine's own word when it cannot work."""
        try:
            await self._engine.check_health()
        except ActorLostError as error:
            self._die(error)

    async def statistics(self) -> EngineStatistics:
        """Return the engine's load."""
        return self._engine.statistics()

    async def close(self) -> None:
        """Abort everything and close the engine; the actor can then be killed without leaving a process behind."""
        for client_id in tuple(self._clients):
            await self.forget(client_id)
        for task in (self._reaper, self._sweeper):
            if task is not None:
                task.cancel()
        await self._engine.close()

    async def _start(self) -> EngineInfo:
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(_sweep())
        try:
            await asyncio.to_thread(sweep)
            if self._on_gpus:
                await gpus_free(_whole_gpus())
            info = await self._engine.start()
        except Exception as error:  # the border to libraries: whatever it is, it is told as a failure
            known = error if isinstance(error, RaylmError) else EngineStartError(f"{type(error).__name__}: {error}")
            self._start_failures.append(known)
            self._start_again_at = time.monotonic() + min(_MAX_BACKOFF_S, 2.0 ** (len(self._start_failures) - 1))
            self._starting = None
            raise known from error
        self._start_failures = []
        return info

    def _client(self, client_id: str) -> _Client:
        client = self._clients.get(client_id)
        if client is None:
            client = self._clients[client_id] = _Client()
        return client

    async def _run(self, work: _Work, request: Request) -> None:
        try:
            await self._engine.generate(request, work.emit)
            if not work.finished:
                raise EngineError("the engine ended a request without a finish reason")  # noqa: TRY301
        except ActorLostError as error:
            self._die(error)
        except RaylmError as error:
            self._fail(work, error)
        except Exception as error:  # noqa: BLE001
            # The border to code that is not ours: nothing may get past it and leave a request without an end.
            _log.exception("request %s met an error that its engine does not know", request.request_id)
            self._fail(work, EngineError(f"{type(error).__name__} in the engine: {error}"))

    def _fail(self, work: _Work, error: RaylmError) -> None:
        work.client.failures.append((work.key, to_message(error)))
        work.client.ready.set()

    def _die(self, error: ActorLostError) -> None:
        # Ray starts a new process for this actor; pools see a dead actor, the one case they handle anyway.
        _log.error("the engine is dead for good, and so is this actor: %s", error)
        logging.shutdown()
        os._exit(1)

    async def _abort_lost_clients(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 4)
            now = time.monotonic()
            for client_id, client in tuple(self._clients.items()):
                if not client.num_polls and now - client.seen_at > LEASE_S:
                    _log.warning("client %s has not polled for %.0f s: its requests are aborted", client_id, LEASE_S)
                    await self.forget(client_id)
                    self._expired[client_id] = None
                    if len(self._expired) > _MAX_EXPIRED:
                        del self._expired[next(iter(self._expired))]


async def _sweep() -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        await asyncio.to_thread(sweep)


def _whole_gpus() -> list[int]:
    """Return the GPUs that this actor has for itself."""
    share = ray.get_runtime_context().get_assigned_resources().get("GPU", 0)
    return [int(gpu) for gpu in ray.get_gpu_ids()] if share >= 1 else []
