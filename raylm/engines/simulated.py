"""SimulatedEngine: a clock, not a model. For benchmarks and fault tests; it calls itself `simulated` wherever it shows.

Every running stream gets one token per tick of the clock. A token is a word and a space. Greedy text is a function of
the prompt's tokens alone, so a test knows the answer without asking, and a continued request must arrive at the same
text.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from zlib import crc32

from raylm._version import __version__
from raylm.config import Fault, SimulatedConfig
from raylm.engines.base import Emit
from raylm.engines.text import StopWords
from raylm.errors import ContextLengthError, EngineError, InvalidRequestError
from raylm.messages import Candidates, Delta, Details, EngineInfo, EngineStatistics, GenerationConfig, Request, Usage

_SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")
_WORDS = tuple(f"{first}{second} " for first in _SYLLABLES for second in _SYLLABLES)


def prompt_text(request: Request) -> str:
    """Return the text that the simulated engine takes a request's prompt to be."""
    if request.prompt is not None:
        return request.prompt
    if request.prompt_token_ids is not None:
        return " ".join(map(str, request.prompt_token_ids))
    return "".join(f"{message.role}: {message.content}\n" for message in request.messages or ())


def greedy_text(prompt: str, num_tokens: int) -> str:
    """Return what the simulated engine answers to `prompt` when it decodes greedily, without stop words."""
    seed = _seed(_token_ids(prompt))
    return "".join(_word(seed, index) for index in range(num_tokens))


def prompt_tokens(request: Request) -> tuple[int, ...]:
    """Return the token ids that the simulated engine takes a request's prompt to have: one for each of its words."""
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    return _token_ids(prompt_text(request))


def _token_ids(text: str) -> tuple[int, ...]:
    return tuple(crc32(word.encode()) for word in text.split())


def _seed(token_ids: tuple[int, ...]) -> int:
    return crc32(repr(token_ids).encode())


def candidates(token_id: int, text: str, num: int) -> Candidates:
    """Return the likeliest tokens where the simulated engine has a token.

    The token's own log-probability is one of -1/8, -2/8, ... -2. One with an even id is the likeliest of all. One with
    an odd id comes second, after the word "z".

    Args:
        token_id: The token that is there.
        text: Its text.
        num: How many.
    """
    logprob = _logprob(token_id)
    ranked = [(text, logprob)] if token_id % 2 == 0 else [("z", logprob / 2), (text, logprob)]
    ranked += [(f"z{rank}", logprob - rank / 8) for rank in range(1, num)]
    return tuple(ranked[:num])


def _logprob(token_id: int) -> float:
    return -(token_id % 16 + 1) / 8


def _word_id(seed: int, index: int) -> int:
    # Weyl sequence over the seed: cheap, and neighbouring indices differ.
    return (seed + index * 0x9E3779B9 >> 8) & 255


def _word(seed: int, index: int) -> str:
    return _WORDS[_word_id(seed, index)]


