"""Streams whose session store, or whose client, stands still, on a server in this process of the kind Serve has."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from raylm.config import Fault, GatewayConfig, PoolConfig, SimulatedConfig
from raylm.engines.simulated import greedy_text, prompt_text
from raylm.errors import SessionBusyError
from raylm.messages import GenerationConfig, Message, Request
from raylm.serve import streams
from raylm.serve.door import Door
from raylm.serve.schema import CompletionWire, StreamChatWire
from raylm.serve.streams import EventStream, Turn
from tests.conftest import Running, StartPool, ask

HEARTBEAT = b": heartbeat\n\n"
_BUFFER_BYTES = 2**15
_TIMEOUT_S = 60.0


class Client:
    """A client of one response."""

    def __init__(self, connected: socket.socket) -> None:
        self._connected = connected
        self.heard = b""

    async def read(self, num_bytes: int = 2**16) -> bytes:
        """Return what has come, nothing at the end."""
        loop = asyncio.get_running_loop()
        got = await asyncio.wait_for(loop.sock_recv(self._connected, num_bytes), _TIMEOUT_S)
        self.heard += got
        return got

    async def read_until(self, end: bytes, count: int = 1) -> None:
        """Read until something has come so often."""
        while self.heard.count(end) < count:
            assert await self.read(), self.heard

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the events have in them."""
        chunks = re.split(rb"(?:^|\r\n)[0-9a-f]+\r\n", self.heard.partition(b"\r\n\r\n")[2])
        lines = [line for line in b"".join(chunks).split(b"\n") if line.startswith(b"data: {")]
        return [json.loads(line.removeprefix(b"data: ")) for line in lines]


Visit = Callable[[EventStream], Awaitable[Client]]


