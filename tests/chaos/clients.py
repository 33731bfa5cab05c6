"""HTTP clients that know the right answer to everything they ask, and a crowd of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, Self

import aiohttp

from raylm.engines.simulated import greedy_text, prompt_text
from raylm.messages import Message, Request

LONG = 600
"""Tokens of the answers that are on their way when something breaks; at 50 tokens/s they take twelve seconds."""

_TIMEOUT_S = 300.0

Outcome = Literal["right", "broken", "refused", "error"]
"""The right answer, whole; a connection that broke; an HTTP status that is no success; an `error` event."""


class Ask:
    """One streamed request and what has come of it. A well-formed answer that is not the right one fails the test.

    Attributes:
        outcome: How it ended; None while it runs.
        status: HTTP status; 0 where none came.
        headers: Of the response.
        problem: What is known of a failure.
        text: What came so far.
        live: Set once the first text is there.
        heard_at: When the latest came, of `time.monotonic`.
        gaps: Every silence longer than a second: when it ended, and how long it was.
        elapsed_s: From the request to its end.
    """

    def __init__(self, path: str, body: dict[str, Any], expected: str) -> None:
        self.path = path
        self.body = body
        self.expected = expected
        self.outcome: Outcome | None = None
        self.status = 0
        self.headers: dict[str, str] = {}
        self.problem = ""
        self.text = ""
        self.live = asyncio.Event()
        self.heard_at = 0.0
        self.gaps: list[tuple[float, float]] = []
        self.elapsed_s = 0.0

    def __repr__(self) -> str:
        return f"<{self.path} {self.body}: {self.outcome} {self.status} {self.problem} after {len(self.text)}>"

    async def run(self, http: aiohttp.ClientSession) -> Self:
        """Send it and read to the end."""
        began = self.heard_at = time.monotonic()
        try:
            async with http.post(self.path, json=self.body) as response:
                self.status = response.status
                self.headers = {name.lower(): value for name, value in response.headers.items()}
                if response.status != 200:
                    self.outcome, self.problem = "refused", await response.text()
                    assert response.status >= 400, self
                else:
                    self.outcome = await self._read(response)
        except (aiohttp.ClientError, ConnectionError) as error:
            self.outcome, self.problem = "broken", repr(error)
        finally:
            self.elapsed_s = time.monotonic() - began
            self.live.set()
        return self

    async def _read(self, response: aiohttp.ClientResponse) -> Outcome:
        ended = finished = False
        async for name, data in _events(response):
            assert not ended, f"{self}: {data} after the end"
            if name == "error":
                self.problem, ended = data, True
            elif self.path == "/stream_chat":
                ended = self._take_status(json.loads(data))
            elif data == "[DONE]":
                ended = True
                assert finished, f"{self}: no finish reason"
            else:
                assert not finished, f"{self}: {data} after the finish reason"
                finished = self._take_chunk(json.loads(data))
        assert ended, f"{self}: a well-formed stream without an end"
        assert self.expected.startswith(self.text), f"{self}: {self.text!r} is not how {self.expected!r} begins"
        if self.problem:
            return "error"
        assert self.text == self.expected, f"{self}: truncated"
        return "right"

    def _take_chunk(self, chunk: dict[str, Any]) -> bool:
        choice = chunk["choices"][0]
        self._hear(choice.get("text") or choice.get("delta", {}).get("content") or "")
        return choice.get("finish_reason") is not None

    def _take_status(self, turn: dict[str, Any]) -> bool:
        assert turn["status"] in (0, 1), f"{self}: {turn}"
        assert turn["text"].startswith(self.text), f"{self}: {turn} does not go on"
        self._hear(turn["text"][len(self.text) :])
        return bool(turn["status"] == 0)

    def _hear(self, text: str) -> None:
        now = time.monotonic()
        if text:
            self.text += text
            if self.live.is_set() and now - self.heard_at > 1:
                self.gaps.append((now, now - self.heard_at))
            self.heard_at = now
            self.live.set()


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, str]]:
    name = ""
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, line.removeprefix("data: ")
            name = ""
        else:
            assert not line or line.startswith(":"), f"not an event: {line!r}"


def chat(model: str, prompt: str, num_tokens: int = LONG) -> Ask:
    """Return a chat completion."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "max_tokens": num_tokens, "temperature": 0, "stream": True}
    return Ask("/v1/chat/completions", body, _answer([Message("user", prompt)], num_tokens))