class _Stream:
    """One running request."""

    __slots__ = (
        "config",
        "done",
        "echo",
        "emit",
        "fault",
        "limit",
        "num_tokens",
        "plain",
        "prompt_tokens",
        "seed",
        "starts_at",
        "stop_words",
    )

    def __init__(self, emit: Emit, done: asyncio.Future[None], config: GenerationConfig) -> None:
        self.emit = emit
        self.done = done
        self.config = config
        self.echo: Request | None = None  # its prompt is to be told
        self.num_tokens = 0
        self.limit = 0
        self.plain = False  # it has begun, and has no fault, no stop words and nothing to tell but text
        self.prompt_tokens = 0
        self.seed = 0
        self.starts_at = 0.0
        self.fault: Fault | None = None
        self.stop_words: StopWords | None = None

    def advance(self, count: int) -> None:
        """Produce the next `count` tokens, fewer at the end."""
        first = self.num_tokens
        last = min(first + count, self.limit)
        if count == 1:
            text = _word(self.seed, first) if first < last else ""
        else:
            text = "".join(_word(self.seed, index) for index in range(first, last))
        self.num_tokens = last
        delta = Delta(text, last)
        if self.config.logprobs or self.echo is not None:
            self._detail(delta, first)
        if self.stop_words is not None:
            delta.text, hit = self.stop_words.feed(text)
            if hit:
                delta.finish_reason = "stop"
            elif last == self.limit:
                delta.text += self.stop_words.flush()
        if last == self.limit and delta.finish_reason is None:
            delta.finish_reason = "length"
        if delta.finish_reason is not None:
            delta.usage = Usage(self.prompt_tokens, last)
            self.done.set_result(None)
        self.emit(delta)

    def _detail(self, delta: Delta, first: int) -> None:
        """Put into a delta what else is told of its tokens, of which `first` is the number of the first."""
        config, details = self.config, Details()
        if config.logprobs:
            # A word has an even id, so that it is the likeliest where it was generated.
            delta.token_ids = tuple(2 * _word_id(self.seed, index) for index in range(first, delta.num_tokens))
            delta.logprobs = tuple(map(_logprob, delta.token_ids))
            details.token_texts = tuple(_WORDS[token_id // 2] for token_id in delta.token_ids)
            if config.top_logprobs:
                told = zip(delta.token_ids, details.token_texts, strict=True)
                details.top_logprobs = tuple(candidates(*token, config.top_logprobs) for token in told)
        if self.echo is not None:
            details.prompt_token_ids = prompt_tokens(self.echo)
            details.prompt_token_texts = tuple(f"{word} " for word in prompt_text(self.echo).split())
            if config.logprobs:
                details.prompt_logprobs = (0.0, *map(_logprob, details.prompt_token_ids[1:]))
            if config.top_logprobs:
                told = zip(details.prompt_token_ids[1:], details.prompt_token_texts[1:], strict=True)
                details.prompt_top_logprobs = ((), *(candidates(*token, config.top_logprobs) for token in told))
            self.echo = None
        delta.details = details


class SimulatedEngine:
    """Answers at a fixed rate with words that depend on the prompt.

    Args:
        config: Rate, capacity and faults.
    """

    def __init__(self, config: SimulatedConfig) -> None:
        self._config = config
        self._streams: dict[_Stream, None] = {}  # in the order of their start, in which memory is read fastest
        self._num_tokens = 0
        self._hung = False
        self._clock: asyncio.Task[None] | None = None
        self._work = asyncio.Event()

    async def start(self) -> EngineInfo:
        """Start the clock."""
        self._clock = asyncio.create_task(self._tick())
        config = self._config
        return EngineInfo(
            engine="simulated",
            engine_version=__version__,
            model=config.model_name,
            max_context=config.max_context,
            capacity=config.capacity,
            device="clock",
        )

    async def generate(self, request: Request, emit: Emit) -> None:
        """Run one stream until its last token. See `engines.base.Engine.generate`."""
        stream = self._open(request, emit)
        self._streams[stream] = None
        self._work.set()
        try:
            await stream.done
        finally:
            del self._streams[stream]

    def _open(self, request: Request, emit: Emit) -> _Stream:
        config, prompt = request.config, prompt_text(request)
        _check(request, prompt)
        token_ids = prompt_tokens(request)
        num_prompt = len(token_ids)
        room = self._config.max_context - num_prompt
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens and the context of {self._config.model_name} holds "
                f"{self._config.max_context}, answer included; shorten the prompt"
            )
        loop = asyncio.get_running_loop()
        stream = _Stream(emit, loop.create_future(), config)
        stream.prompt_tokens = num_prompt
        stream.echo = request if config.echo and request.generated is None else None
        stream.limit = min(config.max_new_tokens, room)
        stream.starts_at = loop.time() + self._config.first_token_s
        stream.seed = _seed(token_ids)
        if not config.greedy:
            stream.seed ^= crc32(str(random.random() if config.seed is None else config.seed).encode())  # noqa: S311
        stream.fault = next((fault for fault in self._config.faults if fault.match in prompt), None)
        if config.stop_words:
            stream.stop_words = StopWords(config.stop_words)
        if request.generated is not None:
            stream.num_tokens = min(request.generated.num_tokens, stream.limit)
            if stream.stop_words is not None:
                stream.stop_words.feed("".join(_word(stream.seed, index) for index in range(stream.num_tokens)))
        return stream

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        interval_s = 1 / self._config.tokens_per_s
        ticked_at = loop.time()
        while True:
            if not self._streams:
                self._work.clear()
                await self._work.wait()
                ticked_at = loop.time()
            # A late wake-up gives every stream the tokens it missed: the rate holds, like that of a real decode loop
            # that does not wait for its reader.
            await asyncio.sleep(ticked_at + interval_s - loop.time())
            count = max(1, int((loop.time() - ticked_at) / interval_s))
            ticked_at += count * interval_s
            self._advance(count, ticked_at)
            if self._hung:
                return

    def _advance(self, count: int, now: float) -> None:
        num_tokens = 0
        for stream in tuple(self._streams):
            before = stream.num_tokens
            if count == 1 and stream.plain and before + 1 < stream.limit:
                # Nearly every token of a benchmark, and its cost counts there: nothing but the token itself.
                stream.num_tokens = before + 1
                num_tokens += 1
                stream.emit(Delta(_WORDS[(stream.seed + before * 0x9E3779B9 >> 8) & 255], before + 1))
                continue
            if stream.starts_at > now or stream.done.done():
                continue
            stream.plain = (
                stream.fault is None
                and stream.stop_words is None
                and not stream.config.logprobs
                and stream.echo is None
            )
            fault = stream.fault
            if fault is not None and before + count >= fault.at_token:
                if fault.at_token - 1 > before:
                    stream.advance(fault.at_token - 1 - before)
                if not stream.done.done():
                    self._strike(fault, stream)
                continue
            stream.advance(count)
            num_tokens += stream.num_tokens - before
        self._num_tokens += num_tokens

    def _strike(self, fault: Fault, stream: _Stream) -> None:
        if fault.action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "hang":
            self._hung = True
        else:
            stream.done.set_exception(EngineError(f"simulated failure at token {fault.at_token}"))

    async def tokenize(self, request: Request) -> tuple[int, ...]:
        """Return one id for each word of the prompt. See `engines.base.Engine.tokenize`."""
        _check(request, prompt_text(request))
        return prompt_tokens(request)

    async def check_health(self) -> None:
        """Raise EngineError once a `hang` fault has struck."""
        if self._hung:
            raise EngineError("the simulated engine hangs, as its configuration asked")

    def statistics(self) -> EngineStatistics:
        """Return the number of running streams and of tokens since the start."""
        return EngineStatistics(num_running=len(self._streams), num_tokens=self._num_tokens)

    async def close(self) -> None:
        """Stop the clock; streams still running fail."""
        if self._clock is not None:
            self._clock.cancel()
            await asyncio.gather(self._clock, return_exceptions=True)
        for stream in self._streams:
            if not stream.done.done():
                stream.done.set_exception(EngineError("the engine was closed"))


def _check(request: Request, prompt: str) -> None:
    """Raise InvalidRequestError for what the simulated engine cannot honour."""
    if not prompt.strip():
        raise InvalidRequestError("the prompt is empty; send at least one word")
    for name in ("presence_penalty", "frequency_penalty", "json_schema"):
        if getattr(request.config, name):
            raise InvalidRequestError(f"{name}: the simulated engine cannot honour it; leave it out")