@pytest.fixture
async def visit() -> AsyncIterator[Visit]:
    """Serves a response to a client with little room of its own; returns the client."""
    async with AsyncExitStack() as stack:

        async def visit(response: EventStream) -> Client:
            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                await response(scope, receive, send)

            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            config = uvicorn.Config(Door(app, GatewayConfig()), lifespan="off", log_config=None)
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listening]))

            async def stop() -> None:
                server.should_exit = server.force_exit = True
                await serving

            stack.push_async_callback(stop)
            connected = stack.enter_context(socket.socket())
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            connected.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connected, listening.getsockname())
            await loop.sock_sendall(connected, b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
            return Client(connected)

        yield visit


def turn_of(running: Running, num_tokens: int, *, start: bool = True) -> Turn:
    """Return a turn of the session `s`."""

    def request(messages: tuple[Message, ...]) -> Request:
        return Request(
            request_id="turn", messages=messages, config=GenerationConfig(max_new_tokens=num_tokens, temperature=0)
        )

    return running.conversations.turn("s", (Message("user", "hello"),), request, start=start, end=False)


def answer(num_tokens: int) -> str:
    """Return what such a turn is answered with when it is the first."""
    return greedy_text(prompt_text(Request(request_id="", messages=(Message("user", "hello"),))), num_tokens)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def store_of(running: Running) -> int:
    """Return the process of the session store."""
    pid: int = await running.manager.sessions.__ray_call__.remote(lambda _: os.getpid())
    return pid


async def test_heartbeats_while_a_session_is_claimed(start_pool: StartPool, visit: Visit) -> None:
    """A client hears something while the session store does not answer, and then its answer."""
    running = await start_pool(SimulatedConfig(tokens_per_s=1000))
    with stopped(await store_of(running)):
        client = await visit(EventStream([turn_of(running, 5)], StreamChatWire(stream=True), 0.05))
        await client.read_until(HEARTBEAT, 3)
        assert client.heard.startswith(b"HTTP/1.1 200 ")
    await client.read_until(b"0\r\n\r\n")
    assert client.events[-1]["text"] == answer(5)


async def test_heartbeats_while_a_turn_is_appended(start_pool: StartPool, visit: Visit) -> None:
    """A client hears something while the session store does not take what it was answered, and then the end."""
    running = await start_pool(SimulatedConfig(tokens_per_s=200))
    store = await store_of(running)
    with ExitStack() as stack:
        with stopped(running.pid(0)):
            client = await visit(EventStream([turn_of(running, 100)], StreamChatWire(stream=True), 0.05))
            async with asyncio.timeout(_TIMEOUT_S):
                while not running.pool.statistics().num_running:
                    await asyncio.sleep(0.01)
            stack.enter_context(stopped(store))
        while not client.events or client.events[-1]["n_tokens"] < 100:
            assert await client.read()
        assert client.events[-1]["status"] == 1
        heard = len(client.heard)
        await client.read_until(HEARTBEAT, client.heard.count(HEARTBEAT) + 3)
        assert set(client.heard[heard:].replace(HEARTBEAT, b"").split()) <= {b"d"}  # the lengths of chunks
    await client.read_until(b"0\r\n\r\n")
    assert (client.events[-1]["status"], client.events[-1]["text"]) == (0, answer(100))


async def test_heartbeats_with_headers(start_pool: StartPool, visit: Visit) -> None:
    """A stream that begins with a heartbeat tells which actor works on it, where that is known."""
    running = await start_pool(SimulatedConfig())
    with stopped(running.pid(0)):
        turn = running.pool.stream(ask("hello", 5))  # which waits for no store
        client = await visit(EventStream([turn], StreamChatWire(stream=True), 0.2))
        await client.read_until(HEARTBEAT)
    assert b"x-raylm-slot: 0\r\n" in client.heard
    await client.read_until(b"0\r\n\r\n")
    assert client.events[-1]["text"] == greedy_text("hello", 5)


async def test_client_stops_reading(start_pool: StartPool, visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops reading has its request aborted and its connection cut, and its session is free."""
    running = await start_pool(SimulatedConfig(tokens_per_s=1000, max_context=10**6))
    client = await visit(EventStream([turn_of(running, 10**5)], StreamChatWire(stream=True), 0.1))
    await client.read_until(b"data: ")
    with pytest.raises(SessionBusyError):
        async with turn_of(running, 5):
            raise AssertionError
    monkeypatch.setattr(streams, "MAX_STALL_S", 0.5)
    async with asyncio.timeout(_TIMEOUT_S):
        while running.pool.statistics().num_running:
            await asyncio.sleep(0.01)
        assert running.pool.statistics().num_aborted == 1
        while True:
            with suppress(SessionBusyError):
                async with turn_of(running, 5) as stream:
                    assert (await stream.completion()).text == answer(5)
                break
    with suppress(ConnectionResetError):
        while await client.read():
            pass
    assert not client.heard.endswith(b"0\r\n\r\n")


async def test_client_reads_slowly(start_pool: StartPool, visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads slowly, but does, gets all of an answer that comes in one piece."""
    monkeypatch.setattr(streams, "MAX_STALL_S", 10)  # longer than a busy machine keeps this process waiting
    running = await start_pool(SimulatedConfig(tokens_per_s=10**5, max_context=10**6))
    client = await visit(EventStream([turn_of(running, 10**5)], StreamChatWire(stream=False), 10))
    began = asyncio.get_running_loop().time()
    while not client.heard.endswith(b"0\r\n\r\n"):
        assert await client.read(2**14)
        await asyncio.sleep(0.5)
    assert asyncio.get_running_loop().time() - began > 11
    assert b'"status":0' in client.heard


async def test_failure_in_the_middle_of_a_write(start_pool: StartPool, visit: Visit) -> None:
    """When a choice fails while the client has half an event of another, it gets the other half before the error."""
    fault = Fault(match="FAIL", at_token=10**5, action="fail")
    engine = SimulatedConfig(tokens_per_s=10**5, max_context=10**6, faults=(fault,))
    running = await start_pool(engine, config=PoolConfig(max_attempts=1))
    prompts = ["go on", "FAIL"]
    wire = CompletionWire("id", "sim", prompts, include_usage=False, logprobs=False, echo=False)
    turns = [running.pool.stream(ask(prompt, 5 * 10**5)) for prompt in prompts]
    client = await visit(EventStream(turns, wire, 10))
    async with asyncio.timeout(_TIMEOUT_S):
        while not running.pool.statistics().num_failed:
            await asyncio.sleep(0.01)
    await client.read_until(b"event: error")
    await client.read_until(b"\r\n0\r\n\r\n")
    assert client.events[-1]["error"]["type"] == "EngineError"
    choices = [event["choices"][0] for event in client.events[:-1]]
    for index, prompt in enumerate(prompts):
        text = "".join(choice["text"] for choice in choices if choice["index"] == index)
        assert text
        assert greedy_text(prompt, 5 * 10**5).startswith(text)