def completion(model: str, prompt: str, num_tokens: int = LONG) -> Ask:
    """Return a text completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True}
    return Ask("/v1/completions", body, greedy_text(prompt, num_tokens))


def _answer(transcript: Sequence[Message], num_tokens: int) -> str:
    return greedy_text(prompt_text(Request(request_id="", messages=tuple(transcript))), num_tokens)


class Conversation:
    """A session whose transcript the server keeps, beside what it should be.

    Attributes:
        transcript: What it should be.
    """

    def __init__(self, model: str, session_id: str) -> None:
        self.model = model
        self.session_id = session_id
        self.transcript: list[Message] = []

    def turn(self, text: str, num_tokens: int = LONG) -> Ask:
        """Return the next turn. It is part of the transcript once `note` was told that it went right."""
        body = {
            "model": self.model,
            "inputs": text,
            "session_id": self.session_id,
            "sequence_start": not self.transcript,
            "sequence_end": False,
            "max_new_tokens": num_tokens,
            "temperature": 0,
            "timeout": None,
        }
        return Ask("/stream_chat", body, _answer([*self.transcript, Message("user", text)], num_tokens))

    def note(self, ask: Ask) -> None:
        """Take note of a turn's end."""
        if ask.outcome == "right":
            self.transcript += [Message("user", ask.body["inputs"]), Message("assistant", ask.text)]

    async def say(self, http: aiohttp.ClientSession, text: str, num_tokens: int = 5) -> Ask:
        """Run a turn which has to go right. While an earlier one holds the session, it is tried again."""
        while True:
            ask = await self.turn(text, num_tokens).run(http)
            if ask.status != 409:
                break
            await asyncio.sleep(0.1)
        assert ask.outcome == "right", ask
        self.note(ask)
        return ask

    async def stored(self, http: aiohttp.ClientSession) -> list[Message]:
        """Return the transcript that the server has."""
        async with http.get(f"/sessions/{self.session_id}", params={"model": self.model}) as response:
            assert response.status == 200, await response.text()
            found = await response.json()
        return [Message(message["role"], message["content"]) for message in found["messages"]]

    async def end(self, http: aiohttp.ClientSession) -> None:
        """Forget it."""
        async with http.delete(f"/sessions/{self.session_id}", params={"model": self.model}) as response:
            assert response.status == 200, await response.text()


class Crowd:
    """Clients whose long answers are on their way at the same time: chats, completions, and turns of sessions.

    Attributes:
        model: Who answers.
        asks: The long answers.
        turns: Those that are turns of sessions, with their sessions.
        moves: How many attempts the model had lost before, by cause.
        conversations: These sessions, and others that are between two turns.
    """

    def __init__(self, http: aiohttp.ClientSession, model: str, name: str, num_tokens: int) -> None:
        self._http = http
        self.model = model
        self._name = name
        self._num_tokens = num_tokens
        self.moves: dict[str, int] = {}
        self.asks: list[Ask] = []
        self.conversations: list[Conversation] = []
        self.turns: list[tuple[Conversation, Ask]] = []
        self.tasks: list[asyncio.Task[Ask]] = []

    async def start(self, size: int) -> None:
        """Start `size` long answers; returns when all of them are on their way.

        On a machine so busy that the first are over before the last begin, longer ones are started.
        """
        num_sessions = size // 3
        self.conversations = [
            Conversation(self.model, f"{self._name}-{number}") for number in range(num_sessions + num_sessions // 2)
        ]
        for round_ in range(2):
            await asyncio.gather(*(talk.say(self._http, f"turn {round_}") for talk in self.conversations))
        await self._start(size, num_sessions)
        while any(ask.outcome is not None for ask in self.asks):
            await self.finish()
            failed = [ask for ask in self.asks if ask.outcome != "right"]
            assert not failed, f"before anything was broken: {failed}"
            self._num_tokens *= 2
            await self._start(size, num_sessions)

    async def _start(self, size: int, num_sessions: int) -> None:
        self.turns = [(talk, talk.turn("tell me more", self._num_tokens)) for talk in self.conversations[:num_sessions]]
        self.asks = [ask for _, ask in self.turns]
        for number in range(size - num_sessions):
            make = chat if number % 2 else completion
            self.asks.append(make(self.model, f"{self._name} {number}", self._num_tokens))
        self.tasks = [asyncio.create_task(ask.run(self._http)) for ask in self.asks]
        await asyncio.gather(*(ask.live.wait() for ask in self.asks))

    async def finish(self) -> None:
        """Wait for the end of every long answer."""
        await asyncio.gather(*self.tasks)
        for talk, ask in self.turns:
            talk.note(ask)

    async def all_right(self) -> None:
        """Wait for the end; every answer has to be the right one, and every session to go on."""
        await self.finish()
        failed = [ask for ask in self.asks if ask.outcome != "right"]
        assert not failed, failed
        await self.sessions_go_on()

    async def sessions_go_on(self) -> None:
        """Run one more turn of every session, which has to go right with the whole transcript, and end them."""
        await asyncio.gather(*(talk.say(self._http, "and then?") for talk in self.conversations))
        for talk in self.conversations:
            assert await talk.stored(self._http) == talk.transcript
            await talk.end(self._http)

    def stall_s(self, since: float) -> float:
        """Return the longest silence that a client met after `since`, in seconds; 0 where none was over a second."""
        return max((length for ask in self.asks for ended_at, length in ask.gaps if ended_at > since), default=0.0)

    async def leave(self) -> None:
        """Close what is still open."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a client of as many connections as there are requests."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as http:
        yield http
